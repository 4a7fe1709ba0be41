"""整个的微调与 transformers 的 GPT2LMHeadModel 加 torch 的 AdamW：同样的批，同样的十步。"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from app.data.batch import UNSCORED, Batch
from app.models.transformer.weights.layouts import write_tensors
from app.models.transformer.weights.pretrained import LAYOUTS
from app.training.config import OptimConfig
from app.training.machine.runtime import Runtime
from app.training.optim.adamw import by_decay
from app.training.optim.build import build_optimizer, trainable
from app.training.step import accumulate

from .test_huggingface import CONTEXT, VOCAB, both

CPU = Runtime(torch.device("cpu"), "", torch.float32, "")
# 键的偏置的梯度理论上是 0，只剩舍入（1e-9）；eps 比它大得多，Adam 才不会把噪声放大成整步。
OPTIM = OptimConfig(lr=3e-4, eps=1e-6, weight_decay=0.1)


def answers(step: int) -> Batch:
    """各行末尾长短不一的一段计分。"""
    random = np.random.default_rng(step)
    ids = random.integers(2, VOCAB, (6, CONTEXT + 1))
    targets = ids[:, 1:].copy()
    for row, length in enumerate(random.integers(1, CONTEXT, 6)):
        targets[row, :-length] = UNSCORED
    return Batch(ids[:, :-1], targets)


def test_ten_steps_are_those_of_transformers(tmp_path: Path) -> None:
    ours, theirs = both("gpt2", "tiny", torch.float32, tmp_path)
    ours.train()
    optimizer, _ = build_optimizer(ours, OPTIM)
    # 同样的两组；转置不改变哪些是矩阵。
    groups = by_decay([(n, p) for n, p in theirs.named_parameters()], OPTIM.weight_decay)
    other = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps)
    assert len(trainable(ours)) == len(list(theirs.parameters()))
    for step in range(10):
        batch = answers(step)
        mine = float(accumulate(ours, batch, 4, CPU).loss)
        logits = theirs(torch.from_numpy(batch.inputs)).logits
        loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.targets).flatten())
        loss.backward()
        assert mine == pytest.approx(loss.item(), abs=1e-6), step
        for one in (optimizer, other):
            one.step()
            one.zero_grad()
    found = write_tensors(LAYOUTS["gpt2"], ours.config, dict(ours.named_parameters()))
    for name, wanted in theirs.named_parameters():
        assert float((found[name] - wanted).detach().abs().max()) <= 2e-6, name
