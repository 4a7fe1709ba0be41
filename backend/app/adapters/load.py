"""凡要一个模型的地方都由这里打开：整份的权重，或一套适配器（找到原模型，核对，并进去）。

并好了才给出去：生成、打分、导出、服务因此一律是普通的模型，快的路都在。
"""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

import torch

from app.common.files import sha256_file
from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.settings.fields import Mark, differing, marked
from app.models.transformer.settings.json_file import read_json
from app.models.transformer.weights.adapters import check_no_adapter
from app.models.transformer.weights.own_folder import CONFIG_FILE, WEIGHTS_FILE, assemble
from app.quantization.model import check_float

from .files import BASE, SETTINGS, is_adapter, read_adapter, read_base
from .fit import fit_context


def open_model(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    base: Path | None = None,
) -> GPT2Model:
    """folder：模型、检查点，或适配器的文件夹，已经核对过。

    Args:
        base: 适配器的原模型在哪里；None = base.json 说的地方。

    Raises:
        ValueError: 打不开；给了 base 而那里没有适配器；原模型找不到，或不是训练时的那个。
    """
    if not is_adapter(folder):
        if base is not None:
            raise ValueError(f"--base {base} but {folder} holds no adapter: leave --base out")
        return GPT2Model.from_pretrained(folder, device=device, dtype=dtype)
    where = find_base(folder, base)
    model = GPT2Model.from_pretrained(where)
    check_float(model, f"the base {where} of the adapter {folder}")
    adapter = read_adapter(folder, model.config)
    adapter.merge_into(model)
    if (folder / CONFIG_FILE).is_file():
        wanted = GPT2Config.from_dict(read_json(folder / CONFIG_FILE))
        fit_context(model, wanted.context_size, str(where))
        _check_same(model.config, wanted, folder, where)
    else:
        wanted = model.config
    # 重造一个：dropout 之类自由的字段也照训练时的，形状再核对一遍。
    state = model.state_dict().items()
    return assemble(GPT2Model, wanted, state, torch.device(device), dtype)


def find_base(folder: Path, given: Path | None = None, also: Path | None = None) -> Path:
    """适配器 folder 的原模型；base.json 记着的，权重的 sha256 必须相符。

    Args:
        given: 只在这里找；also: 记着的地方之外，也找这里。

    Raises:
        ValueError: 找不到（说找过哪里），或 sha256 不符（两个都说）。
    """
    check_no_weights_beside(folder)
    known = read_base(folder)
    if known is None and given is None:
        raise ValueError(
            f"{folder} has no {BASE} (another program wrote it): name the model it was trained on, "
            f"{_how(folder)}"
        )
    places = [given] if given is not None else []
    if known is not None and given is None:
        places = [Path(known.path), folder / known.relative, *([] if also is None else [also])]
    found = [place.resolve() for place in places if (place / WEIGHTS_FILE).is_file()]
    if not found:
        looked = " and ".join(dict.fromkeys(str(place.resolve()) for place in places))
        raise ValueError(
            f"the base of the adapter {folder} is not in {looked}: say where it is, {_how(folder)}"
        )
    if known is None:
        return found[0]
    hashes = {place: sha256_file(place / WEIGHTS_FILE) for place in dict.fromkeys(found)}
    for place, sha256 in hashes.items():
        if sha256 == known.sha256:
            return place
    place, sha256 = next(iter(hashes.items()))
    raise ValueError(
        f"the adapter {folder} was trained on weights with sha256 {known.sha256[:16]} but "
        f"{place} has {sha256[:16]}: their sum would be another model; name the "
        f"right one, {_how(folder)}"
    )


def check_no_weights_beside(folder: Path) -> None:
    """
    Raises:
        ValueError: 适配器旁边还有整份的权重。
    """
    if (folder / WEIGHTS_FILE).is_file():
        check_no_adapter(folder)
    if not (folder / SETTINGS).is_file():
        raise ValueError(f"{folder} has no {SETTINGS}: it is not an adapter")


def _how(folder: Path) -> str:
    return f"gpt2 merge {folder} --base FOLDER --out NEW (to go on training: --init-from FOLDER)"


def _check_same(found: GPT2Config, wanted: GPT2Config, folder: Path, base: Path) -> None:
    free = marked(GPT2Config, Mark.FREE)
    for name in differing(found, wanted):
        if name not in free:
            get = attrgetter(name)
            raise ValueError(
                f"{folder} was trained with {name}={get(wanted)!r} but its base {base} has "
                f"{get(found)!r}: a {CONFIG_FILE} was changed since"
            )
