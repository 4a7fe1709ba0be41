"""研究的试验 10：词表增长。V 词表。"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from app.adapters.adapter import Adapter, merged
from app.adapters.rows import grow_vocabulary, grown_size
from app.adapters.trainable import apply_trainable
from app.models.transformer import GPT2Model
from app.models.transformer.settings.tune_config import TuneConfig

from ..models.helpers import tiny_model, tokens

LORA = TuneConfig(trainable="lora", lora_rank=2)


def log_probs(model: GPT2Model, ids: Tensor, rows: int) -> Tensor:
    """只在前 rows 个词元里归一：补齐的行不会被抽到。"""
    with torch.no_grad():
        return model(ids)["logits"][..., :rows].log_softmax(-1)


def test_sizes_are_multiples_of_64_once_the_padding_is_used() -> None:
    assert grown_size(50304, 50304) == 50304
    assert grown_size(50304, 50305) == 50368
    assert grown_size(37, 38) == 64


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("used", "count"), [(37, 1), (37, 40), (30, 5), (30, 9)])
def test_old_rows_stay_and_no_old_log_probability_moves_far(
    tied: bool, used: int, count: int
) -> None:
    old, ids = tiny_model(tie_weights=tied), tokens(2, 11, vocab=30)
    model = copy.deepcopy(old)
    new = grow_vocabulary(model, count, used)
    assert new == range(used, used + count)
    assert model.config.vocab_size == (37 if used + count <= 37 else grown_size(37, new.stop))
    leaves = ["embed.wte"] if tied else ["embed.wte", "lm_head"]
    for name in leaves:
        before, after = (m.get_submodule(name).weight for m in (old, model))
        assert torch.equal(after[:used], before[:used])
        assert torch.equal(after[new.stop : 37], before[new.stop :])
        assert torch.equal(after[used], before[:used].mean(0))
        assert (after[used : new.stop] == after[used]).all()
    moved = log_probs(model, ids, new.stop)[..., :used] - log_probs(old, ids, used)
    assert moved.max() <= 1e-12 and moved.min() >= -math.log1p(count / used) - 1e-12
    assert moved.min() < -1e-6


def test_with_lora_only_the_new_rows_train() -> None:
    model, ids = tiny_model(torch.float32, norm="pre", dropout=0.0), tokens(2, 9)
    new = grow_vocabulary(model, 2)
    said = apply_trainable(model, LORA, new)
    assert "and the rows of 2 new tokens" in said.what
    old = model.embed.wte.weight.detach().clone()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.5)
    ids[0, 3], ids[1, 4] = new.start, new.stop - 1
    for _ in range(5):
        model(ids, targets=ids)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    now = model.embed.wte.weight.detach()
    same = [torch.equal(now[i], old[i]) for i in range(len(now))]
    assert [i for i, equal in enumerate(same) if not equal] == list(new)
    ours = model.eval()(ids)["logits"]
    assert (merged(model)(ids)["logits"] - ours).abs().max() <= 5e-6


def test_rows_of_the_embedding_alone_leave_an_untied_head() -> None:
    """PEFT 可以只训练嵌入的几行，号在词表之内：头一位不动。"""
    model = tiny_model(norm="pre", tie_weights=False)
    head, old = (x.weight.detach().clone() for x in (model.lm_head, model.embed.wte))
    rows = torch.randn(2, old.shape[1], dtype=old.dtype)
    Adapter({}, 1.0, range(3, 5), {"embed.wte": rows}).merge_into(model)
    assert torch.equal(model.lm_head.weight, head)
    wanted = torch.cat([old[:3], rows, old[5:]])
    assert torch.equal(model.embed.wte.weight, wanted)
    size = model.config.vocab_size
    beyond = Adapter({}, 1.0, range(size - 1, size + 1), {"embed.wte": rows})
    with pytest.raises(ValueError, match=f"end at {size + 1} .* vocab_size={size} .*for lm_head"):
        beyond.merge_into(model)


def test_what_cannot_grow_is_refused() -> None:
    for count, used in ((0, 37), (1, 38), (1, 0)):
        with pytest.raises(ValueError, match=f"count={count} must be above 0 and used={used} "):
            grow_vocabulary(tiny_model(), count, used)
