"""按名字装入训练好的模型与它的分词器：各子命令共用。"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from typing_extensions import Doc

from app.common.files import write_folder
from app.common.tell import to_stderr

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from app.data.tokenizers import Tokenizer
    from app.models.transformer import GPT2Config, GPT2Model


# 各命令的同一个参数、同一句说明。
Trained = Annotated[
    tyro.conf.Positional[str],
    Doc("run folder (newest checkpoint), RUN/best, a checkpoint or a saved model"),
]
Device = Annotated[str, Doc("auto (cuda where there is one, else cpu), cpu, cuda, cuda:1")]


def load_trained(name: str, device: str) -> tuple[GPT2Model, Tokenizer]:
    """name 是训练文件夹（取最新的检查点）、RUN/best、一个检查点或存下的模型。

    Raises:
        ValueError: 不是上面几种之一，没有分词器，或没有这个设备。
    """
    from app.data.tokenizers import load_tokenizer
    from app.models.transformer import GPT2Model
    from app.training.saving.checkpoint import resolve_checkpoint

    folder = resolve_checkpoint(name, tell=to_stderr)
    tokenizer = load_tokenizer(folder)
    return GPT2Model.from_pretrained(folder, device=pick_device(device)), tokenizer


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


def write_trained(
    config: GPT2Config,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    out: Path,
    files: Mapping[str, str] | None = None,
) -> None:
    """写一个新的模型文件夹，连同分词器与 files（文件名 -> 内容）。"""
    import torch

    from app.models.transformer import GPT2Model

    with torch.device("meta"):
        model = GPT2Model(config)
    model.load_state_dict(state, assign=True)

    def fill(new: Path) -> None:
        model.save_pretrained(new)
        tokenizer.save(new)
        for name, text in (files or {}).items():
            (new / name).write_text(text, encoding="utf-8")

    write_folder(out, fill)


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
    data = Path(load_config(str(run_file)).config.data.folder)
    tell(f"note: scoring the data of the run, {data} (from {run_file})")
    return data
