"""读进来：hub 的名字与缓存、分片、旧 pickle、nanoGPT；配错的说出两个值与改法。"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from app.data.tokenizers import CharTokenizer
from app.interop.equivalent import Weights
from app.interop.hf import write_hf
from app.interop.reading.importing import import_model, write_model
from app.models.transformer import GPT2Model
from app.models.transformer.weights.families import FAMILIES, read_config, write_config
from app.models.transformer.weights.layouts import GPT2, NANOGPT, write_tensors

from ..models.helpers import tiny_config, tiny_model


def hub_folder(folder: Path, family: str = "gpt2", **changes: Any) -> GPT2Model:
    model = tiny_model(torch.float32, **{"norm": "pre", **changes})
    write_hf(Weights.of(model), family, None, folder)
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def equal(a: GPT2Model, b: GPT2Model) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mixtral"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_configs_round_trip(family: str, norm: str) -> None:
    for changes in ({}, {"tie_weights": False, "dropout": 0.25}):
        config = tiny_config(norm=norm, **changes)
        table = FAMILIES[family]
        if norm not in table.norms.values():
            continue
        assert read_config(write_config(table, config), "x") == config


def test_the_four_sizes_and_the_others_by_their_published_configs() -> None:
    """形状取自各自发布的 config.json；distilgpt2 是六层的 small。"""
    sizes = {
        "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280),
        "gpt2-xl": (48, 25, 1600), "distilgpt2": (6, 12, 768),
    }  # fmt: skip
    for layers, heads, width in sizes.values():
        raw = {
            "model_type": "gpt2", "n_layer": layers, "n_head": heads, "n_embd": width,
            "n_ctx": 1024, "n_positions": 1024, "vocab_size": 50257, "activation_function":
            "gelu_new", "layer_norm_epsilon": 1e-05, "resid_pdrop": 0.1, "n_inner": None,
            "task_specific_params": {"text-generation": {"do_sample": True}},
        }  # fmt: skip
        config = read_config(raw, "config.json")
        assert (config.n_layer, config.n_head, config.n_embed) == (layers, heads, width)
        assert (config.norm, config.vocab_size, config.activation) == ("pre", 50257, "gelu_tanh")
    gpt1 = read_config({"model_type": "openai-gpt", "afn": "gelu", "n_ctx": 512}, "x")
    assert (gpt1.norm, gpt1.vocab_size, gpt1.context_size) == ("post", 40478, 512)
    assert (gpt1.activation, gpt1.n_embed) == ("gelu_tanh", 768)
    opt = read_config({"model_type": "opt", "layerdrop": 0.0, "attention_dropout": 0.0}, "x")
    assert (opt.norm, opt.activation, opt.context_size) == ("pre", "relu", 2048)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "attention scaled by the layer's number"),
        ({"scale_attn_weights": False}, "without 1/sqrt"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06 means another epsilon"),
        ({"add_cross_attention": True}, "attends to an encoder"),
        ({"n_inner": 100}, "n_inner=100 but here the MLP is always 4 times n_embd=32, 128 wide"),
        ({"activation_function": "quick_gelu"}, "activation_function='quick_gelu' is not one of"),
        ({"activation_function": ["x"]}, "is not one of"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "brings its own code, which is never run"),
        ({"quantization_config": {"bits": 4}}, "weights are packed"),
        ({"pruned_heads": {"0": [1]}}, "some heads were cut out"),
        ({"model_type": "llama"}, "model_type='llama' cannot be read; known are gpt2"),
        ({"model_type": ["gpt2"]}, "cannot be read"),
        ({"n_head": 5}, "n_embed=32 is not a multiple of n_head=5.*n_embed is their n_embd"),
        ({"n_layer": 10**9}, "n_layer=1000000000 must be between"),
        ({"n_embd": "768"}, "n_embed='768' has type str"),
        ({"resid_pdrop": float("nan")}, "dropout=nan must be a finite"),
        ({"trained_vocab_size": 99}, "trained_vocab_size=99 must be between 1 and vocab_size=37"),
        ({"n_layer": 4}, "does not fit its config: 12 tensors missing"),
        ({"n_positions": 25}, "wpe.weight has shape \\(24, 32\\) but the config says \\(25, 32\\)"),
        ({"vocab_size": 38}, "wte.weight has shape \\(37, 32\\) but the config says \\(38, 32\\)"),
    ],
)
def test_what_has_no_counterpart_is_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    hub_folder(tmp_path / "hub")
    edit_config(tmp_path / "hub", **changes)
    with pytest.raises(ValueError, match=message):
        GPT2Model.from_pretrained(tmp_path / "hub")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"word_embed_proj_dim": 16}, "word_embed_proj_dim=16 with hidden_size=32.*opt-350m"),
        ({"enable_bias": False}, "without biases beside LayerNorms with them"),
        ({"_remove_final_layer_norm": True}, "no final LayerNorm"),
        ({"do_layer_norm_before": False}, "2 unknown.*final_layer_norm"),
        ({"do_layer_norm_before": "yes"}, "do_layer_norm_before='yes' is not one of True, False"),
    ],
)
def test_opt_in_particular(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    hub_folder(tmp_path / "hub", "opt")
    edit_config(tmp_path / "hub", **changes)
    with pytest.raises(ValueError, match=message):
        GPT2Model.from_pretrained(tmp_path / "hub")


def test_what_was_asked_for_must_be_what_is_there(tmp_path: Path) -> None:
    hub_folder(tmp_path)
    message = r"norm='post' was asked for.*have norm='pre'; Pre-LN and Post-LN.*use norm='pre'"
    with pytest.raises(ValueError, match=message):
        GPT2Model.from_pretrained(tmp_path, norm="post")
    with pytest.raises(ValueError, match=r"vocab_size=50257 was asked for.*vocab_size=37"):
        GPT2Model.from_pretrained(tmp_path, vocab_size=50257)
    with pytest.raises(ValueError, match=r"unknown model option 'nrom': did you mean 'norm'"):
        GPT2Model.from_pretrained(tmp_path, nrom="pre")
    model = GPT2Model.from_pretrained(
        tmp_path, norm="pre", dropout=0.3, attention_backend="reference"
    )
    assert (model.config.dropout, model.config.attention_backend) == (0.3, "reference")


def test_files_of_older_and_other_writers(tmp_path: Path) -> None:
    """没有 transformer. 前缀、带着掩码缓冲区、带着（相等的）输出头：都认；头不等则是错。"""
    from safetensors.torch import load_file, save_file

    model = hub_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    for i in range(3):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.bool)
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, path)
    assert equal(GPT2Model.from_pretrained(tmp_path), model)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"differs from the token embedding.*tie_word_embeddings"):
        GPT2Model.from_pretrained(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=False)
    untied = GPT2Model.from_pretrained(tmp_path)
    assert torch.equal(untied.head_weight, tensors["lm_head.weight"])


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/x.safetensors", "..\\x.safetensors", "x.bin", 3]
)
def test_an_index_cannot_leave_its_folder(name: Any, tmp_path: Path) -> None:
    hub_folder(tmp_path / "hub")
    (tmp_path / "hub" / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": {"transformer.wte.weight": name}}
    (tmp_path / "hub" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is not a safetensors file beside it"):
        GPT2Model.from_pretrained(tmp_path / "hub")


def as_pickle(folder: Path) -> None:
    """同一个模型，旧式的 pytorch_model.bin。"""
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_an_old_pickle_only_when_asked(tmp_path: Path) -> None:
    model = hub_folder(tmp_path / "hub")
    as_pickle(tmp_path / "hub")
    for attempt in (GPT2Model.from_pretrained, import_model):
        with pytest.raises(ValueError, match=r"only pytorch_model.bin, a pickle.*--allow-pickle"):
            attempt(str(tmp_path / "hub"))
    found = import_model(str(tmp_path / "hub"), allow_pickle=True)
    assert equal(found.model, model)
    assert found.tokenizer is None and "holds no tokenizer" in found.why
    write_model(found, tmp_path / "ours")
    assert equal(GPT2Model.from_pretrained(tmp_path / "ours"), model)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpt(prefix: str, bias: bool, tmp_path: Path) -> None:
    # nanoGPT 的 MLP 用 nn.GELU()，精确的那种；检查点里不写。
    model = tiny_model(torch.float32, norm="pre", bias=bias, activation="gelu")
    state = write_tensors(NANOGPT, model.config, model.state_dict())
    state["lm_head.weight"] = state["transformer.wte.weight"]
    state = {prefix + name: tensor for name, tensor in state.items()}
    args = {
        "n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 24, "bias": bias, "vocab_size": 37,
        "dropout": 0.1,
    }  # fmt: skip
    path = tmp_path / "ckpt.pt"
    torch.save({"model": state, "model_args": args, "iter_num": 5, "config": {"x": 1}}, path)
    with pytest.raises(ValueError, match="is a pickle, which could run code.*--allow-pickle"):
        import_model(str(path))
    found = import_model(str(path), allow_pickle=True)
    assert equal(found.model, model) and found.model.config == model.config
    assert found.tokenizer is None and "give --tokenizer" in found.why
    CharTokenizer("abc").save(tmp_path / "chars")
    given = import_model(str(path), allow_pickle=True, tokenizer=tmp_path / "chars").tokenizer
    assert given is not None and given.encode("cab") == [2, 0, 1]
    with pytest.raises(ValueError, match="norm='post' was asked for"):
        import_model(str(path), allow_pickle=True, wanted={"norm": "post"})
    # nanoGPT 的矩阵不转置：当作 Hugging Face 的读，方阵 c_proj 会悄悄错，所以是两张表。
    assert not torch.equal(
        write_tensors(GPT2, model.config, model.state_dict())["transformer.h.0.attn.c_proj.weight"],
        state[prefix + "transformer.h.0.attn.c_proj.weight"],
    )


def in_hub_cache(home: Path, name: str, **changes: Any) -> GPT2Model:
    """照 huggingface_hub 的缓存布局放一个模型。"""
    repo = home / "hub" / f"models--{name.replace('/', '--')}"
    commit = "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots").mkdir()
    return hub_folder(repo / "snapshots" / commit, **changes)


def offline(home: Path, code: str) -> str:
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    env.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_hub_id_offline_from_the_cache(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="pip install 'gpt2-workbench[hf]'")
    model = in_hub_cache(tmp_path, "someone/tiny")
    out = offline(
        tmp_path,
        "from app.models.transformer import GPT2Model\n"
        "print(float(GPT2Model.from_pretrained('someone/tiny').head_weight.double().sum()))\n"
        "try: GPT2Model.from_pretrained('someone/else')\n"
        "except ValueError as error: print(error)\n",
    )
    total, message = out.splitlines()
    assert float(total) == model.head_weight.double().sum().item()
    assert "'someone/else' is neither a folder here nor to be had from the Hugging Face" in message
    assert "its cache does not hold it" in message


def test_names_that_are_none(tmp_path: Path) -> None:
    for name in ("../x", "/nowhere/model", "a/b/c", "a b", "x" * 200):
        with pytest.raises(ValueError, match="is not a folder with a saved model"):
            GPT2Model.from_pretrained(name)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file, not a folder"):
        GPT2Model.from_pretrained(str(tmp_path / "file"))


def test_without_huggingface_hub_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'gpt2-workbench\[hf\]'"):
        GPT2Model.from_pretrained("openai-community/gpt2")
