"""最后一个词与多项选择：与直接算出的对数似然相等；坏行点名行号。"""

import json
import math
import random

import numpy as np
import pytest
import torch

from app.data.tokenizers import ByteTokenizer, CharTokenizer, train_bpe
from app.evaluation.tasks import ItemScore, load_task, score_items, summarize_task
from app.models.transformer import GPT2Config, GPT2Model

BYTES = ByteTokenizer()
CHARS = CharTokenizer("ab ")
CONTEXT = 16


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=CHARS.vocab_size, context_size=CONTEXT, n_layer=2, n_head=2, n_embed=16
    )
    model = GPT2Model(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def write(path, *records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def score(model, task, batch_size=4):
    found = score_items(model, task.items, batch_size, lambda tokens: None)
    return [one for block in found for one in block]


def direct(model, before, after):
    """(续文的 nat 之和, 是否全是最可能的)，一次一行，不补齐。"""
    ids = torch.tensor([before + after])[:, -(CONTEXT + 1) :]
    with torch.no_grad():
        logs = model(ids[:, :-1])["logits"][0].log_softmax(-1)
    picked = logs[-len(after) :]
    labels = ids[0, -len(after) :]
    return -picked.gather(1, labels[:, None]).sum().item(), bool((picked.argmax(1) == labels).all())


def words(generator, count):
    return " ".join(
        "".join(generator.choices("ab", k=generator.randint(1, 3))) for _ in range(count)
    )


def test_last_words_equal_a_direct_computation(model, tmp_path):
    generator = random.Random(0)
    texts = [words(generator, generator.randint(1, 7)) for _ in range(150)]
    task = load_task(write(tmp_path / "w.jsonl", *({"text": t} for t in texts)), CHARS, CONTEXT)
    found, wanted, cut = score(model, task), [], 0
    for text in texts:
        head, space, word = text.rpartition(" ")
        before = CHARS.encode(head) or [CHARS.document_separator]
        after = CHARS.encode(space + word)
        cut += len(before) + len(after) > CONTEXT + 1
        wanted.append(direct(model, before, after))
    assert [one.greedy[0] for one in found] == [greedy for _, greedy in wanted]
    assert np.allclose([one.nats[0] for one in found], [n for n, _ in wanted], atol=1e-10)
    result = summarize_task(task, found)
    hits = np.mean([greedy for _, greedy in wanted])
    assert (task.kind, result.items) == ("last word", 150)
    # 两边都有，这个对照才说明问题
    assert 0 < hits < 1 and 0 < cut < 150
    assert result.cut == cut
    accuracy, perplexity = result.metrics["accuracy"], result.metrics["perplexity"]
    assert accuracy.value == pytest.approx(hits)
    assert accuracy.stderr == pytest.approx(math.sqrt(hits * (1 - hits) / 149))
    assert perplexity.value == pytest.approx(math.exp(np.mean([n for n, _ in wanted])))


def test_choices_equal_a_direct_computation(model, tmp_path):
    generator = random.Random(1)
    records = [
        {
            "prompt": words(generator, generator.randint(0, 6)) if generator.random() < 0.9 else "",
            "choices": [words(generator, generator.randint(1, 2)) for _ in range(3)],
            "answer": generator.randrange(3),
        }
        for _ in range(60)
    ]
    task = load_task(write(tmp_path / "mc.jsonl", *records), CHARS, CONTEXT)
    found, right = score(model, task), []
    for record, one in zip(records, found, strict=True):
        before = CHARS.encode(record["prompt"]) or [CHARS.document_separator]
        space = " " if record["prompt"] else ""
        nats = [
            direct(model, before, CHARS.encode(space + choice))[0] for choice in record["choices"]
        ]
        assert np.allclose(one.nats, nats, atol=1e-10)
        right.append(int(np.argmin(nats)) == record["answer"])
    assert summarize_task(task, found).metrics["acc"].value == pytest.approx(np.mean(right))


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_the_batch_size_does_not_matter(model, tmp_path, batch_size):
    generator = random.Random(2)
    records = [
        {"ctx": words(generator, 3), "endings": [words(generator, k) for k in (1, 2)], "label": "1"}
        for _ in range(20)
    ]
    task = load_task(write(tmp_path / "mc.jsonl", *records), CHARS, CONTEXT)
    ticks = []
    found = [s for block in score_items(model, task.items, batch_size, ticks.append) for s in block]
    wanted = score(model, task, 3)
    assert [s.greedy for s in found] == [s.greedy for s in wanted]
    assert np.allclose([s.nats for s in found], [s.nats for s in wanted], atol=1e-10)
    assert sum(ticks) == task.tokens


def test_three_ways_to_choose(tmp_path):
    """一个选项的字符少而字节多：acc、acc_norm、acc_bytes 各选各的。"""
    record = {"prompt": "p", "choices": ["a", "bbbbbbbb", "漢漢漢漢"], "answer": 0}
    task = load_task(
        write(tmp_path / "mc.jsonl", *({**record, "answer": i} for i in (0, 1, 2))), BYTES, CONTEXT
    )
    # 每字符 1、0.4、0.75；每字节 1、0.4、0.25
    scores = [ItemScore((1.0, 3.2, 3.0), (False,) * 3)] * 3
    for count, values in ((1, (1, 0, 0)), (2, (0.5, 0.5, 0)), (3, (1 / 3, 1 / 3, 1 / 3))):
        metrics = summarize_task(task, scores[:count]).metrics
        found = tuple(metrics[name].value for name in ("acc", "acc_norm", "acc_bytes"))
        assert found == pytest.approx(values)
        assert metrics["chance"].value == pytest.approx(1 / 3)


def only(tmp_path, record, tokenizer=BYTES, context=CONTEXT):
    return load_task(write(tmp_path / "one.jsonl", record), tokenizer, context).items[0]


def parts(request):
    ids = request.tokens.tolist()
    return ids[: request.first], ids[request.first :]


@pytest.mark.parametrize(
    "prompt, choice, more, wanted",
    [
        ("one", "two", {}, ("one", " two")),
        ("one ", "two", {}, ("one", " two")),
        ("one\n", "two", {}, ("one", "\ntwo")),
        ("one", "\ntwo", {}, ("one", "\ntwo")),
        ("one", "two", {"delimiter": ""}, ("one", "two")),
        ("one", "two", {"delimiter": ": "}, ("one", ": two")),
    ],
)
def test_where_prompt_and_choice_meet(tmp_path, prompt, choice, more, wanted):
    record = {"prompt": prompt, "choices": [choice, "x"], "answer": 0, **more}
    assert parts(only(tmp_path, record).requests[0]) == tuple(map(list, map(str.encode, wanted)))


def test_an_empty_prompt_is_the_start_of_a_document(tmp_path):
    item = only(tmp_path, {"prompt": "", "choices": ["ab", "c"], "answer": 0})
    assert parts(item.requests[0]) == ([BYTES.document_separator], [97, 98])
    item = only(tmp_path, {"text": "word \n"})
    assert parts(item.requests[0]) == ([BYTES.document_separator], list(b"word"))


def test_context_and_continuation_are_encoded_together(tmp_path):
    """切口两侧会合成一个词元：单独编码上文会喂给模型训练里没有的东西。"""
    tokenizer = train_bpe(["unhappy unhappy happy un"] * 9, 280)
    whole = tokenizer.encode("unhappy")
    assert len(whole) == 1
    record = {"prompt": "un", "choices": ["happy", "x"], "answer": 0, "delimiter": ""}
    item = only(tmp_path, record, tokenizer)
    assert parts(item.requests[0]) == ([tokenizer.document_separator], whole)
    # 词与词之间切得干净：与 lm-eval 的 whole[len(context):] 相同
    item = only(tmp_path, {"text": "un happy unhappy"}, tokenizer)
    whole = tokenizer.encode("un happy unhappy")
    before = tokenizer.encode("un happy")
    assert parts(item.requests[0]) == (before, whole[len(before) :])


def test_long_prompts_lose_their_beginning(tmp_path):
    item = only(tmp_path, {"text": "abcdefghijklmnopqrstuvwx yz"})
    (request,) = item.requests
    assert parts(request) == (list(b"klmnopqrstuvwx"), list(b" yz"))
    assert (len(request.tokens), request.cut) == (CONTEXT + 1, 27 - CONTEXT - 1)
    # 刚好放得下：最后一个词元不必喂给模型
    (request,) = only(tmp_path, {"text": "abcdefghijklmn yz"}).requests
    assert (len(request.tokens), request.cut) == (CONTEXT + 1, 0)
    # 续文恰好占满上下文：还剩一个词元的上文
    (request,) = only(tmp_path, {"text": "abc " + "z" * (CONTEXT - 1)}).requests
    assert (request.first, request.cut) == (1, 2)


@pytest.mark.parametrize("answer", [1, "1", "yes"])
def test_ways_to_name_the_answer(tmp_path, answer):
    record = {"prompt": "p", "choices": ["no", "yes"], "answer": answer}
    assert only(tmp_path, record).answer == 1


@pytest.mark.parametrize(
    "choices, answer, wanted",
    [
        (["3", "4", "5"], "4", 1),
        (["3", "4", "5"], 2, 2),
        (["3", "4", "5"], "0", 0),
        (["0", "1"], "1", 1),
        (["ten", "20"], "20", 1),
    ],
)
def test_an_answer_is_an_index_or_a_text(tmp_path, choices, answer, wanted):
    record = {"prompt": "p", "choices": choices, "answer": answer}
    assert only(tmp_path, record).answer == wanted


def test_an_answer_that_means_two_choices_is_refused_naming_both(tmp_path):
    for choices, answer, message in (
        (["1", "2"], "1", "the text of choice 0 and the number of choice 1"),
        (["a", "b", "a"], "a", "the text of choice 0 and the text of choice 2"),
    ):
        record = {"prompt": "p", "choices": choices, "answer": answer}
        with pytest.raises(ValueError, match=message):
            only(tmp_path, record)


GOOD = {"prompt": "p", "choices": ["a", "b"], "answer": 0}


def without(key):
    return {name: value for name, value in GOOD.items() if name != key}


@pytest.mark.parametrize(
    "good, bad, message",
    [
        ({"text": "a b"}, {"texts": "a b"}, r"line 3: no key 'text' \(keys: 'texts'\)"),
        ({"text": "a b"}, {"text": " \n"}, "line 3: 'text' is empty: there is no last word"),
        ({"text": "a b"}, {"text": 3}, "line 3: 'text' is int, expected a text"),
        ({"text": "a b"}, [1], "line 3: expected an object, got list"),
        ({"text": "a b"}, {"text": "a " + "z" * 16}, "has 17 tokens, more than context_size=16"),
        ({"text": "a b"}, {"text": "a \ud800"}, "line 3: .*lone surrogate"),
        (GOOD, without("prompt"), "line 3: no key 'prompt' or 'ctx'"),
        (GOOD, without("choices"), "line 3: no key 'choices' or 'endings'"),
        (GOOD, without("answer"), "line 3: no key 'answer' or 'label'"),
        (GOOD, {**GOOD, "label": 0}, "both 'answer' and 'label'"),
        (GOOD, {**GOOD, "choices": ["a"]}, "1 choices: give at least two"),
        (GOOD, {**GOOD, "choices": ["a", " "]}, "choice 1 is ' '"),
        (GOOD, {**GOOD, "choices": ["a", 7]}, "choice 1 is 7"),
        (GOOD, {**GOOD, "choices": "ab"}, "'choices' is str, expected a list of texts"),
        (GOOD, {**GOOD, "answer": 2}, "answer 2 does not name one of the 2 choices"),
        (GOOD, {**GOOD, "answer": -1}, "answer -1 does not name"),
        (GOOD, {**GOOD, "answer": "B"}, "answer 'B' does not name"),
        (GOOD, {**GOOD, "answer": True}, "'answer' is bool, expected a number or a text"),
        (GOOD, {**GOOD, "choices": ["1", "2"], "answer": "1"}, "answer '1' does not name"),
        (GOOD, {**GOOD, "delimiter": 1}, "'delimiter' is int"),
    ],
)
def test_a_bad_line_is_named(tmp_path, good, bad, message):
    path = tmp_path / "t.jsonl"
    path.write_text(f"{json.dumps(good)}\n\n{json.dumps(bad)}\n")
    with pytest.raises(ValueError, match=message) as error:
        load_task(path, BYTES, CONTEXT)
    assert f"{path} line 3" in str(error.value)


def test_files_that_are_no_tasks(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        load_task(tmp_path / "none.jsonl", BYTES, CONTEXT)
    path = tmp_path / "t.jsonl"
    for content, message in (
        ("\n \n", "holds no line"),
        ('{"a": 1}', "line 1: neither 'text' .* nor 'choices' or 'endings'"),
        ('{"text": "a b"', "line 1: not valid JSON"),
        ("[" * 100_000, "line 1: not valid JSON"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_task(path, BYTES, CONTEXT)
    path.write_bytes(b'{"text": "\xff"}')
    with pytest.raises(ValueError, match="line 1: not UTF-8 .*at byte 10"):
        load_task(path, BYTES, CONTEXT)
    write(path, {"text": "é b"})
    with pytest.raises(ValueError, match="line 1: the model's tokenizer cannot encode it"):
        load_task(path, CHARS, CONTEXT)


def test_nothing_scored_is_no_result(tmp_path, model):
    task = load_task(write(tmp_path / "t.jsonl", {"text": "a b"}), CHARS, CONTEXT)
    with pytest.raises(ValueError, match="no item was scored"):
        summarize_task(task, [])
    assert summarize_task(task, score(model, task)).metrics["accuracy"].stderr is None
    with pytest.raises(ValueError, match="batch_size=0"):
        score(model, task, 0)
