"""训练占多少内存：权重、梯度、优化器、激活、logits，由配置推算，不分配。

激活按 autograd 为反向留下的张量数，同一块存储只数一次；测试拿 saved_tensors_hooks 数到的对照。
C 宽度、H 查询头数、G 键值头的总宽、h 前馈的宽度、T 上下文、R 一次前向的序列数、V 词表。
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from app.models.transformer.backends.choose import explain_backends
from app.models.transformer.block import residuals
from app.models.transformer.config import GPT2Config
from app.models.transformer.layers.loss import chunk_bytes
from app.models.transformer.layers.norm import NORMS
from app.training.optim.build import OptimizerKind, nbytes

from .sizes import FLOAT32_BYTES, parameter_shapes, parameters_by_part
from .tuned import Beside, Parts

# 蒸馏的一块 logits 之外同时有几块这么大的，见 objectives/distill.py 的 divergence。
_CHUNKS = 3


@dataclass(frozen=True)
class Footprint:
    """各部分的字节数。

    Attributes:
        recomputed: 反向里重算一块时多出来的激活（激活检查点）。
        logits: 损失分块算，只有一块同时存在。
        working: 反向走过最上一层时的临时张量。
        updating: 更新时的临时张量。
        head: 输出头（词嵌入）那一张梯度；前向里算损失时就有了。冻结的没有。
        accumulates: 分几次前向：从第二次起，梯度与激活同时都在。
        teacher: 蒸馏的教师：权重，与它在头之前的隐状态。
        reference: DPO 点名的参考；开始之前算完就放掉。
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    recomputed: int
    logits: int
    working: int
    updating: int
    head: int
    accumulates: bool
    teacher: int = 0
    reference: int = 0

    @property
    def peak(self) -> int:
        """反向从上往下，一层的激活放掉，梯度出现：最多的时刻不是刚开始就是结束。"""
        held = self.weights + self.optimizer + self.teacher
        # 新词元的行：整张的梯度不算在 gradients 里。
        early = max(self.gradients, self.head) if self.accumulates else self.head
        first = held + early + self.activations
        first += max(self.logits, self.recomputed + self.working)
        # 词嵌入的梯度先成一整张，再并进输出头的那一张。
        late = max(self.head, self.updating, self.recomputed)
        return max(first, held + self.gradients + late, self.weights + self.reference)


def footprint(
    config: GPT2Config,
    *,
    rows: int,
    passes: int,
    optimizer: OptimizerKind,
    device: torch.device,
    dtype: torch.dtype,
    recompute: Collection[int] = (),
    parts: Parts | None = None,
) -> Footprint:
    """rows 条序列一次、每步 passes 次前向。

    recompute：激活检查点重算哪些块；parts：训练哪些，None = 全部。

    Raises:
        ValueError: 点名的后端做不了训练。
    """
    shapes = parameter_shapes(config) if parts is None else parts.trained
    trained = nbytes(shapes)
    head = FLOAT32_BYTES * config.vocab_size * config.n_embed
    hidden = config.moe_top_k * config.expert_hidden + config.shared_hidden
    hidden = max(hidden if config.moe_layers else 0, config.mlp_hidden)
    tokens, narrow = rows * config.context_size, dtype.itemsize
    blocks = _block_bytes(config, rows=rows, device=device, dtype=dtype, parts=parts)
    again = [size for layer, size in enumerate(blocks) if layer in recompute]
    return Footprint(
        weights=trained + (0 if parts is None else nbytes(parts.frozen)),
        gradients=trained,
        optimizer=optimizer.state_bytes(shapes),
        activations=activation_bytes(
            config, rows=rows, device=device, dtype=dtype, recompute=recompute, parts=parts
        ),
        recomputed=max(again, default=0),
        logits=_logits(config, tokens, device, dtype),
        # 前馈的隐层与它的输入各一份梯度。
        working=tokens * narrow * 2 * hidden,
        updating=optimizer.update_bytes(shapes),
        head=head if parts is None or parts.trains_head else 0,
        accumulates=passes > 1,
    )


def activation_bytes(
    config: GPT2Config,
    *,
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    recompute: Collection[int] = (),
    parts: Parts | None = None,
) -> int:
    """整个模型为反向留下的字节数，参数与输入的 id 不算；重算的块只留输入。

    冻结而没有适配器的矩阵其实不必留输入：这里仍算上，宁多不少。

    Raises:
        ValueError: 点名的后端做不了训练。
    """
    tokens = rows * config.context_size
    blocks = _block_bytes(config, rows=rows, device=device, dtype=dtype, parts=parts)
    inputs = tokens * config.n_embed * FLOAT32_BYTES
    # 没有图的层重算与否都不留。
    total = sum(min(inputs, s) if layer in recompute else s for layer, s in enumerate(blocks))
    if parts is not None and parts.has_rows:
        total += FLOAT32_BYTES * config.vocab_size * config.n_embed
    # 末尾的归一化、进输出头的那一份与它的梯度。
    ends = 2 * config.n_embed
    if config.has_final_norm:
        ends += config.n_embed + _statistics(config)
    if config.dropout:
        ends += config.n_embed
    return total + tokens * ends * FLOAT32_BYTES


def with_others(
    found: Footprint, beside: Beside, tokens: int, dtype: torch.dtype, device: torch.device
) -> Footprint:
    """加上教师与参考；tokens：一次前向的词元数。"""
    teacher = logits = 0
    if (shape := beside.teacher) is not None:
        teacher = _weights(shape) + tokens * shape.n_embed * dtype.itemsize
        # 另有教师的一块、两边的对数概率与概率。
        logits = _CHUNKS * _logits(shape, tokens, device, torch.float32)
    reference = 0 if beside.reference is None else _weights(beside.reference)
    return dataclasses.replace(
        found, logits=found.logits + logits, teacher=teacher, reference=reference
    )


