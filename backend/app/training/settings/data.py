"""data 一节：读哪些数据，怎样排进一行。"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from typing_extensions import Doc

from app.models.transformer.settings.fields import Mark, normalise_types

# data.folder 自己的验证部分；指标与报告里用这个名字。
OWN = "val"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """读哪个数据集。"""

    folder: Annotated[
        str, Doc("dataset folder written by `gpt2 prepare`"), Mark.SILENT, Mark.ASIDE
    ] = "data/stdlib"
    val: Annotated[
        dict[str, str],
        Doc("more validation sets, name and folder; the first decides best and patience"),
        Mark.SILENT,
    ] = field(default_factory=dict)
    documents: Annotated[
        Literal["joined", "apart"],
        Doc("text: documents of one row see each other, or each sees only itself"),
    ] = "joined"
    pack: Annotated[
        bool, Doc("conversations: several whole examples in one row, isolated from each other")
    ] = False
    verify: Annotated[
        Literal["sha256", "size"],
        Doc("before training, check the content of every data file, or only its size"),
        Mark.SILENT,
        Mark.ASIDE,
    ] = "sha256"

    def __post_init__(self) -> None:
        normalise_types(self)
        for name, folder in self.val.items():
            if not name.isidentifier() or not folder:
                raise ValueError(
                    f"data.val has {name!r}: {folder!r}: a name is one word of letters, digits "
                    "and _, and its folder is not empty"
                )
        if OWN in self.val:
            raise ValueError(
                f"data.val names a set {OWN!r}, which is the name of the validation part of "
                f"data.folder={self.folder}: choose another name"
            )
