"""`gpt2 prepare`：文本变成词元分片。"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from typing_extensions import Doc

from app.common.console import say

if TYPE_CHECKING:
    from app.data.chat.forms import Form
    from app.data.prepare import TokenizerSpec
    from app.data.shards import TokenDataset

SUMMARY = (
    "Turn text, conversations or preference pairs into token shards, OUT/train and OUT/val: every "
    "text file of a folder, jsonl, json, csv, tsv and parquet; without sources, the source code of "
    "this Python's standard library. "
    "What is not read and what is taken as plain text is printed. Memory stays constant, and a "
    "killed run goes on when the same command is given again."
)
DEFAULT_OUT = Path("data/stdlib")
DEFAULT_VAL_FRACTION = 0.1
KINDS = ("bytes", "chars", "gpt2", "bpe")
EXAMPLES = """\
  gpt2 prepare --out data/stdlib
  gpt2 prepare book.txt --out data/book --tokenizer chars
  gpt2 prepare code/ --suffixes .py .md --out data/code --tokenizer bpe --vocab-size 8192
  gpt2 prepare web.jsonl --text-key content --out data/web --tokenizer gpt2 --vocab-files gpt2/
  gpt2 prepare stories.txt --document-separator '<|endoftext|>' --out data/stories
  gpt2 prepare train.txt --val valid.txt --out data/more --tokenizer runs/mine
  gpt2 prepare questions.csv --columns prompt=question,completion=answer --out data/answers
  gpt2 prepare chats.jsonl --chat chatml --show 3 --tokenizer runs/mine --out data/chats
  gpt2 prepare nanoGPT/data/openwebtext --tokens uint16 --tokenizer models/gpt2 --out data/owt"""


@dataclass(frozen=True)
class Args:
    """`gpt2 prepare` 的选项。"""

    sources: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        Doc("text files, folders, .jsonl, .json, .csv, .tsv or .parquet; none = standard library"),
    ] = ()
    out: Annotated[
        Path | None,
        Doc("folder to write: new, or begun by the same command; data/stdlib without sources"),
    ] = None
    tokenizer: Annotated[
        str,
        Doc(
            "bytes; chars of the text; gpt2 (its BPE); bpe trained on the text; or a folder: the "
            "tokenizer of that run, model, imported model or prepared data"
        ),
    ] = "bpe"
    vocab_size: Annotated[int | None, Doc("ids of the trained BPE (bpe only); None = 4096")] = None
    vocab_files: Annotated[
        Path | None,
        Doc("folder with vocab.bpe and encoder.json, or merges.txt and vocab.json (gpt2 only)"),
    ] = None
    format: Annotated[
        Literal["auto", "text", "chat", "pairs", "preference"],
        Doc(
            "what a record holds: text; messages or conversations; prompt + completion or "
            "instruction + output; prompt + chosen + rejected; auto = by the keys of the first"
        ),
    ] = "auto"
    chat: Annotated[
        Literal["chatml", "alpaca", "plain"] | None,
        Doc("how turns are written; None = as the tokenizer's folder does, else by the form"),
    ] = None
    columns: Annotated[
        tuple[str, ...], Doc("rename keys or columns: text=body, or prompt=question,...")
    ] = ()
    context: Annotated[
        int | None, Doc("longest example in tokens; None = no limit here, training leaves them out")
    ] = None
    long: Annotated[
        Literal["drop", "cut-prompt"],
        Doc("examples longer than --context: leave out, or cut oldest turns (never an answer)"),
    ] = "drop"
    show: Annotated[int, Doc("print so many examples as tokens, those that are scored marked")] = 0
    special: Annotated[
        tuple[str, ...], Doc("special tokens to add, also with commas; text never produces them")
    ] = ()
    text_key: Annotated[
        str | None,
        Doc("key or column that holds the text; None = text. Needed for .json, .csv in a folder"),
    ] = None
    suffixes: Annotated[
        tuple[str, ...], Doc("which files of a folder to read; none = every text file")
    ] = ()
    document_per_line: Annotated[
        bool, Doc("each line of a text file is a document"), tyro.conf.arg(aliases=["--lines"])
    ] = False
    document_separator: Annotated[
        str | None, Doc(r"text between the documents of a text file; \n is a line end")
    ] = None
    val: Annotated[
        tuple[str, ...],
        Doc("files or folders to validate on, or the share to hold out; none = 0.1 is held out"),
    ] = ()
    val_fraction: Annotated[
        float | None, Doc("share held out for validation; 0 = none, None = 0.1")
    ] = None
    tokens: Annotated[
        Literal["uint16", "uint32"] | None,
        Doc("the source is ready tokens of this type: train.bin (and val.bin) of nanoGPT"),
    ] = None
    shard_tokens: Annotated[int, Doc("tokens per shard file")] = 1 << 26


def run(args: Args) -> int | None:
    args = _with_share(args)
    if args.val and args.val_fraction is not None:
        raise ValueError(
            f"--val {args.val[0]} is the validation text and --val-fraction {args.val_fraction} "
            "would hold out more: give one of them"
        )
    if "" in (*args.sources, *args.val, args.tokenizer):
        raise ValueError("one of the names given is empty: is a shell variable not set?")
    if args.sources and args.out is None:
        raise ValueError(f"{args.sources[0]}: say with --out where its tokens shall go")
    if args.show < 0:
        raise ValueError(f"--show {args.show} must not be negative")
    sides = _prepare(args)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    if args.show:
        from app.data.chat.show import shown

        for line in shown(sides["train"], args.show, colour):
            say(line)
    return 0


def _with_share(args: Args) -> Args:
    """`--val 0.1`：只有一个数，又没有这个名字的文件，就是留出的份额。"""
    if len(args.val) != 1 or Path(args.val[0]).exists():
        return args
    try:
        share = float(args.val[0])
    except ValueError:
        return args
    if args.val_fraction is not None:
        raise ValueError(f"--val {share} and --val-fraction {args.val_fraction}: give one of them")
    return replace(args, val=(), val_fraction=share)


def _prepare(args: Args) -> dict[str, TokenDataset]:
    from app.data.chat.forms import detect, parse_columns

    chat_flags = _chat_flags(args)
    if args.tokens is not None:
        if chat_flags or args.columns:
            raise ValueError(
                f"{(chat_flags or ['--columns'])[0]} is for records, but --tokens {args.tokens} "
                "reads ready tokens"
            )
        return _prepare_tokens(args)
    columns, text_flags = parse_columns(args.columns), _text_flags(args)
    form = None
    if args.sources and not text_flags and args.format != "text":
        form = detect(args.sources, args.suffixes, args.format, columns)
    if form is not None and form.kind != "text":
        return _prepare_examples(args, form, columns)
    if chat_flags:
        why = f"{text_flags[0]} is given" if text_flags else "these sources are text"
        raise ValueError(f"{chat_flags[0]} is for conversations, but {why}: leave one of them out")
    if columns.keys() - {"text"} or (columns and args.text_key):
        raise ValueError(
            f"--columns {' '.join(args.columns)}: of text, text alone can be renamed, once: write "
            "--columns text=NAME or --text-key NAME"
        )
    return _prepare_text(replace(args, text_key=columns.get("text", args.text_key)))


def _prepare_examples(args: Args, form: Form, columns: dict[str, str]) -> dict[str, TokenDataset]:
    from app.data.chat.prepare import ChatSpec, prepare_examples
    from app.data.chat.template import find_template
    from app.data.reading.sources import Reading, Sources

    reading = Reading(suffixes=args.suffixes, form=str(form))
    folder = _tokenizer_folder(args)
    known = None if folder is None else find_template(folder)
    sides = prepare_examples(
        Sources(args.sources, reading),
        args.out or DEFAULT_OUT,
        _tokenizer(args),
        ChatSpec(form, args.chat, columns, args.context, args.long, known),
        val=Sources(args.val, reading) if args.val else None,
        val_fraction=_fraction(args),
        shard_tokens=args.shard_tokens,
    )
    for side, data in sides.items():
        print(
            f"{side:<6}{len(data.document_starts):,} examples, {data.n_tokens:,} tokens, "
            f"{data.n_scored:,} scored ({data.n_scored / data.n_tokens:.1%})"
        )
    print(f"vocabulary {sides['train'].vocab_size:,}, in {args.out}")
    return sides


def _prepare_text(args: Args) -> dict[str, TokenDataset]:
    from app.data.prepare import prepare
    from app.data.reading.corpus import stdlib_sources
    from app.data.reading.sources import Reading, Sources

    reading = Reading(
        text_key=args.text_key,
        suffixes=args.suffixes,
        document_per_line=args.document_per_line,
        document_separator=_unescaped(args.document_separator),
    )
    if not args.sources and reading != Reading():
        used = " ".join(_reading_flags(args))
        raise ValueError(f"{used} needs a folder or file to read: name the sources")
    summary = prepare(
        Sources(args.sources, reading) if args.sources else stdlib_sources(),
        args.out or DEFAULT_OUT,
        _tokenizer(args),
        val=Sources(args.val, reading) if args.val else None,
        val_fraction=_fraction(args),
        shard_tokens=args.shard_tokens,
    )
    _print_sides(summary.sides)
    print(
        f"{summary.documents:,} documents, {summary.tokens:,} tokens, "
        f"{summary.bytes_per_token:.2f} bytes per token, "
        f"vocabulary {summary.sides['train'].vocab_size:,}, in {summary.folder}"
    )
    return summary.sides


def _prepare_tokens(args: Args) -> dict[str, TokenDataset]:
    from app.data.token_files import TokenFiles, prepare_tokens

    if flags := _reading_flags(args):
        raise ValueError(f"{flags[0]} is for text, but --tokens {args.tokens} reads ready tokens")
    if not args.sources or args.tokens is None:
        raise ValueError(
            f"--tokens {args.tokens} needs a folder with train.bin, or a file of tokens"
        )
    tokenizer = _tokenizer(args).ready()
    if tokenizer is None:
        raise ValueError(
            f"--tokenizer {args.tokenizer} would be made from text, but --tokens {args.tokens} "
            "reads ready ids: name the tokenizer that wrote them (gpt2, bytes or a folder)"
        )
    files = TokenFiles.find([*map(Path, args.sources)], [*map(Path, args.val)], args.tokens)
    if "val" in files.sides and args.val_fraction is not None:
        raise ValueError(
            f"{files.sides['val']} is the validation set, so --val-fraction {args.val_fraction} "
            "has no use: leave it out"
        )
    sides = prepare_tokens(
        files,
        args.out or DEFAULT_OUT,
        tokenizer,
        val_fraction=_fraction(args),
        shard_tokens=args.shard_tokens,
    )
    _print_sides(sides)
    print(f"vocabulary {tokenizer.vocab_size:,}, in {args.out}")
    return sides


def _print_sides(sides: dict[str, TokenDataset]) -> None:
    for side, dataset in sides.items():
        documents = len(dataset.document_starts)
        print(f"{side:<6}{documents:,} documents, {dataset.n_tokens:,} tokens")


def _fraction(args: Args) -> float:
    if args.val:
        return 0.0
    return DEFAULT_VAL_FRACTION if args.val_fraction is None else args.val_fraction


def _reading_flags(args: Args) -> list[str]:
    return [*_given({"--suffixes": " ".join(args.suffixes)}), *_text_flags(args)]


def _text_flags(args: Args) -> list[str]:
    """只对文本有意义的。"""
    return _given(
        {
            "--text-key": args.text_key,
            "--document-per-line": args.document_per_line,
            "--document-separator": args.document_separator,
        }
    )


def _chat_flags(args: Args) -> list[str]:
    """只对对话有意义的。"""
    return _given(
        {
            "--format": args.format if args.format not in ("auto", "text") else None,
            "--chat": args.chat,
            "--context": args.context,
            "--long": args.long if args.long != "drop" else None,
        }
    )


def _given(flags: dict[str, Any]) -> list[str]:
    return [name if value is True else f"{name} {value}" for name, value in flags.items() if value]


def _unescaped(separator: str | None) -> str | None:
    r"""外壳里打不出换行：`\n`、`\r`、`\t` 与 `\\` 按字面的意思换掉。"""
    if separator is None:
        return None
    parts = separator.split("\\\\")
    for written, meant in (("\\n", "\n"), ("\\r", "\r"), ("\\t", "\t")):
        parts = [part.replace(written, meant) for part in parts]
    return "\\".join(parts)


def _tokenizer(args: Args) -> TokenizerSpec:
    """名字，或一个文件夹里的。"""
    from app.data.prepare import TokenizerSpec
    from app.data.tokenizers import load_tokenizer

    special = tuple(name for text in args.special for name in text.split(",") if name)
    folder = _tokenizer_folder(args)
    if folder is None:
        return TokenizerSpec(args.tokenizer, args.vocab_size, args.vocab_files, special=special)
    tokenizer = load_tokenizer(folder)
    return TokenizerSpec(tokenizer.kind, args.vocab_size, args.vocab_files, tokenizer, special)


def _tokenizer_folder(args: Args) -> Path | None:
    """分词器、数据集、模型、训练文件夹（取它最新的检查点）；给的是名字就是 None。"""
    from app.data.tokenizers import META_FILE, TABLE_FILE

    if args.tokenizer in KINDS:
        return None
    folder = Path(args.tokenizer)
    if not folder.is_dir() and folder.name != "best":
        raise ValueError(
            f"--tokenizer {args.tokenizer} is neither one of {', '.join(KINDS)} nor a folder"
        )
    if (folder / "train" / META_FILE).is_file():
        return folder / "train"
    if (folder / META_FILE).is_file():
        return folder
    if any((folder / name).is_file() for name in (TABLE_FILE, "vocab.json", "vocab.bpe")):
        raise ValueError(
            f"--tokenizer {folder} holds a tokenizer of another maker: run `gpt2 import "
            f"{folder} --out MODEL` and give MODEL"
        )
    from app.training.saving.checkpoint import resolve_checkpoint

    return resolve_checkpoint(folder)
