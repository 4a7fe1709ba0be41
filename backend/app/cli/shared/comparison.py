"""几次训练的对照，印在终端上：compare 与 sweep 共用。"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from app.cli.shared.tables import print_table

if TYPE_CHECKING:
    from app.training.report.compare_runs import SeedGroup


def show_comparison(groups: Sequence[SeedGroup], notes: Sequence[str]) -> None:
    """两张表：结果，与不同的设置。"""
    from app.training.report.compare_runs import (
        HEAD,
        differing,
        row,
        settings_rows,
        tuning_rows,
    )

    for note in notes:
        print(note)
    print_table([HEAD, *map(row, groups)])
    if tuning := tuning_rows(groups):
        print_table(tuning)
    names = differing([run for group in groups for run in group.runs])
    if names:
        labels = [", ".join(Path(run.name).name for run in group.runs) for group in groups]
        print_table([("differs", *labels), *settings_rows(groups, names)])
    else:
        print("no setting differs but the seed\n")
