"""量化的模型出门：GGUF 里是同样的码，别的格式里是浮点并说出来；lm-eval 与 transformers 照用。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.data.tokenizers import ByteTokenizer
from app.interop.export import export
from app.models.transformer import GPT2Model
from app.quantization.codes import Scheme
from app.quantization.model import QuantizedModel, dequantize
from tests.models.helpers import relative, tokens
from tests.quantization.helpers import float_model, quantized

EXTRA = "pip install 'gpt2-workbench[export]'"
# (各层的存法, 词表的存法, 各层在 GGUF 里的类型, 词表的类型)
CASES = {
    "fp16": (Scheme(16), Scheme(16), "F16", "F16"),
    "int8": (Scheme(8), Scheme(8), "Q8_0", "Q8_0"),
    "int4": (Scheme(4, 32), Scheme(8), "Q4_0", "Q8_0"),
    "int4 wide": (Scheme(4, 64), Scheme(4, 32), "Q4_0", "Q4_0"),
    "int4 asymmetric": (Scheme(4, 32, True), Scheme(8), "Q4_1", "Q8_0"),
    "int4 wide asymmetric": (Scheme(4, 64, True), Scheme(4, 64, True), "Q4_1", "Q4_1"),
    # 组窄于一块：没有装得下的类型，值仍不变。
    "int4 narrow": (Scheme(4, 16), Scheme(8), "F32", "Q8_0"),
}


def small(**changes: Any) -> GPT2Model:
    return float_model(**({"norm": "pre", "n_layer": 2, "vocab_size": 300} | changes))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_gguf_has_the_same_codes_bit_for_bit(case: str, tied: bool, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason=EXTRA)
    from app.interop.gguf_file import gguf_name, numpy_logits

    scheme, head, layers, vocabulary = CASES[case]
    model = quantized(small(tie_weights=tied), scheme, head)
    done = export(model, None, "gguf", tmp_path / "out")
    stored = {t.name: t for t in gguf.GGUFReader(done.written).tensors}
    floats = dequantize(model).state_dict()
    assert stored.keys() == {gguf_name(name) for name in floats}
    for name, wanted in floats.items():
        found = stored[gguf_name(name)]
        kind = "F32"
        if name in model.codes:
            kind = layers if name.startswith("h.") else vocabulary
        assert found.tensor_type.name == kind, name
        data = gguf.quants.dequantize(found.data, found.tensor_type)
        assert np.array_equal(data, wanted.numpy()), name
    ids = tokens(1, 12, vocab=300)
    with torch.no_grad():
        logits = dequantize(model)(ids)["logits"]
    assert relative(torch.from_numpy(numpy_logits(done.written, ids.numpy())), logits) < 1e-4


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"quantize": "q8_0"}])
def test_gguf_never_quantizes_twice(options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason=EXTRA)
    model = quantized(small(), Scheme(8))
    with pytest.raises(ValueError, match="quantized already .* leave them out"):
        export(model, None, "gguf", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["hf", pytest.param("onnx", marks=pytest.mark.slow)])
def test_other_formats_get_floats_and_say_so(target: Any, tmp_path: Path) -> None:
    package = {"hf": "transformers", "onnx": "onnxruntime"}[target]
    pytest.importorskip(package, reason=EXTRA)
    model = quantized(small(), Scheme(8))
    done = export(model, ByteTokenizer(), target, tmp_path / "out")
    assert "float copies of the quantized values" in done.notes[0]
    assert not isinstance(done.checked, str) and done.checked.difference < 1e-4
    if target == "hf":
        back = GPT2Model.from_pretrained(tmp_path / "out").state_dict()
        name = "h.1.mlp.c_proj.weight"
        assert torch.equal(back[name], model.codes[name].dequantize())


def test_transformers_wrapper_computes_and_generates_the_same() -> None:
    pytest.importorskip("transformers", reason="pip install 'gpt2-workbench[hf]'")
    from app.interop.transformers import wrap

    for changes in ({}, {"tie_weights": False, "position": "rope"}, {"moe_num_experts": 4}):
        model = quantized(small(**changes), Scheme(4, 32))
        wrapped, ids = wrap(model, eos_token_id=None), tokens(2, 9, vocab=299) + 1
        with torch.no_grad():
            wanted = model(ids)["logits"]
            assert relative(wrapped(ids).logits, wanted) < 1e-5
            text = wrapped.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
            assert torch.equal(text[:, 9], wanted[:, -1].argmax(-1))
        one, other = model.state_dict(), wrapped.state_dict()
        name = "embed.wte.weight.codes"
        assert one[name].data_ptr() == other[f"model.{name}"].data_ptr()
        with pytest.raises(ValueError, match="no gradient"):
            wrapped.train()
        with pytest.raises(ValueError, match="no place for these codes"):
            wrapped.save_pretrained("anywhere")


def test_lm_eval_opens_the_folder(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="pip install 'gpt2-workbench[eval]'")
    from types import SimpleNamespace

    from app.interop.lm_eval import WorkbenchLM

    model, tokenizer = quantized(small(), Scheme(8)), ByteTokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    lm = WorkbenchLM(str(tmp_path))
    assert isinstance(lm.model, QuantizedModel)
    request = SimpleNamespace(args=("ab", " cd"))
    (found, _), floats = (
        lm.loglikelihood([request])[0],
        WorkbenchLM.of(dequantize(model), tokenizer),
    )
    assert found == pytest.approx(floats.loglikelihood([request])[0][0], rel=1e-2)
