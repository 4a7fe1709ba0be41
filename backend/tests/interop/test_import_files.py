"""给 import 的是什么：单个文件、DDP 与 nanoGPT 的检查点、分片的 pickle、没写 model_type 的配置。"""

from __future__ import annotations

import json
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.cli.main import main
from app.cli.shared.runfile import load_model_config
from app.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, train_bpe
from app.interop.equivalent import Weights
from app.interop.export import export
from app.interop.hf import write_hf
from app.interop.reading.importing import import_model, write_model
from app.models.transformer import GPT2Model
from app.models.transformer.weights.layouts import GPT2, NANOGPT, write_tensors

from ..models.helpers import tiny_model

ARGS = {
    "n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 24, "bias": True, "vocab_size": 37,
    "dropout": 0.0,
}  # fmt: skip


def equal(a: GPT2Model, b: GPT2Model) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)


def hub(folder: Path, **changes: Any) -> GPT2Model:
    model = tiny_model(torch.float32, **{"norm": "pre", **changes})
    write_hf(Weights.of(model), "gpt2", None, folder)
    return model


def edit(path: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in data.items() if k not in drop}))


def nano_state(model: GPT2Model) -> dict[str, torch.Tensor]:
    state = write_tensors(NANOGPT, model.config, model.state_dict())
    state.setdefault("lm_head.weight", state["transformer.wte.weight"])
    return state


