"""请求的字段与边界：严格的类型，不认识的字段点出最近的名字。

OpenAI 有而这里没有的字段，写着默认值时照收，否则说不支持：客户端常把默认值一并送来。
"""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.generation.config import MIN_PENALTY
from app.serving.api.errors import ApiError, wrong

MAX_PROMPTS, MAX_CHARS, MAX_STOPS, MAX_BIAS = 64, 64 * 1024, 16, 1024
MAX_LAYERS = 4096
_DEPTH = 32
# 这里没有的字段 -> 与没有给相同的值。
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""), "tools": (None, []), "tool_choice": (None, "none", "auto"),
    "functions": (None, []), "function_call": (None, "none", "auto"), "audio": (None,),
    "response_format": (None, {"type": "text"}), "store": (None, False), "metadata": (None, {}),
    "modalities": (None, ["text"]), "parallel_tool_calls": (None, True, False),
    "service_tier": (None, "auto", "default"), "reasoning_effort": (None,), "prediction": (None,),
    "web_search_options": (None,), "verbosity": (None,), "best_of": (None, 1),
}  # fmt: skip

Seed = Field(None, ge=-(2**63), lt=2**63)


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str | None = Field(None, max_length=256)


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None


class Sampling(_Body):
    """两个生成的路由共有的。"""

    n: int | None = Field(None, ge=1, le=16)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=10_000_000)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=MIN_PENALTY, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(None, max_length=MAX_BIAS)
    seed: int | None = Seed
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_STOPS)
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0, le=10_000_000)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256)
    return_token_ids: bool | None = None
    cache_prompt: bool | None = None


class CompletionBody(Sampling):
    prompt: str | list[str] | list[int] | list[list[int]] | None = None
    max_tokens: int | None = Field(None, ge=0, le=10_000_000)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    details: int | None = Field(None, ge=0, le=20)
    truncate_prompt_tokens: int | None = Field(None, ge=1, le=10_000_000)


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    role: str = Field(max_length=32)
    content: str = Field(max_length=MAX_CHARS)
    name: str | None = Field(None, max_length=64)


class ChatBody(Sampling):
    messages: list[Message] = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(None, ge=1, le=10_000_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=10_000_000)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)


class TokenizeBody(_Body):
    """vLLM 叫 prompt，llama-server 叫 content。"""

    prompt: str | None = Field(None, max_length=MAX_CHARS)
    content: str | None = Field(None, max_length=MAX_CHARS)
    add_special_tokens: bool | None = None
    with_pieces: bool | None = None


class DetokenizeBody(_Body):
    tokens: list[int] = Field(max_length=MAX_CHARS)
    with_pieces: bool | None = None


class InspectBody(_Body):
    prompt: str | list[int]
    top: int | None = Field(None, ge=0, le=20)
    attention: list[int] | None = Field(None, max_length=4)
    patterns: list[int] | None = Field(None, max_length=MAX_LAYERS)
    lens: bool | None = None
    norms: bool | None = None
    routing: bool | None = None
    next_logits: bool | None = None
    heads: bool | None = None


class HistoryBody(_Body):
    prompt: str | list[int]
    steps: list[int] | None = Field(None, min_length=1, max_length=50)
    heads: bool | None = None


T = TypeVar("T", bound=BaseModel)


def parse(raw: bytes, kind: type[T]) -> T:
    """
    Raises:
        ApiError: 400；message 里没有用户写的值。
    """
    try:
        data = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError:
        raise wrong(None, "the body is not valid JSON in UTF-8", "invalid_json") from None
    if not isinstance(data, dict):
        raise wrong(None, "the body must be a JSON object", "invalid_json")
    if _depth(data) > _DEPTH:
        raise wrong(None, f"the body is nested more than {_DEPTH} deep", "invalid_json")
    _check_names(data, kind)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        place = [str(part) for part in first["loc"] if part in kind.model_fields or
                 isinstance(part, int)]  # fmt: skip
        param = ".".join(place) or None
        raise wrong(param, f"{param or 'the body'}: {first['msg']}") from None


def schema_of(kind: type[BaseModel]) -> dict[str, Any]:
    """OpenAPI 里正文的形状；正文由 parse 读，框架不知道。"""
    content = {"application/json": {"schema": kind.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


def _check_names(data: dict[str, Any], kind: type[BaseModel]) -> None:
    known = list(kind.model_fields)
    for name in list(data):
        if name in known:
            continue
        if name in _UNSUPPORTED:
            if not any(data[name] == v and type(data[name]) is type(v) for v in _UNSUPPORTED[name]):
                message = f"{name} is not supported here: leave it out"
                raise wrong(name, message, "unsupported_parameter")
            del data[name]
            continue
        near = difflib.get_close_matches(name[:64], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(known)}"
        raise wrong(near[0] if near else None, f"unknown field: {hint}", "unknown_parameter")


def _depth(data: Any) -> int:
    """嵌套几层；一层层地看，不递归。"""
    level, layer = 0, [data]
    while layer and level <= _DEPTH:
        level += 1
        layer = [
            inner
            for each in layer
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
    return level


def not_found(name: str) -> ApiError:
    return ApiError(404, "model_not_found", f"no such {name}: GET /v1/models lists them")
