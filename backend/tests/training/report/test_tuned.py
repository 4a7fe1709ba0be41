"""报告里微调的一节：前后的损失、忘了多少、答完的回答、DPO 的数，都由 metrics.jsonl 得来。"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from app.training.report.history import History
from app.training.report.run_facts import Facts
from app.training.report.tuned import HEAD, Losses, Tuned, compared, tuned_of, tuned_rows

FACTS = Facts([], [], ("a", "b"), parameters=1000, steps=2, expected_loss=3.0, trained=10)


def read(folder: Path, rows: list[dict[str, Any]]) -> Tuned:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    history = History(path)
    history.refresh()
    return tuned_of(history, FACTS)


def train(step: int, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 1.0, "tokens": 64 * step, **more}


def evaluated(step: int, tuned: float, before: float, **more: Any) -> dict[str, Any]:
    row = {"kind": "eval", "step": step, "loss": tuned, "set": "tuned", **more}
    return row | {"sets": {"before": {"loss": before}}}


def test_losses_before_and_after_and_what_was_forgotten(tmp_path: Path) -> None:
    answers = {"kind": "answers", "step": 2, "asked": 20, "ended": 3, "exact": 1, "limit": 16}
    rows = [
        evaluated(0, 3.0, 2.0), train(1, scored=10), evaluated(1, 1.0, 2.25), train(2, scored=7),
        evaluated(2, 1.5, 2.5), answers | {"shown": []},
    ]  # fmt: skip
    found = read(tmp_path, rows)
    assert found.sets == {"tuned": Losses(3.0, 1.0, 1.5), "before": Losses(2.0, 2.25, 2.5)}
    assert (found.scored, found.read, found.trained) == (17.0, 128.0, 10)
    said = {name: (value, why) for name, value, why in tuned_rows(found)}
    assert said["trained"] == ("10", "of 1,000 parameters (1%)")
    assert said["tokens scored"][0] == "17"
    assert said["loss on tuned"][0] == "3.0000 -> 1.5000"
    assert "best 1.0000; it rose again" in said["loss on tuned"][1]
    assert said["loss on before"] == ("2.0000 -> 2.5000", "+0.5000: forgotten")
    assert said["answers ended by themselves"][0] == "3 of 20"
    assert "most do not stop" in said["answers ended by themselves"][1]
    line = dict(zip(HEAD, compared("x", [found]), strict=True))
    assert line["old data"] == "2.0000 -> 2.5000" and line["answers ended"] == "3 of 20"


def test_preferences_and_older_runs(tmp_path: Path) -> None:
    rows = [
        evaluated(0, 0.6931, 2.0, margin=0.0, accuracy=0.0, chosen=-9.0, rejected=-8.0),
        train(1, scored=2),
        evaluated(1, 0.5, 2.0, margin=1.25, accuracy=0.75, chosen=-9.5, rejected=-12.0),
    ]
    said = {name: value for name, value, _ in tuned_rows(read(tmp_path, rows))}
    assert said["reward margin"] == "0 -> 1.25" and said["pairs scored"] == "2"
    assert said["preferred the chosen answer"] == "0 -> 0.75"
    # 更早的训练没有 scored，也没有第 0 步的验证。
    older = read(tmp_path, [train(1), {"kind": "eval", "step": 1, "loss": 2.0}])
    assert math.isnan(older.scored) and older.sets["val"].last == 2.0
    assert math.isnan(older.sets["val"].before) and older.answers is None
    assert compared("x", [older])[3] == "2.0000"
