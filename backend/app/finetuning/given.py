"""`--set key=value`：运行文件里的任何一项，值照 YAML 读；几项由命令的别的选项定，不许从这里改。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.models.transformer.config import GPT2Config
from app.models.transformer.settings.fields import Mark, marked
from app.training.config import TrainConfig

_ELSEWHERE = {
    "out": "--out", "resume": "--resume", "init_from": "the first argument, MODEL",
    "data.folder": "the second argument, DATA", "epochs": "--epochs",
    "tune.trainable": "--trainable", "model.context_size": "--context",
}  # fmt: skip


def parse_given(texts: Sequence[str]) -> dict[str, Any]:
    """{带点的名字: 值}。

    Raises:
        ValueError: 不是 key=value、同一项两次、由别的选项定，或会改变模型的形状。
    """
    import yaml

    given: dict[str, Any] = {}
    free = {f"model.{name}" for name in marked(GPT2Config, Mark.FREE)}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise ValueError(f"--set {text!r} is not key=value: write --set optim.lr=1e-4, say")
        if name in given:
            raise ValueError(f"--set {name} is given twice ({given[name]!r} and {value!r})")
        if name in _ELSEWHERE:
            raise ValueError(f"--set {name}={value}: this is said by {_ELSEWHERE[name]}")
        if name.startswith("model.") and name not in free:
            raise ValueError(
                f"--set {name}={value}: the shape comes from MODEL; only {', '.join(sorted(free))} "
                "can be set"
            )
        try:
            given[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"--set {name}: {value!r} is not a YAML value: quote it") from None
    return given


def applied(config: TrainConfig, given: Mapping[str, Any]) -> TrainConfig:
    """
    Raises:
        ValueError: 没有这一项（给出最近的名字），或坏值。
    """
    data = config.to_dict()
    for name, value in given.items():
        *path, last = name.split(".")
        place = data
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ValueError(f"--set {name}={value}: {part} has no parts")
        if isinstance(place.get(last), dict):
            some = next(iter(place[last]), "item")
            raise ValueError(
                f"--set {name}={value}: {name} has parts, and the others would be reset: set one, "
                f"as in --set {name}.{some}=..."
            )
        place[last] = value
    return TrainConfig.from_dict(data)
