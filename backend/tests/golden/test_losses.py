"""金损失：固定的文本、种子与配置，训练的前几步必须给出 git 里记着的损失。

任何改变数值含义的改动（初始化、残差、掩码、优化器分组、学习率、取批的次序）都会在这里现形。
确实有意改变时，用下面的命令重写文件，并在提交里说明为什么：

cd backend && python -m tests.golden.test_losses
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from app.data.sampler import Sampler
from app.models.transformer import GPT2Config, GPT2Model
from app.training.config import OptimConfig, ScheduleConfig
from app.training.optim.build import build_optimizer
from app.training.optim.schedule import learning_rate

FILE = Path(__file__).with_name("losses.json")
STEPS = 20


class Text:
    """平方数写成的文本，按字节；不依赖任何文件。"""

    def __init__(self) -> None:
        text = " ".join(str(i * i) for i in range(2000))
        self.ids = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        self.n_tokens = len(self.ids)

    def read(self, start: int, length: int) -> np.ndarray:
        return self.ids[start : start + length]


def losses(norm: str) -> list[float]:
    torch.manual_seed(0)
    data = {"vocab_size": 128, "context_size": 16, "n_layer": 3, "n_head": 2, "n_embed": 16}
    config = GPT2Config.from_dict({**data, "norm": norm, "dropout": 0.0})
    model, text = GPT2Model(config).double(), Text()
    optimizer, _ = build_optimizer(model, OptimConfig(lr=1e-2))
    sampler, schedule = Sampler(text.n_tokens, 16, 4, seed=0), ScheduleConfig(warmup_steps=5)
    result = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=1e-2, steps=STEPS, schedule=schedule)
        x, y = (torch.from_numpy(part) for part in sampler.batch(text, step))
        loss = model(x, targets=y)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        result.append(loss.item())
    return result


@pytest.mark.parametrize("norm", ["post", "pre", "deepnorm", "keel"])
def test_losses_replay(norm: str) -> None:
    golden = json.loads(FILE.read_text(encoding="utf-8"))[norm]
    assert losses(norm) == pytest.approx(golden, rel=1e-6)


if __name__ == "__main__":
    values = {norm: losses(norm) for norm in ("post", "pre", "deepnorm", "keel")}
    FILE.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
