"""写记录的旧代码与读记录的新代码共用：怎样量一个模型，怎样认出「同样的算术」。只用 torch。

同一段程序，AVX2 与 AVX-512、不同的 BLAS 给出的 float32 末位不同。版本与 CPU 能力的名字相同还不够，
所以另跑一小段与本项目无关的训练：它的位也相同，才算同样的算术，才逐位比。
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NEW_TOKENS = 12


def logits_hex(logits: Tensor) -> str:
    """float32 的 logits -> 小端字节的十六进制：一位不差，又不长。"""
    return logits.detach().float().contiguous().numpy().astype("<f4").tobytes().hex()


def from_hex(text: str, vocab: int) -> Tensor:
    """logits_hex 的反面；(T, V)。"""
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.float32).reshape(-1, vocab)


def greedy(model: Any, prompt: list[int]) -> list[int]:
    """用缓存逐个取最可能的词元，NEW_TOKENS 个。

    Raises:
        ValueError: 最好的两个相差太小，换一种 CPU 就可能换一个词元：这样的记录没有用。
    """
    ids, cache, made = torch.tensor([prompt]), None, []
    for _ in range(NEW_TOKENS):
        out = model(ids, cache=cache, use_cache=True, return_cache=True)
        cache = out["cache"]
        best = out["logits"][0, -1].topk(2)
        if best.values[0] - best.values[1] < 1e-3:
            raise ValueError(f"tokens {best.indices.tolist()} are as good as tied: {best.values}")
        made.append(int(best.indices[0]))
        ids = torch.tensor([made[-1:]])
    return made


def measure(model: Any, prompt: list[int]) -> dict[str, Any]:
    """eval 状态的模型：提示的 logits，与贪心续写的 id。"""
    with torch.no_grad():
        logits = model(torch.tensor([prompt]))["logits"][0]
    return {
        "prompt_ids": prompt,
        "greedy_ids": greedy(model, prompt),
        "vocab": logits.shape[-1],
        "logits": logits_hex(logits),
    }


def arithmetic() -> dict[str, str]:
    """torch 的版本、CPU 能力，与几步纯 torch 训练之后权重的 sha256；形状与记录里的模型相仿。"""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    wte, qkv, out = nn.Embedding(64, 16), nn.Linear(16, 48), nn.Linear(16, 16)
    up, down, norm = nn.Linear(16, 64), nn.Linear(64, 16), nn.LayerNorm(16)
    parts = nn.ModuleList([wte, qkv, out, up, down, norm])
    optimizer = torch.optim.AdamW(parts.parameters(), lr=1e-2)
    ids = torch.randint(0, 64, (4, 33))
    for _ in range(4):
        x = wte(ids[:, :-1])
        x = x * torch.sigmoid(x).cos() + torch.arange(32.0)[:, None].sin()
        heads = qkv(x).reshape(4, 32, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = norm(x + out(mixed.transpose(1, 2).reshape(4, 32, 16)))
        x = F.rms_norm(x + down(F.gelu(up(x), approximate="tanh")), (16,))
        x = F.silu(x) + x @ (x.softmax(-1).flatten(0, 1).T @ x.flatten(0, 1))
        logits = x @ wte.weight.T
        loss = (logits.logsumexp(-1) - logits.gather(-1, ids[:, 1:, None])[..., 0]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.set_rng_state(state)
    digest = hashlib.sha256()
    for parameter in parts.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "sha256": digest.hexdigest(),
    }
