"""`gpt2 experts`：把专家平均成稠密的前馈，或剪去不用的；前后的损失都量出来。"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typing_extensions import Doc

from app.cli.shared.held_out import check_held_out, held_out
from app.cli.shared.trained import Device, TrainedName, load_trained, write_trained
from app.common.files import check_new

SUMMARY = "average a model's experts into a dense one, or prune those little used"
EXAMPLES = """\
  gpt2 experts runs/experts --average --out dense
  gpt2 experts runs/experts --prune --out fewer
  gpt2 experts runs/experts --prune --keep 4 --data data/mine --out four"""


@dataclass(frozen=True)
class Args:
    """平均与剪枝二选一。"""

    model: TrainedName
    out: Annotated[Path, Doc("folder to write the model to; must not exist")]
    average: Annotated[
        bool,
        Doc(
            "one dense MLP from the mean of each layer's experts",
        ),
    ] = False
    prune: Annotated[bool, Doc("keep each layer's most used experts, by the tokens they get")] = (
        False
    )
    keep: Annotated[
        int | None,
        Doc("experts kept by --prune; None = as many as the layer with most experts in use needs"),
    ] = None
    data: Annotated[
        Path | None, Doc("prepared dataset whose val part is measured; None = the data of the run")
    ] = None
    text: Annotated[Path | None, Doc("text file to measure instead")] = None
    text_key: Annotated[
        str | None, Doc("key of the text in the jsonl (or parquet) given by --text; None = text")
    ] = None
    batch_size: Annotated[int, Doc("sequences computed at once")] = 8
    device: Device = "auto"


def run(args: Args) -> None:
    """
    Raises:
        ValueError: 没有专家，选项互相矛盾，数据不合，或 --out 已存在。
    """
    from app.common.progress import count_tokens
    from app.data.chat.template import find_template
    from app.evaluation.evaluate import mean_nats
    from app.evaluation.reduce import averaged, pruned
    from app.quantization.model import check_float

    _check(args)
    trained = load_trained(args.model, args.device)
    model, tokenizer, folder = trained
    check_float(model, "averaging or pruning experts")
    if not model.config.moe_num_experts:
        raise ValueError(f"{args.model} has moe_num_experts=0: there are no experts in it")
    held = held_out(args, trained, "--data or --text")
    found = (
        averaged(model)
        if args.average
        else pruned(model, tokenizer, held, args.keep, args.batch_size, count_tokens)
    )
    before = mean_nats(model, tokenizer, held, args.batch_size, count_tokens)
    write_trained(found.config, found.state, tokenizer, args.out, find_template(folder))
    made = load_trained(args.out, args.device).model
    after = mean_nats(made, tokenizer, held, args.batch_size, count_tokens)
    for layer, kept in found.layers.items():
        shares = " ".join(f"{kept.share(expert):.1%}" for expert in range(len(kept.load)))
        numbers, share = ", ".join(map(str, kept.experts)), sum(map(kept.share, kept.experts))
        print(f"layer {layer}: load {shares}; kept {numbers}, which had {share:.1%}")
    counts = f"{model.num_parameters():,} -> {made.num_parameters():,} parameters"
    print(f"{args.out}: {found.what}; {counts}")
    print(
        f"loss on {held.name}, {held.source.n_tokens:,} tokens: "
        f"{before:.4f} -> {after:.4f} ({after - before:+.4f}) nats per token"
    )


def _check(args: Args) -> None:
    if args.average == args.prune:
        both = "both --average and --prune" if args.average else "neither --average nor --prune"
        raise ValueError(f"{both}: give one of them")
    if args.keep is not None and not args.prune:
        raise ValueError(f"keep={args.keep} has no effect with --average: leave it out")
    check_held_out(args)
    check_new(args.out)
