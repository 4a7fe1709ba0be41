"""按名字装入训练好的模型与它的分词器：各子命令共用。"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from app.data.tokenizers import Tokenizer
    from app.models.transformer import GPT2Model


def load_trained(name: str, device: str) -> tuple[GPT2Model, Tokenizer]:
    """name 是训练文件夹（取最新的检查点）、RUN/best、一个检查点或存下的模型。

    Raises:
        ValueError: 不是上面几种之一，没有分词器，或没有这个设备。
    """
    from app.data.tokenizers import load_tokenizer
    from app.models.transformer import GPT2Model
    from app.training.checkpoint import resolve_checkpoint

    folder = resolve_checkpoint(name, tell=lambda text: print(text, file=sys.stderr))
    tokenizer = load_tokenizer(folder)
    return GPT2Model.from_pretrained(folder, device=pick_device(device)), tokenizer


def pick_device(name: str) -> torch.device:
    """
    Raises:
        ValueError: 没有这个设备。
    """
    import torch

    from app.training.runtime import open_device

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return open_device(name)
