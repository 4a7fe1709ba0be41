"""导出到每个运行时之后差多少：GPT-2 small 的宽度、4 层、随机权重，与原模型比 logits。

cd backend && python -m benchmarks.interop

装着 llama-cpp-python 时 GGUF 由 llama.cpp 算，否则由 gguf 的读取器与 numpy。
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.data.tokenizers import BPETokenizer, train_bpe
from app.interop.compare import Comparison, compare
from app.interop.equivalent import Weights
from app.interop.export import export
from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.block import residuals

from .common import table, write_result

COMMAND = "cd backend && python -m benchmarks.interop"
SHAPE = {"n_layer": 4, "n_head": 12, "n_embed": 768, "context_size": 128, "dropout": 0.0}
RUNS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"norm": "pre"}, "hf", {}),
    ({"norm": "pre"}, "hf", {"dtype": "float16"}),
    ({"norm": "post"}, "hf", {}),
    ({"norm": "post"}, "openai-gpt", {}),
    ({"norm": "deepnorm"}, "hf", {}),
    ({"norm": "pre"}, "opt", {}),
    ({"norm": "pre"}, "gguf", {"dtype": "float32"}),
    ({"norm": "pre"}, "gguf", {"dtype": "float16"}),
    ({"norm": "pre"}, "gguf", {"quantize": "q8_0"}),
    ({"norm": "pre"}, "onnx", {}),
    ({"norm": "post"}, "onnx", {}),
    ({"norm": "keel"}, "onnx", {}),
    ({"norm": "pre", "position": "rope", "n_kv_head": 4, "activation": "swiglu"}, "onnx", {}),
    ({"norm": "pre", "attention_pattern": "local(32) | global(4)"}, "onnx", {}),
]


def random_model(vocab_size: int, **changes: Any) -> GPT2Model:
    """偏置与尺度也打乱：刚初始化的 0 与 1 藏得住错。"""
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(vocab_size=vocab_size, **SHAPE, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def row(config: str, target: str, found: Comparison) -> list[object]:
    return [
        config, target, found.runtime, f"{found.difference:.1e}",
        f"{found.difference / found.largest:.1e}", f"{found.agree:.1%}",
    ]  # fmt: skip


def ctranslate2_row(norm: str, tokenizer: BPETokenizer, folder: Path) -> list[object]:
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    model = random_model(tokenizer.vocab_size, norm=norm)
    export(model, tokenizer, "hf", folder / "hf")
    TransformersConverter(str(folder / "hf")).convert(str(folder / "ct2"))
    generator = ctranslate2.Generator(str(folder / "ct2"), device="cpu")

    def run(ids: torch.Tensor) -> torch.Tensor:
        view = ctranslate2.StorageView.from_array
        lengths = np.full(len(ids), ids.shape[1], dtype=np.int32)
        out = generator.forward_batch(view(ids.int().numpy()), view(lengths))
        return torch.from_numpy(np.array(out))

    name = f"CTranslate2 {ctranslate2.__version__}"
    return row(f"norm={norm}", "hf, converted", compare(model, run, name))


def naive_fold(norm: str = "deepnorm") -> float:
    """把 1/α 折进分支出口时的相对误差：没有采用的那种写法。"""
    model = random_model(1000, norm=norm)
    alpha = residuals(model.config, 0)[0].alpha
    state = Weights.of(model).state
    other = GPT2Model(model.config.replace(norm="post")).eval()
    other.load_state_dict({k: v / alpha if "c_proj" in k else v for k, v in state.items()})
    found = compare(model, lambda ids: other(ids)["logits"], "naive")
    return found.difference / found.largest


def main() -> None:
    torch.set_num_threads(1)
    text = Path(__file__).read_text(encoding="utf-8")
    tokenizer = train_bpe([text], 600)
    rows: list[list[object]] = []
    for changes, target, options in RUNS:
        model = random_model(tokenizer.vocab_size, **changes)
        config = ", ".join(f"{k}={v}" for k, v in changes.items())
        with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
            done = export(model, tokenizer, target, Path(place) / "out", **options)
        assert isinstance(done.checked, Comparison), done.checked
        what = " ".join([target, *options.values()])
        rows.append(row(config, what, done.checked))
    for norm in ("pre", "post", "deepnorm"):
        with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
            rows.append(ctranslate2_row(norm, tokenizer, Path(place)))
    header = [
        "configuration",
        "target",
        "computed by",
        "largest difference",
        "relative",
        "same token",
    ]
    note = (
        f"Relative: to the largest logit. Folding 1/α of deepnorm into the branches' outputs "
        f"instead would differ by {naive_fold():.1e}."
    )
    write_result("interop", COMMAND, f"{table(header, rows)}\n\n{note}")


if __name__ == "__main__":
    main()
