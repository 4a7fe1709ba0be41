"""词元怎样到专家那里：选哪种乘法，说出英文的理由；把 (词元, 专家) 对按专家排好。

N 词元数、k 每个词元的专家数、E 专家数、R = N·k 个 (词元, 专家) 对。
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import GPT2Config
from ..settings.moe_config import Dispatch

Way = Literal["reference", "sorted", "grouped"]

# F.grouped_mm 要求每行从 16 字节的整数倍开始。
_ROW_BYTES = 16
_GROUPED_TYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Groups:
    """按专家排好的对。

    Attributes:
        token: (R,)，第 r 对的词元号。
        row: (R,)，词元 t 的第 j 个专家排在第 row[t·k + j] 对。
        ends: (E,)，每个专家的对到哪里为止；之后的对不归任何专家。
        complete: 静态事实：没有不归任何专家的对。
    """

    token: Tensor
    row: Tensor
    ends: Tensor
    complete: bool


def choose_dispatch(
    asked: Dispatch, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]
) -> tuple[Way, str]:
    """(做法, 理由)；只看静态事实。widths：各矩阵的行长。

    Raises:
        ValueError: 点名的做法这里做不了。
    """
    if asked in ("reference", "sorted"):
        return asked, "asked for"
    missing = _why_not_grouped(device, dtype, widths)
    if asked == "grouped":
        if missing is not None:
            raise ValueError(
                f"moe.dispatch='grouped': {missing}; moe.dispatch='auto' chooses for you"
            )
        return "grouped", "asked for"
    if device.type == "cpu":
        return "sorted", "auto: on a CPU one product per expert that has tokens is fastest"
    if missing is not None:
        return "sorted", f"auto: one product per expert that has tokens ({missing})"
    return "grouped", "auto: one grouped product, no wait for the counts"


def explain_dispatch(
    config: GPT2Config, *, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Way, str] | None:
    """不建模型就说出用哪种做法；None = 没有专家。

    Raises:
        ValueError: 点名的做法这里做不了。
    """
    if not config.moe_layers:
        return None
    widths = (config.n_embed, config.expert_hidden)
    return choose_dispatch(config.moe.dispatch, device, dtype, widths)


def group(expert: Tensor, experts: int, complete: bool) -> Groups:
    """expert (N, k)，E = 不归任何专家 -> 排好的对。

    先排各词元的首选再排次选，同一专家之内因此首选在前、词元在前。
    """
    n, k = expert.shape
    flat = expert.t().reshape(-1)
    pair = flat.argsort(stable=True)
    row = torch.empty_like(pair).scatter_(0, pair, torch.arange(n * k, device=pair.device))
    ends = count(flat, experts).cumsum(0)
    return Groups(pair % n, row.view(k, n).t().reshape(-1), ends, complete)


def count(expert: Tensor, experts: int) -> Tensor:
    """(E,) int64：每个专家的对数；E 号不算。形状不依赖值，所以编译时不断图。"""
    flat = expert.reshape(-1)
    every = torch.zeros(experts + 1, dtype=torch.int64, device=flat.device)
    return every.scatter_add_(0, flat, torch.ones_like(flat))[:experts]


def drop_overflow(expert: Tensor, experts: int, capacity: Tensor | int) -> Tensor:
    """超出容量的对改成 E（不归任何专家）。首选优先于次选，再按词元的次序（GShard, 2006.16668）。"""
    flat = expert.t().reshape(-1)
    # 每一对是它那个专家的第几个，从 1 数。
    rank = F.one_hot(flat, experts + 1).cumsum(0).gather(1, flat[:, None]).squeeze(1)
    kept = torch.where(rank <= capacity, flat, experts)
    return kept.view(expert.shape[1], expert.shape[0]).t()


def _why_not_grouped(
    device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]
) -> str | None:
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    if device.type not in ("cpu", "cuda"):
        return f"grouped_mm is not measured on {device.type}"
    if dtype not in _GROUPED_TYPES:
        return f"grouped_mm does not compute in {dtype}"
    if device.type == "cuda" and dtype != torch.bfloat16:
        return f"grouped_mm on a GPU is for bfloat16, not {dtype}"
    odd = [width for width in widths if width * dtype.itemsize % _ROW_BYTES]
    if odd:
        return f"rows of {odd[0]} numbers in {dtype} are no multiple of {_ROW_BYTES} bytes"
    return None
