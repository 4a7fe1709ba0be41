"""GPT-2 主干：嵌入 -> N 层 -> （pre 才有的）末尾归一化 -> 输出头。前向就在下面一屏。

B 批、T 本次词元数、C 宽度、V 词表、N 层数。
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from .block import Block, run_blocks
from .cache.kv_cache import KVCache
from .cache.limits import check_use
from .config import GPT2Config
from .embeddings import Embeddings
from .experts.balance import balance
from .experts.moe import Experts
from .layers.context import CacheKeys, Context, Note, build_contexts, check_layers, make_notes
from .layers.init import initialize
from .layers.linear import Linear, linear
from .layers.loss import Chunk, check_targets, cross_entropy, head_cross_entropy
from .layers.norm import make_norm
from .visibility.inputs import check_ids, coordinates
from .visibility.positions import Positions

Head = Callable[[Tensor, Tensor, Tensor], Tensor]


class GPT2Output(TypedDict, total=False):
    """logits (B, K, V)；loss 标量；attentions {层: (B, H, T, S)}；hidden {层: (B, T, C)}。

    有 MoE 层且没有用缓存时另有：aux_loss 标量，已乘系数的均衡与 z 损失，不在 loss 里（两个模型的
    loss 才可比），训练时相加；expert_load (M, E) 与 expert_dropped (M,)，M 个 MoE 层的负载。
    routing {层: (专家, 权重)}，各 (B, T, k)；专家 E = 填充，或超出容量。
    """

    logits: Tensor
    loss: Tensor
    cache: KVCache
    attentions: dict[int, Tensor]
    hidden: dict[int, Tensor]
    aux_loss: Tensor
    expert_load: Tensor
    expert_dropped: Tensor
    routing: dict[int, tuple[Tensor, Tensor]]


class GPT2Model(nn.Module):
    """GPT-2 形状的语言模型：out = model(input_ids, ...)，返回 GPT2Output。

    掩码与位置都由输入算出，没有缓冲区；唯一的例外是 sigmoid 路由器的 selection_bias。

    前向的参数:
        input_ids: (B, T) int64。
        targets: (B, T) int64，已与 logits 对齐（下一个词元），-100 不计。给了它就返回
            loss，且不产生 logits，除非 logits_to_keep 要求。
        head: (输出头的权重 (V, C), 头之前的 (B, T, C), targets) -> loss，代替交叉熵；在前向之内
            调用：分片（FSDP2）的权重只在这时是完整的。
        attention_mask: (B, T)，1 词元、0 填充，任一侧；有缓存时只说本次的词元。
        positions: (B, T) 自定位置；默认由掩码、文档号与缓存推出。
        segment_ids: (B, T) 沿行不减的文档号；文档互不可见，位置各自从 0 起。
        global_attention_mask: (B, T)，1 = 本次点名的全局词元，只给 longformer 图样；
            它看得见此前的一切，此后的一切看得见它。
        use_cache: 读并追加缓存（没给就新建一个），不求梯度；return_cache 把它放进结果。
        logits_to_keep: 只要最后几列的 logits；0 = 全部（有 targets 时 = 不要）。
        return_attention: 要哪些层的注意力图，由参考路径计算，不论运行的是哪个后端。
        return_hidden: i = 第 i 层之后的残差流（0 = 嵌入之后），末尾归一化之前。
        return_routing: 要哪些 MoE 层的路由。

    Raises:
        ValueError: 形状、类型、词表外的 id、超长、开关互相矛盾；都点名两个值与改法。
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        # 每层一个；在这里解析好，编译整个模型时就不必追进解析里去。
        self.patterns = config.patterns
        self.embed = Embeddings(config)
        # 用字典而不用列表：流水线切分之后层的名字不变。
        self.h = nn.ModuleDict({str(i): Block(config, i) for i in range(config.n_layer)})
        self.ln_f = make_norm(config) if config.has_final_norm else None
        tied = config.tie_weights
        self.lm_head = None if tied else Linear(config.n_embed, config.vocab_size, bias=False)
        # 损失的一块怎样算；编译过的（training/machine/runtime.py）从这里换上。
        self.loss_chunk: Chunk = cross_entropy
        initialize(self, config)

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
        head: Head | None = None,
        logits_to_keep: int = 0,
        return_attention: tuple[int, ...] = (),
        return_hidden: tuple[int, ...] = (),
        return_routing: tuple[int, ...] = (),
    ) -> GPT2Output:
        """一次前向；各参数见类的说明。"""
        config, (rows, tokens) = self.config, check_ids(input_ids)
        check_use(cache, use_cache, return_cache, rows, config.n_layer)
        if targets is not None:
            check_targets(targets, input_ids, config.vocab_size, use_cache)
        check_layers("return_hidden", return_hidden, config.n_layer)
        if not 0 <= logits_to_keep <= tokens:
            raise ValueError(
                f"logits_to_keep={logits_to_keep} must be between 0 and the {tokens} tokens"
            )
        notes = make_notes(config, return_attention, return_routing, loads=not use_cache)
        if use_cache and cache is None:
            # 点名的全局词元、每篇文档各自的前缀都要留着，环形缓存留不住。
            ring = global_attention_mask is None and segment_ids is None
            cache = self.new_cache(rows, ring=ring)
        where = self.locate(
            input_ids, attention_mask, positions, segment_ids, global_attention_mask, cache
        )
        # 缓存里的键值不带梯度；与其悄悄截断，不如带缓存的前向整个不求梯度。
        with torch.set_grad_enabled(torch.is_grad_enabled() and not use_cache):
            x = self.embed(input_ids, where)
            step = None if cache is None else cache.begin(where)
            contexts = self.contexts(where, step, notes, x.dtype)
            x, hidden = run_blocks(self.h, self.ln_f, x, contexts, return_hidden)
            out = _noted(config, contexts)
            if targets is not None:
                score = self.head_loss if head is None else partial(head, self.head_weight)
                out["loss"] = score(x, targets)
            if targets is None or logits_to_keep:
                out["logits"] = self.head(x[:, -logits_to_keep:])
        if cache is not None and step is not None:
            cache.commit(step)
            if return_cache:
                out["cache"] = cache
        if return_hidden:
            out["hidden"] = hidden
        return out

    def features(self, input_ids: Tensor) -> Tensor:
        """(B, T) 无填充的词元 -> 输出头之前的 (B, T, C)：只给几个位置打分的人自己挑了再过头。"""
        where = Positions.plain(0, check_ids(input_ids)[1], input_ids.device)
        x, notes = self.embed(input_ids, where), make_notes(self.config, loads=False)
        return run_blocks(self.h, self.ln_f, x, self.contexts(where, None, notes, x.dtype))[0]

    # 一行只在这里的一段（上下文并行）时，换下来的就是这两个。
    locate = staticmethod(coordinates)

    def contexts(
        self, where: Positions, step: CacheKeys | None, notes: Sequence[Note], dtype: torch.dtype
    ) -> list[Context]:
        """坐标 -> 每层一个 Context。"""
        return build_contexts(self.config, self.patterns, where, step, notes, dtype, self.training)

    def head(self, x: Tensor) -> Tensor:
        """(..., C) -> logits (..., V)。"""
        return linear(x, self.head_weight)

    def head_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """(B, T, C) 与 (B, T) -> 平均交叉熵，不产生整张 logits。"""
        return head_cross_entropy(x, self.head_weight, targets, self.loss_chunk)

    @property
    def head_weight(self) -> Tensor:
        """(V, C)。共享时就是嵌入的权重本身：没有第二个参数，也就没有什么能把它们拆开。"""
        return self.embed.wte.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def active_parameters(self) -> int:
        """一个词元用到的参数量：每个 MoE 层只有它那 k 个专家。没有专家时等于 num_parameters。"""
        idle = 1 - self.config.moe_top_k / max(1, self.config.moe_num_experts)
        experts = [m for m in self.modules() if isinstance(m, Experts)]
        return self.num_parameters() - round(
            idle * sum(p.numel() for m in experts for p in m.parameters())
        )

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
        from .weights.own_folder import save_model

        save_model(self, Path(folder))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        **wanted: Any,
    ) -> GPT2Model:
        """读 save_pretrained 写的文件夹、Hugging Face 的文件夹，或 hub 上的名字。

        GPT-2（norm="pre"）、GPT-1（"post"）、OPT（按 do_layer_norm_before）都按表换名与转置。
        返回的模型处于 eval 状态；dtype=None 保持文件里的精度。

        Args:
            wanted: GPT2Config 的字段。dropout 与 attention_backend 照给的用；别的要与权重相符，
                如 norm="post" 遇上 GPT-2 的权重就是错。

        Raises:
            ValueError: 找不到、配置没有对应物、权重不合、或与 wanted 不符；在分配内存之前就检查
                名字、形状与头的大小。
            ImportError: 要从 hub 取而没有装 huggingface_hub。
        """
        from .weights.pretrained import load_pretrained

        return load_pretrained(cls, source, torch.device(device), dtype, wanted)


def _noted(config: GPT2Config, contexts: Sequence[Context]) -> GPT2Output:
    """各层记下的，归到结果里。"""
    out, notes = GPT2Output(), {ctx.layer: ctx.note for ctx in contexts}
    loads = [note.load for note in notes.values() if note.load is not None]
    if loads:
        found = balance(config.moe, loads)
        out["aux_loss"], out["expert_load"] = found.aux_loss, found.load
        out["expert_dropped"] = found.dropped
    maps = {i: contexts[i].plan.in_order(n.map) for i, n in notes.items() if n.map is not None}
    routing = {i: n.routing for i, n in notes.items() if n.routing is not None}
    if maps:
        out["attentions"] = maps
    if routing:
        out["routing"] = routing
    return out
