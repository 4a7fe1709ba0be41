"""`gpt2 experts`：把专家平均成稠密的前馈，或剪去不用的；前后的损失都量出来。"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from typing_extensions import Doc

from app.cli.shared.trained import check_new_folder, load_trained, own_data, write_model

if TYPE_CHECKING:
    from torch import Tensor

    from app.data.tokenizers import Tokenizer
    from app.evaluation.perplexity import HeldOut
    from app.models.transformer import GPT2Model

SUMMARY = "average a model's experts into a dense one, or prune those little used"
EXAMPLES = """\
  gpt2 experts runs/experts --average --out dense
  gpt2 experts runs/experts --prune --out fewer
  gpt2 experts runs/experts --prune --keep 4 --data data/mine --out four"""


@dataclass(frozen=True)
class Args:
    """平均与剪枝二选一。"""

    model: Annotated[
        tyro.conf.Positional[str],
        Doc("run folder (newest checkpoint), RUN/best, a checkpoint or a saved model"),
    ]
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
    batch_size: Annotated[int, Doc("sequences computed at once")] = 8
    device: Annotated[str, Doc("auto (cuda where there is one, else cpu), cpu, cuda, cuda:1")] = (
        "auto"
    )


def run(args: Args) -> None:
    """
    Raises:
        ValueError: 没有专家，选项互相矛盾，数据不合，或 --out 已存在。
    """
    from app.training.saving.checkpoint import resolve_checkpoint

    _check(args)
    folder = resolve_checkpoint(args.model, tell=_tell)
    model, tokenizer = load_trained(str(folder), args.device)
    if not model.config.moe_num_experts:
        raise ValueError(f"{args.model} has moe_num_experts=0: there are no experts in it")
    held = _held_out(args, folder, tokenizer)
    if args.average:
        _average(args, model, tokenizer, held)
    else:
        _prune(args, model, tokenizer, held)


def _check(args: Args) -> None:
    if args.average == args.prune:
        both = "both --average and --prune" if args.average else "neither --average nor --prune"
        raise ValueError(f"{both}: give one of them")
    if args.keep is not None and not args.prune:
        raise ValueError(f"keep={args.keep} has no effect with --average: leave it out")
    if args.data is not None and args.text is not None:
        raise ValueError(f"data={args.data} and text={args.text} are both given: leave one out")
    if args.batch_size < 1:
        raise ValueError(f"batch_size={args.batch_size} must be at least 1")
    check_new_folder(args.out)


def _held_out(args: Args, folder: Path, tokenizer: Tokenizer) -> HeldOut:
    from app.evaluation.perplexity import open_dataset, open_text

    if args.text is not None:
        return open_text(args.text, tokenizer)
    return open_dataset(args.data or own_data(folder, _tell, "--data or --text"), tokenizer)


def _average(args: Args, model: GPT2Model, tokenizer: Tokenizer, held: HeldOut) -> None:
    from app.models.transformer.experts.upcycle import average

    config = model.config
    state = average(model.state_dict(), config)
    before = _loss(args, model, tokenizer, held)
    write_model(config.dense(), state, tokenizer, args.out)
    _report(args, model, before, tokenizer, held, f"{config.moe_num_experts} experts averaged")


def _prune(args: Args, model: GPT2Model, tokenizer: Tokenizer, held: HeldOut) -> None:
    from app.models.transformer.experts.upcycle import most_used, prune

    load = _load(args, model, tokenizer, held)
    keep = most_used(load, model.config, args.keep)
    state, config = prune(model.state_dict(), model.config, keep)
    for row, (layer, kept) in zip(load.tolist(), keep.items(), strict=True):
        shares = " ".join(f"{value / max(1, sum(row)):.1%}" for value in row)
        share = sum(row[e] for e in kept) / max(1, sum(row))
        print(f"layer {layer}: load {shares}; kept {_list(kept)}, which had {share:.1%}")
    if config.moe_num_experts == model.config.moe_num_experts:
        raise ValueError(
            f"all {config.moe_num_experts} experts are in use in some layer on {held.name}: "
            f"nothing is pruned without loss; give --keep below {config.moe_num_experts}"
        )
    before = _loss(args, model, tokenizer, held)
    write_model(config, state, tokenizer, args.out)
    what = f"{config.moe_num_experts} of {model.config.moe_num_experts} experts kept"
    _report(args, model, before, tokenizer, held, what)


def _load(args: Args, model: GPT2Model, tokenizer: Tokenizer, held: HeldOut) -> Tensor:
    from app.cli.shared.meter import meter
    from app.evaluation.routing import expert_load

    with meter("routing", held.source.n_tokens) as advance:
        return expert_load(model, tokenizer.boundary_id, held.source, args.batch_size, advance)


def _loss(args: Args, model: GPT2Model, tokenizer: Tokenizer, held: HeldOut) -> float:
    """nat 每词元。"""
    from app.cli.shared.meter import meter
    from app.evaluation.perplexity import score_windows, summarize

    scores = []
    stride = max(1, model.config.context_size // 2)
    with meter(held.name, held.source.n_tokens) as advance:
        for batch in score_windows(
            model, tokenizer, held.source, stride=stride, batch_size=args.batch_size
        ):
            scores.extend(batch)
            advance(sum(score.tokens for score in batch))
    return summarize(scores).metrics()["nats per token"].value or 0.0


def _report(
    args: Args, model: GPT2Model, before: float, tokenizer: Tokenizer, held: HeldOut, what: str
) -> None:
    made, _ = load_trained(str(args.out), args.device)
    after = _loss(args, made, tokenizer, held)
    print(f"{args.out}: {what}; {model.num_parameters():,} -> {made.num_parameters():,} parameters")
    print(
        f"loss on {held.name}, {held.source.n_tokens:,} tokens: "
        f"{before:.4f} -> {after:.4f} ({after - before:+.4f}) nats per token"
    )


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _tell(text: str) -> None:
    print(text, file=sys.stderr)
