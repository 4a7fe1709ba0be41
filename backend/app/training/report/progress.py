"""训练时给人看的：终端上一条活动的进度条，别处则是平常的行。"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_REFRESH_SECONDS, _LINE_SECONDS = 0.25, 10.0


def say(text: str) -> None:
    """打印一行；标准输出的编码写不出的字符写成 \\xNN，而不是为它结束训练。"""
    print(printable(text), flush=True)


def printable(text: str) -> str:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding, "replace")


class Progress:
    """一个训练的显示。

    输出失败（管道或终端已关）之后就不再显示：显示不该毁掉训练。
    """

    def __init__(self, steps: int, start: int, tokens_per_step: int) -> None:
        self._steps, self._start, self._tokens = steps, start, tokens_per_step
        self._next = 0.0
        self._seconds_per_step: float | None = None
        self._val = float("nan")
        self._bar: Any = None
        self._quiet = False

    def __enter__(self) -> Progress:
        if sys.stdout.isatty():
            self._bar = _bar(self._steps, self._start)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def tell(self, text: str) -> None:
        if self._quiet:
            return
        try:
            if self._bar is not None:
                self._bar.console.print(printable(text), markup=False, highlight=False)
            else:
                say(text)
        except OSError:
            self._quiet = True

    def step(self, step: int, loss: float, lr: float, seconds: float) -> None:
        """完成了第 step 步，用了 seconds 秒（不含验证与保存）。"""
        mean = self._seconds_per_step
        self._seconds_per_step = seconds if mean is None else 0.95 * mean + 0.05 * seconds
        now = time.perf_counter()
        if now >= self._next:
            self._next = now + (_REFRESH_SECONDS if self._bar is not None else _LINE_SECONDS)
            self._show(step, loss, lr, self._seconds_per_step)

    def _show(self, step: int, loss: float, lr: float, mean: float) -> None:
        speed, left = self._tokens / mean, (self._steps - step) * mean
        val = "" if self._val != self._val else f"  val {self._val:.4f}"
        facts = f"loss {loss:.4f}{val}  lr {lr:.2e}  {speed:,.0f} tokens/s"
        if self._bar is None:
            self.tell(f"step {step}/{self._steps}  {facts}  {duration(left)} left")
        elif not self._quiet:
            try:
                self._bar.update(0, completed=step, facts=facts, left=duration(left), refresh=True)
            except OSError:
                self._quiet = True

    def evaluated(self, step: int, loss: float, note: str) -> None:
        self._val = loss
        self.tell(f"step {step}/{self._steps}  val {loss:.4f}{note}")


def _bar(steps: int, start: int) -> Any:
    from rich.progress import BarColumn, Progress, TextColumn

    bar = Progress(
        BarColumn(bar_width=20),
        TextColumn("{task.completed}/{task.total}  {task.fields[facts]}  {task.fields[left]} left"),
        auto_refresh=False,
        transient=True,
    )
    bar.add_task("", total=steps, completed=start, facts="", left="?")
    return bar


def duration(seconds: float) -> str:
    """给人读的时间：42s、3m05s、2h07m。"""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
