"""录下来的一步与前向相同；录制器换成只重放算子的假图：Python 的数会像在真图里一样冻住。"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from app.generation import graph_step
from app.generation.graph_step import GraphStep, choose_graph
from app.models.transformer import GPT2Model, KVCache
from app.models.transformer.config import MoEConfig
from app.models.transformer.visibility import inputs

from ..models.helpers import VARIANTS, tiny_model, tokens
from ..syncs import counted
from .helpers import new_tokens

CASES = {name: VARIANTS[name] for name in ("pre", "keel", "grouped", "local+global", "rope")}
CASES["experts"] = {"moe_num_experts": 4, "moe": MoEConfig(dispatch="reference")}


def record_operators(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """算子与当时的常数录成一张表，张量按内存记住：这就是 CUDA 图，只是慢。"""
    with torch.inference_mode(False), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "readable", lambda tensor: False)
        graph = make_fx(run)()

    def replay() -> Tensor:
        with torch.no_grad():
            return graph()

    return replay


@pytest.fixture(autouse=True)
def _small_and_free_of_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_step, "LEAST_KEYS", 4)
    graph_step._agrees.clear()


def filled(model: GPT2Model, rows: int, **options: object) -> list[KVCache]:
    ids = tokens(rows, 5)
    caches = [model.new_cache(rows, ring=False, **options) for _ in range(2)]
    for cache in caches:
        # 没有写过的槽里是垃圾。
        for pair in cache.stores:
            for store in pair:
                for part in store.parts:
                    part.fill_(torch.nan if part.is_floating_point() else 77)
        with torch.no_grad():
            model(ids, cache=cache, use_cache=True, logits_to_keep=1)
    return caches


def plain(model: GPT2Model, chosen: Tensor, cache: KVCache) -> Tensor:
    with torch.no_grad():
        return model(chosen[:, None], cache=cache, use_cache=True, logits_to_keep=1)["logits"][
            :, -1
        ]


def step_of(model: GPT2Model) -> Callable[[Tensor, KVCache], Tensor]:
    step = GraphStep(model, record_operators)
    # 造在推理模式里的张量，假图不能就地改。
    return lambda chosen, cache: GraphStep.__call__.__wrapped__(step, chosen, cache)  # type: ignore[attr-defined]


EVERYDAY = ("rope", "local+global")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in EVERYDAY else pytest.mark.slow) for n in CASES]
)
def test_a_recorded_step_is_the_forward(name: str) -> None:
    model = tiny_model(torch.float64, **CASES[name])
    slow, fast = filled(model, 2)
    step = step_of(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        # 走过 4、8、16 三种宽度。
        for _ in range(14):
            chosen = tokens(2)
            wanted = plain(model, chosen, slow)
            torch.testing.assert_close(step(chosen, fast), wanted, rtol=0.0, atol=1e-12)
    assert slow.uniform == fast.uniform == 19
    for (a, _), (b, _) in zip(slow.stores, fast.stores, strict=True):
        torch.testing.assert_close(a.read(slice(19)), b.read(slice(19)), rtol=0.0, atol=1e-12)


def test_int8_keys_rollback_and_fewer_rows() -> None:
    model = tiny_model(torch.float32, norm="pre")
    slow, fast = filled(model, 3, kv_dtype="int8")
    step = step_of(model)
    order = {6: [2, 0, 1], 8: [1, 0]}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for at in range(10):
            if at == 3:
                for cache in (slow, fast):
                    cache.truncate(4)
            if at in order:
                # 换了内存：行数一样也要另录。
                for cache in (slow, fast):
                    cache.reorder(torch.tensor(order[at]))
            chosen = tokens(slow.batch_size)
            wanted = plain(model, chosen, slow)
            torch.testing.assert_close(step(chosen, fast), wanted, rtol=0.0, atol=1e-4)


def test_one_that_differs_or_fails_is_said_and_the_forward_is_taken() -> None:
    def wrong(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: run() + 1.0

    def failing(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    for record, said in (
        (wrong, "differs from the model's forward by 1.0e"),
        (failing, "capturing"),
    ):
        model = tiny_model(torch.float32)
        slow, fast = filled(model, 1)
        step = GraphStep(model, record)
        assert step.takes(fast)
        chosen = tokens(1)
        with pytest.warns(UserWarning, match=said), torch.inference_mode():
            found = step(chosen, fast)
        assert torch.equal(found, plain(model, chosen, slow)) and not step.takes(fast)
        assert "failed or differed" in choose_graph(on_card(model), 99)[1]


def on_card(model: GPT2Model) -> GPT2Model:
    """看来像在显卡上。"""
    kind = type("OnCard", (type(model),), {"device": property(lambda self: torch.device("cuda"))})
    model.__class__ = kind
    return model


def test_why_it_is_not_recorded() -> None:
    assert choose_graph(tiny_model(torch.float32), 99)[1] == "there are none on cpu"
    model = on_card(tiny_model(torch.float32).eval())
    assert choose_graph(model, 99)[0]
    assert "31 tokens are too few" in choose_graph(model, 31)[1]
    assert "training" in choose_graph(model.train(), 99)[1]
    experts = on_card(tiny_model(torch.float32, moe_num_experts=4).eval())
    assert "experts wait for their counts" in choose_graph(experts, 99)[1]
    model.eval().h["0"].register_forward_hook(lambda *_: None)
    assert "h.0 has hooks" in choose_graph(model, 99)[1]
    ring = tiny_model(torch.float32, attention_pattern="local(3)")
    assert not GraphStep(ring).takes(ring.new_cache(1, max_chunk=1))


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9, "repetition_penalty": 1.3}],
    ids=["greedy", "top-k", "top-p"],
)
def test_a_decoding_step_waits_for_the_device_once(settings: dict[str, float]) -> None:
    from app.generation.config import SamplingConfig

    model, steps = tiny_model(torch.float32), 6
    wishes = {"max_new_tokens": steps, "sampling": SamplingConfig(**settings), "seeds": [1, 2]}
    prompts = [[1, 2, 3], [4, 5, 6]]
    wanted = new_tokens(model, prompts, **wishes)
    with counted() as syncs:
        found = new_tokens(model, prompts, **wishes)
    assert found == wanted
    # 起头的几次不随步数而变。
    assert syncs.seen.count("tolist") == steps and len(syncs.seen) <= steps + 4, syncs.seen
