"""`gpt2 prepare`：文本变成词元分片。"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from typing_extensions import Doc

SUMMARY = (
    "Turn text files, folders or jsonl into token shards, OUT/train and OUT/val; without sources, "
    "the source code of this Python's standard library. Memory stays constant, and a killed run "
    "goes on when the same command is given again."
)
DEFAULT_OUT = Path("data/stdlib")
EXAMPLES = """\
  gpt2 prepare --out data/stdlib
  gpt2 prepare book.txt --out data/book --tokenizer chars
  gpt2 prepare corpus/ --suffixes .txt .md --out data/corpus --tokenizer bpe --vocab-size 8192
  gpt2 prepare web.jsonl --text-key content --out data/web --tokenizer gpt2 --vocab-files gpt2/"""


@dataclass(frozen=True)
class Args:
    """`gpt2 prepare` 的选项。"""

    sources: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        Doc("text files, folders, .jsonl or .parquet; none = Python's standard library"),
    ] = ()
    out: Annotated[
        Path | None,
        Doc("folder to write: new, or begun by the same command; data/stdlib without sources"),
    ] = None
    tokenizer: Annotated[
        Literal["bytes", "chars", "gpt2", "bpe"],
        Doc("bytes; chars of the text; GPT-2's BPE; or a BPE trained on the text"),
    ] = "bpe"
    vocab_size: Annotated[int | None, Doc("ids of the trained BPE (bpe only); None = 4096")] = None
    vocab_files: Annotated[
        Path | None,
        Doc("folder with vocab.bpe and encoder.json, or merges.txt and vocab.json (gpt2 only)"),
    ] = None
    text_key: Annotated[str, Doc("key (or parquet column) that holds the text")] = "text"
    suffixes: Annotated[
        tuple[str, ...], Doc("which files of a folder to read; none = common text suffixes")
    ] = ()
    val_fraction: Annotated[float, Doc("share held out for validation; 0 = none")] = 0.1
    shard_tokens: Annotated[int, Doc("tokens per shard file")] = 1 << 26


def run(args: Args) -> int | None:
    from app.data.corpus import stdlib_sources
    from app.data.prepare import TokenizerSpec, prepare
    from app.data.sources import TEXT_SUFFIXES, Sources

    spec = TokenizerSpec(args.tokenizer, args.vocab_size, args.vocab_files)
    if args.sources:
        if args.out is None:
            raise ValueError(f"{args.sources[0]}: say with --out where its tokens shall go")
        sources = Sources(
            args.sources, suffixes=args.suffixes or TEXT_SUFFIXES, text_key=args.text_key
        )
    else:
        if args.suffixes:
            raise ValueError(f"--suffixes {' '.join(args.suffixes)} needs a folder to read")
        sources = stdlib_sources()
    summary = prepare(
        sources,
        args.out or DEFAULT_OUT,
        spec,
        val_fraction=args.val_fraction,
        shard_tokens=args.shard_tokens,
    )
    for side, dataset in summary.sides.items():
        documents = len(dataset.document_starts)
        print(f"{side:<6}{documents:,} documents, {dataset.n_tokens:,} tokens")
    print(
        f"{summary.documents:,} documents, {summary.tokens:,} tokens, "
        f"{summary.bytes_per_token:.2f} bytes per token, "
        f"vocabulary {summary.sides['train'].vocab_size:,}, in {summary.folder}"
    )
    return 0
