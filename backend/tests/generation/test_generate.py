"""生成：与最朴素的写法（不用缓存、一行一行、每步整窗重算）逐词元相同。"""

import importlib
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.data.tokenizers import ByteTokenizer, CharTokenizer
from app.generation.config import Options, SamplingConfig
from app.generation.context import window_start
from app.generation.generate import Decoding, generate
from app.generation.row import Callbacks, Completion, Row
from app.generation.sampling import pick, sample, uniforms
from app.models.transformer import GPT2Model, create_gpt2_model
from tests.generation.helpers import completions, new_tokens

generate_module = importlib.import_module("app.generation.generate")

V, C = 40, 16
GREEDY = SamplingConfig(temperature=0)


def make(norm: str = "post", **changes) -> GPT2Model:
    torch.manual_seed(0)
    shape = {"vocab_size": V, "context_size": C, "n_layer": 2, "n_head": 2, "n_embed": 16}
    # 不共享权重、放大全部权重：否则随机模型只会重复输入，看不出错误。
    fixed = {"dropout": 0.0, "norm": norm, "tie_weights": False}
    model = create_gpt2_model(**{**shape, **fixed, **changes}).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2 if weight.dim() > 1 else 1)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> GPT2Model:
    return make()


@torch.no_grad()
def naive(model, prompt, new, config=GREEDY, seed=0, stop_ids=()):
    """每步把当前窗口整个算一遍；返回 (新词元, 每步的 logits)。"""
    tokens, history = list(prompt), []
    draws = uniforms([seed], new)
    for step in range(new):
        window = tokens[window_start(len(tokens), model.config.context_size) :]
        logits = model(torch.tensor([window]))["logits"][:, -1]
        history.append(logits[0])
        seen = torch.zeros(1, logits.shape[1], dtype=torch.bool)
        seen[0, tokens] = True
        token = int(sample(logits, config, draws[:, step], seen))
        if token in stop_ids:
            break
        tokens.append(token)
    return tokens[len(prompt) :], history


prompts_of = lambda longest: st.lists(  # noqa: E731
    st.lists(st.integers(0, V - 1), min_size=1, max_size=longest), min_size=1, max_size=9
)


@given(
    prompts_of(9),
    st.integers(1, 7),
    st.none() | st.integers(1, 10),
    st.sampled_from([GREEDY, SamplingConfig(top_k=9, repetition_penalty=1.3)]),
    st.sets(st.integers(0, V - 1), max_size=6),
)
@settings(max_examples=40, deadline=None)
def test_a_batch_is_each_row_without_cache(model, prompts, new, chunk, config, stop_ids):
    got = new_tokens(
        model,
        prompts,
        max_new_tokens=new,
        sampling=config,
        seeds=range(len(prompts)),
        stop_ids=sorted(stop_ids),
        prefill_chunk=chunk,
    )
    for seed, (prompt, tokens) in enumerate(zip(prompts, got, strict=True)):
        assert tokens == naive(model, prompt, new, config, seed, stop_ids)[0]


@given(
    prompts_of(40),
    st.integers(1, 40),
    st.none() | st.integers(1, 5),
    st.sets(st.integers(0, V - 1), max_size=2),
)
@settings(max_examples=25, deadline=None)
def test_sliding_equals_the_uncached_window(model, prompts, new, chunk, stop_ids):
    config = SamplingConfig(temperature=0.8)
    got = new_tokens(
        model,
        prompts,
        max_new_tokens=new,
        sampling=config,
        seeds=range(len(prompts)),
        stop_ids=sorted(stop_ids),
        overflow="slide",
        prefill_chunk=chunk,
    )
    for seed, (prompt, tokens) in enumerate(zip(prompts, got, strict=True)):
        assert tokens == naive(model, prompt, new, config, seed, stop_ids)[0]


@pytest.mark.parametrize("norm", ["post", "pre", "deepnorm", "keel"])
@pytest.mark.parametrize("position", ["learned", "none"])
def test_logits_at_every_step_are_the_uncached_ones(monkeypatch, norm, position):
    """不只词元相同：相对误差 <= 1e-12，越过上下文三次，各行错开着滑。"""
    model, seen = make(norm, position=position), []

    def record(logits, *rest):
        seen.append(logits.clone())
        return pick(logits, *rest)

    monkeypatch.setattr(generate_module, "pick", record)
    prompts = [[1, 2, 3], list(range(14)), [5]]
    new_tokens(model, prompts, max_new_tokens=40, sampling=GREEDY, overflow="slide")
    for row, prompt in enumerate(prompts):
        wanted = torch.stack(naive(model, prompt, 40)[1])
        got = torch.stack([logits[row] for logits in seen])
        assert (got - wanted).abs().max() <= 1e-12 * wanted.abs().max()


