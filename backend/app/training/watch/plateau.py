"""一元平台：损失停在数据的一元熵上，模型只学会了哪个词元多、哪个少，还没有用上文。

深的 Post-LN 常停在这里（Xiong 2020, arXiv:2002.04745 讲预热为何要紧）。
"""

from __future__ import annotations

from collections import deque
from statistics import fmean

import numpy as np

from app.data.shards import TokenDataset

from ..config import TrainConfig

SAMPLE_TOKENS = 1 << 20
NEAR = 0.05
_PIECES = 64
_BLOCKS, _BLOCK_STEPS = 4, 50
WINDOW = _BLOCKS * _BLOCK_STEPS


def unigram_entropy(data: TokenDataset) -> float:
    """数据的一元熵（nat/词元），数至多 SAMPLE_TOKENS 个词元，分成几段匀取。

    取样的熵偏低约 (见过的种类 - 1) / (2·取样数)，补上（Miller 1955）。
    """
    if data.n_tokens <= SAMPLE_TOKENS:
        starts, length = np.zeros(1, np.int64), data.n_tokens
    else:
        length = SAMPLE_TOKENS // _PIECES
        starts = np.linspace(0, data.n_tokens - length, _PIECES).astype(np.int64)
    counts = np.zeros(data.vocab_size, np.int64)
    for start in starts:
        counts += np.bincount(data.read(int(start), length), minlength=data.vocab_size)
    total, counts = counts.sum(), counts[counts > 0]
    share = counts / total
    return float(-(share * np.log(share)).sum() + (len(counts) - 1) / (2 * total))


class PlateauWatch:
    """预热之后，每段 50 步的平均损失连续四段都在一元熵的 0.05 之内，就说一次。

    分段看平均：单步的损失起伏大；路过这一水平的训练不会四段都在近旁。
    entropy 为 None：损失不是每个词元的交叉熵，不看。
    """

    def __init__(self, entropy: float | None, config: TrainConfig) -> None:
        self.entropy, self._config = entropy, config
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._told = False

    def note(self, step: int, loss: float) -> str | None:
        """第 step 步（从 1 起）的训练损失；该提醒时返回那一句话，至多一次。"""
        if self.entropy is None or self._told or step <= self._config.schedule.warmup_steps:
            return None
        self._losses.append(loss)
        if len(self._losses) < WINDOW:
            return None
        losses = list(self._losses)
        means = [fmean(losses[i : i + _BLOCK_STEPS]) for i in range(0, WINDOW, _BLOCK_STEPS)]
        if any(abs(mean - self.entropy) > NEAR for mean in means):
            return None
        self._told = True
        return (
            f"warning: for {WINDOW} steps up to step {step} the training loss has stayed within "
            f"{NEAR} of {self.entropy:.3f}, the unigram entropy of the data: the model knows how "
            f"frequent each token is and uses no context yet. What helps: {self._advice()}"
        )

    def _advice(self) -> str:
        model, config = self._config.model, self._config
        norm = "" if model.norm == "keel" else f"model.norm=keel instead of {model.norm}, "
        return (
            f"{norm}more warm-up than schedule.warmup_steps={config.schedule.warmup_steps}, "
            f"or less than optim.lr={config.optim.lr:g}"
        )
