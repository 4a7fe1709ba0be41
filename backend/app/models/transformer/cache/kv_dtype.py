"""缓存里键与值的精度：缓存、生成、估算与命令行都叫它 kv_dtype。不依赖 torch。"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, TypeVar, cast, get_args

KVDtype = Literal["int8"] | None

_Call = TypeVar("_Call", bound=Callable[..., Any])


def check_kv_dtype(value: object) -> None:
    """
    Raises:
        ValueError: 没有这种精度。
    """
    known = [None, *get_args(get_args(KVDtype)[0])]
    if value not in known:
        raise ValueError(f"kv_dtype={value!r} is not one of {known}")


def renamed_quantize(call: _Call) -> _Call:
    """旧的关键字 quantize 再认一个版本，并提醒。

    Raises:
        ValueError: 新旧两个名字都给了。
    """

    @wraps(call)
    def renamed(*args: Any, **options: Any) -> Any:
        if "quantize" in options:
            old = options.pop("quantize")
            if "kv_dtype" in options:
                raise ValueError(
                    f"kv_dtype={options['kv_dtype']!r} and its old name quantize={old!r} are both "
                    "given: leave quantize out"
                )
            warnings.warn(
                f"quantize={old!r} is now called kv_dtype={old!r}; the old name goes away in the "
                "next version",
                FutureWarning,  # DeprecationWarning 默认不显示
                stacklevel=2,
            )
            options["kv_dtype"] = old
        return call(*args, **options)

    return cast(_Call, renamed)
