"""越过 context_size：extend 与不用缓存算整段相同；sinks 与存着未旋转的键的慢写法相同。"""

import importlib
import re
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.generation.config import SamplingConfig
from app.generation.overflow import SINKS, usable
from app.generation.sampling import pick
from app.models.transformer import GPT2Config, GPT2Model, Positions
from app.models.transformer.backends.mask_plan import MaskPlan
from app.models.transformer.block import run_blocks
from app.models.transformer.config import RoPEConfig
from app.models.transformer.layers.context import Context, Note
from app.models.transformer.layers.rope import Rotary
from tests.generation.helpers import new_tokens
from tests.models.helpers import relative, tiny_model, tokens

generate_module = importlib.import_module("app.generation.generate")

C, V = 16, 37
GREEDY = SamplingConfig(temperature=0)
INTERLEAVED = RoPEConfig(layout="interleaved", scaling="yarn", factor=4.0)
WINDOWED = {
    "half": {"position": "rope", "attention_pattern": "local(5)"},
    "interleaved": {
        "position": "rope", "rope": INTERLEAVED, "attention_pattern": "sinks(2, 5)", "n_kv_head": 2,
    },
    "none": {"position": "none", "attention_pattern": ("local(4)", "local(3, 2) | global(1)")},
}  # fmt: skip
UNBOUNDED = {
    "causal": {"position": "rope"},
    "causal interleaved": {"position": "rope", "rope": INTERLEAVED, "n_kv_head": 1, "norm": "pre"},
    "causal none": {"position": "none"},
    "cycle": {"position": "rope", "attention_pattern": ("local(4)", "causal")},
}
EVERY = {**WINDOWED, **UNBOUNDED}


def make(**changes) -> GPT2Model:
    torch.manual_seed(1)
    return tiny_model(**{"context_size": C, "tie_weights": False, **changes})


