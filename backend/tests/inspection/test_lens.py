"""逐层的预言：最后一行就是模型；名次、KL 与熵等于 numpy 的 float64；切几片都一样。"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.inspection.lens import NO_RANK, Lens, lens, read
from app.inspection.look import Look, Wish, look
from app.inspection.score import score
from app.inspection.slices import dearest, forward_cost, whole
from app.inspection.walk import walk
from app.models.transformer import GPT2Model
from tests.inspection.test_walk import IDS, model_of
from tests.models.helpers import NORMS

WIDTH = 30


def seen(model: GPT2Model, rows: int = 64) -> Lens:
    found = whole(walk(model, IDS))
    return whole(lens(model, found.streams, IDS, WIDTH, rows))


def distributions(model: GPT2Model) -> np.ndarray:
    """(N+1, T, V)：照定义写的。"""
    out = []
    for stream in whole(walk(model, IDS)).streams:
        x = stream.numpy()
        if model.config.norm == "pre":
            mean, spread = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
            assert model.ln_f is not None
            gain, shift = (p.detach().numpy() for p in (model.ln_f.weight, model.ln_f.bias))
            x = (x - mean) / np.sqrt(spread + 1e-5) * gain + shift
        logits = (x @ model.head_weight.detach().numpy().T)[:, :WIDTH]
        e = np.exp(logits - logits.max(-1, keepdims=True))
        out.append(e / e.sum(-1, keepdims=True))
    return np.stack(out)


@pytest.mark.parametrize("norm", NORMS)
def test_the_lens_equals_the_definition(norm: str) -> None:
    model = model_of(norm=norm)
    found, p = seen(model), distributions(model)
    last = p[-1]
    np.testing.assert_allclose(found.entropy, -(p * np.log(p)).sum(-1), rtol=0, atol=1e-12)
    kl = (last * (np.log(last) - np.log(p))).sum(-1)
    np.testing.assert_allclose(found.kl, kl, rtol=0, atol=1e-12)
    assert (found.kl >= 0).all() and (found.kl[-1] == 0).all()
    order = np.argsort(-p, axis=-1, kind="stable")
    np.testing.assert_array_equal(found.top_id, order[..., :5])
    np.testing.assert_allclose(found.top_p, np.take_along_axis(p, order[..., :5], -1), atol=1e-12)
    for t, token in enumerate(IDS[1:]):
        for layer, row in enumerate(order):
            assert found.rank[layer, t] == row[t].tolist().index(token)
    assert (found.rank[:, -1] == NO_RANK).all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_last_row_is_the_model(norm: str) -> None:
    model = model_of(norm=norm)
    found = seen(model)
    with torch.no_grad():
        p = model(torch.tensor([IDS]))["logits"][0, :, :WIDTH].softmax(-1)
    values, index = p.topk(5, dim=-1)
    np.testing.assert_array_equal(found.top_id[-1], index.numpy())
    np.testing.assert_allclose(found.top_p[-1], values.numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 4, 15])
def test_slices_do_not_change_the_numbers(rows: int) -> None:
    model = model_of(norm="pre")
    first, other = seen(model), seen(model, rows)
    for name in ("top_id", "rank"):
        np.testing.assert_array_equal(getattr(first, name), getattr(other, name))
    for name in ("top_p", "kl", "entropy"):
        np.testing.assert_allclose(getattr(first, name), getattr(other, name), atol=1e-14)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(-40, 40), min_size=7, max_size=7), min_size=1, max_size=6),
    st.data(),
)
def test_ranks_and_divergences_of_any_logits(rows: list[list[int]], data: st.DataObject) -> None:
    """有并列、极尖的分布也一样：名次是更可能的个数，KL 不为负，熵在 0 与 ln V 之间。"""
    logits = torch.tensor(rows, dtype=torch.float64)
    logs, end = logits.log_softmax(-1), logits.flip(0).log_softmax(-1)
    following = torch.tensor([data.draw(st.integers(-1, 6)) for _ in rows])
    _, top, rank, kl, entropy = read(logs, end, following)
    for i, token in enumerate(following.tolist()):
        wanted = NO_RANK if token < 0 else sum(x > rows[i][token] for x in rows[i])
        assert rank[i] == wanted
    assert (kl >= 0).all() and kl.isfinite().all()
    assert (entropy >= -1e-12).all() and (entropy <= np.log(7) + 1e-12).all()
    assert (top[:, :-1] >= top[:, 1:]).all()
    q = logs.exp()
    wanted_kl = (end.exp() * (end - q.log())).sum(-1)
    torch.testing.assert_close(kl, wanted_kl.clamp(min=0), rtol=0, atol=1e-9)


def test_a_text_is_scored_as_the_model_does() -> None:
    model = model_of(norm="pre")
    with torch.no_grad():
        logs = model(torch.tensor([IDS]))["logits"][0, :, :WIDTH].log_softmax(-1)
    for rows in (2, 64):
        found = whole(score(model, IDS, WIDTH, rows))
        wanted = [float(logs[t, token]) for t, token in enumerate(IDS[1:])]
        np.testing.assert_allclose(found.logprob[1:], wanted, rtol=0, atol=1e-12)
        assert np.isnan(found.logprob[0]) and found.rank[0] == NO_RANK
        ranks = [int((logs[t] > logs[t, token]).sum()) for t, token in enumerate(IDS[1:])]
        assert found.rank[1:].tolist() == ranks
    one = whole(score(model, IDS[:1], WIDTH, 64))
    assert len(one.logprob) == 1


def test_every_slice_is_told_before_it_is_done_and_none_is_dearer_than_said() -> None:
    model = model_of(norm="pre", moe_num_experts=4)
    wish = Wish(width=WIDTH, maps=(0,), lens=True, norms=True, next=True, rows=4)
    steps = look(model, IDS, wish)
    calls: list[str] = []
    for name, module in model.named_modules():
        if name.endswith((".attn", ".mlp")):
            module.register_forward_hook(lambda *_, n=name: calls.append(n))
    pieces = []
    with torch.inference_mode():
        done: Look | None = None
        while done is None:
            before = len(calls)
            try:
                pieces.append(next(steps))
            except StopIteration as end:
                done = end.value
            # 一片里至多一个子层。
            assert len(calls) <= before + 1
    top = dearest(model.config, len(IDS))
    head = WIDTH * model.config.n_embed
    for piece in pieces:
        is_head = piece.weights == head and piece.tokens <= 4
        assert is_head or piece.tokens * piece.weights <= top.tokens * top.weights
    layers = sum(p.weights for p in pieces if p.tokens == len(IDS)) - model.config.n_embed
    scores = 4 * len(IDS) * model.config.n_embed * model.config.n_layer
    assert layers == forward_cost(model.config) + scores
