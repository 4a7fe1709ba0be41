"""真的客户端，一字不改：openai 包的二十件事，与 lm-evaluation-harness。"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import Running, serving, tiny
from tests.serving.helpers import BYTES

openai = pytest.importorskip("openai")
NAME = "tiny"


@pytest.fixture(scope="module")
def client(tiny_server: Running) -> Iterator[Any]:
    import httpx

    made = openai.OpenAI(
        base_url=f"{tiny_server.url}/v1", api_key="none", max_retries=0, timeout=30,
    )  # fmt: skip
    assert httpx is not None
    yield made
    made.close()


def new(client: Any, **given: Any) -> Any:
    return client.completions.create(**{"model": NAME, "prompt": "ab", "max_tokens": 8, **given})


def test_text_ids_and_lists(client: Any) -> None:
    """1 到 4：四种提示；文字与它的号同样的结果。"""
    by_text = new(client, seed=1).choices[0].text
    assert by_text == new(client, prompt=BYTES.encode("ab"), seed=1).choices[0].text
    for prompts in (["ab", "c"], [BYTES.encode("ab"), [99]]):
        many = new(client, prompt=prompts, seed=1)
        assert [c.index for c in many.choices] == [0, 1] and many.choices[0].text == by_text


def test_choices_seed_and_stop(client: Any) -> None:
    """5 到 8：n 段各不相同，同种子相同，停止串，temperature 0。"""
    found = new(client, n=4, seed=1, max_tokens=20)
    assert len({c.text for c in found.choices}) == 4
    assert [c.text for c in new(client, n=4, seed=1, max_tokens=20).choices] == [
        c.text for c in found.choices
    ]
    text = new(client, seed=2, max_tokens=30).choices[0].text
    stopped = new(client, seed=2, max_tokens=30, stop=[text[5]]).choices[0]
    assert stopped.text == text[: text.index(text[5])] and stopped.finish_reason == "stop"
    assert new(client, temperature=0).choices[0].text == new(client, temperature=0).choices[0].text


def test_logprobs_and_echo(client: Any) -> None:
    """9、10。"""
    found = new(client, logprobs=2, echo=True, max_tokens=3).choices[0]
    assert found.text.startswith("ab") and found.logprobs.token_logprobs[0] is None
    assert len(found.logprobs.tokens) == len(found.logprobs.top_logprobs) == 5
    assert found.logprobs.text_offset[:3] == [0, 1, 2]


def test_streams(client: Any) -> None:
    """11 到 13：流的文字、用量的那一块、中途走开。"""
    plain = new(client, seed=3, max_tokens=30).choices[0].text
    options = {"include_usage": True}
    found = list(new(client, seed=3, max_tokens=30, stream=True, stream_options=options))
    assert "".join(c.choices[0].text for c in found if c.choices) == plain
    assert found[-1].usage.completion_tokens > 0
    with new(client, seed=3, max_tokens=100, stream=True, extra_body={"ignore_eos": True}) as part:
        next(iter(part))


def test_models(client: Any) -> None:
    """14、15。"""
    assert [m.id for m in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME


def test_chat(client: Any) -> None:
    """16、17：对话，整个的与流的。"""
    given: dict[str, Any] = {
        "model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "seed": 4,
    }  # fmt: skip
    text = client.chat.completions.create(**given).choices[0].message.content
    parts = [c.choices[0].delta.content or "" for c in
             client.chat.completions.create(**given, stream=True)]  # fmt: skip
    assert "".join(parts) == text


def test_errors_have_their_classes(client: Any) -> None:
    """18、19。"""
    with pytest.raises(openai.BadRequestError) as bad:
        new(client, max_tokens=1000)
    assert bad.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        new(client, model="gpt-4")


def test_thirty_two_at_once(tiny_server: Running) -> None:
    """20：异步的客户端，三十二个一起，与一个个问相同。"""

    async def everyone() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{tiny_server.url}/v1", api_key="none", max_retries=0
        ) as many:
            asked = [
                many.completions.create(model=NAME, prompt=f"{i}:", max_tokens=6, seed=i)
                for i in range(32)
            ]
            return [done.choices[0].text for done in await asyncio.gather(*asked)]

    texts = asyncio.run(everyone())
    for i in (0, 13, 31):
        alone = tiny_server.post(
            "/v1/completions", {"prompt": f"{i}:", "max_tokens": 6, "seed": i}
        ).json()
        assert texts[i] == alone["choices"][0]["text"]


def items(count: int) -> list[dict[str, Any]]:
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "dog", "ran", "to", "me"]
    return [
        {
            "question": " ".join(words[i % 5 : i % 5 + 3 + i % 4]),
            "choices": [words[(i + j) % 12] for j in range(2)],
            "answer": i % 2,
        }
        for i in range(count)
    ]


TASK = """\
task: served_items
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""


def judged(lm: Any, folder: Path) -> dict[int, list[tuple[float, bool]]]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=lm, tasks=["served_items"], task_manager=manager, log_samples=True, bootstrap_iters=0
    )
    assert found is not None
    return {
        sample["doc_id"]: [tuple(one[0]) for one in sample["resps"]]
        for sample in found["samples"]["served_items"]
    }


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "concurrent"), [(1, 1), (8, 1), (1, 4), (8, 4)])
def test_lm_eval_through_http_is_the_in_process_adapter(
    batch: int, concurrent: int, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from app.interop.lm_eval import WorkbenchLM

    data = tmp_path / "items.jsonl"
    data.write_text("\n".join(map(json.dumps, items(50))), encoding="utf-8")
    (tmp_path / "task.yaml").write_text(TASK.format(path=data), encoding="utf-8")
    with serving([tiny()]) as running:
        remote = LocalCompletionsAPI(
            base_url=f"{running.url}/v1/completions", model=NAME, tokenizer_backend="remote",
            batch_size=batch, num_concurrent=concurrent, max_length=128, max_retries=1,
            custom_prefix_token_id=256,
        )  # fmt: skip
        far = judged(remote, tmp_path)
        near = judged(WorkbenchLM.of(running.served[NAME].engine.model, BYTES), tmp_path)
    assert len(far) == 50
    for item, scores in near.items():
        for (nats, greedy), (wanted, best) in zip(far[item], scores, strict=True):
            assert abs(nats - wanted) <= 1e-4 and bool(greedy) == best
