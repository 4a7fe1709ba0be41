"""TensorBoard 事件：可选的另一个去处；tensorboard 包不在必需的依赖里。"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from app.common.tell import Tell

from .metrics import METRICS, read_metrics

EVENTS = "tensorboard"
_TRAIN = {
    "loss": "loss/train",
    "aux_loss": "loss/experts",
    "grad_norm": "gradient/norm",
    "lr": "learning rate",
}


def require_tensorboard() -> None:
    """开训之前就查，不在第一次写时才发现。

    Raises:
        ImportError: 没有安装 tensorboard。
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError(
            "tensorboard=True needs the package tensorboard: "
            "pip install 'gpt2-workbench[tensorboard]', or leave --tensorboard out"
        )


def open_tensorboard(run: Path, resume_step: int, tell: Tell) -> TensorBoard | None:
    """在 metrics.jsonl 截回之后调用。写不了（不可写、盘满）只警告一次，返回 None。"""
    try:
        return TensorBoard(run, resume_step)
    except OSError as error:
        tell(f"warning: cannot write {EVENTS}: {error}; training goes on")
        return None


class TensorBoard:
    """把 metrics 的行写成事件。

    开始时（从头的也是：上一次可能没活到第一个检查点）让 TensorBoard 丢掉第 resume_step 步及
    以后的（purge_step），再补写 metrics.jsonl 里那一步留下的行，所以每步恰有一个值。
    """

    name = EVENTS

    def __init__(self, run: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / EVENTS), purge_step=resume_step)
        for row in read_metrics(run / METRICS):
            if row["step"] == resume_step:
                self.write(row)

    def write(self, row: dict[str, Any]) -> None:
        step, kind = row["step"], row["kind"]
        values: dict[str, Any] = {}
        if kind == "train":
            values = {tag: row.get(name) for name, tag in _TRAIN.items()}
            values["speed/seconds per step"] = row.get("seconds")
        elif kind == "eval":
            values = {"loss/validation": row.get("loss")}
        elif kind == "moe":
            values = {
                f"experts {name}/layer {layer}": one[name]
                for layer, one in row["layers"].items()
                for name in ("max_vio", "entropy", "drop_rate", "dead")
            }
        elif kind == "groups":
            values = {f"gradient/{name}": value for name, value in row["norms"].items()}
        elif kind == "memory":
            values = {f"memory/{key} bytes": row.get(key) for key in ("resident", "device")}
        elif kind == "sample":
            self._writer.add_text("sample", _quoted(str(row["text"])), step)
        else:
            self._writer.add_text(str(kind), _quoted(str(row)), step)
        for tag, value in values.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(tag, value, step)

    def sync(self) -> None:
        """检查点之前的事件也必须在盘上，续训不会重写它们。"""
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _quoted(text: str) -> str:
    """TensorBoard 把文字当作 Markdown：缩进成代码块，原样显示。"""
    return "".join(f"    {line}\n" for line in text.splitlines())
