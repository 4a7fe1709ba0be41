"""对话模板写成 Jinja，给 transformers 与别的客户端；写完用 transformers 渲染，比 id 与掩码。

回答与收尾放在 generation 标签之间：没有它，那边训练时的掩码会全是 0 或全是 1，而且不报错。
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.data.chat.encode import Encoder, Turn
from app.data.chat.template import Part, Role, Special, Template
from app.data.tokenizers import Tokenizer

JINJA_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"
_SHOWN = 3
# 没有用户自己的对话时拿来比的
_MADE_UP = (
    (Turn("user", "Hello?"), Turn("assistant", "Yes.")),
    (Turn("system", "Be brief."), Turn("user", "1 + 1 = ?"), Turn("assistant", "2")),
    (
        Turn("user", "a\n\nb"),
        Turn("assistant", "c\n"),
        Turn("user", "d"),
        Turn("assistant", "e f."),
    ),
)


@dataclass(frozen=True)
class Chat:
    """模型的对话模板，和拿来核对的对话；空的就用几段编造的。"""

    template: Template
    conversations: Sequence[Sequence[Turn]] = ()


def add_chat(folder: Path, chat: Chat, tokenizer: Tokenizer) -> str:
    """写进 transformers 的文件夹：模板，和生成时停在收尾的记号；返回核对的结果。

    Raises:
        ValueError: 分词器没有模板的特殊词元。
    """
    encoder = Encoder(chat.template, tokenizer)
    (folder / JINJA_FILE).write_text(jinja(chat.template), encoding="utf-8")
    path = folder / GENERATION_FILE
    settings = json.loads(path.read_text(encoding="utf-8"))
    known = settings.get("eos_token_id")
    ends = known if isinstance(known, list) else [] if known is None else [known]
    settings["eos_token_id"] = sorted({*ends, *chat.template.stop_ids(tokenizer)})
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    said = str(compare_chat(folder, encoder, chat.conversations or _MADE_UP))
    return said if chat.conversations else f"{said} (made up: give your own with --data)"


def jinja(template: Template) -> str:
    """各角色一个分支；不认识的角色是错。"""
    branches: list[str] = []
    for name, role in template.roles.items():
        word = "elif" if branches else "if"
        branches += [f"{{%- {word} message['role'] == {_quoted(name)} -%}}", *_turn(role, template)]
    answerer = template.roles[template.answerer]
    return "\n".join(
        [
            *_printed(_literal(map(Special, template.start))),
            "{%- for message in messages -%}",
            *branches,
            "{%- else -%}",
            "{{- raise_exception('unknown role ' + message['role']) -}}",
            "{%- endif -%}",
            "{%- endfor -%}",
            "{%- if add_generation_prompt -%}",
            *_printed(_literal(answerer.before)),
            "{%- endif -%}",
            "",
        ]
    )


def _turn(role: Role, template: Template) -> list[str]:
    """计分的从内容起，到收尾的记号止。"""
    stops = [isinstance(part, Special) and part.text in template.stop for part in role.after]
    end = stops.index(True) + 1 if role.scored else 0
    inside = _printed(f"message['content'] + {_literal(role.after[:end])}")
    if role.scored:
        inside = ["{%- generation -%}", *inside, "{%- endgeneration -%}"]
    return [*_printed(_literal(role.before)), *inside, *_printed(_literal(role.after[end:]))]


def _printed(expression: str) -> list[str]:
    return [] if expression == "''" else [f"{{{{- {expression} -}}}}"]


def _literal(parts: Iterable[Part]) -> str:
    return _quoted("".join(p.text if isinstance(p, Special) else p for p in parts))


def _quoted(text: str) -> str:
    return "'" + text.encode("unicode_escape").decode("ascii").replace("'", "\\'") + "'"


@dataclass(frozen=True)
class ChatComparison:
    """rows 段对话里，id 与掩码都相同的、和不同的各段的缘由。"""

    rows: int
    different: tuple[str, ...]

    def __str__(self) -> str:
        same = self.rows - len(self.different)
        text = f"chat template: ids and mask of {same} of {self.rows} conversations are the same"
        shown = "".join(f"\n  {reason}" for reason in self.different[:_SHOWN])
        more = len(self.different) - _SHOWN
        return text + shown + (f"\n  and {more} more" if more > 0 else "")


def compare_chat(
    folder: Path, encoder: Encoder, conversations: Sequence[Sequence[Turn]]
) -> ChatComparison | str:
    """用 transformers 渲染 folder 里的模板；没有装则返回要装什么。"""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return "transformers is not installed: pip install 'gpt2-workbench[hf]'"
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    different = []
    for number, turns in enumerate(conversations):
        ids, scored = encoder.conversation(turns)
        done = theirs.apply_chat_template(
            [{"role": turn.role, "content": turn.content} for turn in turns],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        reason = _difference(ids, scored, done["input_ids"], done["assistant_masks"], encoder)
        if reason is not None:
            written = [t for t in encoder.tokenizer.special_tokens if _holds(turns, t)]
            why = f" (the text holds {written[0]!r} written out)" if written else ""
            different.append(f"conversation {number + 1}: {reason}{why}")
    return ChatComparison(len(conversations), tuple(different))


def _holds(turns: Sequence[Turn], text: str) -> bool:
    return any(text in turn.content for turn in turns)


def _difference(
    ids: np.ndarray, scored: np.ndarray, theirs: list[int], mask: list[int], encoder: Encoder
) -> str | None:
    if theirs == ids.tolist():
        places = np.flatnonzero(scored != np.array(mask, dtype=bool))
        return f"the mask differs at token {places[0]}" if len(places) else None
    same = [a == b for a, b in zip(ids.tolist(), theirs, strict=False)]
    first = same.index(False) if False in same else len(same)
    ours, other = (encoder.tokenizer.decode(x[first : first + 4]) for x in (ids.tolist(), theirs))
    return f"the ids differ from token {first}: {ours!r} here, {other!r} there"
