"""lm-evaluation-harness 里的 "gpt2-workbench" 模型：直接跑主干，不经过 transformers。

lm-eval 只认它自己模块里登记过的名字，没有插件入口，所以由这个模块登记之后再进它的命令行：

    python -m app.interop.lm_eval --model gpt2-workbench --model_args path=runs/mine \
        --tasks my_task --include_path tasks/

续文的切法与打分用 evaluation/tasks.py 的，所以与 `gpt2 eval --task` 逐题相同。
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(
        "app.interop.lm_eval needs lm-eval: pip install 'gpt2-workbench[eval]'"
    ) from error

from app.adapters.load import open_model
from app.common.console import tolerant_output
from app.data.tokenizers import Tokenizer, load_tokenizer
from app.evaluation.scoring import score_rows
from app.evaluation.tasks import Item, encode_request, score_items
from app.generation.config import Options, SamplingConfig
from app.generation.generate import complete
from app.models.transformer import GPT2Model
from app.training.machine.runtime import open_device
from app.training.saving.checkpoint import resolve_checkpoint

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("gpt2-workbench")
class WorkbenchLM(LM):
    """
    Args:
        path: 训练文件夹（取最新的检查点）、RUN/best、一个检查点，或带分词器的模型文件夹。
        batch_size: 一次前向的请求数，不改变结果。
        max_gen_toks: 任务没有说时，续写多少个词元。
    """

    def __init__(
        self,
        path: str,
        batch_size: int | str | None = 8,
        max_batch_size: int | None = None,
        device: str | None = "cpu",
        max_gen_toks: int = 256,
    ) -> None:
        super().__init__()
        if batch_size is not None and not (str(batch_size).isdigit() and int(batch_size)):
            raise ValueError(
                f"batch_size={batch_size!r} must be a number of at least 1: nothing is probed here"
            )
        folder = resolve_checkpoint(path)
        self._start(
            open_model(folder, _device(device)),
            load_tokenizer(folder),
            int(batch_size or 8),
            int(max_gen_toks),
        )
        self._name = str(Path(path))

    @classmethod
    def of(
        cls, model: GPT2Model, tokenizer: Tokenizer, batch_size: int = 8, max_gen_toks: int = 256
    ) -> WorkbenchLM:
        """已在内存里的模型，给 lm_eval.simple_evaluate(model=...)。"""
        lm = cls.__new__(cls)
        LM.__init__(lm)
        lm._start(model, tokenizer, batch_size, max_gen_toks)
        lm._name = type(model).__name__
        return lm

    def _start(
        self, model: GPT2Model, tokenizer: Tokenizer, batch_size: int, max_gen_toks: int
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.batch_size, self.max_gen_toks = batch_size, max_gen_toks
        self._device = model.device

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.fingerprint()

    def get_model_info(self) -> dict[str, Any]:
        return {"model": self._name, "num_parameters": self.model.num_parameters()}

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """每个请求 (上文, 续文) 的 (对数似然之和, 续文是否处处最可能)。

        Raises:
            ValueError: 续文本身就放不进上下文，或有词表之外的字符；点名请求的序号。
        """
        items = []
        for number, request in enumerate(requests, start=1):
            context, rest = request.args
            before = context.rstrip()
            encoded = encode_request(
                self.tokenizer, before, context[len(before) :] + rest,
                self.model.config.context_size, f"request {number}",
            )  # fmt: skip
            items.append(Item((encoded,), (rest,), 0))
        scores = score_items(self.model, items, self.batch_size, lambda tokens: None)
        return [(-one.nats[0], one.greedy[0]) for block in scores for one in block]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """整篇文字的对数似然；放不进上下文的，按 lm-eval 的窗口切开，每个词元恰好一次。"""
        context = self.model.config.context_size
        windows = []
        for number, request in enumerate(requests):
            tokens = self.tokenizer.encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.tokenizer.boundary_id, context, 1):
                before, scored = make_disjoint_window(pair)
                windows.append((number, np.array(before + scored, dtype=np.int64), len(before)))
        totals: list[list[float]] = [[] for _ in requests]
        remaining = iter(windows)
        while batch := list(islice(remaining, self.batch_size)):
            scored_rows = score_rows(self.model, [w[1] for w in batch], [w[2] for w in batch])
            for (number, _, _), one in zip(batch, scored_rows, strict=True):
                totals[number].append(math.fsum(one.nats))
        return [-math.fsum(nats) for nats in totals]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """续写到 until 里的任一串为止（不含它），或遇到文档分隔符。

        Raises:
            ValueError: 任务给了这里没有的生成选项。
        """
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        given = normalize_gen_kwargs(options, self.max_gen_toks)
        until, most = given.pop("until", []), int(given.pop("max_gen_toks"))
        if not given.pop("do_sample", False):
            given["temperature"] = 0.0
        unknown = sorted(given.keys() - set(_SAMPLING))
        if unknown:
            raise ValueError(f"generation options {unknown} are not known: use {_SAMPLING}")
        room = self.model.config.context_size - most
        if room < 1:
            raise ValueError(
                f"max_gen_toks={most} leaves no room in context_size="
                f"{self.model.config.context_size}: use a smaller max_gen_toks"
            )
        prompt = self.tokenizer.encode_prompt(context)
        chosen = Options(
            max_new_tokens=most,
            sampling=SamplingConfig(**given),
            stop_ids=tuple(self.tokenizer.stop_ids),
            stop_strings=tuple(text for text in until if text),
        )
        done = complete(self.model, [prompt[-room:]], chosen, tokenizer=self.tokenizer)
        text = done[0].text
        assert text is not None
        return text


def _device(name: str | None) -> torch.device:
    """lm-eval 的命令行不说设备时给 cuda:0；没有 CUDA 就用 CPU，并说出来（它的 hf 模型也这样）。"""
    if name is not None and name.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger(__name__).warning("device=%s but there is no CUDA here: using cpu", name)
        name = "cpu"
    return open_device(name or "cpu")


def main() -> None:
    """lm-eval 的命令行，多认得一个 --model gpt2-workbench。"""
    tolerant_output()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
