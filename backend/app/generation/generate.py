"""从提示生成：左填充的批、缓存、按行采样、按行停止。

字母：B 行数，V 词表，N 新词元的上限。
一行的结果只由它的提示、种子和设置决定；同批的其它行只会带来浮点舍入（双精度下约 1e-15）。
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from app.data.tokenizers import Tokenizer
from app.generation.config import Options, SamplingConfig
from app.generation.context import DecodingContext
from app.generation.overflow import check_prompts
from app.generation.row import Callbacks, Completion, Row
from app.generation.sampling import check_picked, pick, uniforms
from app.generation.streaming import SinkContext
from app.models.transformer import GPT2Config, GPT2Model

# 至少这么大一部分的行结束了才搬缓存：搬一次的代价约等于注意力读一遍缓存，
# 按比例搬则总共至多搬几遍，而白算的行不超过这个比例。
_COMPACT_AT = 0.25


def complete(
    model: GPT2Model,
    prompts: Sequence[Sequence[int]],
    options: Options,
    *,
    tokenizer: Tokenizer | None = None,
    seeds: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    calls: Callbacks | None = None,
) -> list[Completion]:
    """续写每个提示；全部检查都在动工之前。

    Args:
        prompts: B 行词元号，长短不一，都不空。
        tokenizer: 给了才有文本与停止串，也才知道补齐的词表里哪些号没有文本。
        seeds: 每行一个；同一提示与种子在任何批里给出同样的文本。None 则从 torch 的
            默认随机源各取一个。
        names: 报错时怎样称呼各个提示；默认 prompt 1、prompt 2……

    Raises:
        ValueError: 空的提示、词表之外的词元、放不下、模型不能用 overflow、个数不符，
            或 logits 不是有限数。
    """
    calls = calls or Callbacks()
    width = _usable_ids(model.config, tokenizer)
    names = names or [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    check_prompts(prompts, names, width, model.config, options.max_new_tokens, options.overflow)
    _check_stops(options, width, tokenizer, calls)
    seeds = _seeds(seeds, len(prompts))
    rows = [Row(i, prompt, options, tokenizer, calls) for i, prompt in enumerate(prompts)]
    size = options.batch_size or len(rows)
    with _evaluating(model), torch.inference_mode():
        for at in range(0, len(rows), size):
            part = slice(at, at + size)
            decoding = Decoding(model, rows[part], options, seeds[part], width)
            while decoding.open:
                decoding.step()
    return [row.completion() for row in rows]


def generate(
    model: GPT2Model,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int] | None = None,
    tokenizer: Tokenizer | None = None,
    on_token: Callable[[int, int], None] | None = None,
    **options: Any,
) -> list[list[int]]:
    """complete 的旧名字，再留一个版本；options 见 Options。"""
    warnings.warn(
        "generate(...) is now complete(model, prompts, Options(...)), which returns texts and why "
        "they ended besides the tokens; the old name goes away in the next version",
        FutureWarning,
        stacklevel=2,
    )
    if "cache_quantize" in options:
        options["kv_dtype"] = options.pop("cache_quantize")
    options["sampling"] = options.get("sampling") or SamplingConfig()
    done = complete(
        model,
        prompts,
        Options(**options),
        tokenizer=tokenizer,
        seeds=seeds,
        calls=Callbacks(on_token=on_token),
    )
    return [completion.tokens for completion in done]


class Decoding:
    """一批行：每步一次采样、一次把选中的词元取回主机、一次前向。

    Attributes:
        open: 还有没结束的行。
    """

    def __init__(
        self,
        model: GPT2Model,
        rows: Sequence[Row],
        options: Options,
        seeds: Sequence[int],
        width: int,
    ) -> None:
        """width: 只选前这么多个号。"""
        kind = SinkContext if options.overflow == "sinks" else DecodingContext
        self._context = kind(
            model,
            [row.prompt for row in rows],
            room=options.max_new_tokens - 1,
            prefill_chunk=options.prefill_chunk,
            overflow=options.overflow,
            kv_dtype=options.kv_dtype,
        )
        self._rows, self._sampling, self._width = list(rows), options.sampling, width
        greedy = options.sampling.greedy
        # (B, N)，一次搬完。
        self._draws = None if greedy else uniforms(seeds, options.max_new_tokens).to(model.device)
        self._at = 0
        self._logits = self._context.prefill()[:, :width]
        penalised = options.sampling.repetition_penalty != 1
        self._seen = _seen(rows, self._logits) if penalised else None
        self.open = True

    def step(self) -> None:
        """每行选一个词元；还有没结束的行，就算出下一步的 logits。"""
        draws = None if self._draws is None else self._draws[:, self._at]
        self._at += 1
        chosen = pick(self._logits, self._sampling, draws, self._seen)
        # 每步只在这里等设备一次。
        tokens = chosen.tolist()
        check_picked(tokens, self._logits)
        for row, token in zip(self._rows, tokens, strict=True):
            if row.finish is None:
                row.accept(token)
        going = [i for i, row in enumerate(self._rows) if row.finish is None]
        self.open = bool(going)
        if not going:
            return
        if self._seen is not None:
            self._seen.scatter_(1, chosen[:, None], True)
        finished = len(self._rows) - len(going)
        if finished and finished >= _COMPACT_AT * len(self._rows):
            chosen = chosen[torch.tensor(going, device=chosen.device)]
            self._keep(going)
        self._logits = self._context.advance(chosen, self._history)[:, : self._width]

    def _keep(self, going: list[int]) -> None:
        self._context.keep(going)
        self._rows = [self._rows[i] for i in going]
        keep = torch.tensor(going, device=self._logits.device)
        if self._draws is not None:
            self._draws = self._draws[keep]
        if self._seen is not None:
            self._seen = self._seen[keep]

    def _history(self, i: int) -> list[int]:
        return self._rows[i].history()


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


def _seen(rows: Sequence[Row], logits: Tensor) -> Tensor:
    """(B, V) bool：提示里出现过的词元。"""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for mask, row in zip(seen, rows, strict=True):
        mask[torch.tensor(list(row.prompt), device=logits.device)] = True
    return seen


def _seeds(seeds: Sequence[int] | None, rows: int) -> list[int]:
    if seeds is None:
        return [int(seed) for seed in torch.randint(2**62, (rows,))]
    if len(seeds) != rows:
        raise ValueError(f"{len(seeds)} seeds for {rows} prompts: give one seed per prompt")
    return list(seeds)


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


def _check_stops(
    options: Options, width: int, tokenizer: Tokenizer | None, calls: Callbacks
) -> None:
    for token in options.stop_ids:
        if not 0 <= token < width:
            raise ValueError(
                f"stop id {token} is outside the {width} ids of the vocabulary: "
                "it can never be produced"
            )
    if tokenizer is None and (options.stop_strings or calls.on_text is not None):
        raise ValueError("stop_strings and on_text need the tokenizer: pass tokenizer=")
