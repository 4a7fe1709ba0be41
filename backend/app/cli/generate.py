"""`gpt2 generate`：续写提示。标准输出只有文本，其余都在标准错误。"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from typing_extensions import Doc

from app.cli.shared.trained import load_trained
from app.generation.config import SamplingConfig
from app.generation.overflow import Overflow, check_overflow, check_prompts, usable
from app.generation.stopping import StopText

if TYPE_CHECKING:
    from app.data.tokenizers import Tokenizer
    from app.generation.generate import Completion
    from app.models.transformer import GPT2Config, GPT2Model

SUMMARY = "continue prompts with a trained model; text goes to stdout, everything else to stderr"
EXAMPLES = """\
  gpt2 generate runs/train --prompt "def main(" --seed 1
  gpt2 generate runs/train/best --prompt "ROMEO:" --num-samples 3 --temperature 0.7
  gpt2 generate runs/rope --prompt "It was" --max-new-tokens 5000 --overflow sinks
  gpt2 generate my-model --prompts-file prompts.txt --greedy --stop "." > answers.txt"""

# 没说要多少时的长度；上下文放不下就到上下文为止，并说出来。
_DEFAULT_NEW = 200


@dataclass(frozen=True)
class Args:
    """生成的全部选项。"""

    model: Annotated[
        tyro.conf.Positional[str],
        Doc("run folder (newest checkpoint), RUN/best, a checkpoint or a saved model"),
    ]
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
    temperature: Annotated[float, Doc("0 = greedy; below 1 = safer, above 1 = wilder")] = 0.8
    top_k: Annotated[int | None, Doc("keep the k most likely tokens")] = None
    top_p: Annotated[
        float | None, Doc("keep the smallest set of tokens with this much probability")
    ] = 0.95
    min_p: Annotated[
        float | None, Doc("drop tokens below this fraction of the likeliest one's probability")
    ] = None
    repetition_penalty: Annotated[float, Doc("above 1 = fewer repetitions, 1 = off")] = 1.0
    greedy: Annotated[bool, Doc("always the likeliest token: temperature 0")] = False
    seed: Annotated[int, Doc("sample i of every prompt uses seed + i, whatever the batch")] = 0
    num_samples: Annotated[int, Doc("texts per prompt")] = 1
    stop: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        Doc("end a text before this string; repeat for more"),
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
    cache_dtype: Annotated[
        Literal["int8"] | None,
        Doc("int8 = smaller cache of keys and values, rounded; None = the model's own type"),
    ] = None
    batch_size: Annotated[int, Doc("texts computed at once; does not change them")] = 16
    prefill_chunk: Annotated[
        int | None, Doc("prompt tokens per step; bounds the memory of long prompts")
    ] = None
    device: Annotated[str, Doc("auto (cuda where there is one, else cpu), cpu, cuda, cuda:1")] = (
        "auto"
    )


def run(args: Args) -> int:
    """
    Raises:
        ValueError: 不是检查点、提示里有词表之外的字符、放不下，或选项的值不对。
    """
    sampling = SamplingConfig(
        temperature=0.0 if args.greedy else args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
    )
    _check(args)
    texts = _prompts(args)
    model, tokenizer = load_trained(args.model, args.device)
    prompts = [_encode(tokenizer, text, i, len(texts)) for i, text in enumerate(texts)]
    check_overflow(args.overflow, model.config)
    longest = max(map(len, prompts))
    new = _new_tokens(args, longest, model.config)
    check_prompts(prompts, tokenizer.vocab_size, model.config, new, args.overflow)
    _tell_rings(args, longest + new - 1, model.config)
    jobs = [
        _Job(texts[i], prompts[i], args.seed + sample, _label(args, texts, i, sample))
        for i in range(len(texts))
        for sample in range(args.num_samples)
    ]
    _generate(args, model, tokenizer, sampling, jobs, new)
    return 0


@dataclass(frozen=True)
class _Job:
    """一段要生成的文本。label 为空表示只有这一段：边生成边显示。"""

    text: str
    prompt: list[int]
    seed: int
    label: str


def _generate(
    args: Args,
    model: GPT2Model,
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    jobs: list[_Job],
    new: int,
) -> None:
    from app.generation.generate import complete

    start, count = time.perf_counter(), 0

    def counted(row: int, token: int) -> None:
        nonlocal count
        count += 1

    for at in range(0, len(jobs), args.batch_size):
        batch = jobs[at : at + args.batch_size]
        on_text, on_finish = _printers(batch)
        complete(
            model,
            [job.prompt for job in batch],
            max_new_tokens=new,
            sampling=sampling,
            seeds=[job.seed for job in batch],
            stop_ids=tokenizer.stop_ids,
            stop_strings=args.stop,
            tokenizer=tokenizer,
            overflow=args.overflow,
            prefill_chunk=args.prefill_chunk,
            cache_quantize=args.cache_dtype,
            on_token=counted,
            on_text=on_text,
            on_finish=on_finish,
        )
    seconds = time.perf_counter() - start
    print(
        f"{count} tokens in {seconds:.2f} s: {count / seconds:.1f} tokens/s, prompts included",
        file=sys.stderr,
    )


def _printers(
    batch: list[_Job],
) -> tuple[Callable[[int, str], None] | None, Callable[[int, Completion], None]]:
    """一段文本：提示之后逐词元接上。多段：每段写完整的，带标签，谁先完谁先写。"""
    unwritten = [batch[0].text]

    def whole(row: int, done: Completion) -> None:
        _write(f"{batch[row].label}\n{batch[row].text}{done.text}\n")

    def stream(row: int, piece: str) -> None:
        # 提示与第一段文本一起写：在那之前出错，标准输出上就什么也没有。
        _write(unwritten.pop() + piece if unwritten else piece)

    if batch[0].label:
        return None, whole
    return stream, lambda row, done: stream(row, "\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _label(args: Args, texts: list[str], prompt: int, sample: int) -> str:
    parts = [f"prompt {prompt + 1}"] if len(texts) > 1 else []
    parts += [f"sample {sample + 1}"] if args.num_samples > 1 else []
    return f"--- {', '.join(parts)} ---" if parts else ""


def _check(args: Args) -> None:
    StopText(args.stop)
    for name in ("num_samples", "batch_size", "max_new_tokens", "prefill_chunk"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    top = 2**63 - args.num_samples
    if not 0 <= args.seed < top:
        raise ValueError(f"seed={args.seed} must be between 0 and {top - 1}")


def _prompts(args: Args) -> list[str]:
    texts = list(args.prompt)
    if args.prompts_file is not None:
        try:
            lines = args.prompts_file.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{args.prompts_file} is not UTF-8 text: {error.reason}") from None
        lines = [line.removesuffix("\r") for line in lines if line.strip()]
        if not lines:
            raise ValueError(f"{args.prompts_file} holds no prompt: write one per line")
        texts += lines
    return texts or [""]


def _encode(tokenizer: Tokenizer, text: str, index: int, count: int) -> list[int]:
    """空提示从文档分隔符开始：模型在那里学过文档怎样开头。"""
    try:
        return tokenizer.encode_prompt(text)
    except ValueError as error:
        where = f"prompt {index + 1}" if count > 1 else "the prompt"
        raise ValueError(f"{where} cannot be encoded: {error}") from None


def _new_tokens(args: Args, longest: int, config: GPT2Config) -> int:
    if args.max_new_tokens is not None:
        return args.max_new_tokens
    room = config.context_size - longest
    if args.overflow != "error" or room >= _DEFAULT_NEW or room < 1:
        return _DEFAULT_NEW
    print(
        f"note: {room} new tokens, to the end of context_size={config.context_size}; "
        f"--overflow {' or '.join(usable(config))} goes on past it",
        file=sys.stderr,
    )
    return room


def _tell_rings(args: Args, longest: int, config: GPT2Config) -> None:
    """内存不随长度增长的层。"""
    from app.generation.context import ring_keys

    for pattern, keys in ring_keys(config, longest, args.overflow).items():
        print(
            f"note: layers with {pattern} use a ring cache of {keys} keys, however long the text",
            file=sys.stderr,
        )
