"""续写的设置：不依赖 torch，命令行可以直接用它。"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

from typing_extensions import Doc

from app.generation.overflow import Overflow, check_overflow_name
from app.generation.stopping import check_stop_strings
from app.models.transformer.cache.kv_dtype import KVDtype, check_kv_dtype

# 再小，logits 除以它就不是有限数；实际上这里已经是贪心。
MIN_TEMPERATURE, MIN_PENALTY = 1e-4, 1e-2


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """从 logits 到下一个词元的全部设置；默认是原样按模型的分布采样。

    Raises:
        ValueError: 值越界，点名字段、值与范围。
    """

    temperature: Annotated[float, Doc("0 = greedy; below 1 = safer, above 1 = wilder")] = 1.0
    top_k: Annotated[int | None, Doc("keep the k most likely tokens")] = None
    top_p: Annotated[
        float | None, Doc("keep the smallest set of tokens with this much probability")
    ] = None
    min_p: Annotated[
        float | None, Doc("drop tokens below this fraction of the likeliest one's probability")
    ] = None
    repetition_penalty: Annotated[
        float, Doc("above 1 makes tokens seen in prompt or text less likely (CTRL)")
    ] = 1.0

    def __post_init__(self) -> None:
        warm = f"0 (greedy) or at least {MIN_TEMPERATURE}, such as 0.8"
        low = MIN_TEMPERATURE if self.temperature else 0.0
        self._number("temperature", low, math.inf, warm)
        wanted = f"at least {MIN_PENALTY}, 1 = off"
        self._number("repetition_penalty", MIN_PENALTY, math.inf, wanted)
        if self.top_p is not None:
            self._number("top_p", 0.0, 1.0, "in (0, 1], None = off")
            if self.top_p == 0:
                raise ValueError("top_p=0 must be in (0, 1]; for greedy use temperature=0")
        if self.min_p is not None:
            self._number("min_p", 0.0, 1.0, "in [0, 1], None = off")
        if self.top_k is not None and (
            isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1
        ):
            raise ValueError(f"top_k={self.top_k!r} must be an integer of at least 1, None = off")

    def _number(self, name: str, low: float, high: float, wanted: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name}={value!r} must be {wanted}")
        if not (low <= value <= high and math.isfinite(value)):
            raise ValueError(f"{name}={value} must be {wanted}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True, kw_only=True)
class Options:
    """complete 的全部设置；不看模型与提示就能查的，造出来时就查完了。

    Attributes:
        stop_ids: 遇到就结束的词元，不算在结果里。
        stop_strings: 文本在它之前切断；要有分词器。
        overflow: 提示加新词元越过 context_size 时（后两种只给 position 为 rope 或 none 的模型）：
            "error" 在动工之前拒绝；
            "slide" 满了就留最后 context_size//2 个重算（见 window_start），与不用缓存算同一
            窗口相同；
            "extend" 位置照样数下去，与不用缓存算整段相同；每层图样都有界时内存不再增长；
            "sinks" 满了就丢掉缓存的中段（见 SinkContext），不重算，长度没有尽头。
        prefill_chunk: 提示每次喂入的列数，限制长提示的内存；None 为一次喂完。
        kv_dtype: "int8" = 缓存的键值存成 int8，有误差（benchmarks/results/int8_cache.md）。
        batch_size: 同时算的行数，不改变结果；None 为全部一起。

    Raises:
        ValueError: 值越界，点名字段、值与范围。
    """

    max_new_tokens: int
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    overflow: Overflow = "error"
    prefill_chunk: int | None = None
    kv_dtype: KVDtype = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for name, no_limit in (
            ("max_new_tokens", ""),
            ("prefill_chunk", ", or None for one piece"),
            ("batch_size", ", or None for all at once"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1{no_limit}")
        check_overflow_name(self.overflow)
        check_stop_strings(self.stop_strings)
        check_kv_dtype(self.kv_dtype)