def gpt2(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main([str(word) for word in argv])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors"])
def test_a_single_safetensors_file_with_its_config(name: str, tmp_path: Path) -> None:
    model = hub(tmp_path / "hub")
    (tmp_path / "hub" / "model.safetensors").rename(tmp_path / "hub" / name)
    found = import_model(str(tmp_path / "hub" / name))
    assert equal(found.model, model) and found.model.config == model.config
    assert "holds no tokenizer" in found.why


def test_a_shard_means_its_whole_folder(tmp_path: Path) -> None:
    model = hub(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names, files = (
        sorted(tensors),
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    )
    for part, file in enumerate(files):
        save_file({name: tensors[name] for name in names[part::2]}, tmp_path / file)
    index = {"weight_map": {name: files[i % 2] for i, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert equal(import_model(str(tmp_path / files[1])).model, model)


def _text(path: Path) -> None:
    path.write_text("hello\n")


def _gguf(path: Path) -> None:
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(64))


def _alone(path: Path) -> None:
    save_file({"x": torch.zeros(2)}, path)


def _pickled(path: Path) -> None:
    torch.save({"x": torch.zeros(2)}, path)


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (_text, "notes.txt", "is no file of weights that can be read: give the folder"),
        (_gguf, "model.gguf", "is a GGUF file.*import the folder that it was made from"),
        (_gguf, "model.bin", "is a GGUF file"),
        (_alone, "x.safetensors", "put the config.json that belongs to it beside it"),
        (_pickled, "x.safetensors", "is a pickle, which could run code"),
        (lambda p: p.write_text("{}"), "config.json", "is a JSON file: give the folder"),
        (lambda p: p.write_bytes(b""), "empty.pt", "is no file of weights"),
    ],
)
def test_each_file_is_called_what_it_is(
    make: Any, name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        import_model(str(tmp_path / name))
    code, _, err = gpt2(capsys, "import", tmp_path / name, "--out", tmp_path / "out")
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_the_names_that_ddp_and_compile_put_around(prefix: str, tmp_path: Path) -> None:
    model = tiny_model(torch.float32, norm="pre", activation="gelu")
    state = {prefix + name: tensor for name, tensor in nano_state(model).items()}
    torch.save({"model": state, "model_args": ARGS}, tmp_path / "ckpt.pt")
    found = import_model(str(tmp_path / "ckpt.pt"), allow_pickle=True)
    assert equal(found.model, model) and found.model.config.activation == "gelu"
    # safetensors 与 pytorch_model.bin 也一样。
    ours = hub(tmp_path / "hub")
    path = tmp_path / "hub" / "model.safetensors"
    save_file({prefix + name: t for name, t in load_file(path).items()}, path)
    assert equal(import_model(str(tmp_path / "hub")).model, ours)


def test_build_nanogpt_with_its_config_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(torch.float32, norm="pre")
    script = types.ModuleType("train_gpt2")
    script.GPTConfig = type("GPTConfig", (), {"__module__": "train_gpt2"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "train_gpt2", script)
    settings = script.GPTConfig()
    vars(settings).update({k: v for k, v in ARGS.items() if k not in ("bias", "dropout")})
    state = nano_state(model)
    torch.save({"model": state, "config": settings, "step": 5, "val_loss": 3.2}, tmp_path / "m.pt")
    monkeypatch.delitem(sys.modules, "train_gpt2")
    found = import_model(str(tmp_path / "m.pt"), allow_pickle=True)
    assert equal(found.model, model) and found.model.config.activation == "gelu_tanh"
    assert found.model.config.n_head == 4


@pytest.mark.parametrize("layout", [NANOGPT, GPT2], ids=["linear", "conv1d"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_bare_state_dict_needs_what_it_does_not_say(
    layout: Any, wrapped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(torch.float32, norm="pre")
    state: Any = write_tensors(layout, model.config, model.state_dict())
    state = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": state} if wrapped else state, tmp_path / "bare.pt")
    source = tmp_path / "bare.pt"
    with pytest.raises(ValueError, match=r"n_head and activation cannot be known: give --n-head"):
        import_model(str(source), allow_pickle=True)
    code, out, err = gpt2(
        capsys, "import", source, "--allow-pickle", "--n-head", 4, "--activation", "gelu_tanh",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    back = GPT2Model.from_pretrained(tmp_path / "out")
    assert equal(back, model) and back.config.n_head == 4


def test_a_head_of_its_own_is_kept(tmp_path: Path) -> None:
    """没有配置可问：共享与否看张量。"""
    model = tiny_model(torch.float32, norm="pre", tie_weights=False, activation="gelu")
    torch.save({"model": nano_state(model), "model_args": ARGS}, tmp_path / "ckpt.pt")
    found = import_model(str(tmp_path / "ckpt.pt"), allow_pickle=True).model
    assert not found.config.tie_weights and equal(found, model)


def test_changed_versions_of_nanogpt_are_refused(tmp_path: Path) -> None:
    model = tiny_model(torch.float32, norm="pre")
    args = {**ARGS, "use_rmsnorm": True}
    torch.save({"model": nano_state(model), "model_args": args}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="use_rmsnorm, which nanoGPT does not"):
        import_model(str(tmp_path / "ckpt.pt"), allow_pickle=True)


def test_sharded_pickles(tmp_path: Path) -> None:
    model = hub(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names, files = (
        sorted(tensors),
        ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
    )
    for part, file in enumerate(files):
        torch.save({name: tensors[name] for name in names[part::2]}, tmp_path / file)
    index = tmp_path / "pytorch_model.bin.index.json"
    places = {name: files[i % 2] for i, name in enumerate(names)}
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match="only pytorch_model-00001-of-00002.bin, a pickle"):
        import_model(str(tmp_path))
    assert equal(import_model(str(tmp_path), allow_pickle=True).model, model)
    index.write_text(json.dumps({"weight_map": {**places, names[0]: "../x.bin"}}))
    with pytest.raises(ValueError, match="is not a bin file beside it"):
        import_model(str(tmp_path), allow_pickle=True)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, files[0])}))
    with pytest.raises(ValueError, match="does not fit its config|no token embedding there"):
        import_model(str(tmp_path), allow_pickle=True)


def alphabet(path: Path, characters: str) -> None:
    stoi = {c: i for i, c in enumerate(characters)}
    itos = dict(enumerate(characters))
    path.write_bytes(pickle.dumps({"vocab_size": len(stoi), "itos": itos, "stoi": stoi}))


LETTERS = "\n !abcdefghijklmnopqrstuvwxyzABCDEFGH"[:37]


def char_checkpoint(folder: Path, dataset: str = "shakespeare_char") -> GPT2Model:
    model = tiny_model(torch.float32, norm="pre", activation="gelu")
    data = {"model": nano_state(model), "model_args": ARGS, "config": {"dataset": dataset}}
    torch.save(data, folder / "ckpt.pt")
    return model


@pytest.mark.parametrize("characters", [LETTERS, LETTERS[::-1]], ids=["sorted", "reversed"])
def test_nanogpts_alphabet(
    characters: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    char_checkpoint(tmp_path)
    alphabet(tmp_path / "meta.pkl", characters)
    source, meta = tmp_path / "ckpt.pt", tmp_path / "meta.pkl"
    found = import_model(str(source), allow_pickle=True)
    assert found.tokenizer is None and "data/shakespeare_char" in found.why
    hub(tmp_path / "safe")
    with pytest.raises(ValueError, match="meta.pkl is a pickle: if you trust it"):
        import_model(str(tmp_path / "safe"), tokenizer=meta)
    argv = ("import", source, "--allow-pickle", "--tokenizer", meta, "--out", tmp_path / "out")
    code, out, err = gpt2(capsys, *argv)
    assert code == 0, err
    assert "tokenizer  chars, 37 ids" in out and "activation 'gelu'" in out
    found = import_model(str(source), allow_pickle=True, tokenizer=meta)
    assert found.tokenizer is not None
    assert found.tokenizer.encode("cab") == [characters.index(c) for c in "cab"]
    code, out, err = gpt2(
        capsys, "generate", tmp_path / "out", "--prompt", "ab", "--max-new-tokens", 5
    )
    assert code == 0 and out.startswith("ab"), err
    # 没有分隔符的字符表也能写成 hf、再读回来。
    export(found.model, found.tokenizer, "hf", tmp_path / "hf")
    again = import_model(str(tmp_path / "hf"))
    assert again.tokenizer is not None and again.tokenizer.encode("cab") == found.tokenizer.encode(
        "cab"
    )
    assert again.model.config == found.model.config


class Run:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"itos": {0: "a", 1: "bc"}}, "one character for each id from 0 to 1, got 'bc'"),
        ({"itos": {0: "a", 2: "b"}}, "one character for each id"),
        ({"itos": {0: "a", 1: "b"}, "stoi": {"a": 1, "b": 0}}, "stoi is not the inverse"),
        ({"vocab_size": 5}, "no alphabet there"),
        ([1], "no alphabet there"),
    ],
)
def test_alphabets_that_are_none(content: Any, message: str, tmp_path: Path) -> None:
    char_checkpoint(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=message):
        import_model(str(tmp_path / "ckpt.pt"), allow_pickle=True, tokenizer=tmp_path / "meta.pkl")


