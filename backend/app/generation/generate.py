"""从提示生成：左填充的批、缓存、按行采样、按行停止。

字母：B 行数，V 词表，N 新词元的上限。
一行的结果只由它的提示、种子和设置决定；同批的其它行只会带来浮点舍入（双精度下约 1e-15）。
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from app.data.tokenizers import StreamDecoder, Tokenizer
from app.generation.config import SamplingConfig
from app.generation.context import DecodingContext
from app.generation.overflow import Overflow, check_prompts
from app.generation.sampling import sample, uniforms
from app.generation.stopping import StopText
from app.generation.streaming import SinkContext
from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.cache.kv_cache import Quantize

# 至少这么大一部分的行结束了才搬缓存：搬一次的代价约等于注意力读一遍缓存，
# 按比例搬则总共至多搬几遍，而白算的行不超过这个比例。
_COMPACT_AT = 0.25


@dataclass(frozen=True)
class Completion:
    """一行的结果。

    Attributes:
        tokens: 新词元，不含停止词元；停止串使文本被切断时，只到切口之前的整词元。
        finish: "stop" 遇到停止词元或停止串；"length" 到了 max_new_tokens。
        text: 新文本，在停止串之前切断；没有给 tokenizer 时为 None。
    """

    tokens: list[int]
    finish: Literal["stop", "length"]
    text: str | None


def generate(
    model: GPT2Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: SamplingConfig | None = None,
    seeds: Sequence[int] | None = None,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    overflow: Overflow = "error",
    on_token: Callable[[int, int], None] | None = None,
    prefill_chunk: int | None = None,
    cache_quantize: Quantize = None,
) -> list[list[int]]:
    """每行的新词元；参数与错误见 complete。"""
    done = complete(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seeds=seeds,
        stop_ids=stop_ids,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
        overflow=overflow,
        on_token=on_token,
        prefill_chunk=prefill_chunk,
        cache_quantize=cache_quantize,
    )
    return [completion.tokens for completion in done]


def complete(
    model: GPT2Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: SamplingConfig | None = None,
    seeds: Sequence[int] | None = None,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    overflow: Overflow = "error",
    prefill_chunk: int | None = None,
    cache_quantize: Quantize = None,
    on_token: Callable[[int, int], None] | None = None,
    on_text: Callable[[int, str], None] | None = None,
    on_finish: Callable[[int, Completion], None] | None = None,
) -> list[Completion]:
    """续写每个提示。

    Args:
        prompts: B 行词元号，长短不一，都不空。
        seeds: 每行一个；同一提示与种子在任何批里给出同样的文本。None 则从 torch 的
            默认随机源各取一个。
        overflow: 提示加新词元越过 context_size 时（后两种只给 position 为 rope 或 none 的模型）：
            "error" 在动工之前拒绝；
            "slide" 满了就留最后 context_size//2 个重算（见 window_start），与不用缓存算同一
            窗口相同；
            "extend" 位置照样数下去，与不用缓存算整段相同；每层图样都有界时内存不再增长；
            "sinks" 满了就丢掉缓存的中段（见 SinkContext），不重算，长度没有尽头。
        prefill_chunk: 提示每次喂入的列数，限制长提示的内存；None 为一次喂完。
        cache_quantize: "int8" = 缓存的键值存成 int8，有误差（benchmarks/results/int8_cache.md）。
        on_token: (行, 词元) 每选出一个就调用，不含停止词元。
        on_text: (行, 文本) 可以显示的文本；可能是停止串开头的部分先压住。
        on_finish: (行, 结果) 一行结束时调用。

    Raises:
        ValueError: 空的提示、词表之外的词元、放不下、模型不能用 overflow、个数不符，
            或 logits 不是有限数。
    """
    sampling = sampling or SamplingConfig()
    _check_options(max_new_tokens, prefill_chunk)
    width = _usable_ids(model.config, tokenizer)
    check_prompts(prompts, width, model.config, max_new_tokens, overflow)
    _check_stops(stop_ids, width, stop_strings, tokenizer, on_text)
    draws = _draws(sampling, seeds, len(prompts), max_new_tokens)
    rows = [
        _Row(i, prompt, frozenset(stop_ids), _TextSide.make(tokenizer, stop_strings))
        for i, prompt in enumerate(prompts)
    ]
    calls = _Callbacks(on_token, on_text, on_finish)
    with _evaluating(model), torch.inference_mode():
        kind = SinkContext if overflow == "sinks" else DecodingContext
        context = kind(
            model,
            prompts,
            room=max_new_tokens - 1,
            prefill_chunk=prefill_chunk,
            overflow=overflow,
            quantize=cache_quantize,
        )
        _decode(context, rows, calls, sampling, draws, max_new_tokens, width)
    return [row.completion() for row in rows]


def _decode(
    context: DecodingContext | SinkContext,
    rows: list[_Row],
    calls: _Callbacks,
    sampling: SamplingConfig,
    draws: Tensor | None,
    steps: int,
    width: int,
) -> None:
    """主循环。每步一次前向、一次采样、一次把选中的词元取回主机；只选前 width 个号。"""
    live = rows
    logits = context.prefill()[:, :width]
    seen = _seen(rows, logits) if sampling.repetition_penalty != 1 else None
    for step in range(steps):
        chosen = sample(logits, sampling, None if draws is None else draws[:, step], seen)
        for row, token in zip(live, chosen.tolist(), strict=True):
            if row.finish is None:
                row.accept(token, last=step == steps - 1, calls=calls)
        open_rows = [i for i, row in enumerate(live) if row.finish is None]
        if not open_rows:
            return
        if seen is not None:
            seen.scatter_(1, chosen[:, None], True)
        finished = len(live) - len(open_rows)
        if finished and finished >= _COMPACT_AT * len(live):
            context.keep(open_rows)
            live = [live[i] for i in open_rows]
            keep = torch.tensor(open_rows)
            draws = None if draws is None else draws[keep]
            keep = keep.to(chosen.device)
            chosen, seen = chosen[keep], None if seen is None else seen[keep]
        logits = context.advance(chosen, partial(_history, live))[:, :width]


def _history(live: list[_Row], i: int) -> list[int]:
    return live[i].history()


@dataclass(frozen=True)
class _Callbacks:
    on_token: Callable[[int, int], None] | None
    on_text: Callable[[int, str], None] | None
    on_finish: Callable[[int, Completion], None] | None


class _TextSide:
    """一行的文字一侧：流式解码，再过停止串。"""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._decoder, self.stop = StreamDecoder(tokenizer), StopText(stops)
        self._pieces: list[str] = []

    @classmethod
    def make(cls, tokenizer: Tokenizer | None, stops: Sequence[str]) -> _TextSide | None:
        return None if tokenizer is None else cls(tokenizer, stops)

    def feed(self, token: int) -> str:
        return self._keep(self.stop.feed(self._decoder.push([token])))

    def close(self) -> str:
        return self._keep(self.stop.close(self._decoder.finish()))

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def _keep(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
        return piece


class _Row:
    """一行的进度。"""

    def __init__(
        self, index: int, prompt: Sequence[int], stop_ids: frozenset[int], side: _TextSide | None
    ) -> None:
        self.finish: Literal["stop", "length"] | None = None
        self._index, self._prompt, self._stop_ids, self._side = index, prompt, stop_ids, side
        self._tokens: list[int] = []

    def accept(self, token: int, *, last: bool, calls: _Callbacks) -> None:
        if token in self._stop_ids:
            self._end("stop", calls)
            return
        self._tokens.append(token)
        if calls.on_token:
            calls.on_token(self._index, token)
        if self._side is not None:
            self._show(self._side.feed(token), calls)
            if self._side.stop.stopped:
                self._end("stop", calls)
                return
        if last:
            self._end("length", calls)

    def history(self) -> list[int]:
        return [*self._prompt, *self._tokens]

    def prompt_ids(self) -> list[int]:
        return list(self._prompt)

    def completion(self) -> Completion:
        assert self.finish is not None
        if self._side is None:
            return Completion(self._tokens, self.finish, None)
        return Completion(
            self._tokens[: self._side.stop.kept_tokens()], self.finish, self._side.text
        )

    def _end(self, finish: Literal["stop", "length"], calls: _Callbacks) -> None:
        if self._side is not None and not self._side.stop.stopped:
            self._show(self._side.close(), calls)
            # 解码器里剩下的文本也可能凑成一个停止串。
            finish = "stop" if self._side.stop.stopped else finish
        self.finish = finish
        if calls.on_finish:
            calls.on_finish(self._index, self.completion())

    def _show(self, piece: str, calls: _Callbacks) -> None:
        if piece and calls.on_text:
            calls.on_text(self._index, piece)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """生成时没有 dropout；之后各子模块回到各自原来的模式，不是一律 train。"""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _seen(rows: list[_Row], logits: Tensor) -> Tensor:
    """(B, V) bool：提示里出现过的词元。"""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for mask, row in zip(seen, rows, strict=True):
        mask[torch.tensor(row.prompt_ids(), device=logits.device)] = True
    return seen


def _draws(
    sampling: SamplingConfig, seeds: Sequence[int] | None, rows: int, steps: int
) -> Tensor | None:
    """(B, N) 的均匀数；贪心不需要。"""
    if seeds is not None and len(seeds) != rows:
        raise ValueError(f"{len(seeds)} seeds for {rows} prompts: give one seed per prompt")
    if sampling.greedy:
        return None
    if seeds is None:
        seeds = torch.randint(2**62, (rows,)).tolist()
    return uniforms(seeds, steps)


def _usable_ids(config: GPT2Config, tokenizer: Tokenizer | None) -> int:
    """词表常补齐到整数倍（GPT-2 的 50257 补到 50304）：补出来的号没有文本，不许被选中。"""
    if tokenizer is None:
        return config.vocab_size
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model has vocab_size="
            f"{config.vocab_size}: the tokenizer belongs to another model"
        )
    return tokenizer.vocab_size


def _check_options(new: int, chunk: int | None) -> None:
    if new < 1:
        raise ValueError(f"max_new_tokens={new} must be at least 1")
    if chunk is not None and chunk < 1:
        raise ValueError(f"prefill_chunk={chunk} must be at least 1, or None for one piece")


def _check_stops(
    stop_ids: Sequence[int],
    width: int,
    stop_strings: Sequence[str],
    tokenizer: Tokenizer | None,
    on_text: object,
) -> None:
    for token in stop_ids:
        if not 0 <= token < width:
            raise ValueError(
                f"stop id {token} is outside the {width} ids of the vocabulary: "
                "it can never be produced"
            )
    if isinstance(stop_strings, str):
        raise ValueError(f"stop_strings={stop_strings!r} is one string: give a list of strings")
    StopText(stop_strings)
    if tokenizer is None and (stop_strings or on_text is not None):
        raise ValueError("stop_strings and on_text need the tokenizer: pass tokenizer=")
