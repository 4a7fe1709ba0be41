"""混合专家的一层：与运算量相同的稠密前馈、与 transformers 的 Mixtral 比；以及逐词元解码。

cd backend && python -m benchmarks.moe_layer layer
cd backend && python -m benchmarks.moe_layer decode
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from app.models.transformer import GPT2Config, GPT2Model, MoEConfig
from app.models.transformer.backends.mask_plan import MaskPlan
from app.models.transformer.experts.moe import MoE
from app.models.transformer.layers.context import Context, Note
from app.models.transformer.layers.init import base_std
from app.models.transformer.mlp import MLP
from app.models.transformer.visibility.positions import Positions

from .common import interleaved, table, write_result

TOKENS, WIDTH, EXPERTS, TOP_K = 4096, 768, 8, 2
ROUNDS = 11


def config(activation: str, bias: bool, **moe: object) -> GPT2Config:
    return GPT2Config(
        n_embed=WIDTH, dropout=0.0, activation=activation, bias=bias,
        moe_num_experts=EXPERTS, moe_top_k=TOP_K, moe=MoEConfig(**moe),
    )  # fmt: skip


def filled(module: nn.Module, std: float) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)
    return module.train()


def mixtral(hidden: int) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    shape = MixtralConfig(
        hidden_size=WIDTH, intermediate_size=hidden, num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K, router_jitter_noise=0.0,
    )  # fmt: skip
    return MixtralSparseMoeBlock(shape)


def job(run: Callable[[Tensor], Tensor], module: nn.Module, backward: bool) -> Callable[[], object]:
    x = torch.randn(4, TOKENS // 4, WIDTH, requires_grad=backward)
    g = torch.randn(4, TOKENS // 4, WIDTH)

    def forward() -> None:
        with torch.no_grad():
            run(x)

    def both() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        run(x).backward(g)

    return both if backward else forward


def contenders(activation: str, bias: bool, peer: bool) -> dict[str, tuple[Callable, nn.Module]]:
    """名字 -> (前向, 模块)。"""
    shape = config(activation, bias)
    where = Positions.plain(0, TOKENS // 4, torch.device("cpu"))
    ctx = Context(where, MaskPlan.build(where, where), note=Note(frozenset({"load"})))
    dense = filled(MLP(shape), base_std(shape))
    found: dict[str, tuple[Callable, nn.Module]] = {"dense": (dense, dense)}
    for dispatch in ("sorted", "grouped"):
        moe = filled(MoE(config(activation, bias, dispatch=dispatch)), base_std(shape))
        found[dispatch] = (lambda x, moe=moe: moe(x, ctx), moe)
    if peer:
        other = filled(mixtral(shape.expert_hidden), base_std(shape))
        found["transformers Mixtral"] = (
            lambda x: out[0] if isinstance(out := other(x), tuple) else out, other
        )  # fmt: skip
    return found


def layer() -> None:
    torch.manual_seed(0)
    rows = []
    for activation, bias, peer in (("gelu_tanh", True, False), ("swiglu", False, True)):
        found = contenders(activation, bias, peer)
        for backward in (False, True):
            jobs = {name: job(run, module, backward) for name, (run, module) in found.items()}
            seconds = interleaved(jobs, ROUNDS)
            for name, value in seconds.items():
                rows.append([
                    activation, "forward + backward" if backward else "forward", name,
                    f"{value * 1e3:.0f}", f"{value / seconds['dense']:.3f}",
                ])  # fmt: skip
    note = (
        f"\n\n{TOKENS} tokens, width {WIDTH}, {EXPERTS} experts, top-{TOP_K}, float32; the dense "
        f"MLP and the {TOP_K} experts of a token have the same products. The MoE also computes "
        "its balance losses. The share counts both."
    )
    header = ["activation", "pass", "layer", "ms", "of dense"]
    command = "cd backend && python -m benchmarks.moe_layer layer"
    write_result("moe_layer", command, table(header, rows) + note)


def decode() -> None:
    """整个模型逐词元解码，批 1。"""
    torch.manual_seed(0)
    base = GPT2Config(n_layer=6, dropout=0.0, vocab_size=8192)
    models = {
        "dense": GPT2Model(base).eval(),
        "MoE 8 top-2": GPT2Model(base.replace(moe_num_experts=EXPERTS, moe_top_k=TOP_K)).eval(),
    }
    steps = 32

    def run(model: GPT2Model) -> Callable[[], object]:
        prompt = torch.randint(0, 8192, (1, 16))

        def go() -> None:
            with torch.no_grad():
                cache = model.new_cache(1)
                model(prompt, cache=cache, use_cache=True)
                for i in range(steps):
                    model(prompt[:, i % 16 : i % 16 + 1], cache=cache, use_cache=True)

        return go

    seconds = interleaved({name: run(model) for name, model in models.items()}, 9)
    rows = [
        [
            name, f"{models[name].num_parameters() / 1e6:.1f}",
            f"{models[name].active_parameters() / 1e6:.1f}", f"{value / steps * 1e3:.2f}",
            f"{value / seconds['dense']:.3f}",
        ]
        for name, value in seconds.items()
    ]  # fmt: skip
    header = ["model", "parameters, M", "active, M", "ms per token", "of dense"]
    note = "\n\n6 layers, width 768, vocabulary 8192, float32, 16 tokens of prompt and 32 decoded."
    command = "cd backend && python -m benchmarks.moe_layer decode"
    write_result("moe_decode", command, table(header, rows) + note)


if __name__ == "__main__":
    torch.set_num_threads(2)
    {"layer": layer, "decode": decode}[sys.argv[1]]()
