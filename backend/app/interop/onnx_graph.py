"""写成 ONNX：一张图既能预填也能带缓存逐个解码，批、长度、过去的长度都是动态的。

输入输出照 optimum 的名字：input_ids (B, T)、attention_mask (B, P+T)、position_ids (B, T)、
past_key_values.{i}.key/value (B, G, P, D) -> logits (B, T, V)、present.{i}.key/value（同形，P+T）。
预填就是 P = 0。用的是我们自己的层，所以任何图样、RoPE、GQA 都照样导出。
P 过去的词元数、G 键值头数、D 头宽。
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from app.common.files import write_folder
from app.interop.compare import Comparison, Exported, compare, sample_ids
from app.interop.equivalent import Weights
from app.interop.job import Job
from app.interop.tokens import tokenizer_files
from app.models.transformer import GPT2Config, GPT2Model, Positions
from app.models.transformer.backends.mask_plan import MaskPlan
from app.models.transformer.block import run_blocks
from app.models.transformer.layers.context import Context, Note, rotation
from app.models.transformer.visibility.rule import visible
from app.models.transformer.weights.families import FAMILIES, why_not, write_config

MODEL_FILE = "model.onnx"
_NUMPY = {"tensor(float)": "f4", "tensor(double)": "f8", "tensor(float16)": "f2"}


class _Past:
    """代替缓存的一步：过去的键值接上新的，整个交还给调用者。"""

    def __init__(self, past: Sequence[Tensor]) -> None:
        self._past = past
        self.present: list[Tensor] = []

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        both = [
            torch.cat([old, new], 2)
            for old, new in zip(self._past[2 * layer : 2 * layer + 2], (k, v), strict=True)
        ]
        self.present += both
        return both[0], both[1]


class Graph(nn.Module):
    """没有检查、没有按值的分支的前向，供跟踪；与 GPT2Model.forward 相等由测试保证。"""

    def __init__(self, model: GPT2Model) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        model, config = self.model, self.model.config
        keys = Positions.padded(attention_mask)
        queries = Positions(keys.pos[:, keys.length - input_ids.shape[1] :])
        # 参考路径：整行都是填充时给 0 而不是 NaN，填充的键值才不会污染别人。
        plans = {
            pattern: MaskPlan(
                queries, keys, pattern, "reference", "onnx",
                mask=visible(queries, keys, pattern)[:, None],
            )
            for pattern in dict.fromkeys(model.patterns)
        }  # fmt: skip
        step, where = _Past(past), Positions(position_ids)
        rotary = rotation(config, where, model.embed.wte.weight.dtype)
        contexts = [
            Context(queries, plans[pattern], Note(), layer, rotary, step)
            for layer, pattern in enumerate(model.patterns)
        ]
        x, _ = run_blocks(model.h, model.ln_f, model.embed(input_ids, where), contexts)
        return (model.head(x), *step.present)


def past_names(layers: int, prefix: str) -> list[str]:
    return [f"{prefix}.{i}.{part}" for i in range(layers) for part in ("key", "value")]


def export_onnx(job: Job) -> Exported:
    """
    Raises:
        ValueError: folder 已有东西，或精度是 bfloat16。
        ImportError: 没有装 onnx、onnxscript。
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"--to onnx needs {error.name}: pip install 'gpt2-workbench[export]'"
        ) from None
    weights, tokenizer = Weights.of(job.model).to(job.dtype), job.tokenizer
    config, dtype = job.model.config, weights.state["embed.wte.weight"].dtype
    if dtype == torch.bfloat16:
        raise ValueError(
            f"{dtype}: onnxruntime's CPU kernels know no bfloat16, so the file could not be "
            "checked: use --dtype float32 or float16"
        )
    with torch.device("meta"):
        copy = GPT2Model(config)
    copy.load_state_dict(weights.state, assign=True)

    def fill(new: Path) -> None:
        _trace(copy.eval(), new / MODEL_FILE)
        raw = _foreign_config(config) or config.to_dict()
        (new / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            for name, text in tokenizer_files(
                tokenizer, config.context_size, config.vocab_size
            ).items():
                (new / name).write_text(text, encoding="utf-8")

    write_folder(job.folder, fill)
    written = job.folder / MODEL_FILE
    return Exported(written, "onnx", weights.notes, compare_onnx(job.model, written))


def _foreign_config(config: GPT2Config) -> dict[str, Any] | None:
    """图的输入输出照 optimum，配置也写成它认得的；deepnorm 没有折叠，不能自称 OPT。"""
    for family in (FAMILIES["gpt2"], FAMILIES["opt"]):
        if why_not(family, config) is None:
            return write_config(family, config)
    return None


def _trace(model: GPT2Model, path: Path) -> None:
    config, layers = model.config, model.config.n_layer
    rows, past, new = 2, 3, 4
    dtype = model.embed.wte.weight.dtype
    ids = torch.zeros(rows, new, dtype=torch.int64)
    mask = torch.ones(rows, past + new, dtype=torch.int64)
    positions = torch.arange(past, past + new).expand(rows, -1).contiguous()
    empty = torch.zeros(rows, config.kv_heads, past, config.head_dim, dtype=dtype)
    dynamic = torch.export.Dim.DYNAMIC
    both = {0: dynamic, 1: dynamic}
    # 求梯度的状态下 linear 走 F.linear，图里不会有只给 CPU 少数行用的写法。
    with torch.enable_grad(), _quiet():
        torch.onnx.export(
            Graph(model).eval(),
            (ids, mask, positions, [empty.clone() for _ in range(2 * layers)]),
            str(path),
            input_names=[
                "input_ids", "attention_mask", "position_ids",
                *past_names(layers, "past_key_values"),
            ],
            output_names=["logits", *past_names(layers, "present")],
            dynamic_shapes=(both, both, both, [{0: dynamic, 2: dynamic}] * (2 * layers)),
            dynamo=True,
            verbose=False,
        )  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """导出器逐个报告没有装的 torchvision 算子，与我们无关。"""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


class OnnxModel:
    """在 onnxruntime 里跑导出的图；缓存由调用者拿着，与 GPT2Model 一样。"""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self._past = [i for i in self.session.get_inputs() if i.name.startswith("past_key_values")]

    def __call__(
        self, ids: Tensor, mask: Tensor, past: Sequence[Any] | None = None
    ) -> tuple[Tensor, list[Any]]:
        """ids (B, T)、mask (B, P+T) -> logits (B, T, V) 与新的缓存。"""
        import numpy as np

        if past is None:
            kind = np.dtype(_NUMPY[self._past[0].type])
            past = [np.zeros((ids.shape[0], i.shape[1], 0, i.shape[3]), kind) for i in self._past]
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        feed = {
            "input_ids": ids.numpy(), "attention_mask": mask.numpy(),
            "position_ids": positions.numpy(),
            **{i.name: p for i, p in zip(self._past, past, strict=True)},
        }  # fmt: skip
        logits, *present = self.session.run(None, feed)
        return torch.from_numpy(logits), present

    def piecewise(self, ids: Tensor, mask: Tensor, prefill: int) -> Tensor:
        """先预填 prefill 个，其余逐个，拼起来的 logits (B, T, V)。"""
        logits, past = self(ids[:, :prefill], mask[:, :prefill])
        pieces = [logits]
        for t in range(prefill, ids.shape[1]):
            logits, past = self(ids[:, t : t + 1], mask[:, : t + 1], past)
            pieces.append(logits)
        return torch.cat(pieces, 1)


def compare_onnx(model: GPT2Model, path: Path) -> Comparison | str:
    """整段、带缓存逐个、左填充的批，三种都比，给出差得最多的。"""
    try:
        from onnxruntime import __version__
    except ImportError:
        return "onnxruntime is not installed: pip install 'gpt2-workbench[export]'"
    graph, ids = OnnxModel(path), sample_ids(model)
    whole, padded = torch.ones_like(ids), torch.ones_like(ids)
    padded[0, : ids.shape[1] // 3] = 0
    name = f"onnxruntime {__version__}"
    half = ids.shape[1] // 2
    found = [
        compare(model, lambda x: graph(x, whole)[0], f"{name}, one pass", ids),
        compare(model, lambda x: graph.piecewise(x, whole, half), f"{name}, cached steps", ids),
        compare(
            model, lambda x: graph.piecewise(x, padded, half), f"{name}, left padding", ids, padded
        ),
    ]
    # NaN 与谁比都不大，所以先看有没有不同的
    return next((one for one in found if not one.same), max(found, key=lambda one: one.difference))
