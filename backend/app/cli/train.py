"""`gpt2 train`：运行文件加命令行的覆盖，训练，最后说清得到了什么、下一步是什么。"""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from app.cli.shared.runfile import (
    RunArgs,
    config_name,
    fit_vocabulary,
    load_config,
    names_vocabulary,
    where_lines,
)
from app.training.config import TrainConfig

if TYPE_CHECKING:
    from app.training.run import Plan, Result

SUMMARY = "Train a model; Ctrl-C saves, --resume auto goes on exactly where it stopped."
EXAMPLES = """\
  gpt2 train --config quickstart
  gpt2 train --config recipes/shakespeare-char.yaml --optim.lr 2e-3 --out runs/faster
  gpt2 train --config runs/faster/run.yaml --resume auto
"""


Args = RunArgs


def parse(argv: Sequence[str]) -> Args:
    """先读 --config 的文件作默认值，再让 tyro 解析其余。

    Raises:
        ValueError: 文件找不到或读不懂。
    """
    import tyro

    name = config_name(argv)
    base, named = (TrainConfig(), False) if name is None else load_config(name)
    default = Args(config=name, **{f.name: getattr(base, f.name) for f in dataclasses.fields(base)})
    args = tyro.cli(
        Args,
        prog="gpt2 train",
        args=list(argv),
        default=default,
        description=f"{SUMMARY}\n\nexamples:\n{EXAMPLES}",
        config=(tyro.conf.HelptextFromCommentsOff,),
    )
    if named or names_vocabulary(argv):
        return args
    fitted = fit_vocabulary(args.train_config())
    return dataclasses.replace(args, model=fitted.model)


def run(args: Args) -> int:
    # 等待的线程默认空转：只要别的程序占着一个核，两个线程就比一个线程还慢。
    # 须在 torch 载入 OpenMP 之前设；用户自己设了就听用户的。
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from app.training.run import train

    config = args.train_config()
    preset = None if args.config is None else load_config(args.config)[0]
    for line in [] if args.config is None else where_lines(args.config, config):
        print(line, flush=True)
    result = train(config, show_plan, preset=preset)
    for line in summary(result):
        print(line)
    return 1 if result.unwritten else 0


def show_plan(plan: Plan) -> None:
    first = max(len(name) for name, _, _ in plan)
    second = max(len(value) for _, value, _ in plan)
    for name, value, why in plan:
        print(f"  {name:<{first}}  {value:<{second}}  {why}")
    print(flush=True)


def summary(result: Result) -> list[str]:
    """结尾的话：停在哪里、最好的结果、各文件、可以照抄的下一条命令。"""
    from app.training.report.progress import duration

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
