"""best.json 记着的最好的检查点，续训时还算不算数。"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from app.common.tell import Tell

from .checkpoint import (
    BEST,
    CheckpointError,
    best_measured,
    read_best,
    step_folder,
    verify_checkpoint,
)

# 只有 DPO 的损失有。
_COMPARED = ("dpo_beta", "dpo_sft", "reference")


class Best(NamedTuple):
    """第几步、损失、在什么上量的（不知道则 None）。"""

    step: int
    loss: float
    measured: dict[str, Any] | None


def sound_best(run: Path, tell: Tell) -> Best | None:
    """检查点若已不在或损坏，就当没有，由下一次验证重立。"""
    try:
        best, measured = read_best(run), best_measured(run)
        if best is None:
            return None
        verify_checkpoint(step_folder(run, best[0]))
        return Best(*best, measured)
    except CheckpointError as error:
        (run / BEST).unlink()
        tell(f"warning: the record of the best checkpoint is dropped: {error}")
        return None


def measured_again(best: Best, loss: float, measured: Mapping[str, Any]) -> str:
    """换了尺子重量之后的那一句。"""
    return (
        f"best checkpoint (step {best.step}) measured again on the validation windows of now: "
        f"{loss:.4f} (was {best.loss:.4f} {_on(best.measured)}, now {_on(measured)})"
    )


def _on(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return "on unknown windows"
    also = [f"{name}={measured[name]}" for name in _COMPARED if name in measured]
    return (
        f"on {measured['windows']} windows of {measured['context']} tokens of data "
        f"{measured['data'][:12]}" + "".join(f", {one}" for one in also)
    )
