"""写成 llama.cpp 的 GGUF（它的 gpt2 架构，Pre-LN），写完读回来核对。

它的矩阵与我们一样存 (out, in)，所以只换名字。偏置、归一化与位置嵌入恒为 float32，
它自己的转换器也如此。B 批、T 词元数、C 宽度、H 头数。
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from app.common.files import write_folder
from app.data import byte_level
from app.data.chat.template import Template
from app.data.tokenizers import BPETokenizer, Tokenizer
from app.interop.chat import jinja
from app.interop.compare import Comparison, Exported, compare, sample_ids
from app.interop.equivalent import WPE, Weights, with_biases
from app.interop.job import Job
from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.layers.norm import EPS
from app.models.transformer.weights.layouts import HEAD
from app.quantization.gguf_blocks import BLOCK, block_type, blocks
from app.quantization.model import QuantizedModel, dequantize

if TYPE_CHECKING:
    import numpy as np

_NAMES = {
    "embed.wte": "token_embd",
    "embed.wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
}
_LAYER_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def gguf_name(ours: str) -> str:
    stem, _, kind = ours.rpartition(".")
    if stem in _NAMES:
        return f"{_NAMES[stem]}.{kind}"
    _, layer, rest = stem.split(".", 2)
    return f"blk.{layer}.{_LAYER_NAMES[rest]}.{kind}"


def export_gguf(job: Job) -> Exported:
    """矩阵用 dtype（None = 模型的）或 Q8_0；恒为 float32 的那些不先降到 dtype。

    量化的模型：它的码原样写成块，其余 float32。

    Raises:
        ValueError: folder 已有东西，精度写不成（float64），或已量化的还要换精度。
        ImportError: 没有装 gguf。
    """
    gguf = _library()
    model = job.model
    codes = model.codes if isinstance(model, QuantizedModel) else {}
    if isinstance(model, QuantizedModel):
        if job.dtype is not None or job.quantize is not None:
            raise ValueError(
                f"dtype={job.dtype}, quantize={job.quantize!r} but the model is quantized already "
                "and its codes are written as they are: leave them out, or export the float model"
            )
        model = dequantize(model)
    weights = with_biases(Weights.of(model))
    dtype = job.dtype or weights.state[WPE].dtype
    if dtype not in _TYPES:
        raise ValueError(f"{dtype} does not exist in GGUF: use --dtype float32 or float16")
    kind = "Q8_0" if job.quantize == "q8_0" else _TYPES[dtype]
    if codes:
        kind = Counter(block_type(each) for each in codes.values()).most_common(1)[0][0]
    name = f"model-{kind.lower()}.gguf"
    notes = list(weights.notes)

    def fill(new: Path) -> None:
        writer = gguf.GGUFWriter(new / name, "gpt2")
        _write_config(gguf, writer, weights.config, kind)
        notes.extend(_write_tokenizer(gguf, writer, job, weights.config.vocab_size))
        for ours, tensor in weights.state.items():
            if ours in codes:
                wanted, data = block_type(codes[ours]), blocks(codes[ours])
            else:
                wanted = "F32" if codes else _kind_of(ours, tensor, kind)
                data = gguf.quants.quantize(
                    tensor.float().numpy(), gguf.GGMLQuantizationType[wanted]
                )
            writer.add_tensor(gguf_name(ours), data, raw_dtype=gguf.GGMLQuantizationType[wanted])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_folder(job.folder, fill)
    checked = compare_gguf(model, job.folder / name)
    return Exported(job.folder / name, f"gguf {kind}", tuple(notes), checked)


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise ImportError(
            "--to gguf needs the package gguf: pip install 'gpt2-workbench[export]'"
        ) from None
    return gguf


def _kind_of(ours: str, tensor: Tensor, kind: str) -> str:
    if tensor.dim() == 1 or ours == WPE:
        return "F32"
    return "F16" if kind == "Q8_0" and tensor.shape[1] % BLOCK else kind


def _write_config(gguf: Any, writer: Any, config: GPT2Config, kind: str) -> None:
    writer.add_name(f"GPT-2 {config.n_layer}x{config.n_embed}")
    writer.add_context_length(config.context_size)
    writer.add_embedding_length(config.n_embed)
    writer.add_feed_forward_length(config.mlp_hidden)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(EPS)
    writer.add_vocab_size(config.vocab_size)
    files = gguf.LlamaFileType
    writer.add_file_type(files.ALL_F32 if kind == "F32" else files[f"MOSTLY_{kind}"])


def _write_tokenizer(gguf: Any, writer: Any, job: Job, vocab_size: int) -> list[str]:
    """返回要告诉用户的话。"""
    tokenizer = job.tokenizer
    if not isinstance(tokenizer, BPETokenizer) or not tokenizer.to_json()["model"]["merges"]:
        writer.add_tokenizer_model("none")
        what = "no tokenizer" if tokenizer is None else f"a {tokenizer.kind} tokenizer"
        lost = "" if job.template is None else " and holds no chat template"
        return [
            f"{what}: llama.cpp knows byte-level BPE only, so the file takes token ids alone{lost}"
        ]
    types, end = gguf.TokenType, tokenizer.document_separator
    texts = [byte_level.to_chars(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
    kinds = [types.NORMAL] * len(texts)
    for text, number in tokenizer.special_tokens.items():
        texts[number], kinds[number] = text, types.CONTROL
    for number in range(len(texts), vocab_size):
        # 模型的词表比分词器大：空行也要有各不相同的名字。
        texts.append(f"[PAD{number}]")
        kinds.append(types.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges(tokenizer.to_json()["model"]["merges"])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    if vocab_size > tokenizer.vocab_size:
        writer.add_pad_token_id(tokenizer.vocab_size)
    writer.add_add_bos_token(False)
    return _write_template(writer, job.template, tokenizer)


def _write_template(writer: Any, template: Template | None, tokenizer: Tokenizer) -> list[str]:
    """模板与收尾的记号：没有 eot，llama.cpp 不会在那里停。

    generation 标签只为训练的掩码，那里用不到，也不是人人认得：去掉。
    """
    if template is None:
        return []
    marks = ("{%- generation -%}", "{%- endgeneration -%}")
    lines = (line for line in jinja(template).splitlines() if line not in marks)
    writer.add_chat_template("\n".join(lines) + "\n")
    (end, *others) = template.stop_ids(tokenizer)
    writer.add_eot_token_id(end)
    only = f", of {1 + len(others)} only the first" if others else ""
    return [f"chat template {template.name}, ending a turn with {template.stop[0]}{only}"]


def compare_gguf(model: GPT2Model, path: Path) -> Comparison:
    """装了 llama-cpp-python 就用 llama.cpp 算，否则用 gguf 读回来、用 numpy 算。"""
    ids = sample_ids(model, rows=1)
    try:
        import llama_cpp
    except ImportError:
        reader = "gguf's reader and numpy (llama-cpp-python is not installed)"
        return compare(
            model, lambda x: torch.from_numpy(numpy_logits(path, x.numpy())), reader, ids
        )

    def run(x: Tensor) -> Tensor:
        llama = llama_cpp.Llama(
            str(path), n_ctx=x.shape[1], n_batch=x.shape[1], logits_all=True, verbose=False,
            # 它的缓存默认是 float16，会盖过权重的误差。
            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
        )  # fmt: skip
        llama.eval(x[0].tolist())
        return torch.tensor(llama.scores[: x.shape[1]])[None]

    return compare(model, run, f"llama.cpp, llama-cpp-python {llama_cpp.__version__}", ids)


def numpy_logits(path: Path, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """(B, T) -> (B, T, V)：只凭文件里的数与元数据算，不经过我们的模型。"""
    import numpy as np

    gguf = _library()
    reader = gguf.GGUFReader(path)
    w = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}

    def fact(name: str) -> Any:
        return reader.get_field(f"gpt2.{name}").contents()

    def norm(x: Any, name: str) -> Any:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + fact("attention.layer_norm_epsilon"))
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Any, name: str) -> Any:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    rows, length = ids.shape
    heads = fact("attention.head_count")
    hidden = np.triu(np.full((length, length), -np.inf), 1)
    x = w["token_embd.weight"][ids] + w["position_embd.weight"][:length]
    for i in range(fact("block_count")):
        qkv = linear(norm(x, f"blk.{i}.attn_norm"), f"blk.{i}.attn_qkv")
        q, k, v = qkv.reshape(rows, length, 3, heads, -1).transpose(2, 0, 3, 1, 4)  # (B, H, T, D)
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]) + hidden
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        y = scores / scores.sum(-1, keepdims=True) @ v
        x = x + linear(y.transpose(0, 2, 1, 3).reshape(x.shape), f"blk.{i}.attn_output")
        up = linear(norm(x, f"blk.{i}.ffn_norm"), f"blk.{i}.ffn_up")
        up = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        x = x + linear(up, f"blk.{i}.ffn_down")
    head = w.get(gguf_name(HEAD), w["token_embd.weight"])
    return norm(x, "output_norm") @ head.T
