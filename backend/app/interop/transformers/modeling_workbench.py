"""transformers 的模型：零件是主干的零件，只有外面的循环与注意力的出口是 transformers 的。

参数的名字就是主干的名字（ForCausalLM 里多一个前缀 "model."）。
B 批、T 本次词元数、S 键数、C 宽度、V 词表、H 查询头数、G 键值头数、D 头宽。
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from app.models.transformer.attention import Attention
from app.models.transformer.backends.mask_plan import MaskPlan
from app.models.transformer.block import Block, run_blocks
from app.models.transformer.config import GPT2Config
from app.models.transformer.embeddings import Embeddings
from app.models.transformer.experts.balance import balance
from app.models.transformer.layers.context import (
    Context,
    Note,
    build_contexts,
    make_notes,
    rotation,
)
from app.models.transformer.layers.init import initialize_block, initialize_leaf
from app.models.transformer.layers.linear import Linear
from app.models.transformer.layers.norm import make_norm
from app.models.transformer.visibility.pattern import CAUSAL
from app.models.transformer.visibility.positions import PADDING, Positions

from .cache_workbench import WorkbenchCache
from .configuration_workbench import SLIDING, WorkbenchConfig, mask_name, sliding_window
from .masks_workbench import build_masks, default_positions


@dataclass(frozen=True)
class Routed(Context):
    """注意力交给 transformers 的接口时的 Context；plan 用不到。

    masks {mask_name: 掩码}；options 是调用者给模型的其余参数，原样传到注意力函数
    （vLLM 的 transformers 后端靠它传自己的东西）。
    """

    implementation: str = "eager"
    masks: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class WorkbenchOutput(BaseModelOutputWithPast):
    """aux_loss: 标量，已乘系数的均衡与 z 损失；没有 MoE 层、或接着缓存算时为 None。"""

    aux_loss: Tensor | None = None


@dataclass(frozen=True)
class Past:
    """transformers 的缓存装成主干缓存的一步。"""

    cache: Cache

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.cache.update(k, v, layer)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """query (B, H, T, D)、key/value (B, G, S, D)、可加的掩码 -> (B, T, H, D)、(B, H, T, S)。"""
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, dim=1).mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(query.dtype)
    dropped = nn.functional.dropout(weights, dropout, module.training)
    y = dropped @ value.repeat_interleave(groups, dim=1)
    return y.transpose(1, 2), weights


def core_of(config: Any) -> GPT2Config:
    """config.core()，但用这个模块所见的类。

    动态装入时 transformers 把配置与模型各放一个文件夹、各装一份，两份的图样彼此不相等。
    """
    return GPT2Config.from_dict(config.core().to_dict())


class WorkbenchAttention(Attention):
    is_causal = True

    def __init__(self, config: WorkbenchConfig, core: GPT2Config, layer: int) -> None:
        super().__init__(core)
        # 下面几个名字是 transformers 与 vLLM 的注意力函数要读的。
        self.config, self.layer_idx = config, layer
        self.num_key_value_groups = self.heads // self.kv_heads
        self.scaling = self.head_dim**-0.5
        window = sliding_window(core.patterns)
        self.mask_name = mask_name(core.patterns[layer], window)
        self.sliding_window = window if self.mask_name == SLIDING else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        if not isinstance(ctx, Routed):
            return super().attend(q, k, v, ctx)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(ctx.implementation, eager_attention)
        if self.mask_name not in ctx.masks:
            raise ValueError(
                f"layer {self.layer_idx} needs a mask named {self.mask_name!r} but attention_mask "
                f"holds {sorted(ctx.masks)}: this way of running the model does not know the "
                "pattern"
            )
        y, weights = function(
            self, q, k, v, ctx.masks[self.mask_name],
            dropout=self.dropout_p if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **ctx.options,
        )  # fmt: skip
        if "map" in ctx.note.wishes:
            ctx.note.map = weights
        return y


class WorkbenchLayer(GradientCheckpointingLayer, Block):
    """主干的一层；transformers 从外面给它接上重算。"""

    def __init__(self, config: WorkbenchConfig, core: GPT2Config, layer: int) -> None:
        super().__init__(core, layer)
        self.attn = WorkbenchAttention(config, core, layer)


class WorkbenchPreTrainedModel(PreTrainedModel):
    config: WorkbenchConfig
    config_class = WorkbenchConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["WorkbenchLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": WorkbenchLayer}

    def _init_weights(self, module: nn.Module) -> None:
        """from_pretrained 也为缺的参数调用它：只写还没有值的（torch.nn.init 此时有它的守卫）。"""
        initialize_leaf(module, core_of(self.config))


class WorkbenchModel(WorkbenchPreTrainedModel):
    def __init__(self, config: WorkbenchConfig) -> None:
        super().__init__(config)
        self.core = core = core_of(config)
        self.patterns = core.patterns
        self.embed = Embeddings(core)
        layers = {str(i): WorkbenchLayer(config, core, i) for i in range(core.n_layer)}
        self.h = nn.ModuleDict(layers)
        self.ln_f = make_norm(core) if core.has_final_norm else None
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def init_weights(self) -> None:
        """与 init.py 相同。transformers 不为没有直接参数的模块调用 _init_weights，所以层在这里。"""
        super().init_weights()
        if not self.embed.wte.weight.is_meta:
            for layer in self.h.values():
                assert isinstance(layer, Block)
                initialize_block(layer, self.core)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed.add_module("wte", value)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        **options: Any,
    ) -> WorkbenchOutput:
        """transformers 的约定：input_ids 与 inputs_embeds 恰给一个；返回末尾归一化之后的残差流。

        attention_mask (B, 过去 + T) 时位置由它推出；output_attentions 总由 eager 计算，
        不论选的是哪种实现，从不给空的。

        Raises:
            ValueError: 两种输入都给或都没给；学得的位置不够。
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        depth = self.config.num_hidden_layers
        maps = tuple(range(depth)) if output_attentions else ()
        own = past_key_values if isinstance(past_key_values, WorkbenchCache) else None
        notes = make_notes(self.core, maps, loads=past_key_values is None)[:depth]
        if own is not None:
            x = self._cached(x, attention_mask, position_ids, own, notes)
        else:
            # 新建的空缓存不算过去：打包的文档、自定的位置不因 use_cache 而变样。
            past = past_key_values
            if use_cache and past is None:
                past_key_values = DynamicCache(config=self.config)
            route = self._routing(x, attention_mask, position_ids, past, options, bool(maps))
            step = None if past_key_values is None else Past(past_key_values)
            contexts = [
                replace(route, layer=layer, step=step, note=note)
                for layer, note in enumerate(notes)
            ]
            x = self.embed.place(x, route.positions)
            x, _ = run_blocks(self.h, self.ln_f, x, contexts)
        loads = [note.load for note in notes if note.load is not None]
        return WorkbenchOutput(
            last_hidden_state=x,
            past_key_values=past_key_values,
            attentions=tuple(note.map for note in notes if note.map is not None) or None,
            aux_loss=balance(self.core.moe, loads).aux_loss if loads else None,
        )

    def _cached(
        self,
        x: Tensor,
        mask: Any,
        position_ids: Tensor | None,
        cache: WorkbenchCache,
        notes: list[Note],
    ) -> Tensor:
        """主干自己的缓存与后端。里面的键值不带梯度；与其悄悄截断，不如整个不求梯度。"""
        kv = cache.open(self.core, x)
        where = cache.place(x, mask, position_ids)
        with torch.no_grad():
            x = self.embed.place(x, where)
            step = kv.begin(where)
            contexts = build_contexts(
                self.core, self.patterns[: len(notes)], where, step, notes, x.dtype, self.training
            )
            x, _ = run_blocks(self.h, self.ln_f, x, contexts)
        kv.commit(step)
        cache.advance(x.shape[1])
        for ctx in contexts:
            # 环里的键按槽的次序；换成位置的次序。
            if ctx.note.map is not None:
                ctx.note.map = ctx.plan.in_order(ctx.note.map)
        return x

    def _routing(
        self,
        x: Tensor,
        mask: Any,
        position_ids: Tensor | None,
        past: Cache | None,
        options: dict[str, Any],
        maps: bool,
    ) -> Routed:
        """各层共用的 Routed；层号、缓存与 note 由 forward 填。"""
        config = self.config
        if maps and config._attn_implementation != "eager":
            config = copy.copy(config)
            config._attn_implementation = "eager"
        masks = build_masks(config, self.patterns, x, mask, past, position_ids)
        pos = default_positions(x, mask, past) if position_ids is None else position_ids
        if self.core.moe_layers and isinstance(mask, Tensor) and mask.dim() == 2:
            # 填充不进路由，也不计入负载。
            pos = pos.masked_fill(mask[:, -x.shape[1] :].to(pos.device) == 0, PADDING)
        where = Positions(pos)
        return Routed(
            positions=where,
            plan=MaskPlan(where, where, CAUSAL, "reference", "transformers computes attention"),
            note=Note(),
            rotary=rotation(self.core, where, x.dtype),
            implementation=config._attn_implementation,
            masks=masks,
            options=options,
        )


