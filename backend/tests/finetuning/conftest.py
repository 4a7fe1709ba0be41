"""微调的试验共用：一次极小的训练作起点，二十个问题，与只跑命令的一个函数。"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.cli.main import main
from app.models.transformer import GPT2Config
from app.training import run as run_module
from app.training.config import DataConfig, ScheduleConfig, TrainConfig

COLOURS = ["red", "blue", "green", "pink", "grey", "gold"]
PAIRS = [
    (f"What does {letter}{letter}a like?", f"{letter}{letter}a likes {COLOURS[i % 6]}.")
    for i, letter in enumerate("abcdefghijklmnopqrst")
]
# 关掉与这里无关而要花时间的。
FAST = ["--set", "device=cpu", "--set", "precision=float32", "--set", "sample_tokens=16"]

Run = Callable[..., int]


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """画图占一秒。"""
    monkeypatch.setattr(run_module, "plot_losses", lambda run: None)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """字节的词表补齐到 264：对话模板的两个记号放得进补齐的行。"""
    home = tmp_path_factory.mktemp("base")
    (home / "text.txt").write_text("".join(f"{a} {b}\n" for a, b in PAIRS) * 6)
    assert main(["prepare", str(home / "text.txt"), "--out", str(home / "data"), "--tokenizer",
                 "bytes"]) == 0  # fmt: skip
    shape = GPT2Config(vocab_size=264, context_size=96, n_layer=2, n_head=2, n_embed=32)
    config = TrainConfig(
        model=shape, data=DataConfig(folder=str(home / "data")), out=str(home / "run"), steps=2,
        batch_size=2, schedule=ScheduleConfig(warmup_steps=1), sample_tokens=0, eval_batches=1,
        device="cpu", precision="float32",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "plot_losses", lambda run: None)
        run_module.train(config, lambda plan: None, lambda line: None)
    yield home / "run"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    lines = (json.dumps({"prompt": ask, "completion": answer}) for ask, answer in PAIRS)
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """同样的二十个，csv，列名是自己的。"""
    path = tmp_path / "questions.csv"
    path.write_text("question,answer\n" + "".join(f"{ask},{answer}\n" for ask, answer in PAIRS))
    return path
