"""`gpt2 train`：运行文件加命令行的覆盖，训练，最后说清得到了什么、下一步是什么。"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from app.cli.shared.command_line import Usage
from app.cli.shared.runfile import RunArgs, fit_vocabulary, names_vocabulary, parse_run
from app.cli.shared.tables import print_table
from app.common.console import forget_reader, say

if TYPE_CHECKING:
    from app.training.run import Result

SUMMARY = "Train a model; Ctrl-C saves, --resume auto goes on exactly where it stopped."
EXAMPLES = """\
  gpt2 train --config quickstart
  gpt2 train --config recipes/shakespeare-char.yaml --optim.lr 2e-3 --out runs/faster
  gpt2 train --config runs/faster/run.yaml --resume auto
"""


Args = RunArgs


def parse(argv: Sequence[str]) -> Args:
    """没有写明词表大小时，取数据集的。

    Raises:
        ValueError: 文件找不到或读不懂。
    """
    args = parse_run(Args, argv, Usage("train", SUMMARY, EXAMPLES))
    return args if names_vocabulary(args, argv) else fit_vocabulary(args)


def run(args: Args) -> int:
    # 等待的线程默认空转：只要别的程序占着一个核，两个线程就比一个线程还慢。
    # 须在 torch 载入 OpenMP 之前设；用户自己设了就听用户的。
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from app.training.run import train

    preset = None if args.file is None else args.file.config
    for line in [] if args.file is None else args.file.lines(args.train):
        say(line)
    result = train(args.train, print_table, preset=preset)
    try:
        for line in summary(result):
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
