"""一次训练的各个检查点：有哪些、损失怎样走、同一段文字在它们眼里怎样变。

检查点只从服务开张时的训练文件夹里找，请求里没有路径。C 检查点数、T 词元数。
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from app.adapters.files import is_adapter
from app.adapters.load import open_model
from app.inspection.attention import NotFinite
from app.inspection.heads import Heads, heads, stacked
from app.inspection.score import Score, score
from app.inspection.slices import Steps
from app.models.transformer import GPT2Model
from app.serving.api.errors import wrong
from app.serving.api.fields import HistoryBody
from app.serving.api.inside.answer import FOLDER, head_scores, token_cards
from app.serving.api.inside.inspect import check_heads, read_tokens, usable
from app.serving.api.inside.packed import pack
from app.serving.served import Served
from app.serving.tasks import rows_within
from app.training.report.history import History
from app.training.report.metrics import METRICS
from app.training.saving.checkpoint import (
    ADAPTER_FILES,
    MODEL_FILES,
    CheckpointError,
    kept_every,
    list_steps,
    read_best,
    step_folder,
    verify_checkpoint,
)
from app.training.saving.resume import RUN_FILE
from app.training.saving.state import keep_every_of

MOST_STEPS, MOST_REVIEWS = 50, 2
# 曲线至多这么多点：网页画不下更多，几十万步的训练也不必送几兆字节。
_POINTS = 2000
_NO_RUN = (
    "this model was not served from a run folder, so it has no checkpoints: start the server with "
    "the folder that `gpt2 train` wrote"
)


def checkpoints(served: Served) -> dict[str, Any]:
    """GET /v1/history。"""
    if served.run is None:
        return {"model": served.name, "checkpoints": [], "curve": None, "why": _NO_RUN}
    every, best = _keep_every(served), _best(served)
    held = [
        {"step": step, "kept": step == best or _stays(step, folder, every)}
        for step, folder in list_steps(served.run)
    ]
    found: dict[str, Any] = {"model": served.name, "checkpoints": held, "curve": curve(served)}
    if every == 0:
        found["why"] = (
            "only the newest checkpoints and the best are kept: train with --keep-every N to keep "
            "one every N steps"
        )
    return found


def curve(served: Served) -> dict[str, Any] | None:
    """损失曲线；点太多时几步平均成一点，step 是那几步里最后的。没有记录是 None。"""
    assert served.run is not None
    history = History(served.run / METRICS)
    history.refresh()
    steps, losses = history.column("step"), history.column("loss")
    val_steps, val = history.evals()
    if not len(steps) and not len(val):
        return None
    each = max(1, -(-len(steps) // _POINTS))
    ends = [min(i + each, len(steps)) for i in range(0, len(steps), each)]
    parts = [losses[i:end] for i, end in zip(range(0, len(steps), each), ends, strict=True)]
    return {
        "step": [int(steps[end - 1]) for end in ends],
        "train": [_mean(part) for part in parts],
        "val_step": [int(step) for step in val_steps],
        "val": [float(value) for value in val],
    }


@dataclass
class Review:
    """一段文字在几个检查点眼里；读不了的记在 skipped，不使别的也看不成。"""

    served: Served
    ids: tuple[int, ...]
    steps: list[int]
    heads: bool
    found: dict[int, tuple[Score, Heads | None]] = field(default_factory=dict)
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def load(self, step: int) -> GPT2Model | None:
        """读一个检查点；只读盘，不算。读不了是 None。"""
        assert self.served.run is not None
        folder, served = step_folder(self.served.run, step), self.served.engine.model
        try:
            verify_checkpoint(folder, ADAPTER_FILES if is_adapter(folder) else MODEL_FILES)
            model = open_model(folder, served.device)
        except (ValueError, OSError):
            self._skip(step, "its files are damaged or were deleted while the server ran")
            return None
        if model.config.vocab_size != served.config.vocab_size:
            self._skip(step, "its vocabulary is not the one of the model served")
            return None
        return model.eval()

    def look(self, step: int, model: GPT2Model) -> Steps[None]:
        """看一个检查点，记在 found；算坏了的记在 skipped。"""
        try:
            self.found[step] = yield from self._seen(model)
        except NotFinite:
            self._skip(step, "its output is not finite: training diverged there")

    def _skip(self, step: int, why: str) -> None:
        self.skipped.append({"step": step, "why": why})

    def _seen(self, model: GPT2Model) -> Steps[tuple[Score, Heads | None]]:
        engine = self.served.engine
        config, stall = engine.model.config, engine.limits.pace.max_stall
        rows = rows_within(engine.costs, config, engine.width * config.n_embed, stall, 256)
        scored = yield from score(model, self.ids, engine.width, rows)
        if not self.heads:
            return scored, None
        return scored, (yield from heads(model, usable(self.served)))

    def result(self) -> dict[str, Any]:
        width, scores = len(self.ids), [one for one, _ in self.found.values()]
        logprob = np.array([one.logprob for one in scores]).reshape(-1, width)
        rank = np.array([one.rank for one in scores], dtype=np.int64).reshape(-1, width)
        answer = {
            "model": self.served.name,
            "tokens": token_cards(self.served, self.ids),
            "steps": list(self.found),
            "logprob": pack(logprob, "float32"),
            "rank": pack(rank, "uint32"),
            "skipped": self.skipped,
        }
        source = {"logprob": f"{FOLDER}score.py"}
        each = [one for _, one in self.found.values() if one is not None]
        if each:
            answer["head_scores"] = head_scores(stacked(each))
            source["head_scores"] = f"{FOLDER}heads.py"
        return answer | {"source": source}


def read_review(body: HistoryBody, served: Served) -> Review:
    """
    Raises:
        ApiError: 400：不是从训练文件夹起的，没有那一步，或提示不对。
    """
    if served.run is None:
        raise wrong("model", _NO_RUN, "no_checkpoints")
    held = [step for step, _ in list_steps(served.run)]
    if not held:
        raise wrong("model", "the run holds no checkpoint any more", "no_checkpoints")
    steps = _spread(held) if body.steps is None else body.steps
    missing = [step for step in steps if step not in held]
    if missing:
        raise wrong(
            "steps",
            f"steps names {len(missing)} that the run does not hold: GET /v1/history lists its "
            f"{len(held)}, from {held[0]} to {held[-1]}",
        )
    if len(set(steps)) < len(steps):
        raise wrong("steps", "steps names a step twice")
    if body.heads:
        check_heads(served)
    return Review(served, read_tokens(body.prompt, served), list(steps), bool(body.heads))


def _spread(steps: list[int]) -> list[int]:
    """至多 MOST_STEPS 个，头尾都在，中间均匀。"""
    if len(steps) <= MOST_STEPS:
        return steps
    picked = np.linspace(0, len(steps) - 1, MOST_STEPS).round().astype(int)
    return [steps[i] for i in picked.tolist()]


def _stays(step: int, folder: Path, every: int) -> bool:
    return kept_every(step, every) or kept_every(step, keep_every_of(folder))


def _keep_every(served: Served) -> int:
    """run.yaml 里的；没有那个文件、或写得早没有这一项，就是不留。"""
    import yaml

    assert served.run is not None
    path = served.run / RUN_FILE
    data = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    every = data.get("keep_every", 0) if isinstance(data, dict) else 0
    return every if isinstance(every, int) else 0


def _best(served: Served) -> int | None:
    assert served.run is not None
    try:
        best = read_best(served.run)
    except CheckpointError:
        return None
    return None if best is None else best[0]


def _mean(losses: np.ndarray) -> float | None:
    """JSON 没有 NaN；一段里全是坏的就是 null。"""
    good = [loss for loss in losses.tolist() if math.isfinite(loss)]
    return sum(good) / len(good) if good else None
