"""llama.cpp 的 GGUF、ONNX、CTranslate2：写出的文件由目标的库（或只凭文件的 numpy）算一遍。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.data.tokenizers import ByteTokenizer, train_bpe
from app.generation.sampling import SamplingConfig
from app.interop.export import export
from app.models.transformer import GPT2Model
from tests.generation.helpers import new_tokens

from ..models.helpers import VARIANTS, relative, tiny_model, tokens

TEXT = "the cat sat on the mat, the rat sat on the cat; and that was that.\n" * 20
BPE = train_bpe([TEXT], 280)
EXTRA = "pip install 'gpt2-workbench[export]'"


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"dtype": "float32"}, 2e-6),
        ({"dtype": "float16"}, 5e-3),
        ({"dtype": "bfloat16"}, 5e-2),
        ({"quantize": "q8_0"}, 1e-1),
    ],
    ids=["f32", "f16", "bf16", "q8_0"],
)
@pytest.mark.parametrize("tied", [True, False])
def test_gguf(options: dict[str, Any], limit: float, tied: bool, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason=EXTRA)
    from app.interop.gguf_file import gguf_name, numpy_logits

    model = tiny_model(torch.float32, norm="pre", tie_weights=tied, vocab_size=300)
    done = export(model, BPE, "gguf", tmp_path / "out", **options)
    assert not isinstance(done.checked, str)
    ids = tokens(2, 20)
    got = torch.from_numpy(numpy_logits(done.written, ids.numpy()))
    with torch.no_grad():
        assert relative(got, model(ids)["logits"]) <= limit
    stored = read_tensors(done.written)
    assert stored.keys() == {gguf_name(name) for name in model.state_dict()}
    for name, tensor in model.state_dict().items():
        kind, data = stored[gguf_name(name)]
        plain = tensor.dim() == 1 or name == "embed.wpe.weight"
        assert (kind == "F32") == (plain or options.get("dtype") == "float32")
        error = (torch.from_numpy(data) - tensor).abs().max() / tensor.abs().max()
        assert error <= {"F32": 0, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 1e-2}[kind]


def read_tensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    import gguf

    return {
        t.name: (t.tensor_type.name, np.array(gguf.quants.dequantize(t.data, t.tensor_type)))
        for t in gguf.GGUFReader(path).tensors
    }


def test_gguf_carries_the_tokenizer(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason=EXTRA)
    model = tiny_model(torch.float32, norm="pre", vocab_size=BPE.vocab_size + 4)
    done = export(model, BPE, "gguf", tmp_path / "out")
    reader = gguf.GGUFReader(done.written)

    def fact(name: str) -> Any:
        return reader.get_field(f"tokenizer.ggml.{name}").contents()

    table = BPE.to_json()["model"]
    words = fact("tokens")
    assert len(words) == len(set(words)) == model.config.vocab_size
    assert {word: i for i, word in enumerate(words[: BPE.vocab_size])} == table["vocab"]
    assert fact("merges") == table["merges"]
    assert (fact("model"), fact("pre")) == ("gpt2", "gpt-2")
    types = fact("token_type")
    assert types[BPE.document_separator] == gguf.TokenType.CONTROL
    assert set(types[BPE.vocab_size :]) == {gguf.TokenType.UNUSED}
    assert fact("eos_token_id") == BPE.document_separator
    assert fact("padding_token_id") == BPE.vocab_size
    assert fact("add_bos_token") is False


def test_gguf_without_a_tokenizer_that_llama_cpp_knows(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason=EXTRA)
    model = tiny_model(torch.float32, norm="pre", vocab_size=257, n_embed=40)
    done = export(model, ByteTokenizer(), "gguf", tmp_path / "a", quantize="q8_0")
    assert "byte-level BPE only" in done.notes[0]
    # 宽 40 不是 32 的倍数：这些矩阵留在 float16，宽 160 的照样量化。
    kinds = {name: kind for name, (kind, _) in read_tensors(done.written).items()}
    assert kinds["blk.0.attn_qkv.weight"] == "F16" and kinds["blk.0.ffn_down.weight"] == "Q8_0"
    with pytest.raises(ValueError, match="float64 does not exist in GGUF: use --dtype"):
        export(model.double(), None, "gguf", tmp_path / "b")


# 一张图要几秒：平时一种（后置归一化、RoPE、GQA、环形的图样都在里面），其余放到 slow。
_ONNX = {"rope interleaved + sinks": False, "deepnorm": True} | dict.fromkeys(
    ("pre", "keel", "local+global", "strided", "fixed", "longformer", "swiglu", "qk_norm"), True
)


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[pytest.mark.slow] * slow) for v, slow in _ONNX.items()]
)
def test_onnx(variant: str, tmp_path: Path) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=EXTRA)
    from app.interop.onnx_graph import OnnxModel

    model = tiny_model(
        torch.float32, vocab_size=BPE.vocab_size, **{**VARIANTS[variant], "n_layer": 2}
    )
    done = export(model, BPE, "onnx", tmp_path / "out")
    assert not isinstance(done.checked, str)
    assert done.checked.difference <= 2e-5 * done.checked.largest
    graph = OnnxModel(done.written)
    names = [i.name for i in graph.session.get_inputs()]
    assert names[:4] == ["input_ids", "attention_mask", "position_ids", "past_key_values.0.key"]
    outputs = [o.name for o in graph.session.get_outputs()]
    assert outputs[0] == "logits" and outputs[-1] == "present.1.value"

    # 别的批与长度；左填充的行与单独算相同。
    ids = tokens(3, 17, vocab=BPE.vocab_size)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        want = model(ids, attention_mask=mask)["logits"]
    for prefill in (1, 9, 17):
        got = graph.piecewise(ids, mask, prefill)
        assert relative(got[mask != 0], want[mask != 0]) <= 2e-5
    alone = graph.piecewise(ids[1:2, 5:], mask[1:2, 5:], 4)
    assert relative(alone, want[1:2, 5:]) <= 2e-5


@pytest.mark.parametrize("norm", ["pre", "post", "deepnorm"])
def test_ctranslate2(norm: str, tmp_path: Path) -> None:
    """转换器读我们的 hf 导出；OPT 那条路要词表是 8 的倍数。"""
    ctranslate2 = pytest.importorskip("ctranslate2", reason=EXTRA)
    pytest.importorskip("transformers", reason="pip install 'gpt2-workbench[hf]'")
    from ctranslate2.converters import TransformersConverter

    model = tiny_model(torch.float32, norm=norm, vocab_size=BPE.vocab_size, context_size=48)
    export(model, BPE, "hf", tmp_path / "hf")
    TransformersConverter(str(tmp_path / "hf")).convert(str(tmp_path / "ct2"))
    generator = ctranslate2.Generator(str(tmp_path / "ct2"), device="cpu")

    ids = BPE.encode("the cat sat on")
    view = ctranslate2.StorageView.from_array
    found = generator.forward_batch(
        view(np.array([ids], dtype=np.int32)), view(np.array([len(ids)], dtype=np.int32))
    )
    with torch.no_grad():
        want = model(torch.tensor([ids]))["logits"]
    got = torch.from_numpy(np.array(found))[..., : BPE.vocab_size]
    assert relative(got, want) <= 2e-5

    words = [BPE.to_json()["model"]["vocab"]]
    texts = {number: text for text, number in words[0].items()}
    (result,) = generator.generate_batch(
        [[texts[i] for i in ids]], max_length=20, sampling_topk=1, include_prompt_in_result=False,
        end_token=[],
    )  # fmt: skip
    (mine,) = new_tokens(model, [ids], max_new_tokens=20, sampling=SamplingConfig(temperature=0.0))
    assert result.sequences_ids[0] == mine


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    model = tiny_model(torch.float32, norm="pre")
    for target, library in (("gguf", "gguf"), ("onnx", "onnxscript")):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(ImportError, match=r"gpt2-workbench\[export\]"):
            export(model, None, target, tmp_path / target)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = export(model, None, "hf", tmp_path / "hf")
    assert done.checked == "transformers is not installed: pip install 'gpt2-workbench[hf]'"
    assert GPT2Model.from_pretrained(tmp_path / "hf").config == model.config


@pytest.mark.parametrize(("norm", "spare"), [("pre", 0), ("pre", 47), ("post", 5), ("pre", 1)])
def test_ctranslate2_converts_a_padded_vocabulary(norm: str, spare: int, tmp_path: Path) -> None:
    """词表补到 64 的倍数是我们自己的做法：它的转换器要求每一行都有词元。"""
    ctranslate2 = pytest.importorskip("ctranslate2", reason=EXTRA)
    model = tiny_model(torch.float32, norm=norm, vocab_size=BPE.vocab_size + spare)
    export(model, BPE, "hf", tmp_path / "hf")
    converter = ctranslate2.converters.TransformersConverter(str(tmp_path / "hf"))
    converter.convert(str(tmp_path / "ct2"))
    ids = BPE.encode("the cat sat")
    (want,) = new_tokens(
        model, [ids], max_new_tokens=8, sampling=SamplingConfig(temperature=0.0),
        stop_ids=[BPE.document_separator],
    )  # fmt: skip
    words = [BPE.token_bytes(i) for i in ids]
    from app.data.byte_level import to_chars

    theirs = ctranslate2.Generator(str(tmp_path / "ct2"))
    (got,) = theirs.generate_batch(
        [[to_chars(word) for word in words]], max_length=8, include_prompt_in_result=False,
        beam_size=1, end_token="<|endoftext|>",
    )  # fmt: skip
    assert got.sequences_ids[0] == want or max(want) >= BPE.vocab_size
