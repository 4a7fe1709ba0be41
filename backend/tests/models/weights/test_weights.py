"""模型文件夹：往返逐位相同；坏文件在分配内存之前被点名拒绝。"""

from __future__ import annotations

import dataclasses
import json
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.models.transformer import GPT2Config, GPT2Model, MoEConfig
from app.models.transformer.weights.own_folder import expected_shapes
from app.models.transformer.weights.safetensors_file import SafetensorsFiles

from ..helpers import VARIANTS, tiny_config, tiny_model, tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_round_trip_is_bit_identical(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model(dtype, norm="keel")
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = GPT2Model.from_pretrained(tmp_path)
    assert again.config == model.config and not again.training
    for (name, a), (other, b) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert name == other and a.dtype == b.dtype and torch.equal(a, b) and b.requires_grad


def test_dtype_on_request(tmp_path: Path) -> None:
    tiny_model(torch.float32).save_pretrained(tmp_path)
    model = GPT2Model.from_pretrained(tmp_path, dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("name", VARIANTS)
def test_expected_shapes_are_those_of_the_model(name: str) -> None:
    config = tiny_config(**VARIANTS[name])
    state = GPT2Model(config).state_dict()
    assert expected_shapes(GPT2Model, config) == {k: tuple(v.shape) for k, v in state.items()}


def rewrite(path: Path, change) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    body = change(header, data[8 + length :])
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def set_entry(name: str, key: str, value):
    def change(header, body):
        header[name][key] = value
        return body

    return change


W = "embed.wpe.weight"
FAULTS = {
    "renamed": (lambda h, b: h.update({"x": h.pop(W)}) or b, "1 tensors missing"),
    "missing tail": (lambda h, b: b[:-4], "but its header describes"),
    "trailing bytes": (lambda h, b: b + b"1234", "but its header describes"),
    "shape": (set_entry(W, "shape", [32, 24]), r"has shape \(32, 24\) but the config says"),
    "negative shape": (set_entry(W, "shape", [-24, -32]), "entry of tensor"),
    "huge shape": (set_entry(W, "shape", [2**62, 0]), "entry of tensor"),
    "float shape": (set_entry(W, "shape", [24.0, 32]), "entry of tensor"),
    "offsets": (set_entry(W, "data_offsets", [4, 4 + 24 * 32 * 4]), "starts at"),
    "dtype": (set_entry(W, "dtype", "I64"), "entry of tensor"),
    "no dtype": (lambda h, b: h[W].pop("dtype") and b, "entry of tensor"),
    "list entry": (lambda h, b: h.update({W: []}) or b, "entry of tensor"),
}


def test_a_cycle_longer_than_the_layers_it_is_checked_with(tmp_path: Path) -> None:
    model = tiny_model(attention_pattern=("local(4)", "causal", "strided(3)"))
    model.save_pretrained(tmp_path)
    assert GPT2Model.from_pretrained(tmp_path).config == model.config


@pytest.mark.parametrize("fault", FAULTS)
def test_hostile_files_are_refused_by_name(tmp_path: Path, fault: str) -> None:
    change, message = FAULTS[fault]
    tiny_model(torch.float32).save_pretrained(tmp_path)
    rewrite(tmp_path / "model.safetensors", change)
    with pytest.raises(ValueError, match=message):
        GPT2Model.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"1234",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 0),
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"\xff\xfe\xff\xff",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 22) + b'{"a":{"x":1},"a":null}',
    ],
)
def test_junk_headers(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(junk)
    with pytest.raises(ValueError, match="header"):
        SafetensorsFiles([path])


@given(st.binary(max_size=300))
def test_random_headers_never_crash(tmp_path_factory, text: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ValueError):
        SafetensorsFiles([path])
        raise ValueError("an empty header is valid")


def test_an_absurd_config_costs_no_memory(tmp_path: Path) -> None:
    tiny_model(torch.float32).save_pretrained(tmp_path)
    config = GPT2Config(n_layer=4096, n_embed=262_144, n_head=4096, vocab_size=10_000_000)
    (tmp_path / "config.json").write_text(config.to_json())
    tracemalloc.start()
    with pytest.raises(ValueError, match="belong to another configuration"):
        GPT2Model.from_pretrained(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6


def test_not_a_model_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        GPT2Model.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no config.json"):
        GPT2Model.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="is not UTF-8"):
        GPT2Model.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(tiny_config().to_json())
    with pytest.raises(ValueError, match=r"has no model.safetensors"):
        GPT2Model.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        tiny_model().save_pretrained(tmp_path / "config.json")
    with pytest.raises(ValueError, match="meta device"), torch.device("meta"):
        GPT2Model(tiny_config()).save_pretrained(tmp_path)


def test_weights_of_another_norm_are_refused_and_both_are_named(tmp_path: Path) -> None:
    tiny_model(torch.float32, norm="pre").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(tiny_config(norm="post").to_json())
    with pytest.raises(ValueError, match=r"norm='post'.*unknown \['ln_f"):
        GPT2Model.from_pretrained(tmp_path)


def test_training_goes_on_after_the_file_is_replaced(tmp_path: Path) -> None:
    tiny_model(torch.float32).save_pretrained(tmp_path)
    model, ids = GPT2Model.from_pretrained(tmp_path), tokens(1, 5)
    before = model(ids)["logits"]
    tiny_model(torch.float32).save_pretrained(tmp_path)
    assert torch.equal(model(ids)["logits"], before)


def test_what_leaves_the_weights_alone_may_be_asked_for_on_loading(tmp_path: Path) -> None:
    stored = MoEConfig(hidden=24, router="sigmoid")
    model = tiny_model(torch.float32, moe_num_experts=4, moe=stored)
    model.save_pretrained(tmp_path)
    free = dataclasses.replace(stored, capacity_factor=1.0, dispatch="reference", jitter_noise=0.1)
    again = GPT2Model.from_pretrained(tmp_path, moe=free, dropout=0.25)
    assert again.config == model.config.replace(moe=free, dropout=0.25)
    ids = tokens(2, 8)
    torch.testing.assert_close(again(ids)["logits"], model.eval()(ids)["logits"])
    with pytest.raises(ValueError, match=r"moe.hidden=16 was asked for .* have moe.hidden=24"):
        GPT2Model.from_pretrained(tmp_path, moe=dataclasses.replace(stored, hidden=16))
