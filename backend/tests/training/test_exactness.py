"""逐位续训，各种部件都开着；以及开训之前就该看出的坏数据（B7）。"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.common.files import sha256_file
from app.data.shards import shard_name
from app.models.transformer import RoPEConfig
from app.training.config import DataConfig, OptimConfig, ScheduleConfig
from app.training.saving.checkpoint import step_folder

from .conftest import Make, rows, train, write_dataset

STEPS = 16

VARIANTS: dict[str, dict[str, Any]] = {
    "rope, window": {"position": "rope", "attention_pattern": "local(4) | global(1)"},
    "cycle, keel": {
        "attention_pattern": ("causal", "strided(3)"), "norm": "keel", "norm_type": "rmsnorm",
    },
    "scaled rope, grouped heads": {
        "position": "rope", "rope": RoPEConfig(scaling="yarn", factor=2.0, original_context=4),
        "n_kv_head": 1, "qk_norm": True, "activation": "swiglu",
    },
    "untied, no biases, reference": {
        "tie_weights": False, "bias": False, "attention_backend": "reference",
    },
    "deepnorm, blocked": {
        "norm": "deepnorm", "attention_pattern": "local(4)", "attention_backend": "blocked",
        "dropout": 0.0,
    },
}  # fmt: skip
TRAININGS: dict[str, dict[str, Any]] = {
    "adamw, linear": {"schedule": ScheduleConfig(kind="linear", warmup_steps=3)},
    "muon, wsd, skip": {
        "optim": OptimConfig(name="muon", lr=1e-2, muon_lr=2e-2, grad_clip=0.3),
        "schedule": ScheduleConfig(kind="wsd", warmup_steps=3, decay_fraction=0.3),
        "spike": "skip",
    },
    "accumulation of three": {"batch_size": 5, "micro_batch": 2},
    "bfloat16": {"precision": "bfloat16"},
}


def state_of(folder: Path) -> dict[str, Any]:
    state = json.loads((folder / "state.json").read_text())
    # 在哪个文件夹、每隔几步存，本来就不同。
    del state["config"]
    return state


def check_resume(make: Make, tmp_path: Path, change: dict[str, Any]) -> None:
    out = tmp_path / "straight"
    train(make(out=str(out), steps=STEPS, save_every=1, keep_last=STEPS, eval_every=3, **change))
    end = step_folder(out, STEPS)
    for step in (1, 4, 9, 14):
        branch = tmp_path / f"from-{step}"
        start = str(step_folder(out, step))
        train(make(out=str(branch), steps=STEPS, resume=start, eval_every=3, **change))
        found = step_folder(branch, STEPS)
        for name in ("model.safetensors", "optim.safetensors"):
            assert (found / name).read_bytes() == (end / name).read_bytes(), (step, name)
        # 三家的随机数、尖峰的历史、各计数。
        assert state_of(found) == state_of(end)
        for kind, keys in (("train", ("step", "loss", "grad_norm", "lr")), ("eval", ("loss",))):
            wanted = [[r[k] for k in keys] for r in rows(out, kind) if r["step"] > step]
            assert [[r[k] for k in keys] for r in rows(branch, kind) if r["step"] > step] == wanted


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_model_resumes(make: Make, tmp_path: Path, name: str) -> None:
    model = make().model.replace(**VARIANTS[name])
    check_resume(make, tmp_path, {"model": model})


@pytest.mark.parametrize("name", TRAININGS)
def test_every_kind_of_training_resumes(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # 这样短的训练里，只有放低门槛才真有步被跳过。
    monkeypatch.setattr("app.training.watch.spike.NEEDED", 2)
    monkeypatch.setattr("app.training.watch.spike.SIGMAS", -9.0)
    monkeypatch.setattr("app.training.watch.spike.LEAST_RISE", -0.3)
    check_resume(make, tmp_path, TRAININGS[name])
    if TRAININGS[name].get("spike") == "skip":
        assert rows(tmp_path / "straight", "skipped")


@pytest.mark.slow
def test_compiled_training_resumes(make: Make, tmp_path: Path) -> None:
    check_resume(make, tmp_path, {"compile": "on"})


def test_the_thread_count_is_recorded(make: Make) -> None:
    result = train(make(steps=5))
    assert state_of(result.checkpoint)["threads"] == torch.get_num_threads()


# ---- B7：坏数据 ----


def edit(path: Path, change: Callable[[np.ndarray], Any]) -> None:
    tokens = np.fromfile(path, dtype=np.uint16)
    changed = change(tokens)
    (tokens if changed is None else changed).tofile(path)


def sign(folder: Path) -> None:
    """让 meta.json 与改过的文件相符，像有人重写了数据那样。"""
    meta = json.loads((folder / "meta.json").read_text())
    for entry in meta["files"]:
        path = folder / entry["name"]
        entry |= {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    (folder / "meta.json").write_text(json.dumps(meta))


def flip_a_bit(folder: Path) -> None:
    def change(tokens: np.ndarray) -> None:
        tokens[100] ^= 1

    edit(folder / shard_name(0), change)


def foreign_token(folder: Path) -> None:
    def change(tokens: np.ndarray) -> None:
        tokens[-3] = 60_000

    edit(folder / shard_name(0), change)
    sign(folder)


def odd_bytes(folder: Path) -> None:
    path = folder / shard_name(0)
    path.write_bytes(path.read_bytes()[:-1])
    sign(folder)


def bad_magic(folder: Path) -> None:
    path = folder / "index.npy"
    path.write_bytes(b"\x00" + path.read_bytes()[1:])
    sign(folder)


def empty(folder: Path) -> None:
    (folder / shard_name(0)).write_bytes(b"")


def cut(folder: Path) -> None:
    edit(folder / shard_name(0), lambda tokens: tokens[:-50])


def other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("c", "z"))


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "bad magic": ("train", bad_magic, "not a NumPy index"),
    "odd byte count": ("train", odd_bytes, "not a multiple of 2"),
    "token outside the vocabulary": ("train", foreign_token, "token id 60000 is outside"),
    "empty": ("train", empty, "0 bytes"),
    "shortened": ("train", cut, "the file was cut or changed"),
    "changed under us": ("train", flip_a_bit, "the sha256 differs"),
    "changed validation data": ("val", flip_a_bit, "the sha256 differs"),
    "another tokenizer": ("train", other_tokenizer, "tokenizer"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_bad_data_is_refused_before_the_first_step(make: Make, tmp_path: Path, name: str) -> None:
    """B7：八种坏法，都在第一步之前点名。"""
    part, damage, message = DAMAGE[name]
    folder = write_dataset(tmp_path / "words")
    config = make(data=DataConfig(folder=str(folder)))
    damage(folder / part)
    with pytest.raises(ValueError, match=message):
        train(config)
    assert not list(Path(config.out).glob("step-*"))
    assert not (Path(config.out) / "metrics.jsonl").exists()


def test_data_shorter_than_the_context(make: Make) -> None:
    long = make().model.replace(context_size=1 << 20)
    with pytest.raises(ValueError, match=r"but context=1048576 needs at least 1048577"):
        train(make(model=long))


def test_checking_the_content_can_be_left_out(make: Make, tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "words")
    flip_a_bit(folder / "train")
    assert train(make(data=DataConfig(folder=str(folder), verify="size"))).step == 6
