"""引擎的事件 -> OpenAI 的形状。"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.data.tokenizers import StreamDecoder, Tokenizer
from app.serving.api.orders import Job
from app.serving.request import Event, Scored

# JSON 没有负无穷；lm-eval 要能相加。
_FLOOR = -9999.0


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """一个词元的名字：不是完整 UTF-8 的写成 bytes:\\xNN，否则几个半字符会同名。"""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _named(tokenizer: Tokenizer, pairs: Sequence[tuple[int, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for token, logprob in pairs:
        name = token_text(tokenizer, token)
        if name in found:
            # 两个词元写出同样的文字：后一个用号。
            name = f"token_id:{token}"
        found[name] = max(logprob, _FLOOR)
    return found


@dataclass
class Choice:
    """一段：攒着它的事件。offset：已给出的文字（连同 echo 的提示）有多长。"""

    job: Job
    index: int
    texts: list[str] = field(default_factory=list)
    tokens: list[Scored] = field(default_factory=list)
    finish: str | None = None
    reason: str | int | None = None
    cached: int = 0
    count: int = 0

    @property
    def prompt(self) -> int:
        return self.index // self.job.n

    def take(self, event: Event) -> None:
        self.texts.append(event.text)
        self.tokens += event.tokens
        self.count += len(event.tokens)
        self.cached = max(self.cached, event.cached)
        if event.finish is not None:
            self.finish, self.reason = event.finish, event.reason


class Answer:
    """一个请求的回答：整个的，或一块块的。"""

    def __init__(self, job: Job, chat: bool) -> None:
        self.job, self.chat = job, chat
        self.id = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        self.created = int(time.time())
        self.choices = [Choice(job, i) for i in range(len(job.asks))]
        # 提示的概率只算一次，同一提示的各段共用。
        self._scores: dict[int, tuple[Scored, ...]] = {}

    def take(self, event: Event) -> None:
        choice = self.choices[event.index]
        if event.prompt:
            self._scores[choice.prompt] = event.prompt
        choice.take(event)

    def whole(self) -> dict[str, Any]:
        texts = [(c, "".join(c.texts), c.tokens, True) for c in self.choices]
        return {
            **self._head(""),
            "choices": [self._choice(*one) for one in texts],
            "usage": self.usage(),
        }

    def opening(self) -> Iterator[dict[str, Any]]:
        """流的开头：对话先说谁在说话。"""
        if self.chat:
            for choice in self.choices:
                yield self._chunk({"index": choice.index, "delta": {"role": "assistant"},
                                   "logprobs": None, "finish_reason": None})  # fmt: skip

    def chunk(self, event: Event) -> dict[str, Any]:
        """一个事件一块；echo 的提示与它的概率在那一段的第一块里。"""
        choice = self.choices[event.index]
        first = choice.count == 0 and not choice.texts
        self.take(event)
        made = self._choice(choice, event.text, list(event.tokens), first)
        if not event.ended:
            made["finish_reason"] = made["stop_reason"] = None
        if self.chat:
            made["delta"] = {"content": made.pop("message")["content"]}
        return self._chunk(made)

    def last(self) -> dict[str, Any]:
        return {**self._head(".chunk"), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        job = self.job
        prompt = sum(len(p.ids) for p in job.prompts)
        made = sum(choice.count for choice in self.choices)
        cached = sum(choice.cached for choice in self.choices if choice.index % job.n == 0)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        usage = {"usage": None} if self.job.usage else {}
        return {**self._head(".chunk"), "choices": [choice], **usage}

    def _head(self, kind: str) -> dict[str, Any]:
        served = self.job.served
        name = f"chat.completion{kind}" if self.chat else "text_completion"
        return {
            "id": self.id, "object": name, "created": self.created, "model": served.name,
            "system_fingerprint": served.fingerprint,
        }  # fmt: skip

    def _choice(
        self, choice: Choice, text: str, tokens: list[Scored], first: bool
    ) -> dict[str, Any]:
        """first：这是那一段的开头，echo 的提示在这里。"""
        job, prompt = self.job, self.job.prompts[choice.prompt]
        echo = prompt.text if job.echo else ""
        made: dict[str, Any] = {"index": choice.index}
        if self.chat:
            made["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            made["text"] = (echo if first else "") + text
        made["logprobs"] = None
        if job.logprobs is not None:
            scores = self._scores.get(choice.prompt, ()) if first and job.echo else ()
            made["logprobs"] = (
                self._content(tokens) if self.chat else self._lists(scores, tokens, len(echo))
            )
        if job.details is not None:
            scores = self._scores.get(choice.prompt, ()) if first and job.echo else ()
            made["details"] = [self._detail(one) for one in (*scores, *tokens)]
        if job.token_ids:
            made["token_ids"] = [token.id for token in tokens]
            if first:
                made["prompt_token_ids"] = list(prompt.ids)
        made["finish_reason"], made["stop_reason"] = choice.finish, choice.reason
        made["seed"] = job.asks[choice.index].seed
        return made

    def _lists(
        self, scores: Sequence[Scored], tokens: Sequence[Scored], start: int
    ) -> dict[str, Any]:
        """/v1/completions 的四列。"""
        tokenizer, decoder = self.job.served.tokenizer, StreamDecoder(self.job.served.tokenizer)
        offsets, at = [], 0
        for score in scores:
            offsets.append(at)
            at += len(decoder.push([score.id]))
        every = [*scores, *tokens]
        tops: list[dict[str, float] | None] = []
        k = self.job.logprobs or 0
        for one in every:
            if one.logprob is None:
                tops.append(None)
                continue
            pairs = list(one.top[:k])
            if one.id not in dict(pairs):
                pairs.append((one.id, one.logprob))
            tops.append(_named(tokenizer, pairs))
        return {
            "tokens": [token_text(tokenizer, one.id) for one in every],
            "token_logprobs": [
                None if x.logprob is None else max(x.logprob, _FLOOR) for x in every
            ],
            "top_logprobs": tops,
            "text_offset": offsets + [start + token.at for token in tokens],
        }

    def _detail(self, one: Scored) -> dict[str, Any]:
        tokenizer = self.job.served.tokenizer
        return {
            "id": one.id,
            "text": token_text(tokenizer, one.id),
            "bytes": list(tokenizer.token_bytes(one.id)),
            "logprob": None if one.logprob is None else max(one.logprob, _FLOOR),
            "rank": one.rank,
            "entropy": one.entropy,
            "top": [
                {"id": i, "text": token_text(tokenizer, i), "logprob": max(logprob, _FLOOR)}
                for i, logprob in one.top[: self.job.details]
            ],
        }

    def _content(self, tokens: Sequence[Scored]) -> dict[str, Any]:
        """对话的写法：一个词元一项。"""
        tokenizer = self.job.served.tokenizer

        def one(token: int, logprob: float) -> dict[str, Any]:
            name, data = token_text(tokenizer, token), list(tokenizer.token_bytes(token))
            return {"token": name, "logprob": max(logprob, _FLOOR), "bytes": data}

        return {
            "content": [
                {**one(t.id, t.logprob or 0.0), "top_logprobs": [one(*pair) for pair in t.top]}
                for t in tokens
            ],
            "refusal": None,
        }
