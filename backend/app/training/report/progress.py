"""训练时给人看的：终端上一条活动的进度条，别处则是平常的行。"""

from __future__ import annotations

from types import TracebackType

from app.common.progress import Display
from app.common.units import duration


class Progress:
    """一个训练的显示，在标准输出。"""

    def __init__(self, steps: int, start: int, tokens_per_step: int) -> None:
        self._steps, self._tokens = steps, tokens_per_step
        self._seconds_per_step: float | None = None
        self._val = float("nan")
        self._display = Display("step", steps, start)

    def __enter__(self) -> Progress:
        self._display.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._display.__exit__(kind, error, trace)

    def tell(self, text: str) -> None:
        self._display.tell(text)

    def step(self, step: int, loss: float, lr: float, seconds: float) -> None:
        """完成了第 step 步，用了 seconds 秒（不含验证与保存）。"""
        mean = self._seconds_per_step
        mean = seconds if mean is None else 0.95 * mean + 0.05 * seconds
        self._seconds_per_step = mean
        self._display.show(step, lambda: self._facts(step, loss, lr, mean))

    def _facts(self, step: int, loss: float, lr: float, mean: float) -> str:
        speed, left = self._tokens / mean, (self._steps - step) * mean
        val = "" if self._val != self._val else f"  val {self._val:.4f}"
        return (
            f"{step}/{self._steps}  loss {loss:.4f}{val}  lr {lr:.2e}  {speed:,.0f} tokens/s  "
            f"{duration(left)} left"
        )

    def evaluated(self, step: int, loss: float, note: str) -> None:
        self._val = loss
        self.tell(f"step {step}/{self._steps}  val {loss:.4f}{note}")
