"""`gpt2 upcycle`：稠密模型变成混合专家，写完两边都读回来比。"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from typing_extensions import Doc

from app.cli.shared.trained import load_trained, own_run_file, write_trained
from app.common.files import check_new
from app.common.tell import to_stderr
from app.models.transformer.config import GPT2Config
from app.models.transformer.settings.moe_config import MoEConfig

if TYPE_CHECKING:
    from app.models.transformer import GPT2Model

SUMMARY = "turn a dense model into experts that compute the same, to train on"
EXAMPLES = """\
  gpt2 upcycle runs/mine --experts 8 --top-k 2 --out upcycled
  gpt2 upcycle runs/mine/best --every 2 --noise 0.01 --out upcycled
  gpt2 train --config upcycled/train.yaml --out runs/experts"""

TRAIN_FILE = "train.yaml"


@dataclass(frozen=True)
class Args:
    """每个专家都是稠密前馈的一份复制，与它一样宽。"""

    model: Annotated[
        tyro.conf.Positional[str],
        Doc("run folder (newest checkpoint), RUN/best, a checkpoint or a saved model; dense"),
    ]
    out: Annotated[Path, Doc("folder to write the model to; must not exist")]
    experts: Annotated[int, Doc("experts per layer")] = 8
    top_k: Annotated[int, Doc("experts per token")] = 2
    router: Annotated[Literal["softmax_topk", "sigmoid"], Doc("routers whose weights sum to 1")] = (
        "softmax_topk"
    )
    every: Annotated[int, Doc("every n-th layer gets experts (the last of each n)")] = 1
    first_dense: Annotated[int, Doc("the first so many layers stay dense")] = 0
    layers: Annotated[
        tyro.conf.UseAppendAction[tuple[int, ...]],
        Doc("layer that gets experts, counted from 0; repeat; none = by --every"),
    ] = ()
    noise: Annotated[
        float, Doc("random part of each expert's weights, relative to their spread; 0 = exact")
    ] = 0.0
    seed: Annotated[int, Doc("seed of the routers and the noise")] = 0


def run(args: Args) -> int:
    """退出码 1：写下了，但没有噪声而算出的仍与稠密的不同。

    Raises:
        ValueError: 不是稠密的模型，选项互相矛盾，或 --out 已存在。
    """
    from app.data.chat.template import find_template
    from app.models.transformer import GPT2Model
    from app.models.transformer.experts.upcycle import upcycle
    from app.quantization.model import check_float

    check_new(args.out)
    dense, tokenizer, folder = load_trained(args.model, "cpu")
    check_float(dense, "upcycling")
    config = _target(args, dense.config)
    state = upcycle(dense.state_dict(), dense.config, config, seed=args.seed, noise=args.noise)
    files = {TRAIN_FILE: _train_file(args, folder, config)}
    write_trained(config, state, tokenizer, args.out, find_template(folder), files)
    return _report(args, folder, dense, GPT2Model.from_pretrained(args.out))


def _target(args: Args, dense: GPT2Config) -> GPT2Config:
    if dense.moe_num_experts:
        raise ValueError(
            f"{args.model} already has moe_num_experts={dense.moe_num_experts}: only a dense model "
            "can be upcycled; gpt2 experts averages or prunes them"
        )
    moe = MoEConfig(
        router=args.router,
        hidden=dense.mlp_hidden,
        every=args.every,
        first_dense=args.first_dense,
        layers=args.layers or None,
    )
    return dense.replace(moe_num_experts=args.experts, moe_top_k=args.top_k, moe=moe)


def _train_file(args: Args, folder: Path, config: GPT2Config) -> str:
    """接着训练用的运行文件：原来那次训练的设置，换上新的形状与起点。"""
    import yaml

    from app.cli.shared.runfile import read_run_file

    source = own_run_file(folder)
    data = {} if source is None else read_run_file(source)
    data |= {"model": config.to_dict(), "init_from": str(args.out), "resume": "none"}
    data["out"] = f"runs/{args.out.name}"
    return yaml.safe_dump(data, sort_keys=False)


def _report(args: Args, folder: Path, dense: GPT2Model, grown: GPT2Model) -> int:
    from app.verification.same_output import TOKENS, largest_differences, same

    config = grown.config
    of = f"{len(config.moe_layers)} of {config.n_layer} layers"
    print(
        f"{args.out}: {of} with {config.moe_num_experts} experts, top-{config.moe_top_k}; "
        f"{dense.num_parameters():,} -> {grown.num_parameters():,} parameters, "
        f"{grown.active_parameters():,} active"
    )
    count = min(TOKENS, config.context_size)
    found = largest_differences(dense, grown)
    print(f"largest difference of the logits from {folder}, {count} random tokens, read back:")
    for one in found:
        print(f"  {one.dtype}  {one.largest:.3g}  (largest logit {one.logit:.3g})")
    if args.noise:
        print(f"  noise {args.noise:g} is in it: the experts start out different")
    else:
        print("  without noise all experts are equal: only the tokens they get tell them apart")
    if not args.noise and not same(found):
        to_stderr(
            "error: without noise both must compute the same: do not train on from this model"
        )
        return 1
    print(f"train on with:\n  gpt2 train --config {args.out / TRAIN_FILE} --out runs/NAME")
    return 0
