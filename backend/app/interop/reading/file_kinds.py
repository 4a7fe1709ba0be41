"""一个文件是什么：看开头的字节，不看后缀。"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

FileKind = Literal["safetensors", "gguf", "torch", "pickle", "json", "other"]


def file_kind(path: Path) -> FileKind:
    """torch: torch.save 的 zip；pickle: 更旧的 torch.save，或 nanoGPT 的 meta.pkl 之类。"""
    with path.open("rb") as file:
        start = file.read(16)
    if start.startswith(b"GGUF"):
        return "gguf"
    if start.startswith(b"PK\x03\x04"):
        return "torch"
    # 八个字节的头长（上限一兆多，高位恒零），接着是 JSON。
    if start[8:9] == b"{" and start[4:8] == bytes(4):
        return "safetensors"
    if start[:1] == b"\x80" and start[1:2] <= b"\x05":
        return "pickle"
    return "json" if start.lstrip()[:1] in (b"{", b"[") else "other"