@pytest.mark.parametrize("attack", ["code", "memo", "bytearray", "cut"])
def test_hostile_alphabets(attack: str, tmp_path: Path) -> None:
    char_checkpoint(tmp_path)
    marker = tmp_path / "ran"
    content = {
        "code": pickle.dumps({"itos": Run(marker)}),
        "memo": b"\x80\x02}r\xff\xff\xff\x7f.",
        "bytearray": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
        "cut": pickle.dumps({"itos": {0: "a"}})[:-3],
    }[attack]
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(ValueError, match="meta.pkl: not a plain pickle.*nothing in it was run"):
        import_model(str(tmp_path / "ckpt.pt"), allow_pickle=True, tokenizer=tmp_path / "meta.pkl")
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["chars", "bytes", "bpe"])
def test_one_row_more_is_only_our_separator(kind: str, tmp_path: Path) -> None:
    tokenizer: Tokenizer = {
        "chars": CharTokenizer(LETTERS),
        "bytes": ByteTokenizer(),
        "bpe": train_bpe(["the cat sat on the mat " * 9], 270),
    }[kind]
    tokenizer.save(tmp_path / "tokenizer")
    rows = tokenizer.vocab_size - 1
    model = tiny_model(torch.float32, norm="pre", activation="gelu", vocab_size=rows)
    args = {**ARGS, "vocab_size": rows}
    torch.save({"model": nano_state(model), "model_args": args}, tmp_path / "ckpt.pt")
    found = import_model(
        str(tmp_path / "ckpt.pt"), allow_pickle=True, tokenizer=tmp_path / "tokenizer"
    )
    assert found.tokenizer is not None and found.tokenizer.vocab_size == rows
    assert found.tokenizer.document_separator is None and found.tokenizer.stop_ids == ()
    assert found.tokenizer.encode("the cat") == tokenizer.encode("the cat")
    assert any("document separator" in note for note in found.notes)
    write_model(found, tmp_path / "out")
    model = tiny_model(torch.float32, norm="pre", activation="gelu", vocab_size=rows - 1)
    torch.save(
        {"model": nano_state(model), "model_args": {**args, "vocab_size": rows - 1}},
        tmp_path / "small.pt",
    )
    with pytest.raises(ValueError, match="do not belong together"):
        import_model(
            str(tmp_path / "small.pt"), allow_pickle=True, tokenizer=tmp_path / "tokenizer"
        )


