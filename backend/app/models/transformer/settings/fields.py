"""配置字段的检查：类型对照注解，名字给出最近的；各配置类共用。不需要 torch。"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def nearest(name: str, known: Iterable[str]) -> str:
    """报错的尾巴：最接近的合法名字，没有就列出全部。"""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {close[0]!r}?" if close else f": known are {', '.join(known)}"


def from_mapping(kind: type[T], data: Any, where: str) -> T:
    """由映射构造一个配置类；where 是报错时键之前的部分。

    Raises:
        ValueError: 不是映射、未知的键（给出最近的名字），或坏值。
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where}={data!r} must be a mapping of options")
    known = list(get_type_hints(kind))
    for key in data:
        if key not in known:
            raise ValueError(f"unknown model option '{where}.{key}'{nearest(str(key), known)}")
    return kind(**data)


def check_types(config: Any, prefix: str = "") -> None:
    """YAML 与 JSON 会送来错类型，数据类自己不查；int 可作 float，bool 不可作 int。

    prefix 是报错时字段名之前的部分，如 "rope."。

    Raises:
        ValueError: 类型不对、不在所列的值之中、长度不对，或浮点数不是有限的。
    """
    for field, kind in get_type_hints(type(config)).items():
        value, name = getattr(config, field), prefix + field
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                raise ValueError(f"{name}={value!r} is not one of {list(get_args(kind))}")
        elif get_origin(kind) is tuple:
            kinds = get_args(kind)
            if isinstance(value, tuple) and kinds[-1] is Ellipsis:
                kinds = kinds[:1] * len(value)
            if not isinstance(value, tuple) or len(value) != len(kinds):
                raise ValueError(f"{name}={value!r} must have {len(kinds)} values")
            fixed = tuple(_checked(v, (k,), name) for v, k in zip(value, kinds, strict=True))
            object.__setattr__(config, field, fixed)
        else:
            kinds = get_args(kind) or (kind,)
            object.__setattr__(config, field, _checked(value, kinds, name))


def _checked(value: Any, kinds: tuple[Any, ...], name: str) -> Any:
    allowed = [get_origin(kind) or kind for kind in kinds]
    if float in allowed and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            raise ValueError(f"{name} is an integer too large for a float") from None
    if type(value) not in allowed:
        names = " or ".join("None" if t is type(None) else t.__name__ for t in allowed)
        raise ValueError(f"{name}={value!r} has type {type(value).__name__}, expected {names}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a finite number")
    return value
