"""rank 0 以外的 rank：不写记录，也不显示。"""

from __future__ import annotations

from types import TracebackType
from typing import Any


class Silent:
    """同时顶替 Metrics 与 Progress。"""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def write(self, row: dict[str, Any]) -> None: ...

    def sync(self) -> None: ...

    def tell(self, text: str) -> None: ...

    def step(self, step: int, loss: float, lr: float, seconds: float) -> None: ...

    def evaluated(self, step: int, loss: float, note: str) -> None: ...

    def __enter__(self) -> Silent:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
