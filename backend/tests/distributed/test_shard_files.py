"""分片的训练存下的文件与一个进程的逐字节相同；换 rank 数接着训，位不变。"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from app.distributed.comm import Ranks
from app.distributed.sharding.shard import settle, shard_model
from app.distributed.sharding.start import empty_model, initialize_shards
from app.distributed.storage.files import Stream
from app.distributed.storage.pieces import Part, part_of
from app.models.transformer import GPT2Model
from app.training.config import OptimConfig
from app.training.optim.build import build_optimizer
from app.training.saving.shards import read_shards, tables
from app.training.saving.state import load_optimizer_tensors, optimizer_tensors

from .models import BASE, batch, step_alone, step_shards
from .ranks import run_ranks

CONFIG = BASE.replace(moe_num_experts=4)
OPTIMS = {"adamw": OptimConfig(lr=1e-2), "muon": OptimConfig(name="muon", lr=1e-2)}


def go_on(folder: Path, source: Path | None, first_step: int, steps: int) -> None:
    """几个 rank：从 source（没有就从头）训几步，存到 folder。"""
    ranks = Ranks.world()
    mesh = init_device_mesh("cpu", (ranks.size,))

    def place(_: str, mine: Tensor) -> Part:
        return part_of(mine, first=ranks.rank == 0)

    for name, optim in OPTIMS.items():
        torch.manual_seed(3)
        model = empty_model(CONFIG).train()
        shard_model(model, mesh, exact=True)
        initialize_shards(model, CONFIG, torch.device("cpu"))
        optimizer, _ = build_optimizer(model, optim)
        if source is not None:
            shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
            read_shards(source / name, model, optimizer, place, shapes)
        for step in range(first_step, first_step + steps):
            step_shards(model, optimizer, optim, step, ranks)
        with torch.no_grad():
            model(batch(0)[0])  # 只前向之后，根的那一组还聚齐着
        settle([model])
        stream = Stream(tables(model, optimizer, place), ranks)
        (folder / name).mkdir(parents=True, exist_ok=True)

        def fill(stream: Stream = stream, to: Path = folder / name) -> list[str]:
            try:
                return [stream.write(f, to / f) for f in ("model.safetensors", "optim.safetensors")]
            finally:
                stream.close()

        ranks.first(fill, stream.serve)


def go_on_alone(folder: Path, source: Path | None, first_step: int, steps: int) -> None:
    from app.models.transformer.weights.safetensors_file import write_tensors_file

    for name, optim in OPTIMS.items():
        torch.manual_seed(3)
        model = GPT2Model(CONFIG).train()
        optimizer, _ = build_optimizer(model, optim)
        if source is not None:
            model.load_state_dict(load_file(source / name / "model.safetensors"))
            load_optimizer_tensors(model, optimizer, load_file(source / name / "optim.safetensors"))
        for step in range(first_step, first_step + steps):
            step_alone(model, optimizer, optim, step)
        (folder / name).mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder / name)
        write_tensors_file(optimizer_tensors(model, optimizer), folder / name / "optim.safetensors")


def shas(folder: Path) -> dict[str, str]:
    return {
        f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }


def test_two_ranks_then_one_then_four_give_the_files_of_one_process(tmp_path: Path) -> None:
    go_on_alone(tmp_path / "alone", None, 0, 3)
    run_ranks(2, go_on, tmp_path / "two", None, 0, 1)
    go_on_alone(tmp_path / "one", tmp_path / "two", 1, 1)
    run_ranks(4, go_on, tmp_path / "four", tmp_path / "one", 2, 1)
    assert shas(tmp_path / "four") == shas(tmp_path / "alone")
    assert len(shas(tmp_path / "four")) == 4
