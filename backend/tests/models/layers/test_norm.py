"""归一化层：autocast 之下没有警告，与 float32 的只差舍入。"""

from __future__ import annotations

import warnings

import torch

from app.models.transformer import GPT2Config
from app.models.transformer.layers.norm import RMSNorm, make_norm


def test_mixed_precision_is_quiet_and_close() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(64)
    assert isinstance(make_norm(GPT2Config(norm_type="rmsnorm")), RMSNorm)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    x = torch.randn(32, 64)
    exact = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight
    torch.testing.assert_close(norm(x), exact, rtol=2e-6, atol=1e-6)
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        half = norm(x.bfloat16())
        half.float().sum().backward()
    assert half.dtype == torch.bfloat16
    # 输入、增益与输出各舍入一次：2^-8 的三倍之内
    torch.testing.assert_close(half.float(), exact, rtol=3 * 2**-8, atol=0)
    assert norm.weight.grad is not None and norm.weight.grad.dtype == torch.float32
