"""RoPE 与 transformers 的对照：频率、旋转、随机小 Llama 整个模型、GPT-J 的注意力。"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.config import RoPEConfig
from app.models.transformer.layers.rope import Rotary, inverse_frequencies
from app.models.transformer.weights.rope_rows import to_interleaved

transformers = pytest.importorskip("transformers", reason="pip install 'gpt2-workbench[hf]'")

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402
from transformers.models.gptj import modeling_gptj as gptj  # noqa: E402
from transformers.models.llama import modeling_llama as llama  # noqa: E402

VOCAB, LAYERS, HEADS, GROUPS, WIDTH, CONTEXT, T = 61, 2, 4, 2, 32, 64, 40
SCALED = {
    "none": (RoPEConfig(), {"rope_type": "default"}),
    "theta": (RoPEConfig(theta=500.0), {"rope_type": "default", "rope_theta": 500.0}),
    "linear": (RoPEConfig(scaling="linear", factor=4.0), {"rope_type": "linear", "factor": 4.0}),
    "yarn": (
        RoPEConfig(scaling="yarn", factor=4.0, original_context=16),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ),
}
every_scaling = pytest.mark.parametrize("name", SCALED)


def llama_config(parameters: dict[str, Any], **changes: Any) -> Any:
    sizes = {
        "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
        "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    theta = {"rope_theta": 10_000.0}
    return transformers.LlamaConfig(
        **{**sizes, **changes}, rope_parameters={**theta, **parameters},
        tie_word_embeddings=False, initializer_range=0.3, attn_implementation="sdpa",
    )  # fmt: skip


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


# 频率与旋转


@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("factor", [2.0, 4.0, 32.0])
@pytest.mark.parametrize("original", [256, 1024, 131_072])
def test_frequencies(width: int, theta: float, factor: float, original: int) -> None:
    sizes = {"hidden_size": width * 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    for kind in ("linear", "yarn"):
        parameters = {"rope_type": kind, "factor": factor, "rope_theta": theta}
        if kind == "yarn":
            parameters["original_max_position_embeddings"] = original
        theirs = llama_config(parameters, **sizes, max_position_embeddings=int(original * factor))
        want, scale = ROPE_INIT_FUNCTIONS[kind](theirs)
        ours = RoPEConfig(theta=theta, scaling=kind, factor=factor)
        got, mine = inverse_frequencies(ours, width, original)
        assert torch.allclose(got, want.double(), rtol=1e-6, atol=0.0)
        assert mine == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize(("length", "factor"), [(1024, 1.0), (1792, 4.0), (2048, 5.0)])
def test_ntk_is_the_dynamic_one_frozen_at_a_length(length: int, factor: float) -> None:
    """dynamic 在长 T 处的底数相当于 factor = s·T/L - (s - 1)；我们的 ntk 只有固定的 factor。"""
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    theirs = llama_config(
        {"rope_type": "dynamic", "factor": 4.0}, **sizes, max_position_embeddings=1024
    )
    want, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, seq_len=length)
    scaling = "none" if factor == 1.0 else "ntk"
    got, _ = inverse_frequencies(RoPEConfig(scaling=scaling, factor=factor), 64, 1024)
    assert torch.allclose(got, want.double(), rtol=1e-6, atol=0.0)


@every_scaling
def test_rotation_equals_llama(name: str) -> None:
    ours, parameters = SCALED[name]
    embed = llama.LlamaRotaryEmbedding(llama_config(parameters))
    positions = torch.stack((torch.arange(T), torch.arange(T) + 7))
    q, k = torch.randn(2, HEADS, T, 8), torch.randn(2, GROUPS, T, 8)
    want = llama.apply_rotary_pos_emb(q, k, *embed(q, positions))
    rotary = Rotary.at(positions, ours, 8, CONTEXT)
    for got, other in zip((rotary.apply(q), rotary.apply(k)), want, strict=True):
        # 它们的角是 float32 的：误差随位置长，这里位置小。
        assert (got - other).abs().max() <= 1e-5
    exact = Rotary.at(positions, ours, 8, CONTEXT, torch.float64)
    cos, sin = (torch.cat((t, t), -1)[:, 0].float() for t in (exact.cos, exact.sin))
    want = llama.apply_rotary_pos_emb(q, k, cos, sin)
    for got, other in zip((rotary.apply(q), rotary.apply(k)), want, strict=True):
        assert (got - other).abs().max() <= 1e-6


def test_rotation_equals_gptj() -> None:
    positions = torch.arange(T)[None]
    table = gptj.create_sinusoidal_positions(T, 8)
    sin, cos = table[None].chunk(2, -1)
    q = torch.randn(1, T, HEADS, 8)
    want = gptj.apply_rotary_pos_emb(q, sin, cos).transpose(1, 2)
    rotary = Rotary.at(positions, RoPEConfig(layout="interleaved"), 8, CONTEXT)
    assert (rotary.apply(q.transpose(1, 2)) - want).abs().max() <= 1e-5
    exact = Rotary.at(positions, RoPEConfig(), 8, CONTEXT)
    want = gptj.apply_rotary_pos_emb(q, exact.sin[:, 0], exact.cos[:, 0]).transpose(1, 2)
    assert (rotary.apply(q.transpose(1, 2)) - want).abs().max() <= 1e-6


def test_bfloat16_like_llama_under_autocast_and_better_without() -> None:
    embed = llama.LlamaRotaryEmbedding(llama_config({"rope_type": "default"}))
    positions = torch.arange(T)[None]
    q = torch.randn(1, 64, T, 8).bfloat16()
    exact = Rotary.at(positions, RoPEConfig(), 8, CONTEXT, torch.float64).apply(q.double())
    got = Rotary.at(positions, RoPEConfig(), 8, CONTEXT, torch.bfloat16).apply(q)
    # autocast 下残差流是 float32，所以 cos 也是；SDPA 再把积舍入到 bf16。
    same, _ = llama.apply_rotary_pos_emb(q, q, *embed(q.float(), positions))
    assert (got == same.bfloat16()).float().mean() >= 0.999
    pure, _ = llama.apply_rotary_pos_emb(q, q, *embed(q, positions))

    def error(x: Tensor) -> float:
        return (x.double() - exact).pow(2).mean().sqrt().item()

    assert error(got) < 0.7 * error(pure)


# 整个模型


def translate(theirs: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Llama 的名字 -> 我们的；q 与 k 的行按布局换次序。梯度同样翻译。"""

    def rows(weight: Tensor, heads: int) -> Tensor:
        return weight if layout == "half" else to_interleaved(weight, heads)

    mapped = {
        "embed.wte.weight": theirs["model.embed_tokens.weight"],
        "ln_f.weight": theirs["model.norm.weight"],
        "lm_head.weight": theirs["lm_head.weight"],
    }
    for i in range(LAYERS):
        part = {
            name.removeprefix(f"model.layers.{i}.").removesuffix(".weight"): tensor
            for name, tensor in theirs.items()
            if name.startswith(f"model.layers.{i}.")
        }
        q, k = rows(part["self_attn.q_proj"], HEADS), rows(part["self_attn.k_proj"], GROUPS)
        gate, up = part["mlp.gate_proj"], part["mlp.up_proj"]
        names = {
            "ln_1": part["input_layernorm"],
            "ln_2": part["post_attention_layernorm"],
            "attn.c_attn": torch.cat((q, k, part["self_attn.v_proj"])),
            "attn.c_proj": part["self_attn.o_proj"],
            "mlp.c_fc": torch.cat((gate, up)),
            "mlp.c_proj": part["mlp.down_proj"],
        }
        mapped |= {f"h.{i}.{name}.weight": tensor for name, tensor in names.items()}
    return mapped


