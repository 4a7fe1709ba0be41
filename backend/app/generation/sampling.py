"""从 logits 选出下一个词元：纯函数，每行只看自己。

字母：B 行数，V 词表，K 留下的候选数。被排除的词元记为 -inf。
次序与 transformers 相同：重复惩罚、温度、top-k、top-p、min-p；
改变次序会改变分布（top-p 的概率是 top-k 之后重新归一的）。
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from app.generation.config import SamplingConfig
from app.models.transformer.visibility.inputs import readable

# top-p 先只看这么多个最大的，概率和不够再放宽：排整个词表比取前几百个慢一个数量级以上。
_HEADS = (256, 4096)
# 不是任何词元的号：那一行的 logits 不是有限数。
NOT_FINITE = -1


def repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """见过的词元：正的 logit 除以 penalty，负的乘（CTRL, arXiv:1909.05858, 4.1 节）。

    logits (B, V)；seen (B, V) bool，提示与已生成的都算，填充不算。
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def top_k(logits: Tensor, k: int) -> Tensor:
    """留下第 k 大及以上的；与第 k 大相等的全部留下。 (B, V) -> (B, V)"""
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < kth, -math.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """留下概率和达到 p 的最小集合，至少一个（Holtzman 2020, arXiv:1904.09751）。

    (B, V) -> (B, V)
    """
    width = logits.shape[-1]
    # 够不够要看值；在加速器上看一眼要等整条流水线，不如排整个词表。
    heads = _HEADS if readable(logits) else ()
    log_total = logits.logsumexp(-1, keepdim=True)
    for size in (*(n for n in heads if n < width), width):
        values, ids = (
            logits.topk(size, dim=-1) if size < width else logits.sort(dim=-1, descending=True)
        )
        probs = (values - log_total).exp()
        before = probs.cumsum(-1) - probs  # 排在它前面的概率和 (B, K)
        keep = before < p  # 第一个之前的和恰为 0，所以至少留下它
        if size == width or not bool(keep[:, -1].any()):
            break
    out = torch.full_like(logits, -math.inf)
    return out.scatter(-1, ids, values.masked_fill(~keep, -math.inf))


def min_p(logits: Tensor, p: float) -> Tensor:
    """去掉概率不到最大者 p 倍的（arXiv:2407.01082）；在 logits 上比，不必归一。

    (B, V) -> (B, V)
    """
    if p == 0:
        return logits
    floor = logits.amax(-1, keepdim=True) + math.log(p)
    return logits.masked_fill(logits < floor, -math.inf)


def filtered(logits: Tensor, config: SamplingConfig, seen: Tensor | None = None) -> Tensor:
    """采样所用的完整分布：全部处理之后的 logits。 (B, V) -> (B, V)"""
    values, ids = _candidates(logits, config, seen)
    return torch.full_like(logits, -math.inf).scatter(-1, ids, values)


def sample(
    logits: Tensor, config: SamplingConfig, uniforms: Tensor | None, seen: Tensor | None = None
) -> Tensor:
    """每行选一个词元。 logits (B, V) -> (B,) int64

    uniforms: (B,) float64，[0, 1) 上的均匀数，贪心时不用；由调用者按行给出，
    所以一行的结果与同批的其它行无关。

    Raises:
        ValueError: 某一行的 logits 含 NaN 或 +inf，或全为 -inf。
    """
    chosen = pick(logits, config, uniforms, seen)
    check_picked(chosen.tolist(), logits)
    return chosen


def pick(
    logits: Tensor, config: SamplingConfig, uniforms: Tensor | None, seen: Tensor | None = None
) -> Tensor:
    """同 sample，但不等设备：logits 不是有限数的行是 NOT_FINITE，取回主机之后交给 check_picked。"""
    if config.greedy:
        if seen is not None:
            logits = repetition_penalty(logits, seen, config.repetition_penalty)
        best = logits.max(-1)
        return best.indices.masked_fill(~best.values.isfinite(), NOT_FINITE)
    if uniforms is None:
        raise ValueError(f"temperature={config.temperature} needs uniforms, one a row")
    values, ids = _candidates(logits, config, seen)
    # 按词元号的次序做逆变换：logits 的微小误差只微移边界，不会让两个近似相等的候选互换位置。
    cdf = values.double().softmax(-1).cumsum(-1)  # (B, K)
    # u <= 1 - 2^-53，所以 u·总和按双精度舍入后仍小于总和：下标不会越界。
    point = uniforms.to(cdf.device)[:, None] * cdf[:, -1:]
    # 有 NaN 的行找到的下标可以越界；那一行反正不作数。
    at = torch.searchsorted(cdf, point, right=True).clamp(max=ids.shape[-1] - 1)
    return ids.gather(-1, at)[:, 0].masked_fill(~values.amax(-1).isfinite(), NOT_FINITE)


def uniforms(seeds: Sequence[int], steps: int) -> Tensor:
    """每行一个随机流：(B, steps) float64，只由该行的种子决定；在 CPU 上，与设备无关。

    前缀性质：steps 取大取小，共有的部分相同，所以多生成几个词元不改变前面的。
    """
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(steps, generator=generator, dtype=torch.float64))
    return torch.stack(rows) if rows else torch.empty(0, steps, dtype=torch.float64)


def _candidates(
    logits: Tensor, config: SamplingConfig, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """处理后的候选 (B, K) 与它们的词元号 (B, K)，词元号递增。

    有 top-k 时先收窄到候选，后面的步骤就不再碰整个词表。
    """
    if seen is not None:
        logits = repetition_penalty(logits, seen, config.repetition_penalty)
    if config.temperature != 1:
        logits = logits / config.temperature
    k = config.top_k if config.top_k is not None and config.top_k < logits.shape[-1] else None
    if k is not None and readable(logits):
        values, ids = _narrow(logits, k)
    else:
        # 收窄到几个候选要先数并列的，即等设备一次；加速器上遮住其余的就好。
        values = logits if k is None else top_k(logits, k)
        ids = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    if config.top_p is not None and config.top_p < 1:
        values = top_p(values, config.top_p)
    if config.min_p is not None:
        values = min_p(values, config.min_p)
    return values, ids


def _narrow(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """top_k 的候选，按词元号递增；并列使候选多于 k 时，K 取各行的最大数。"""
    values, ids = logits.topk(k, dim=-1)
    kth = values[:, -1:]
    count = int((logits >= kth).sum(-1).max())
    if count > k:
        values, ids = logits.topk(count, dim=-1)
        values = values.masked_fill(values < kth, -math.inf)
    ids, order = ids.sort(-1)
    return values.gather(-1, order), ids


def check_picked(chosen: Sequence[int], logits: Tensor) -> None:
    """pick 的结果已取回主机：有不作数的行就说清楚。

    Raises:
        ValueError: 某一行的 logits 含 NaN 或 +inf，或全为 -inf。
    """
    if NOT_FINITE in chosen:
        row = chosen.index(NOT_FINITE)
        raise ValueError(
            f"the largest logit of row {row} is {float(logits[row].max())}: the model's output is "
            "not finite; check its weights and dtype"
        )
