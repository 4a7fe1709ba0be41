"""`gpt2 generate`：续写提示。标准输出只有文本，其余都在标准错误。"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from typing_extensions import Doc

from app.cli.shared.knobs import Knobs
from app.cli.shared.trained import Device, IdleThreads, Trained, TrainedName, load_trained
from app.common.escapes import unescape
from app.common.tell import to_stderr
from app.common.waiting import settle_waiting
from app.generation.config import Options
from app.generation.overflow import Overflow, usable

if TYPE_CHECKING:
    from app.data.tokenizers import Tokenizer
    from app.generation.row import Completion
    from app.models.transformer import GPT2Config

SUMMARY = "continue prompts with a trained model; text goes to stdout, everything else to stderr"
EXAMPLES = """\
  gpt2 generate runs/train --prompt "def main(" --seed 1
  gpt2 generate runs/train/best --prompt "ROMEO:" --num-samples 3 --temperature 0.7
  gpt2 generate runs/rope --prompt "It was" --max-new-tokens 5000 --overflow sinks
  gpt2 generate my-model --prompts-file prompts.txt --greedy --stop "." > answers.txt"""

RENAMED = {"--cache-dtype": "--kv-dtype"}

# 没说要多少时的长度；上下文放不下就到上下文为止，并说出来。
_DEFAULT_NEW = 200


@dataclass(frozen=True)
class Args(Knobs):
    """生成的全部选项。"""

    model: TrainedName
    prompt: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        Doc("text to continue; repeat for more. None at all = start from a document border"),
    ] = ()
    prompts_file: Annotated[
        Path | None, Doc("UTF-8 text file with one prompt per line; blank lines are skipped")
    ] = None
    max_new_tokens: Annotated[
        int | None, Doc("tokens to add; None = 200, or fewer where the context ends before")
    ] = None
    seed: Annotated[int, Doc("sample i of every prompt uses seed + i, whatever the batch")] = 0
    num_samples: Annotated[int, Doc("texts per prompt")] = 1
    stop: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        Doc(
            "end a text before this string; repeat for more. \\n is a line break, \\t a tab, "
            "\\uNNNN any character, \\\\ a backslash"
        ),
    ] = ()
    overflow: Annotated[
        Overflow,
        Doc(
            "past the context: error = refuse; slide = forget the older half and read the rest "
            "again; extend = go on counting positions (RoPE or none; constant memory where every "
            "layer has a window); sinks = keep the first 4 and the newer half of the keys, "
            "without end and without reading again (RoPE or none)"
        ),
    ] = "error"
    batch_size: Annotated[int, Doc("texts computed at once; does not change them")] = 16
    prefill_chunk: Annotated[
        int | None, Doc("prompt tokens per step; bounds the memory of long prompts")
    ] = None
    waiting: IdleThreads = "auto"
    device: Device = "auto"


def run(args: Args) -> int:
    """
    Raises:
        ValueError: 不是检查点、提示里有词表之外的字符、放不下，或选项的值不对。
    """
    _check(args)
    settle_waiting(args.waiting, serving=False)
    options = _options(args)
    prompts = _prompts(args)
    trained = load_trained(args.model, args.device)
    encoded = [_encode(trained.tokenizer, prompt) for prompt in prompts]
    options = replace(
        options,
        max_new_tokens=_new_tokens(args, max(map(len, encoded)), trained.model.config),
        stop_ids=tuple(trained.tokenizer.stop_ids),
    )
    jobs = [
        _Job(prompt, tokens, args.seed + sample, _label(args, len(prompts), i, sample))
        for i, (prompt, tokens) in enumerate(zip(prompts, encoded, strict=True))
        for sample in range(args.num_samples)
    ]
    _generate(trained, jobs, options)
    return 0


def _options(args: Args) -> Options:
    """装入模型之前就能定下的；其余的之后再填。"""
    return Options(
        max_new_tokens=_DEFAULT_NEW if args.max_new_tokens is None else args.max_new_tokens,
        sampling=args.sampling(),
        stop_strings=tuple(unescape(text, "stop") for text in args.stop),
        overflow=args.overflow,
        prefill_chunk=args.prefill_chunk,
        kv_dtype=args.kv_dtype,
        batch_size=args.batch_size,
    )


@dataclass(frozen=True)
class _Prompt:
    """一个提示；name 是报错时怎样称呼它：它从文件来时，是哪一行。"""

    text: str
    name: str


@dataclass(frozen=True)
class _Job:
    """一段要生成的文本。label 为空表示只有这一段：边生成边显示。"""

    prompt: _Prompt
    tokens: list[int]
    seed: int
    label: str


def _generate(trained: Trained, jobs: list[_Job], options: Options) -> None:
    from app.generation.generate import complete
    from app.generation.row import Callbacks

    start, count = time.perf_counter(), 0

    def counted(row: int, token: int) -> None:
        nonlocal count
        count += 1

    on_text, on_finish = _printers(jobs)
    complete(
        trained.model,
        [job.tokens for job in jobs],
        options,
        tokenizer=trained.tokenizer,
        seeds=[job.seed for job in jobs],
        names=[job.prompt.name for job in jobs],
        calls=Callbacks(on_token=counted, on_text=on_text, on_finish=on_finish),
    )
    seconds = time.perf_counter() - start
    _tell_rings(options, max(len(job.tokens) for job in jobs), trained.model.config)
    to_stderr(
        f"{count} tokens in {seconds:.2f} s: {count / seconds:.1f} tokens/s, prompts included"
    )


def _printers(
    jobs: list[_Job],
) -> tuple[Callable[[int, str], None] | None, Callable[[int, Completion], None]]:
    """一段文本：提示之后逐词元接上。多段：每段写完整的，带标签，谁先完谁先写。"""
    unwritten = [jobs[0].prompt.text]

    def whole(row: int, done: Completion) -> None:
        _write(f"{jobs[row].label}\n{jobs[row].prompt.text}{done.text}\n")

    def stream(row: int, piece: str) -> None:
        # 提示与第一段文本一起写：在那之前出错，标准输出上就什么也没有。
        _write(unwritten.pop() + piece if unwritten else piece)

    if jobs[0].label:
        return None, whole
    return stream, lambda row, done: stream(row, "\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _label(args: Args, prompts: int, prompt: int, sample: int) -> str:
    parts = [f"prompt {prompt + 1}"] if prompts > 1 else []
    parts += [f"sample {sample + 1}"] if args.num_samples > 1 else []
    return f"--- {', '.join(parts)} ---" if parts else ""


def _check(args: Args) -> None:
    if args.num_samples < 1:
        raise ValueError(f"num_samples={args.num_samples} must be at least 1")
    top = 2**63 - args.num_samples
    if not 0 <= args.seed < top:
        raise ValueError(f"seed={args.seed} must be between 0 and {top - 1}")


def _prompts(args: Args) -> list[_Prompt]:
    count = len(args.prompt)
    found = [
        _Prompt(text, f"prompt {number}" if count > 1 or args.prompts_file else "the prompt")
        for number, text in enumerate(args.prompt, start=1)
    ]
    if args.prompts_file is not None:
        found += _from_file(args.prompts_file)
    return found or [_Prompt("", "the prompt")]


def _from_file(path: Path) -> list[_Prompt]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason}") from None
    found = [
        _Prompt(line.removesuffix("\r"), f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise ValueError(f"{path} holds no prompt: write one per line")
    return found


def _encode(tokenizer: Tokenizer, prompt: _Prompt) -> list[int]:
    """空提示从文档分隔符开始：模型在那里学过文档怎样开头。"""
    try:
        return tokenizer.encode_prompt(prompt.text)
    except ValueError as error:
        raise ValueError(f"{prompt.name} cannot be encoded: {error}") from None


def _new_tokens(args: Args, longest: int, config: GPT2Config) -> int:
    if args.max_new_tokens is not None:
        return args.max_new_tokens
    room = config.context_size - longest
    if args.overflow != "error" or room >= _DEFAULT_NEW or room < 1:
        return _DEFAULT_NEW
    to_stderr(
        f"note: {room} new tokens, to the end of context_size={config.context_size}; "
        f"--overflow {' or '.join(usable(config))} goes on past it"
    )
    return room


def _tell_rings(options: Options, longest: int, config: GPT2Config) -> None:
    """内存不随长度增长的层。"""
    from app.generation.context import ring_keys

    fed = longest + options.max_new_tokens - 1
    for pattern, keys in ring_keys(config, fed, options.overflow).items():
        to_stderr(
            f"note: layers with {pattern} use a ring cache of {keys} keys, however long the text"
        )
