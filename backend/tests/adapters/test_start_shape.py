"""init_from 给形状：没有写明的取自那里，写明的必须相符，词表长到装得下数据的。"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.cli.commands import train as command
from app.models.transformer import GPT2Model
from app.models.transformer.config import GPT2Config

SHAPE = GPT2Config(vocab_size=70, context_size=24, n_layer=2, n_head=2, n_embed=16, norm="pre")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """一个模型，与只有词表大小可看的数据。"""
    monkeypatch.chdir(tmp_path)
    GPT2Model(SHAPE).save_pretrained("base")
    for name, size in (("small", 66), ("large", 71)):
        Path(name, "train").mkdir(parents=True)
        Path(name, "train/meta.json").write_text(json.dumps({"tokenizer": {"vocab_size": size}}))
    return tmp_path


def shape(*words: str) -> GPT2Config:
    return command.parse(["--init-from", "base", *words]).train.model


def test_the_shape_comes_from_the_folder(folders: Path) -> None:
    assert shape("--data.folder", "small") == SHAPE
    assert shape("--data.folder", "large") == SHAPE.replace(vocab_size=128)
    assert shape("--data.folder", "small", "--model.dropout", "0.3") == SHAPE.replace(dropout=0.3)
    assert shape("--model.context-size=16") == SHAPE.replace(context_size=16)


def test_what_is_written_stays_written(folders: Path) -> None:
    """不合的留给开训时拒绝，那里点名两个值。"""
    Path("run.yaml").write_text("model: {n_layer: 3, norm: post}\ninit_from: base\n")
    assert shape("--config", "run.yaml") == SHAPE.replace(n_layer=3, norm="post")
    with pytest.raises(ValueError, match="context_size=25 but init_from=base has 24: a context"):
        shape("--model.context-size", "25")


def test_yarn_keeps_its_frequencies_when_the_context_shrinks(folders: Path) -> None:
    raw = SHAPE.to_dict() | {"position": "rope", "rope": {"scaling": "yarn", "factor": 2.0}}
    GPT2Model(GPT2Config.from_dict(raw)).save_pretrained("base")
    assert shape("--model.context-size", "16").rope.original_context == 24
    assert shape().rope.original_context in (None, 24)
