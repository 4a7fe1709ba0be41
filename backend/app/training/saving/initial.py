"""从别处的权重开始一次新的训练：只取权重，步数、优化器与随机数都是新的。"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from app.adapters.fit import fit_context
from app.adapters.load import open_model
from app.adapters.rows import grow_vocabulary
from app.common.tell import Tell
from app.data.chat.template import Template, find_template
from app.data.tokenizers import Tokenizer, load_tokenizer
from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.settings.fields import Mark, marked
from app.quantization.model import check_float

from ..config import flat
from .checkpoint import resolve_checkpoint


class Started(NamedTuple):
    """从哪个文件夹起的；new：数据的分词器比它的多出的词元，各行是平均。"""

    folder: Path
    new: range


def initialize_from(folder: str, model: GPT2Model, tokenizer: Tokenizer, tell: Tell) -> Started:
    """把 folder 的权重写进 model（保留 model 的精度与设备）；上下文可以缩短，词表可以长。

    Raises:
        ValueError: 那里没有模型，形状不同（点名两个值），或数据的分词器不是由它的加长的。
    """
    found = resolve_checkpoint(folder, tell)
    source = open_model(found)
    check_float(source, f"init_from={found}")
    longer = source.config.context_size
    fit_context(source, model.config.context_size, f"init_from={found}")
    new = new_tokens(load_tokenizer(found), tokenizer, f"init_from={found}")
    if len(new):
        grow_vocabulary(source, len(new), new.start)
    theirs = dict(flat(source.config.to_dict()))
    free = marked(GPT2Config, Mark.FREE)
    for name, ours in flat(model.config.to_dict()):
        if name not in free and theirs[name] != ours:
            raise ValueError(
                f"model.{name}={ours!r} but init_from={found} has {theirs[name]!r}: its weights "
                f"do not fit; use model.{name}={theirs[name]!r}"
            )
    model.load_state_dict(source.state_dict())
    tell(f"weights from {found}; steps, optimizer and schedule start anew")
    if longer != model.config.context_size:
        tell(f"the context is {model.config.context_size} of the {longer} tokens it had")
    if len(new):
        tell(f"{len(new)} new tokens ({new.start}..{new.stop - 1}) start as the mean of the others")
    return Started(found, new)


def chat_template(data: Path, start: Path | None, tell: Tell) -> Template | None:
    """对话用数据的模板；纯文本没有，就照起点的：会对话的模型读了几封信，仍旧会对话。"""
    own = find_template(data)
    if own is not None or start is None:
        return own
    kept = find_template(start)
    if kept is not None:
        tell(
            f"note: the data is plain text, so the chat template {kept.name} of {start} is kept; "
            "look whether answers still end, with gpt2 chat"
        )
    return kept


def new_tokens(old: Tokenizer, now: Tokenizer, where: str) -> range:
    """now 比 old 多出的特殊词元的 id；同一个分词器则空。

    Raises:
        ValueError: now 不是 old 加上特殊词元。
    """
    written, used = old.fingerprint(), now.fingerprint()
    if written == used:
        return range(0)
    added = {text: i for text, i in now.special_tokens.items() if i >= old.vocab_size}
    if added and old.with_special(sorted(added, key=added.__getitem__)).fingerprint() == used:
        return range(old.vocab_size, now.vocab_size)
    raise ValueError(
        f"{where} was trained with the tokenizer {written[:12]} but the data has "
        f"{used[:12]}: prepare the data with the model's tokenizer"
    )
