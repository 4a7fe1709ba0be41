"""`gpt2 train`：运行文件加命令行的覆盖，训练，最后说清得到了什么、下一步是什么。"""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from typing_extensions import Doc

from app.cli.shared.command_line import Usage
from app.cli.shared.runfile import RunArgs, fit_model, parse_run
from app.cli.shared.tables import print_table
from app.common.console import forget_reader, say
from app.distributed.launch import local_ranks, place, start_ranks, without_ranks

if TYPE_CHECKING:
    from app.distributed.mesh import Mesh
    from app.training.run import Result

SUMMARY = "Train a model; Ctrl-C saves, --resume auto goes on exactly where it stopped."
EXAMPLES = """\
  gpt2 train --config quickstart
  gpt2 train --config recipes/shakespeare-char.yaml --optim.lr 2e-3 --out runs/faster
  gpt2 train --config runs/faster/run.yaml --resume auto
  gpt2 train --config quickstart --ranks 2
"""


@dataclass(frozen=True, kw_only=True)
class Args(RunArgs):
    """训练配置，外加怎样起它。

    Attributes:
        argv: 原来的命令行，起各个 rank 时照抄。
    """

    ranks: Annotated[
        int | None,
        Doc("start N processes on this machine, one thread each, that train together"),
    ] = None
    argv: tyro.conf.Suppress[tyro.conf.Fixed[tuple[str, ...]]] = ()


def parse(argv: Sequence[str]) -> Args:
    """没有写明词表大小时，取数据集的；有 init_from 时，没有写明的形状取自那里。

    Raises:
        ValueError: 文件找不到或读不懂。
    """
    args = parse_run(Args, argv, Usage("train", SUMMARY, EXAMPLES))
    return dataclasses.replace(fit_model(args, argv), argv=tuple(argv))


def run(args: Args) -> int:
    # 等待的线程默认空转：只要别的程序占着一个核，两个线程就比一个线程还慢。
    # 须在 torch 载入 OpenMP 之前设；用户自己设了就听用户的。
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    here = place()
    if here is not None:
        return _run_rank(args, *here)
    if args.ranks is None:
        return _train(args, None)
    from app.distributed.check import check
    from app.training.ranks import job_of

    if args.ranks < 1:
        raise ValueError(f"ranks={args.ranks} must be at least 1")
    check(job_of(args.train), args.ranks)
    return start_ranks(args.ranks, ["train", *without_ranks(args.argv)])


def _run_rank(args: Args, rank: int, size: int) -> int:
    """由 torchrun 或 --ranks 起的一个进程；拒绝在建进程组之前，各 rank 都一样，由 rank 0 说。"""
    from app.distributed.check import check, check_gpus
    from app.distributed.group import joined
    from app.training.machine.runtime import choose_runtime
    from app.training.ranks import job_of

    try:
        if args.ranks is not None:
            raise ValueError(
                f"ranks={args.ranks} inside {size} ranks that are already started: leave --ranks "
                "out under torchrun"
            )
        check(job_of(args.train), size)
        device = choose_runtime(args.train).device.type
        if device == "cuda":
            check_gpus(local_ranks())
    except ValueError:
        if rank:
            return 2
        raise
    with joined(args.train.parallel, device) as mesh:
        return _train(args, mesh)


def _train(args: Args, mesh: Mesh | None) -> int:
    from app.training.run import train

    first = mesh is None or mesh.world.rank == 0
    preset = None if args.file is None else args.file.config
    for line in [] if args.file is None or not first else args.file.lines(args.train):
        say(line)
    result = train(args.train, print_table, preset=preset, mesh=mesh)
    try:
        for line in summary(result) if first else []:
            say(line)
    except BrokenPipeError:
        # 训练已经做完、存好，只是没有人看了。
        forget_reader()
    return 1 if result.unwritten else 0


def summary(result: Result) -> list[str]:
    """结尾的话：停在哪里、最好的结果、各文件、可以照抄的下一条命令。"""
    from app.common.units import duration

    run_folder = result.checkpoint.parent
    lines = []
    if result.stopped:
        resume = f"gpt2 train --config {_quote(result.run_file)} --resume auto"
        lines.append(f"stopped by {result.stopped} at step {result.step}; saved. Go on with:")
        lines.append(f"  {resume}")
    elif result.early is not None:
        lines.append(f"{result.early}; saved, in {duration(result.seconds)}")
    else:
        lines.append(f"finished {result.step} steps in {duration(result.seconds)}")
    if result.best is not None:
        lines.append(f"best validation loss {result.best[1]:.4f} at step {result.best[0]}")
    if result.skipped:
        lines.append(f"{result.skipped} steps were skipped: loss or gradient non-finite or a spike")
    if result.plot is not None:
        lines.append(f"loss plot   {result.plot}")
    lines.append(f"report      {result.report}")
    lines.append(f"checkpoint  {result.checkpoint}")
    if result.unwritten:
        lines.append(f"trained and saved, but not written whole: {', '.join(result.unwritten)}")
    which = run_folder / "best" if result.best is not None else run_folder
    lines.append(f'write with it:\n  gpt2 generate {_quote(which)} --prompt "..."')
    return lines


def _quote(path: Any) -> str:
    return shlex.quote(os.fspath(path))
