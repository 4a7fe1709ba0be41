"""对照：分组、平均与散布、只列不同的设置、两条横轴、该提醒的提醒。"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from app.training.config import TrainConfig
from app.training.report.compare_runs import (
    best,
    check_same_data,
    compare_charts,
    compare_page,
    differing,
    final,
    group_runs,
    load_run,
    row,
    settings_rows,
    with_spread,
)
from app.training.report.metrics import METRICS
from app.training.report.run_facts import FACTS, Facts, write_facts
from app.viz.curves import draw_charts

from ..conftest import Make, train
from .test_report import Page


def fake(
    folder: Path,
    changes: dict[str, Any] | None = None,
    vals: dict[int, float] | None = None,
    **more: Any,
) -> Path:
    """10 步的训练：每步 100 词元、半秒。"""
    folder.mkdir(parents=True)
    data = TrainConfig().to_dict() | {"steps": 10, "out": str(folder)} | (changes or {})
    data["schedule"] = {"warmup_steps": 0}
    (folder / "run.yaml").write_text(yaml.safe_dump(data))
    first, last = more.get("first", 1), more.get("last", 10)
    lines = [{"kind": "eval", "step": 0, "loss": 9.0, "tokens": 0}]
    for step in range(first, last + 1):
        facts = {"loss": 5.0 - 0.1 * step, "tokens": 100 * step, "seconds": 0.5}
        lines.append({"kind": "train", "step": step} | facts)
        if step in (vals or {}):
            lines.append({"kind": "eval", "step": step, "loss": (vals or {})[step]})
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_facts(
        folder,
        Facts([], [], (more.get("data", "a"), "v"), more.get("parameters", 1000), 10, 4.0, 3.0),
    )
    return folder


def test_table_by_hand(tmp_path: Path) -> None:
    post = {"model": {"norm": "post"}}
    pre = {"model": {"norm": "pre"}}
    folders = [
        fake(tmp_path / "a", post | {"seed": 0}, {5: 2.5, 10: 2.6}),
        fake(tmp_path / "b", pre | {"seed": 0}, {5: 2.4, 10: 2.0}),
        fake(tmp_path / "c", pre | {"seed": 1}, {5: 2.4, 10: 2.2}),
    ]
    runs = [load_run(folder) for folder in folders]
    groups = group_runs(runs)
    assert differing(runs) == ["model.norm"]
    assert [group.label for group in groups] == ["model.norm=pre", "model.norm=post"]
    assert row(groups[0]) == (
        "model.norm=pre", "0, 1", "2.1000 ± 0.1414", "2.1000 ± 0.1414", "1K", "5s", "200",
        "1,000", "10",
    )  # fmt: skip
    assert row(groups[1])[1:4] == ("0", "2.5000", "2.6000")
    assert settings_rows(groups, differing(runs)) == [("model.norm", "pre", "post")]
    told: list[str] = []
    check_same_data(runs, told.append)
    assert told == []
    text = Page(compare_page(groups, ["<b>note</b>"]).decode()).text
    for wanted in ("2.1000 ± 0.1414", "model.norm", "<b>note</b>", "Loss over tokens"):
        assert wanted in text


def test_both_axes(tmp_path: Path) -> None:
    """词元与秒都取做完那一步时的累计；没有开头的训练不画在时间上。"""
    whole = load_run(fake(tmp_path / "a", {"seed": 0}, {5: 2.5, 10: 2.6}))
    part = load_run(fake(tmp_path / "b", {"batch_size": 2}, {10: 2.7}, first=6))
    assert whole.at_evals(whole.seconds).tolist() == [0.0, 2.5, 5.0]
    assert whole.at_evals(whole.tokens).tolist() == [0.0, 500.0, 1000.0]
    over_tokens, over_seconds = compare_charts(group_runs([whole, part]))
    points = {line.name: line for line in over_tokens.lines if line.kind == "points"}
    assert points["batch_size=32"].x.tolist() == [500, 1000]
    assert points["batch_size=2"].x.tolist() == [1000]
    assert {line.name for line in over_seconds.lines} == {"", "batch_size=32"}
    assert row(group_runs([part])[0])[5:7] == ("-", "-")
    assert part.steps == 10 and math.isnan(part.loss[0]) and part.loss[-1] == 4.0


def test_best_and_final() -> None:
    assert with_spread([math.nan, 2.0]) == "2.0000" and with_spread([math.nan]) == "-"
    assert with_spread([1.0, 3.0]) == f"2.0000 ± {np.std([1, 3], ddof=1):.4f}"


def test_without_validation(tmp_path: Path) -> None:
    """第 0 步的验证不算；最后一步没有验证就没有 final。"""
    vals: list[dict[int, float]] = [{}, {5: 2.0}]
    runs = [load_run(fake(tmp_path / "ab"[s], {"seed": s}, vals[s])) for s in (0, 1)]
    assert math.isnan(best(runs[0])) and math.isnan(final(runs[0]))
    assert best(runs[1]) == 2.0 and math.isnan(final(runs[1]))
    assert row(group_runs(runs)[0])[2:4] == ("2.0000", "-")
    lines = compare_charts(group_runs(runs[:1]))[0].lines
    assert [(line.name, line.kind) for line in lines][0] == ("a", "line")


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({}, {"data": "b"}, "different data"),
        ({"eval_batches": 3}, {}, "different windows"),
        ({}, {"last": 9}, "not finished: .*other"),
    ],
)
def test_what_does_not_compare_is_said(
    tmp_path: Path, changes: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    runs = [load_run(fake(tmp_path / "one")), load_run(fake(tmp_path / "other", changes, **more))]
    told: list[str] = []
    check_same_data(runs, told.append)
    with pytest.raises(ValueError, match=message):
        raise ValueError(told)
    assert len(told) == 1 and told[0].startswith("warning: ")


def test_different_data_are_not_one_group(tmp_path: Path) -> None:
    runs = [load_run(fake(tmp_path / n, {"seed": s}, data=n)) for n, s in (("a", 0), ("b", 1))]
    assert [group.label for group in group_runs(runs)] == ["a", "b"]
    (tmp_path / "a" / FACTS).unlink()
    told: list[str] = []
    check_same_data([load_run(tmp_path / "a"), runs[1]], told.append)
    assert "is not recorded" in told[0]


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none has no metrics.jsonl: give run folders"):
        load_run(tmp_path / "none")
    folder = fake(tmp_path / "a")
    (folder / "run.yaml").write_text("steps: many")
    with pytest.raises(ValueError, match=r"run.yaml cannot be read: steps='many'"):
        load_run(folder)
    (folder / "run.yaml").unlink()
    with pytest.raises(ValueError, match="has no run.yaml"):
        load_run(folder)
    with pytest.raises(ValueError, match="no finished training step"):
        load_run(fake(tmp_path / "b", last=0))


def test_hostile_settings_stay_text(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    runs = [
        load_run(fake(tmp_path / "a", {"device": bad}, {10: 2.0})),
        load_run(fake(tmp_path / "b", {}, {10: 2.0})),
    ]
    page = Page(compare_page(group_runs(runs), [bad]).decode())
    assert "script" not in page.tags and bad in page.text


def test_real_runs_and_the_picture_plot(make: Make, tmp_path: Path) -> None:
    configs = [make(out=str(tmp_path / f"s{s}"), seed=s, eval_every=3) for s in (0, 1)]
    for config in configs:
        train(config)
    runs = [load_run(Path(config.out)) for config in configs]
    groups = group_runs(runs)
    assert len(groups) == 1 and len(groups[0].runs) == 2 and "±" in row(groups[0])[2]
    draw_charts(compare_charts(groups), tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(FileExistsError):
        draw_charts(compare_charts(groups), tmp_path / "c.png")
