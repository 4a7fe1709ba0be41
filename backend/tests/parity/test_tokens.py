"""导出的分词器与 tiktoken：真正的 GPT-2 词表上，id 逐个相同。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.data.tokenizers import Tokenizer, gpt2_tokenizer
from app.interop.reading.foreign_tokenizer import read_hub_tokenizer
from app.interop.tokens import tokenizer_files

# 什么都有：各种文字、空白、数字与缩写，切分规则的每一支都碰得到。
texts = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.text(st.characters(codec="ascii"), max_size=20),
        st.sampled_from(["'s", "'ll", " don't", "\n\n", "   ", "\t", "½²", "中文", "🙂", " 1234"]),
    ),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module")
def both(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any, Any]:
    """(导出再读回的我们的, tokenizers 打开导出的文件, tiktoken 自己读词表)。"""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str
    from tokenizers import Tokenizer as HubTokenizer

    folder = tmp_path_factory.mktemp("hub")
    for name, content in tokenizer_files(gpt2_tokenizer(real_data), 1024).items():
        (folder / name).write_text(content, encoding="utf-8")
    ranks = data_gym_to_mergeable_bpe_ranks(
        str(real_data / "gpt2_vocab.bpe"), str(real_data / "gpt2_encoder.json")
    )
    theirs = tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={}
    )
    hub = HubTokenizer.from_file(str(folder / "tokenizer.json"))
    return read_hub_tokenizer(folder), hub, theirs


def check(both: tuple[Tokenizer, Any, Any], text: str) -> None:
    ours, hub, theirs = both
    want = theirs.encode_ordinary(text)
    assert ours.encode(text) == want
    if "<|" not in text:
        assert hub.encode(text).ids == want
    assert ours.decode(want) == text


@settings(max_examples=500)
@given(texts)
def test_500_strings(both: tuple[Tokenizer, Any, Any], text: str) -> None:
    check(both, text)


@pytest.mark.slow
@settings(max_examples=20_000)
@given(texts)
def test_20000_strings(both: tuple[Tokenizer, Any, Any], text: str) -> None:
    check(both, text)


def test_tinyshakespeare(both: tuple[Tokenizer, Any, Any], real_data: Path) -> None:
    check(both, (real_data / "tinyshakespeare.txt").read_text(encoding="utf-8"))


def test_published_examples(both: tuple[Tokenizer, Any, Any]) -> None:
    for text, ids in {
        "Hello world": [15496, 995],
        " Hello world": [18435, 995],
        "GPT2 inference runtime in C++ and CUDA": [
            38, 11571, 17, 32278, 19124, 287, 327, 4880, 290, 29369, 5631,
        ],
    }.items():  # fmt: skip
        assert both[0].encode(text) == ids
        check(both, text)
    ours = both[0]
    assert (ours.vocab_size, ours.document_separator) == (50257, 50256)
