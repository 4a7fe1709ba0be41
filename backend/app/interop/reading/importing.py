"""别处的权重变成我们的文件夹：hub、Hugging Face 的文件夹或文件，明说了才有的 pickle。"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.common.files import write_folder
from app.data.tokenizers import Tokenizer, load_tokenizer
from app.interop.reading.file_kinds import file_kind
from app.interop.reading.foreign_tokenizer import foreign_tokenizer
from app.interop.reading.nanogpt import META_FILE, open_checkpoint, read_meta
from app.interop.reading.pickles import LoadedTensors, load_pickle, load_tensors
from app.interop.tokens import without_separator
from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.settings.json_file import read_json
from app.models.transformer.weights.adapters import check_no_adapter
from app.models.transformer.weights.hub import MODEL_FILES, TOKENIZER_FILES, find_folder
from app.models.transformer.weights.layouts import read_tensors
from app.models.transformer.weights.own_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    assemble,
    expected_shapes,
)
from app.models.transformer.weights.pretrained import (
    INDEX_FILE,
    agree,
    listed,
    load_pretrained,
    read_foreign,
)
from app.models.transformer.weights.recognise import recognise
from app.models.transformer.weights.safetensors_file import (
    SafetensorsFiles,
    TensorSource,
    header_limit,
)

PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
_CPU = torch.device("cpu")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


@dataclass(frozen=True)
class Imported:
    """tokenizer 为 None 时 why 说明原因：权重照样能用，文字则要用对方的分词器编码。

    notes: 替用户做的选择，每条一句英文。
    """

    model: GPT2Model
    tokenizer: Tokenizer | None
    why: str = ""
    notes: tuple[str, ...] = ()


def import_model(
    source: str,
    *,
    allow_pickle: bool = False,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
    wanted: Mapping[str, Any] | None = None,
) -> Imported:
    """
    Args:
        source: 文件夹、hub 上的名字、一个 safetensors 或 torch.save 的文件（后者要 allow_pickle）。
        tokenizer: 另一个文件夹（或 nanoGPT 的 meta.pkl），用它的分词器；None = source 自己的。
        wanted: 见 GPT2Model.from_pretrained；文件没写的结构也由它定（见 open_checkpoint）。

    Raises:
        ValueError: 找不到、读不懂、不安全，或与 wanted 不符。
    """
    read = _Reader(allow_pickle, dtype, wanted or {})
    path = Path(source)
    if path.is_file():
        done, folder = read.file(path), path.parent
        if done.why == "":
            return _with_tokenizer(done, tokenizer, folder, allow_pickle)
        return _with_tokenizer(done, tokenizer, None, allow_pickle)
    pickles = (PICKLE_FILE, "pytorch_model-*.bin", PICKLE_INDEX) if allow_pickle else ()
    folder = find_folder(source, (*MODEL_FILES, *TOKENIZER_FILES, *pickles))
    return _with_tokenizer(read.folder(folder), tokenizer, folder, allow_pickle)


@dataclass(frozen=True)
class _Reader:
    """读权重；结果里没有分词器，why 非空表示旁边也不会有它的。"""

    allow_pickle: bool
    dtype: torch.dtype | None
    wanted: Mapping[str, Any]

    def folder(self, folder: Path) -> Imported:
        check_no_adapter(folder)
        _check_is_model(folder)
        index, single = folder / PICKLE_INDEX, folder / PICKLE_FILE
        safe = (folder / WEIGHTS_FILE).is_file() or (folder / INDEX_FILE).is_file()
        if not safe and self.allow_pickle and (index.is_file() or single.is_file()):
            shards = listed(index, ".bin") if index.is_file() else [single]
            return self._by_config(folder, load_tensors(shards))
        return Imported(load_pretrained(GPT2Model, folder, _CPU, self.dtype, self.wanted), None)

    def file(self, path: Path) -> Imported:
        kind, folder = file_kind(path), path.parent
        check_no_adapter(folder)
        if kind == "gguf":
            raise ValueError(
                f"{path} is a GGUF file (llama.cpp), whose weights are often rounded and which is "
                "only written here, never read: import the folder that it was made from"
            )
        if kind in ("json", "other"):
            what = "a JSON file" if kind == "json" else "no file of weights that can be read"
            raise ValueError(
                f"{path} is {what}: give the folder, a .safetensors file with its {CONFIG_FILE} "
                "beside it, or a file that torch.save wrote"
            )
        if kind == "safetensors":
            return self._safetensors(path)
        if not self.allow_pickle:
            raise ValueError(
                f"{path} is a pickle, which could run code: if you trust it, give --allow-pickle "
                "(it is read with weights_only=True and size limits)"
            )
        if path.name == META_FILE:
            raise ValueError(
                f"{path} holds an alphabet and no weights: give the checkpoint (ckpt.pt), and this "
                f"file with --tokenizer {path}"
            )
        data = load_pickle(path)
        if (folder / CONFIG_FILE).is_file() and not (isinstance(data, dict) and "model" in data):
            return self._by_config(folder, load_tensors([path]))
        return self._checkpoint(path, data)

    def _safetensors(self, path: Path) -> Imported:
        folder = path.parent
        if not (folder / CONFIG_FILE).is_file():
            raise ValueError(
                f"{path} holds tensors but not what they mean: put the {CONFIG_FILE} that belongs "
                "to it beside it"
            )
        index = folder / INDEX_FILE
        if path.name == WEIGHTS_FILE or (index.is_file() and path in listed(index, path.suffix)):
            return self.folder(folder)
        raw = recognise(read_json(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
        if not isinstance(raw, dict) or "model_type" not in raw:
            raise ValueError(
                f"{path}: beside the {CONFIG_FILE} of a model of ours the weights must be named "
                f"{WEIGHTS_FILE}: rename it, if they belong together"
            )

        def opened(_: Path, most: int) -> TensorSource:
            return SafetensorsFiles([path], header_limit(most))

        return self._foreign(raw, folder, opened)

    def _by_config(self, folder: Path, source: LoadedTensors) -> Imported:
        raw = recognise(read_json(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
        if not isinstance(raw, dict) or "model_type" not in raw:
            raise ValueError(
                f"{folder / CONFIG_FILE} belongs to a model of ours, which keeps its weights in "
                f"{WEIGHTS_FILE}, not in {source.where}"
            )
        return self._foreign(raw, folder, lambda *_: source)

    def _foreign(self, raw: dict[str, Any], folder: Path, opened: Any) -> Imported:
        config, tensors = read_foreign(GPT2Model, raw, folder, opened)
        config = agree(config, self.wanted, str(folder))
        return Imported(assemble(GPT2Model, config, tensors, _CPU, self.dtype), None)

    def _checkpoint(self, path: Path, data: Any) -> Imported:
        found = open_checkpoint(path, data, self.wanted)
        config: GPT2Config = found.config
        expected = expected_shapes(GPT2Model, config)
        tensors = read_tensors(found.layout, config, expected, found.source)
        config = agree(config, self.wanted, str(path))
        model = assemble(GPT2Model, config, tensors, _CPU, self.dtype)
        why = f"{path} holds none; give --tokenizer{found.hint}"
        return Imported(model, None, why, found.notes)


def _check_is_model(folder: Path) -> None:
    """没有 config.json 时，说出文件夹里其实是什么。"""
    if (folder / CONFIG_FILE).is_file():
        return
    if (folder / "run.yaml").is_file():
        raise ValueError(
            f"{folder} is a run of ours, ready for use: `gpt2 generate {folder}`, "
            f"`gpt2 export {folder}`"
        )
    names = sorted(p for end in ("pt", "pth", "bin", "gguf") for p in folder.glob(f"*.{end}"))
    if names:
        raise ValueError(
            f"{folder} has no {CONFIG_FILE}: is it {names[0].name} that you want? Then give the "
            f"file, {names[0]}"
        )


def write_model(imported: Imported, folder: Path) -> None:
    """
    Raises:
        ValueError: folder 已有东西。
    """

    def fill(new: Path) -> None:
        imported.model.save_pretrained(new)
        if imported.tokenizer is not None:
            imported.tokenizer.save(new)

    write_folder(folder, fill)


def _with_tokenizer(
    done: Imported, given: Path | None, beside: Path | None, allow_pickle: bool
) -> Imported:
    """given 是用户点名的（读不了是错），beside 是权重旁边的（读不了只是没有）。"""
    rows, why = done.model.config.vocab_size, done.why
    tokenizer: Tokenizer | None = None
    if given is not None:
        tokenizer = _given(given, rows, allow_pickle)
    elif beside is not None:
        try:
            tokenizer = _beside(beside, rows)
        except ValueError as error:
            why = str(error)
    if tokenizer is None:
        return Imported(done.model, None, why, done.notes)
    tokenizer, notes = _fitted(tokenizer, rows, str(given or beside))
    return Imported(done.model, tokenizer, "", (*done.notes, *notes))


def _given(path: Path, rows: int, allow_pickle: bool) -> Tokenizer:
    meta = path / META_FILE if path.is_dir() else path
    if meta.name == META_FILE and meta.is_file():
        if not allow_pickle:
            raise ValueError(
                f"{meta} is a pickle: if you trust it, give --allow-pickle (only numbers and "
                "texts are read from it)"
            )
        return read_meta(meta)
    folder = path.parent if path.is_file() else path
    if not folder.is_dir():
        raise ValueError(f"--tokenizer {path}: there is no such folder")
    return _beside(folder, rows)


def _beside(folder: Path, rows: int) -> Tokenizer:
    if (folder / "tokenizer_meta.json").is_file():
        return load_tokenizer(folder)
    if not any((folder / name).is_file() for name in (*_TOKENIZER_FILES, "vocab.bpe")):
        raise ValueError(f"{folder} holds no tokenizer")
    return foreign_tokenizer(folder, rows)


def _fitted(tokenizer: Tokenizer, rows: int, where: str) -> tuple[Tokenizer, tuple[str, ...]]:
    """多出的一行若只是我们的分隔符，模型从没见过它：去掉就正好。"""
    size = tokenizer.vocab_size
    if size == rows + 1 and tokenizer.document_separator == rows:
        note = f"the tokenizer's document separator, id {rows}, has no row in the model: left out"
        return without_separator(tokenizer), (note,)
    if size > rows:
        raise ValueError(
            f"{where}: the tokenizer has {size} ids but the model only vocab_size={rows}: they do "
            "not belong together, or tokens were added without resizing the embeddings"
        )
    return tokenizer, ()
