"""GPT-2 主干：嵌入 -> N 层 -> （pre 才有的）末尾归一化 -> 输出头。前向就在下面一屏。

B 批、T 本次词元数、C 宽度、V 词表、N 层数。
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from .block import Block
from .cache import KVCache
from .checks import check_call, check_positions
from .config import GPT2Config
from .context import Context
from .embeddings import Embeddings
from .init import initialize
from .linear import Linear, linear
from .loss import head_cross_entropy
from .norm import make_norm
from .positions import PADDING, Positions


class GPT2Output(TypedDict, total=False):
    """logits (B, K, V)；loss 标量；attentions {层: (B, H, T, S)}；hidden {层: (B, T, C)}。"""

    logits: Tensor
    loss: Tensor
    cache: KVCache
    attentions: dict[int, Tensor]
    hidden: dict[int, Tensor]


class GPT2Model(nn.Module):
    """GPT-2 形状的语言模型。

    没有任何缓冲区：掩码与位置都由输入算出，所以 meta 设备、分片、转换都不必照顾它们。
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        # 每层一个；在这里解析好，编译整个模型时就不必追进解析里去。
        self.patterns = config.patterns
        self.embed = Embeddings(config)
        # 用字典而不用列表：流水线切分之后层的名字不变。
        self.h = nn.ModuleDict({str(i): Block(config, i) for i in range(config.n_layer)})
        self.ln_f = make_norm(config) if config.norm == "pre" else None
        tied = config.tie_weights
        self.lm_head = None if tied else Linear(config.n_embed, config.vocab_size, bias=False)
        initialize(self)

    def forward(
        self,
        input_ids: Tensor,
        *,
        targets: Tensor | None = None,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        use_cache: bool = False,
        return_cache: bool = False,
        logits_to_keep: int = 0,
        return_attention: tuple[int, ...] = (),
        return_hidden: tuple[int, ...] = (),
    ) -> GPT2Output:
        """一次前向。

        Args:
            input_ids: (B, T) int64。
            targets: (B, T) int64，已与 logits 对齐（下一个词元），-100 不计。给了它就返回
                loss，且不产生 logits，除非 logits_to_keep 要求。
            attention_mask: (B, T)，1 词元、0 填充，任一侧；有缓存时只说本次的词元。
            positions: (B, T) 自定位置；默认由掩码、文档号与缓存推出。
            segment_ids: (B, T) 沿行不减的文档号；文档互不可见，位置各自从 0 起。
            global_attention_mask: (B, T)，1 = 本次点名的全局词元，只给 longformer 图样；
                它看得见此前的一切，此后的一切看得见它。
            use_cache: 读并追加缓存（没给就新建一个），不求梯度；return_cache 把它放进结果。
            logits_to_keep: 只要最后几列的 logits；0 = 全部（有 targets 时 = 不要）。
            return_attention: 要哪些层的注意力图，由参考路径计算，不论运行的是哪个后端。
            return_hidden: i = 第 i 层之后的残差流（0 = 嵌入之后），末尾归一化之前。

        Raises:
            ValueError: 形状、类型、词表外的 id、超长、开关互相矛盾；都点名两个值与改法。
        """
        check_call(
            self.config, input_ids, targets, attention_mask, positions, segment_ids,
            global_attention_mask, cache, use_cache, return_cache, logits_to_keep,
            return_attention, return_hidden,
        )  # fmt: skip
        if use_cache and cache is None:
            # 点名的全局词元、每篇文档各自的前缀都要留着，环形缓存留不住。
            ring = global_attention_mask is None and segment_ids is None
            cache = self.new_cache(input_ids.shape[0], ring=ring)
        where = _coordinates(input_ids, attention_mask, positions, segment_ids, cache)
        if global_attention_mask is not None:
            where = replace(where, marked=global_attention_mask != 0)
        check_positions(self.config, where)
        step = None if cache is None else cache.begin(where)

        # 缓存里的键值不带梯度；与其悄悄截断，不如带缓存的前向整个不求梯度。
        with torch.set_grad_enabled(torch.is_grad_enabled() and not use_cache):
            ctx = Context.build(
                self.config, self.patterns, where, step,
                dtype=self.embed.wte.weight.dtype,
                training=self.training,
                want_maps=frozenset(return_attention),
            )  # fmt: skip
            x = self.embed(input_ids, where)
            hidden = {0: x}
            for i, block in enumerate(self.h.values(), start=1):
                x = block(x, ctx)
                if i in return_hidden:
                    hidden[i] = x
            if self.ln_f is not None:
                x = self.ln_f(x)

            out = GPT2Output()
            if targets is not None:
                out["loss"] = head_cross_entropy(x, self.head_weight, targets)
            if targets is None or logits_to_keep:
                out["logits"] = linear(x[:, -logits_to_keep:], self.head_weight)
        if step is not None:
            step.commit()
        if return_cache and cache is not None:
            out["cache"] = cache
        if return_attention:
            out["attentions"] = {i: ctx.plans[i].in_order(ctx.maps[i]) for i in return_attention}
        if return_hidden:
            out["hidden"] = {i: hidden[i] for i in return_hidden}
        return out

    @property
    def head_weight(self) -> Tensor:
        """(V, C)。共享时就是嵌入的权重本身：没有第二个参数，也就没有什么能把它们拆开。"""
        return self.embed.wte.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.embed.wte.weight.device

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def new_cache(self, batch_size: int, max_len: int | None = None, **options: Any) -> KVCache:
        """与本模型的设备、精度相配的缓存；options 见 KVCache.for_model。"""
        kind = self.device.type
        dtype = self.embed.wte.weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        return KVCache.for_model(
            self.config, batch_size, max_len, dtype=dtype, device=self.device, **options
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """写 config.json 与 model.safetensors（不用 pickle），每个文件先写在旁边再改名。"""
        from .weights import save_model

        save_model(self, Path(folder))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> GPT2Model:
        """读 save_pretrained 写的文件夹；dtype=None 保持文件里的精度。返回的模型处于 eval 状态。

        Raises:
            ValueError: 文件夹、配置或权重不对；在分配内存之前就检查名字、形状与头的大小。
        """
        from .weights import load_model

        return load_model(cls, Path(folder), torch.device(device), dtype)


def _coordinates(
    input_ids: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    segment: Tensor | None,
    cache: KVCache | None,
) -> Positions:
    """把用户给的各种说法归成一种：坐标。"""
    if segment is None and cache is not None and cache.packed:
        segment = cache.last()[1].expand_as(input_ids)
    if positions is not None:
        pos = positions if mask is None else positions.masked_fill(mask == 0, PADDING)
        return Positions(pos, segment)
    if segment is not None:
        return Positions.packed(segment, mask, None if cache is None else cache.last())
    past = 0 if cache is None else cache.uniform
    if mask is not None:
        return Positions.padded(mask, 0 if cache is None else cache.lengths[:, None])
    if past is not None:
        return Positions.plain(past, input_ids.shape[1], input_ids.device)
    assert cache is not None
    return Positions.padded(torch.ones_like(input_ids), cache.lengths[:, None])
