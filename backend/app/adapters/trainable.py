"""tune 一节作用到模型上：什么训练，什么冻结；冻结的 requires_grad 为假，一位也不会变。"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from app.models.transformer import GPT2Model
from app.models.transformer.settings.fields import nearest
from app.models.transformer.settings.tune_config import TuneConfig

from .lora import add_lora
from .rows import train_new_rows


@dataclass(frozen=True)
class Said:
    """
    Attributes:
        trained, frozen: 参数的个数。
        what: 训练什么，一句英文。
    """

    trained: int
    frozen: int
    what: str

    @property
    def line(self) -> str:
        total = self.trained + self.frozen
        share = f"{100 * self.trained / total:.3g}%"
        return f"trains {self.trained:,} of {total:,} parameters ({share}): {self.what}"


def apply_trainable(model: GPT2Model, tune: TuneConfig, new: range = range(0)) -> Said:
    """就地；在装好权重之后、建优化器之前。

    Args:
        new: 刚长出的词元的 id；lora 时词嵌入里只有它们的行训练。

    Raises:
        ValueError: 点名的什么也没有（给出最近的名字），层不够，或新词元的行没有谁训练。
    """
    if tune.trainable == "lora":
        return _lora(model, tune, new)
    names = [name for name, _ in model.named_parameters()]
    wanted, what = _wanted(model, tune.trainable, names)
    vocabulary = {"embed.wte.weight"} | ({"lm_head.weight"} & set(names))
    if len(new) and not vocabulary <= wanted:
        left = sorted(vocabulary - wanted)
        raise ValueError(
            f"the data has {len(new)} new tokens ({new.start}..{new.stop - 1}) but "
            f"tune.trainable={tune.trainable} does not train {', '.join(left)}: they would stay "
            "what they are; use lora (trains the new rows), all, or name it too"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    return _said(model, what)


def _lora(model: GPT2Model, tune: TuneConfig, new: range) -> Said:
    count = len(add_lora(model, tune))
    scale = f"rank {tune.lora_rank}, alpha {tune.lora_alpha:g}"
    what = f"LoRA ({scale}) on {count} layers ({', '.join(tune.lora_targets)})"
    if len(new):
        train_new_rows(model, new)
        what += f", and the rows of {len(new)} new tokens"
    return _said(model, what)


def _wanted(model: GPT2Model, trainable: str, names: list[str]) -> tuple[set[str], str]:
    """(参数名, 一句话)。"""
    if trainable == "all":
        return set(names), "everything"
    if trainable == "head":
        if model.lm_head is None:
            return {"embed.wte.weight"}, "the head, which is the token embedding too (tied)"
        return {"lm_head.weight"}, "the head"
    if trainable.startswith("last:"):
        return _last(model, int(trainable.removeprefix("last:")), names)
    wanted: set[str] = set()
    for pattern in (part.strip() for part in trainable.split(",")):
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(
                f"tune.trainable has {pattern!r}, which names no parameter{nearest(pattern, names)}"
            )
        wanted |= found
    return wanted, f"{len(wanted)} named tensors"


def _last(model: GPT2Model, count: int, names: list[str]) -> tuple[set[str], str]:
    """最后几层与其后的归一化；输出头不在内，它多半就是词嵌入。"""
    layers = model.config.n_layer
    if count > layers:
        raise ValueError(
            f"tune.trainable=last:{count} but the model has {layers} layers: use last:{layers} or "
            "fewer, or all"
        )
    starts = ("ln_f.", *(f"h.{i}." for i in range(layers - count, layers)))
    wanted = {name for name in names if name.startswith(starts)}
    norm = "" if model.ln_f is None else " and the final norm"
    return wanted, f"the last {count} of {layers} layers{norm}"


def _said(model: GPT2Model, what: str) -> Said:
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, yes in sizes if yes)
    return Said(trained, sum(size for size, _ in sizes) - trained, what)