@given(st.integers(1, 40), st.integers(1, 400))
def test_window_start_slides_to_half_and_only_when_full(context, length):
    sizes = [n - window_start(n, context) for n in range(1, length + 1)]
    assert all(1 <= size <= context for size in sizes)
    for before, after in pairwise(sizes):
        assert after == before + 1 if before < context else after == max(1, context // 2)


def test_sliding_recomputes_about_one_token_per_token():
    """文档里的代价：每个新词元平均重算不到一个。"""
    context, steps = 64, 10_000
    starts = [window_start(n, context) for n in range(1, steps)]
    refilled = sum(n + 2 - b for n, (a, b) in enumerate(pairwise(starts)) if a != b)
    assert 0.9 < refilled / steps < 1


def test_continuing_in_two_calls_is_one_call(model):
    first = new_tokens(model, [[7]], max_new_tokens=30, sampling=GREEDY, overflow="slide")[0]
    half = new_tokens(
        model, [[7, *first[:17]]], max_new_tokens=13, sampling=GREEDY, overflow="slide"
    )
    assert first[17:] == half[0]


def test_the_same_prompt_and_seed_give_the_same_text_in_any_company(model):
    def ask(prompts, seeds):
        return new_tokens(model, prompts, max_new_tokens=9, seeds=seeds)

    alone = ask([[3, 4]], [11])[0]
    assert ask([[1] * 7, [3, 4], [2]], [5, 11, 6])[1] == alone
    assert ask([[3, 4], [3, 4], [3, 4]], [1, 11, 2])[1] == alone
    assert ask([[3, 4]], [12])[0] != alone


def test_more_new_tokens_do_not_change_the_first_ones(model):
    short = new_tokens(model, [[3]], max_new_tokens=4, seeds=[1])[0]
    assert new_tokens(model, [[3]], max_new_tokens=12, seeds=[1])[0][:4] == short


def test_without_seeds_torch_decides(model):
    def ask():
        return new_tokens(model, [[3], [3]], max_new_tokens=12)

    torch.manual_seed(5)
    first, second = ask(), ask()
    torch.manual_seed(5)
    assert ask() == first != second
    assert first[0] != first[1]


class Spy:
    """记下每次前向的形状。"""

    def __init__(self, model: GPT2Model) -> None:
        self.shapes: list[tuple[int, int]] = []
        self._handle = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module, args, kwargs):
        self.shapes.append(tuple(args[0].shape))

    def __enter__(self):
        return self.shapes

    def __exit__(self, *error):
        self._handle.remove()


def test_decoding_feeds_one_column_a_step_and_nothing_after_the_last(model):
    with Spy(model) as shapes:
        new_tokens(model, [[1, 2, 3], [4]], max_new_tokens=5, seeds=[0, 1])
    assert shapes == [(2, 3), (2, 1), (2, 1), (2, 1), (2, 1)]


def test_equal_prompts_are_prefilled_once(model):
    with Spy(model) as shapes:
        rows = new_tokens(model, [[1, 2]] * 3 + [[5]], max_new_tokens=3, seeds=[0, 1, 2, 3])
    assert shapes == [(2, 2), (4, 1), (4, 1)]
    assert rows[1] == new_tokens(model, [[1, 2]], max_new_tokens=3, seeds=[1])[0]


def test_finished_rows_leave_the_computation(model):
    prompts, new = [[i] for i in range(8)], 12
    plain = [naive(model, p, new)[0] for p in prompts]
    stops = sorted({row[2] for row in plain[:5]})
    with Spy(model) as shapes:
        got = new_tokens(model, prompts, max_new_tokens=new, sampling=GREEDY, stop_ids=stops)
    assert got == [naive(model, p, new, stop_ids=stops)[0] for p in prompts]
    lengths = [len(row) for row in got]
    for step, (rows, _) in enumerate(shapes[1:], start=1):
        alive = sum(length >= step for length in lengths)
        assert alive <= rows
        assert rows - alive < 0.25 * rows
    assert shapes[-1][0] < 8


def test_prefill_in_chunks_bounds_the_width(model):
    with Spy(model) as shapes:
        new_tokens(model, [[1] * 11, [2] * 3], max_new_tokens=2, seeds=[0, 0], prefill_chunk=4)
    assert shapes == [(2, 4), (2, 4), (2, 3), (2, 1)]


