"""整个训练循环在切开的模型上：损失、验证、权重与一个进程的差舍入；检查点两边互相续得上。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from app.distributed.config import ParallelConfig
from app.models.transformer import GPT2Config
from app.models.transformer.settings.moe_config import MoEConfig
from app.training.config import OptimConfig, TrainConfig

from ..training.conftest import Make, rows
from .team import train_on

# float32 的六步：见到的是 1e-6。
LOSS, WEIGHT = 2e-5, 2e-5
SHAPE = {"vocab_size": 32, "context_size": 8, "n_layer": 4, "n_head": 2, "n_embed": 16}
GATED = {"activation": "swiglu", "norm_type": "rmsnorm", "position": "rope"}
MOE = {"moe_num_experts": 4, "moe": MoEConfig(router="sigmoid")}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tensor": ({"tensor": 2}, GATED),
    "pipeline": ({"pipeline": 2}, {}),
    "context": ({"context": 2}, {"attention_pattern": ("local(3)", "causal") * 2}),
    "expert": ({"expert": 2}, MOE),
    "tensor x replicate": ({"tensor": 2, "sequence": True, "replicate": 2}, GATED),
    "tensor x shard": ({"tensor": 2, "shard": 2}, GATED),
    "pipeline x shard": ({"pipeline": 2, "shard": 2, "schedule": "interleaved"}, {}),
    "context x shard": ({"context": 2, "shard": 2, "context_way": "ring"}, {}),
    "pipeline x experts": ({"pipeline": 2}, MOE),
}
EVERYDAY = {"tensor x shard", "pipeline x shard"}
EACH = [pytest.param(name, marks=() if name in EVERYDAY else pytest.mark.slow) for name in CASES]


def config_of(make: Make, out: Path, name: str, parallel: bool, **changes: Any) -> TrainConfig:
    degrees, shape = CASES[name]
    values: dict[str, Any] = {
        "model": GPT2Config(**({"dropout": 0.0, "norm": "pre"} | SHAPE | shape)),
        # 键的偏置没有梯度，只有舍入的零头；eps 小了 AdamW 会把零头放大成一步。
        "optim": OptimConfig(lr=1e-3, grad_clip=0.5, eps=1e-4),
        "out": str(out),
        "batch_size": 8,
        "micro_batch": 1,
        "eval_every": 3,
        "eval_batches": 1,
        "parallel": ParallelConfig(**degrees) if parallel else ParallelConfig(),
    }
    return make(**(values | changes))


def size_of(name: str) -> int:
    degrees = CASES[name][0]
    found = 1
    for axis in ("replicate", "shard", "tensor", "context", "expert", "pipeline"):
        found *= degrees.get(axis, 1)
    return found


def losses(config: TrainConfig, kind: str) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(config.out, kind)}


def assert_close(first: Path, second: Path) -> None:
    for file in ("model.safetensors", "optim.safetensors"):
        one, two = load_file(first / file), load_file(second / file)
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert value.shape == two[key].shape, key
            off = float((value - two[key]).abs().max() / value.abs().max().clamp(min=1e-3))
            assert off <= WEIGHT, f"{file}: {key} off by {off:.1e}"


@pytest.mark.parametrize("name", EACH)
def test_training_equals_one_process(make: Make, tmp_path: Path, name: str) -> None:
    alone, split = (config_of(make, tmp_path / str(p), name, p) for p in (False, True))
    want, _ = train_on(1, alone)
    got, _ = train_on(size_of(name), split)
    for kind in ("train", "eval"):
        one, two = losses(alone, kind), losses(split, kind)
        assert one.keys() == two.keys() and len(one) > 1
        for step, loss in one.items():
            assert two[step] == pytest.approx(loss, abs=LOSS), f"{kind} step {step}"
    norms = [[row["grad_norm"] for row in rows(c.out)] for c in (alone, split)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    groups = [rows(c.out, "groups")[-1]["norms"] for c in (alone, split)]
    assert groups[1] == pytest.approx(groups[0], rel=1e-3, abs=1e-6)
    assert_close(want, got)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pipeline", "tensor x shard"])
def test_a_checkpoint_goes_on_split_and_whole(make: Make, tmp_path: Path, name: str) -> None:
    """三步切开、三步一个进程、三步再切开，与一个进程的九步比。"""
    changes = {"steps": 9}
    want, _ = train_on(1, config_of(make, tmp_path / "whole", name, False, **changes))
    out = tmp_path / "mixed"
    for stop, parallel in ((3, True), (6, False), (9, True)):
        config = config_of(
            make, out, name, parallel, **changes, resume="auto", save_every=3, eval_every=0
        )
        got, _ = train_on(size_of(name) if parallel else 1, config, _stop_at(stop))
    assert got.name == "step-00000009"
    assert_close(want, got)


def _stop_at(step: int) -> Any:
    def prepare() -> None:
        from app.training.trainer import Trainer

        plain = Trainer._train_step

        def counted(self: Trainer) -> None:
            plain(self)
            if self.step == step and step < self.config.steps:
                self.stop._signal.requested = "SIGTERM"

        Trainer._train_step = counted  # type: ignore[method-assign]

    return prepare
