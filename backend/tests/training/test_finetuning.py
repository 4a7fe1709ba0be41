"""微调整条路：对话与偏好数据，几种目标，轮数、时限、几个验证集；每一种都从每一步续得逐位相同。"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.data.shards import TokenDataset
from app.data.tokenizers import load_tokenizer
from app.models.transformer import GPT2Model
from app.training.config import DataConfig, ObjectiveConfig, ScheduleConfig, TrainConfig
from app.training.opened import feed_of, open_data, with_steps
from app.training.saving.checkpoint import step_folder
from app.training.watch import ending as ending_module
from app.training.watch.patience import Patience

from .conftest import Make, rows, same_weights, train, write_dataset
from .tuned import MODES, T, base, chats, modes, pairs, small, teacher

__all__ = ["base", "chats", "modes", "pairs", "teacher"]

STEPS = 12


def state_of(folder: Path) -> dict[str, Any]:
    state = json.loads((folder / "state.json").read_text())
    del state["config"]
    state["ending"].pop("spent", None)
    return state


def check_resume(make: Make, tmp_path: Path, starts: Any, change: dict[str, Any]) -> None:
    out = tmp_path / "straight"
    common = {"steps": STEPS, "eval_every": 3, **change}
    train(make(out=str(out), save_every=1, keep_last=STEPS, **common))
    end = step_folder(out, STEPS)
    for step in starts:
        branch = tmp_path / f"from-{step}"
        train(make(out=str(branch), resume=str(step_folder(out, step)), **common))
        found = step_folder(branch, STEPS)
        weights = "model.safetensors"
        weights = weights if (end / weights).is_file() else "adapter_model.safetensors"
        for name in (weights, "optim.safetensors"):
            assert (found / name).read_bytes() == (end / name).read_bytes(), (step, name)
        assert state_of(found) == state_of(end)
        for kind in ("train", "eval"):
            wanted = [r for r in rows(out, kind) if r["step"] > step]
            got = [r for r in rows(branch, kind) if r["step"] > step]
            for row in (*wanted, *got):
                row.pop("seconds", None)
            assert got == wanted


# 别的几种在下面，从每一步续。
@pytest.mark.parametrize("mode", ["pack, answers", "dpo, lora", "patience"])
def test_resumed_is_straight(
    make: Make, tmp_path: Path, modes: dict[str, dict[str, Any]], mode: str
) -> None:
    """跨过一轮的边界：37 例打包后一轮约 7 步。"""
    check_resume(make, tmp_path, (5,), modes[mode])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_resumed_is_straight_at_every_step(
    make: Make, tmp_path: Path, modes: dict[str, dict[str, Any]], mode: str
) -> None:
    check_resume(make, tmp_path, range(1, STEPS), modes[mode])


# ---- 轮数 ----


def test_epochs_become_steps(make: Make, chats: Path) -> None:
    config = make(data=DataConfig(folder=str(chats)), epochs=2.0, eval_every=1)
    result = train(config)
    assert result.step == 2 * -(-37 // 4)
    written = TrainConfig.from_dict(
        json.loads((result.checkpoint / "state.json").read_text())["config"]
    )
    assert (written.steps, written.epochs) == (20, None)
    assert sum(row["scored"] for row in rows(config.out)) == 2 * scored_in(chats / "train")


def scored_in(folder: Path) -> int:
    data = TokenDataset.open(folder)
    marks = data.scored(0, data.n_tokens)
    marks[np.asarray(data.document_starts)] = False
    return int(marks.sum())


def test_steps_and_epochs_are_refused_together() -> None:
    with pytest.raises(ValueError, match="steps=5 and epochs=2 both say how long"):
        TrainConfig.from_dict({"steps": 5, "epochs": 2})
    assert TrainConfig.from_dict({"steps": None, "epochs": 2}).epochs == 2.0


# ---- 时限 ----


class Ticking:
    """每问一次过一秒的钟。"""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.mark.parametrize("kind", ["wsd", "linear", "cosine"])
def test_the_time_limit_ends_with_the_schedule_finished(
    make: Make, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    monkeypatch.setattr(ending_module.Ending.__init__, "__defaults__", (Ticking(),))
    schedule = ScheduleConfig(kind=kind, warmup_steps=4, decay_fraction=0.4, min_lr_ratio=0.1)
    config = make(steps=500, time_limit="1m", schedule=schedule)
    result = train(config)
    (begun,) = rows(config.out, "ending")
    lrs = {row["step"]: row["lr"] for row in rows(config.out)}
    assert 4 < begun["step"] < begun["last"] == result.step < 60
    assert lrs[result.step] == pytest.approx(0.1 * config.optim.lr)
    down = [lrs[step] for step in range(begun["step"], result.step + 1)]
    assert down == sorted(down, reverse=True) and down[0] > 0.9 * config.optim.lr
    # 从收尾途中的一步续：只看记着的步，不看钟。
    monkeypatch.setattr(ending_module.Ending.__init__, "__defaults__", (lambda: 0.0,))


def test_the_recorded_step_is_replayed(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending_module.Ending.__init__, "__defaults__", (Ticking(),))
    out = tmp_path / "straight"
    common = {"steps": 500, "time_limit": "1m"}
    whole = train(make(out=str(out), save_every=1, keep_last=99, **common))
    (begun,) = rows(out, "ending")
    monkeypatch.setattr(ending_module.Ending.__init__, "__defaults__", (lambda: 0.0,))
    start = step_folder(out, begun["step"] + 2)
    again = train(make(out=str(tmp_path / "again"), resume=str(start), **common))
    assert again.step == whole.step and same_weights(again.checkpoint, whole.checkpoint)


def test_time_enough_changes_nothing(make: Make, tmp_path: Path) -> None:
    plain = train(make())
    limited = train(make(out=str(tmp_path / "limited"), time_limit="9h"))
    assert same_weights(plain.checkpoint, limited.checkpoint)
    assert not rows(tmp_path / "limited", "ending")


# ---- 几个验证集 ----


def test_the_first_validation_set_decides(make: Make, dataset: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", seed=3)
    config = make(
        data=DataConfig(folder=str(dataset), val={"old": str(other)}), eval_every=3, model=small()
    )
    result = train(config)
    evals = rows(config.out, "eval")
    assert all(row["set"] == "old" and list(row["sets"]) == ["val"] for row in evals)
    assert result.best is not None
    assert result.best[1] == min(row["loss"] for row in evals if row["step"] > 0)
    # 另一个的数就是单独量它的数。
    plain = make(out=str(tmp_path / "plain"), eval_every=3, model=small())
    train(plain)
    wanted = [(row["step"], row["loss"]) for row in rows(plain.out, "eval")]
    assert [(row["step"], row["sets"]["val"]["loss"]) for row in evals] == wanted


def test_a_small_set_is_read_whole_and_counted_by_tokens(
    make: Make, chats: Path, tmp_path: Path
) -> None:
    """与一行一例、逐个词元地算的相同；验证时的批大小不相干。"""
    losses = []
    for micro in (1, 4):
        config = make(
            out=str(tmp_path / f"{micro}"), data=DataConfig(folder=str(chats)), micro_batch=micro,
            steps=1, schedule=ScheduleConfig(warmup_steps=0), eval_every=1, model=small(),
        )  # fmt: skip
        result = train(config)
        losses.append(rows(config.out, "eval")[0]["loss"])
    torch.manual_seed(config.seed)
    model, total, count = GPT2Model(small()).eval(), 0.0, 0
    data = TokenDataset.open(chats / "val")
    ends = [*data.document_starts[1:], data.n_tokens]
    for start, end in zip(data.document_starts.tolist(), map(int, ends), strict=True):
        ids = torch.from_numpy(data.read(start, end - start))[None]
        logp = torch.log_softmax(model(ids[:, :-1])["logits"].double(), -1)
        each = logp.gather(-1, ids[:, 1:, None])[0, :, 0]
        keep = torch.from_numpy(data.scored(start, end - start)[1:])
        total, count = total - float(each[keep].sum().detach()), count + int(keep.sum())
    assert losses == pytest.approx([total / count] * 2, abs=1e-6)
    assert result.step == 1


def test_distillation_validates_with_cross_entropy(
    make: Make, modes: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """从同样的权重起：第 0 步的验证损失与不蒸馏的相同，KL 不混进去。"""
    found = []
    for mode in ("distill", "pack, answers"):
        config = make(out=str(tmp_path / mode.split(",")[0]), eval_every=6, **modes[mode])
        train(config)
        found.append(rows(config.out, "eval")[0]["loss"])
        if mode == "distill":
            assert all({"ce", "kl"} <= row.keys() for row in rows(config.out))
    assert found[0] == found[1]


def test_patience_wants_more_than_min_delta() -> None:
    patience = Patience(2, None, 0.1)
    for step, loss in enumerate((1.0, 0.95, 0.92), 1):
        patience.note(step, loss)
    assert patience.over
    patience = Patience(2, None, 0.1)
    for step, loss in enumerate((1.0, 0.95, 0.89), 1):
        patience.note(step, loss)
    assert not patience.over


# ---- 拒绝 ----


REFUSED: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "dpo on chat": (
        lambda at: {"data": DataConfig(folder=str(at.chats)), "model": small(),
                    "objective": ObjectiveConfig(kind="dpo"), "init_from": str(at.base)},
        "objective.kind=dpo compares chosen with rejected .* holds chat",
    ),
    "lm on pairs": (
        lambda at: {"data": DataConfig(folder=str(at.pairs))},
        "holds preference pairs but objective.kind=lm",
    ),
    "no such set": (
        lambda at: {"data": DataConfig(folder=str(at.chats), val={"a": "nowhere"})},
        "data.val.a=nowhere is no folder",
    ),
    "packed text": (lambda at: {"data": DataConfig(folder=str(at.text), pack=True)}, "pack=true"),
    "short teacher": (
        lambda at: {"data": DataConfig(folder=str(at.chats)), "model": small(context_size=2 * T),
                    "objective": ObjectiveConfig(kind="distill", teacher=str(at.teacher))},
        "context_size=8 but model.context_size=16",
    ),
}  # fmt: skip


class Places:
    def __init__(self, **folders: Path) -> None:
        self.__dict__.update(folders)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_written(
    make: Make, dataset: Path, chats: Path, pairs: Path, base: Path, teacher: Path, name: str
) -> None:
    change, message = REFUSED[name]
    at = Places(text=dataset, chats=chats, pairs=pairs, base=base, teacher=teacher)
    config = make(**change(at))
    with pytest.raises(ValueError, match=message):
        train(config)
    assert not Path(config.out).exists()


def test_a_teacher_with_another_tokenizer_is_refused(
    make: Make, chats: Path, tmp_path: Path
) -> None:
    other = write_dataset(tmp_path / "other")
    text = tmp_path / "strange.txt"
    text.write_text("xyz" * 400)
    folder = tmp_path / "strange"
    from app.data.prepare import TokenizerSpec, prepare
    from app.data.reading.sources import Sources

    prepare(Sources((text,)), folder, TokenizerSpec("chars"), say=lambda line: None)
    GPT2Model(small()).save_pretrained(other)
    load_tokenizer(folder / "train").save(other)
    config = make(
        data=DataConfig(folder=str(chats)),
        objective=ObjectiveConfig(kind="distill", teacher=str(other)),
    )
    with pytest.raises(ValueError, match="the ids mean different tokens"):
        train(config)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"objective": {"kind": "distill"}}, "objective.teacher=None: name the folder"),
        ({"objective": {"teacher": "x"}}, "objective.teacher=x but objective.kind=lm has no"),
        ({"objective": {"reference": "x"}}, "objective.reference=x but objective.kind=lm"),
        ({"objective": {"alpha": 1.5}}, "alpha=1.5 must be at least 0.0 and at most 1.0"),
        ({"objective": {"temperature": 0}}, "temperature=0.0 must be above 0"),
        ({"objective": {"kind": "dpo"}, "model": {"dropout": 0.0}}, "init_from=None"),
        ({"objective": {"kind": "dpo"}, "init_from": "x"}, "model.dropout=0.1 but objective.kind"),
        (
            {"objective": {"kind": "dpo"}, "init_from": "x", "model": {"dropout": 0.0},
             "batch_size": 3},
            "batch_size=3 is odd",
        ),
        ({"tune": {"trainable": "last:0"}}, "after 'last:' comes the number of layers"),
        ({"tune": {"lora_targets": ["qvk"]}}, "lora_targets has 'qvk': did you mean 'qkv'"),
        ({"data": {"val": {"val": "x"}}}, "data.val names a set 'val'"),
        ({"time_limit": "soon"}, "time_limit='soon' is not a time"),
        ({"epochs": 0}, "epochs=0.0 must be above 0"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict(data)


def test_an_open_feed_gives_epochs(make: Make, chats: Path) -> None:
    config = make(data=DataConfig(folder=str(chats), pack=True), epochs=1.5)
    data = open_data(config, lambda line: None)
    steps = with_steps(config, data.feed).steps
    assert steps == feed_of(data.train, config, 4, 0).steps_of(1.5)
