"""与 transformers 的数值对照，随机的小权重：pre = GPT-2，post = GPT-1 = 后置归一化的 OPT。"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from app.models.transformer import GPT2Config, GPT2Model

transformers = pytest.importorskip("transformers", reason="pip install 'gpt2-workbench[hf]'")

SIZE = {"vocab_size": 61, "n_layer": 3, "n_head": 4, "n_embed": 32, "context_size": 24}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def copy_conv1d(ours: GPT2Model, theirs: dict[str, Tensor], wte: str, wpe: str) -> None:
    """GPT-1 与 GPT-2 的 Conv1D 存 (in, out)：四个矩阵要转置，其余照抄。"""
    state = {"embed.wte.weight": theirs[wte], "embed.wpe.weight": theirs[wpe]}
    for name in ours.state_dict():
        if name.startswith(("h.", "ln_f")):
            tensor = theirs[f"transformer.{name}"]
            conv = tensor.dim() == 2
            state[name] = tensor.T if conv else tensor
    ours.load_state_dict(state)


def gpt2() -> tuple[GPT2Model, torch.nn.Module]:
    config = transformers.GPT2Config(
        vocab_size=61, n_layer=3, n_head=4, n_embd=32, n_positions=24, **NO_DROPOUT
    )
    theirs = transformers.GPT2LMHeadModel(config).double().eval()
    ours = GPT2Model(GPT2Config(**SIZE, norm="pre", dropout=0.0)).double().eval()
    copy_conv1d(ours, theirs.state_dict(), "transformer.wte.weight", "transformer.wpe.weight")
    return ours, theirs


def gpt1() -> tuple[GPT2Model, torch.nn.Module]:
    config = transformers.OpenAIGPTConfig(
        vocab_size=61, n_layer=3, n_head=4, n_embd=32, n_positions=24, **NO_DROPOUT
    )
    theirs = transformers.OpenAIGPTLMHeadModel(config).double().eval()
    ours = GPT2Model(GPT2Config(**SIZE, norm="post", dropout=0.0)).double().eval()
    names = "transformer.tokens_embed.weight", "transformer.positions_embed.weight"
    copy_conv1d(ours, theirs.state_dict(), *names)
    return ours, theirs


def opt() -> tuple[GPT2Model, torch.nn.Module]:
    config = transformers.OPTConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=128,
        max_position_embeddings=24, do_layer_norm_before=False, dropout=0.0, layerdrop=0.0,
        activation_function="gelu_new", word_embed_proj_dim=32,
    )  # fmt: skip
    theirs = transformers.OPTForCausalLM(config).double().eval()
    ours = GPT2Model(GPT2Config(**SIZE, norm="post", dropout=0.0)).double().eval()
    state = theirs.state_dict()
    # OPT 的位置嵌入多出两行。
    mapped = {
        "embed.wte.weight": state["model.decoder.embed_tokens.weight"],
        "embed.wpe.weight": state["model.decoder.embed_positions.weight"][2:],
    }
    table = {
        "ln_1": "self_attn_layer_norm",
        "ln_2": "final_layer_norm",
        "attn.c_proj": "self_attn.out_proj",
        "mlp.c_fc": "fc1",
        "mlp.c_proj": "fc2",
    }
    for i in range(3):
        base = f"model.decoder.layers.{i}"
        for kind in ("weight", "bias"):
            for name, other in table.items():
                mapped[f"h.{i}.{name}.{kind}"] = state[f"{base}.{other}.{kind}"]
            parts = [state[f"{base}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
            mapped[f"h.{i}.attn.c_attn.{kind}"] = torch.cat(parts)
    ours.load_state_dict(mapped)
    return ours, theirs


@pytest.mark.parametrize("build", [gpt2, gpt1, opt])
def test_logits_loss_and_gradients_equal(build) -> None:
    torch.manual_seed(0)
    ours, theirs = build()
    # OPT 的 id 1 是填充，它的嵌入不收梯度：避开它。
    ids = torch.randint(2, 61, (2, 24))
    a, b = ours(ids)["logits"], theirs(ids).logits
    assert (a - b).abs().max() / b.abs().max() <= 1e-10
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    mine = ours(ids, targets=shifted)["loss"]
    # 它们自己的 loss 总是降到 float32：从它们的 logits 用 float64 重算。
    other = F.cross_entropy(b.flatten(0, 1), shifted.flatten())
    assert abs(mine.item() - other.item()) <= 1e-10
    mine.backward()
    other.backward()
    got = ours.embed.wte.weight.grad
    want = theirs.get_input_embeddings().weight.grad
    assert (got - want).abs().max() / want.abs().max() <= 1e-10


@pytest.mark.parametrize("build", [gpt2, gpt1, opt])
def test_float32(build) -> None:
    torch.manual_seed(0)
    ours, theirs = (m.float() for m in build())
    ids = torch.randint(0, 61, (2, 24))
    with torch.no_grad():
        a, b = ours(ids)["logits"], theirs(ids).logits
    assert (a - b).abs().max() / b.abs().max() <= 2e-5
