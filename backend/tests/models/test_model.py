"""主干的性质：因果、填充、打包、共享权重、参数量、按需返回的中间量。"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.models.transformer import (
    GPT2Model,
    create_gpt2_large,
    create_gpt2_medium,
    create_gpt2_model,
    create_gpt2_small,
    create_gpt2_xl,
)

from .helpers import VARIANTS, relative, steady, tiny_config, tiny_model, tokens

TIGHT = 1e-12
T = 16
variants = pytest.mark.parametrize("name", VARIANTS)


@variants
@settings(max_examples=15)
@given(cut=st.integers(1, T - 1), seed=st.integers(0, 999))
def test_causality_is_exact(name: str, cut: int, seed: int) -> None:
    torch.manual_seed(seed)
    model, ids = tiny_model(**steady(VARIANTS[name])), tokens(1, T)
    other = ids.clone()
    other[:, cut:] = (other[:, cut:] + 1) % 37
    with torch.no_grad():
        a, b = model(ids)["logits"], model(other)["logits"]
    assert torch.equal(a[:, :cut], b[:, :cut])
    assert not torch.equal(a[:, cut:], b[:, cut:])


@variants
@given(pad=st.integers(1, T - 1), left=...)
def test_a_padded_row_equals_the_row_alone(name: str, pad: int, left: bool) -> None:
    model, ids = tiny_model(**VARIANTS[name]), tokens(2, T)
    mask = torch.ones_like(ids)
    mask[1, slice(None, pad) if left else slice(T - pad, None)] = 0
    with torch.no_grad():
        got = model(ids, attention_mask=mask)["logits"]
        alone = model(ids[1:, mask[1] == 1])["logits"][0]
        assert relative(got[1, mask[1] == 1], alone) <= TIGHT
        assert relative(got[0], model(ids[:1])["logits"][0]) <= TIGHT
    assert got.isfinite().all()


def test_a_row_that_is_all_padding_is_finite_forward_and_backward() -> None:
    for backend in ("sdpa", "reference"):
        model, ids = tiny_model(attention_backend=backend), tokens(2, 6)
        mask = torch.tensor([[1] * 6, [0] * 6])
        targets = ids.masked_fill(mask == 0, -100)
        model(ids, attention_mask=mask, targets=targets)["loss"].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@variants
@given(border=st.integers(1, T - 1))
def test_packed_documents_do_not_see_each_other(name: str, border: int) -> None:
    model, ids = tiny_model(**steady(VARIANTS[name])), tokens(1, T)
    other = ids.clone()
    other[:, :border] = (other[:, :border] + 1) % 37
    segment = (torch.arange(T)[None] >= border).long()
    with torch.no_grad():
        a = model(ids, segment_ids=segment)["logits"]
        b = model(other, segment_ids=segment)["logits"]
        alone = model(ids[:, border:])["logits"]
    assert torch.equal(a[:, border:], b[:, border:])
    assert relative(a[:, border:], alone) <= TIGHT


@given(border=st.integers(1, 9), pad=st.integers(1, 6), left=...)
def test_packed_and_padded(border: int, pad: int, left: bool) -> None:
    model, ids = tiny_model(), tokens(1, 10)
    segment = (torch.arange(10)[None] >= border).long() + 3
    filler, zeros = tokens(1, pad), torch.zeros(1, pad, dtype=torch.long)
    order = (lambda x, y: [y, x]) if left else (lambda x, y: [x, y])
    with torch.no_grad():
        got = model(
            torch.cat(order(ids, filler), 1),
            segment_ids=torch.cat(order(segment, zeros), 1),
            attention_mask=torch.cat(order(torch.ones_like(ids), zeros), 1),
        )["logits"]
        got = got[:, pad:] if left else got[:, :-pad]
        assert relative(got, model(ids, segment_ids=segment)["logits"]) <= TIGHT


@variants
def test_reference_equals_sdpa(name: str) -> None:
    torch.manual_seed(1)
    changes = {**VARIANTS[name], "attention_backend": "sdpa"}
    fast = tiny_model(**changes)
    slow = GPT2Model(fast.config.replace(attention_backend="reference")).double().eval()
    slow.load_state_dict(fast.state_dict())
    ids, mask = tokens(2, T), torch.ones(2, T, dtype=torch.long)
    mask[1, :5] = 0
    for extra in ({}, {"attention_mask": mask}):
        with torch.no_grad():
            assert relative(fast(ids, **extra)["logits"], slow(ids, **extra)["logits"]) <= TIGHT


def test_explicit_positions_shift_nothing_but_the_embedding() -> None:
    model, ids = tiny_model(), tokens(1, 5)
    with torch.no_grad():
        plain = model(ids)["logits"]
        same = model(ids, positions=torch.arange(5)[None])["logits"]
        moved = model(ids, positions=torch.arange(5)[None] + 3)["logits"]
    assert relative(same, plain) <= TIGHT
    assert relative(moved, plain) > 1e-3


def test_dropout_acts_in_training_and_never_in_eval() -> None:
    model, ids = tiny_model(dropout=0.3), tokens(2, T)
    with torch.no_grad():
        assert torch.equal(model(ids)["logits"], model(ids)["logits"])
        model.train()
        assert not torch.equal(model(ids)["logits"], model(ids)["logits"])
        # 去掉任何一处 dropout（嵌入、注意力权重、两个分支），另三处仍在：逐处单独检验。
        model.eval()
        reference = model(ids)["logits"]
        for part in (model.embed, model.h["0"].attn, model.h["1"].mlp):
            part.train()
            assert not torch.equal(model(ids)["logits"], reference)
            part.eval()
        model.h["0"].attn.training = True
        assert not torch.equal(model(ids)["logits"], reference)


# 计数来自 openai/gpt-2 的四个检查点形状；"post" 没有末尾归一化，少 2·n_embed。
COUNTS = {
    create_gpt2_small: (768, 124_439_808, 124_475_904, 86_610_432),
    create_gpt2_medium: (1024, 354_823_168, 354_871_296, 304_384_000),
    create_gpt2_large: (1280, 774_030_080, 774_090_240, 710_981_120),
    create_gpt2_xl: (1600, 1_557_611_200, 1_557_686_400, 1_478_800_000),
}


@pytest.mark.parametrize("create", COUNTS)
def test_preset_parameter_counts(create) -> None:
    width, *counts = COUNTS[create]
    with torch.device("meta"):
        for vocab, expected in zip((50257, 50304, 1000), counts, strict=True):
            assert create(vocab_size=vocab, norm="pre").num_parameters() == expected
            assert create(vocab_size=vocab, norm="post").num_parameters() == expected - 2 * width
            untied = create(vocab_size=vocab, norm="pre", tie_weights=False).num_parameters()
            assert untied == expected + vocab * width


def test_the_default_is_gpt2_small() -> None:
    with torch.device("meta"):
        assert create_gpt2_model().config == create_gpt2_small().config


def test_keel_has_one_more_norm_per_sublayer_but_the_first() -> None:
    post, keel = GPT2Model(tiny_config(norm="post")), GPT2Model(tiny_config(norm="keel"))
    sublayers = 2 * post.config.n_layer
    assert keel.num_parameters() - post.num_parameters() == (sublayers - 1) * 2 * 32


def test_tied_weights_cannot_come_apart(tmp_path) -> None:
    model, ids = tiny_model(), tokens(1, 5)

    def tied(m: GPT2Model) -> bool:
        return (
            m.head_weight is m.embed.wte.weight
            and sum(p.shape == (37, 32) for p in m.parameters()) == 1
        )

    assert tied(model) and "lm_head.weight" not in model.state_dict()
    model.save_pretrained(tmp_path)
    empty = GPT2Model(model.config).to("meta").to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    for other in (
        GPT2Model.from_pretrained(tmp_path), copy.deepcopy(model), empty, model.float().double()
    ):  # fmt: skip
        assert tied(other)
        before = other(ids)["logits"]
        with torch.no_grad():
            other.embed.wte.weight[ids[0, 0]] += 1.0
        assert not torch.equal(other(ids)["logits"][..., ids[0, 0]], before[..., ids[0, 0]])


def test_every_parameter_gets_a_gradient() -> None:
    for name, changes in VARIANTS.items():
        model, ids = tiny_model(**changes), tokens(2, 24)
        model(ids, targets=tokens(2, 24))["loss"].backward()
        dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert not dead, (name, dead)


def test_gradcheck() -> None:
    model, ids = tiny_model(scale=1.0, n_layer=1, n_embed=8, n_head=2), tokens(1, 4)
    weight = model.h["0"].attn.c_attn.weight
    original = weight.detach().clone()

    def loss(w: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(
            model, {"h.0.attn.c_attn.weight": w}, (ids,), {"targets": ids}
        )["loss"]

    assert torch.autograd.gradcheck(loss, (original.requires_grad_(),), fast_mode=True)


def test_initial_loss_is_near_its_formula() -> None:
    torch.manual_seed(0)
    model = GPT2Model(tiny_config(n_embed=64, vocab_size=1000, dropout=0.0))
    ids = tokens(8, 24, vocab=1000)
    loss = model(ids, targets=tokens(8, 24, vocab=1000))["loss"].item()
    # 末尾 LN 的输出范数是 sqrt(d)，所以 logits 的标准差是 0.02·sqrt(768)，各宽度相同。
    expected = math.log(1000) + 0.5 * 0.02**2 * 768
    assert abs(loss - expected) < 0.1


def test_maps_and_hidden_states_on_request() -> None:
    fast, ids = tiny_model(n_kv_head=2), tokens(2, 7)
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    with torch.no_grad():
        out = fast(ids, attention_mask=mask, return_attention=(0, 2), return_hidden=(0, 1, 3))
    assert set(out["attentions"]) == {0, 2} and set(out["hidden"]) == {0, 1, 3}
    for maps in out["attentions"].values():
        assert maps.shape == (2, 4, 7, 7)
        real = mask[:, None, :].expand(2, 4, 7) == 1
        assert torch.allclose(maps.sum(-1)[real], torch.ones(()).double())
        assert (maps.triu(1) == 0).all() and (maps[1, :, :, :3] == 0).all()
    # 末尾没有归一化的 post：最后一层之后的残差流乘以头就是 logits。
    assert relative(out["hidden"][3] @ fast.head_weight.T, out["logits"]) <= TIGHT


def test_logits_to_keep_and_targets_choose_what_is_returned() -> None:
    model, ids = tiny_model(), tokens(2, 6)
    with torch.no_grad():
        full = model(ids)["logits"]
        assert torch.equal(model(ids, logits_to_keep=6)["logits"], full)
        assert relative(model(ids, logits_to_keep=2)["logits"], full[:, -2:]) <= TIGHT
        assert set(model(ids, targets=ids)) == {"loss"}
        assert set(model(ids, targets=ids, logits_to_keep=1)) == {"loss", "logits"}


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"shape \(3,\)"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, r"shape \(1, 0\)"),
        ({"input_ids": torch.zeros(1, 3)}, "torch.float32, expected torch.int64"),
        ({"input_ids": torch.tensor([[1, 37]])}, r"contains 37, outside 0..36"),
        ({"input_ids": torch.tensor([[1, -1]])}, r"contains -1, outside 0..36"),
        ({"input_ids": tokens(1, 25)}, "needs 25 positions but context_size=24"),
        ({"targets": tokens(1, 4)}, r"targets has shape \(1, 4\) but input_ids has \(1, 5\)"),
        ({"targets": tokens(1, 5).float()}, "targets has dtype"),
        ({"targets": torch.full((1, 5), 37)}, "targets contains 37"),
        ({"attention_mask": torch.full((1, 5), 2)}, "only 1"),
        ({"attention_mask": torch.ones(1, 4)}, "attention_mask has shape"),
        ({"segment_ids": torch.tensor([[0, 1, 0, 1, 1]])}, "must not decrease"),
        ({"positions": torch.tensor([[0, 1, 3, 2, 4]])}, "from 3 to 2 in row 0: they must rise"),
        ({"positions": torch.tensor([[0, 1, 1, 2, 3]])}, "from 1 to 1 in row 0"),
        ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1]])}, "padding between tokens in row 0"),
        ({"global_attention_mask": torch.ones(1, 5)}, "longformer"),
        ({"segment_ids": torch.tensor([[-1, 0, 0, 1, 1]])}, "must be >= 0"),
        ({"positions": torch.tensor([[20, 21, 22, 23, 24]])}, "needs 25 positions"),
        ({"logits_to_keep": 6}, "logits_to_keep=6"),
        ({"return_attention": (3,)}, "names layer 3"),
        ({"return_hidden": (4,)}, "names layer 4"),
    ],
)
def test_bad_input_is_one_clear_sentence(kwargs: dict, message: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": tokens(1, 5), **kwargs})


def test_unknown_factory_options_name_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'n_layer'"):
        create_gpt2_small(n_layers=3)
