"""读一个小的 JSON 文件（config.json、分片的索引）：文件不可信，大小先设上限。不需要 torch。"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 1 << 20


def read_json(path: Path) -> Any:
    """
    Raises:
        ValueError: 没有这个文件，大得不像配置，不是 UTF-8 或 JSON；都点名文件。
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}: it is not a saved model")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, more than {MAX_FILE_BYTES}: "
            "this is no model config"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
