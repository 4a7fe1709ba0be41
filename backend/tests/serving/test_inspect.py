"""POST /v1/inspect：页上的数就是模型的数；坏的请求一句话；看的时候别人的文字不变、也不久等。"""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.cli.commands.serve import parse
from app.inspection.slices import Slice
from app.serving.api import fields
from app.serving.api.app import Address
from app.serving.api.errors import ApiError
from app.serving.api.fields import InspectBody
from app.serving.api.inside import packed, routes
from app.serving.api.inside.inspect import read_inspection
from app.serving.engine import Limits
from app.serving.schedule import Costs, Pace
from app.serving.served import Served, serve_model
from tests.quantization.helpers import SCHEMES, quantized
from tests.serving.conftest import Running, serving, tiny
from tests.serving.helpers import BYTES, byte_model, make_engine
from tests.serving.inside import inspect, unpack

TEXT = "look inside, look"


def test_everything_at_once_has_the_shapes_of_the_contract(server: Running) -> None:
    found = inspect(
        server, prompt=TEXT, attention=[0, 1], lens=True, norms=True, patterns=[1],
        next_logits=True, heads=True, top=3,
    )  # fmt: skip
    config = server.served["tiny"].engine.model.config
    n, layers, heads = len(TEXT), config.n_layer, config.n_head
    assert (found["model"], found["context"], found["layers"], found["heads"]) == (
        "tiny", config.context_size, layers, heads,
    )  # fmt: skip
    assert found["final_norm"] is config.has_final_norm
    assert [t["id"] for t in found["tokens"]] == BYTES.encode(TEXT)
    assert found["tokens"][0] == {"id": 108, "text": "l", "bytes": [108]}
    shapes = {
        "attention.weights": (2, heads, n, n), "attention.hidden": (2, n, n),
        "lens.top_id": (layers + 1, n, 5), "lens.rank": (layers + 1, n),
        "lens.kl": (layers + 1, n), "lens.entropy": (layers + 1, n),
        "norms.stream": (layers + 1, n), "norms.attention": (layers, n), "norms.mlp": (layers, n),
        "patterns.hidden": (1, n, n), "head_scores.induction": (layers, heads),
        "head_scores.previous": (layers, heads), "head_scores.first": (layers, heads),
    }  # fmt: skip
    for name, shape in shapes.items():
        part, _, key = name.partition(".")
        assert unpack(found[part][key]).shape == shape, name
    assert unpack(found["next_logits"]).shape == (257,)
    assert np.array(found["lens"]["top_text"]).shape == (layers + 1, n, 5)
    assert len(found["next"]) == 3 and set(found["source"]) == {
        "next", "next_logits", "attention", "patterns", "lens", "norms", "head_scores",
    }  # fmt: skip


def test_only_what_was_asked_for(server: Running) -> None:
    found = inspect(server, prompt="ab", top=0)
    assert set(found) == {
        "model", "tokens", "context", "final_norm", "layers", "heads", "source",
    }  # fmt: skip


