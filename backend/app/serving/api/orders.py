"""请求 -> 引擎要的几段：编码、停止、种子；一切放不下的在这里就说清。"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from app.generation.config import MIN_TEMPERATURE, SamplingConfig
from app.serving.api.errors import wrong
from app.serving.api.fields import (
    MAX_CHARS,
    MAX_PROMPTS,
    MAX_STOPS,
    ChatBody,
    CompletionBody,
    Sampling,
    not_found,
)  # fmt: skip
from app.serving.request import Ask
from app.serving.served import Served

MAX_TEXTS = 64
_DEFAULT_TOKENS = 16


@dataclass(frozen=True)
class Prompt:
    """text：给的是文字时，它本身；给的是词元号时，是解码的文字。"""

    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Job:
    """prompts 每个各有 n 段；asks 的次序是 提示 x n。"""

    served: Served
    prompts: tuple[Prompt, ...]
    asks: tuple[Ask, ...]
    n: int
    echo: bool = False
    logprobs: int | None = None
    token_ids: bool = False
    usage: bool = False
    details: int | None = None


def pick(served: Mapping[str, Served], name: str | None) -> Served:
    """点名的模型；只有一个时可以不点。

    Raises:
        ApiError: 没有点名而有几个，或没有这一个。
    """
    if name is None:
        if len(served) > 1:
            raise wrong("model", "several models are served: name one, see GET /v1/models")
        return next(iter(served.values()))
    if name not in served:
        raise not_found("model")
    return served[name]


def completion_job(body: CompletionBody, served: Served, space: str) -> Job:
    """
    Raises:
        ApiError: 400，点名字段与边界。
    """
    most = _DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    prompts = [read_prompt(given, served) for given in _split(body.prompt)]
    if body.truncate_prompt_tokens is not None:
        keep = body.truncate_prompt_tokens
        decode = served.tokenizer.decode
        prompts = [
            p if len(p.ids) <= keep else Prompt(p.ids[-keep:], decode(p.ids[-keep:]))
            for p in prompts
        ]
    echo = bool(body.echo)
    wanted = [k for k in (body.logprobs, body.details) if k is not None]
    asks = _asks(body, served, [p.ids for p in prompts], most, max(wanted, default=None), space)
    if wanted:
        asks = tuple(
            replace(ask, score_prompt=echo and ask.leader is None, details=body.details is not None)
            for ask in asks
        )
    return Job(
        served, tuple(prompts), asks, body.n or 1, echo, body.logprobs,
        bool(body.return_token_ids), _usage(body), body.details,
    )  # fmt: skip


def chat_job(body: ChatBody, served: Served, space: str) -> Job:
    """
    Raises:
        ApiError: 400：模型没有模板，模板不收这些话，或别的越界。
    """
    if served.template is None:
        raise wrong(
            "messages",
            "this model has no chat template: use /v1/completions, or start the server with "
            "--chat-template FILE",
            "no_chat_template",
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise wrong("top_logprobs", "top_logprobs needs logprobs: true")
    ids = tuple(served.template.ids(body.messages, served.tokenizer))
    given = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    most = max(1, served.context - len(ids)) if given is None else given
    top = (body.top_logprobs or 0) if body.logprobs else None
    asks = _asks(body, served, [ids], most, top, space)
    prompt = Prompt(ids, "")
    return Job(
        served, (prompt,), asks, body.n or 1, False, top, bool(body.return_token_ids), _usage(body)
    )


def _usage(body: Sampling) -> bool:
    if body.stream_options is not None and not body.stream:
        raise wrong("stream_options", "stream_options needs stream: true")
    return bool(body.stream_options and body.stream_options.include_usage)


def _split(prompt: Any) -> list[str | list[int]]:
    """四种写法 -> 一个个提示。"""
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""]
    if not prompt:
        raise wrong("prompt", "prompt is an empty list: give at least one prompt")
    if all(isinstance(item, int) for item in prompt):
        return [prompt]
    if len(prompt) > MAX_PROMPTS:
        raise wrong("prompt", f"prompt holds more than {MAX_PROMPTS} prompts")
    return list(prompt)


def read_prompt(given: str | list[int], served: Served) -> Prompt:
    """
    Raises:
        ApiError: 400，太长，编不出，或有词表外的号。
    """
    tokenizer = served.tokenizer
    if isinstance(given, str):
        if len(given) > MAX_CHARS:
            raise wrong("prompt", f"a prompt has more than {MAX_CHARS} characters")
        try:
            return Prompt(tuple(tokenizer.encode_prompt(given)), given)
        except ValueError:
            # 原因里有用户写的字符，不带回去。
            raise wrong("prompt", "the tokenizer of this model cannot encode the prompt") from None
    if not given:
        raise wrong("prompt", "a prompt of token ids is empty: give at least one id")
    check_ids("prompt", given, served)
    return Prompt(tuple(given), tokenizer.decode(given))


def check_ids(name: str, ids: Sequence[int], served: Served) -> None:
    top = served.engine.width
    if min(ids, default=0) < 0 or max(ids, default=0) >= top:
        raise wrong(name, f"{name} holds a token id outside 0..{top - 1}")


def _asks(
    body: Sampling,
    served: Served,
    prompts: Sequence[tuple[int, ...]],
    most: int,
    logprobs: int | None,
    space: str,
) -> tuple[Ask, ...]:
    n = body.n or 1
    if n * len(prompts) > MAX_TEXTS:
        raise wrong("n", f"n x prompts is more than {MAX_TEXTS}: send several requests")
    for ids in prompts:
        if len(ids) + most > served.context or len(ids) > served.context:
            raise wrong(
                "max_tokens",
                f"the prompt has {len(ids)} tokens and max_tokens={most}, together "
                f"{len(ids) + most}, but the model's context is {served.context}",
                "context_length_exceeded",
            )
    if (body.min_tokens or 0) > most:
        raise wrong("min_tokens", f"min_tokens must not be more than max_tokens={most}")
    stop_ids = _stop_ids(body, served)
    if body.min_tokens and len(stop_ids) >= served.engine.width:
        raise wrong("min_tokens", "min_tokens: every token stops the text, so none may be written")
    seed = secrets.randbits(62) if body.seed is None else body.seed
    shared: dict[str, Any] = {
        "max_tokens": most,
        "sampling": _sampling(body),
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "logit_bias": _bias(body, served),
        "min_tokens": body.min_tokens or 0,
        "stop_ids": stop_ids,
        "stop_strings": _stops(body.stop),
        "logprobs": logprobs,
        "cache_prompt": body.cache_prompt is not False,
        "space": space,
    }
    return tuple(
        Ask(
            prompt=ids, seed=choice_seed(seed, i), leader=None if i == 0 else number * n,
            **shared,
        )
        for number, ids in enumerate(prompts)
        for i in range(n)
    )  # fmt: skip


def choice_seed(seed: int, choice: int) -> int:
    """第 choice 段的种子：只看它是第几段，所以同一提示单独问与放在一批里问相同。

    splitmix64（Steele, Lea & Flood 2014）把相邻的号打散；第 0 段就是给的种子。
    """
    if choice == 0:
        return seed
    z = (seed + choice * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) % 2**63


def _sampling(body: Sampling) -> SamplingConfig:
    temperature = 1.0 if body.temperature is None else body.temperature
    if body.top_p == 0:
        # 最小的集合就是最可能的那一个。
        temperature = 0.0
    if 0 < temperature < MIN_TEMPERATURE:
        least = f"0 (greedy) or at least {MIN_TEMPERATURE}"
        raise wrong("temperature", f"temperature must be {least}")
    return SamplingConfig(
        temperature=temperature,
        top_p=None if body.top_p in (None, 0, 1) else body.top_p,
        top_k=body.top_k if body.top_k and body.top_k > 0 else None,
        min_p=body.min_p or None,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
    )


def _bias(body: Sampling, served: Served) -> dict[int, float]:
    found = {}
    for key, value in (body.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 9):
            raise wrong("logit_bias", "logit_bias: the keys must be token ids, as text")
        if not -100 <= value <= 100:
            raise wrong("logit_bias", "logit_bias: the values must be between -100 and 100")
        found[int(key)] = value
    check_ids("logit_bias", list(found), served)
    return found


def _stop_ids(body: Sampling, served: Served) -> frozenset[int]:
    check_ids("stop_token_ids", body.stop_token_ids or [], served)
    own = () if body.ignore_eos else served.tokenizer.stop_ids
    if isinstance(body, ChatBody) and served.template is not None and not body.ignore_eos:
        own = (*own, *served.template.stop_ids(served.tokenizer))
    return frozenset([*own, *(body.stop_token_ids or [])])


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > MAX_STOPS:
        raise wrong("stop", f"stop holds more than {MAX_STOPS} strings")
    if any(not 1 <= len(one) <= 256 for one in stops):
        raise wrong("stop", "stop: each string must have 1 to 256 characters")
    return tuple(stops)
