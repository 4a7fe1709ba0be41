"""`gpt2 show`：画注意力图与图样。第一个词说画什么，其余的选项各有各的。"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from typing_extensions import Doc

from app.cli.trained import load_trained, pick_device
from app.models.transformer.config import GPT2Config
from app.models.transformer.validate import nearest

if TYPE_CHECKING:
    from app.data.tokenizers import Tokenizer
    from app.models.transformer import GPT2Model

SUMMARY = "draw attention maps and attention patterns"
EXAMPLES = """\
  gpt2 show pattern "local(8) | global(2)" "strided(8)" --tokens 32
  gpt2 show attention --text "To be, or not to be" --run runs/train --layer 0 --layer 3
  gpt2 show attention --text "abc abc" --model.attention-pattern "sinks(1, 4)" --out sinks.png"""

KINDS = {
    "attention": "the attention maps of a text, layer by layer, as a PNG",
    "pattern": "which keys each query sees under one or several patterns, as a PNG",
}

# 随手看一看用的模型：小，四个头各画一格。
_DEMO = GPT2Config(vocab_size=257, context_size=256, n_layer=2, n_head=4, n_embed=64, dropout=0.0)
# 不点名时，一共不多于这些格才连每个头一起画：再多就看不过来。
_FEW_PANELS = 12
# 图样的图一个像素一对，再大就看不清，也占不起内存。
_MOST_TOKENS = 2048
_TEXT_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class AttentionArgs:
    """`gpt2 show attention` 的选项。"""

    text: Annotated[str, Doc("the text whose tokens attend to each other")]
    run: Annotated[
        str | None,
        Doc("run folder, RUN/best, a checkpoint or a saved model; None = random weights"),
    ] = None
    layer: Annotated[
        tyro.conf.UseAppendAction[tuple[int, ...]], Doc("layer to draw; repeat; none = all")
    ] = ()
    head: Annotated[
        tyro.conf.UseAppendAction[tuple[int, ...]],
        Doc("head with a panel of its own; repeat; none = all where that is few panels"),
    ] = ()
    tokens: Annotated[int, Doc("draw at most the first so many tokens of the text")] = 64
    out: Annotated[Path, Doc("PNG file to write; never overwritten")] = Path("attention.png")
    device: Annotated[str, Doc("auto (cuda where there is one, else cpu), cpu, cuda")] = "auto"
    seed: Annotated[int, Doc("seed of the random weights, without --run")] = 0
    model: Annotated[GPT2Config, Doc("shape of the random model, without --run")] = field(
        default_factory=lambda: _DEMO
    )


@dataclass(frozen=True)
class PatternArgs:
    """`gpt2 show pattern` 的选项。"""

    patterns: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        Doc("patterns, e.g. causal 'local(8) | global(2)' 'strided(8)'"),
    ]
    tokens: Annotated[int, Doc("queries and keys to draw; up to 32 are printed as well")] = 64
    out: Annotated[Path, Doc("PNG file to write; never overwritten")] = Path("pattern.png")


@dataclass(frozen=True)
class Listing:
    """没有说画什么：列出能画的。"""


Args = AttentionArgs | PatternArgs | Listing


def parse(argv: Sequence[str]) -> Args:
    """
    Raises:
        ValueError: 没有这种图；给出最近的名字。
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        return Listing()
    kind, rest = argv[0], list(argv[1:])
    if kind not in KINDS:
        raise ValueError(f"gpt2 show cannot draw {kind!r}{nearest(kind, KINDS)}")
    chosen: type[AttentionArgs] | type[PatternArgs]
    chosen = AttentionArgs if kind == "attention" else PatternArgs
    examples = "\n".join(line for line in EXAMPLES.splitlines() if f"show {kind}" in line)
    return tyro.cli(
        chosen,
        prog=f"gpt2 show {kind}",
        args=rest,
        description=f"Draw {KINDS[kind]}.\n\nexamples:\n{examples}",
        config=(tyro.conf.HelptextFromCommentsOff,),
    )


def run(args: Args) -> None:
    """
    Raises:
        ValueError: 图样写错、文字为空、没有这一层或这个头，或 --out 已经存在。
    """
    match args:
        case AttentionArgs():
            _show_attention(args)
        case PatternArgs():
            _show_patterns(args)
        case Listing():
            print(_overview())


def _overview() -> str:
    width = max(map(len, KINDS)) + 2
    lines = [f"  {name:<{width}}{text}" for name, text in KINDS.items()]
    return "\n".join(
        ["usage: gpt2 show KIND [OPTIONS]", "", "kinds:", *lines, "", "examples:", EXAMPLES, ""]
        + ["gpt2 show KIND --help"]
    )


