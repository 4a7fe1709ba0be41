"""按名字装入训练好的模型与它的分词器：各子命令共用。"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from app.data.tokenizers import Tokenizer
    from app.models.transformer import GPT2Config, GPT2Model


def load_trained(name: str, device: str) -> tuple[GPT2Model, Tokenizer]:
    """name 是训练文件夹（取最新的检查点）、RUN/best、一个检查点或存下的模型。

    Raises:
        ValueError: 不是上面几种之一，没有分词器，或没有这个设备。
    """
    model, tokenizer, folder = load_model(name, device)
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer: it takes token ids only, in Python")
    return model, tokenizer


def load_model(name: str, device: str) -> tuple[GPT2Model, Tokenizer | None, Path]:
    """同 load_trained，但没有分词器也行；还给出模型所在的文件夹。

    Raises:
        ValueError: 不是上面几种之一，或没有这个设备。
    """
    from app.data.tokenizers import META_FILE, TABLE_FILE, load_tokenizer
    from app.models.transformer import GPT2Model
    from app.training.saving.checkpoint import resolve_checkpoint

    if Path(name).is_file():
        raise ValueError(
            f"{name} is a file: give a run, checkpoint or model folder; weights from elsewhere "
            f"become one with `gpt2 import {name} --out NEW`"
        )
    folder = resolve_checkpoint(name, tell=lambda text: print(text, file=sys.stderr))
    tokenizer = None
    if (folder / META_FILE).is_file():
        tokenizer = load_tokenizer(folder)
    elif (folder / TABLE_FILE).is_file():
        raise ValueError(
            f"{folder} has a tokenizer of another maker ({TABLE_FILE} without {META_FILE}): make a "
            f"model folder of it first with `gpt2 import {folder} --out NEW`"
        )
    return GPT2Model.from_pretrained(folder, device=pick_device(device)), tokenizer, folder


def pick_device(name: str) -> torch.device:
    """
    Raises:
        ValueError: 没有这个设备。
    """
    import torch

    from app.training.machine.runtime import open_device

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return open_device(name)


def check_new_folder(out: Path) -> None:
    """
    Raises:
        ValueError: 那里已有东西，或上一层文件夹不存在。
    """
    if os.path.lexists(out):
        raise ValueError(f"out={out} already exists and is never overwritten: use another --out")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"out={out}: the folder {out.parent} does not exist: create it first")


def write_model(
    config: GPT2Config,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    out: Path,
    files: Mapping[str, str] | None = None,
) -> None:
    """写一个新的模型文件夹：先写在旁边再改名，写到一半断了，out 处什么也没有。"""
    import torch

    from app.models.transformer import GPT2Model

    with torch.device("meta"):
        model = GPT2Model(config)
    model.load_state_dict(state, assign=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    temporary.mkdir()
    try:
        model.save_pretrained(temporary)
        tokenizer.save(temporary)
        for name, text in (files or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        check_new_folder(out)
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def own_run_file(folder: Path) -> Path | None:
    """模型所属的训练的 run.yaml；检查点的在上一层。"""
    from app.training.saving.resume import RUN_FILE

    found = (place / RUN_FILE for place in (folder, folder.parent))
    return next((path for path in found if path.is_file()), None)


def own_data(folder: Path, tell: Callable[[str], object], instead: str) -> Path:
    """模型所属的训练的数据；instead：没有的话，该给哪些选项。

    Raises:
        ValueError: 它不属于哪次训练。
    """
    from app.cli.shared.runfile import load_config

    run_file = own_run_file(folder)
    if run_file is None:
        raise ValueError(
            f"{folder} does not belong to a run, so there is no data of its own: give {instead}"
        )
    data = Path(load_config(str(run_file))[0].data.folder)
    tell(f"note: scoring the data of the run, {data} (from {run_file})")
    return data
