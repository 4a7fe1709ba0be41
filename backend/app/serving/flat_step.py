"""没有填充的一步：许多行的词元排成一列走一次前向，只有注意力按行分开。

慢的孪生是今天左填充的前向（GPT2Model.forward 与 KVCache）。词元不多的一步，能交给原生的文件就
整步交给它（native_step.py）。N 一步的词元数、C 宽度、V 词表。
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from app.generation.lean_step import LeanStep, why_not_lean
from app.generation.native_step import MOST_ROWS, NativeStep, why_not_native
from app.models.transformer import GPT2Model
from app.models.transformer.block import run_blocks
from app.models.transformer.cache.row_cache import RowCache, RowStep, Span
from app.models.transformer.layers.context import build_row_contexts, make_notes
from app.models.transformer.visibility.positions import Positions

# 几行合成一次注意力，短的行要补到最长；补的超过这个比例就分开算。
_WASTE = 1.0


class FlatStep:
    """model 与 cache 的一步；模型对象不改动，别处照样可以用它。"""

    def __init__(self, model: GPT2Model, cache: RowCache) -> None:
        self.model, self.cache = model, cache
        self._notes = make_notes(model.config, loads=False)
        self._lean = LeanStep(model) if why_not_lean(model) is None else None
        self._checked = self._lean is None
        native = self._lean is not None and why_not_native(model) is None
        self._native = NativeStep(model) if native else None
        self._native_checked = False

    def __call__(
        self, ids: Sequence[int], spans: Sequence[Span], keep: Sequence[int]
    ) -> Tensor | None:
        """ids 按 spans 的次序相接 -> keep 这几个词元的 logits (K, V)；一个不要就是 None。

        前向中途失败，缓存的长度不变。
        """
        cache, native = self.cache, self._native_for(spans)
        fast: Tensor | None
        try:
            if native is None or not self._native_checked:
                logits = self._by_operators(ids, spans, keep)
            if native is not None:
                fast = self._whole(native, ids, spans, keep)
                logits = fast if self._native_checked else self._agreed(fast, logits)
        except BaseException:
            cache.abandon(spans)
            raise
        cache.commit(spans)
        return logits

    def _native_for(self, spans: Sequence[Span]) -> NativeStep | None:
        native, cache = self._native, self.cache
        if native is None:
            return None
        count = sum(span.count for span in spans)
        keys = max(cache.lengths[span.row] + span.count for span in spans)
        return native if native.takes_rows(count, keys, cache.stores) else None

    def _whole(
        self, native: NativeStep, ids: Sequence[int], spans: Sequence[Span], keep: Sequence[int]
    ) -> Tensor | None:
        self.cache.reserve(spans)
        logits = self._natively(native, ids, *self._places(spans), keep)
        return logits if keep else None

    def _places(self, spans: Sequence[Span]) -> tuple[list[int], list[int]]:
        """各词元在自己那一行的第几个，与是哪一行。"""
        lengths = self.cache.lengths
        at = [lengths[span.row] + i for span in spans for i in range(span.count)]
        return at, [span.row for span in spans for _ in range(span.count)]

    def _natively(
        self,
        native: NativeStep,
        ids: Sequence[int],
        at: Sequence[int],
        rows: Sequence[int],
        keep: Sequence[int],
    ) -> Tensor:
        device = self.model.device
        where = Positions(torch.tensor(at, device=device)[:, None])
        x = self.model.embed(torch.tensor(ids, device=device)[:, None], where)[:, 0]
        return native.rows(x.contiguous(), [n + 1 for n in at], rows, self.cache.stores, keep)

    def _agreed(self, fast: Tensor | None, wanted: Tensor | None) -> Tensor | None:
        """头一步两条路都走（写的是同样的槽）；差得多就不再用。"""
        assert self._native is not None
        if fast is None or wanted is None or not bool(wanted.isfinite().all()):
            return wanted
        self._native_checked = True
        fast, wanted = fast.detach(), wanted.detach()
        off = float((fast - wanted).abs().max())
        if not off <= self._native.tolerance * float(wanted.abs().max()):
            self._native = None
            warnings.warn(
                f"the native decoding step differs from the model's forward by {off:.1e}: serving "
                "takes the operators; was a part of it changed without native_step.py?",
                stacklevel=2,
            )
        return wanted

    def _by_operators(
        self, ids: Sequence[int], spans: Sequence[Span], keep: Sequence[int]
    ) -> Tensor | None:
        model = self.model
        step = self.cache.begin(spans, padded=self._worth_padding(spans))
        flat = torch.tensor(ids, device=model.device)[:, None]
        x = self._through(model.embed(flat, step.where)[:, 0], step)
        if keep and len(keep) < len(ids):
            x = x[torch.tensor(keep, device=x.device)]
        return model.head(x) if keep else None

    def _through(self, x: Tensor, step: RowStep) -> Tensor:
        """(N, C) -> 末尾归一化之后的 (N, C)。"""
        contexts = build_row_contexts(
            self.model.config, self.model.patterns, step, self._notes, x.dtype
        )
        if self._lean is not None:
            y = self._lean.through(x, contexts)
            if self._checked:
                return y
        plain = run_blocks(self.model.h, self.model.ln_f, x[:, None], contexts)[0][:, 0]
        if not self._checked:
            self._checked = True
            # 头一步两条路都走：改了主干而没有改 lean_step.py，也不会悄悄算错。
            if not torch.allclose(y, plain, rtol=1e-4, atol=1e-5, equal_nan=True):
                self._lean = None
                warnings.warn(
                    f"the lean step differs from the model's forward by "
                    f"{float((y - plain).abs().max()):.1e}: serving takes the forward; was a part "
                    "of it changed without generation/lean_step.py?",
                    stacklevel=2,
                )
        return plain

    def _worth_padding(self, spans: Sequence[Span]) -> bool:
        rows = [span.row for span in spans]
        together = len(rows) > 1 and rows == list(range(rows[0], rows[0] + len(rows)))
        if not together or any(span.count > 1 for span in spans):
            return False
        lengths = [self.cache.lengths[row] for row in rows]
        return max(lengths) * len(rows) <= (1 + _WASTE) * (sum(lengths) + len(rows))


class InvariantStep(FlatStep):
    """批不变的一步：每个词元都由原生的文件算，所以它的位与旁边有谁、一次喂几个、有几个线程都无关。

    代价：许多词元的一步（读提示）比算子慢，因为一次至多 MOST_ROWS 个。
    """

    def __init__(self, model: GPT2Model, cache: RowCache) -> None:
        """
        Raises:
            ValueError: 这个模型或缓存有的步不能交给原生的文件。
        """
        super().__init__(model, cache)
        reason = why_not_lean(model) or why_not_native(model) or self._why_not()
        if reason is not None:
            raise ValueError(
                f"batch_invariant=True has every token computed by the native step, but {reason}: "
                "leave batch_invariant out"
            )

    def __call__(
        self, ids: Sequence[int], spans: Sequence[Span], keep: Sequence[int]
    ) -> Tensor | None:
        native, cache = self._native, self.cache
        assert native is not None
        cache.reserve(spans)
        at, rows = self._places(spans)
        made = []
        try:
            for begin in range(0, len(ids), MOST_ROWS):
                end = begin + MOST_ROWS
                here = [k - begin for k in keep if begin <= k < end]
                part = ids[begin:end], at[begin:end], rows[begin:end]
                made.append(self._natively(native, *part, here))
        except BaseException:
            cache.abandon(spans)
            raise
        cache.commit(spans)
        if not keep:
            return None
        return made[0] if len(made) == 1 else torch.cat(made)

    def _why_not(self) -> str | None:
        """缓存装得满时也行吗；与前向相符吗（头一步两条路都走）。"""
        cache, config = self.cache, self.model.config
        assert self._native is not None
        longest = config.context_size if cache.max_len is None else cache.max_len
        if not self._native.takes_rows(1, longest, cache.stores):
            return (
                f"it reads float32 keys that are all in sight, and here attention_pattern="
                f"{config.attention_pattern!r} with keys as {cache.stores[0][0].parts[0].dtype}"
            )
        super().__call__([0], [Span(0, 1)], [0])
        cache.reset(0, poisoned=True)
        if self._native is None:
            return "it differs from the model's forward"
        return None if self._native_checked else "the model's logits are not finite"
