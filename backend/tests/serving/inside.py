"""看里面的回答怎样读回来。"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from tests.serving.conftest import Running

KINDS = {"u8": "<u1", "u16": "<u2", "u32": "<u4", "f32": "<f4"}


def unpack(packed: dict[str, Any]) -> np.ndarray:
    raw = base64.b64decode(packed["data"], validate=True)
    return np.frombuffer(raw, KINDS[packed["dtype"]]).reshape(packed["shape"])


def inspect(server: Running, **body: Any) -> dict[str, Any]:
    response = server.post("/v1/inspect", body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found
