"""看里面的回答怎样读回来。"""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from app.cli.shared.trained import load_trained
from app.models.transformer import GPT2Config
from app.serving.served import Served, serve_model
from app.training import run as run_module
from app.training.config import DataConfig, ScheduleConfig, TrainConfig
from tests.serving.conftest import Running
from tests.training.conftest import write_dataset

KINDS = {"u8": "<u1", "u16": "<u2", "u32": "<u4", "f32": "<f4"}


def unpack(packed: dict[str, Any]) -> np.ndarray:
    raw = base64.b64decode(packed["data"], validate=True)
    return np.frombuffer(raw, KINDS[packed["dtype"]]).reshape(packed["shape"])


def inspect(server: Running, **body: Any) -> dict[str, Any]:
    response = server.post("/v1/inspect", body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def reviewed(server: Running, **body: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(进度, 结果)。"""
    response = server.post("/v1/history", body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [
        json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n") if line
    ]
    return events[:-1], events[-1]


def train_a_run(folder: Path, **changes: Any) -> Path:
    """一次真的训练：12 步，每 3 步留一个检查点。"""
    data = write_dataset(folder / "data")
    run = folder / "a-run"
    config = TrainConfig(
        model=GPT2Config(vocab_size=32, context_size=32, n_layer=2, n_head=2, n_embed=16,
                         dropout=0.0, norm="pre"),
        data=DataConfig(folder=str(data)), schedule=ScheduleConfig(warmup_steps=2), out=str(run),
        steps=12, batch_size=4, precision="float32", eval_every=4, eval_batches=1, sample_tokens=0,
        sample_every=0, save_every=0, keep_last=1, keep_every=3, device="cpu",
    )  # fmt: skip
    run_module.train(replace(config, **changes), lambda plan: None, lambda line: None)
    return run


def serve_run(run: Path) -> Served:
    trained = load_trained(run, "cpu")
    served = serve_model(run.name, trained.model, trained.tokenizer, rows=2)
    return replace(served, run=run)
