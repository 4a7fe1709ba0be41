"""DPO 整条路：参考算一次、存下、丢了再算；它就是起点，没有 dropout，没有适配器。"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.data.shards import TokenDataset
from app.data.tokenizers import load_tokenizer
from app.distributed.comm import ALONE
from app.models.transformer import GPT2Model
from app.training.config import ObjectiveConfig, ScheduleConfig
from app.training.machine.runtime import Runtime
from app.training.objectives import reference as reference_module
from app.training.objectives.reference import log_probs
from app.training.opened import feed_of, open_data
from app.training.saving.checkpoint import best_measured, step_folder
from app.training.saving.tuned import base_again, begin, read_tuned_weights

from .conftest import Make, rows, same_weights, train
from .tuned import base, chats, modes, pairs, small, teacher

__all__ = ["base", "chats", "modes", "pairs", "teacher"]

CPU = Runtime(torch.device("cpu"), "", torch.float32, "")


def test_dpo_starts_at_ln_2_and_is_compared_once(
    make: Make,
    modes: dict[str, dict[str, Any]],
    pairs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change = {**modes["dpo"], "objective": ObjectiveConfig(kind="dpo")}
    config = make(eval_every=6, **change)
    result = train(config)
    first = rows(config.out)[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6) and abs(first["margin"]) < 1e-6
    assert {"accuracy", "chosen", "rejected", "ce"} <= first.keys() and first["scored"] == 2
    before, after = (row for row in rows(config.out, "eval") if row["step"] in (0, 6))
    assert before["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert {"margin", "accuracy", "chosen", "rejected", "ce"} <= after.keys()
    assert "expected ln 2 = 0.6931: as it should be" in capsys.readouterr().out
    assert len(list(pairs.glob("*/reference-*.npy"))) == 2
    # 第二次（与续训）不再算。
    monkeypatch.setattr(reference_module, "log_probs", forbidden)
    monkeypatch.setattr("app.training.references.log_probs", forbidden)
    again = train(make(out=f"{config.out}-again", eval_every=6, **change))
    assert same_weights(again.checkpoint, result.checkpoint)


def forbidden(*args: Any) -> Any:
    raise AssertionError("computed again")


def test_another_beta_is_another_ruler(make: Make, modes: dict[str, dict[str, Any]]) -> None:
    """β 换了，从前的最好就重量一遍，不拿两种损失相比；耐心也从头数起。"""
    change = modes["dpo"]
    config = make(eval_every=3, **change)
    train(config)
    before = best_measured(Path(config.out))
    assert before is not None and before["dpo_beta"] == change["objective"].dpo_beta
    assert before["dpo_sft"] == 0.1 and before["reference"]
    told: list[str] = []
    other = replace(change["objective"], dpo_beta=5.0)
    train(config.replace(objective=other, resume="auto", steps=7), told)
    (line,) = [line for line in told if "measured again" in line]
    assert "dpo_beta=0.1" in line and "dpo_beta=5.0" in line
    after = best_measured(Path(config.out))
    assert after == before | {"dpo_beta": 5.0}


def test_a_lost_reference_is_computed_again(
    make: Make, modes: dict[str, dict[str, Any]], pairs: Path, tmp_path: Path
) -> None:
    """存着的文件不见了：续训时由 init_from 重算，逐位相同；init_from 换了就拒绝。"""
    change = modes["dpo"]
    whole = train(make(save_every=2, keep_last=9, **change))
    for path in pairs.glob("*/reference-*.npy"):
        path.unlink()
    start = str(step_folder(whole.checkpoint.parent, 4))
    again = train(make(out=str(tmp_path / "again"), resume=start, **change))
    assert same_weights(again.checkpoint, whole.checkpoint)
    for path in pairs.glob("*/reference-*.npy"):
        path.unlink()
    torch.manual_seed(6)
    wrong = tmp_path / "wrong"
    GPT2Model(small()).save_pretrained(wrong)
    load_tokenizer(pairs / "train").save(wrong)
    with pytest.raises(ValueError, match="was compared with the reference .* is now"):
        train(make(out=str(tmp_path / "c"), resume=start, **{**change, "init_from": str(wrong)}))


def test_the_reference_is_the_start_to_the_bit(
    make: Make, modes: dict[str, dict[str, Any]], pairs: Path, base: Path
) -> None:
    """与逐例、不经过训练的代码算的相同（float64 之前同样的前向）。"""
    train(make(**modes["dpo"]))
    (path,) = (pairs / "train").glob("reference-*.npy")
    found, data = np.load(path), TokenDataset.open(pairs / "train")
    model = GPT2Model.from_pretrained(base).eval()
    ends = [*data.document_starts[1:], data.n_tokens]
    for i, (start, end) in enumerate(
        zip(data.document_starts.tolist(), map(int, ends), strict=True)
    ):
        ids = torch.from_numpy(data.read(start, end - start))[None]
        with torch.no_grad():
            logp = torch.log_softmax(model(ids[:, :-1])["logits"], -1)
        each = logp.gather(-1, ids[:, 1:, None])[0, :, 0]
        keep = torch.from_numpy(data.scored(start, end - start)[1:])
        assert found[i] == pytest.approx(float(each[keep].double().sum()), abs=1e-5)


def test_another_reference_is_computed_without_its_dropout(
    make: Make, modes: dict[str, dict[str, Any]], pairs: Path, base: Path, tmp_path: Path
) -> None:
    """参考自己的配置里有 dropout：算它时关着，与没有 dropout 的同一份权重逐位相同。"""
    wet, found = tmp_path / "wet", []
    GPT2Model.from_pretrained(base, dropout=0.5).save_pretrained(wet)
    load_tokenizer(base).save(wet)
    for folder in (wet, base):
        objective = ObjectiveConfig(kind="dpo", reference=str(folder))
        change = {**modes["dpo"], "objective": objective, "steps": 1}
        train(make(out=f"{folder}-run", schedule=ScheduleConfig(warmup_steps=0), **change))
        (path,) = (pairs / "train").glob("reference-*.npy")
        found.append(np.load(path))
        path.unlink()
    assert np.array_equal(*found)


def test_log_probs_turn_the_dropout_off_and_on_again(
    modes: dict[str, dict[str, Any]], make: Make, base: Path
) -> None:
    config = make(**modes["dpo"])
    data = open_data(config, lambda line: None).train
    feed, found = feed_of(data, config, 4, config.seed), []
    for dropout in (0.5, 0.0):
        model = GPT2Model.from_pretrained(base, dropout=dropout).train()
        found.append(log_probs(model, feed, 4, CPU, ALONE))
        assert model.training
    assert np.array_equal(*found, equal_nan=True)


def test_the_reference_is_the_model_without_its_adapters(
    make: Make, modes: dict[str, dict[str, Any]], pairs: Path
) -> None:
    """装上适配器之前的模型就是存着的参考，逐位；装上训练过的就不是。"""
    config = make(**modes["dpo, lora"])
    result = train(config)
    (path,) = (pairs / "train").glob("reference-*.npy")
    data = TokenDataset.open(pairs / "train")
    tokenizer, quiet = load_tokenizer(pairs / "train"), lambda line: None
    model = GPT2Model(config.model)
    base = base_again(config, result.checkpoint, model, tokenizer)
    feed = feed_of(data, config, config.rows_at_once, 0, quiet)
    before = log_probs(model, feed, config.rows_at_once, CPU, ALONE)
    begin(config, model, base)
    read_tuned_weights(result.checkpoint, model)
    after = log_probs(model, feed, config.rows_at_once, CPU, ALONE)
    assert np.array_equal(before, np.load(path)) and not np.allclose(after, before)
