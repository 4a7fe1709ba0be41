"""`gpt2 eval`：留出文本上的困惑度与每字节比特数，本地 jsonl 上的任务。结果在标准输出。"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from typing_extensions import Doc

from app.cli.shared.trained import Device, Trained, load_trained, own_data
from app.common.files import check_new, write_new
from app.common.tell import to_stderr

if TYPE_CHECKING:
    from app.data.tokenizers import Tokenizer
    from app.evaluation.perplexity import HeldOut, WindowScore
    from app.evaluation.tasks import ItemScore, Task
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

    model: Trained
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
    from app.evaluation.perplexity import check_stride
    from app.evaluation.tasks import load_task
    from app.training.saving.checkpoint import resolve_checkpoint

    _check(args)
    folder = resolve_checkpoint(args.model, tell=to_stderr)
    model, tokenizer = load_trained(str(folder), args.device)
    size = model.config.context_size
    stride = max(1, size // 2) if args.stride is None else args.stride
    check_stride(stride, size)
    job = _Job(
        folder,
        model,
        tokenizer,
        stride,
        args.batch_size,
        _held_out(args, folder, tokenizer),
        tuple(load_task(path, tokenizer, size) for path in args.task),
    )
    return _finish(args, job, _score(job))


def _check(args: Args) -> None:
    if args.data is not None and args.text is not None:
        raise ValueError(f"data={args.data} and text={args.text} are both given: leave one out")
    if args.batch_size < 1:
        raise ValueError(f"batch_size={args.batch_size} must be at least 1")
    if args.json is not None:
        check_new(args.json, "json")


@dataclass(frozen=True)
class _Job:
    """要做的事。"""

    folder: Path
    model: GPT2Model
    tokenizer: Tokenizer
    stride: int
    batch_size: int
    held: HeldOut | None
    tasks: tuple[Task, ...]


@dataclass
class _Done:
    """已得的结果：整批地接上去，所以何时被打断都前后一致。"""

    windows: list[WindowScore] = field(default_factory=list)
    items: list[list[ItemScore]] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0


def _held_out(args: Args, folder: Path, tokenizer: Tokenizer) -> HeldOut | None:
    from app.evaluation.perplexity import open_dataset, open_text

    if args.text is not None:
        return open_text(args.text, tokenizer)
    if args.data is not None:
        return open_dataset(args.data, tokenizer)
    return (
        None
        if args.task
        else open_dataset(own_data(folder, to_stderr, "--data, --text or --task"), tokenizer)
    )


def _score(job: _Job) -> _Done:
    """做到底，或做到 Ctrl-C 为止。"""
    from app.common.progress import count_tokens
    from app.evaluation.perplexity import score_windows
    from app.evaluation.tasks import score_items

    done, start = _Done(), time.perf_counter()
    options = {"stride": job.stride, "batch_size": job.batch_size}
    try:
        if job.held is not None:
            with count_tokens(job.held.name, job.held.source.n_tokens) as advance:
                for batch in score_windows(job.model, job.tokenizer, job.held.source, **options):
                    done.windows.extend(batch)
                    advance(sum(score.tokens for score in batch))
        for task in job.tasks:
            mine: list[ItemScore] = []
            done.items.append(mine)
            with count_tokens(str(task.path), task.tokens) as advance:
                for block in score_items(job.model, task.items, job.batch_size, advance):
                    mine.extend(block)
    except KeyboardInterrupt:
        done.interrupted = True
    done.seconds = time.perf_counter() - start
    return done


def _finish(args: Args, job: _Job, done: _Done) -> int:
    results = [_data_facts(job, done)] if done.windows else []
    begun = zip(job.tasks, done.items, strict=False)
    results += [_task_facts(task, scores) for task, scores in begun if scores]
    if done.interrupted:
        to_stderr("interrupted: what follows is partial, from what was done so far")
    _show(job, results)
    if args.json is not None:
        _write(args.json, _facts(args, job, done, results))
        print(f"json  {args.json}")
    return 130 if done.interrupted else 0


def _data_facts(job: _Job, done: _Done) -> dict[str, Any]:
    from app.evaluation.perplexity import count_windows, summarize

    assert job.held is not None
    found, context = summarize(done.windows), job.model.config.context_size
    total = job.held.source.n_tokens
    return {
        "kind": "perplexity",
        "name": job.held.name,
        "sha256": job.held.identity,
        "documents": job.held.documents,
        "complete": found.tokens == total,
        "done": found.tokens,
        "total": total,
        "context_size": context,
        "stride": job.stride,
        "windows": found.windows,
        "windows_total": count_windows(total, context, job.stride),
        "tokens": found.tokens,
        "separators": found.separators,
        "bytes": found.bytes,
        "nats": found.nats,
        "metrics": {name: metric._asdict() for name, metric in found.metrics().items()},
    }


def _task_facts(task: Task, scores: Sequence[ItemScore]) -> dict[str, Any]:
    from app.evaluation.tasks import summarize_task

    found = summarize_task(task, scores)
    return {
        "kind": task.kind,
        "name": str(task.path),
        "sha256": task.sha256,
        "complete": found.items == len(task.items),
        "done": found.items,
        "total": len(task.items),
        "cut": found.cut,
        "metrics": {name: metric._asdict() for name, metric in found.metrics.items()},
    }


def _facts(args: Args, job: _Job, done: _Done, results: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    from app.common.files import sha256_file
    from app.training.saving.state import versions

    return {
        "schema_version": _SCHEMA_VERSION,
        "partial": done.interrupted,
        "model": {
            "path": str(job.folder),
            "parameters": job.model.num_parameters(),
            "sha256": sha256_file(job.folder / "model.safetensors"),
            "tokenizer": job.tokenizer.fingerprint(),
            "config": job.model.config.to_dict(),
        },
        "device": str(job.model.device),
        "dtype": _dtype(job.model),
        "threads": torch.get_num_threads(),
        "batch_size": args.batch_size,
        "seconds": done.seconds,
        "versions": versions(),
        "results": results,
    }


def _show(job: _Job, results: list[dict[str, Any]]) -> None:
    config = job.model.config
    count = f"{job.model.num_parameters():,} parameters, context {config.context_size:,}"
    print(f"{job.folder}: {count}, {job.model.device}, {_dtype(job.model)}")
    names = [name for result in results for name in result["metrics"]]
    values = [_number(m["value"]) for result in results for m in result["metrics"].values()]
    wide, high = max(map(len, names), default=0), max(map(len, values), default=0)
    for result in results:
        print(f"\n{result['name']}: {_describe(result)}")
        for name, metric in result["metrics"].items():
            error = "" if metric["stderr"] is None else f"  ± {_number(metric['stderr'])}"
            print(f"  {name:<{wide}}  {_number(metric['value']):>{high}}{error}")


def _describe(result: dict[str, Any]) -> str:
    unit = "tokens" if result["kind"] == "perplexity" else "items"
    count = f"{result['done']:,} {unit}"
    if not result["complete"]:
        count = f"partial, the first {count} of {result['total']:,}"
    if result["kind"] == "perplexity":
        return (
            f"{count}, {result['bytes']:,} bytes, {result['windows']:,} windows, "
            f"stride {result['stride']:,}"
        )
    cut = f", {result['cut']:,} cut on the left to fit the context" if result["cut"] else ""
    return f"{result['kind']}, {count}{cut}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:,.4f}"


def _dtype(model: GPT2Model) -> str:
    return str(model.head_weight.dtype).removeprefix("torch.")


def _write(path: Path, facts: dict[str, Any]) -> None:
    """JSON 没有无穷大：写作 null。"""
    for result in facts["results"]:
        for metric in result["metrics"].values():
            if metric["value"] == math.inf:
                metric["value"] = None
    text = json.dumps(facts, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_new(path, text.encode("utf-8"))
