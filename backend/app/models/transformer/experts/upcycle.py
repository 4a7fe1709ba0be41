"""稠密与混合专家互变：把前馈抄成 E 份（Komatsuzaki et al. 2022, arXiv:2212.05055）、
把专家取平均、只留用得着的专家。

只动张量与配置，都不改传入的东西。
E 专家数、C 宽度、h 一个专家的宽度、M 个 MoE 层。
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..config import GPT2Config
from .router import ROUTER_STD

State = Mapping[str, Tensor]

# 权重之和恒为 1 的路由器：专家都相同时，加权和就是那一个专家。
SUM_TO_ONE = ("softmax_topk", "sigmoid")
_DENSE = re.compile(r"h\.(\d+)\.mlp\.(c_fc|c_proj)\.(weight|bias)")
_EXPERTS = re.compile(r"h\.(\d+)\.mlp\.experts\.(c_fc|c_proj)\.(weight|bias)")
_ROUTER = re.compile(r"h\.(\d+)\.mlp\.router\.(weight|selection_bias)")


def upcycle(
    state: State, dense: GPT2Config, config: GPT2Config, *, seed: int = 0, noise: float = 0.0
) -> dict[str, Tensor]:
    """稠密模型的权重 -> config 的权重；noise = 0 时两个模型算出同样的 logits。

    Args:
        noise: 每个专家的每个矩阵加上标准差为 noise·std(矩阵) 的正态噪声，打破专家间的对称。

    Raises:
        ValueError: 除专家外形状不同，专家不与稠密的前馈一样宽，有共享专家，或权重之和不是 1。
    """
    _check_pair(dense, config)
    if not 0.0 <= noise <= 10.0:
        raise ValueError(f"noise={noise} must be between 0 and 10 (0.01 is small)")
    generator = torch.Generator().manual_seed(seed)
    experts, layers = config.moe_num_experts, config.moe_layers
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = _DENSE.fullmatch(name)
        if match is None or int(match[1]) not in layers:
            result[name] = tensor
            continue
        stacked = tensor.expand(experts, *tensor.shape).clone()
        if noise and match[3] == "weight":
            # 至少按 float32 算：半精度里平方会下溢，小的噪声会被舍掉两次。
            wide = torch.promote_types(tensor.dtype, torch.float32)
            drawn = torch.randn(stacked.shape, generator=generator).to(wide)
            stacked = (stacked + noise * tensor.to(wide).std() * drawn).to(tensor.dtype)
        result[f"h.{match[1]}.mlp.experts.{match[2]}.{match[3]}"] = stacked
    like = state["embed.wte.weight"]
    for layer in layers:
        router = torch.randn(experts, config.n_embed, generator=generator) * ROUTER_STD
        result[f"h.{layer}.mlp.router.weight"] = router.to(like.dtype)
        if config.moe.router == "sigmoid":
            result[f"h.{layer}.mlp.router.selection_bias"] = like.new_zeros(experts)
    return result


def average(state: State, config: GPT2Config) -> dict[str, Tensor]:
    """每个 MoE 层的专家取平均，成 config.dense() 的权重；路由器丢掉。

    Raises:
        ValueError: 本来就是稠密的，或平均之后不是那样的前馈。
    """
    _check_moe(config)
    _check_copies(config)
    result = {}
    for name, tensor in state.items():
        if _ROUTER.fullmatch(name):
            continue
        match = _EXPERTS.fullmatch(name)
        if match is None:
            result[name] = tensor
        else:
            wide = torch.promote_types(tensor.dtype, torch.float32)
            mean = tensor.to(wide).mean(0).to(tensor.dtype)
            result[f"h.{match[1]}.mlp.{match[2]}.{match[3]}"] = mean
    return result


def prune(
    state: State, config: GPT2Config, keep: Mapping[int, Sequence[int]]
) -> tuple[dict[str, Tensor], GPT2Config]:
    """每个 MoE 层只留 keep[层] 的专家，次序照旧；返回 (权重, 配置)。

    Raises:
        ValueError: 各层留的数目不同、层或专家不存在，或少于 2 个、少于 k 个。
    """
    _check_moe(config)
    if sorted(keep) != list(config.moe_layers):
        raise ValueError(
            f"keep names the layers {sorted(keep)} but the MoE layers are "
            f"{list(config.moe_layers)}: give each of them"
        )
    counts = {len(set(chosen)) for chosen in keep.values()}
    if len(counts) != 1:
        raise ValueError(
            f"keep leaves {sorted(counts)} experts in different layers: a model has one number of "
            "experts, keep as many in each layer"
        )
    (count,) = counts
    if not max(2, config.moe_top_k) <= count <= config.moe_num_experts:
        raise ValueError(
            f"keep={count} must be from {max(2, config.moe_top_k)} (at least 2, and "
            f"moe_top_k={config.moe_top_k}) to moe_num_experts={config.moe_num_experts}"
        )
    for layer, chosen in keep.items():
        odd = [e for e in chosen if not 0 <= e < config.moe_num_experts]
        if odd:
            raise ValueError(
                f"keep has expert {odd[0]} in layer {layer}: experts go from 0 to "
                f"{config.moe_num_experts - 1}"
            )
    result = {}
    for name, tensor in state.items():
        match = _EXPERTS.fullmatch(name) or _ROUTER.fullmatch(name)
        if match is None:
            result[name] = tensor
        else:
            index = torch.tensor(sorted(set(keep[int(match[1])])), device=tensor.device)
            result[name] = tensor.index_select(0, index)
    return result, config.replace(moe_num_experts=count)


def most_used(load: Tensor, config: GPT2Config, keep: int | None = None) -> dict[int, list[int]]:
    """load (M, E) 各专家分到的词元数 -> {层: 最常用的 keep 个}；同样多时取号小的。

    keep = None：各层都留住每个用到过的专家所需的个数。
    """
    if keep is None:
        keep = max(2, config.moe_top_k, int((load > 0).sum(1).max()))
    order = load.argsort(dim=1, descending=True, stable=True)[:, :keep].tolist()
    return {layer: sorted(row) for layer, row in zip(config.moe_layers, order, strict=True)}


def _check_pair(dense: GPT2Config, config: GPT2Config) -> None:
    if dense.moe_num_experts:
        raise ValueError(
            f"the model already has moe_num_experts={dense.moe_num_experts}: only a dense model "
            "can be upcycled"
        )
    _check_moe(config)
    if config.dense() != dense:
        raise ValueError("the model to make differs from the dense one in more than its experts")
    _check_copies(config)


def _check_moe(config: GPT2Config) -> None:
    if not config.moe_num_experts:
        raise ValueError("moe_num_experts=0: the model has no experts, use 2 or more")


def _check_copies(config: GPT2Config) -> None:
    """专家各是一个完整的前馈，而权重之和是 1。"""
    if config.moe.router not in SUM_TO_ONE:
        raise ValueError(
            f"moe.router={config.moe.router!r} gives weights that do not sum to 1, by another "
            "amount for each token, so no scale makes the experts' sum equal one dense MLP: use "
            f"{' or '.join(map(repr, SUM_TO_ONE))}"
        )
    if config.moe.shared_experts:
        raise ValueError(
            f"moe.shared_experts={config.moe.shared_experts} adds to the routed experts, so the "
            "sum is not one dense MLP: use moe.shared_experts=0"
        )
    if config.expert_hidden != config.mlp_hidden:
        raise ValueError(
            f"experts of width {config.expert_hidden} but the dense MLP is {config.mlp_hidden} "
            f"wide: only moe.hidden={config.mlp_hidden} makes an expert a whole dense MLP"
        )
