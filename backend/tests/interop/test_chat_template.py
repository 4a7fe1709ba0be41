"""导出的对话模板：transformers 渲染出同样的 id 与掩码；不同的那几段点名缘由，不略过。"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.data.chat.encode import Encoder, Turn
from app.data.chat.template import NAMES, Role, Special, Template, builtin
from app.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, train_bpe
from app.interop.chat import JINJA_FILE, Chat, ChatComparison, compare_chat, jinja
from app.interop.export import export
from app.interop.tokens import tokenizer_files
from app.models.transformer import GPT2Config, GPT2Model
from tests.data.test_chat import CHARACTERS, TEXT, conversations

pytest.importorskip("transformers")
BPE = train_bpe([TEXT] * 50, 330)


def written(folder: Path, template: Template, tokenizer: Tokenizer) -> Path:
    for name, text in tokenizer_files(tokenizer, 128, tokenizer.vocab_size + 3).items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / JINJA_FILE).write_text(jinja(template), encoding="utf-8")
    return folder


def clean(turns: list[Turn]) -> list[Turn]:
    """写着特殊记号的去掉记号，两头的空白也去掉：两边的切分规则才该相同。"""

    def plain(text: str) -> str:
        for mark in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
            text = text.replace(mark, "mark")
        return text.strip() or "x"

    return [Turn(turn.role, plain(turn.content)) for turn in turns]


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe"])
@pytest.mark.parametrize("name", NAMES)
def test_ids_and_mask_are_those_of_transformers(name: str, kind: str, tmp_path: Path) -> None:
    plain = {"bytes": ByteTokenizer(), "chars": CharTokenizer(CHARACTERS), "bpe": BPE}[kind]
    template = builtin(name, plain)
    tokenizer = plain.with_special(template.specials())
    rows = [clean(turns) for turns in conversations(50)]
    if name == "plain":  # 提问与回答紧挨着：回答自带开头的空格，才切在同一处
        rows = [[Turn(t.role, " " + t.content) for t in turns] for turns in rows]
    folder = written(tmp_path, template, tokenizer)
    compared = compare_chat(folder, Encoder(template, tokenizer), rows)
    assert isinstance(compared, ChatComparison)
    assert compared.different == () and compared.rows == 50, str(compared)


def test_a_difference_is_named(tmp_path: Path) -> None:
    """用户写着的记号，在 transformers 里成了特殊词元；掩码错一处也看得出。"""
    template = builtin("chatml", BPE)
    tokenizer = BPE.with_special(template.specials())
    folder = written(tmp_path, template, tokenizer)
    rows = [[Turn("user", "say <|im_end|>"), Turn("assistant", "ok")], conversations(1)[0]]
    compared = compare_chat(folder, Encoder(template, tokenizer), rows[:1])
    assert isinstance(compared, ChatComparison) and len(compared.different) == 1
    assert "the text holds '<|im_end|>' written out" in str(compared)
    # 收尾的记号落在标签之外：id 相同，掩码少一个
    whole = "{{- message['content'] + '<|im_end|>' -}}\n{%- endgeneration -%}"
    assert whole in jinja(template)
    cut = "{{- message['content'] -}}\n{%- endgeneration -%}\n{{- '<|im_end|>' -}}"
    (folder / JINJA_FILE).write_text(jinja(template).replace(whole, cut), encoding="utf-8")
    other = compare_chat(folder, Encoder(template, tokenizer), [clean(rows[1])])
    assert "the mask differs at token" in str(other)


def test_odd_text_survives_jinja(tmp_path: Path) -> None:
    odd = 'it\'s {{ a }} \\ "quoted" é 🙂\n'
    end = "<|endoftext|>"
    roles = {"user": Role((odd,), (odd,)), "assistant": Role((odd,), (Special(end),), True)}
    template, tokenizer = Template("mine", (), roles, (end,)), ByteTokenizer()
    rows = [[Turn("user", "x {% if %}"), Turn("assistant", "y")]]
    folder = written(tmp_path, template, tokenizer)
    assert compare_chat(folder, Encoder(template, tokenizer), rows) == ChatComparison(1, ())


@pytest.mark.slow
def test_export_writes_and_checks_the_template(tmp_path: Path) -> None:
    template = builtin("chatml", BPE)
    tokenizer = BPE.with_special(template.specials())
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size, context_size=32, n_layer=1, n_head=2, n_embed=8, norm="pre"
    )
    rows = [clean(turns) for turns in conversations(5)]
    done = export(GPT2Model(config), tokenizer, "hf", tmp_path / "out", chat=Chat(template, rows))
    assert done.notes[-1] == "chat template: ids and mask of 5 of 5 conversations are the same"
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    special = tokenizer.special_tokens
    assert settings["eos_token_id"] == [special["<|endoftext|>"], special["<|im_end|>"]]
    assert special["<|im_end|>"] not in settings["suppress_tokens"]
    made_up = export(GPT2Model(config), tokenizer, "hf", tmp_path / "2", chat=Chat(template))
    assert "3 of 3" in made_up.notes[-1] and "--data" in made_up.notes[-1]


@pytest.mark.parametrize("name", ["chatml", "alpaca"])
def test_every_difference_has_a_reason(name: str, tmp_path: Path) -> None:
    """原样的 50 段，也有写着记号、两头是空白、空的回答：不同的都说得出缘由，其余全同。"""
    template = builtin(name, BPE)
    tokenizer = BPE.with_special(template.specials())
    rows = conversations(50)

    def odd(turn: Turn) -> bool:
        written = any(text in turn.content for text in tokenizer.special_tokens)
        return written or turn.content != turn.content.strip()

    compared = compare_chat(
        written(tmp_path, template, tokenizer), Encoder(template, tokenizer), rows
    )
    assert isinstance(compared, ChatComparison)
    numbers = {int(reason.split()[1].rstrip(":")) - 1 for reason in compared.different}
    assert numbers and all(any(map(odd, rows[i])) for i in numbers)
    assert any(not turn.content for turns in rows for turn in turns)


def test_gguf_carries_the_template(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="pip install 'gpt2-workbench[export]'")
    jinja2 = pytest.importorskip("jinja2")
    template = builtin("chatml", BPE)
    tokenizer = BPE.with_special(template.specials())
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size, context_size=8, n_layer=1, n_head=1, n_embed=8, norm="pre"
    )
    model = GPT2Model(config)
    done = export(model, tokenizer, "gguf", tmp_path / "gguf", chat=Chat(template))
    assert "chat template chatml, ending a turn with <|im_end|>" in done.notes
    reader = gguf.GGUFReader(done.written)

    def fact(name: str) -> object:
        return reader.get_field(f"tokenizer.{name}").contents()

    special = tokenizer.special_tokens
    assert fact("ggml.eot_token_id") == special["<|im_end|>"]
    types = fact("ggml.token_type")
    assert isinstance(types, list) and types[special["<|im_end|>"]] == gguf.TokenType.CONTROL
    # 写进去的没有 generation 标签，渲染出的与提示相同。
    turns = [Turn("system", "Be brief."), Turn("user", "it's {{ a }}\n")]
    said = (
        jinja2.Environment()
        .from_string(fact("chat_template"))
        .render(
            messages=[{"role": t.role, "content": t.content} for t in turns],
            add_generation_prompt=True,
        )
    )
    assert said == tokenizer.decode(Encoder(template, tokenizer).prompt(turns))
    plain = export(model, ByteTokenizer(), "gguf", tmp_path / "bytes", chat=Chat(template))
    assert plain.notes[-1].endswith("token ids alone and holds no chat template")


@pytest.mark.slow
def test_onnx_says_that_it_carries_none(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    template = builtin("chatml", BPE)
    tokenizer = BPE.with_special(template.specials())
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size, context_size=8, n_layer=1, n_head=1, n_embed=8, norm="pre"
    )
    done = export(GPT2Model(config), tokenizer, "onnx", tmp_path / "out", chat=Chat(template))
    assert "--to onnx has no place for the chat template" in done.notes[-1]
