"""存取：码与尺度逐位相同，什么打包的也不存，坏文件夹在分配之前就被拒绝。"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.weights import formats
from app.quantization.model import QuantizedModel, dequantize
from app.quantization.stored import QUANTIZATION_FILE
from tests.models.helpers import VARIANTS, tokens

from .helpers import SCHEMES, float_model, quantized

WEIGHTS = "model.safetensors"
FIRST = "h.0.attn.c_attn.weight"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["pre", "moe swiglu rope", "untied"])
def test_reload_is_equal_to_the_bit(tmp_path: Path, name: str, scheme: str) -> None:
    model, ids = quantized(float_model(**VARIANTS[name]), SCHEMES[scheme]), tokens(2, 9)
    model.save_pretrained(tmp_path)
    loaded = GPT2Model.from_pretrained(tmp_path, attention_backend="reference")
    assert isinstance(loaded, QuantizedModel)
    assert (loaded.method, loaded.schemes) == (model.method, model.schemes)
    assert loaded.config == model.config.replace(attention_backend="reference")
    one, other = model.state_dict(), loaded.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    stored = load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(stored[key], one[key]) for key in one) and stored.keys() == one.keys()
    with torch.no_grad():
        assert torch.equal(model(ids)["logits"], GPT2Model.from_pretrained(tmp_path)(ids)["logits"])
    # 没有第二份词表，也没有浮点的矩阵。
    assert not any(t.dim() >= 2 and t.dtype == torch.float32 for n, t in one.items() if n == FIRST)


def test_sizes_of_the_file(tmp_path: Path) -> None:
    wide = float_model(norm="pre", n_embed=256, n_layer=4, vocab_size=512, context_size=32)
    full = 4 * wide.num_parameters()
    for name, share in (("fp16", 0.51), ("int8", 0.27), ("int4", 0.19)):
        quantized(wide, SCHEMES[name]).save_pretrained(tmp_path / name)
        assert (tmp_path / name / WEIGHTS).stat().st_size < share * full


def test_a_float_model_saved_over_it_is_a_float_model(tmp_path: Path) -> None:
    model = float_model()
    quantized(model, SCHEMES["int8"]).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert type(GPT2Model.from_pretrained(tmp_path)) is GPT2Model


def test_older_readers_refuse_by_version(tmp_path: Path) -> None:
    """它们只认得 schema_version 1，在读权重之前就核对它。"""
    quantized(float_model(), SCHEMES["int8"]).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["schema_version"] == 2
    assert GPT2Config.from_dict(raw).to_dict()["schema_version"] == 1


def test_a_copy_of_the_core_alone_says_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized(float_model(), SCHEMES["int8"]).save_pretrained(tmp_path)
    monkeypatch.setattr(formats, "_LOADERS", {})
    with pytest.raises(ValueError, match=r"schema_version=2.*app\.quantization"):
        GPT2Model.from_pretrained(tmp_path)


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / QUANTIZATION_FILE
        raw = json.loads(path.read_text())
        change(raw)
        path.write_text(json.dumps(raw))

    return apply


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS)

    return apply


def _put(name: str, value: float) -> Callable[[Path], None]:
    return _weights(lambda state: state[name].flatten().__setitem__(3, value))


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no json": (lambda f: (f / QUANTIZATION_FILE).unlink(), "has no quantization.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no model.safetensors"),
    "future version": (_edit(lambda r: r.update(version=2)), "version=2 but this version reads 1"),
    "no mapping": (lambda f: (f / QUANTIZATION_FILE).write_text("[]"), "version=None"),
    "method": (_edit(lambda r: r.update(method=3)), "method must be a text"),
    "bits": (_edit(lambda r: r["schemes"][0].update(bits=5)), "bits=5 must be 16, 8 or 4"),
    "bits true": (_edit(lambda r: r["schemes"][0].update(bits=True)), "bits=True"),
    "group": (_edit(lambda r: r["schemes"][1].update(group=48)), "group=48 does not divide"),
    "group zero": (_edit(lambda r: r["schemes"][1].update(group=0)), "group=0 must be even"),
    "group odd": (_edit(lambda r: r["schemes"][1].update(group=1)), "group=1 must be even"),
    "group text": (_edit(lambda r: r["schemes"][1].update(group="32")), "group='32'"),
    "other group": (_edit(lambda r: r["schemes"][1].update(group=16)), "is torch.float16"),
    "unknown key": (_edit(lambda r: r["schemes"][0].update(zero=1)), "a scheme has"),
    "twice": (_edit(lambda r: r["schemes"].append(r["schemes"][0])), "is listed twice"),
    "forgotten": (_edit(lambda r: r["schemes"][1]["matrices"].pop()), "1 matrices missing"),
    "unknown matrix": (
        _edit(lambda r: r["schemes"][1]["matrices"].append("h.0.ln_1.weight")), "1 unknown",
    ),
    "names": (_edit(lambda r: r["schemes"][1].update(matrices="all")), "must be a list of names"),
    "missing tensor": (_weights(lambda s: s.pop(f"{FIRST}.scale")), "1 tensors missing"),
    "float tensor": (
        _weights(lambda s: s.update({f"{FIRST}.codes": s[f"{FIRST}.codes"].float()})),
        "is torch.float32",
    ),
    "half float": (
        _weights(lambda s: s.update({"h.0.ln_1.weight": s["h.0.ln_1.weight"].half()})),
        "ln_1.weight is torch.float16",
    ),
    "shape": (
        _weights(lambda s: s.update({f"{FIRST}.codes": s[f"{FIRST}.codes"][:, :-1].clone()})),
        "say torch.uint8",
    ),
    "scale zero": (_put(f"{FIRST}.scale", 0.0), "scale is zero or negative"),
    "scale negative": (_put(f"{FIRST}.scale", -0.1), "scale is zero or negative"),
    "scale NaN": (_put(f"{FIRST}.scale", float("nan")), "scale holds NaN"),
    "scale infinite": (_put(f"{FIRST}.scale", float("inf")), "scale holds NaN or infinity"),
    "code": (_put("embed.wte.weight.codes", -128), "codes holds -128, outside -127..127"),
    "norm NaN": (_put("h.0.ln_1.weight", float("nan")), "NaN or infinity"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_folders_are_refused(tmp_path: Path, case: str) -> None:
    quantized(float_model(norm="pre"), SCHEMES["int4"]).save_pretrained(tmp_path)
    change, message = HOSTILE[case]
    change(tmp_path)
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        GPT2Model.from_pretrained(tmp_path)


def test_a_huge_config_is_refused_before_allocation(tmp_path: Path) -> None:
    quantized(float_model(norm="pre"), SCHEMES["int8"]).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"vocab_size": 10_000_000}))
    with pytest.raises(ValueError, match="quantization.json and config.json say"):
        GPT2Model.from_pretrained(tmp_path)


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    quantized(float_model(), SCHEMES["int8"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bfloat16 was asked for .* leave dtype out"):
        GPT2Model.from_pretrained(tmp_path, dtype=torch.bfloat16)


_PEAK = """
import resource, sys, torch
from app.models.transformer import GPT2Model
import app.quantization.folder
from app.models.transformer.model import GPT2Model as M
M.from_pretrained(sys.argv[1])  # 库与代码的页先都进来
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = M.from_pretrained(sys.argv[2])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, model.nbytes())
"""


def test_loading_never_makes_a_float_copy(tmp_path: Path) -> None:
    """峰值内存至多是模型加一个最大的张量；一份 float32 的词表就已经多出它的三倍。"""
    big = {"norm": "pre", "n_layer": 2, "n_embed": 256, "vocab_size": 200_000, "context_size": 32}
    quantized(float_model(norm="pre"), SCHEMES["int8"]).save_pretrained(tmp_path / "small")
    quantized(float_model(**big), SCHEMES["int8"]).save_pretrained(tmp_path / "big")
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path / "small"), str(tmp_path / "big")],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    grown, stored = map(int, done.stdout.split())
    assert grown < 2.5 * stored


def test_dequantized_weights_are_the_codes_values(tmp_path: Path) -> None:
    model = quantized(float_model(), SCHEMES["int4 asymmetric"])
    dequantize(model).save_pretrained(tmp_path)
    floats = GPT2Model.from_pretrained(tmp_path)
    for name, each in model.codes.items():
        assert torch.equal(floats.state_dict()[name], each.dequantize())
