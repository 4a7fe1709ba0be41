"""objective 一节：损失是什么，哪些词元计分。"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from typing_extensions import Doc

from app.models.transformer.settings.fields import normalise_types

from .bounds import between

Kind = Literal["lm", "distill", "dpo"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """语言模型；蒸馏（Hinton et al. 2015, arXiv:1503.02531）；DPO（Rafailov et al. 2023,
    arXiv:2305.18290）。
    """

    kind: Annotated[
        Kind, Doc("lm = next token; distill = also a teacher's distribution; dpo = preferences")
    ] = "lm"
    score: Annotated[
        Literal["auto", "all", "answers"],
        Doc("tokens that count; auto = the answers where the data marks them, else all"),
    ] = "auto"
    teacher: Annotated[
        str | None, Doc("distill: run, checkpoint or model folder with the same tokenizer")
    ] = None
    alpha: Annotated[float, Doc("distill: weight of the teacher; 1 - alpha for the data")] = 0.5
    temperature: Annotated[float, Doc("distill: softens both distributions")] = 1.0
    dpo_beta: Annotated[float, Doc("dpo: how strongly it is held to the reference")] = 0.1
    dpo_sft: Annotated[float, Doc("dpo: weight of the usual loss on the chosen answers")] = 0.0
    reference: Annotated[
        str, Doc("dpo: model to compare with; auto = the weights at the start")
    ] = "auto"

    def __post_init__(self) -> None:
        normalise_types(self)
        between(self, "alpha", 0.0, 1.0)
        between(self, "temperature", 0.0, math.inf, open_low=True)
        between(self, "dpo_beta", 0.0, math.inf, open_low=True)
        between(self, "dpo_sft", 0.0, math.inf)
        if self.kind == "distill" and not self.teacher:
            raise ValueError(
                f"objective.kind=distill but objective.teacher={self.teacher}: name the folder of "
                "the teacher, or use kind=lm"
            )
        if self.kind != "distill" and self.teacher is not None:
            raise ValueError(
                f"objective.teacher={self.teacher} but objective.kind={self.kind} has no teacher: "
                "use kind=distill, or leave it out"
            )
        if self.kind != "dpo" and self.reference != "auto":
            raise ValueError(
                f"objective.reference={self.reference} but objective.kind={self.kind} compares "
                "with no reference: use kind=dpo, or leave it out"
            )
        if not self.reference:
            raise ValueError("objective.reference is empty: use auto, or the folder of a model")