class ExactRotary(nn.Module):
    """他们的表，但用 float64 算（原件无论模型多精都用 float32）；频率另有对照。"""

    def __init__(self, rope: RoPEConfig) -> None:
        super().__init__()
        self.inverse, self.scale = inverse_frequencies(rope, WIDTH // HEADS, CONTEXT)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = position_ids[..., None] * torch.cat((self.inverse, self.inverse))
        return angle.cos() * self.scale, angle.sin() * self.scale


def exact_norm(norm: nn.Module) -> nn.Module:
    """他们的 RMSNorm 内部总降到 float32。"""
    exact = nn.RMSNorm(WIDTH, eps=1e-5, dtype=torch.float64)
    exact.weight = norm.weight
    return exact


def pair(name: str, layout: str) -> tuple[GPT2Model, nn.Module]:
    rope, parameters = SCALED[name]
    config = GPT2Config(
        vocab_size=VOCAB, n_layer=LAYERS, n_head=HEADS, n_kv_head=GROUPS, n_embed=WIDTH,
        context_size=CONTEXT, dropout=0.0, bias=False, norm="pre", norm_type="rmsnorm",
        activation="swiglu", tie_weights=False, position="rope",
        rope=RoPEConfig(**{**vars(rope), "layout": layout}),
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(
        llama_config(parameters, intermediate_size=config.mlp_hidden)
    ).eval()
    ours = GPT2Model(config).eval()
    ours.load_state_dict(translate(theirs.state_dict(), layout))
    return ours, theirs


@every_scaling
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_llama_in_float64(name: str, layout: str) -> None:
    ours, theirs = (m.double() for m in pair(name, layout))
    theirs.model.rotary_emb = ExactRotary(SCALED[name][0])
    theirs.model.norm = exact_norm(theirs.model.norm)
    for layer in theirs.model.layers:
        layer.input_layernorm = exact_norm(layer.input_layernorm)
        layer.post_attention_layernorm = exact_norm(layer.post_attention_layernorm)
    ids = torch.randint(0, VOCAB, (2, T))
    a, b = ours(ids)["logits"], theirs(ids).logits
    assert relative(a, b) <= 1e-10
    targets = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    mine = ours(ids, targets=targets)["loss"]
    other = F.cross_entropy(b.flatten(0, 1), targets.flatten())
    assert abs(mine.item() - other.item()) <= 1e-10
    mine.backward()
    other.backward()
    want = translate({n: p.grad for n, p in theirs.named_parameters()}, layout)
    assert want.keys() == dict(ours.named_parameters()).keys()
    for parameter, tensor in ours.named_parameters():
        assert relative(tensor.grad, want[parameter]) <= 1e-10, parameter


@every_scaling
def test_llama_as_it_comes_in_float32(name: str) -> None:
    """原样的 Llama：频率、表、归一化都是他们的。"""
    ours, theirs = pair(name, "half")
    ids = torch.randint(0, VOCAB, (2, T))
    with torch.no_grad():
        assert relative(ours(ids)["logits"], theirs(ids).logits) <= 1e-5


@every_scaling
def test_cached_chunks_equal_llama(name: str) -> None:
    ours, theirs = pair(name, "half")
    ids = torch.randint(0, VOCAB, (1, T))
    cache, logits = None, []
    with torch.no_grad():
        for chunk in ids.split((17, 1, 1, 21), 1):
            out = ours(chunk, cache=cache, use_cache=True, return_cache=True)
            cache = out["cache"]
            logits.append(out["logits"])
        assert relative(torch.cat(logits, 1), theirs(ids).logits) <= 1e-5


def test_gptj_attention() -> None:
    """GPT-J 的两个分支并行，整个模型搭不出来：只比注意力，喂给它我们那一层的输入。"""
    config = GPT2Config(
        vocab_size=VOCAB, n_layer=1, n_head=HEADS, n_embed=WIDTH, context_size=CONTEXT,
        dropout=0.0, bias=False, position="rope", rope=RoPEConfig(layout="interleaved"),
    )  # fmt: skip
    ours = GPT2Model(config).eval()
    theirs = gptj.GPTJAttention(
        transformers.GPTJConfig(
            vocab_size=VOCAB, n_positions=CONTEXT, n_embd=WIDTH, n_layer=1, n_head=HEADS,
            rotary_dim=WIDTH // HEADS, attn_pdrop=0.0, resid_pdrop=0.0,
            bos_token_id=0, eos_token_id=0,
        ),
        layer_idx=0,
    ).eval()  # fmt: skip
    attention = ours.h["0"].attn
    with torch.no_grad():
        for parameter in attention.parameters():
            nn.init.normal_(parameter, std=0.3)
        q, k, v = attention.c_attn.weight.chunk(3)
        for name, weight in {"q": q, "k": k, "v": v, "out": attention.c_proj.weight}.items():
            getattr(theirs, f"{name}_proj").weight.copy_(weight)
        seen: list[tuple[Tensor, Tensor]] = []
        attention.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
        ours.embed.wte.weight.mul_(50)
        ours(torch.randint(0, VOCAB, (2, T)))
        x, got = seen[0]
        blocked = torch.full((T, T), torch.finfo(torch.float32).min).triu(1)
        positions = torch.arange(T).expand(2, T)
        want, _ = theirs(x, attention_mask=blocked, position_ids=positions)
    assert relative(got, want) <= 1e-5
