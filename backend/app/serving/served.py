"""一个供人用的模型：名字、分词器、引擎，以及它能装多少、为什么。"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from app.data.tokenizers import Tokenizer
from app.inspection.patterns import words
from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.cache.kv_dtype import KVDtype
from app.models.transformer.cache.row_cache import RowCache
from app.serving.drafting import Drafter, DraftModel, NGramDrafter
from app.serving.engine import Engine, Limits
from app.serving.flat_step import FlatStep, InvariantStep

MAX_ROWS, DEFAULT_ROWS = 64, 8


class ChatForm(Protocol):
    """对话怎样变成词元；source 是它的 Jinja，没有则 None。"""

    @property
    def source(self) -> str | None: ...

    def ids(self, messages: Sequence[Any], tokenizer: Tokenizer) -> list[int]: ...

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """分词器自己的之外，写到哪些算答完。"""


@dataclass(frozen=True)
class Served:
    """run: 它所在的训练文件夹；不在哪次训练里是 None。"""

    name: str
    engine: Engine
    tokenizer: Tokenizer
    fingerprint: str
    template: ChatForm | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    run: Path | None = None

    @property
    def context(self) -> int:
        return self.engine.context

    def facts(self) -> dict[str, Any]:
        """/props 里这个模型的一项。"""
        cache, limits, drafter = self.engine.flat.cache, self.engine.limits, self.engine.drafter
        return self.shape() | {
            "context": self.context,
            "vocab_size": self.engine.width,
            "run": None if self.run is None else self.run.name,
            "engine": self.working(),
            "rows": cache.rows,
            "kv_bytes": cache.nbytes,
            "speculate": "off" if drafter is None else drafter.name,
            "batch_invariant": isinstance(self.engine.flat, InvariantStep),
            "max_stall": limits.pace.max_stall,
            "step_seconds": [list(point) for point in self.engine.costs.points],
            "chat": self.template is not None,
            "system_fingerprint": self.fingerprint,
        }

    def shape(self) -> dict[str, Any]:
        """模型的形状；说的是它算什么，不是它在哪里。"""
        model, config = self.engine.model, self.engine.model.config
        return {
            "layers": config.n_layer,
            "heads": config.n_head,
            "kv_heads": config.kv_heads,
            "width": config.n_embed,
            "parameters": model.num_parameters(),
            "norm": config.norm,
            "norm_type": config.norm_type,
            "final_norm": config.has_final_norm,
            "position": config.position,
            "activation": config.activation,
            "patterns": [words(pattern) for pattern in model.patterns],
            "experts": config.moe_num_experts,
            "experts_per_token": config.moe_top_k if config.moe_layers else 0,
            "moe_layers": list(config.moe_layers),
        }

    def working(self) -> dict[str, Any]:
        """引擎此刻与从开张起；秒数是单调钟的，两次之差除得出速度。"""
        engine, counts = self.engine, self.engine.counts
        return {
            "running": engine.running,
            "waiting": engine.waiting,
            "tokens_per_second": engine.tokens_per_second,
            "last_step_ms": 1000 * counts.last_step,
            "steps": counts.steps,
            "prompt_tokens": counts.prompt,
            "cached_tokens": counts.borrowed,
            "generated_tokens": counts.made,
            "drafted_tokens": counts.drafted,
            "accepted_tokens": counts.accepted,
            "seconds": time.monotonic(),
        }


def row_bytes(config: GPT2Config, kv_dtype: KVDtype, dtype: torch.dtype) -> int:
    """缓存的一行多少字节；不分配。"""
    return RowCache(config, 1, kv_dtype=kv_dtype, dtype=dtype, device="meta").nbytes


def rows_for(config: GPT2Config, memory: int, kv_dtype: KVDtype, dtype: torch.dtype) -> int:
    """memory 字节放得下几行。

    Raises:
        ValueError: 一行也放不下。
    """
    each = row_bytes(config, kv_dtype, dtype)
    if memory < each:
        raise ValueError(
            f"a row of context_size={config.context_size} takes {each} bytes of keys and values, "
            f"but there are {memory}: give a larger --kv-memory, or --kv-dtype int8"
        )
    return min(MAX_ROWS, memory // each)


def refusal(model: GPT2Model) -> str | None:
    """为什么不能供人用；能就 None。"""
    if model.config.context_size < 2:
        return f"context_size={model.config.context_size} leaves no room to write: use 2 or more"
    return None


def serve_model(
    name: str,
    model: GPT2Model,
    tokenizer: Tokenizer,
    *,
    rows: int = DEFAULT_ROWS,
    kv_dtype: KVDtype = None,
    limits: Limits | None = None,
    guess: Literal["off", "ngram"] | GPT2Model = "off",
    batch_invariant: bool = False,
) -> Served:
    """没有对话模板，也不属于哪次训练：那两样由调用者补上。

    Args:
        guess: 怎样猜；给一个小模型，它的分词器要与这个的相同，由调用者查。
        batch_invariant: 同样的请求连位也相同，见 flat_step.InvariantStep。

    Raises:
        ValueError: 行数不对，分词器不是它的，这个模型不能供人用，或做不到批不变。
    """
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"rows={rows} must be between 1 and {MAX_ROWS}")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{name}: the tokenizer has {tokenizer.vocab_size} ids but the model has "
            f"vocab_size={model.config.vocab_size}: the tokenizer belongs to another model"
        )
    reason = refusal(model)
    if reason is not None:
        raise ValueError(f"{name} cannot be served: {reason}")
    model.eval()
    kind = InvariantStep if batch_invariant else FlatStep
    flat = kind(model, _cache(model, rows, kv_dtype))
    drafter: Drafter | None = NGramDrafter() if guess == "ngram" else None
    if isinstance(guess, GPT2Model):
        if guess.config.context_size < model.config.context_size:
            raise ValueError(
                f"the draft model has context_size={guess.config.context_size} but {name} has "
                f"{model.config.context_size}: it could not follow to the end"
            )
        guess.eval()
        drafter = DraftModel(FlatStep(guess, _cache(guess, rows, None)), tokenizer.vocab_size)
    engine = Engine(flat, tokenizer, limits, drafter=drafter)
    return Served(name, engine, tokenizer, fingerprint(model, engine))


def _cache(model: GPT2Model, rows: int, kv_dtype: KVDtype) -> RowCache:
    dtype = model.embed.wte.weight.dtype
    return RowCache(model.config, rows, kv_dtype=kv_dtype, dtype=dtype, device=model.device)


def fingerprint(model: GPT2Model, engine: Engine) -> str:
    """相同的指纹下，相同的请求给出相同的文字（单精度下除了末位舍入造成的并列）。"""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(memoryview(value.cpu().contiguous().view(-1).view(torch.uint8).numpy()))
    digest.update(
        f"{torch.__version__} {torch.get_num_threads()} "
        f"{torch.backends.cpu.get_cpu_capability()} {engine.drafter is not None} "
        f"{type(engine.flat).__name__}".encode()
    )
    return "fp_" + digest.hexdigest()[:12]
