"""页面上的数：等于 API 的，API 的等于模型的；采样的数学等于服务器的。"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.generation.config import SamplingConfig
from app.generation.sampling import filtered
from app.serving.api.assets import FOLDER
from app.serving.api.fields import CompletionBody
from app.serving.api.orders import _sampling
from app.serving.request import Ask
from tests.page.conftest import Visit, visiting
from tests.serving.conftest import Running, serving
from tests.serving.inside import reviewed, serve_run, train_a_run, unpack

CLOSE = 1e-6
USUAL: dict[str, Any] = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
    "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": {},
}  # fmt: skip
SETTINGS: list[dict[str, Any]] = [
    {}, {"temperature": 0.7}, {"temperature": 0}, {"top_p": 0}, {"top_k": 5}, {"top_k": 1},
    {"top_p": 0.9}, {"top_p": 0.05}, {"min_p": 0.2}, {"repetition_penalty": 1.4},
    {"presence_penalty": 1.5, "frequency_penalty": -0.7}, {"logit_bias": {"3": 4.0, "7": -100.0}},
    # 次序看得见：换了先后，分布就不同。
    {"temperature": 1.5, "top_k": 10, "top_p": 0.7},
    {"repetition_penalty": 1.4, "logit_bias": {"3": 2.0, "5": 3.0}},
    {"temperature": 0.4, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
    {"temperature": 1.7, "top_k": 30, "top_p": 0.7, "min_p": 0.3, "repetition_penalty": 1.3,
     "presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": {"3": 2.0}},
]  # fmt: skip
PROMPT, MADE = [3, 5, 5, 9], [7, 7, 3]


class Watched:
    """draws.Drawing：写到一半的一段。"""

    def __init__(self, ask: Ask) -> None:
        self.ask, self.made, self.uniforms = ask, len(MADE), None
        self.counts = {token: MADE.count(token) for token in MADE}
        self.seen = torch.zeros(1)


def expected(logits: np.ndarray, setting: dict[str, Any]) -> torch.Tensor:
    """服务器的次序与它自己的函数：偏置与惩罚（draws），其余（sampling.filtered）。"""
    from app.serving.draws import _adjusted

    body = CompletionBody(**{**USUAL, **setting})
    config = _sampling(body)
    ask = Ask(
        prompt=tuple(PROMPT), max_tokens=9, sampling=config,
        presence_penalty=body.presence_penalty or 0, frequency_penalty=body.frequency_penalty or 0,
        logit_bias={int(k): v for k, v in (body.logit_bias or {}).items()},
    )  # fmt: skip
    row = _adjusted(torch.from_numpy(logits).double(), Watched(ask))[None]
    seen = torch.zeros_like(row, dtype=torch.bool)
    seen[0, PROMPT + MADE] = True
    if config.greedy:
        raised = filtered(row, SamplingConfig(repetition_penalty=config.repetition_penalty), seen)
        return torch.nn.functional.one_hot(raised.argmax(-1), row.shape[1])[0].double()
    return filtered(row, config, seen).softmax(-1)[0]


def rows() -> list[np.ndarray]:
    made = np.random.default_rng(3)
    ties = made.integers(-3, 3, 40).astype(np.float32)
    return [
        made.normal(0, 3, 300).astype(np.float32),
        made.normal(0, 1, 41).astype(np.float32),
        ties,
    ]


def wrong_settings(visit: Visit) -> list[dict[str, Any]]:
    """浏览器里算出来与服务器不同的那些设置。"""
    page = visit.open()
    script = """async ([rows, settings, prompt, made]) => {
      const { stages, softmax } = await import("/assets/filters.js");
      return settings.map((one) => rows.map((row) =>
        Array.from(softmax(stages(row, one, prompt, made).at(-1).logits))));
    }"""
    settings = [{**USUAL, **one} for one in SETTINGS]
    given = [[row.tolist() for row in rows()], settings, PROMPT, MADE]
    found = page.evaluate(script, given)
    wrong = []
    for one, here in zip(SETTINGS, found, strict=True):
        for row, mine in zip(rows(), here, strict=True):
            # 并列的由 top-p 留下哪一个，两边都没有约定。
            if one.get("top_p", 1) < 1 and row.shape[0] == 40:
                continue
            if not np.allclose(expected(row, one).numpy(), mine, rtol=0, atol=CLOSE):
                wrong.append(one)
                break
    return wrong


def test_filters_are_the_servers(visit: Visit) -> None:
    assert wrong_settings(visit) == []


# fmt: off
MUTANTS = {
    "top-p one too many": ("if (before >= p) break;", "if (before > p + 0.02) break;"),
    "top-p one too few": (
        "if (before >= p) break;", "if (before > 0 && before + probs[id] > p) break;",
    ),
    "top-k one too many": ("logits.length - k]", "logits.length - k - 1]"),
    "top-k drops ties": ("x < kth ?", "x <= kth ?"),
    "min-p against the sum": ("largest(logits) + Math.log(p)", "Math.log(p)"),
    "temperature bent": ("(x) => x / temperature)", "(x) => x / temperature ** 1.01)"),
    "negative logits divided": ("value < 0 ? value * penalty", "value < 0 ? value / penalty"),
    "presence forgotten": ("(presence + frequency * count)", "(frequency * count)"),
    "frequency once": ("frequency * count", "frequency"),
    "prompt not seen": ("[...prompt, ...made]", "[...made]"),
    "bias twice": ("+ value;", "+ 2 * value;"),
    "zero top-p is off": ("|| config.top_p === 0", ""),
}
# fmt: on


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_planted_mutants_are_seen(visit: Visit, name: str) -> None:
    source = (FOLDER / "filters.js").read_text(encoding="utf-8")
    good, bad = MUTANTS[name]
    assert source.count(good) == 1
    served = source.replace(good, bad)
    visit.page.route(
        "**/assets/filters.js",
        lambda route: route.fulfill(body=served, content_type="text/javascript"),
    )
    assert wrong_settings(visit)


@pytest.mark.slow
@pytest.mark.parametrize(
    "swap",
    [("top_p", "temperature"), ("min_p", "top_p"), ("top_p", "top_k"), ("repetition", "bias")],
)
def test_another_order_is_seen(visit: Visit, swap: tuple[str, str]) -> None:
    """两步换了先后。"""
    source = (FOLDER / "filters.js").read_text(encoding="utf-8")
    lines = {name: next(x for x in source.splitlines() if f'step("{name}"' in x) for name in swap}
    first, second = lines.values()
    served = source.replace(first, "@").replace(second, first).replace("@", second)
    visit.page.route(
        "**/assets/filters.js",
        lambda route: route.fulfill(body=served, content_type="text/javascript"),
    )
    assert wrong_settings(visit)


def test_the_text_has_the_models_numbers(visit: Visit, server: Running) -> None:
    """概率、名次、熵：页面 = API = 模型；别的可能也是。"""
    page = visit.open()
    visit.write("def f(x):", 20)
    spans = page.locator("#tokens .tok").evaluate_all(
        "(all) => all.map((one) => ({...one.dataset}))"
    )
    ids = visit.ids()
    model = server.served["tiny"].engine.model
    with torch.no_grad():
        logs = model(torch.tensor([ids]))["logits"][0, :, :257].double().log_softmax(-1)
    assert len(spans) == 29 and "logprob" not in spans[0]
    for t in range(1, 29):
        mine, row = spans[t], logs[t - 1]
        own = row[ids[t]]
        assert math.isclose(float(mine["logprob"]), own, abs_tol=CLOSE)
        assert int(mine["rank"]) == int((row > own).sum())
        assert math.isclose(float(mine["entropy"]), -(row.exp() * row).sum(), abs_tol=CLOSE)
    page.locator("#tokens .tok").nth(12).click()
    bars = page.locator("#likely .one").evaluate_all(
        "(all) => all.map((one) => [Number(one.dataset.id), Number(one.dataset.p)])"
    )
    for i, p in bars:
        assert math.isclose(p, logs[11, i].exp(), abs_tol=CLOSE)
    assert [i for i, _ in bars[:10]] == logs[11].topk(10).indices.tolist()


def test_details_of_the_api(server: Running) -> None:
    """流与整个的相同；echo 的提示在前；不要就没有。"""
    body = {
        "model": "tiny",
        "prompt": "abc",
        "max_tokens": 5,
        "details": 3,
        "echo": True,
        "seed": 1,
    }
    whole = server.post("/v1/completions", body).json()["choices"][0]
    text = server.post("/v1/completions", {**body, "stream": True}).text
    events = [json.loads(x[6:]) for x in text.split("\n\n") if x.startswith("data: {")]
    streamed = [one for event in events for one in event["choices"][0]["details"]]
    assert streamed == whole["details"] and len(streamed) == 8 and whole["logprobs"] is None
    assert streamed[0] == {
        "id": 97, "text": "a", "bytes": [97], "logprob": None, "rank": None, "entropy": None,
        "top": [],
    }  # fmt: skip
    assert [len(one["top"]) for one in streamed[1:]] == [3] * 7
    both = server.post("/v1/completions", {**body, "logprobs": 7}).json()["choices"][0]
    assert both["details"] == streamed
    assert len(both["logprobs"]["top_logprobs"][3]) in (7, 8)
    assert (
        "details"
        not in server.post("/v1/completions", {**body, "details": None}).json()["choices"][0]
    )
    assert server.post("/v1/completions", {**body, "details": 21}).status_code == 400


def test_live_sampling_is_the_servers(visit: Visit, server: Running) -> None:
    """滑块动了，格子里的数就是服务器会用的分布；写出来的也只在里面。"""
    page = visit.open()
    visit.write("the cat the", 1)
    visit.look("sampling")
    page.locator("#next .one").first.wait_for()
    knobs = {
        "temperature": "0.5",
        "top_k": "40",
        "top_p": "0.8",
        "min_p": "0.05",
        "repetition_penalty": "1.3",
    }
    for name, value in knobs.items():
        page.locator(f"#knob-{name}").fill(value)
    page.fill("#knob-bias", "101: 2.5")
    page.keyboard.press("Tab")
    page.locator("#stages [data-stage=bias]:not(.idle)").wait_for()
    ids = visit.ids()
    model = server.served["tiny"].engine.model
    with torch.no_grad():
        row = model(torch.tensor([ids]))["logits"][:, -1, :257].float()
    raw = row.double().softmax(-1)[0]
    row[0, 101] += 2.5
    seen = torch.zeros_like(row, dtype=torch.bool)
    seen[0, ids] = True
    config = SamplingConfig(
        temperature=0.5, top_k=40, top_p=0.8, min_p=0.05, repetition_penalty=1.3
    )
    after = filtered(row, config, seen).double().softmax(-1)[0]
    found = page.locator("#next .one").evaluate_all(
        "(all) => all.map(({dataset: d}) => [Number(d.id), Number(d.p), Number(d.q)])"
    )
    assert len(found) >= 16
    for i, p, q in found:
        assert math.isclose(p, raw[i], abs_tol=CLOSE) and math.isclose(q, after[i], abs_tol=CLOSE)
    kept = page.locator("#stages tr").last.get_attribute("data-kept")
    assert int(kept) == int((after > 0).sum())


def test_attention_and_lens_are_the_models(visit: Visit, server: Running) -> None:
    page = visit.open()
    visit.write("the cat the cat", 4)
    ids = visit.ids()
    asked = {"model": "tiny", "prompt": ids, "attention": [1], "lens": True, "norms": True}
    told = server.post("/v1/inspect", asked).json()
    page.locator("#tokens .tok").nth(10).click()
    visit.look("attention").locator("#layers button").nth(1).click()
    page.locator("#heads button").nth(1).click()
    page.locator("#map[aria-label*='Layer 2, head 2']").wait_for()
    weights = (unpack(told["attention"]["weights"])[0, 1, 10] / 255.0) ** 2
    assert abs(weights.sum() - 1) < 0.02
    bars = page.locator("#looked .one").evaluate_all(
        "(all) => all.map((one) => [Number(one.dataset.key), Number(one.dataset.p)])"
    )
    for key, p in bars:
        assert math.isclose(p, weights[key], abs_tol=CLOSE)
    assert (
        "(row sum 1.0" in page.locator("#cell").text_content()
        or "0.99" in page.locator("#cell").text_content()
    )

    visit.look("lens").locator("#lens-table td").first.wait_for()
    top = page.locator("#lens-table tbody tr").first.locator("td").nth(10)
    top.click()
    best = page.locator("#lens-best .one").evaluate_all(
        "(all) => all.map((one) => [Number(one.dataset.id), Number(one.dataset.p)])"
    )
    model = server.served["tiny"].engine.model
    with torch.no_grad():
        probs = model(torch.tensor([ids]))["logits"][0, 10, :257].double().softmax(-1)
    for i, p in best:
        assert math.isclose(p, probs[i], abs_tol=CLOSE)
    assert [i for i, _ in best] == probs.topk(5).indices.tolist()
    lengths = page.locator("#norms tbody tr").first.locator("td").first.get_attribute("data-x")
    assert math.isclose(float(lengths), unpack(told["norms"]["stream"])[-1, 10], rel_tol=CLOSE)


@pytest.mark.slow
def test_through_training_is_the_checkpoints(browser: Any, tmp_path: Path) -> None:
    """滑到每一步：读出来的概率与名次就是那个检查点的。"""
    run = train_a_run(tmp_path)
    with serving([serve_run(run)]) as running:
        for visit in visiting(browser, running.url):
            page = visit.open()
            visit.write("the cat sat", 1)
            visit.look("training").locator(".ask").click()
            page.locator(".slider").wait_for()
            ids = visit.ids()
            _, told = reviewed(running, prompt=ids)
            logprob, rank = unpack(told["logprob"]), unpack(told["rank"])
            page.locator(".run .tok").nth(4).click()
            for c, step in enumerate(told["steps"]):
                page.locator(".steps").fill(str(c))
                said = page.locator(".run .reading").text_content()
                p = 100 * math.exp(logprob[c, 4])
                assert f"Step {step}, token 5" in said and f"rank {rank[c, 4] + 1}" in said
                shown = float(re.search(r"probability ([\d.e-]+)%", said)[1])
                assert math.isclose(shown, p, rel_tol=0.06)
            assert page.locator(".charts polyline").count() == 3