def test_stop_ids_end_a_row_and_are_not_part_of_it(model):
    tokens, _ = naive(model, [3], 10)
    stop = tokens[4]
    at = tokens.index(stop)
    done = completions(model, [[3]], max_new_tokens=10, sampling=GREEDY, stop_ids=[stop])
    assert done == [Completion(tokens[:at], "stop", None)]
    done = completions(model, [[3]], max_new_tokens=10, sampling=GREEDY)
    assert done == [Completion(tokens, "length", None)]


TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLM")  # 39 个字符加分隔符


def test_stop_strings_cut_the_text_across_token_borders(model):
    prompts, new = [[3], [9, 1], [3]], 14
    texts = [TOKENIZER.decode(naive(model, p, new)[0]) for p in prompts]
    stop = texts[0][5:8]
    pieces = {0: "", 1: "", 2: ""}
    order = []
    done = completions(
        model,
        prompts,
        max_new_tokens=new,
        sampling=GREEDY,
        stop_strings=[stop],
        tokenizer=TOKENIZER,
        on_text=lambda row, text: pieces.update({row: pieces[row] + text}),
        on_finish=lambda row, completion: order.append((row, completion)),
    )
    for row, (text, completion) in enumerate(zip(texts, done, strict=True)):
        cut = text.find(stop)
        wanted = text if cut < 0 else text[:cut]
        assert completion.text == wanted == pieces[row]
        assert completion.finish == ("length" if cut < 0 else "stop")
        assert TOKENIZER.decode(completion.tokens) == wanted
    assert dict(order) == dict(enumerate(done))


def test_text_of_bytes_is_whole_characters():
    """字节词元：半个字符不流出；拼起来等于解码全部。"""
    model = make(vocab_size=257, n_embed=32)
    tokenizer, pieces = ByteTokenizer(), []
    done = completions(
        model,
        [tokenizer.encode("é")],
        max_new_tokens=14,
        seeds=[4],
        tokenizer=tokenizer,
        on_text=lambda row, text: pieces.append(text),
    )[0]
    assert "".join(pieces) == done.text == tokenizer.decode(done.tokens)


def test_on_token_sees_every_token_as_it_comes(model):
    seen = []
    got = new_tokens(
        model, [[1], [2, 3]], max_new_tokens=4, seeds=[0, 1], on_token=lambda *x: seen.append(x)
    )
    assert [row for row, _ in seen] == [0, 1] * 4
    assert [[t for row, t in seen if row == i] for i in range(2)] == got


def test_ids_beyond_the_tokenizer_are_never_chosen():
    """词表补齐：补出来的号哪怕 logit 最大也不选。"""
    model = make(vocab_size=64)
    with torch.no_grad():
        model.head_weight[40:].mul_(30)
    free = new_tokens(model, [[1]] * 8, max_new_tokens=15, seeds=range(8))
    assert max(map(max, free)) >= 40
    tied = new_tokens(model, [[1]] * 8, max_new_tokens=15, seeds=range(8), tokenizer=TOKENIZER)
    assert max(map(max, tied)) < 40


def test_dropout_is_off_and_every_module_gets_its_mode_back():
    model = make(dropout=0.5)
    wanted = new_tokens(model, [[1, 2]], max_new_tokens=10, sampling=GREEDY)
    model.train()
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.LayerNorm))
    frozen.eval()
    before = [m.training for m in model.modules()]
    assert new_tokens(model, [[1, 2]], max_new_tokens=10, sampling=GREEDY) == wanted
    assert [m.training for m in model.modules()] == before

    def fail(row, token):
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError):
        new_tokens(model, [[1, 2]], max_new_tokens=10, on_token=fail)
    assert [m.training for m in model.modules()] == before


def test_training_goes_on_after_sampling():
    """采样不留下推理张量：之后的反向传播照常。"""
    model = make().train()
    new_tokens(model, [[1, 2]], max_new_tokens=3)
    loss = model(torch.tensor([[1, 2]]), targets=torch.tensor([[2, 3]]))["loss"]
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_it_runs_inside_autocast():
    model = make().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert len(new_tokens(model, [[1, 2], [3]], max_new_tokens=5, seeds=[0, 1])[0]) == 5


def refuse(model: GPT2Model, match: str, prompts=((1, 2),), **changes) -> None:
    """拒绝发生在动工之前：模型一次也没有被调用。"""
    with Spy(model) as shapes, pytest.raises(ValueError, match=match):
        completions(model, prompts, **{"max_new_tokens": 4, **changes})
    assert shapes == []


