"""滑动窗口：与逐词元、与整段损失、与十行的对照相等；字节与文档边界数得准。"""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from app.data.prepare import TokenizerSpec, prepare
from app.data.reading.sources import Sources
from app.data.tokenizers import ByteTokenizer, CharTokenizer, train_bpe
from app.evaluation import scoring
from app.evaluation.perplexity import (
    TextTokens,
    WindowScore,
    count_windows,
    open_dataset,
    open_text,
    score_windows,
    summarize,
    windows,
)
from app.models.transformer import GPT2Config, GPT2Model

BYTES = ByteTokenizer()
CONTEXT = 8
KINDS = [
    {"norm": "post"},
    {"norm": "pre", "tie_weights": False},
    {"norm": "keel", "position": "rope", "norm_type": "rmsnorm"},
    {"norm": "pre", "position": "none", "attention_pattern": "local(3) | global(1)"},
]


def make(vocab_size=259, context_size=CONTEXT, seed=0, **changes):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size,
        context_size=context_size,
        n_layer=2,
        n_head=2,
        n_embed=16,
        **changes,
    )
    model = GPT2Model(config).double().eval()
    # 初始化很小，各词元的损失几乎相同，错位也看不出来。
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def tokens_of(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, n).astype(np.uint32)


def run(model, tokens, stride, batch_size=3, tokenizer=BYTES):
    found = score_windows(
        model, tokenizer, TextTokens(tokens), stride=stride, batch_size=batch_size
    )
    return [score for batch in found for score in batch]


def stream(tokens):
    return torch.tensor([[BYTES.document_separator, *map(int, tokens)]])


@given(st.integers(1, 60), st.integers(1, 12), st.data())
def test_every_token_is_scored_once_with_enough_before_it(n, context, data):
    stride = data.draw(st.integers(1, context))
    found = list(windows(n, context, stride))
    assert len(found) == count_windows(n, context, stride)
    assert [i for w in found for i in range(w.scored, w.end + 1)] == list(range(1, n + 1))
    assert all(w.end - w.begin <= context for w in found)
    assert found[0][:2] == (0, 1)
    assert all(w.scored - w.begin == context - stride + 1 for w in found[1:])


@pytest.mark.parametrize("stride", [0, -1, CONTEXT + 1])
def test_a_stride_that_would_skip_tokens(stride):
    with pytest.raises(ValueError, match=f"stride={stride} must be between 1 and context_size=8"):
        list(windows(20, CONTEXT, stride))


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_stride_one_is_token_by_token(changes):
    model, tokens = make(**changes), tokens_of(21)
    ids = stream(tokens)
    wanted = 0.0
    with torch.no_grad():
        for j in range(1, ids.shape[1]):
            logits = model(ids[:, max(0, j - CONTEXT) : j])["logits"][0, -1]
            wanted += F.cross_entropy(logits, ids[0, j]).item()
    found = summarize(run(model, tokens, 1))
    assert found.tokens == 21
    assert found.nats == pytest.approx(wanted, abs=1e-10)


@pytest.mark.parametrize("changes", KINDS, ids=str)
@pytest.mark.parametrize("n", [1, 5, CONTEXT])
def test_one_window_is_the_loss_of_the_model(n, changes):
    model, tokens = make(**changes), tokens_of(n)
    ids = stream(tokens)
    with torch.no_grad():
        wanted = model(ids[:, :-1], targets=ids[:, 1:])["loss"].item()
    for stride in (1, 3, CONTEXT):
        (score,) = run(model, tokens, stride)
        assert score.nats / score.tokens == pytest.approx(wanted, abs=1e-10)


def published_recipe(model, ids, max_length, stride):
    """Hugging Face 文档里的写法，只是加总各词元的损失而不取窗口的平均。"""
    total, count, prev_end = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + max_length, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : -(end - prev_end)] = -100
        logits = model(ids[:, begin : end - 1])["logits"]
        loss = F.cross_entropy(logits[0], labels[0, 1:], reduction="sum")
        total, count = total + loss.item(), count + int((labels[0, 1:] != -100).sum())
        prev_end = end
        if end == ids.shape[1]:
            return total, count


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, CONTEXT), st.integers(0, 3))
def test_the_published_recipe(n, stride, kind):
    model, tokens = make(**KINDS[kind]), tokens_of(n, seed=n)
    with torch.no_grad():
        total, count = published_recipe(model, stream(tokens), CONTEXT + 1, stride)
    found = summarize(run(model, tokens, stride))
    assert (found.tokens, count) == (n, n)
    assert found.nats == pytest.approx(total, abs=1e-10)


@settings(max_examples=25)
@given(st.integers(1, 50), st.integers(1, CONTEXT), st.integers(2, 9), st.integers(0, 3))
def test_the_batch_size_does_not_matter(n, stride, batch_size, kind):
    model, tokens = make(**KINDS[kind]), tokens_of(n, seed=n)
    alone, together = run(model, tokens, stride, 1), run(model, tokens, stride, batch_size)
    assert len(alone) == len(together)
    for one, other in zip(alone, together, strict=True):
        assert one[1:] == other[1:]
        assert one.nats == pytest.approx(other.nats, abs=1e-10)


def test_pieces_of_logits_change_nothing(monkeypatch):
    model, tokens = make(), tokens_of(40)
    before = run(model, tokens, 3)
    monkeypatch.setattr(scoring, "_CHUNK_BYTES", 2 * 259 * 4)
    for one, other in zip(before, run(model, tokens, 3), strict=True):
        assert one.nats == pytest.approx(other.nats, abs=1e-10)


