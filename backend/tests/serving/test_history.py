"""GET 与 POST /v1/history：检查点、曲线、同一段文字在各检查点眼里；没有检查点就说为什么。"""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from app.adapters.load import open_model
from app.models.transformer import GPT2Model
from app.serving.api.inside import history as history_module
from app.serving.api.inside.history import Review
from app.serving.api.inside.routes import Inside
from app.training.config import TuneConfig
from tests.serving.conftest import Running, serving
from tests.serving.inside import reviewed, serve_run, train_a_run, unpack

TEXT = "the cat sat on a mat.\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.training.run.plot_losses", lambda run: None)
        return train_a_run(tmp_path_factory.mktemp("history"))


@pytest.fixture(scope="module")
def running(run: Path) -> Iterator[Running]:
    with serving([serve_run(run)]) as running:
        yield running


def test_checkpoints_and_the_curve(running: Running, run: Path) -> None:
    found = running.get("/v1/history?model=a-run").json()
    assert found["model"] == "a-run"
    steps = {card["step"]: card["kept"] for card in found["checkpoints"]}
    assert {3, 6, 9, 12} <= set(steps) and all(steps[step] for step in (3, 6, 9, 12))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = {row["step"]: row["loss"] for row in lines if row["kind"] == "train"}
    val = {row["step"]: row["loss"] for row in lines if row["kind"] == "eval"}
    curve = found["curve"]
    assert dict(zip(curve["step"], curve["train"], strict=True)) == train
    assert dict(zip(curve["val_step"], curve["val"], strict=True)) == val
    assert "why" not in found
    facts = running.get("/props").json()["models"]["a-run"]
    assert facts["run"] == "a-run" and str(run.parent) not in json.dumps(facts)


