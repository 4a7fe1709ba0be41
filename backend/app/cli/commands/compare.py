"""`gpt2 compare`：几次训练的表与曲线。"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from typing_extensions import Doc

from app.cli.shared.comparison import show_comparison
from app.common.files import write_new

SUMMARY = "Compare runs over tokens and over time; runs that differ only in the seed are grouped."
EXAMPLES = """\
  gpt2 compare runs/a runs/b
  gpt2 compare runs/norms/*/ --out norms.png"""

_KINDS = (".html", ".png")


@dataclass(frozen=True)
class Args:
    """哪几次，画到哪里。"""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], Doc("run folders, at least two")]
    out: Annotated[Path, Doc("page (.html) or picture (.png) to write; never overwritten")] = Path(
        "compare.html"
    )


def run(args: Args) -> None:
    """
    Raises:
        ValueError: 少于两个、同一个两次、没有指标的文件夹，或 --out 已经存在。
    """
    from app.training.report.compare_runs import (
        check_same_data,
        compare_charts,
        compare_page,
        group_runs,
        load_run,
    )
    from app.viz.picture import check_picture

    folders = [Path(name) for name in args.runs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("a run is given twice: give each once")
    if len(folders) < 2:
        raise ValueError(f"{len(folders)} run given, at least 2 are needed to compare")
    check_picture(args.out, _KINDS)
    notes: list[str] = []
    loaded = [load_run(folder) for folder in folders]
    check_same_data(loaded, notes.append)
    groups = group_runs(loaded)
    if args.out.suffix.lower() == ".html":
        write_new(args.out, compare_page(groups, notes))
    else:
        from app.viz.curves import draw_charts

        draw_charts(compare_charts(groups), args.out)
    show_comparison(groups, notes)
    print(f"drawn in {args.out}")
