"""`gpt2 eval`：留出文本上的困惑度与每字节比特数，本地 jsonl 上的任务。结果在标准输出。"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from typing_extensions import Doc

from app.cli.shared.held_out import check_held_out, held_out
from app.cli.shared.trained import Device, Trained, TrainedName, load_trained
from app.common.files import check_new, write_new
from app.common.tell import to_stderr

if TYPE_CHECKING:
    from app.evaluation.evaluate import Outcome
    from app.models.transformer import GPT2Model

SUMMARY = "perplexity, bits per byte and jsonl tasks of a trained model"
EXAMPLES = """\
  gpt2 eval runs/mine
  gpt2 eval runs/mine/best --text book.txt --stride 64 --json book.json
  gpt2 eval my-model --task lambada.jsonl --task hellaswag.jsonl

jsonl: {"text": ...} asks for the last word; {"prompt": ..., "choices": [...], "answer": 0} is
multiple choice ("ctx", "endings" and "label" are read too)."""

_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Args:
    """评测的全部选项。"""

    model: TrainedName
    data: Annotated[
        Path | None,
        Doc(
            "prepared dataset: its val part is scored, or the part given (DATA/train). "
            "Without --data, --text and --task: the data of the run"
        ),
    ] = None
    text: Annotated[
        Path | None, Doc("text file to score, tokenized with the model's tokenizer; also jsonl")
    ] = None
    text_key: Annotated[
        str | None, Doc("key of the text in the jsonl (or parquet) given by --text; None = text")
    ] = None
    task: Annotated[
        tyro.conf.UseAppendAction[tuple[Path, ...]],
        Doc("jsonl file: last words or multiple choice, as its keys say; repeat for more"),
    ] = ()
    stride: Annotated[
        int | None,
        Doc(
            "tokens scored per window; each has at least context_size - stride before it. "
            "Smaller = slower, lower perplexity; None = context_size / 2"
        ),
    ] = None
    batch_size: Annotated[int, Doc("sequences computed at once; does not change results")] = 8
    json: Annotated[Path | None, Doc("write all facts there; an existing file is refused")] = None
    device: Device = "auto"


def run(args: Args) -> int:
    """
    Raises:
        ValueError: 不是检查点，数据或任务不合，选项的值不对；那时什么也没有算。
    """
    from app.common.progress import count_tokens
    from app.evaluation.evaluate import Evaluation
    from app.evaluation.perplexity import check_stride
    from app.evaluation.tasks import load_task

    _check(args)
    trained = load_trained(args.model, args.device)
    size = trained.model.config.context_size
    stride = max(1, size // 2) if args.stride is None else args.stride
    check_stride(stride, size)
    # 没有说给什么打分，才用训练自己的数据。
    scored = args.data is not None or args.text is not None or not args.task
    job = Evaluation(
        trained.model,
        trained.tokenizer,
        stride,
        args.batch_size,
        held_out(args, trained, "--data, --text or --task") if scored else None,
        tuple(load_task(path, trained.tokenizer, size) for path in args.task),
    )
    return _finish(args, trained, job.run(count_tokens))


def _check(args: Args) -> None:
    check_held_out(args)
    if args.json is not None:
        check_new(args.json, "json")


def _finish(args: Args, trained: Trained, done: Outcome) -> int:
    if done.interrupted:
        to_stderr("interrupted: what follows is partial, from what was done so far")
    # 先写文件：读标准输出的一方走了，要的文件也已经在。
    if args.json is not None:
        _write(args.json, _facts(args, trained, done))
    _show(trained, done)
    if args.json is not None:
        print(f"json  {args.json}")
    return 130 if done.interrupted else 0


def _facts(args: Args, trained: Trained, done: Outcome) -> dict[str, Any]:
    import torch

    from app.training.saving.state import versions

    model = trained.model
    return {
        "schema_version": _SCHEMA_VERSION,
        "partial": done.interrupted,
        "model": {
            "path": str(trained.folder),
            "parameters": model.num_parameters(),
            "sha256": trained.weights_sha256(),
            "tokenizer": trained.tokenizer.fingerprint(),
            "config": model.config.to_dict(),
        },
        "device": str(model.device),
        "dtype": _dtype(model),
        "threads": torch.get_num_threads(),
        "batch_size": args.batch_size,
        "seconds": done.seconds,
        "versions": versions(),
        "results": [score.to_dict() for score in done.scores],
    }


def _show(trained: Trained, done: Outcome) -> None:
    model = trained.model
    count = f"{model.num_parameters():,} parameters, context {model.config.context_size:,}"
    print(f"{trained.folder}: {count}, {model.device}, {_dtype(model)}")
    metrics = [(name, one) for score in done.scores for name, one in score.metrics.items()]
    wide = max((len(name) for name, _ in metrics), default=0)
    high = max((len(_number(one.value)) for _, one in metrics), default=0)
    for score in done.scores:
        print(f"\n{score.name}: {score.describe()}")
        for name, one in score.metrics.items():
            error = "" if one.stderr is None else f"  ± {_number(one.stderr)}"
            print(f"  {name:<{wide}}  {_number(one.value):>{high}}{error}")


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:,.4f}"


def _dtype(model: GPT2Model) -> str:
    from app.quantization.model import QuantizedModel

    if isinstance(model, QuantizedModel):
        return model.describe()
    return str(model.head_weight.dtype).removeprefix("torch.")


def _write(path: Path, facts: dict[str, Any]) -> None:
    # 文件名里可能有编不成 UTF-8 的字节（孤立代理项）：写成 JSON 的转义。
    text = json.dumps(facts, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_new(path, text.encode("utf-8", errors="backslashreplace"))