def test_a_long_curve_is_averaged(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = running.get("/v1/history").json()["curve"]
    monkeypatch.setattr(history_module, "_POINTS", 3)
    short = running.get("/v1/history").json()["curve"]
    assert short["step"] == [4, 8, 12]
    for i, end in enumerate(short["step"]):
        assert short["train"][i] == pytest.approx(np.mean(whole["train"][end - 4 : end]))


@torch.inference_mode()
def test_a_text_through_training_is_what_each_checkpoint_says(running: Running, run: Path) -> None:
    progress, found = reviewed(running, prompt=TEXT, steps=[9, 3], heads=True)
    assert progress == [{"done": i, "of": 2} for i in range(3)]
    assert found["steps"] == [9, 3] and found["skipped"] == []
    ids = [card["id"] for card in found["tokens"]]
    logprob, rank = unpack(found["logprob"]), unpack(found["rank"])
    assert "".join(card["text"] for card in found["tokens"]) == TEXT
    width = running.served["a-run"].engine.width
    for row, step in enumerate(found["steps"]):
        model = GPT2Model.from_pretrained(run / f"step-{step:08d}")
        logs = model(torch.tensor([ids]))["logits"][0, :, :width].log_softmax(-1)
        wanted = [float(logs[t, token]) for t, token in enumerate(ids[1:])]
        np.testing.assert_allclose(logprob[row, 1:], wanted, rtol=0, atol=1e-5)
        ranks = [int((logs[t] > logs[t, token]).sum()) for t, token in enumerate(ids[1:])]
        assert rank[row, 1:].tolist() == ranks
    assert np.isnan(logprob[:, 0]).all() and (rank[:, 0] == 2**32 - 1).all()
    assert unpack(found["head_scores"]["induction"]).shape == (2, 2, 2)
    # 学过的比没有学过的更可能。
    assert logprob[0, 1:].mean() > logprob[1, 1:].mean()


def test_all_of_them_and_no_more_than_fit(
    running: Running, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found = reviewed(running, prompt=TEXT)
    held = [int(folder.name[5:]) for folder in sorted(run.glob("step-*"))]
    assert found["steps"] == held
    monkeypatch.setattr(history_module, "MOST_STEPS", 3)
    _, found = reviewed(running, prompt=TEXT)
    assert len(found["steps"]) == 3 and found["steps"][0] == 3 and found["steps"][-1] == 12


def test_a_damaged_checkpoint_is_left_out_and_said(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "hurt"
    shutil.copytree(run, copy)
    weights = copy / "step-00000006" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with serving([serve_run(copy)]) as running:
        _, found = reviewed(running, prompt=TEXT, steps=[3, 6, 9])
        shutil.rmtree(copy / "step-00000009")
        error = running.post("/v1/history", {"prompt": TEXT, "steps": [9]}).json()["error"]
        for folder in copy.glob("step-*"):
            shutil.rmtree(folder)
        gone = running.post("/v1/history", {"prompt": TEXT})
    assert found["steps"] == [3, 9] and [one["step"] for one in found["skipped"]] == [6]
    assert "damaged" in found["skipped"][0]["why"]
    assert error["param"] == "steps" and "from 3 to" in error["message"]
    assert gone.status_code == 400 and "no checkpoint any more" in gone.text


def test_a_lora_run_has_a_history_too(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.training.run.plot_losses", lambda run: None)
    lora = TuneConfig(trainable="lora", lora_rank=2)
    tuned = train_a_run(tmp_path, init_from=str(run), tune=lora, steps=3)
    served = serve_run(tuned)
    with serving([served]) as running:
        _, found = reviewed(running, prompt=TEXT, steps=[3])
    assert found["steps"] == [3] and found["skipped"] == []
    ids = torch.tensor([[card["id"] for card in found["tokens"]]])
    with torch.inference_mode():
        logs = open_model(tuned / "step-00000003")(ids)["logits"][0, :, : served.engine.width]
    wanted = logs.log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[:, 0]
    np.testing.assert_allclose(unpack(found["logprob"])[0, 1:], wanted, rtol=0, atol=1e-5)


def test_one_checkpoint_in_memory_and_a_diverged_one_is_left_out(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """读下一个之前，上一个已经不在；NaN 的名次不是零。"""
    real, held, alive = Review.load, list[Any](), list[int]()

    def load(self: Review, step: int) -> GPT2Model | None:
        alive.append(sum(one() is not None for one in held))
        model = real(self, step)
        assert model is not None
        if step == 6:
            model.embed.wte.weight.data.fill_(float("nan"))
        held.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Review, "load", load)
    _, found = reviewed(running, prompt=TEXT, steps=[3, 6, 9])
    assert alive == [0, 0, 0]
    assert found["steps"] == [3, 9]
    (skipped,) = found["skipped"]
    assert skipped["step"] == 6 and "not finite" in skipped["why"]


def test_who_leaves_in_a_load_keeps_the_place_until_the_load_ends() -> None:
    started, ended = threading.Event(), threading.Event()

    def load(step: int) -> None:
        started.set()
        assert ended.wait(20)

    async def leave() -> int:
        inside = Inside({}, None, True)  # type: ignore[arg-type]
        stream = inside._reviewed(SimpleNamespace(steps=[1], load=load))  # type: ignore[arg-type]
        await anext(stream)
        going = asyncio.ensure_future(anext(stream))  # type: ignore[arg-type]
        assert await asyncio.to_thread(started.wait, 20)
        going.cancel()
        with pytest.raises(asyncio.CancelledError):
            await going
        held = inside._reviewing
        ended.set()
        while inside._reviewing:
            await asyncio.sleep(0.001)
        return held

    assert asyncio.run(asyncio.wait_for(leave(), 20)) == 1


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": TEXT, "steps": [4444]}, "steps", "from 3 to 12"),
        ({"prompt": TEXT, "steps": [3, 3]}, "steps", "twice"),
        ({"prompt": TEXT, "steps": []}, "steps", "at least 1"),
        ({"prompt": TEXT, "steps": [1] * 51}, "steps", "at most 50"),
        ({"prompt": "a" * 33}, "prompt", "33 tokens: give 1 to 32"),
        ({"prompt": "\u00e9"}, "prompt", "cannot encode"),
        ({"prompt": TEXT, "step": [3]}, "steps", "did you mean 'steps'?"),
        ({"prompt": TEXT, "folder": "/etc"}, None, "unknown field"),
    ],
)
def test_bad_requests(
    running: Running, body: dict[str, Any], param: str | None, words: str
) -> None:
    response = running.post("/v1/history", body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param and words in error["message"]


def test_a_model_without_a_run_says_why(server: Running) -> None:
    found = server.get("/v1/history").json()
    assert found["checkpoints"] == [] and found["curve"] is None and "run folder" in found["why"]
    response = server.post("/v1/history", {"prompt": "a"})
    assert response.status_code == 400 and response.json()["error"]["code"] == "no_checkpoints"
