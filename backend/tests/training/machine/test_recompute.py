"""激活检查点：损失与梯度逐位相同，dropout 照样重演；留下的激活少得多。"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from app.models.transformer import GPT2Config, GPT2Model
from app.planning.footprint import footprint
from app.training.config import OptimConfig
from app.training.machine.recompute import checkpoint_blocks
from app.training.optim.build import optimizer_kind
from tests.models.helpers import tiny_config, tokens

CPU = torch.device("cpu")


def gradients(model: GPT2Model, bfloat16: bool = False) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(7)
    ids = tokens(2, model.config.context_size, vocab=model.config.vocab_size)
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss = model(ids, targets=ids.roll(-1, 1))["loss"]
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("every", [1, 2])
def test_equal_to_the_last_bit(every: int, dropout: float, bfloat16: bool) -> None:
    torch.manual_seed(0)
    model = GPT2Model(tiny_config(norm="pre", dropout=dropout, n_layer=3)).train()
    loss, grads = gradients(model, bfloat16)
    checkpoint_blocks(model, range(0, model.config.n_layer, every))
    again, regrads = gradients(model, bfloat16)
    assert torch.equal(loss, again) and len(grads) == len(regrads)
    assert all(map(torch.equal, grads, regrads))


@pytest.mark.parametrize("every", [1, 2])
def test_what_is_kept_is_what_the_estimate_says(every: int) -> None:
    """少留的与推算的相同；重算的块各留一份输入，saved_tensors_hooks 也数得到。"""
    config = tiny_config(norm="pre", dropout=0.0, n_layer=6)
    model = GPT2Model(config).train()
    kept = held(model)
    checkpoint_blocks(model, range(0, 6, every))
    saved = activations(config, 0) - activations(config, every)
    assert kept - held(model) == pytest.approx(saved, rel=0.01)
    assert saved > 0.8 / every * activations(config, 0)


def activations(config: GPT2Config, every: int) -> int:
    return footprint(
        config,
        rows=2,
        passes=1,
        optimizer=optimizer_kind(OptimConfig()),
        device=CPU,
        dtype=torch.float32,
        recompute=range(0, config.n_layer if every else 0, every or 1),
    ).activations


def held(model: GPT2Model) -> int:
    """为反向留下的字节数，重算的块的输入不在内。"""
    skip = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.is_floating_point() and x.untyped_storage().data_ptr() not in skip:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    ids = tokens(2, model.config.context_size, vocab=model.config.vocab_size)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(ids, targets=ids)["loss"]
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def test_names_copies_and_generation_stay() -> None:
    model = GPT2Model(tiny_config(norm="pre", dropout=0.0)).eval()
    ids = tokens(1, 8)
    with torch.no_grad():
        want = model(ids)["logits"]
    names = set(model.state_dict())
    checkpoint_blocks(model, range(9))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(model(ids)["logits"], want)
        next(iter(model.h.values())).attn.c_attn.weight.zero_()
    assert set(model.state_dict()) == names
    checkpoint_blocks(model, ())
    assert all("forward" not in vars(block) for block in model.h.values())
    # 复制来的模型用自己的权重，不是原来那个的。
    checkpoint_blocks(twin, range(9))
    assert torch.allclose(twin.train()(ids)["logits"], want, atol=1e-6)


def test_one_compilation_serves_every_block() -> None:
    """层号不在块里：否则每层各编译一次，到 torch 的上限（8）以后的层悄悄不编译。"""
    from torch._dynamo.testing import CompileCounter

    model = GPT2Model(tiny_config(norm="pre", dropout=0.0, n_layer=10)).train()
    ids = tokens(1, 8)
    want = model(ids, targets=ids)["loss"]
    counter = CompileCounter()
    torch.compiler.reset()
    for block in model.h.values():
        block.compile(backend=counter)
    assert torch.equal(model(ids, targets=ids)["loss"], want)
    assert counter.frame_count == 1
