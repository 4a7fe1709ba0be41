"""引擎收什么、还什么。不依赖 torch。"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from app.generation.config import SamplingConfig

# 为什么没有写完：引擎坏了、它太忙、到了时限、它在关门。
Failure = Literal["internal", "full", "deadline", "closing"]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """一段要写的文字；全部边界在 api 里查过，引擎只再查放不放得下。

    Attributes:
        seed: 这一段自己的随机流；同一提示与种子在任何时候都给出同样的文字。
        logprobs: 每个词元另给几个最可能的；None = 不要概率。details: 还要名次与熵。
        score_prompt: 提示的每个词元也要概率；那就从头算，不借别人的前缀。
        leader: 同一提示的几段里，等第几段先读完提示再抄它的；None = 自己读。
        space: 只在同一个名字空间里借前缀：别人的钥匙不该测得出我问过什么（CVE-2025-46570）。
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    min_tokens: int = 0
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    logprobs: int | None = None
    details: bool = False
    score_prompt: bool = False
    leader: int | None = None
    cache_prompt: bool = True
    space: str = ""


@dataclass(frozen=True)
class Order:
    """一次请求：同时要的几段。wait_until、until：单调钟，排队与写完的时限。"""

    id: int
    asks: tuple[Ask, ...]
    wait_until: float = float("inf")
    until: float = float("inf")


@dataclass(frozen=True)
class Scored:
    """一个词元与它的概率。

    Attributes:
        at: 它的文字在这段新文字里从第几个字符起。
        top: [(号, 对数概率)]。
        rank: 有几个比它更可能；entropy: 那时整个分布的熵，nat。没有要就是 None。
    """

    id: int
    at: int = 0
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None
    entropy: float | None = None


@dataclass(frozen=True)
class Event:
    """一步之后告诉问的人：第 index 段又有这些。

    Attributes:
        text: 已经定了的文字：没有半个字符，也不会是停止串的开头。
        tokens: 与文字同行的词元；各事件相接就是全部，一个不多一个不少。
        finish: "stop"、"length"，或 None 还没写完；reason：碰到的停止串或停止号。
        prompt: 第一个事件里，提示的概率（第一个词元没有）。
        cached: 提示里借来的词元数。
    """

    order: int
    index: int
    text: str = ""
    tokens: tuple[Scored, ...] = ()
    finish: Literal["stop", "length"] | None = None
    reason: str | int | None = None
    prompt: tuple[Scored, ...] = ()
    cached: int = 0
    failure: Failure | None = None

    @property
    def ended(self) -> bool:
        return self.finish is not None or self.failure is not None
