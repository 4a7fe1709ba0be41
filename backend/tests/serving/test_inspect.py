"""POST /v1/inspect：页上的数就是模型的数；坏的请求一句话；看的时候别人的文字不变、也不久等。"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.serving.conftest import Running
from tests.serving.helpers import BYTES
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
