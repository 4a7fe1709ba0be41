"""一层一层地做 GPTQ：每层的输入是前面各层量化之后的，误差因此不会在后面被忘掉。

W 窗口数、T 词元数、C 宽度、E 专家数、I 输入宽。
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.models.transformer import GPT2Model
from app.models.transformer.experts.moe import Experts
from app.models.transformer.layers.linear import Linear

from .codes import Codes, Scheme
from .gptq import Moments, gptq
from .rtn import round_to_nearest

# 一次前向几个窗口：只影响内存。
_BATCH = 8
# 一个块的输入：残差流与上下文（掩码、位置）。
_Call = tuple[Tensor, Any]


class Calibrator:
    """按 schemes 把 model 的矩阵变成码；model 不动。

    Attributes:
        rounded: 只能取整到最近的矩阵各为什么：{理由: 个数}。
    """

    def __init__(self, model: GPT2Model, schemes: Mapping[str, Scheme]) -> None:
        self._model, self._schemes = model, schemes
        self.rounded: dict[str, int] = {}

    @torch.no_grad()
    def run(self, ids: Tensor, advance: Callable[[int], object]) -> dict[str, Codes]:
        """ids (W, T)；每做完一层叫一次 advance(W·T)。"""
        codes: dict[str, Codes] = {}
        calls = list(_first_inputs(self._model, ids))
        for i, original in self._model.h.items():
            block = copy.deepcopy(original)
            codes |= self._block(block, f"h.{i}.", [(x, each[int(i)]) for x, each in calls])
            # 块里现在是还原的码：下一层看到的就是它算出的。
            calls = [(block(x, contexts[int(i)]), contexts) for x, contexts in calls]
            advance(ids.numel())
        state = self._model.state_dict()
        for name in self._schemes.keys() - codes.keys():
            codes[name] = self._nearest(name, state[name], "the vocabulary")
        return {name: codes[name] for name in self._schemes}

    def _block(self, block: nn.Module, prefix: str, calls: list[_Call]) -> dict[str, Codes]:
        with _listening(block) as heard:
            for x, context in calls:
                block(x, context)
        codes = {}
        for path, leaf in block.named_modules():
            name = f"{prefix}{path}.weight"
            if isinstance(leaf, Linear):
                codes[name] = self._matrix(name, leaf.weight, heard.moments[path])
            elif isinstance(leaf, Experts):
                codes |= self._experts(f"{prefix}{path}", leaf, heard.routed[path])
        for name, each in codes.items():
            weight = block.get_parameter(name.removeprefix(prefix))
            weight.copy_(each.dequantize())
        return codes

    def _matrix(self, name: str, weight: Tensor, moments: Moments) -> Codes:
        scheme = self._schemes[name]
        if scheme.bits == 16:
            return self._nearest(name, weight, "16 bits")
        return gptq(weight, moments.total, scheme, name)

    def _experts(
        self, path: str, leaf: Experts, calls: list[tuple[Tensor, Tensor]]
    ) -> dict[str, Codes]:
        """各专家只看路由给它的词元；一次只留一个专家的 H。"""
        names = [f"{path}.c_fc.weight", f"{path}.c_proj.weight"]
        made: dict[str, list[Codes]] = {name: [] for name in names}
        for e in range(leaf.count):
            x = torch.cat([rows[(expert == e).any(1)] for rows, expert in calls])
            bias = None if leaf.c_fc.bias is None else leaf.c_fc.bias[e]
            hidden = leaf.activation(F.linear(x, leaf.c_fc.weight[e], bias))
            weights = (leaf.c_fc.weight[e], leaf.c_proj.weight[e])
            for name, rows, weight in zip(names, (x, hidden), weights, strict=True):
                if not len(rows):
                    made[name].append(self._nearest(name, weight, "experts without tokens"))
                    continue
                moments = Moments(rows.shape[1], rows.device)
                moments.add(rows)
                made[name].append(self._matrix(name, weight, moments))
        return {name: _stacked(each) for name, each in made.items()}

    def _nearest(self, name: str, weight: Tensor, why: str) -> Codes:
        self.rounded[why] = self.rounded.get(why, 0) + 1
        return round_to_nearest(weight, self._schemes[name], name)


def _first_inputs(model: GPT2Model, ids: Tensor) -> Iterator[tuple[Tensor, list[Any]]]:
    """每批：第 0 块的输入，与各块的上下文。"""
    for batch in ids.to(model.device).split(_BATCH):
        seen: list[_Call] = []
        hooks = [block.register_forward_pre_hook(_keeping(seen)) for block in model.h.values()]
        try:
            model(batch, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        yield seen[0][0], [context for _, context in seen]


class _Heard:
    """一个块里：各线性层输入的 H，各专家组的 (词元, 去向)。"""

    def __init__(self) -> None:
        self.moments: dict[str, Moments] = {}
        self.routed: dict[str, list[tuple[Tensor, Tensor]]] = {}


@contextmanager
def _listening(block: nn.Module) -> Iterator[_Heard]:
    heard = _Heard()
    with ExitStack() as stack:
        for path, leaf in block.named_modules():
            if isinstance(leaf, Linear):
                moments = Moments(leaf.in_features, leaf.weight.device)
                heard.moments[path] = moments
                hook = leaf.register_forward_pre_hook(_adding(moments))
            elif isinstance(leaf, Experts):
                calls = heard.routed.setdefault(path, [])
                hook = leaf.register_forward_pre_hook(_keeping(calls))
            else:
                continue
            stack.callback(hook.remove)
        yield heard


def _adding(moments: Moments) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda _, args: moments.add(args[0])


def _keeping(calls: list[Any]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda _, args: calls.append((args[0], args[1]))


def _stacked(parts: list[Codes]) -> Codes:
    tensors = [each.tensors() for each in parts]
    joined = {kind: torch.stack([each[kind] for each in tensors]) for kind in tensors[0]}
    first = parts[0]
    return Codes(
        first.bits, joined["codes"], joined.get("scale"), joined.get("minimum"), first.group
    )
