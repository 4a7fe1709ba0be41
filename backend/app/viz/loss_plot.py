"""损失曲线：由 metrics.jsonl 的各行画一张 PNG。matplotlib 只在此处导入。"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from app.common.files import write_atomic

PLOT = "loss.png"


def plot_losses(rows: Sequence[dict[str, Any]], path: Path) -> Path | None:
    """画训练（原样与平滑）、验证与学习率；还没有一步可画时返回 None。"""
    train = [r for r in rows if r.get("kind") == "train" and _finite(r.get("loss"))]
    evals = [r for r in rows if r.get("kind") == "eval" and _finite(r.get("loss"))]
    if not train:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, lr_axes = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    _draw_losses(loss_axes, train, evals)
    lr_axes.plot([r["step"] for r in train], [r["lr"] for r in train], color="tab:green")
    lr_axes.set(xlabel="optimizer step", ylabel="learning rate", ylim=(0, None))
    lr_axes.grid(alpha=0.3)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format="png")
    write_atomic(path, drawn.getvalue())
    return path


def _draw_losses(axes: Any, train: list[dict[str, Any]], evals: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import EngFormatter

    steps = np.array([r["step"] for r in train], dtype=float)
    losses = np.array([r["loss"] for r in train], dtype=float)
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="training")
    axes.plot(steps, smooth(losses), color="tab:blue", label="training, smoothed")
    if evals:
        best = min(evals, key=lambda r: r["loss"])
        axes.plot(
            [r["step"] for r in evals], [r["loss"] for r in evals], "o-", color="tab:orange",
            markersize=4, label=f"validation, best {best['loss']:.4f} at step {best['step']}",
        )  # fmt: skip
    axes.set(ylabel="cross-entropy (nats per token)")
    axes.legend()
    axes.grid(alpha=0.3)
    # 每步词元数可能因续训改过批大小而变，所以用记录下来的累计数内插。
    tokens = np.array([r["tokens"] for r in train], dtype=float)
    known_steps, known_tokens = np.append(0.0, steps), np.append(0.0, tokens)
    top = axes.secondary_xaxis(
        "top",
        functions=(
            lambda x: _line(x, known_steps, known_tokens),
            lambda x: _line(x, known_tokens, known_steps),
        ),
    )
    top.set_xlabel("training tokens")
    top.xaxis.set_major_formatter(EngFormatter(sep=""))


def _line(x: Any, known_x: np.ndarray, known_y: np.ndarray) -> np.ndarray:
    """内插，两端按总的斜率外推（坐标轴的留白会越出数据）。"""
    x = np.asarray(x, dtype=float)
    slope = known_y[-1] / max(known_x[-1], 1e-9)
    inside = np.interp(x, known_x, known_y)
    return np.where(
        x < 0, x * slope, np.where(x > known_x[-1], known_y[-1] + (x - known_x[-1]) * slope, inside)
    )


def smooth(values: np.ndarray) -> np.ndarray:
    """指数平均，去掉起点的偏差（Adam 式修正）；窗口约为总长的五十分之一。"""
    keep = 1.0 - 1.0 / max(2.0, len(values) / 50)
    result, mean, weight = np.empty(len(values)), 0.0, 0.0
    for index, value in enumerate(values):
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        result[index] = mean / weight
    return result


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