def test_probabilities_are_those_of_completions(server: Running) -> None:
    found = inspect(server, prompt=TEXT, next_logits=True, top=20)
    logits = torch.from_numpy(unpack(found["next_logits"]).astype(np.float64))
    logs = logits.log_softmax(-1).numpy()
    body = {"prompt": TEXT, "max_tokens": 1, "logprobs": 20, "temperature": 0}
    top = server.post("/v1/completions", body).json()["choices"][0]["logprobs"]["top_logprobs"][0]
    assert len(top) == 20
    mine = {card["text"]: card["logprob"] for card in found["next"]}
    named = {card["text"]: card["id"] for card in found["next"]}
    for name, value in top.items():
        assert mine[name] == pytest.approx(value, abs=1e-6)
        assert logs[named[name]] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", "Field required"),
        ({"prompt": []}, "prompt", "is empty"),
        ({"prompt": [0] * 200}, "prompt", "200 tokens: give 1 to 128"),
        ({"prompt": [999]}, "prompt", "outside 0..256"),
        ({"prompt": "a", "attention": [2]}, "attention", "0 to 1 are"),
        ({"prompt": "a", "attention": [-1]}, "attention", "0 to 1 are"),
        ({"prompt": "a", "attention": [0, 0]}, "attention", "twice"),
        ({"prompt": "a", "attention": [0] * 5}, "attention", "at most 4"),
        ({"prompt": "a", "patterns": [7]}, "patterns", "0 to 1 are"),
        ({"prompt": "a", "routing": True}, "routing", "no experts"),
        ({"prompt": "a", "top": 21}, "top", "less than or equal to 20"),
        ({"prompt": "a", "lens": "true"}, "lens", "valid boolean"),
        ({"prompt": "a", "atention": [0]}, "attention", "did you mean 'attention'?"),
        ({"prompt": "a", "model": "no"}, None, "no such model"),
    ],
)
def test_bad_requests_are_one_sentence(
    server: Running, body: dict[str, Any], param: str | None, words: str
) -> None:
    response = server.post("/v1/inspect", body)
    error = response.json()["error"]
    assert response.status_code == (404 if param is None else 400), response.text
    assert error["param"] == param and words in error["message"]


@torch.inference_mode()
def test_the_numbers_are_the_models(server: Running) -> None:
    """权重、lens 的最后一行、路由之外的各样：从 JSON 读回来与模型的前向比。"""
    found = inspect(server, prompt=TEXT, attention=[1, 0], lens=True)
    model = server.served["tiny"].engine.model
    ids = torch.tensor([BYTES.encode(TEXT)])
    out = model(ids, return_attention=(0, 1))
    assert found["attention"]["layers"] == [1, 0] and found["attention"]["scale"] == "sqrt"
    weights, cells = (unpack(found["attention"][name]) for name in ("weights", "hidden"))
    for row, layer in enumerate([1, 0]):
        wanted = out["attentions"][layer][0].numpy()
        assert np.abs(weights[row] / 255.0 - np.sqrt(wanted)).max() <= 0.5 / 255 + 1e-9
        np.testing.assert_allclose(((weights[row] / 255.0) ** 2).sum(-1), 1, atol=0.02)
        assert np.array_equal(cells[row], np.triu(np.ones_like(cells[row]), 1))
    p = out["logits"][0, :, :257].softmax(-1)
    values, index = p.topk(5, dim=-1)
    np.testing.assert_array_equal(unpack(found["lens"]["top_id"])[-1], index.numpy())
    np.testing.assert_allclose(unpack(found["lens"]["top_p"])[-1], values.numpy(), atol=1e-6)
    assert (unpack(found["lens"]["kl"]) >= 0).all()


def test_experts_patterns_and_props() -> None:
    changes = {
        "moe_num_experts": 3, "moe_top_k": 2, "n_layer": 3, "norm": "pre",
        "attention_pattern": ("causal", "local(4) | global(2)"),
    }  # fmt: skip
    with serving([tiny("mixed", changes=changes)]) as running:
        found = inspect(running, prompt=TEXT, routing=True, patterns=[0, 1, 2])
        facts = running.get("/props").json()["models"]["mixed"]
    routing = found["routing"]
    expert, weight = unpack(routing["expert"]), unpack(routing["weight"])
    assert (routing["layers"], routing["experts"], routing["top_k"]) == ([0, 1, 2], 3, 2)
    assert expert.shape == weight.shape == (3, len(TEXT), 2) and expert.max() < 3
    np.testing.assert_allclose(weight.sum(-1), 1, atol=1e-6)
    assert found["patterns"]["text"][1].startswith("the last 4 tokens")
    q, k = np.ogrid[: len(TEXT), : len(TEXT)]
    window = (k > q) | ((q - k >= 4) & (k >= 2))
    cells = unpack(found["patterns"]["hidden"])
    assert np.array_equal(cells, np.stack([k > q, window, k > q]))
    assert facts["inspect"] is True and facts["run"] is None
    assert facts["inspect_limits"] == {"tokens": 128, "lens_tokens": 128, "attention_layers": 4}
    assert (facts["layers"], facts["experts"], facts["moe_layers"]) == (3, 3, [0, 1, 2])
    assert facts["parameters"] == running.served["mixed"].engine.model.num_parameters()
    assert facts["patterns"] == found["patterns"]["text"]
    assert {"tokens_per_second", "last_step_ms", "cached_tokens", "accepted_tokens"} <= set(
        facts["engine"]
    )