def test_which_tokens_are_the_likeliest():
    model = make(vocab_size=3)
    rows = [np.array([0, 1, 2, 1, 0]), np.array([2, 2, 1])]
    first = scoring.score_rows(model, rows, [2, 1])
    for row, start, scored in zip(rows, [2, 1], first, strict=True):
        with torch.no_grad():
            logits = model(torch.from_numpy(row[None, :-1]))["logits"][0]
        nats = F.cross_entropy(logits, torch.from_numpy(row[1:]), reduction="none")
        assert np.allclose(scored.nats, nats[start - 1 :].numpy(), atol=1e-12)
        likeliest = logits.argmax(-1).numpy() == row[1:]
        assert scored.greedy.tolist() == likeliest[start - 1 :].tolist()


def test_dropout_and_damaged_weights_are_refused():
    model = make(dropout=0.5)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        run(model.train(), tokens_of(5), 2)
    with torch.no_grad():
        model.embed.wte.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="weights are damaged"):
        run(model.eval(), np.zeros(3, dtype=np.uint32), 2)


def test_batch_size_must_be_positive():
    with pytest.raises(ValueError, match="batch_size=0"):
        run(make(), tokens_of(3), 1, batch_size=0)


TEXT = "héllo wörld, 漢字 and 🎉!\r\n" * 9


@pytest.mark.parametrize(
    "tokenizer", [BYTES, CharTokenizer(TEXT), train_bpe([TEXT], 270)], ids=lambda t: t.kind
)
def test_bytes_are_those_of_the_text(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    held = open_text(path, tokenizer)
    model = make(vocab_size=tokenizer.vocab_size)
    found = summarize(run(model, held.source.tokens, 5, tokenizer=tokenizer))
    assert found.bytes == len(TEXT.encode())
    assert found.tokens == len(tokenizer.encode(TEXT))
    assert (found.separators, held.documents) == (0, 1)
    metrics = found.metrics()
    assert metrics["bits per byte"].value == pytest.approx(
        found.nats / math.log(2) / len(TEXT.encode()), rel=1e-12
    )
    assert metrics["perplexity"].value == pytest.approx(math.exp(found.nats / found.tokens))


def test_lines_of_jsonl_are_documents_with_borders_between(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("ab", "", "c", "de")))
    held = open_text(path, BYTES)
    border = BYTES.document_separator
    assert held.source.tokens.tolist() == [97, 98, border, 99, border, 100, 101]
    found = summarize(run(make(), held.source.tokens, 4))
    assert (found.tokens, found.separators, found.bytes, held.documents) == (7, 2, 5, 3)


def test_text_and_prepared_data_are_the_same_stream(tmp_path):
    """准备好的数据末尾多一个分隔符：文档在训练里以它结尾。"""
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    prepare(Sources([path]), tmp_path / "data", TokenizerSpec("bytes"), val_fraction=0.25)
    val = open_dataset(tmp_path / "data", BYTES)
    assert val.name == str(tmp_path / "data" / "val")
    train = open_dataset(tmp_path / "data" / "train", BYTES)
    joined = [part.source.read(0, part.source.n_tokens) for part in (train, val)]
    assert [part[-1] for part in joined] == [BYTES.document_separator] * 2
    text = open_text(path, BYTES).source.tokens
    assert np.concatenate([part[:-1] for part in joined]).tolist() == text.tolist()
    found = summarize(
        [
            score
            for batch in score_windows(make(), BYTES, val.source, stride=4, batch_size=4)
            for score in batch
        ]
    )
    assert (found.tokens, found.bytes) == (val.source.n_tokens, val.source.meta["n_bytes"])
    assert found.separators == val.documents == 1


def test_wrong_data(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    prepare(Sources([path]), tmp_path / "data", TokenizerSpec("bytes"), val_fraction=0.0)
    with pytest.raises(ValueError, match="has no validation part: .* or give .*train"):
        open_dataset(tmp_path / "data", BYTES)
    with pytest.raises(ValueError, match="was written with the tokenizer .* but the model has"):
        open_dataset(tmp_path / "data" / "train", CharTokenizer(TEXT))
    with pytest.raises(ValueError, match="not a prepared dataset"):
        open_dataset(tmp_path, BYTES)
    with pytest.raises(ValueError, match="model's tokenizer: character 'h'"):
        open_text(path, CharTokenizer("abc"))
    with pytest.raises(ValueError, match="is a folder"):
        open_text(tmp_path, BYTES)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="no text there"):
        open_text(tmp_path / "empty.txt", BYTES)
    (tmp_path / "junk.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        open_text(tmp_path / "junk.txt", BYTES)


def test_the_standard_error_treats_windows_as_clusters():
    nats = [10.0, 14.0, 9.0, 12.0]
    equal = summarize([WindowScore(n, 4, 4, 0) for n in nats])
    assert equal.stderr == pytest.approx(np.std(nats, ddof=1) / 4 / math.sqrt(4))
    metrics = equal.metrics()
    assert metrics["perplexity"].stderr == pytest.approx(equal.stderr * math.exp(45 / 16))
    assert metrics["bits per byte"].stderr == pytest.approx(equal.stderr / math.log(2))
    # 各窗口每词元相同，长短不一：没有误差
    assert summarize([WindowScore(2.0 * n, n, n, 0) for n in (8, 4, 1)]).stderr == 0
    assert summarize([WindowScore(3.0, 2, 2, 0)]).stderr is None
    with pytest.raises(ValueError, match="no window"):
        summarize([])


def test_extremes_of_the_metrics():
    metrics = summarize([WindowScore(1000.0, 1, 0, 1)]).metrics()
    assert metrics["perplexity"].value == math.inf
    assert metrics["bits per byte"] == (None, None)
