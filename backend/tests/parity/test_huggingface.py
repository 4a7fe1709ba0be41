"""与 transformers 的数值对照，随机的小权重：pre = GPT-2 = OPT，post = GPT-1 = 后置归一化的 OPT。

一律走产品的路：它们存成文件夹、from_pretrained 读进来；我们的写出去、它们读进来。
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.generation.sampling import SamplingConfig
from app.interop.equivalent import Weights
from app.interop.hf import write_hf
from app.models.transformer import GPT2Model
from app.models.transformer.factory import PRESETS
from app.models.transformer.weights.layouts import write_tensors
from app.models.transformer.weights.pretrained import LAYOUTS
from tests.generation.helpers import new_tokens

from ..models.helpers import relative, tiny_model

transformers = pytest.importorskip("transformers", reason="pip install 'gpt2-workbench[hf]'")

VOCAB, CONTEXT = 61, 24
TINY = {"n_layer": 3, "n_head": 4, "n_embed": 32}
# 四种尺寸的真实宽度与头数，层数与词表按内存取小；单头宽度 64，所以没有凑巧的方阵。
SHAPES = {"tiny": TINY, **{name: {**shape, "n_layer": 1} for name, shape in PRESETS.items()}}
SHAPES["small"]["n_layer"] = SHAPES["medium"]["n_layer"] = 2


def conv1d(cls: str, shape: dict[str, int], **extra: Any) -> nn.Module:
    config = getattr(transformers, f"{cls}Config")(
        vocab_size=VOCAB, n_positions=CONTEXT, n_layer=shape["n_layer"], n_head=shape["n_head"],
        n_embd=shape["n_embed"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None, **extra,
    )  # fmt: skip
    return getattr(transformers, f"{cls}LMHeadModel")(config)


def opt(shape: dict[str, int], before: bool, activation: str = "gelu_new") -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=VOCAB, max_position_embeddings=CONTEXT, hidden_size=shape["n_embed"],
        num_hidden_layers=shape["n_layer"], num_attention_heads=shape["n_head"],
        ffn_dim=4 * shape["n_embed"], do_layer_norm_before=before, dropout=0.0,
        activation_function=activation,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


Build = Callable[[dict[str, int]], nn.Module]
KINDS: dict[str, tuple[Build, str]] = {
    "gpt2": (lambda shape: conv1d("GPT2", shape), "pre"),
    "openai-gpt": (lambda shape: conv1d("OpenAIGPT", shape), "post"),
    "opt before": (lambda shape: opt(shape, True), "pre"),
    "opt after": (lambda shape: opt(shape, False), "post"),
    "opt relu": (lambda shape: opt(shape, True, "relu"), "pre"),
}


def build(kind: str, shape: str, dtype: torch.dtype) -> nn.Module:
    """随机权重；偏置与尺度也打乱，刚初始化的 0 与 1 藏得住错。"""
    model = KINDS[kind][0](SHAPES[shape]).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def both(
    kind: str, shape: str, dtype: torch.dtype, folder: Path, **save: Any
) -> tuple[GPT2Model, nn.Module]:
    theirs = build(kind, shape, dtype)
    theirs.save_pretrained(folder, **save)
    return GPT2Model.from_pretrained(folder, dropout=0.0), theirs


def random_ids(rows: int, length: int) -> Tensor:
    # OPT 的 id 1 是填充，它的嵌入不收梯度：避开它。
    return torch.randint(2, VOCAB, (rows, length))


def gradients(ours: GPT2Model, theirs: nn.Module, layout: str) -> list[tuple[Tensor, Tensor]]:
    """每个参数的 (我们的, 它们的) 梯度，借同一张表换成它们的写法。"""
    grads = {name: p.grad for name, p in ours.named_parameters()}
    wanted = dict(theirs.named_parameters())
    found = {k: g for k, g in grads.items() if g is not None}
    translated = write_tensors(LAYOUTS[layout], ours.config, found)
    assert translated.keys() == wanted.keys()
    return [(translated[name], wanted[name].grad) for name in translated]


def cases() -> Iterator[Any]:
    """最宽的两种在 float64 里要几十秒，放到 slow。"""
    for shape in SHAPES:
        for kind in ("gpt2", "openai-gpt", "opt before", "opt after"):
            for dtype, limit in ((torch.float32, 2e-5), (torch.float64, 1e-10)):
                heavy = shape in ("large", "xl") and dtype == torch.float64
                marks = [pytest.mark.slow] if heavy else []
                name = f"{kind}-{shape}-{dtype}"
                yield pytest.param(kind, shape, dtype, limit, id=name, marks=marks)


@pytest.mark.parametrize(("kind", "shape", "dtype", "limit"), list(cases()))
def test_logits_loss_and_gradients(
    kind: str, shape: str, dtype: torch.dtype, limit: float, tmp_path: Path
) -> None:
    ours, theirs = both(kind, shape, dtype, tmp_path)
    assert ours.config.norm == KINDS[kind][1]
    ids = random_ids(2, 12)
    a, b = ours(ids)["logits"], theirs(ids).logits
    assert relative(a, b) <= limit
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    mine = ours(ids, targets=shifted)["loss"]
    # 它们自己的 loss 总是降到 float32：从它们的 logits 重算。
    other = F.cross_entropy(b.flatten(0, 1), shifted.flatten())
    assert abs(mine.item() - other.item()) <= limit * other.item()
    mine.backward()
    other.backward()
    pairs = gradients(ours, theirs, kind.split()[0])
    largest = max(want.abs().max().item() for _, want in pairs)
    for got, want in pairs:
        assert (got - want).abs().max().item() <= limit * largest


def test_relu_opt(tmp_path: Path) -> None:
    ours, theirs = both("opt relu", "tiny", torch.float64, tmp_path)
    ids = random_ids(2, CONTEXT)
    assert ours.config.activation == "relu"
    with torch.no_grad():
        assert relative(ours(ids)["logits"], theirs(ids).logits) <= 1e-10


@pytest.mark.parametrize("kind", ["gpt2", "openai-gpt", "opt before", "opt after"])
def test_64_greedy_tokens(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "CONTEXT", 80)
    ours, theirs = both(kind, "tiny", torch.float32, tmp_path)
    prompt = random_ids(1, 9)
    want = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False,
        eos_token_id=None, pad_token_id=0, use_cache=kind != "openai-gpt",
    )  # fmt: skip
    got = new_tokens(
        ours, prompt.tolist(), max_new_tokens=64, sampling=SamplingConfig(temperature=0.0)
    )
    assert got[0] == want[0, 9:].tolist()


@pytest.mark.parametrize("kind", ["gpt2", "openai-gpt", "opt before", "opt after"])
@pytest.mark.parametrize("size", ["1GB", "9KB"], ids=["single", "sharded"])
def test_in_out_in_is_bit_identical(kind: str, size: str, tmp_path: Path) -> None:
    ours, _ = both(kind, "tiny", torch.float32, tmp_path / "theirs", max_shard_size=size)
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == (size == "9KB")
    write_hf(Weights.of(ours), kind.split()[0], None, tmp_path / "out")
    again = GPT2Model.from_pretrained(tmp_path / "out")
    assert again.config == ours.config
    mine, other = ours.state_dict(), again.state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {"norm": "pre"}),
        ("gpt2", {"norm": "pre", "tie_weights": False}),
        ("gpt2", {"norm": "pre", "bias": False, "activation": "relu2"}),
        ("openai-gpt", {"norm": "post"}),
        ("openai-gpt", {"norm": "deepnorm", "activation": "silu"}),
        ("opt", {"norm": "post"}),
        ("opt", {"norm": "post", "tie_weights": False, "activation": "gelu"}),
        ("opt", {"norm": "pre", "activation": "relu"}),
        ("opt", {"norm": "deepnorm"}),
        ("opt", {"norm": "deepnorm", "tie_weights": False, "bias": False}),
    ],
)
def test_ours_computed_by_theirs(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """deepnorm 折进权重之后也只差舍入：float64 里看得最清楚。"""
    ours = tiny_model(**changes)
    write_hf(Weights.of(ours), family, None, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float64
    ).eval()
    assert type(theirs).__name__ in {"GPT2LMHeadModel", "OpenAIGPTLMHeadModel", "OPTForCausalLM"}
    ids = torch.randint(0, 37, (2, 24))
    with torch.no_grad():
        assert relative(theirs(ids).logits, ours(ids)["logits"]) <= 1e-10


def test_folding_deepnorm_the_other_way_is_not_exact(tmp_path: Path) -> None:
    """把 1/α 折进分支出口：ε 相对变大，float64 里也差。这就是不那样做的理由。"""
    ours = tiny_model(norm="deepnorm", scale=1.0)
    naive = {
        name: tensor / (2 * 3) ** 0.25 if "c_proj" in name else tensor
        for name, tensor in ours.state_dict().items()
    }
    other = GPT2Model(ours.config.replace(norm="post")).double().eval()
    other.load_state_dict(naive)
    ids = torch.randint(0, 37, (2, 24))
    assert 1e-6 < relative(other(ids)["logits"], ours(ids)["logits"]) < 1e-2
