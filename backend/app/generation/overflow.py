"""提示加新词元越过 context_size 时怎么办：有哪些办法，各要怎样的模型。不依赖 torch。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from app.models.transformer.config import GPT2Config

Overflow = Literal["error", "slide", "extend", "sinks"]

# 开头的几个键吸走了多余的注意力，丢掉它们模型就垮。Llama-2-7B 留 0、1、2、4 个时的困惑度：
# 3359.95、11.88、10.51、9.59；再多也没有多少好处（Xiao et al. 2023, arXiv:2309.17453）。
SINKS = 4


def kept_last(context_size: int) -> int:
    """sinks：缓存满了留下的最近的键。"""
    return context_size // 2


def refusal(overflow: Overflow, config: GPT2Config) -> str | None:
    """这个模型为什么不能用这个办法；能用则 None。"""
    if overflow not in ("extend", "sinks"):
        return None
    size = config.context_size
    if config.position == "learned":
        return (
            f"overflow={overflow!r} needs position='rope' or 'none', but this model has "
            f"position='learned', trained for context_size={size} positions: use overflow='slide'"
        )
    if overflow == "sinks" and SINKS + kept_last(size) >= size:
        return (
            f"overflow='sinks' keeps the first {SINKS} and the last {kept_last(size)} keys, which "
            f"leaves no room in context_size={size}: use overflow='extend' or 'slide'"
        )
    return None


def usable(config: GPT2Config) -> list[Overflow]:
    """这个模型能用的办法，除了 error。"""
    return [mode for mode in get_args(Overflow) if mode != "error" and not refusal(mode, config)]


def check_overflow_name(overflow: str) -> None:
    """
    Raises:
        ValueError: 没有这个办法。
    """
    if overflow not in get_args(Overflow):
        raise ValueError(f"overflow={overflow!r} is not one of {list(get_args(Overflow))}")


def check_prompts(
    prompts: Sequence[Sequence[int]],
    names: Sequence[str],
    width: int,
    config: GPT2Config,
    new: int,
    overflow: Overflow,
) -> None:
    """complete 对提示的检查，在动工之前。

    Args:
        names: 报错时怎样称呼各个提示。
        width: 可用的词元号数。
        new: 最多的新词元数。

    Raises:
        ValueError: 空的提示、width 之外的词元，放不下，或这个模型不能用 overflow。
    """
    reason = refusal(overflow, config)
    if reason:
        raise ValueError(reason)
    if not prompts:
        raise ValueError("no prompts: give at least one")
    size = config.context_size
    for name, prompt in zip(names, prompts, strict=True):
        if len(prompt) == 0:
            raise ValueError(f"{name} is empty: start from a token, such as the document separator")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= width:
            raise ValueError(
                f"{name} holds token id {low if low < 0 else high}, outside the {width} ids "
                "of the vocabulary: was it encoded with another tokenizer?"
            )
        if overflow == "error" and len(prompt) + new > size:
            modes = " or ".join(map(repr, usable(config)))
            raise ValueError(
                f"{name} has {len(prompt)} tokens and max_new_tokens={new}: together "
                f"{len(prompt) + new}, beyond context_size={size}: ask for at most "
                f"{max(0, size - len(prompt))} new tokens, shorten the prompt, "
                f"or use overflow={modes}"
            )
