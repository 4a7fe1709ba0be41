"""DPO 的参考：各例在参考模型下的对数概率，算一次，存在数据旁边。

文件名里有参考模型的权重的指纹、精度与上下文：换了其一就另算一份。有 LoRA 时也是装上适配器之前的
模型。

N 例数。
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

from app.common.files import write_atomic
from app.common.tell import Tell
from app.data.feed import Feed
from app.data.feeding.examples import Pairs
from app.data.shards import TokenDataset
from app.distributed.comm import Ranks
from app.models.transformer import GPT2Model

from ..machine.runtime import Runtime
from .objective import Rows, forward
from .preference import row_log_probs


def with_reference(feed: Feed, known: np.ndarray) -> Feed:
    assert isinstance(feed, Pairs), "only preference data has a reference"
    return feed.with_reference(known)


def reference_key(model: GPT2Model, runtime: Runtime, context: int) -> str:
    """权重的内容与怎样算；同样的键就是同样的数。"""
    digest = hashlib.sha256(model.config.to_json().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    precision = str(runtime.dtype).removeprefix("torch.")
    return f"{digest.hexdigest()[:16]}-{precision}-{context}"


def stored(data: TokenDataset, key: str) -> np.ndarray | None:
    """算过的；长度不对（数据换过）就当没有。"""
    path = _path(data, key)
    if not path.is_file():
        return None
    found = np.load(path, allow_pickle=False)
    return found if found.shape == data.document_starts.shape else None


def store(data: TokenDataset, key: str, known: np.ndarray, tell: Tell) -> None:
    """存不下（只读的数据）只提醒：下次再算一遍。"""
    import io

    file = io.BytesIO()
    np.save(file, known)
    try:
        write_atomic(_path(data, key), file.getvalue())
    except OSError as error:
        tell(f"note: the reference is not stored beside the data: {error}")


def log_probs(
    model: GPT2Model, feed: Feed, rows: int, runtime: Runtime, ranks: Ranks
) -> np.ndarray:
    """(N,) float64，太长、从不读到的例是 NaN；各 rank 算一部分。"""
    assert isinstance(feed, Pairs)
    ids, was_training = feed.readable, model.training
    found = np.zeros(len(feed.lengths))
    model.eval()
    starts = range(ranks.rank * rows, len(ids), ranks.size * rows)
    with torch.no_grad(), runtime.autocast():
        for first in starts:
            mine = ids[first : first + rows]
            given = Rows.on(feed.one_each(mine), runtime.device)
            found[mine] = forward(model, given, row_log_probs)["loss"].cpu().numpy()
    model.train(was_training)
    total = ranks.sum(torch.from_numpy(found)).numpy()
    return np.where(np.isin(np.arange(len(total)), ids), total, np.nan)


def _path(data: TokenDataset, key: str) -> Path:
    return data.folder / f"reference-{data.fingerprint[:8]}-{key}.npy"
