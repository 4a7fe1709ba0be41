"""图样的文字：`local(256) | global(16)` 与 Pattern 之间的往返。不需要 torch。

语法借 Python 的 ast（只解析，绝不求值）；`&` 比 `|` 紧，可用括号与关键字参数。
`causal & X` 就是 X，`causal | X` 就是 causal（因果性本是公共底色），代数在组合时已化简。
"""

from __future__ import annotations

import ast
import re
from dataclasses import MISSING, fields
from functools import lru_cache
from typing import Any

from ..settings.fields import nearest
from .atoms import Fixed, Global, Local, Longformer, Sinks, Strided
from .pattern import Causal, Pattern

_ATOMS: dict[str, Any] = {
    atom.name: atom for atom in (Causal, Local, Strided, Fixed, Global, Longformer, Sinks)
}
# 配置文件不可信：长度与括号的层数有限，解析才必定立刻结束。
_MAX_CHARS, _MAX_DEPTH = 512, 16
_EXAMPLE = "write it like 'local(256) | global(16)'"


def canonical(given: Any, most: int) -> str | tuple[str, ...] | None:
    """图样的标准写法：文字、Pattern 或至多 most 个的序列，变为可散列、可写进 JSON 的文字。"""
    if given is None:
        return None
    if not isinstance(given, list | tuple):
        return _text(given)
    if not given:
        raise ValueError("attention_pattern is an empty cycle: give a pattern, or None for causal")
    if len(given) > most:
        raise ValueError(
            f"attention_pattern has a cycle of {len(given)} patterns: more than "
            f"{most} layers are not allowed"
        )
    texts = tuple(_text(one) for one in given)
    return texts[0] if len(texts) == 1 else texts


def _text(given: Any) -> str:
    return str(parse(str(given) if isinstance(given, Pattern) else given))


def parse(text: str) -> Pattern:
    """文字到图样；对每个用运算符组成的图样 p，parse(str(p)) == p。

    Raises:
        ValueError: 不是图样的文字、未知的原子（给出最近的名字）、参数不对（给出写法），
            或太长、太深。
    """
    if not isinstance(text, str):
        raise ValueError(f"attention pattern {text!r} is not text: {_EXAMPLE}")
    if len(text) > _MAX_CHARS:
        raise ValueError(
            f"attention pattern {text[:40]!r}... has {len(text)} characters, "
            f"more than {_MAX_CHARS}: use a simpler one"
        )
    return _parse(" ".join(text.split()))


@lru_cache(maxsize=256)
def _parse(text: str) -> Pattern:
    try:
        return _build(_tree(text))
    except ValueError as error:
        raise ValueError(f"attention pattern {text!r}: {error}") from None


def _tree(text: str) -> ast.expr:
    odd = re.search(r"[^\w (),=&|+-]", text, re.ASCII)
    if odd is not None:
        raise ValueError(f"unexpected character {odd[0]!r}: {_EXAMPLE}")
    number = re.search(r"\b\d\w*[A-Za-z]\w*", text, re.ASCII)
    if number is not None:
        raise ValueError(f"{number[0]!r} is not an integer: {_EXAMPLE}")
    depth = 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if depth > _MAX_DEPTH:
            raise ValueError(f"more than {_MAX_DEPTH} nested parentheses: use a simpler one")
    # global 是 Python 的关键字；给每个名字加一个字母，就没有名字是关键字。
    named = re.sub(r"\b[A-Za-z_]", r"x\g<0>", text)
    try:
        return ast.parse(named, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"is not a pattern: {_EXAMPLE}") from None


def _build(node: ast.expr) -> Pattern:
    match node:
        case ast.BinOp(left, ast.BitAnd(), right):
            return _build(left) & _build(right)
        case ast.BinOp(left, ast.BitOr(), right):
            return _build(left) | _build(right)
        case ast.Name(name):
            return _atom(name[1:], [], [])
        case ast.Call(ast.Name(name), args, keywords):
            return _atom(name[1:], args, keywords)
    raise ValueError(f"only atoms joined with & and | are allowed: {_EXAMPLE}")


def _atom(name: str, args: list[ast.expr], keywords: list[ast.keyword]) -> Pattern:
    if name not in _ATOMS:
        raise ValueError(f"unknown pattern {name!r}{nearest(name, _ATOMS)}")
    kind, signature = _ATOMS[name], signature_of(name)
    known = [field.name for field in fields(kind)]
    if len(args) > len(known):
        raise ValueError(f"{name} got {len(args)} arguments: write {signature}")
    values = {known[i]: _integer(node, name) for i, node in enumerate(args)}
    for keyword in keywords:
        key = (keyword.arg or "")[1:]
        if key not in known:
            raise ValueError(f"{name} has no argument {key!r}: write {signature}")
        if key in values:
            raise ValueError(f"{name} got {key!r} twice: write {signature}")
        values[key] = _integer(keyword.value, name)
    missing = [f.name for f in fields(kind) if f.name not in values and f.default is MISSING]
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}: write {signature}")
    return kind(**values)


def signature_of(name: str) -> str:
    """原子的写法，如 local(window, dilation=1)。"""
    parts = [
        f.name if f.default is MISSING else f"{f.name}={f.default}" for f in fields(_ATOMS[name])
    ]
    return f"{name}({', '.join(parts)})" if parts else name


def _integer(node: ast.expr, name: str) -> int:
    sign = 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        sign, node = -1, node.operand
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return sign * node.value
    raise ValueError(f"the arguments of {name} are integers: write {signature_of(name)}")
