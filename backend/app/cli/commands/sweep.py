"""`gpt2 sweep`：同样的数据与种子，换一个开关，逐个训练，然后对照。"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from typing_extensions import Doc

from app.cli.shared.command_line import Usage
from app.cli.shared.comparison import show_comparison
from app.cli.shared.runfile import RunArgs, fit_model, parse_run
from app.cli.shared.tables import print_table

SUMMARY = "Train the same data and seeds with one switch changed, then compare."
EXAMPLES = """\
  gpt2 sweep --config quickstart --vary model.norm=post,pre,keel --seeds 0 1 --out runs/norms
  gpt2 sweep --config quickstart --vary optim.lr=1e-3,3e-3 --steps 300 --out runs/rates

The same command again goes on where it stopped; finished runs are not repeated.
"""

_PAGE = "compare.html"


@dataclass(frozen=True, kw_only=True)
class Args(RunArgs):
    """训练的全部设置是共同的底子，外加换什么、用哪些种子。"""

    vary: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        Doc("setting=value,value,...; given twice or more: every combination"),
    ] = ()
    seeds: Annotated[tuple[int, ...], Doc("seeds of each setting; none = the one of --seed")] = ()


def parse(argv: Sequence[str]) -> Args:
    """
    Raises:
        ValueError: 文件找不到或读不懂。
    """
    args = parse_run(Args, argv, Usage("sweep", SUMMARY, EXAMPLES), out="runs/sweep")
    return fit_model(args, argv)


def run(args: Args) -> int:
    """
    Raises:
        ValueError: 没有要换的，或哪一个组合不行；那时什么也没有写。
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from app.common.files import write_atomic
    from app.training.report.compare_runs import check_same_data, compare_page, group_runs, load_run
    from app.training.sweep import expand, parse_switch, run_sweep

    base = args.train
    seeds = args.seeds or (base.seed,)
    if base.resume != "none":
        raise ValueError(f"resume={base.resume}: a sweep resumes by itself, leave --resume out")
    if not args.vary and len(seeds) < 2:
        raise ValueError("nothing varies: give --vary name=value,value or several --seeds")
    configs = expand(base, [parse_switch(text) for text in args.vary], seeds)
    print(f"{len(configs)} runs in {base.out}", flush=True)
    outcome = run_sweep(configs, print_table, lambda text: print(text, flush=True))
    if outcome.stopped:
        print(f"stopped by {outcome.stopped}; the same command goes on")
        return 0
    for folder, reason in outcome.failed:
        print(f"not finished: {folder}: {reason}")
    if not outcome.done:
        return 1
    runs = [load_run(folder) for folder in (*outcome.done, *(path for path, _ in outcome.failed))]
    notes = [f"not finished: {folder}: {reason}" for folder, reason in outcome.failed]
    check_same_data(runs, notes.append)
    groups = group_runs(runs)
    path = Path(base.out) / _PAGE
    write_atomic(path, compare_page(groups, notes))
    show_comparison(groups, notes)
    print(f"drawn in {path}\nagain, or with others:\n  gpt2 compare {_quoted(outcome.done)}")
    return 1 if outcome.failed else 0


def _quoted(folders: Sequence[Path]) -> str:
    return " ".join(shlex.quote(os.fspath(folder)) for folder in folders)