def test_quantized_models_are_looked_into_alike() -> None:
    model = byte_model(torch.float32, context_size=64, norm="pre", n_embed=32)
    small = serve_model("small", quantized(model, SCHEMES["int8"]), BYTES, rows=2)
    with serving([small]) as running:
        found = inspect(running, prompt=TEXT, attention=[0], lens=True, norms=True)
        with torch.inference_mode():
            out = small.engine.model(torch.tensor([BYTES.encode(TEXT)]))
    wanted = out["logits"][0, :, :257].softmax(-1)
    np.testing.assert_allclose(
        unpack(found["lens"]["top_p"])[-1], wanted.topk(5, dim=-1).values.numpy(), atol=1e-5
    )


def test_off_means_off_and_says_how_to_turn_it_on() -> None:
    with serving([tiny()], Address(inspect=False)) as running:
        for response in (
            running.post("/v1/inspect", {"prompt": "a"}),
            running.post("/v1/history", {"prompt": "a"}),
            running.get("/v1/history"),
        ):
            error = response.json()["error"]
            assert response.status_code == 403 and error["code"] == "inspect_off"
            assert "--inspect" in error["message"]
        assert running.get("/props").json()["models"]["tiny"]["inspect"] is False


@pytest.mark.parametrize(
    ("words", "on"),
    [
        ([], True),
        (["--no-inspect"], False),
        (["--host", "0.0.0.0"], False),
        (["--host", "0.0.0.0", "--inspect"], True),
        (["--host", "::1"], True),
    ],
)
def test_the_flag_follows_the_host(words: list[str], on: bool) -> None:
    assert parse(["a-model", *words]).inspect is on


def test_an_answer_too_large_names_its_field(server: Running) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "MOST_BYTES", 20_000)
        response = server.post(
            "/v1/inspect", {"prompt": [1] * 64, "attention": [0, 1], "norms": True}
        )
        error = response.json()["error"]
        assert response.status_code == 400 and error["code"] == "answer_too_large"
        assert error["param"] == "attention" and "more than 20000" in error["message"]
        assert inspect(server, prompt=[1] * 64, norms=True)["norms"]["additive"] in (True, False)


