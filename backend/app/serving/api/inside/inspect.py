"""POST /v1/inspect 的请求：查边界，换成要做的活。"""

from __future__ import annotations

from app.inspection.heads import plain_ids, repeated
from app.inspection.look import Look, Wish, look
from app.inspection.slices import Steps, dearest
from app.serving.api.errors import wrong
from app.serving.api.fields import InspectBody
from app.serving.api.inside.answer import Inspection
from app.serving.api.inside.packed import check_size
from app.serving.api.orders import read_prompt
from app.serving.served import Served
from app.serving.tasks import price, rows_within

MOST_TOKENS, MOST_LAYERS, _TOP = 256, 4, 10
# lens 要 (N+1) x T x V x C 次乘加：一百二十四兆参数的模型 64 个词元是 3.2e10，两个核上约两秒。
_LENS_WORK, _LENS_TOKENS = 3.3e10, 64


def lens_tokens(served: Served) -> int:
    """lens 至多几个词元：大模型 64，小模型到 256。"""
    config = served.engine.model.config
    each = (config.n_layer + 1) * served.engine.width * config.n_embed
    most = max(_LENS_TOKENS, min(MOST_TOKENS, int(_LENS_WORK / each)))
    return min(most, served.context)


def limits(served: Served) -> dict[str, int]:
    """/props 里的：网页不必猜。"""
    return {
        "tokens": min(MOST_TOKENS, served.context),
        "lens_tokens": lens_tokens(served),
        "attention_layers": MOST_LAYERS,
    }


def read_inspection(body: InspectBody, served: Served) -> Inspection:
    """
    Raises:
        ApiError: 400，点名字段与边界。
    """
    config = served.engine.model.config
    ids = read_tokens(body.prompt, served)
    if body.routing and not config.moe_layers:
        raise wrong("routing", "routing: this model has no experts, so no token is routed")
    if body.lens and len(ids) > lens_tokens(served):
        raise wrong(
            "lens",
            f"lens takes at most {lens_tokens(served)} tokens of this model and the prompt has "
            f"{len(ids)}: shorten it, or leave lens out",
        )
    if body.heads:
        check_heads(served)
    asked = Inspection(
        served=served,
        ids=ids,
        top=_TOP if body.top is None else body.top,
        attention=_layers("attention", body.attention, config.n_layer),
        patterns=_layers("patterns", body.patterns, config.n_layer),
        routing=config.moe_layers if body.routing else (),
        lens=bool(body.lens),
        norms=bool(body.norms),
        next_logits=bool(body.next_logits),
        heads=bool(body.heads),
    )
    check_size(asked.bytes())
    return asked


def read_tokens(prompt: str | list[int], served: Served) -> tuple[int, ...]:
    """
    Raises:
        ApiError: 400，空的、太长，或一片就要超过 max_stall。
    """
    ids = read_prompt(prompt, served).ids
    most = min(MOST_TOKENS, served.context)
    if not 1 <= len(ids) <= most:
        code = "context_length_exceeded" if ids else "invalid_value"
        raise wrong("prompt", f"the prompt has {len(ids)} tokens: give 1 to {most}", code)
    _check_stall("prompt", len(ids), served)
    return ids


def _check_stall(name: str, tokens: int, served: Served) -> None:
    """
    Raises:
        ApiError: 400，一片就要超过 max_stall。
    """
    engine, config = served.engine, served.engine.model.config
    stall = engine.limits.pace.max_stall
    if price(engine.costs, config, dearest(config, tokens)) > stall:
        raise wrong(
            name,
            f"{name}: one layer of {tokens} tokens would hold up the other texts for more than "
            f"max_stall={stall} s on this machine: ask for less, or raise --max-stall",
            "too_slow_here",
        )


def check_heads(served: Served) -> None:
    """
    Raises:
        ApiError: 400，放不下重复的一段，或一片就要超过 max_stall。
    """
    try:
        ids = repeated(served.context, usable(served))
    except ValueError as error:
        raise wrong("heads", str(error)) from None
    _check_stall("heads", len(ids), served)


def steps_of(asked: Inspection) -> Steps[Look]:
    engine = asked.served.engine
    config, stall = engine.model.config, engine.limits.pace.max_stall
    wish = Wish(
        width=engine.width,
        maps=asked.attention,
        cells=tuple({*asked.attention, *asked.patterns}),
        routing=asked.routing,
        lens=asked.lens,
        norms=asked.norms,
        next=asked.next_logits or asked.top > 0,
        heads=tuple(usable(asked.served)) if asked.heads else (),
        rows=rows_within(engine.costs, config, engine.width * config.n_embed, stall, MOST_TOKENS),
    )
    return look(engine.model, asked.ids, wish)


def usable(served: Served) -> list[int]:
    return plain_ids(served.tokenizer, served.engine.width)


def _layers(name: str, given: list[int] | None, count: int) -> tuple[int, ...]:
    for layer in given or []:
        if not 0 <= layer < count:
            raise wrong(name, f"{name} names a layer that is not there: 0 to {count - 1} are")
    if len(set(given or [])) < len(given or []):
        raise wrong(name, f"{name} names a layer twice")
    return tuple(given or ())
