"""头的得分：造出来的图得满分，别的头得不到；随机的一段只由种子决定。"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from app.data.tokenizers import ByteTokenizer
from app.inspection.heads import heads, plain_ids, repeated, scores, stacked
from app.inspection.slices import whole
from tests.inspection.test_walk import model_of

N = 6


def perfect(*keys: int) -> torch.Tensor:
    """(1, 2n, 2n)：每个查询把全部权重给 keys 里它的那个键。"""
    weights = torch.zeros(1, 2 * N, 2 * N, dtype=torch.float64)
    weights[0, torch.arange(2 * N), torch.tensor(keys)] = 1
    return weights


def test_each_kind_of_head_gets_its_own_full_score() -> None:
    queries = range(2 * N)
    induction = perfect(*(q - N + 1 if q >= N else 0 for q in queries))
    previous = perfect(*(max(q - 1, 0) for q in queries))
    first = perfect(*(0 for _ in queries))
    # 照抄上一次的同一个词元（而不是它之后的那个）不是归纳头。
    same = perfect(*(q - N if q >= N else q for q in queries))
    found = scores([torch.cat([induction, previous]), torch.cat([first, same])])
    assert found.length == N
    later = 2 * N - 1
    np.testing.assert_allclose(found.induction, [[1, 0], [0, 0]], atol=1e-15)
    np.testing.assert_allclose(found.previous, [[1 / later, 1], [1 / later, 0]], atol=1e-15)
    np.testing.assert_allclose(
        found.first, [[(N - 1) / later, 1 / later], [1, 1 / later]], atol=1e-15
    )


def test_the_sequence_is_a_random_one_written_twice() -> None:
    ids = repeated(64, range(100))
    assert ids == repeated(64, range(100)) and len(ids) == 64
    assert ids[:32] == ids[32:] and len(set(ids)) == 32 and ids[:32] != sorted(ids[:32])
    assert len(repeated(1024, range(10))) == 20 and len(repeated(1024, range(1000))) == 128
    for context, count in ((7, 100), (100, 3)):
        with pytest.raises(ValueError, match=f"context_size={context}"):
            repeated(context, range(count))


def test_the_separator_is_never_drawn() -> None:
    tokenizer = ByteTokenizer()
    assert plain_ids(tokenizer, 300) == list(range(256)) and plain_ids(tokenizer, 4) == [0, 1, 2, 3]


def test_scores_of_a_model_are_means_of_its_weights() -> None:
    model = model_of(norm="pre", attention_pattern="local(3)")
    found = whole(heads(model, range(37)))
    ids = repeated(24, range(37))
    with torch.no_grad():
        maps = model(torch.tensor([ids]), return_attention=(0, 1, 2))["attentions"]
    n = len(ids) // 2
    for layer in range(3):
        for head in range(4):
            w = maps[layer][0, head].numpy()
            assert found.previous[layer, head] == pytest.approx(
                np.mean([w[q, q - 1] for q in range(1, 2 * n)]), abs=1e-12
            )
            assert found.first[layer, head] == pytest.approx(
                np.mean([w[q, 0] for q in range(1, 2 * n)]), abs=1e-12
            )
    # 窗口之外看不见上一次，得分恰是零。
    assert (found.induction == 0).all()
    assert stacked([found, found]).induction.shape == (2, 3, 4)
