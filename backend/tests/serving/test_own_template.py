"""/v1/chat/completions 用训练时的模板：词元与 gpt2 chat 的、与训练数据的相同。"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from app.cli.commands.serve import Args, _chat_form
from app.data.chat.encode import Turn, encode_conversation
from app.data.chat.template import NAMES, builtin
from app.generation.config import Options
from app.generation.conversation import Conversation
from app.serving.api.errors import ApiError
from app.serving.api.fields import ChatBody
from app.serving.api.orders import chat_job
from app.serving.api.template import Jinja, Own
from app.serving.served import serve_model
from tests.serving.helpers import BYTES, byte_model

SAID = [
    ("user", "hello <|im_start|>"), ("assistant", "hi"), ("user", " what?\nünï"),
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_serve_feeds_the_ids_of_training_and_of_chat(name: str) -> None:
    template = builtin(name, BYTES)
    tokenizer = BYTES.with_special(template.specials())
    model = byte_model(vocab_size=264, context_size=256)
    served = replace(serve_model("tuned", model, tokenizer, rows=1), template=Own(template))
    messages = [{"role": role, "content": text} for role, text in SAID]
    job = chat_job(ChatBody.model_validate({"messages": messages, "max_tokens": 4}), served, "")
    (prompt,) = job.prompts
    turns = [Turn(role, text) for role, text in SAID]
    whole, scored = encode_conversation([*turns, Turn("assistant", "yes")], template, tokenizer)
    first = len(prompt.ids)
    assert list(prompt.ids) == whole[:first].tolist()
    assert scored[first] and not scored[first - 1]
    talk = Conversation(model, tokenizer, template, Options(max_new_tokens=4))
    talk.turns = turns
    assert list(prompt.ids) == talk.prompt()
    assert set(template.stop_ids(tokenizer)) <= job.asks[0].stop_ids
    with pytest.raises(ApiError, match="a role is not one of"):
        chat_job(
            ChatBody.model_validate({"messages": [{"role": "tool", "content": "x"}]}), served, ""
        )


def test_the_template_of_training_goes_before_a_jinja_file_beside_it(tmp_path: Path) -> None:
    tokenizer = BYTES.with_special(builtin("alpaca", BYTES).specials())
    assert _chat_form(Args(("m",)), tmp_path, tokenizer) is None
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert isinstance(_chat_form(Args(("m",)), tmp_path, tokenizer), Jinja)
    builtin("alpaca", BYTES).save(tmp_path)
    assert isinstance(_chat_form(Args(("m",)), tmp_path, tokenizer), Own)
    asked = Args(("m",), chat_template=tmp_path / "chat_template.jinja")
    assert isinstance(_chat_form(asked, tmp_path, tokenizer), Jinja)
    builtin("chatml", BYTES).save(tmp_path)
    with pytest.raises(ValueError, match="which the tokenizer does not have"):
        _chat_form(Args(("m",)), tmp_path, BYTES)
