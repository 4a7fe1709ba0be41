"""旋转位置编码（Su et al. 2021, arXiv:2104.09864）：由位置算出，没有状态，没有缓冲区。

B 批、H 头数、T 词元数、D 头宽、S 槽数。每个头的 D 维分成 D/2 对，第 i 对在位置 p 转过
p·f_i 的角，于是 q·k 只看位置之差。哪两维是一对，有两种布局：

    half         (i, i + D/2)     Llama、GPT-NeoX
    interleaved  (2i, 2i + 1)     GPT-J、原文

没有 transformers 的 "dynamic"：它的频率随见过的最长序列而变，缓存里的键却是用旧频率转的，
同一段文字分块喂与整段喂便会不同。
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..settings.rope_config import RoPEConfig, RoPELayout
from .rope_turn import turn, turn_one

# YaRN 的两个边界（Peng et al. 2023, arXiv:2309.00071, 第 3.2 节）：在原上下文里转过这么多圈的
# 维保持不动，不足一圈的维整个内插。
_FAST, _SLOW = 32.0, 1.0


def inverse_frequencies(
    rope: RoPEConfig,
    head_dim: int,
    context_size: int,
    device: torch.device | str | None = None,
) -> tuple[Tensor, float]:
    """(每对维每个位置转的弧度, cos 与 sin 要乘的系数)。

    Args:
        context_size: yarn 的原上下文，若 rope.original_context 没有给出。
        device: 频率放在哪里；None = 默认设备。

    Returns:
        (D/2,) float64，和一个数：yarn 为 0.1·ln(factor) + 1，其余为 1。

    Raises:
        ValueError: head_dim 不是正偶数，或 ntk 用于宽 2 的头。
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim={head_dim} must be even and at least 2: RoPE turns pairs")
    theta, factor = rope.theta, rope.factor
    if rope.scaling == "ntk":
        if head_dim == 2:
            raise ValueError(
                "rope.scaling='ntk' with head_dim=2 has no slower pair to stretch: "
                "use rope.scaling='linear' or wider heads"
            )
        # 底数这样放大，最慢的一对恰好慢 factor 倍，最快的一对不变。
        theta *= factor ** (head_dim / (head_dim - 2))
    pair = torch.arange(head_dim // 2, dtype=torch.float64, device=device)
    inverse = theta ** (pair * (-2.0 / head_dim))
    if rope.scaling == "linear":
        return inverse / factor, 1.0
    if rope.scaling == "yarn":
        low, high = _yarn_range(theta, head_dim, rope.original_context or context_size)
        ramp = ((pair - low) / (high - low)).clamp(0.0, 1.0)
        return inverse * (1.0 + ramp * (1.0 / factor - 1.0)), 0.1 * math.log(factor) + 1.0
    return inverse, 1.0


def _yarn_range(theta: float, head_dim: int, context: int) -> tuple[float, float]:
    """斜坡的两端，以"第几对"计：低于前者不动，高于后者整个内插。

    取整与上界 head_dim - 1（而不是 head_dim/2 - 1）照 YaRN 的原实现与 transformers，
    否则它们发布的权重在这里会不同。只在一处不照：原上下文不足一圈（或 theta 极小）时
    那里两端会颠倒，该内插的全不内插；这里保持次序。
    """

    def pair_turning(times: float) -> float:
        return head_dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(_FAST)), 0)
    high = min(math.ceil(pair_turning(_SLOW)), head_dim - 1)
    return low, max(high, low + 0.001)


@dataclass(frozen=True)
class Rotary:
    """一次前向的旋转：各层共用，每层对 q 与 k 各转一次（或沿头拼着只转一次）。

    Attributes:
        cos, sin: (B|1, 1, T, D/2)，至少 float32；yarn 的系数已乘在里面。
    """

    cos: Tensor
    sin: Tensor
    layout: RoPELayout

    @classmethod
    def at(
        cls,
        positions: Tensor,
        rope: RoPEConfig,
        head_dim: int,
        context_size: int,
        dtype: torch.dtype = torch.float32,
    ) -> Rotary:
        """positions (B|1, T) 处的旋转；填充的 -1 也只是一个角，无害。

        角一律用 float64 算：float32 的角在位置十万处已差千分之几弧度。表至少是 float32，
        bf16 的 cos 只有 8 位，而表小，省不下什么。

        Raises:
            ValueError: 见 inverse_frequencies。
        """
        work = _exact_device(positions)
        inverse, scale = inverse_frequencies(rope, head_dim, context_size, work)
        return _tables(positions, inverse, scale, rope.layout, dtype)

    def apply(self, x: Tensor) -> Tensor:
        """(B, H, T, D) -> (B, H, T, D)，dtype 不变。

        x 比表窄（bf16）时用表的精度算，最后舍入一次。transformers 的 Llama 在 autocast 下
        也是如此；整个模型是 bf16 时它连 cos 也先舍入，这里更准。
        """
        # 编译时不看形状：看了就是一道守卫。
        plain = not torch.compiler.is_compiling()
        if plain and x.shape[2] == 1 and not (torch.is_grad_enabled() and x.requires_grad):
            return turn_one(x, *self._wide, self.layout)
        return turn(x, self.cos, self.sin, -2 if self.layout == "half" else -1)

    @cached_property
    def _wide(self) -> tuple[Tensor, Tensor]:
        """每对写成 (cos, cos) 与 (-sin, sin)，各 (B|1, 1, T, D)。"""
        dim = -2 if self.layout == "half" else -1
        cos = torch.stack((self.cos, self.cos), dim).flatten(-2)
        return cos, torch.stack((-self.sin, self.sin), dim).flatten(-2)


def rerotate(k: Tensor, delta: Tensor, rope: RoPEConfig, context_size: int) -> Tensor:
    """把位置 p 的键变成位置 p - delta 的键：再往回转 delta·f。流式缓存挪动位置时用。

    yarn 的系数已在键里，不再乘。窄 dtype 每转一次就舍入一次：反复挪动时应从原键转起。

    Args:
        k: (B, H, S, D) 已旋转的键。
        delta: (B|1,) 整数，往回挪多少。
    """
    inverse, _ = inverse_frequencies(rope, k.shape[-1], context_size, _exact_device(delta))
    return _tables(-delta[:, None], inverse, 1.0, rope.layout, k.dtype).apply(k)


def _exact_device(x: Tensor) -> torch.device:
    """MPS 没有 float64：表在 CPU 上算好再搬过去。"""
    return torch.device("cpu") if x.device.type == "mps" else x.device


def _tables(
    positions: Tensor, inverse: Tensor, scale: float, layout: RoPELayout, dtype: torch.dtype
) -> Rotary:
    """(B|1, T) 的位置与 (D/2,) 的频率 -> cos、sin (B|1, 1, T, D/2)。"""
    angle = positions.to(inverse.device)[:, None, :, None] * inverse
    cos, sin = angle.cos(), angle.sin()
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    dtype = torch.promote_types(dtype, torch.float32)
    home = positions.device
    return Rotary(cos.to(home, dtype), sin.to(home, dtype), layout)
