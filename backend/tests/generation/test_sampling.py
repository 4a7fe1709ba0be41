"""采样：与 transformers 逐项相同，每行只由自己的种子决定。"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.generation import sampling
from app.generation.config import SamplingConfig

hf = pytest.importorskip("transformers", reason="transformers is the reference here")

seeds = st.integers(0, 2**31)
shapes = st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 7, 65, 1000]))
open_unit = st.floats(0.01, 0.99)


def random_logits(seed: int, shape: tuple[int, int], scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def ids(rows: int) -> torch.Tensor:
    return torch.zeros(rows, 1, dtype=torch.long)


@given(seeds, shapes, st.integers(1, 1100))
@settings(max_examples=60, deadline=None)
def test_top_k_is_transformers(seed, shape, k):
    logits = random_logits(seed, shape)
    wanted = hf.TopKLogitsWarper(k)(ids(shape[0]), logits.clone())
    assert torch.equal(sampling.top_k(logits, k), wanted)


@given(seeds, shapes, open_unit, st.sampled_from([0.01, 0.3, 3.0, 30.0]))
@settings(max_examples=100, deadline=None)
def test_top_p_is_transformers(seed, shape, p, scale):
    logits = random_logits(seed, shape, scale)
    wanted = hf.TopPLogitsWarper(p)(ids(shape[0]), logits.clone())
    assert torch.equal(sampling.top_p(logits, p), wanted)


@pytest.mark.parametrize("scale", [0.01, 1.0, 2.0, 6.0])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_on_a_full_vocabulary(p, scale):
    """宽词表：取前几百个够与不够两条路都与全排相同；批里一行平、一行尖。"""
    logits = random_logits(3, (2, 50304), scale)
    logits[0] *= 4
    wanted = hf.TopPLogitsWarper(p)(ids(2), logits.clone())
    assert torch.equal(sampling.top_p(logits, p), wanted)


def test_top_p_of_a_peaked_vocabulary_does_not_sort_it(monkeypatch):
    logits = random_logits(3, (1, 50304), 6.0)

    def refuse(*args, **kwargs):
        raise AssertionError("sorted the whole vocabulary")

    monkeypatch.setattr(torch.Tensor, "sort", refuse)
    assert sampling.top_p(logits, 0.5).isfinite().sum() < 256


@given(seeds, shapes, st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_min_p_is_transformers(seed, shape, p):
    logits = random_logits(seed, shape)
    wanted = hf.MinPLogitsWarper(p)(ids(shape[0]), logits.clone())
    assert torch.equal(sampling.min_p(logits, p), wanted)


@given(seeds, shapes, st.floats(0.2, 5.0), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_repetition_penalty_is_transformers(seed, shape, penalty, length):
    logits = random_logits(seed, shape)
    generator = torch.Generator().manual_seed(seed)
    past = torch.randint(shape[1], (shape[0], length), generator=generator)
    seen = torch.zeros(shape, dtype=torch.bool).scatter_(1, past, True)
    wanted = hf.RepetitionPenaltyLogitsProcessor(penalty)(past, logits.clone())
    assert torch.equal(sampling.repetition_penalty(logits, seen, penalty), wanted)


@given(
    seeds,
    shapes,
    st.floats(0.3, 2.0),
    st.none() | st.integers(1, 80),
    st.none() | open_unit,
    st.none() | st.floats(0, 0.5),
    st.floats(0.8, 1.5),
)
@settings(max_examples=150, deadline=None)
def test_the_whole_chain_is_transformers(seed, shape, temperature, k, p, m, penalty):
    """次序：重复惩罚、温度、top-k、top-p、min-p。"""
    logits = random_logits(seed, shape)
    past = torch.randint(shape[1], (shape[0], 5), generator=torch.Generator().manual_seed(seed))
    seen = torch.zeros(shape, dtype=torch.bool).scatter_(1, past, True)
    chain = hf.LogitsProcessorList(
        [hf.RepetitionPenaltyLogitsProcessor(penalty), hf.TemperatureLogitsWarper(temperature)]
    )
    chain += [] if k is None else [hf.TopKLogitsWarper(k)]
    chain += [] if p is None else [hf.TopPLogitsWarper(p)]
    chain += [] if m is None else [hf.MinPLogitsWarper(m)]
    config = SamplingConfig(
        temperature=temperature, top_k=k, top_p=p, min_p=m, repetition_penalty=penalty
    )
    assert torch.equal(sampling.filtered(logits, config, seen), chain(past, logits.clone()))


def test_ties_at_the_kth_value_are_all_kept():
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    wanted = hf.TopKLogitsWarper(2)(ids(2), logits.clone())
    assert torch.equal(sampling.filtered(logits, SamplingConfig(top_k=2)), wanted)
    assert wanted.isfinite().sum(-1).tolist() == [3, 2]


@given(seeds, st.sampled_from([2, 9, 65]), st.none() | st.integers(1, 20), st.none() | open_unit)
@settings(max_examples=60, deadline=None)
def test_each_row_samples_as_alone(seed, width, k, p):
    logits = random_logits(seed, (5, width))
    config = SamplingConfig(temperature=0.9, top_k=k, top_p=p)
    draws = sampling.uniforms([seed, 1, 2, 3, 1], 1)[:, 0]
    together = sampling.sample(logits, config, draws)
    alone = [sampling.sample(logits[i : i + 1], config, draws[i : i + 1]) for i in range(5)]
    assert together.tolist() == torch.cat(alone).tolist()


def test_frequencies_are_the_filtered_softmax():
    """卡方检验（种子固定）：逆变换采样的频率就是处理后的分布。"""
    logits = random_logits(0, (1, 12), 1.0)
    config = SamplingConfig(temperature=0.8, top_k=9, top_p=0.95)
    count = 40_000
    draws = sampling.uniforms([7], count)[0]
    got = sampling.sample(logits.expand(count, -1), config, draws).bincount(minlength=12).double()
    probs = sampling.filtered(logits, config).softmax(-1)[0]
    assert got[probs == 0].sum() == 0
    kept = probs > 0
    chi2 = ((got - count * probs)[kept].square() / (count * probs[kept])).sum()
    # 自由度至多 8，P(chi2 > 26.1) < 0.001
    assert chi2 < 26.1


@pytest.mark.parametrize("point", [0.0, 0.5, 1 - 2**-53])
def test_extreme_uniforms_never_pick_an_excluded_token(point):
    logits = torch.full((1, 1000), -math.inf, dtype=torch.float64)
    logits[0, [3, 500]] = torch.tensor([0.1, 0.2], dtype=torch.float64)
    draw = torch.tensor([point], dtype=torch.float64)
    assert sampling.sample(logits, SamplingConfig(), draw).item() in (3, 500)


def test_a_rounding_error_between_equals_does_not_change_the_choice():
    """两个几乎相等的候选因舍入互换名次：按词元号取的逆变换，选出的仍相同。"""
    logits = random_logits(0, (1, 30))
    best = logits.argmax()
    logits[0, 29] = logits[0, best] + 1e-12
    swapped = logits.clone()
    swapped[0, 29] -= 2e-12
    config = SamplingConfig(top_k=5)
    for point in torch.arange(0.005, 1, 0.01, dtype=torch.float64)[:, None]:
        one, two = (sampling.sample(x, config, point) for x in (logits, swapped))
        assert torch.equal(one, two)


def test_the_largest_uniform_stays_inside_for_any_rounding_of_the_sum():
    """累加的总和在 1 上下差几个末位；最大的均匀数 1 - 2^-53 乘上去仍选得到词元。"""
    logits = random_logits(0, (2000, 37))
    draws = torch.full((2000,), 1 - 2**-53, dtype=torch.float64)
    totals = logits.softmax(-1).cumsum(-1)[:, -1]
    assert totals.min() < 1 < totals.max()
    assert sampling.sample(logits, SamplingConfig(), draws).max() < 37


def test_greedy_is_argmax_and_needs_no_randomness():
    logits = random_logits(1, (3, 50))
    config = SamplingConfig(temperature=0)
    assert torch.equal(sampling.sample(logits, config, None), logits.argmax(-1))
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter_(1, logits.argmax(-1, keepdim=True), True)
    heavy = SamplingConfig(temperature=0, repetition_penalty=1e6)
    assert (sampling.sample(logits, heavy, None, seen) != logits.argmax(-1)).all()


def test_uniform_streams_have_the_prefix_property_and_differ_by_seed():
    short, long = sampling.uniforms([5, 6], 3), sampling.uniforms([5, 6], 200)
    assert torch.equal(short, long[:, :3])
    assert not torch.equal(long[0], long[1])
    assert torch.equal(sampling.uniforms([6], 200)[0], long[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(),
        SamplingConfig(temperature=0),
        SamplingConfig(top_k=2),
        SamplingConfig(top_p=0.5),
    ],
)
def test_logits_that_are_not_finite_are_refused(bad, config):
    logits = random_logits(0, (2, 9))
    logits[1, 4] = bad
    with pytest.raises(ValueError, match="row 1"):
        sampling.sample(logits, config, torch.tensor([0.5, 0.5], dtype=torch.float64))


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", 1e-40),
        ("top_k", 0),
        ("top_k", -3),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", math.inf),
    ],
)
def test_bad_settings_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        SamplingConfig(**{name: value})
