"""校准与比较用的词元窗口：从数据里均匀地取，每次相同。

W 窗口数、T 一个窗口的词元数、V 词表。
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .perplexity import TokenSource

# 一个窗口至多多长：够长使后面的词元都有上文，又使 logits 一次放得下。
LONGEST = 256


def window_length(context: int) -> int:
    return min(context, LONGEST)


def sample_windows(source: TokenSource, name: str, length: int, most: int) -> Tensor:
    """(W, length + 1) int64：互不重叠、均匀地散布在数据里，最后一列只作目标；W <= most。

    Raises:
        ValueError: 数据连一个窗口也没有。
    """
    total = source.n_tokens
    if total < length + 1:
        raise ValueError(
            f"{name} has {total} tokens, fewer than one window of {length + 1}: give more data "
            "with --data"
        )
    count = min(most, total // (length + 1))
    starts = np.linspace(0, total - length - 1, count).astype(np.int64)
    rows = [np.asarray(source.read(int(start), length + 1), dtype=np.int64) for start in starts]
    return torch.from_numpy(np.stack(rows))


def random_windows(vocab_size: int, length: int, count: int) -> Tensor:
    """没有数据时：随机的词元，每次相同。"""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (count, length + 1), generator=generator)