def test_overflow_names_both_numbers_and_the_fix(model):
    refuse(
        model,
        "prompt 2 has 10 tokens and max_new_tokens=7: together 17, beyond context_size=16: "
        "ask for at most 6 .*overflow='slide'$",
        prompts=[[1], [2] * 10],
        max_new_tokens=7,
    )
    assert len(new_tokens(model, [[2] * 10], max_new_tokens=6)[0]) == 6


@pytest.mark.parametrize(
    "match, changes",
    [
        ("no prompts", {"prompts": []}),
        ("prompt 2 is empty", {"prompts": [[1], []]}),
        ("token id 40, outside the 40 ids", {"prompts": [[40]]}),
        ("token id -1", {"prompts": [[3, -1]]}),
        ("batch_size=0", {"batch_size": 0}),
        ("kv_dtype='int4'", {"kv_dtype": "int4"}),
        ("max_new_tokens=0", {"max_new_tokens": 0}),
        ("prefill_chunk=0", {"prefill_chunk": 0}),
        ("overflow='wrap'", {"overflow": "wrap"}),
        ("2 seeds for 1 prompts", {"seeds": [1, 2]}),
        ("2 seeds for 1 prompts", {"seeds": [1, 2], "sampling": GREEDY}),
        ("stop id 50256", {"stop_ids": [50256]}),
        ("is one string", {"stop_strings": "END", "tokenizer": TOKENIZER}),
        ("empty", {"stop_strings": [""], "tokenizer": TOKENIZER}),
        ("need the tokenizer", {"stop_strings": ["END"]}),
        ("257 ids but the model has vocab_size=40", {"tokenizer": ByteTokenizer()}),
    ],
)
def test_wrong_use_is_refused_before_any_work(model, match, changes):
    refuse(model, match, **changes)


def test_a_model_that_is_not_finite_is_named():
    model = make()
    with torch.no_grad():
        model.head_weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        new_tokens(model, [[1]], max_new_tokens=2)


@pytest.mark.parametrize("prompt, new, slots", [(3, 5, 7), (3, 13, 15), (30, 5, C)])
def test_the_cache_is_no_larger_than_needed(model, monkeypatch, prompt, new, slots):
    """最后一个词元不再喂回去；滑动时至多一个上下文。"""
    real, asked = model.new_cache, []

    def new_cache(rows, max_len, **options):
        asked.append((rows, max_len))
        return real(rows, max_len, **options)

    monkeypatch.setattr(model, "new_cache", new_cache)
    new_tokens(model, [[1] * prompt, [2]], max_new_tokens=new, overflow="slide")
    assert asked == [(2, slots)]


def test_batches_inside_are_one_call(model):
    prompts = [[i, 2] for i in range(5)]
    options = {"max_new_tokens": 6, "seeds": range(5)}
    with Spy(model) as shapes:
        got = new_tokens(model, prompts, batch_size=2, **options)
    assert got == new_tokens(model, prompts, **options)
    assert [rows for rows, width in shapes if width == 2] == [2, 2, 1]


def test_every_prompt_is_checked_before_the_first_batch(model):
    refuse(
        model, "line 9 is empty", prompts=[[1], [2], []], batch_size=1,
        names=["line 7", "line 8", "line 9"],
    )  # fmt: skip


def test_one_step_is_one_token_a_row(model):
    """服务逐步驱动它：走一步，每行多一个词元。"""
    seen = []
    calls = Callbacks(on_token=lambda row, token: seen.append((row, token)))
    options = Options(max_new_tokens=3, sampling=GREEDY)
    rows = [Row(i, [i + 1], options, None, calls) for i in range(2)]
    with torch.inference_mode():
        decoding = Decoding(model, rows, options, [0, 0], V)
        steps = 0
        while decoding.open:
            decoding.step()
            steps += 1
            assert [row for row, _ in seen] == [0, 1] * steps
    assert steps == 3
    wanted = [naive(model, [i + 1], 3)[0] for i in range(2)]
    assert [row.completion().tokens for row in rows] == wanted


def test_the_old_name_still_works_with_a_note(model):
    with pytest.warns(FutureWarning, match="is now complete"):
        old = generate(model, [[1, 2]], max_new_tokens=5, seeds=[3], cache_quantize="int8")
    assert old == new_tokens(model, [[1, 2]], max_new_tokens=5, seeds=[3], kv_dtype="int8")