def is_tied(model: WorkbenchForCausalLM) -> bool:
    """头与嵌入是不是同一个张量；适配器包着的层没有 weight，那就看配置。"""
    head, table = model.lm_head, model.get_input_embeddings()
    ends = [dict(module.named_parameters(recurse=False)).get("weight") for module in (head, table)]
    if None in ends:
        return bool(model.config.tie_weights)
    return ends[0] is ends[1]


class WorkbenchForCausalLM(WorkbenchPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed.wte.weight"}

    def __init__(self, config: WorkbenchConfig) -> None:
        super().__init__(config)
        self.model = WorkbenchModel(config)
        self.lm_head = Linear(config.n_embed, config.vocab_size, bias=False)
        self.post_init()

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        """PEFT 会拆开共享的头而不改配置：写出的配置照张量说。"""
        self.config.tie_weights = is_tied(self)
        super().save_pretrained(*args, **options)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast:
        """labels (B, T) 是 transformers 的约定：与 input_ids 对齐，这里才错开一位；-100 不计。

        有 MoE 层时 loss 已含 aux_loss（Trainer 只看 loss），aux_loss 也另给。
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **options,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options
            )
        rest = {
            "logits": logits,
            "past_key_values": out.past_key_values,
            "hidden_states": out.hidden_states,
            "attentions": out.attentions,
        }
        if out.aux_loss is None:
            return CausalLMOutputWithPast(loss=loss, **rest)
        loss = None if loss is None else loss + out.aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=out.aux_loss, **rest)

    @staticmethod
    def create_masks_for_generate(
        config: WorkbenchConfig,
        inputs_embeds: Tensor,
        attention_mask: Any,
        past_key_values: Cache | None,
        position_ids: Tensor | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """StaticCache 的掩码由 generate 事先做好。"""
        return build_masks(
            config, core_of(config).patterns, inputs_embeds, attention_mask, past_key_values,
            position_ids,
        )  # fmt: skip
