"""逐叶开始等于一个进程的初始化，逐位；之后的随机数也相同。"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from app.distributed.comm import Ranks
from app.distributed.sharding.shard import shard_model
from app.distributed.sharding.start import empty_model, initialize_shards
from app.models.transformer import GPT2Model, MoEConfig

from .models import BASE, KEEL, batch
from .ranks import run_ranks

CONFIGS = {
    "pre": BASE,
    "keel": KEEL,
    "deepnorm, untied": BASE.replace(norm="deepnorm", tie_weights=False),
    "experts": KEEL.replace(
        norm="deepnorm", moe_num_experts=6, moe=MoEConfig(router="sigmoid", every=2)
    ),
}
Start = tuple[dict[str, Tensor], Tensor, Tensor]


def start(name: str) -> Start:
    torch.manual_seed(5)
    model = empty_model(CONFIGS[name])
    shard_model(model, init_device_mesh("cpu", (Ranks.world().size,)), exact=True)
    initialize_shards(model, CONFIGS[name], torch.device("cpu"))
    after = torch.rand(3)
    state = {k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in model.state_dict().items()}
    x, y = batch(0)
    return state, after, model.eval()(x, targets=y)["loss"].detach()


def starts() -> dict[str, Start]:
    return {name: start(name) for name in CONFIGS}


@pytest.mark.parametrize("size", [2, 4])
def test_a_start_leaf_by_leaf_has_the_bits_of_one_process(size: int) -> None:
    for found in run_ranks(size, starts):
        for name, (state, after, loss) in found.items():
            torch.manual_seed(5)
            alone = GPT2Model(CONFIGS[name]).eval()
            assert torch.equal(after, torch.rand(3)), name
            assert state.keys() == alone.state_dict().keys()
            for key, value in alone.state_dict().items():
                assert torch.equal(state[key], value), (name, key)
            x, y = batch(0)
            assert torch.equal(loss, alone(x, targets=y)["loss"]), name
