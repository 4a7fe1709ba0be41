"""把 KVCache（环形、int8、每行各自的长度）当作 transformers 的缓存来用。

B 行、T 本次词元数。
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from app.models.transformer.cache.kv_cache import KVCache
from app.models.transformer.config import GPT2Config
from app.models.transformer.visibility.positions import PADDING, Positions


class WorkbenchCache(Cache):
    """model.generate(..., past_key_values=WorkbenchCache())。

    注意力走主干自己的后端：有界的图样只留看得见的键，填充不占槽，不求梯度。
    头一次前向才知道行数与精度，那时才分配；options 见 KVCache.for_model。
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(layers=[])
        self.kv: KVCache | None = None
        self._options = options
        # transformers 数的是列，连填充在内；KVCache 只数真词元。
        self._columns = 0

    def open(self, config: GPT2Config, x: Tensor) -> KVCache:
        """头一次时按 x (B, T, C) 分配。

        Raises:
            ValueError: 已有内容的缓存行数不同。
        """
        if self.kv is None or (self._columns == 0 and self.kv.batch_size != len(x)):
            self.kv = KVCache.for_model(
                config, len(x), dtype=x.dtype, device=x.device, **self._options
            )
        if self.kv.batch_size != len(x):
            raise ValueError(
                f"the cache has {self.kv.batch_size} rows but the input has {len(x)}: "
                "use a new WorkbenchCache, or reorder_cache(rows)"
            )
        return self.kv

    def place(self, x: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> Positions:
        """这一次的坐标。mask (B, 列数) 是 transformers 的，连过去的列在内。

        Raises:
            ValueError: mask 不是 2D 的填充。
        """
        assert self.kv is not None
        T = x.shape[1]
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise ValueError(
                "WorkbenchCache takes a 2D attention_mask of 1 (token) and 0 (padding), not a "
                "prepared mask: use DynamicCache for those"
            )
        real = None if mask is None or bool((mask != 0).all()) else mask[:, -T:] != 0
        if real is None and self.kv.uniform is not None:
            where = Positions.plain(self.kv.uniform, T, x.device)
        else:
            real = torch.ones(x.shape[:2], device=x.device) if real is None else real.to(x.device)
            where = Positions.padded(real, self.kv.lengths[:, None])
        if position_ids is None:
            return where
        pos = torch.where(where.pos == PADDING, PADDING, position_ids)
        return where if bool((pos == where.pos).all()) else Positions(pos.expand(len(x), -1))

    def advance(self, columns: int) -> None:
        self._columns += columns

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "WorkbenchCache works with the models of app.interop.transformers only: "
            "use DynamicCache with other models"
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        limit = None if self.kv is None else self.kv.max_len
        return -1 if limit is None else limit

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._columns + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """去掉最后 -tokens_to_remove 列（transformers 的约定是负数）。

        Raises:
            ValueError: 正数，或环里已没有回滚之后要看的键（给大些的 max_chunk）。
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): give the number of tokens to remove as a negative"
            )
        if self.kv is not None and tokens_to_remove:
            uniform = self.kv.uniform
            if uniform is not None:
                self.kv.truncate(max(0, uniform + tokens_to_remove))
            else:
                self.kv.truncate((self.kv.lengths + tokens_to_remove).clamp(min=0))
        self._columns = max(0, self._columns + tokens_to_remove)

    def reset(self) -> None:
        self.kv, self._columns = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.kv is not None:
            self.kv.reorder(indices)

    @property
    def batch_size(self) -> int:
        return -1 if self.kv is None else self.kv.batch_size

    @property
    def is_initialized(self) -> bool:
        return self.kv is not None

    @property
    def is_compileable(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"WorkbenchCache(columns={self._columns}, options={self._options})"
