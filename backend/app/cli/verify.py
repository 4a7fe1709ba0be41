"""`gpt2 verify`：对一份配置做与 verify_implementation.py 相同的检查。"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from typing_extensions import Doc

from app.cli.shared.command_line import Usage, parse_options
from app.cli.shared.runfile import config_name, load_model_config
from app.models.transformer.config import GPT2Config

SUMMARY = "check a configuration: causality, cache, padding, packing, counts, save and load"
EXAMPLES = """\
  gpt2 verify --model.n-layer 4 --model.norm keel
  gpt2 verify --config my-model/config.json
  gpt2 verify --config runs/train/run.yaml --model.n-kv-head 2
  gpt2 verify --quantized"""


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
    device: Annotated[str, Doc("device of --quantized: cpu, cuda, cuda:1")] = "cpu"


def parse(argv: Sequence[str]) -> Args:
    """先读 --config 的文件作默认值，再让 tyro 解析其余。

    Raises:
        ValueError: 文件找不到或读不懂。
    """
    name = config_name(argv)
    default = None if name is None else Args(name, load_model_config(name).config.model)
    return parse_options(Args, argv, Usage("verify", SUMMARY, EXAMPLES), default)


def run(args: Args) -> int:
    """退出码 0 全部通过，1 有一项不过。"""
    if args.quantized:
        from app.cli.shared.trained import pick_device
        from app.quantization.verify_kernels import verify_kernels

        return 0 if verify_kernels(print, pick_device(args.device).type) else 1
    from app.verification.verify import verify_config

    return 0 if verify_config(args.model, "english") else 1