def test_one_at_a_time(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """第二个得 429；第一个做完之后又可以问。"""
    inside, go_on = threading.Event(), threading.Event()
    real = routes.write

    def slow(*given: Any) -> Any:
        inside.set()
        assert go_on.wait(20)
        return real(*given)

    monkeypatch.setattr(routes, "write", slow)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(server.post, "/v1/inspect", {"prompt": "a"})
        assert inside.wait(20)
        second = server.post("/v1/inspect", {"prompt": "a"})
        go_on.set()
        assert first.result().status_code == 200
    assert second.status_code == 429 and second.headers["retry-after"] == "1"
    assert second.json()["error"]["code"] == "inspect_busy"
    assert server.post("/v1/inspect", {"prompt": "a"}).status_code == 200


def test_looking_leaves_three_running_texts_as_they_are(server: Running) -> None:
    bodies = [
        {"prompt": word, "max_tokens": 60, "seed": seed, "ignore_eos": True, "temperature": 0.9}
        for seed, word in enumerate(("one", "two", "three"))
    ]
    ask = lambda body: server.post("/v1/completions", body).json()["choices"][0]["text"]  # noqa: E731
    alone = [ask(body) for body in bodies]
    seen = []
    with ThreadPoolExecutor() as pool:
        running = [pool.submit(ask, body) for body in bodies]
        while not all(one.done() for one in running):
            seen.append(inspect(server, prompt=TEXT, attention=[0], lens=True, heads=True))
        beside = [one.result() for one in running]
    assert beside == alone and len(seen) > 1
    assert all(one["lens"]["top_p"] == seen[0]["lens"]["top_p"] for one in seen)


def test_a_failure_inside_is_the_askers_alone(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any) -> Any:
        yield Slice(1, 1)
        raise RuntimeError("no")

    monkeypatch.setattr(routes, "steps_of", broken)
    assert server.post("/v1/inspect", {"prompt": "a"}).status_code == 500
    monkeypatch.undo()
    assert server.post("/v1/inspect", {"prompt": "a"}).status_code == 200


def test_a_model_whose_numbers_broke_says_so() -> None:
    """NaN 的名次不是零，图不是没有看：一句话，哪一样要的都是。"""
    served = tiny("broken", rows=1)
    with torch.no_grad():
        served.engine.model.embed.wte.weight[97] = float("nan")
    with serving([served]) as running:
        for asked in ({"lens": True}, {"attention": [0], "top": 0}, {"top": 3}):
            response = running.post("/v1/inspect", {"prompt": "abc", **asked})
            assert response.status_code == 500, asked
            assert response.json()["error"]["code"] == "not_finite", asked


def test_what_would_hold_up_the_others_is_refused() -> None:
    """价目是假的：一个词元一秒；一层三十个词元就超过了 max_stall。"""
    engine = make_engine(byte_model(), limits=Limits(pace=Pace(max_stall=5.0)))
    engine.costs = Costs(((1, 1.0), (2, 2.0)))
    slow = Served("slow", engine, BYTES, "fp")
    for body, param in (
        ({"prompt": "a" * 30}, "prompt"),
        ({"prompt": "a", "heads": True}, "heads"),
    ):
        with pytest.raises(ApiError, match="more than max_stall=5.0 s") as error:
            read_inspection(InspectBody(**body), slow)  # type: ignore[arg-type]
        assert error.value.param == param
    assert read_inspection(InspectBody(prompt="aaaa"), slow).ids == (97,) * 4


LAYERS = st.lists(st.integers(-2, 3) | st.integers(-(10**30), 10**30), max_size=5)
FIELDS = st.fixed_dictionaries(
    {"prompt": st.text(max_size=140) | st.lists(st.integers(-1, 258), max_size=140)},
    optional={
        "top": st.integers(-1, 21), "attention": LAYERS, "patterns": LAYERS,
        "lens": st.booleans(), "norms": st.booleans(), "routing": st.booleans(),
        "next_logits": st.booleans(), "heads": st.booleans() | st.integers(0, 1),
    },
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(FIELDS)
def test_any_body_is_read_or_refused_with_its_field(body: dict[str, Any]) -> None:
    """没有第三种；读下来的都在界限之内。"""
    served = SMALL
    try:
        asked = read_inspection(fields.parse(json.dumps(body).encode(), InspectBody), served)
    except ApiError as error:
        assert error.status == 400 and error.param in (*body, None)
        return
    assert 1 <= len(asked.ids) <= 48 and all(0 <= i < 257 for i in asked.ids)
    assert all(layer in (0, 1) for layer in (*asked.attention, *asked.patterns))
    assert len(asked.attention) <= 4 and 0 <= asked.top <= 20
    assert not asked.routing and asked.heads == bool(body.get("heads"))


SMALL = Served("small", make_engine(byte_model()), BYTES, "fp")
