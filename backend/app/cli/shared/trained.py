"""按名字装入训练好的模型与它的分词器：各子命令共用。"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import tyro
from typing_extensions import Doc

from app.common.files import write_folder
from app.common.tell import to_stderr
from app.common.waiting import Waiting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from app.data.chat.template import Template
    from app.data.tokenizers import Tokenizer
    from app.models.transformer import GPT2Config, GPT2Model


# 各命令的同一个参数、同一句说明。
TrainedName = Annotated[
    tyro.conf.Positional[str],
    Doc("run folder (newest checkpoint), RUN/best, a checkpoint or a saved model"),
]
IdleThreads = Annotated[
    Waiting, Doc("idle threads: passive sleeps, active spins; auto chooses and says why")
]
Device = Annotated[str, Doc("auto (cuda where there is one, else cpu), cpu, cuda, cuda:1")]


class Trained(NamedTuple):
    """装好的模型；folder 是它所在的检查点或模型文件夹，已经核对过。"""

    model: GPT2Model
    tokenizer: Tokenizer
    folder: Path

    def weights_sha256(self) -> str:
        """检查点的清单里就有（装入时刚核对过）；别的文件夹现算。"""
        from app.common.files import sha256_file
        from app.training.saving.checkpoint import ADAPTER_FILES, MANIFEST, MODEL_FILES

        whole = (self.folder / MODEL_FILES[1]).is_file()
        manifest, weights = self.folder / MANIFEST, (MODEL_FILES if whole else ADAPTER_FILES)[1]
        if manifest.is_file():
            return str(json.loads(manifest.read_bytes())["files"][weights]["sha256"])
        return sha256_file(self.folder / weights)


def load_trained(name: str | Path, device: str) -> Trained:
    """name 是训练文件夹（取最新的检查点）、RUN/best、一个检查点或存下的模型。

    Raises:
        ValueError: 不是上面几种之一，没有分词器，没有这个设备，或旁边有适配器。
    """
    model, tokenizer, folder = load_model(name, device)
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer: it takes token ids only, in Python")
    return Trained(model, tokenizer, folder)


def load_model(
    name: str | Path, device: str, base: Path | None = None
) -> tuple[GPT2Model, Tokenizer | None, Path]:
    """同 load_trained，但没有分词器也行；适配器与它的原模型相加。

    Args:
        base: 适配器的原模型，若不在它记着的地方。

    Raises:
        ValueError: 不是上面几种之一，没有这个设备，或原模型不在、已不是那个。
    """
    from app.adapters.load import open_model
    from app.cli.shared.foreign import refuse_foreign
    from app.data.tokenizers import META_FILE, TABLE_FILE, load_tokenizer
    from app.training.saving.checkpoint import resolve_checkpoint

    refuse_foreign(Path(name))
    folder = resolve_checkpoint(name, tell=to_stderr)
    base = None if base is None else resolve_checkpoint(base, tell=to_stderr)
    tokenizer, beside = None, folder
    if base is not None and not (folder / META_FILE).is_file():
        beside = base
    if (beside / META_FILE).is_file():
        tokenizer = load_tokenizer(beside)
    elif (folder / TABLE_FILE).is_file():
        raise ValueError(
            f"{folder} has a tokenizer of another maker ({TABLE_FILE} without {META_FILE}): make a "
            f"model folder of it first with `gpt2 import {folder} --out NEW`"
        )
    return open_model(folder, pick_device(device), base=base), tokenizer, folder


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
    template: Template | None,
    files: Mapping[str, str] | None = None,
) -> None:
    """写一个新的模型文件夹，连同分词器、对话的模板与 files（文件名 -> 内容）。"""
    import torch

    from app.models.transformer import GPT2Model

    with torch.device("meta"):
        model = GPT2Model(config)
    model.load_state_dict(state, assign=True)

    def fill(new: Path) -> None:
        model.save_pretrained(new)
        tokenizer.save(new)
        if template is not None:
            template.save(new)
        for name, text in (files or {}).items():
            (new / name).write_text(text, encoding="utf-8")

    write_folder(out, fill)


def own_run_file(folder: Path) -> Path | None:
    """模型所属的训练的 run.yaml；检查点的在上一层。"""
    from app.training.saving.resume import RUN_FILE

    found = (place / RUN_FILE for place in (folder, folder.parent))
    return next((path for path in found if path.is_file()), None)


def own_data(folder: Path, instead: str) -> Path:
    """模型所属的训练的数据；instead：没有的话，该给哪些选项。

    Raises:
        ValueError: 它不属于哪次训练，或那里的数据在训练之后换过。
    """
    from app.cli.shared.runfile import load_config
    from app.training.report.run_facts import read_facts

    run_file = own_run_file(folder)
    if run_file is None:
        raise ValueError(
            f"{folder} does not belong to a run, so there is no data of its own: give {instead}"
        )
    data = Path(load_config(str(run_file)).config.data.folder)
    facts = read_facts(run_file.parent)
    unknown = ""
    if facts is None:
        unknown = "; its fingerprint was not kept, so it may have been prepared anew since"
    else:
        _check_unchanged(data, facts.data, run_file.parent, instead)
    to_stderr(f"note: scoring the data of the run, {data} (from {run_file}){unknown}")
    return data


def _check_unchanged(data: Path, kept: tuple[str, str], run: Path, instead: str) -> None:
    """kept: 开训时训练与验证部分的指纹；没有验证部分的为空，几个验证集的以空格隔开。"""
    from app.data.shards import META_FILE, TokenDataset

    for part, wanted in zip(("train", "val"), kept, strict=True):
        if not (data / part / META_FILE).is_file():
            continue
        found = TokenDataset.open(data / part).fingerprint
        if found not in wanted.split():
            had = f"was trained with {wanted[:12]}" if wanted else "was trained without one"
            raise ValueError(
                f"{data / part} is not the data of the run any more: it holds {found[:12]}, but "
                f"{run} {had}: prepare that data again, or say what to score with {instead}"
            )
