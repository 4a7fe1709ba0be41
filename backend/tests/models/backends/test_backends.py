"""选后端：按图样、长度、设备说出理由；做不到的拒绝；选了什么都与参考相同。"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from app.models.transformer import GPT2Config, KVCache, Positions
from app.models.transformer.backends.choose import Case, choose_backend, explain_backends
from app.models.transformer.backends.mask_plan import MaskPlan
from app.models.transformer.layers.context import build_contexts, make_notes
from app.models.transformer.visibility.atoms import Global, Local, Longformer
from app.models.transformer.visibility.pattern import CAUSAL
from app.models.transformer.visibility.pattern_text import parse
from app.models.transformer.visibility.rule import visible

from ..helpers import relative, tiny_model, tokens

CASE = Case(
    Local(256), 4096, 4096, everything=False, own_keys=True,
    device=torch.device("cpu"), dtype=torch.float32, head_dim=64,
)  # fmt: skip


@pytest.mark.parametrize(
    "changes, backend, reason",
    [
        ({}, "blocked", "of the 4096² scores"),
        ({"pattern": CAUSAL, "everything": True}, "sdpa", "every earlier key is visible"),
        ({"own_keys": False, "q_len": 1}, "sdpa", "cached keys"),
        ({"q_len": 300, "k_len": 300}, "sdpa", "save too little"),
        ({"grad": True}, "blocked", "scores"),
        ({"dropout": 0.1}, "blocked", "scores"),
        ({"dtype": torch.float64}, "blocked", "scores"),
    ],
)
def test_auto_chooses_with_a_reason(changes: dict, backend: str, reason: str) -> None:
    name, why = choose_backend("auto", replace(CASE, **changes))
    assert name == backend
    assert reason in why


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"grad": True}, "no backward on the CPU"),
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"dtype": torch.float64}, "float64"),
        ({"device": torch.device("mps")}, "mps"),
    ],
)
def test_flex_says_why_it_cannot(changes: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=f"attention_backend='flex'.*{reason}.*'auto'"):
        choose_backend("flex", replace(CASE, **changes))


def test_what_was_asked_for_is_what_runs() -> None:
    for asked in ("reference", "sdpa", "blocked"):
        assert choose_backend(asked, CASE) == (asked, "asked for")
    # 分块在处处可见时没有可分的：换成等价的内核，并说明。
    name, why = choose_backend("blocked", replace(CASE, everything=True))
    assert (name, "every earlier key" in why) == ("sdpa", True)


def test_explained_per_group_of_layers() -> None:
    config = GPT2Config(context_size=4096, attention_pattern=("local(256)", "causal"))
    near, full = explain_backends(config, device=torch.device("cpu"))
    assert near.layers == (0, 2, 4, 6, 8, 10)
    assert (near.pattern, near.backend) == (Local(256), "blocked")
    assert (full.layers, full.backend) == ((1, 3, 5, 7, 9, 11), "sdpa")
    (short,) = explain_backends(
        config.replace(attention_pattern="local(256)"), device=torch.device("cpu"), length=200
    )
    assert short.backend == "sdpa"


def test_what_is_explained_is_what_the_model_does() -> None:
    """说的与做的是同一个函数；这里从模型一侧再确认。"""
    model = tiny_model(torch.float32, context_size=600, attention_pattern=("local(40)", "causal"))
    contexts = build_contexts(
        model.config, model.patterns, Positions.plain(0, 600, torch.device("cpu")),
        None, make_notes(model.config), torch.float32, training=False,
    )  # fmt: skip
    said = explain_backends(model.config, device=torch.device("cpu"), length=600)
    assert [contexts[i].plan.backend for i in range(3)] == ["blocked", "sdpa", "blocked"]
    for choice in said:
        for layer in choice.layers:
            assert contexts[layer].plan.backend == choice.backend


@pytest.mark.parametrize("backend", ["auto", "blocked", "sdpa"])
def test_marked_tokens_see_and_are_seen_by_everything(backend: str) -> None:
    torch.manual_seed(0)
    pattern = {"attention_pattern": ("longformer(3, 1)", "local(5)")}
    fast = tiny_model(**pattern, attention_backend=backend)
    slow = tiny_model(**pattern, attention_backend="reference")
    slow.load_state_dict(fast.state_dict())
    ids, marks = tokens(2, 24), torch.zeros(2, 24, dtype=torch.long)
    marks[0, [7, 20]] = 1
    a, b = (m(ids, global_attention_mask=marks)["logits"] for m in (fast, slow))
    assert (a - b).abs().max() <= 1e-12
    maps = slow(ids, global_attention_mask=marks, return_attention=(0,))["attentions"][0]
    assert (maps[0, :, 15, 7] > 0).all()  # 远处的查询看得见点名的键
    assert (maps[0, :, 20, :20] > 0).all()  # 点名的查询看得见此前的一切
    assert (maps[1, :, 15, 7] == 0).all()
    # 逐块喂入缓存，与一次算完相同：点名的键一直留着。
    cache = KVCache.for_model(fast.config, 2, dtype=torch.float64, ring=False)
    parts = [
        fast(
            ids[:, i : i + 5], global_attention_mask=marks[:, i : i + 5], cache=cache,
            use_cache=True,
        )["logits"]
        for i in range(0, 24, 5)
    ]  # fmt: skip
    assert relative(torch.cat(parts, 1), a) <= 1e-12


def test_marks_need_a_longformer_and_a_cache_that_keeps_them() -> None:
    ids, marks = tokens(1, 8), torch.ones(1, 8, dtype=torch.long)
    with pytest.raises(ValueError, match="longformer"):
        tiny_model(attention_pattern="local(4)")(ids, global_attention_mask=marks)
    model = tiny_model(attention_pattern="longformer(4, 1)", context_size=24)
    cache = model.new_cache(1, 24, max_chunk=1)
    with pytest.raises(ValueError, match="ring=False"):
        model(ids, global_attention_mask=marks, cache=cache, use_cache=True)
    model(ids, global_attention_mask=marks, use_cache=True)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked"])
def test_packed_documents_do_not_leak(backend: str) -> None:
    """换掉第一篇，第二篇一位也不变；位置从 0 重新数，与单独算的相同。"""
    for text in ("local(4) | global(2)", "strided(3)", "fixed(5, 1)", "local(2) | strided(4)"):
        model = tiny_model(attention_pattern=text, attention_backend=backend)
        ids = tokens(1, 24)
        segment = (torch.arange(24) >= 10).long()[None]
        other = ids.clone()
        other[:, :10] = tokens(1, 10)
        one, two = (model(x, segment_ids=segment)["logits"] for x in (ids, other))
        assert torch.equal(one[:, 10:], two[:, 10:])
        alone = model(ids[:, 10:])["logits"]
        assert relative(one[:, 10:], alone) <= 1e-12


@pytest.mark.slow
def test_blocked_inside_a_compiled_block() -> None:
    """块的循环留在图外；损失与梯度不变。"""
    torch.manual_seed(0)
    model = tiny_model(torch.float32, context_size=200, attention_pattern="local(9) | strided(20)")
    ids = tokens(2, 200)

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(ids, targets=ids)["loss"]
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    eager = run()
    for block in model.h.values():
        block.compile(backend="aot_eager")
    try:
        for a, b in zip(run(), eager, strict=True):
            assert (a - b).abs().max() <= 1e-5
    finally:
        torch.compiler.reset()


def test_pattern_equals_a_hand_written_mask() -> None:
    """与图样的代码无关的写法：十行循环定出谁看得见谁。"""
    model = tiny_model(attention_pattern="local(4) | global(2)", n_layer=1)
    maps = model(tokens(1, 20), return_attention=(0,))["attentions"][0]
    for i in range(20):
        for j in range(20):
            sees = j <= i and (i - j < 4 or j < 2)
            assert bool((maps[0, :, i, j] > 0).all()) == sees
    assert (Local(4) | Global(2)).reach == 4
    assert Longformer(3, 1).takes_marks


@pytest.mark.parametrize("text", ["local(8)", "fixed(8, 2)", "strided(3)"])
def test_the_causal_flag_ends_exactly_where_the_pattern_hides_the_first_key(text: str) -> None:
    """solid 个词元之内图样与 causal 无异；多一个词元，再用因果标志就会多看一个键。"""
    pattern = parse(text)
    for length, flag in ((pattern.solid, True), (pattern.solid + 1, False)):
        where = Positions.plain(0, length, torch.device("cpu"))
        assert MaskPlan.build(where, where, pattern, asked="sdpa").causal is flag
        assert torch.equal(visible(where, where, pattern), visible(where, where)) is flag
