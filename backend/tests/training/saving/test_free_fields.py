"""字段旁边的事实管着续训：FREE 只警告，SILENT 不提，模型别的字段拒绝。"""

from __future__ import annotations

from typing import Any

import pytest

from app.models.transformer import GPT2Config
from app.models.transformer.settings.fields import Mark, marked
from app.training.config import TrainConfig
from app.training.saving.resume import check_compatible, flat


def told(old: dict[str, Any]) -> list[str]:
    """存下的设置里有这些别的值时，续训说了什么。"""
    lines: list[str] = []
    now = TrainConfig()
    saved = now.to_dict()
    for name, value in old.items():
        *folders, last = name.split(".")
        place = saved
        for folder in folders:
            place = place[folder]
        assert last in place
        place[last] = value
    check_compatible({"data": "x", "config": saved}, now, "x", lines.append)
    return lines


@pytest.mark.parametrize("name", sorted(marked(TrainConfig, Mark.FREE)))
def test_a_free_field_is_warned_about(name: str) -> None:
    assert told({name: "other"}) == [
        f"warning: {name} changed from 'other' to {dict(flat(TrainConfig().to_dict()))[name]!r}: "
        "no exact continuation"
    ]


@pytest.mark.parametrize("name", sorted(marked(TrainConfig, Mark.SILENT)))
def test_a_silent_field_is_not_mentioned(name: str) -> None:
    assert told({name: "other"}) == []


def test_every_other_field_of_the_model_is_refused() -> None:
    names = {f"model.{name}" for name, _ in flat(GPT2Config().to_dict())}
    for name in sorted(names - marked(TrainConfig, Mark.FREE)):
        with pytest.raises(ValueError, match=f"{name}=.* but the checkpoint has 'other'"):
            told({name: "other"})


def test_what_is_free_is_the_same_for_loading_and_resuming() -> None:
    free = marked(GPT2Config, Mark.FREE)
    assert {f"model.{name}" for name in free} == marked(TrainConfig, Mark.FREE)
    assert {"dropout", "attention_backend", "moe.capacity_factor", "moe.dispatch"} <= free
    assert not free & {"norm", "n_embed", "context_size", "moe.hidden", "moe.router", "moe.layers"}


def test_what_comparisons_set_aside() -> None:
    """种子之外，不算作差别的都不影响权重；改了验证集的批数、从哪里开始，曲线便不可比。"""
    aside, silent = marked(TrainConfig, Mark.ASIDE), marked(TrainConfig, Mark.SILENT)
    assert aside - silent == {"seed"}
    assert silent - aside == {
        "eval_batches", "patience", "min_delta", "activation_checkpointing", "init_from", "data.val"
    }  # fmt: skip
