"""HTTP 的约定：形状、边界、流、错误。"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from app.generation.config import SamplingConfig
from app.serving.api.errors import ApiError
from app.serving.api.fields import CompletionBody
from app.serving.api.orders import choice_seed, completion_job
from app.serving.request import Ask
from tests.serving.conftest import Running, serving, tiny
from tests.serving.helpers import BYTES, alone

PATH = "/v1/completions"


def complete(server: Running, **body: Any) -> dict[str, Any]:
    response = server.post(PATH, body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def chunks(server: Running, path: str = PATH, **body: Any) -> list[dict[str, Any]]:
    response = server.post(path, {**body, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def expected(server: Running, prompt: str, seed: int, most: int, **sampling: Any) -> Any:
    ask = Ask(
        prompt=tuple(BYTES.encode_prompt(prompt)), max_tokens=most, seed=seed,
        sampling=SamplingConfig(**sampling), stop_ids=frozenset({256}),
    )  # fmt: skip
    return alone(server.served["tiny"].engine.model, ask)


def test_a_completion_is_what_complete_writes(server: Running) -> None:
    found = complete(server, prompt="def f(", max_tokens=20, seed=5, temperature=0.8, top_k=20)
    text, finish = expected(server, "def f(", 5, 20, temperature=0.8, top_k=20)
    (choice,) = found["choices"]
    assert (choice["text"], choice["finish_reason"], choice["seed"]) == (text, finish, 5)
    assert found["object"] == "text_completion" and found["id"].startswith("cmpl-")
    assert found["usage"]["prompt_tokens"] == 6
    assert found["usage"]["total_tokens"] == 6 + found["usage"]["completion_tokens"]
    assert found["system_fingerprint"].startswith("fp_") and found["model"] == "tiny"


@pytest.mark.parametrize("prompt", ["ab", [97, 98], ["ab", "xyz"], [[97, 98], [1, 2, 3]], ""])
def test_prompts_as_text_and_ids(server: Running, prompt: Any) -> None:
    found = complete(server, prompt=prompt, max_tokens=4, n=2, seed=3, return_token_ids=True)
    many = isinstance(prompt, list) and not isinstance(prompt[0], int)
    parts = prompt if many else [prompt]
    assert [c["index"] for c in found["choices"]] == list(range(2 * len(parts)))
    for choice in found["choices"]:
        given = parts[choice["index"] // 2]
        ids = BYTES.encode_prompt(given) if isinstance(given, str) else given
        assert choice["prompt_token_ids"] == ids
        seed = choice_seed(3, choice["index"] % 2)
        assert (choice["text"], choice["finish_reason"]) == expected(
            server, BYTES.decode(ids) if ids != [256] else "", seed, 4
        )


def test_the_stream_is_the_plain_text(server: Running) -> None:
    body = {"prompt": "a\u00e9", "max_tokens": 40, "n": 3, "seed": 9, "logprobs": 2, "echo": True}
    plain = complete(server, **body)
    found = chunks(server, **body, stream_options={"include_usage": True})
    last = found.pop()
    assert last["choices"] == [] and last["usage"]["total_tokens"] == plain["usage"]["total_tokens"]
    for choice in plain["choices"]:
        mine = [c["choices"][0] for c in found if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [c["finish_reason"] for c in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        for key, whole in choice["logprobs"].items():
            joined = [x for c in mine for x in c["logprobs"][key]]
            if key.endswith("logprobs"):
                # 第二次借了前缀，末位的舍入可以不同。
                joined, whole = (
                    [x for x in each if isinstance(x, float)] for each in (joined, whole)
                )
                assert joined == pytest.approx(whole, abs=1e-12)
            else:
                assert joined == whole
    assert all(chunk["usage"] is None for chunk in found)


def test_stop_strings_and_ids(server: Running) -> None:
    plain = complete(server, prompt="q", max_tokens=30, seed=4, ignore_eos=True)["choices"][0]
    cut = plain["text"][7:9]
    found = complete(server, prompt="q", max_tokens=30, seed=4, ignore_eos=True, stop=[cut, "zzz"])
    choice = found["choices"][0]
    assert choice["text"] == plain["text"][: plain["text"].index(cut)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", cut)
    token = complete(server, prompt="q", max_tokens=30, seed=4, ignore_eos=True,
                     return_token_ids=True)["choices"][0]["token_ids"][5]  # fmt: skip
    by_id = complete(server, prompt="q", max_tokens=30, seed=4, stop_token_ids=[token],
                     ignore_eos=True)["choices"][0]  # fmt: skip
    assert by_id["stop_reason"] == token


@torch.inference_mode()
@pytest.mark.parametrize("most", [0, 1])
def test_a_prompt_is_scored(server: Running, most: int) -> None:
    ids = BYTES.encode("score me, \u00e9")
    found = complete(server, prompt=[ids], max_tokens=most, logprobs=3, echo=True, temperature=0)
    logs = found["choices"][0]["logprobs"]
    model = server.served["tiny"].engine.model
    wanted = model(torch.tensor([ids]))["logits"][0, :, :257].log_softmax(-1)
    assert len(logs["token_logprobs"]) == len(ids) + most == len(logs["tokens"])
    assert logs["token_logprobs"][0] is None and logs["top_logprobs"][0] is None
    for i, token in enumerate(ids[1:]):
        assert logs["token_logprobs"][i + 1] == pytest.approx(float(wanted[i, token]), abs=1e-9)
        top = logs["top_logprobs"][i + 1]
        assert top[logs["tokens"][i + 1]] == logs["token_logprobs"][i + 1]
        assert max(top.values()) == pytest.approx(float(wanted[i].max()), abs=1e-9)
        assert len(top) in (3, 4)
    assert logs["tokens"][-1 - most].startswith("bytes:\\x")
    assert found["usage"]["completion_tokens"] == most


def test_the_context_exactly_full(server: Running) -> None:
    ids = [[i % 250 for i in range(127)]]
    assert complete(server, prompt=ids, max_tokens=1)["usage"]["total_tokens"] == 128
    response = server.post(PATH, {"prompt": ids, "max_tokens": 2})
    error = response.json()["error"]
    assert response.status_code == 400 and error["code"] == "context_length_exceeded"
    assert "127 tokens" in error["message"] and "128" in error["message"]
    found = complete(server, prompt=ids, max_tokens=2, truncate_prompt_tokens=100)
    assert found["usage"]["prompt_tokens"] == 100


def test_cached_tokens_are_said(server: Running) -> None:
    prompt = "a shared beginning of some length"
    complete(server, prompt=prompt, max_tokens=1)
    usage = complete(server, prompt=prompt + "!", max_tokens=1)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == len(prompt)
    usage = complete(server, prompt=prompt + "?", max_tokens=1, cache_prompt=False)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0


def test_chat(server: Running) -> None:
    body = {
        "messages": [{"role": "user", "content": "hi <|endoftext|>"}], "max_tokens": 8, "seed": 2,
        "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    response = server.post("/v1/chat/completions", {**body, "return_token_ids": True})
    found = response.json()
    (choice,) = found["choices"]
    # 用户写的分隔符是文字，模板里的才是分隔符。
    ids = [*BYTES.encode("user: hi <|endoftext|>"), 256, *BYTES.encode("assistant:")]
    assert choice["prompt_token_ids"] == ids and found["object"] == "chat.completion"
    assert choice["message"]["role"] == "assistant"
    assert len(choice["logprobs"]["content"]) == found["usage"]["completion_tokens"]
    streamed = chunks(server, "/v1/chat/completions", **body)
    assert streamed[0]["choices"][0]["delta"] == {"role": "assistant"}
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in streamed)
    assert text == choice["message"]["content"]
    refused = server.post(
        "/v1/chat/completions", {"messages": [{"role": "system", "content": "x"}]}
    )
    assert refused.status_code == 400 and "template" in refused.json()["error"]["message"]


def test_models_tokens_and_state(server: Running) -> None:
    (card,) = server.get("/v1/models").json()["data"]
    assert card["id"] == "tiny" and server.get("/v1/models/tiny").json() == card
    assert server.get("/v1/models/..%2ftiny").status_code == 404
    text = "h\u00e9llo <|endoftext|>"
    tokens = server.post("/tokenize", {"prompt": text, "with_pieces": True}).json()
    assert tokens["tokens"] == BYTES.encode(text) and tokens["pieces"][1]["text"] == "bytes:\\xc3"
    assert server.post("/tokenize", {"content": text}).json()["tokens"] == tokens["tokens"]
    back = server.post("/detokenize", {"tokens": tokens["tokens"]}).json()
    assert back["prompt"] == text
    assert server.get("/tokenizer_info").json()["eos_token"] == "<|endoftext|>"
    assert server.get("/props").json()["models"]["tiny"]["rows"] == 4
    assert [row["row"] for row in server.get("/slots").json()] == [0, 1, 2, 3]
    for path in ("/health/live", "/health/ready", "/health"):
        assert server.get(path).json() == {"status": "ok"}
    metrics = server.get("/metrics").text
    for name in ("num_requests_running", "prompt_tokens_total", "time_to_first_token_seconds_sum",
                 "prefix_cache_hits_total", "request_success_total"):  # fmt: skip
        assert f"gpt2_{name}" in metrics


# 坏的正文：(正文, 错误的 code)。没有一个可以到 5xx，也不许把内容带回来。
SECRET = "CANARY-7f3a"
BAD: list[tuple[Any, str]] = [
    ({"n": 10**9}, "invalid_value"), ({"n": 0}, "invalid_value"), ({"n": 1.5}, "invalid_value"),
    ({"n": "5"}, "invalid_value"), ({"n": True}, "invalid_value"),
    ({"max_tokens": -1}, "invalid_value"), ({"max_tokens": 10**9}, "invalid_value"),
    ({"max_tokens": 200}, "context_length_exceeded"), ({"temperature": 2.1}, "invalid_value"),
    ({"temperature": 1e-40}, "invalid_value"), ({"repetition_penalty": 1e-40}, "invalid_value"),
    ({"temperature": -0.1}, "invalid_value"), ({"temperature": "1"}, "invalid_value"),
    ({"top_p": 1.1}, "invalid_value"), ({"top_k": 0.1}, "invalid_value"),
    ({"top_k": -2}, "invalid_value"), ({"min_p": 2}, "invalid_value"),
    ({"repetition_penalty": 0}, "invalid_value"), ({"presence_penalty": 3}, "invalid_value"),
    ({"logit_bias": {"257": 1}}, "invalid_value"), ({"logit_bias": {"a": 1}}, "invalid_value"),
    ({"logit_bias": {"1": 101}}, "invalid_value"), ({"logit_bias": [1]}, "invalid_value"),
    ({"stop": ["a"] * 17}, "invalid_value"), ({"stop": [""]}, "invalid_value"),
    ({"stop": "x" * 300}, "invalid_value"), ({"stop_token_ids": [257]}, "invalid_value"),
    ({"seed": 2**64}, "invalid_value"), ({"seed": "1"}, "invalid_value"),
    ({"logprobs": 21}, "invalid_value"), ({"logprobs": True}, "invalid_value"),
    ({"min_tokens": 9, "max_tokens": 4}, "invalid_value"),
    ({"stream_options": {"include_usage": True}}, "invalid_value"),
    ({"prompt": [300]}, "invalid_value"), ({"prompt": [-1]}, "invalid_value"),
    ({"prompt": []}, "invalid_value"), ({"prompt": [[]]}, "invalid_value"),
    ({"prompt": ["a"] * 65}, "invalid_value"), ({"prompt": ["a"] * 10, "n": 16}, "invalid_value"),
    ({"prompt": {"a": SECRET}}, "invalid_value"), ({"prompt": ["a", 1]}, "invalid_value"),
    ({"suffix": SECRET}, "unsupported_parameter"), ({"best_of": 3}, "unsupported_parameter"),
    ({"temprature": 1}, "unknown_parameter"), ({SECRET: 1}, "unknown_parameter"),
    ({"model": "x" * 300}, "invalid_value"),
]  # fmt: skip
RAW: list[bytes] = [
    b"", b"null", b"[]", b'"a"', b"{", b'{"n": NaN}', b'{"temperature": 1e400}', b"\xff\xfe",
    b'{"prompt": "\\ud800"}', b'{"n": ' + b"9" * 5000 + b"}", b"[" * 30_000,
    b'{"a":' * 40 + b"1" + b"}" * 40, b'{"prompt": "a", "logit_bias": {"1": Infinity}}',
]  # fmt: skip


def check_error(response: Any, status: int | None = None) -> str:
    assert 400 <= response.status_code < 500, response.text
    assert status is None or response.status_code == status
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert SECRET not in response.text and "Traceback" not in response.text
    return str(error["code"])


def test_bad_fields_are_refused(server: Running) -> None:
    with server.client() as client:
        for body, code in BAD:
            response = client.post(PATH, json={"prompt": "a", **body})
            assert check_error(response, 400) == code, (body, response.text)
        for raw in RAW:
            headers = {"content-type": "application/json"}
            check_error(client.post(PATH, content=raw, headers=headers), 400)
        response = client.post(PATH, json={"temprature": 1})
        assert "did you mean 'temperature'" in response.json()["error"]["message"]
        check_error(client.post(PATH, json={"model": f"../{SECRET}"}), 404)
        check_error(client.post(PATH, content=b"{}"), 415)
        check_error(client.get(PATH), 405)
        check_error(client.get(f"/{SECRET}"), 404)
        check_error(client.get("/docs"), 404)
        check_error(client.get("/health", headers={"host": "evil.example"}), 421)
        big = client.post(PATH, content=b"x" * (2**20 + 1),
                          headers={"content-type": "application/json"})  # fmt: skip
        check_error(big, 413)
    assert complete(server, prompt="a", max_tokens=1)["choices"]


def test_defaults_of_others_are_accepted(server: Running) -> None:
    body = {"prompt": "a", "suffix": None, "best_of": 1, "tools": [], "store": False,
            "user": "me", "stop": None, "logit_bias": None, "top_k": -1, "n": None}  # fmt: skip
    assert complete(server, **body)["choices"]


def test_a_text_that_no_token_may_begin_is_refused() -> None:
    served = tiny(rows=1)
    body = {"prompt": "a", "min_tokens": 1, "stop_token_ids": list(range(257))}
    with pytest.raises(ApiError, match="every token stops the text"):
        completion_job(CompletionBody.model_construct(**body), served, "")


def test_zero_is_not_the_default(server: Running) -> None:
    """temperature 0 就是贪心，不是没有给；top_p 0 也是。"""
    greedy = expected(server, "ab", 0, 12, temperature=0)[0]
    for body in ({"temperature": 0}, {"top_p": 0}, {"temperature": 0, "seed": 3}):
        assert complete(server, prompt="ab", max_tokens=12, **body)["choices"][0]["text"] == greedy


def test_no_origin_is_let_in(server: Running) -> None:
    origin = {"origin": "https://evil.example"}
    with server.client() as client:
        for response in (
            client.get("/v1/models", headers=origin),
            client.options(PATH, headers={**origin, "access-control-request-method": "POST"}),
        ):
            assert not any(name.startswith("access-control") for name in response.headers)
            assert response.headers["cache-control"] == "no-store"


def test_two_models_side_by_side() -> None:
    """各有自己的引擎，同一个线程；要点名，没有模板的不聊天。"""
    with serving([tiny("one", rows=2), tiny("two", rows=2, changes={"n_layer": 1})]) as running:
        response = running.post(PATH, {"prompt": "a"})
        assert check_error(response, 400) == "invalid_value" and "several" in response.text
        bodies = [{"model": name, "prompt": "a", "seed": 1, "n": 3} for name in ("one", "two") * 2]
        with ThreadPoolExecutor(4) as pool:
            answers = [r.json() for r in pool.map(lambda b: running.post(PATH, b), bodies)]
        assert answers[0]["choices"] == answers[2]["choices"] != answers[1]["choices"]
        assert answers[1]["choices"] == answers[3]["choices"]
        assert answers[0]["system_fingerprint"] != answers[1]["system_fingerprint"]
        chat = {"model": "one", "messages": [{"role": "user", "content": "a"}]}
        response = running.post("/v1/chat/completions", chat)
        assert check_error(response, 400) == "no_chat_template"
        assert running.get("/tokenizer_info").status_code == 200
        assert 'gpt2_generation_tokens_total{model="two"}' in running.get("/metrics").text
        running.idle()


def test_no_body_reaches_the_defaults_of_another(server: Running) -> None:
    """同一条连接上一个接一个，坏的后面是好的。"""
    with server.client() as client:
        for _ in range(5):
            assert client.post(PATH, json={"prompt": "a", "n": 99}).status_code == 400
            assert client.post(PATH, json={"prompt": "a", "max_tokens": 1}).status_code == 200
