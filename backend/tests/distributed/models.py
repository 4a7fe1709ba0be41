"""各测试共用：小模型、一批数，与一个进程上的固定的树。"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch._dynamo  # DTensor 头一次用时才导入它，要一秒：在 fork 之前，子进程就不必各导一次。
from torch import Tensor

from app.distributed.comm import ALONE, Ranks
from app.distributed.replicate import (
    TreeSum,
    clip,
    give_gradients,
    leaf_group,
    seed_rows,
    take_gradients,
    total_norm,
    tree_sum,
)
from app.distributed.sharding.norm import gathered_rows
from app.distributed.sharding.rows import local
from app.distributed.sharding.shard import gathers_now, my_groups
from app.models.transformer import GPT2Config, GPT2Model, MoEConfig
from app.training.config import OptimConfig
from app.training.optim.build import build_optimizer

BATCH, TOKENS, LEAVES = 12, 12, 4
BASE = GPT2Config(vocab_size=97, context_size=16, n_layer=2, n_head=2, n_embed=24, norm="pre")
KEEL = BASE.replace(
    norm="keel", n_head=4, n_embed=32, n_kv_head=2, activation="swiglu", position="rope",
    qk_norm=True, dropout=0.1,
)  # fmt: skip
EXPERTS = BASE.replace(moe_num_experts=4, moe=MoEConfig(every=2))


def batch(step: int, rows: int = BATCH) -> tuple[Tensor, Tensor]:
    """一批；有长短不一的 -100，也有一行一个目标也没有。"""
    random = torch.Generator().manual_seed(step)
    x = torch.randint(97, (rows, TOKENS), generator=random)
    y = torch.randint(97, (rows, TOKENS), generator=random)
    for row in range(rows):
        y[row, : int(torch.randint(TOKENS, (), generator=random))] = -100
    y[1] = -100
    return x, y


def leaf_loss(model: GPT2Model, x: Tensor, y: Tensor, leaf: int, leaves: int, step: int) -> Tensor:
    """第 leaf 个微批的损失，按全批的词元算份额。"""
    rows = slice(leaf * len(x) // leaves, (leaf + 1) * len(x) // leaves)
    seed_rows(0, step, rows.start)
    out = model(x[rows], targets=y[rows])
    share = (y[rows] != -100).sum() / (y != -100).sum()
    loss: Tensor = (out["loss"] + out.get("aux_loss", 0.0)) * share
    return loss


def train_alone(
    config: GPT2Config,
    optim: OptimConfig,
    *,
    steps: int = 2,
    leaves: int = LEAVES,
    prepare: Callable[[GPT2Model], object] = lambda model: None,
) -> tuple[dict[str, Tensor], list[float]]:
    """一个进程，固定的树：(权重, 各步的范数)。"""
    torch.manual_seed(3)
    model = GPT2Model(config).train()
    prepare(model)
    optimizer, _ = build_optimizer(model, optim)
    norms = [step_alone(model, optimizer, optim, step, leaves) for step in range(steps)]
    return {name: p.detach() for name, p in model.named_parameters()}, norms


def step_alone(
    model: GPT2Model,
    optimizer: torch.optim.Optimizer,
    optim: OptimConfig,
    step: int,
    leaves: int = LEAVES,
) -> float:
    """一步；返回范数。"""
    (x, y), parameters = batch(step), list(model.parameters())
    tree, size = TreeSum(), leaf_group(leaves)
    for group in range(0, leaves, size):
        for leaf in range(group, group + size):
            leaf_loss(model, x, y, leaf, leaves, step).backward()
        tree.add(take_gradients(parameters))
    give_gradients(parameters, tree.total())
    return finish(model, optimizer, optim, Ranks())


def step_shards(
    model: GPT2Model,
    optimizer: torch.optim.Optimizer,
    optim: OptimConfig,
    step: int,
    ranks: Ranks,
    copies: Ranks = ALONE,
    leaves: int = LEAVES,
) -> float:
    """同一步，切在 ranks 上，copies 份副本各做连着的一段；返回范数。"""
    (x, y), parameters = batch(step), list(model.parameters())
    tree, each = TreeSum(), leaves // copies.size
    for group in my_groups(each, ranks):
        for leaf in group:
            gathers_now(model, leaf == group[-1])
            leaf_loss(model, x, y, copies.rank * each + leaf, leaves, step).backward()
        tree.add(take_gradients(parameters))
    give_gradients(parameters, tree.total())
    tree_sum([local(p.grad) for p in parameters if p.grad is not None], copies)
    return finish(model, optimizer, optim, ranks)


def finish(
    model: GPT2Model, optimizer: torch.optim.Optimizer, optim: OptimConfig, ranks: Ranks
) -> float:
    """范数、裁剪、更新；返回范数。"""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = float(total_norm(gathered_rows(gradients, ranks).values()))
    clip([local(grad) for grad in gradients.values()], norm, optim.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