def test_an_adapter_beside_the_weights_is_not_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub(tmp_path / "hub")
    (tmp_path / "hub" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for attempt in (GPT2Model.from_pretrained, import_model):
        with pytest.raises(ValueError, match="adapter_config.json belongs to an adapter.*merge it"):
            attempt(str(tmp_path / "hub"))
    code, _, err = gpt2(capsys, "export", tmp_path / "hub", "--to", "hf", "--out", tmp_path / "out")
    assert code == 2 and "belongs to an adapter" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("by", ["architectures", "keys"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "openai-gpt"])
def test_a_config_without_model_type_is_recognised(
    by: str, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(torch.float32, norm="post" if family == "openai-gpt" else "pre")
    write_hf(Weights.of(model), family, None, tmp_path / "hub")
    path = tmp_path / "hub" / "config.json"
    edit(path, drop=("model_type",) if by == "architectures" else ("model_type", "architectures"))
    assert equal(import_model(str(tmp_path / "hub")).model, model)
    # plan 与 verify 都这样读 --config。
    assert load_model_config(str(path))[0].model == model.config
    code, out, err = gpt2(capsys, "plan", "--config", path)
    assert code == 0 and "layer" in out, err


def test_a_config_that_nobody_knows_is_called_what_it_is(tmp_path: Path, capsys: Any) -> None:
    hub(tmp_path / "hub")
    path = tmp_path / "hub" / "config.json"
    edit(path, drop=("model_type",), architectures=["LlamaForCausalLM"])
    message = r"another program's config without model_type \(architectures=\['LlamaForCausalLM'\]"
    with pytest.raises(ValueError, match=message):
        import_model(str(tmp_path / "hub"))
    path.write_text(json.dumps({"hidden_size": 8, "activation_fn": "relu"}))
    for attempt in (import_model, GPT2Model.from_pretrained):
        with pytest.raises(
            ValueError, match="another program's config.*activation_fn, hidden_size"
        ):
            attempt(str(tmp_path / "hub"))
    code, _, err = gpt2(capsys, "plan", "--config", path)
    assert code == 2 and "another program's config" in err and "did you mean" not in err
    # 我们自己的、拼错的，仍然说最近的名字。
    path.write_text(json.dumps({"n_embed": 8, "activatoin": "relu"}))
    with pytest.raises(ValueError, match="did you mean 'activation'"):
        import_model(str(tmp_path / "hub"))


def test_folders_that_hold_something_else_say_so(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("")
    with pytest.raises(ValueError, match="is a run of ours, ready for use"):
        import_model(str(tmp_path / "run"))
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "ckpt.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is it ckpt.pt that you want\? Then give the file"):
        import_model(str(tmp_path / "nano"))
    hub(tmp_path / "hub")
    (tmp_path / "hub" / "model.safetensors").rename(tmp_path / "hub" / "other.safetensors")
    with pytest.raises(ValueError, match="has no model.safetensors but other.safetensors"):
        import_model(str(tmp_path / "hub"))