def _show_patterns(args: PatternArgs) -> None:
    from app.models.transformer.pattern_checks import blind_query
    from app.models.transformer.pattern_text import parse as parse_pattern
    from app.viz.pattern import MOST_PATTERNS, describe_coverage, pattern_figure
    from app.viz.picture import check_out, write_picture

    _between("tokens", args.tokens, 1, _MOST_TOKENS)
    if not 1 <= len(args.patterns) <= MOST_PATTERNS:
        raise ValueError(
            f"{len(args.patterns)} patterns were given: give 1 to {MOST_PATTERNS}, "
            "each in quotes, e.g. 'local(8) | global(2)'"
        )
    patterns = [parse_pattern(text) for text in args.patterns]
    for pattern in patterns:
        blind = blind_query(pattern, args.tokens)
        if blind is not None:
            raise ValueError(
                f"the query at position {blind} sees no key under {pattern}: "
                "add '| local(1)', with which each sees itself"
            )
    check_out(args.out)

    from app.evaluation.coverage import as_text, coverage

    for pattern in patterns:
        print(f"{pattern}, {args.tokens} tokens: ", end="")
        print(describe_coverage(coverage(pattern, args.tokens)))
        if args.tokens <= pattern.solid and str(pattern) != "causal":
            _tell(f"note: {pattern} equals causal up to {pattern.solid} tokens: raise --tokens")
        if args.tokens <= _TEXT_TOKENS:
            print(as_text(pattern, args.tokens))
    write_picture(pattern_figure(patterns, args.tokens), args.out)
    print(f"picture  {args.out}")


def _show_attention(args: AttentionArgs) -> None:
    from app.viz.picture import check_out

    if not args.text:
        raise ValueError("text='' is empty: give some words with --text")
    _between("tokens", args.tokens, 1, _MOST_TOKENS)
    if args.run is not None and args.model != _DEMO:
        raise ValueError(
            f"run={args.run} brings its own model, but --model options were given too: "
            "leave one of them out"
        )
    check_out(args.out)
    model, tokenizer = _random(args) if args.run is None else load_trained(args.run, args.device)
    layers = _chosen("layer", args.layer, model.config.n_layer)
    heads = _chosen("head", args.head, model.config.n_head)
    if not args.head and len(layers) * (2 + len(heads)) > _FEW_PANELS:
        heads = ()
        _tell(f"note: the mean of {model.config.n_head} heads; --head draws single ones")
    _draw(args, model, tokenizer, layers, heads)


def _random(args: AttentionArgs) -> tuple[GPT2Model, Tokenizer]:
    import torch

    from app.data.tokenizers import ByteTokenizer
    from app.models.transformer import GPT2Model

    tokenizer = ByteTokenizer()
    if args.model.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size={args.model.vocab_size} is less than the {tokenizer.vocab_size} "
            f"ids of single bytes: use --model.vocab-size {tokenizer.vocab_size} or more"
        )
    torch.manual_seed(args.seed)
    _tell("note: no --run given: random weights, untrained; only the pattern means anything")
    return GPT2Model(args.model).eval().to(pick_device(args.device)), tokenizer


def _draw(
    args: AttentionArgs,
    model: GPT2Model,
    tokenizer: Tokenizer,
    layers: tuple[int, ...],
    heads: tuple[int, ...],
) -> None:
    import torch

    from app.viz.attention import attention_figure
    from app.viz.picture import token_label, write_picture

    ids = tokenizer.encode(args.text)
    if not ids:
        raise ValueError(f"text={args.text!r} has no tokens: give some words with --text")
    limit = min(args.tokens, model.config.context_size)
    if len(ids) > limit:
        reason = f"--tokens {limit}" if limit == args.tokens else f"context_size={limit}"
        _tell(f"note: the first {limit} of {len(ids)} tokens are drawn ({reason})")
    ids = ids[:limit]
    with torch.inference_mode():
        found = model(
            torch.tensor([ids], device=model.device), return_attention=layers, logits_to_keep=1
        )["attentions"]
    figure = attention_figure(
        {layer: found[layer][0].float().cpu().numpy() for layer in layers},
        model.config.patterns,
        [token_label(tokenizer.token_bytes(token)) for token in ids],
        heads,
        f"{args.run or 'random weights'}: attention over {len(ids)} tokens",
    )
    write_picture(figure, args.out)
    print(f"picture  {args.out}")


def _chosen(name: str, asked: tuple[int, ...], count: int) -> tuple[int, ...]:
    for index in asked:
        if not 0 <= index < count:
            raise ValueError(
                f"{name}={index} is not in this model: {name}s go from 0 to {count - 1}"
            )
    return tuple(dict.fromkeys(asked)) or tuple(range(count))


def _between(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}={value} must be from {low} to {high}")


def _tell(text: str) -> None:
    print(text, file=sys.stderr)