def decode(monkeypatch, model, prompts, new, **options) -> tuple[list[list[int]], Tensor]:
    """(新词元, 每步每行的 logits (B, new, V))。"""
    seen = []

    def record(logits, *rest):
        seen.append(logits.clone())
        return pick(logits, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(generate_module, "pick", record)
        options = {"sampling": GREEDY, **options}
        rows = new_tokens(model, prompts, max_new_tokens=new, **options)
    return rows, torch.stack(seen, 1)


# ---- extend


@pytest.mark.parametrize("prefill_chunk", [None, 7])
@pytest.mark.parametrize("name", EVERY)
def test_extend_is_the_uncached_forward_over_everything(monkeypatch, name, prefill_chunk):
    """提示比上下文短、长都有；新词元是上下文的三倍。"""
    model = make(**EVERY[name])
    prompts = [tokens(n).tolist() for n in (3, 14, 45)]
    rows, logits = decode(
        monkeypatch, model, prompts, 3 * C, overflow="extend", prefill_chunk=prefill_chunk
    )
    for prompt, row, got in zip(prompts, rows, logits, strict=True):
        whole = torch.tensor([[*prompt, *row[:-1]]])
        with torch.no_grad():
            wanted = model(whole)["logits"][0, len(prompt) - 1 :]
        assert relative(got, wanted) <= 1e-12
        assert row == wanted.argmax(-1).tolist()


prompts_of = st.lists(
    st.lists(st.integers(0, V - 1), min_size=1, max_size=40), min_size=1, max_size=6
)


@given(
    st.sampled_from(["extend", "sinks"]),
    st.sampled_from(sorted(EVERY)),
    prompts_of,
    st.integers(1, 30),
    st.none() | st.integers(1, 20),
    st.sets(st.integers(0, V - 1), max_size=3),
)
@settings(max_examples=40, deadline=None)
def test_a_row_is_the_same_in_any_company_and_any_chunking(mode, name, prompts, new, chunk, stops):
    model = make(**EVERY[name], n_layer=2)
    options = {"sampling": SamplingConfig(temperature=0.8), "stop_ids": sorted(stops)}
    options |= {"max_new_tokens": new, "overflow": mode}
    got = new_tokens(model, prompts, seeds=range(len(prompts)), prefill_chunk=chunk, **options)
    for seed, (prompt, row) in enumerate(zip(prompts, got, strict=True)):
        assert row == new_tokens(model, [prompt], seeds=[seed], **options)[0]


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("lengths", [(9,), (3, 12)])
def test_with_windows_the_cache_does_not_grow(monkeypatch, name, lengths):
    model, caches, sizes = make(**WINDOWED[name]), [], []
    real = model.new_cache

    def new_cache(*args, **options):
        caches.append(real(*args, **options))
        return caches[-1]

    monkeypatch.setattr(model, "new_cache", new_cache)
    new_tokens(
        model,
        [tokens(n).tolist() for n in lengths],
        max_new_tokens=400,
        overflow="extend",
        on_token=lambda row, token: sizes.append(caches[0].nbytes),
    )
    assert len(caches) == 1
    assert len(set(sizes[50 * len(lengths) :])) == 1
    new_tokens(model, [tokens(n).tolist() for n in lengths], max_new_tokens=50, overflow="extend")
    assert caches[1].nbytes == sizes[-1]


@pytest.mark.parametrize("name", ["causal", "cycle"])
def test_without_windows_the_cache_is_exactly_as_long_as_needed(monkeypatch, name):
    model, asked = make(**UNBOUNDED[name]), []
    real = model.new_cache

    def new_cache(*args, **options):
        asked.append(real(*args, **options))
        return asked[-1]

    monkeypatch.setattr(model, "new_cache", new_cache)
    new_tokens(model, [[1] * 20, [2]], max_new_tokens=30, overflow="extend")
    # 最后一个词元不再喂回去；最后一槽是填充的去处。
    assert max(keys.shape[2] - 1 for keys in asked[0].keys) == 20 + 30 - 1


# ---- sinks


def evicted(kept: list, size: int = C) -> list:
    """满了才丢，丢了再放新的。"""
    return kept if len(kept) < size else kept[:4] + kept[-(size // 2) :]


@pytest.mark.parametrize("name", EVERY)
def test_sinks_in_one_layer_is_an_uncached_forward_over_what_is_kept(monkeypatch, name):
    """一层的键值只看词元与位置，所以留下的词元从位置 0 重算就是答案。"""
    changes = EVERY[name]
    if isinstance(changes.get("attention_pattern"), tuple):
        changes = {**changes, "attention_pattern": changes["attention_pattern"][0]}
    model = make(**changes, n_layer=1)
    prompts = [tokens(n).tolist() for n in (3, C, 3, 45)]
    rows, logits = decode(monkeypatch, model, prompts, 3 * C, overflow="sinks")
    for prompt, row, got in zip(prompts, rows, logits, strict=True):
        kept: list[int] = []
        for at, token in enumerate([*prompt, *row[:-1]]):
            kept = [*evicted(kept), token]
            assert len(kept) <= C
            if at >= len(prompt) - 1:
                with torch.no_grad():
                    wanted = model(torch.tensor([kept]))["logits"][0, -1]
                assert relative(got[at - len(prompt) + 1], wanted) <= 1e-12


def test_a_window_wider_than_what_is_kept_sees_the_first_keys(monkeypatch):
    """窗口的环会丢掉最前的几个，而挪动之后窗口又够得着它们：这里不可用环。"""
    size = 96
    model = make(position="rope", context_size=size, attention_pattern="local(60)", n_layer=1)
    prompt = tokens(150).tolist()
    _, logits = decode(monkeypatch, model, [prompt], 1, overflow="sinks")
    kept: list[int] = []
    for token in prompt:
        kept = [*evicted(kept, size), token]
    with torch.no_grad():
        assert relative(logits[0, 0], model(torch.tensor([kept]))["logits"][0, -1]) <= 1e-12


def test_sinks_go_on_with_the_right_rows_when_some_finish():
    """长度相同的几行里有一行先完，缓存要换行。"""
    model, prompts = make(position="rope", n_layer=2), [[1], [2], [3], [4, 1], [5]]
    options = {"max_new_tokens": 3 * C, "overflow": "sinks", "sampling": GREEDY}
    stop = new_tokens(model, [prompts[0]], **options)[0][3]
    got = new_tokens(model, prompts, stop_ids=[stop], **options)
    assert len(got[0]) < max(map(len, got))
    for prompt, row in zip(prompts, got, strict=True):
        assert row == new_tokens(model, [prompt], stop_ids=[stop], **options)[0]


@dataclass
class RawKeys:
    """一行的缓存，同时充当 Context.rotary 与 Context.step：键不旋转地存，每步按下标旋转。"""

    config: GPT2Config
    kept: list[list[tuple[Tensor, Tensor]]] = field(init=False)

    def __post_init__(self) -> None:
        self.kept = [[] for _ in range(self.config.n_layer)]

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        config = self.config
        if config.position == "none":
            return x
        args = config.rope, config.head_dim, config.context_size, x.dtype
        return Rotary.at(positions[None], *args).apply(x)

    def apply(self, qk: Tensor) -> Tensor:
        q, k = qk[:, : self.config.n_head], qk[:, self.config.n_head :]
        return torch.cat([self.turned(q, torch.tensor([self.index])), k], 1)

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.kept[layer].append((k, v))
        keys, values = (torch.cat(x, 2) for x in zip(*self.kept[layer], strict=True))
        return self.turned(keys, torch.arange(keys.shape[2])), values

    @torch.no_grad()
    def step(self, model: GPT2Model, token: int) -> Tensor:
        """喂一个词元，返回 logits (V,)。"""
        self.kept = [evicted(layer) for layer in self.kept]
        self.index = len(self.kept[0])
        q = Positions.plain(self.index, 1, torch.device("cpu"))
        k = Positions.plain(0, self.index + 1, torch.device("cpu"))
        plans = [MaskPlan.build(q, k, p, asked="reference") for p in self.config.patterns]
        x = model.embed(torch.tensor([[token]]), q)
        contexts = [
            Context(q, plan, Note(), layer, self, self)  # type: ignore[arg-type]
            for layer, plan in enumerate(plans)
        ]
        return model.head(run_blocks(model.h, model.ln_f, x, contexts)[0])[0, -1]


@pytest.mark.parametrize("prefill_chunk", [None, 5])
@pytest.mark.parametrize("name", EVERY)
def test_sinks_in_deep_models_is_the_slow_way(monkeypatch, name, prefill_chunk):
    model = make(**EVERY[name])
    # 长度相同的两行不相邻：各组的结果要放回各行的次序，而这个置换不是自己的逆。
    prompts = [tokens(n).tolist() for n in (C + 1, 2, 45, C + 1)]
    rows, logits = decode(
        monkeypatch, model, prompts, 3 * C, overflow="sinks", prefill_chunk=prefill_chunk
    )
    for prompt, row, got in zip(prompts, rows, logits, strict=True):
        slow = RawKeys(model.config)
        outputs = [slow.step(model, token) for token in [*prompt, *row[:-1]]]
        wanted = torch.stack(outputs[len(prompt) - 1 :])
        assert relative(got, wanted) <= 1e-12


def test_sinks_of_rope_never_go_beyond_the_context(monkeypatch):
    """也不多占内存：缓存就是一个上下文。"""
    model, caches = make(position="rope"), []
    real = model.new_cache

    def new_cache(*args, **options):
        caches.append(real(*args, **options))
        return caches[-1]

    monkeypatch.setattr(model, "new_cache", new_cache)
    highest = []
    new_tokens(
        model,
        [[3]],
        max_new_tokens=10 * C,
        overflow="sinks",
        on_token=lambda *_: highest.append(int(caches[0].lengths.max())),
    )
    assert max(highest) == C == caches[0].max_len
    # 第一个新词元之前缓存里有提示；一丢就剩 SINKS + C//2，再加新来的一个。
    assert highest[C - 1 : C + 1] == [C, SINKS + C // 2 + 1]


def test_sinks_below_the_context_changes_nothing():
    model = make(position="rope")
    prompts = [tokens(n).tolist() for n in (3, 7, 7)]
    plain = new_tokens(model, prompts, max_new_tokens=9, sampling=GREEDY)
    for mode in ("slide", "extend", "sinks"):
        got = new_tokens(model, prompts, max_new_tokens=9, sampling=GREEDY, overflow=mode)
        assert got == plain


# ---- 拒绝


@pytest.mark.parametrize(
    "changes, modes",
    [
        ({}, ["slide"]),
        ({"position": "rope"}, ["slide", "extend", "sinks"]),
        ({"position": "none"}, ["slide", "extend", "sinks"]),
        # 4 + 8//2 = 8 占满，4 + 9//2 = 8 还剩一个
        ({"position": "rope", "context_size": 8}, ["slide", "extend"]),
        ({"position": "rope", "context_size": 9}, ["slide", "extend", "sinks"]),
    ],
)
def test_what_a_model_can_use_is_what_the_refusal_names(changes, modes):
    model = make(**changes)
    assert usable(model.config) == modes
    size = model.config.context_size
    named = re.escape("overflow=" + " or ".join(map(repr, modes)))
    with pytest.raises(ValueError, match=f"beyond context_size={size}.*{named}$"):
        new_tokens(model, [[1]], max_new_tokens=size)
    for mode in modes:
        assert (
            len(new_tokens(model, [[1, 2], [3]], max_new_tokens=3 * size, overflow=mode)[1]) > size
        )
    for mode in {"extend", "sinks"} - set(modes):
        with pytest.raises(ValueError, match=f"overflow='{mode}'.*: use overflow="):
            new_tokens(model, [[1]], max_new_tokens=1, overflow=mode)


def test_learned_positions_are_named_with_the_fix():
    with pytest.raises(
        ValueError,
        match="overflow='sinks' needs position='rope' or 'none', but this model has "
        "position='learned', trained for context_size=16 positions: use overflow='slide'",
    ):
        new_tokens(make(), [[1]], max_new_tokens=1, overflow="sinks")


# ---- int8


@pytest.mark.parametrize("mode", ["slide", "extend", "sinks"])
def test_int8_is_close_and_smaller(monkeypatch, mode):
    """强迫两边走同样的词元，比 logits。"""
    model, forced, caches = make(position="rope", n_embed=64), tokens(200).tolist(), []
    real = model.new_cache

    def new_cache(*args, **options):
        caches.append(real(*args, **options))
        return caches[-1]

    def run(kv_dtype):
        seen = []

        def force(logits, *rest):
            seen.append(logits.clone())
            return torch.tensor([forced[len(seen)]] * len(logits))

        monkeypatch.setattr(generate_module, "pick", force)
        options = {"overflow": mode, "kv_dtype": kv_dtype}
        new_tokens(model, [forced[:1], forced[:1]], max_new_tokens=60, **options)
        return torch.stack(seen)

    monkeypatch.setattr(model, "new_cache", new_cache)
    exact, rounded = run(None), run("int8")
    assert 1e-6 < relative(rounded, exact) < 0.1
    assert caches[1].nbytes < 0.2 * caches[0].nbytes


def test_unknown_quantization_is_refused():
    with pytest.raises(ValueError, match="kv_dtype='int4'"):
        new_tokens(make(), [[1]], max_new_tokens=1, kv_dtype="int4")
