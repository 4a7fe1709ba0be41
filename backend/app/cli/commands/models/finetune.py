"""`gpt2 finetune`：训练好的模型加上自己的文件，写出运行文件，交给普通的训练。"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from typing_extensions import Doc

from app.cli.shared.tables import print_table
from app.common.console import say

if TYPE_CHECKING:
    from app.data.tokenizers import Tokenizer
    from app.finetuning.plan import Plan, Start
    from app.finetuning.settings import Wish
    from app.models.transformer import GPT2Config, GPT2Model
    from app.planning.fit import Room
    from app.training.config import TrainConfig

SUMMARY = (
    "Tune a trained model on your own file: text, questions and answers, conversations or "
    "preferences. Shape and tokenizer come from the model; it says what will run before it starts."
)
EXAMPLES = """\
  gpt2 finetune models/gpt2 letters.csv --columns text=body --out runs/letters
  gpt2 finetune runs/mine questions.jsonl --chat chatml --trainable lora --out runs/answers
  gpt2 finetune runs/answers pairs.jsonl --out runs/better --epochs 1
  gpt2 finetune models/gpt2 mail/ --out runs/mail --set optim.lr=1e-5 --dry-run
  gpt2 finetune runs/mine questions.jsonl --out runs/answers --resume auto"""

DATA = "data"


@dataclass(frozen=True)
class Args:
    """`gpt2 finetune` 的选项。"""

    model: Annotated[
        tyro.conf.Positional[str],
        Doc("run folder (newest checkpoint), RUN/best, a checkpoint, an adapter or a saved model"),
    ]
    data: Annotated[
        tyro.conf.Positional[str],
        Doc("folder of `gpt2 prepare`; or a file or folder: text, jsonl, json, csv, tsv, parquet"),
    ]
    out: Annotated[Path, Doc("run folder; a file or folder is prepared into OUT/data")]
    trainable: Annotated[
        str, Doc("all, lora, last:K (the last K layers), head, or names with * by commas")
    ] = "all"
    epochs: Annotated[float | None, Doc("times over the data; None = 3, preferences 1")] = None
    context: Annotated[int | None, Doc("tokens at once, at most the model's; None = those")] = None
    chat: Annotated[
        Literal["chatml", "alpaca", "plain"] | None,
        Doc("how turns are written; None = as the model knows, else by the form, and says so"),
    ] = None
    columns: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        Doc("new=old, by commas: which keys or columns to read, as in text=body"),
    ] = ()
    val: Annotated[str | None, Doc("file to validate on, or the fraction held out; None = 0.1")] = (
        None
    )
    long: Annotated[
        Literal["drop", "cut-prompt"],
        Doc("conversations longer than the context: leave out, or cut the oldest turns"),
    ] = "drop"
    old_data: Annotated[
        Path | None,
        Doc("prepared data that the model knew, to measure what it forgets; None = its run's own"),
    ] = None
    set: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        Doc("key=value of the run file, over the defaults; repeat for more"),
    ] = ()
    resume: Annotated[Literal["none", "auto"], Doc("auto = go on with OUT where it stopped")] = (
        "none"
    )
    dry_run: Annotated[bool, Doc("say what would run, write nothing")] = False


def run(args: Args) -> int:
    """
    Raises:
        ValueError: 模型、数据或设置不可用；那时 --out 里什么也没有留下。
    """
    # 与 gpt2 train 相同；须在 torch 载入之前。
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    config = _decide(args)
    if config is None:
        return 0
    from app.cli.commands import train

    return train.run(train.Args(train=config))


def _decide(args: Args) -> TrainConfig | None:
    """说出将要怎样跑；--dry-run 到此为止。返回时模型已放掉，训练自己再装。"""
    from app.cli.shared.trained import load_trained
    from app.finetuning.given import parse_given
    from app.finetuning.plan import check_start, make_plan, shaped
    from app.finetuning.settings import Wish
    from app.models.transformer.settings.tune_config import TuneConfig
    from app.planning.fit import room_on
    from app.quantization.model import check_float
    from app.training.config import TrainConfig
    from app.training.machine.runtime import choose_runtime

    wish = Wish(args.trainable, args.epochs, parse_given(args.set))
    TuneConfig(trainable=args.trainable)
    _check_out(args)
    # 内存要在装入模型之前看：训练时这个模型已经放掉。
    room = room_on(choose_runtime(TrainConfig(device=str(wish.given.get("device", "auto")))))
    model, tokenizer, folder = load_trained(args.model, "cpu")
    check_float(model, f"fine-tuning {folder}")
    start = _start(args, folder, model.config, tokenizer)
    shape = check_start(start, args.context, args.trainable)
    with _data(args, start, shape.context_size) as data:
        plan = make_plan(start, shape, data, wish, room, say)
        config = plan.config.replace(out=str(args.out), resume=args.resume)
        begun = _begun(config, wish)
        _tell(start, plan, shaped(model, plan) if begun is None else None, room)
    if args.dry_run:
        say("dry run: nothing was written")
        return None
    return begun or config


def _check_out(args: Args) -> None:
    """
    Raises:
        ValueError: --out 里有别的东西，或已有一次训练而没有说接着做。
    """
    from app.training.config import DataConfig, TrainConfig
    from app.training.saving.resume import check_out

    data = DataConfig(folder=str(args.out / DATA))
    check_out(TrainConfig(out=str(args.out), resume=args.resume, data=data))


def _start(args: Args, folder: Path, config: GPT2Config, tokenizer: Tokenizer) -> Start:
    from app.finetuning.plan import Start

    if args.old_data is not None:
        if not (args.old_data / "val").is_dir():
            raise ValueError(
                f"--old-data {args.old_data} has no validation part, on which forgetting is "
                "measured: give a folder that `gpt2 prepare` wrote with one"
            )
        return Start(folder, config, tokenizer, args.old_data)
    old, why_not = _old_data(folder)
    return Start(folder, config, tokenizer, old, why_not)


def _old_data(folder: Path) -> tuple[Path | None, str]:
    """(模型自己训练时的数据, 没有的理由)。"""
    from app.cli.shared.runfile import load_config
    from app.cli.shared.trained import own_run_file
    from app.data.shards import META_FILE, TokenDataset
    from app.training.report.run_facts import read_facts

    run_file = own_run_file(folder)
    if run_file is None:
        return None, f"{folder} belongs to no run of ours; name its data with --old-data"
    data, facts = Path(load_config(str(run_file)).config.data.folder), read_facts(run_file.parent)
    if not (data / "val" / META_FILE).is_file():
        return None, f"the validation data of its run is not in {data}; name it with --old-data"
    found = TokenDataset.open(data / "val")
    if facts is not None and found.fingerprint not in facts.data[1].split():
        return None, f"{data} is not the data of its run any more; name that with --old-data"
    if found.kind == "preference":
        return None, f"{data} holds preferences, whose loss another objective cannot measure"
    return data, ""


@contextmanager
def _data(args: Args, start: Start, context: int) -> Iterator[Path]:
    """准备好的数据在哪里；刚写下的，若随后被拒绝，就不留下。Ctrl-C 则留着，下次接着做。"""
    from app.data.chat.template import find_template
    from app.data.shards import META_FILE
    from app.finetuning.raw import Raw, prepare_raw, remove_data

    given = Path(args.data)
    if (given / "train" / META_FILE).is_file():
        _check_unused(args)
        yield given
        return
    if not given.exists():
        raise ValueError(f"{given} does not exist: give a file, or a folder of text or records")
    raw = Raw(
        args.data, args.val, args.columns, args.chat, find_template(start.folder), context,
        cut=args.long == "cut-prompt",
    )  # fmt: skip
    home = tempfile.TemporaryDirectory() if args.dry_run else nullcontext(args.out)
    with home as name:
        out = Path(name) / DATA
        fresh = not out.exists()
        prepare_raw(raw, out, start.tokenizer, say)
        try:
            yield out
        except (ValueError, MemoryError):
            if fresh:
                remove_data(out)
            raise


def _check_unused(args: Args) -> None:
    """
    Raises:
        ValueError: 给了只在准备时用的选项，而数据已经准备好。
    """
    given = {
        "--chat": args.chat, "--columns": args.columns, "--val": args.val,
        "--long": None if args.long == "drop" else args.long,
    }  # fmt: skip
    for name, value in given.items():
        if value:
            raise ValueError(
                f"{name} {value}: {args.data} is prepared already, with its own: leave {name} out, "
                "or give the file it was made from"
            )


def _begun(config: TrainConfig, wish: Wish) -> TrainConfig | None:
    """RUN 里已有的这一次训练的设置，要接着做；没有则 None。

    Raises:
        ValueError: 那里的设置与这条命令的不同，点名两个值。
    """
    from app.cli.shared.runfile import load_config
    from app.training.config import flat
    from app.training.saving.resume import RUN_FILE

    file = Path(config.out) / RUN_FILE
    if config.resume == "none" or not file.is_file():
        return None
    found = load_config(str(file)).config
    # 微批是按此刻的内存选的，不改变结果：照当初的。
    free = {"resume", "out", "micro_batch"} - wish.given.keys()
    before, now = (dict(flat(one.to_dict())) for one in (found, config))
    for name, value in now.items():
        if name not in free and before.get(name) != value:
            raise ValueError(
                f"{file} has {name}={before.get(name)!r} but this command makes it {value!r}: "
                f"repeat the command it was begun with, or change it on purpose with gpt2 train "
                f"--config {file} --resume auto"
            )
    return found.replace(resume=config.resume)


def _tell(start: Start, plan: Plan, model: GPT2Model | None, room: Room) -> None:
    """model：去掉了要放掉的之后试走；None = 接着做，不必再量。"""
    from app.common.units import duration, size
    from app.finetuning.estimate import measure

    config, train = plan.config, plan.data.train
    shape = f"context {config.model.context_size:,}, vocabulary {config.model.vocab_size:,}"
    if len(plan.new):
        shape += f", {len(plan.new)} new tokens"
    scored = f"{train.n_scored:,} of {train.n_tokens:,} tokens scored"
    epochs = plan.data.feed.epoch(config.steps)
    there = "unknown" if room.available is None else size(room.available)
    table = [
        ("from", str(start.folder), shape),
        ("trained", f"{plan.said.trained:,} parameters", plan.said.what),
        ("frozen", f"{plan.said.frozen:,} parameters", ""),
        ("data", f"{len(train.document_starts):,} examples", f"{scored}; {config.data.folder}"),
        ("objective", config.objective.kind, f"peak lr {config.optim.lr:g}, falling to 0"),
        ("epochs", f"{epochs:.3g}", f"{config.steps:,} steps of {config.tokens_per_step:,} tokens"),
        ("validation", ", ".join(plan.data.val) or "none", "loss before, 10 times, and after"),
        ("memory", size(plan.needed), f"estimated; {there} available"),
    ]
    if model is not None:
        times = measure(model, config, plan.runtime, plan.data)
        each = f"{times.step:.3g} s a step, {times.validation:.3g} s a validation"
        table.append(("time", f"about {duration(times.whole(config))}", f"{each}, measured"))
    print_table(table)
    for note in plan.notes:
        say(f"note: {note}")
