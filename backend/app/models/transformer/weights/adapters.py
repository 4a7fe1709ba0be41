"""适配器（PEFT）旁边的权重：只装权重就悄悄丢了训练的结果，所以点名拒绝。"""

from __future__ import annotations

from pathlib import Path

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def check_no_adapter(folder: Path) -> None:
    """
    Raises:
        ValueError: 文件夹里有适配器；点名文件与两种改法。
    """
    found = next((folder / name for name in ADAPTER_FILES if (folder / name).exists()), None)
    if found is not None:
        raise ValueError(
            f"{found} belongs to an adapter (PEFT), which would be left out: merge it into the "
            "weights first (merge_and_unload, then save_pretrained), or move it away to use the "
            "weights without it"
        )
