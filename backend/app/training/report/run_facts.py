"""facts.json：开训时定下的事（计划、理由、数据的指纹、提醒），给报告与对照用。"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from app.common.files import write_atomic

FACTS = "facts.json"

# 将要怎样跑：(项目, 值, 理由)。
Decisions = list[tuple[str, str, str]]


@dataclass(frozen=True)
class Facts:
    """Attributes:
    decisions: 将要怎样跑。
    notes: 开训之前说过的提醒。
    data: 训练集与验证集的指纹；没有验证集的为空。
    expected_loss: 随机初始化时应有的损失。
    unigram: 数据的一元熵；停在这里的模型没有用上文。None = 没有算。
    trained: 会训练的参数；None = 更早的训练没有记。
    """

    decisions: Decisions
    notes: list[str]
    data: tuple[str, str]
    parameters: int
    steps: int
    expected_loss: float
    unigram: float | None = None
    trained: int | None = None


def write_facts(run: Path, facts: Facts) -> None:
    data = asdict(facts)
    # 文件里一向叫 plan。
    data = {"plan": data.pop("decisions"), **data}
    write_atomic(run / FACTS, (json.dumps(data, indent=1) + "\n").encode())


def read_facts(run: Path) -> Facts | None:
    """没有这个文件（更早的训练）则 None。

    Raises:
        ValueError: 读不懂。
    """
    path = run / FACTS
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_bytes())
        return Facts(
            decisions=[(str(a), str(b), str(c)) for a, b, c in data["plan"]],
            notes=[str(note) for note in data["notes"]],
            data=(str(data["data"][0]), str(data["data"][1])),
            parameters=int(data["parameters"]),
            steps=int(data["steps"]),
            expected_loss=float(data["expected_loss"]),
            unigram=None if data.get("unigram") is None else float(data["unigram"]),
            trained=None if data.get("trained") is None else int(data["trained"]),
        )
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it") from None
