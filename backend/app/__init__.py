"""整个程序的包：在这里把上面的房间登记给主干，主干自己不导入它们（也不导入 torch）。"""

from __future__ import annotations

from typing import Any

from app.models.transformer.config import QUANTIZED_VERSION
from app.models.transformer.weights.formats import register_loader


def _load_quantized(*given: Any) -> Any:
    from app.quantization.folder import load_quantized

    return load_quantized(*given)


register_loader(QUANTIZED_VERSION, _load_quantized)
