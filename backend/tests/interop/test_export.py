"""导出：写成的文件夹能被 transformers 直接使用；去不了的配置说出原因；什么都不覆盖。"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, train_bpe
from app.generation.sampling import SamplingConfig
from app.interop.equivalent import Weights, as_post, widened, with_biases
from app.interop.export import export
from app.interop.reading.importing import import_model
from app.interop.targets import TARGETS, check_target, family_name, reason_against
from app.models.transformer import GPT2Model
from tests.generation.helpers import new_tokens

from ..models.helpers import VARIANTS, relative, tiny_config, tiny_model, tokens

TEXT = "the cat sat on the mat, the rat sat on the cat; and that was that.\n" * 20
TOKENIZERS: dict[str, Tokenizer] = {
    "bpe": train_bpe([TEXT], 280),
    "bytes": ByteTokenizer(),
    "chars": CharTokenizer(TEXT),
}


def model_for(tokenizer: Tokenizer, spare: int = 0, **changes: Any) -> GPT2Model:
    return tiny_model(torch.float32, vocab_size=tokenizer.vocab_size + spare, **changes)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(("norm", "spare"), [("pre", 0), ("pre", 3), ("post", 0), ("deepnorm", 5)])
def test_transformers_continues_a_text_as_we_do(
    name: str, norm: str, spare: int, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install 'gpt2-workbench[hf]'")
    tokenizer = TOKENIZERS[name]
    model = model_for(tokenizer, spare, norm=norm, context_size=48)
    done = export(model, tokenizer, "hf", tmp_path / "out")
    assert not isinstance(done.checked, str)
    assert done.checked.difference <= 2e-5 * done.checked.largest

    pipe = transformers.pipeline("text-generation", str(tmp_path / "out"))
    special = pipe.tokenizer.eos_token_id, pipe.tokenizer.pad_token_id
    assert special == (tokenizer.document_separator, tokenizer.vocab_size)
    assert special[1] < pipe.model.config.vocab_size
    prompt = "the cat sat"
    ids = tokenizer.encode(prompt)
    assert pipe.tokenizer.encode(prompt) == ids
    got = pipe(prompt, max_new_tokens=12, do_sample=False, return_tensors=True)
    (want,) = new_tokens(
        model, [ids], max_new_tokens=12, sampling=SamplingConfig(temperature=0.0),
        stop_ids=[tokenizer.document_separator],
    )  # fmt: skip
    new = got[0]["generated_token_ids"][len(ids) :]
    assert new == want or max(want) >= tokenizer.vocab_size


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_exported_folder_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    """连为对方补的行也去掉；分词器的编码相同。"""
    tokenizer = TOKENIZERS[name]
    for norm in ("pre", "post"):
        model = model_for(tokenizer, norm=norm)
        export(model, tokenizer, "hf", tmp_path / norm)
        again = import_model(str(tmp_path / norm))
        assert again.model.config == model.config
        mine, other = model.state_dict(), again.model.state_dict()
        assert all(torch.equal(mine[key], other[key]) for key in mine)
        assert again.tokenizer is not None
        assert again.tokenizer.encode(TEXT) == tokenizer.encode(TEXT)
        assert again.tokenizer.document_separator == tokenizer.document_separator


@given(st.text(max_size=40))
def test_the_hub_file_encodes_as_we_do(text: str) -> None:
    """用户文字里的分隔符与填充符除外：tokenizers 总会把它们变成特殊的 id。"""
    tokenizers = pytest.importorskip("tokenizers")
    from app.interop.tokens import hub_tokenizer

    for name in ("bpe", "bytes"):
        theirs = tokenizers.Tokenizer.from_str(json.dumps(hub_tokenizer(TOKENIZERS[name])))
        if "<|" not in text:
            assert theirs.encode(text).ids == TOKENIZERS[name].encode(text)


@pytest.mark.parametrize("tied", [True, False])
def test_added_rows_never_win_and_take_little(tied: bool) -> None:
    model = tiny_model(norm="post", tie_weights=tied)
    with torch.no_grad():
        # 像训练好的 GPT-2：logits 全是负的，零行会赢过它们。
        model.h["2"].ln_2.bias.add_(20.0)
        model.head_weight.sub_(1.0)
    wide = widened(Weights.of(model), 48)
    other = GPT2Model(wide.config).double().eval()
    other.load_state_dict(wide.state)
    ids = tokens(4, 24)
    a, b = model(ids)["logits"], other(ids)["logits"]
    assert a.max() < -100
    assert relative(b[..., :37], a) < 1e-12
    assert (b[..., 37:].amax(-1) < a.amax(-1)).all()
    share = b.softmax(-1)[..., 37:]
    assert share.max() <= 1 / 37


def test_deepnorm_is_folded_exactly_and_the_original_stays() -> None:
    for tied in (True, False):
        model = tiny_model(norm="deepnorm", tie_weights=tied)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        folded = as_post(Weights.of(model))
        other = GPT2Model(folded.config).double().eval()
        other.load_state_dict(folded.state)
        ids = tokens(2, 24)
        assert relative(other(ids)["logits"], model(ids)["logits"]) < 1e-13
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_biases_of_zero_change_nothing() -> None:
    model = tiny_model(norm="pre", bias=False)
    filled = with_biases(Weights.of(model))
    other = GPT2Model(filled.config).double().eval()
    other.load_state_dict(filled.state)
    ids = tokens(2, 24)
    assert torch.equal(other(ids)["logits"], model(ids)["logits"])


@pytest.mark.parametrize(
    ("target", "variant", "reason"),
    [
        ("gguf", "post", "norm='post'.*'pre'.*--to hf, --to opt, --to openai-gpt, --to onnx"),
        ("gguf", "rope", "norm='post'"),
        ("gguf", "gelu", "norm='post'"),
        ("opt", "keel", "norm='keel' but opt has 'pre' or 'post'.*--to onnx"),
        ("opt", "rope", "position='rope' but opt has only position='learned'"),
        ("opt", "local", "sparse attention=True but opt has only sparse attention=False"),
        ("opt", "grouped", "n_kv_head=2 but opt has only n_kv_head=4"),
        ("opt", "swiglu", "activation='swiglu' does not exist in opt"),
        ("opt", "qk_norm", "qk_norm=True"),
        ("opt", "rmsnorm", "norm_type='rmsnorm'"),
        ("openai-gpt", "pre", "norm='pre' but openai-gpt has 'post'"),
        ("openai-gpt", "untied", "tie_weights=False but GPT-1's head"),
        ("openai-gpt", "gelu", "activation='gelu' does not exist in openai-gpt"),
    ],
)
def test_what_has_no_target_is_refused_with_those_that_do(
    target: Any, variant: str, reason: str, tmp_path: Path
) -> None:
    model = GPT2Model(tiny_config(**VARIANTS[variant]))
    with pytest.raises(ValueError, match=reason):
        export(model, None, target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gguf_takes_only_the_tanh_gelu() -> None:
    with pytest.raises(ValueError, match=r"activation='gelu' but llama.cpp's gpt2 has only"):
        check_target("gguf", tiny_config(norm="pre", activation="gelu"))


def test_every_variant_has_a_target() -> None:
    for name, changes in VARIANTS.items():
        config = tiny_config(**changes)
        assert any(reason_against(target, config) is None for target in TARGETS), name
    assert family_name(tiny_config(norm="pre")) == "gpt2"
    assert family_name(tiny_config(norm="deepnorm")) == "opt"
    assert family_name(tiny_config(norm="keel")) is None


def test_nothing_is_overwritten_and_nothing_half_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(torch.float32, norm="pre")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="already exists: give another --out"):
        export(model, None, "hf", tmp_path / "full")

    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        export(model, None, "hf", tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_options_that_do_not_belong(tmp_path: Path) -> None:
    model = tiny_model(torch.float32, norm="pre")
    with pytest.raises(ValueError, match=r"quantize='q8_0' is for --to gguf only, not --to hf"):
        export(model, None, "hf", tmp_path / "out", quantize="q8_0")
    with pytest.raises(ValueError, match=r"bfloat16: onnxruntime's CPU kernels know no bfloat16"):
        export(model, None, "onnx", tmp_path / "out", dtype="bfloat16")
    with torch.device("meta"):
        empty = GPT2Model(tiny_config(norm="pre"))
    with pytest.raises(ValueError, match="meta device"):
        Weights.of(empty)


def test_half_precision_says_what_it_cost(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="pip install 'gpt2-workbench[hf]'")
    model = tiny_model(torch.float32, norm="pre")
    done = export(model, None, "hf", tmp_path / "out", dtype="float16")
    assert not isinstance(done.checked, str)
    assert 1e-5 < done.checked.difference / done.checked.largest < 2e-2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    again = GPT2Model.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in again.parameters()} == {torch.float16}
