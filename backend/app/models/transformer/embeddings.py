"""词元嵌入加学得的位置嵌入（GPT-2）。

B 批、T 词元数、C 宽度、V 词表。
"""

from __future__ import annotations

from torch import Tensor, nn

from .config import GPT2Config
from .visibility.inputs import check_fits, check_vocabulary
from .visibility.positions import Positions


class Embedding(nn.Embedding):
    """初始化统一在 init.py，构造时不做。"""

    init_std: float | None = None

    def reset_parameters(self) -> None:
        pass


class Embeddings(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = Embedding(config.vocab_size, config.n_embed)
        learned = config.position == "learned"
        self.wpe = Embedding(config.context_size, config.n_embed) if learned else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input_ids: Tensor, positions: Positions) -> Tensor:
        """(B, T) -> (B, T, C)。"""
        check_vocabulary(input_ids, self.wte.num_embeddings)
        return self.place(self.wte(input_ids), positions)

    def place(self, x: Tensor, positions: Positions) -> Tensor:
        """词元的向量 (B, T, C) 加上位置，再过 dropout。"""
        if self.wpe is not None:
            check_fits(positions, self.wpe.num_embeddings)
            # 填充的位置是 -1：借用第 0 行，反正没有词元看得见它。
            x = x + self.wpe(positions.pos.clamp(min=0))
        return self.dropout(x)