def _weights(config: GPT2Config) -> int:
    return FLOAT32_BYTES * sum(parameters_by_part(config).values())


def _block_bytes(
    config: GPT2Config,
    *,
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    parts: Parts | None,
) -> list[int]:
    """各块为反向留下的字节数。"""
    tokens, narrow = rows * config.context_size, dtype.itemsize
    blocks = []
    for layer in range(config.n_layer):
        small, wide = _saved_per_token(config, layer, dtype)
        blocks.append(tokens * (small * narrow + wide * FLOAT32_BYTES))
    for choice in explain_backends(config, device=device, dtype=dtype, training=True):
        for layer in choice.layers:
            blocks[layer] += _map_bytes(choice.backend, config, rows, device, dtype)
    if dtype != torch.float32:
        # autocast 把矩阵另存一份低精度的，反向完了才放。
        casts = narrow * sum(_block_matrices(parameter_shapes(config))) // config.n_layer
        blocks = [size + casts for size in blocks]
    if parts is None:
        return blocks
    more = [tokens * narrow * parts.adapters.get(layer, 0) for layer in range(config.n_layer)]
    return [
        size + added if layer >= parts.lowest else 0
        for layer, (size, added) in enumerate(zip(blocks, more, strict=True))
    ]


def _block_matrices(shapes: dict[str, tuple[int, ...]]) -> list[int]:
    """各块里每个矩阵（叠起来的专家算一个）的权重数；路由器不算，它总在 float32 里、用 AdamW。"""
    return [
        math.prod(shape)
        for name, shape in shapes.items()
        if name.startswith("h.")
        and name.endswith(".weight")
        and len(shape) >= 2
        and ".router." not in name
    ]


def largest(fits: Callable[[int], bool], most: int) -> int:
    """1..most 里放得下的最大的一个；0 = 一个也放不下。fits 须单调。"""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _saved_per_token(config: GPT2Config, layer: int, dtype: torch.dtype) -> tuple[int, int]:
    """(计算精度的, float32 的) 数，一层、一个词元。"""
    width, groups = config.n_embed, config.kv_heads * config.head_dim
    norms = sum(plan.inner + plan.outer for plan in residuals(config, layer))
    wide = norms * (width + _statistics(config))
    # c_attn 的输入、q k v、注意力的输出（也是 c_proj 的输入）。
    narrow = width + (width + 2 * groups) + width
    if config.position == "rope" or config.qk_norm:
        narrow += width + groups
    if config.qk_norm:
        # 规范化之后、乘尺度之前的，与标准差的倒数；拼起来的换了布局，注意力的输出要再抄一遍。
        wide += width + groups + config.n_head + config.kv_heads
        narrow += width
        if dtype != torch.float32:
            # autocast 把 q 与 k 升到 float32 再规范化。
            wide += width + groups
    wide += config.n_head
    if layer in config.moe_layers:
        more_narrow, more_wide = _saved_by_experts(config, dtype)
        narrow, wide = narrow + more_narrow, wide + more_wide
    else:
        narrow += width + _hidden_copies(config) * config.mlp_hidden
    if config.dropout:
        narrow += 2 * width
    return narrow, wide


def _hidden_copies(config: GPT2Config) -> int:
    """激活函数的输入与输出；有门的另有门过激活的那一份，relu 的反向只要输出。"""
    if config.is_gated:
        return 4
    return 1 if config.activation == "relu" else 2


def _saved_by_experts(config: GPT2Config, dtype: torch.dtype) -> tuple[int, int]:
    """同上，一个 MoE 层的前馈。"""
    k, width, mixed = config.moe_top_k, config.n_embed, dtype != torch.float32
    # 每个词元抄成 k 份进各自的专家，出来的 k 份在乘权重之前留着。
    narrow = k * (2 * width + _hidden_copies(config) * config.expert_hidden)
    if config.moe.shared_experts:
        narrow += _hidden_copies(config) * config.shared_hidden + width * mixed
        narrow += width * bool(config.dropout)
    # 路由器的输入（就是前馈的输入）与各种打分：softmax、logsumexp、挑中的权重。
    return narrow, width + 2 * config.moe_num_experts + 1 + 3 * k


def _statistics(config: GPT2Config) -> int:
    """归一化在它的输入之外为每个词元记下的。"""
    return NORMS[config.norm_type].saved(config.n_embed)


def _map_bytes(
    backend: str, config: GPT2Config, rows: int, device: torch.device, dtype: torch.dtype
) -> int:
    """一层留下的 T×T 的图：只有不融合的写法才有。"""
    square = rows * config.n_head * config.context_size**2
    dropout = config.dropout > 0
    if backend == "reference":
        return square * (2 + dropout) * dtype.itemsize
    if backend == "sdpa" and dropout and device.type == "cpu":
        # CPU 的融合内核不做 dropout；另一条路全用 float32，q、k、v 也是。
        widened = rows * config.context_size * 3 * config.n_embed
        return square * 3 * FLOAT32_BYTES + widened * (FLOAT32_BYTES - dtype.itemsize)
    return 0


def _logits(config: GPT2Config, tokens: int, device: torch.device, dtype: torch.dtype) -> int:
    """一块 logits，梯度就地写在里面；低精度的另有 float32 的一份。"""
    row = FLOAT32_BYTES * config.vocab_size
    most = min(tokens, max(1, chunk_bytes(device) // row))
    return most * (row if dtype == torch.float32 else row + dtype.itemsize * config.vocab_size)
