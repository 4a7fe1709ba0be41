"""`gpt2 verify`：对一份配置做与 verify_implementation.py 相同的检查。"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro
from typing_extensions import Doc

from app.cli.shared.command_line import Usage, parse_options
from app.cli.shared.runfile import config_name, load_model_config
from app.distributed.config import ParallelConfig
from app.distributed.launch import local_ranks, place, start_ranks, without_ranks
from app.models.transformer.config import GPT2Config
from app.training.config import TrainConfig

SUMMARY = "check a configuration: causality, cache, padding, packing, counts, save and load"
EXAMPLES = """\
  gpt2 verify --model.n-layer 4 --model.norm keel
  gpt2 verify --config my-model/config.json
  gpt2 verify --config runs/train/run.yaml --model.n-kv-head 2
  gpt2 verify --quantized
  gpt2 verify --parallel.shard 2 --ranks 4"""


@dataclass(frozen=True)
class Args:
    """哪一份配置。"""

    config: Annotated[
        str | None,
        Doc("config.json of a model, or a run file (path, or name in recipes/); flags override it"),
    ] = None
    model: Annotated[GPT2Config, Doc("shape of the model")] = field(default_factory=GPT2Config)
    quantized: Annotated[
        bool, Doc("instead: every kernel of quantized weights here, against its slow twin")
    ] = False
    device: Annotated[
        str, Doc("device of --quantized and of ranks: cpu, cuda; cuda:1 for --quantized")
    ] = "cpu"
    parallel: Annotated[
        ParallelConfig, Doc("how ranks divide the work, checked under --ranks or torchrun")
    ] = field(default_factory=ParallelConfig)
    ranks: Annotated[
        int | None, Doc("instead: start N ranks here, which must compute what one process does")
    ] = None
    argv: tyro.conf.Suppress[tyro.conf.Fixed[tuple[str, ...]]] = ()


def parse(argv: Sequence[str]) -> Args:
    """先读 --config 的文件作默认值，再让 tyro 解析其余。

    Raises:
        ValueError: 文件找不到或读不懂。
    """
    name = config_name(argv)
    default = None if name is None else Args(name, load_model_config(name).config.model)
    args = parse_options(Args, argv, Usage("verify", SUMMARY, EXAMPLES), default)
    return replace(args, argv=tuple(argv))


def run(args: Args) -> int:
    """退出码 0 全部通过，1 有一项不过。"""
    if args.quantized:
        from app.cli.shared.trained import pick_device
        from app.quantization.verify_kernels import verify_kernels

        return 0 if verify_kernels(print, pick_device(args.device).type) else 1
    here = place()
    if here is not None:
        return _run_rank(args, *here)
    if args.ranks is not None:
        if args.ranks < 2:
            raise ValueError(f"ranks={args.ranks} must be at least 2: one process is the yardstick")
        _config(args, args.ranks)
        return start_ranks(args.ranks, ["verify", *without_ranks(args.argv)])
    from app.distributed.check import check_alone
    from app.verification.verify import verify_config

    check_alone(args.parallel)

    return 0 if verify_config(args.model, "english") else 1


def _run_rank(args: Args, rank: int, size: int) -> int:
    """由 torchrun 或 --ranks 起的一个进程；拒绝由 rank 0 说。"""
    from app.distributed.check import check_gpus
    from app.distributed.group import joined
    from app.equalities.verify import verify_ranks
    from app.training.machine.runtime import choose_runtime

    try:
        config = _config(args, size)
        runtime = choose_runtime(config)
        if runtime.device.type == "cuda":
            check_gpus(local_ranks())
    except ValueError:
        if rank:
            return 2
        raise
    with joined(args.parallel, runtime.device.type) as mesh:
        return 0 if verify_ranks(config, mesh, runtime.device, print) else 1


def _config(args: Args, size: int) -> TrainConfig:
    """
    Raises:
        ValueError: size 个 rank 做不了；在建任何进程组之前。
    """
    from app.distributed.check import check
    from app.distributed.mesh import DATA, degrees
    from app.equalities.verify import verify_config
    from app.training.ranks import job_of

    data = math.prod(degrees(args.parallel, size)[axis] for axis in DATA)
    config = verify_config(args.model, args.parallel, data).replace(device=args.device)
    check(job_of(config), size)
    return config
