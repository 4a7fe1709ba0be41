"""从别处的权重开始一次新的训练：只取权重，步数、优化器与随机数都是新的。"""

from __future__ import annotations

from app.common.tell import Tell
from app.data.tokenizers import Tokenizer, load_tokenizer
from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.settings.fields import Mark, marked
from app.quantization.model import check_float

from ..config import flat
from .checkpoint import resolve_checkpoint


def initialize_from(folder: str, model: GPT2Model, tokenizer: Tokenizer, tell: Tell) -> None:
    """把 folder 的权重写进 model（保留 model 的精度与设备）。

    Raises:
        ValueError: 那里没有模型，形状不同（点名两个值），或分词器不是数据的那个。
    """
    found = resolve_checkpoint(folder, tell)
    source = GPT2Model.from_pretrained(found)
    check_float(source, f"init_from={found}")
    theirs = dict(flat(source.config.to_dict()))
    free = marked(GPT2Config, Mark.FREE)
    for name, ours in flat(model.config.to_dict()):
        if name not in free and theirs[name] != ours:
            raise ValueError(
                f"model.{name}={ours!r} but init_from={found} has {theirs[name]!r}: its weights "
                f"do not fit; use model.{name}={theirs[name]!r}"
            )
    written, used = load_tokenizer(found).fingerprint(), tokenizer.fingerprint()
    if written != used:
        raise ValueError(
            f"init_from={found} was trained with the tokenizer {written[:12]} but the data has "
            f"{used[:12]}: prepare the data with the model's tokenizer"
        )
    model.load_state_dict(source.state_dict())
    tell(f"weights from {found}; steps, optimizer and schedule start anew")
