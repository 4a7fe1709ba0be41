"""配置字段：怎样检查，以及写在字段旁边的事实（Mark）。各配置类共用，不需要 torch。

dropout: Annotated[float, Doc("..."), Mark.FREE] = 0.1
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


class Mark(Enum):
    """字段的事实，写在注解里；谁要问就用 marked 问，不另列名单。

    FREE    模型的：既不改变权重的形状，也不改变它们的意思。读取、续训、init_from 时都可以不同。
    SILENT  训练的：不影响训练出的权重，续训时变了不必提。
    ASIDE   训练的：比较几次训练时不算作差别。
    """

    FREE = "free"
    SILENT = "silent"
    ASIDE = "aside"


@cache
def marked(kind: type, mark: Mark) -> frozenset[str]:
    """kind（数据类）里带着 mark 的字段；嵌套的写成带点的名字，如 "moe.dispatch"。"""
    found: set[str] = set()
    for name, hint in get_type_hints(kind, include_extras=True).items():
        inner, *facts = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if mark in facts:
            found.add(name)
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            found |= {f"{name}.{deeper}" for deeper in marked(inner, mark)}
    return frozenset(found)


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


def differing(one: Any, other: Any) -> list[str]:
    """两个同类的配置里值不同的字段，名字同 marked。"""
    found = []
    for field in dataclasses.fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if dataclasses.is_dataclass(mine):
            found += [f"{field.name}.{deeper}" for deeper in differing(mine, theirs)]
        elif mine != theirs:
            found.append(field.name)
    return found


def check_bounds(config: Any, bounds: Mapping[str, tuple[int, int]], prefix: str = "") -> None:
    """bounds {字段: (下界, 上界)}，都含在内；None 不查。

    Raises:
        ValueError: 越界。
    """
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{prefix}{name}={value} must be between {low} and {high}")


def short(value: Any) -> str:
    """报错里的值，太长就截断。"""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def normalise_types(config: Any, prefix: str = "") -> None:
    """核对并就地写成注解的类型：YAML 与 JSON 会送来错的；int 可作 float，bool 不可作 int。

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
        elif get_origin(kind) is dict:
            pairs = _checked(value, (dict,), name).items()
            of_key, of_value = get_args(kind)
            entries = {
                _checked(k, (of_key,), name): _checked(v, (of_value,), name) for k, v in pairs
            }
            object.__setattr__(config, field, entries)
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
