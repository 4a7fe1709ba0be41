"""一次训练的各个检查点里，每个头的得分：给 `gpt2 show heads`。"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from app.cli.shared.trained import load_trained

if TYPE_CHECKING:
    from app.inspection.heads import Heads

KINDS = ("induction", "previous", "first")


def scored_checkpoints(name: str, device: str) -> dict[str, Heads]:
    """{检查点的名字: 得分}；name 不是训练文件夹就只有一个。

    Raises:
        ValueError: 读不了，或上下文放不下重复的一段。
    """
    from app.inspection.heads import heads, plain_ids
    from app.inspection.slices import whole
    from app.training.saving.checkpoint import list_steps

    folders = [folder for _, folder in list_steps(Path(name))] or [Path(name)]
    found = {}
    for folder in folders:
        model, tokenizer, _ = load_trained(folder, device)
        ids = plain_ids(tokenizer, model.config.vocab_size)
        found[folder.name] = whole(heads(model, ids))
    return found


def head_lines(scores: Mapping[str, Heads]) -> Iterator[str]:
    """每个检查点一行：每种得分最高的头；最后是末一个检查点的每个头。"""
    length = next(iter(scores.values())).length
    yield f"{length} random tokens, written twice; the best head (layer.head) of each kind:"
    for name, one in scores.items():
        parts = []
        for kind in KINDS:
            values = getattr(one, kind)
            layer, head = np.unravel_index(values.argmax(), values.shape)
            parts.append(f"{kind} {layer}.{head} {values.max():.2f}")
        yield f"  {name}  " + "   ".join(parts)
    name, last = list(scores.items())[-1]
    yield f"every head of {name}:"
    for layer, head in np.ndindex(last.induction.shape):
        values = (f"{kind} {getattr(last, kind)[layer, head]:.2f}" for kind in KINDS)
        yield f"  {layer}.{head}  " + "   ".join(values)
