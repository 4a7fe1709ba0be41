"""`gpt2 show`：画注意力图、图样与专家的分派。第一个词说画什么，其余的选项各有各的。"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from typing_extensions import Doc

from app.cli.shared.command_line import Usage, parse_options
from app.cli.shared.trained import load_trained, pick_device
from app.common.tell import to_stderr
from app.models.transformer.config import GPT2Config
from app.models.transformer.settings.fields import nearest

if TYPE_CHECKING:
    import numpy as np

    from app.data.tokenizers import Tokenizer
    from app.models.transformer import GPT2Model

SUMMARY = "draw attention maps, attention patterns and which expert took each token"
EXAMPLES = """\
  gpt2 show pattern "local(8) | global(2)" "strided(8)" --tokens 32
  gpt2 show attention --text "To be, or not to be" --run runs/train --layer 0 --layer 3
  gpt2 show attention --text "abc abc" --model.attention-pattern "sinks(1, 4)" --out sinks.png
  gpt2 show heads --run runs/induction
  gpt2 show routing --run runs/experts --text "for i in range(10): print(i)" """

KINDS = {
    "heads": "what each head does on repeated random tokens, over a run's checkpoints",
    "attention": "the attention maps of a text, layer by layer, as a PNG",
    "routing": "which expert took each token of a text, per layer, as a PNG and as text",
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


@dataclass(frozen=True, kw_only=True)
class RoutingArgs:
    """`gpt2 show routing` 的选项。"""

    text: Annotated[str, Doc("the text whose tokens are routed")]
    run: Annotated[str, Doc("run folder, RUN/best, a checkpoint or a saved model, with experts")]
    layer: Annotated[
        tyro.conf.UseAppendAction[tuple[int, ...]],
        Doc("MoE layer to draw; repeat; none = all of them"),
    ] = ()
    tokens: Annotated[int, Doc("draw at most the first so many tokens of the text")] = 64
    out: Annotated[Path, Doc("PNG file to write; never overwritten")] = Path("routing.png")
    device: Annotated[str, Doc("auto (cuda where there is one, else cpu), cpu, cuda")] = "auto"


@dataclass(frozen=True, kw_only=True)
class HeadsArgs:
    """`gpt2 show heads` 的选项。"""

    run: Annotated[
        str, Doc("run folder (every checkpoint in it), RUN/best, a checkpoint or a saved model")
    ]
    out: Annotated[Path, Doc("PNG file to write; never overwritten")] = Path("heads.png")
    device: Annotated[str, Doc("auto (cuda where there is one, else cpu), cpu, cuda")] = "auto"


@dataclass(frozen=True)
class Listing:
    """没有说画什么：列出能画的。"""


Args = AttentionArgs | PatternArgs | RoutingArgs | HeadsArgs | Listing
_KINDS: dict[str, type[AttentionArgs | PatternArgs | RoutingArgs | HeadsArgs]] = {
    "heads": HeadsArgs,
    "attention": AttentionArgs,
    "routing": RoutingArgs,
    "pattern": PatternArgs,
}


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
    examples = "\n".join(line for line in EXAMPLES.splitlines() if f"show {kind}" in line)
    usage = Usage(f"show {kind}", f"Draw {KINDS[kind]}.", examples)
    return parse_options(_KINDS[kind], rest, usage)


def run(args: Args) -> None:
    """
    Raises:
        ValueError: 图样写错、文字为空、没有这一层或这个头，或 --out 已经存在。
    """
    match args:
        case AttentionArgs():
            _show_attention(args)
        case RoutingArgs():
            _show_routing(args)
        case PatternArgs():
            _show_patterns(args)
        case HeadsArgs():
            _show_heads(args)
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
    from app.models.transformer.visibility.pattern_fit import blind_query
    from app.models.transformer.visibility.pattern_text import parse as parse_pattern
    from app.viz.pattern import MOST_PATTERNS, describe_coverage, pattern_figure
    from app.viz.picture import check_picture, write_picture

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
    check_picture(args.out)

    from app.models.transformer.visibility.coverage import as_text, coverage

    # 先写文件：读标准输出的一方走了，要的图也已经在。
    write_picture(pattern_figure(patterns, args.tokens), args.out)
    for pattern in patterns:
        print(f"{pattern}, {args.tokens} tokens: ", end="")
        print(describe_coverage(coverage(pattern, args.tokens)))
        if args.tokens <= pattern.solid and str(pattern) != "causal":
            to_stderr(f"note: {pattern} equals causal up to {pattern.solid} tokens: raise --tokens")
        if args.tokens <= _TEXT_TOKENS:
            print(as_text(pattern, args.tokens))
    print(f"picture  {args.out}")


def _show_attention(args: AttentionArgs) -> None:
    from app.viz.picture import check_picture

    _check_text(args)
    if args.run is not None and args.model != _DEMO:
        raise ValueError(
            f"run={args.run} brings its own model, but --model options were given too: "
            "leave one of them out"
        )
    check_picture(args.out)
    model, tokenizer = (
        _random(args) if args.run is None else load_trained(args.run, args.device)[:2]
    )
    layers = _chosen("layer", args.layer, model.config.n_layer)
    heads = _chosen("head", args.head, model.config.n_head)
    if not args.head and len(layers) * (2 + len(heads)) > _FEW_PANELS:
        heads = ()
        to_stderr(f"note: the mean of {model.config.n_head} heads; --head draws single ones")
    _draw(args, model, tokenizer, layers, heads)


def _check_text(args: AttentionArgs | RoutingArgs) -> None:
    if not args.text:
        raise ValueError("text='' is empty: give some words with --text")
    _between("tokens", args.tokens, 1, _MOST_TOKENS)


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
    to_stderr("note: no --run given: random weights, untrained; only the pattern means anything")
    return GPT2Model(args.model).eval().to(pick_device(args.device)), tokenizer


def _draw(
    args: AttentionArgs,
    model: GPT2Model,
    tokenizer: Tokenizer,
    layers: tuple[int, ...],
    heads: tuple[int, ...],
) -> None:
    from app.inspection.attention import as_arrays
    from app.inspection.slices import whole
    from app.inspection.walk import walk
    from app.viz.attention import attention_figure
    from app.viz.picture import token_label, write_picture

    ids = _ids(args, model, tokenizer)
    maps = as_arrays(whole(walk(model, ids, maps=layers)).maps)
    figure = attention_figure(
        {layer: maps[layer] for layer in layers},
        model.config.patterns,
        [token_label(tokenizer.token_bytes(token)) for token in ids],
        heads,
        f"{args.run or 'random weights'}: attention over {len(ids)} tokens",
    )
    write_picture(figure, args.out)
    print(f"picture  {args.out}")


def _ids(args: AttentionArgs | RoutingArgs, model: GPT2Model, tokenizer: Tokenizer) -> list[int]:
    """文字的开头几个词元。"""
    ids = tokenizer.encode(args.text)
    if not ids:
        raise ValueError(f"text={args.text!r} has no tokens: give some words with --text")
    limit = min(args.tokens, model.config.context_size)
    if len(ids) > limit:
        reason = f"--tokens {limit}" if limit == args.tokens else f"context_size={limit}"
        to_stderr(f"note: the first {limit} of {len(ids)} tokens are drawn ({reason})")
    return ids[:limit]


def _show_routing(args: RoutingArgs) -> None:
    from app.inspection.look import routing_arrays
    from app.inspection.slices import whole
    from app.inspection.walk import walk
    from app.viz.picture import check_picture, token_label, write_picture
    from app.viz.routing import routing_figure

    _check_text(args)
    check_picture(args.out)
    model, tokenizer, _ = load_trained(args.run, args.device)
    config = model.config
    layers = _moe_layers(args, config)
    ids = _ids(args, model, tokenizer)
    arrays = routing_arrays(whole(walk(model, ids, routing=layers)))
    routing = {layer: arrays[layer] for layer in layers}
    raw = [tokenizer.token_bytes(token) for token in ids]
    title = (
        f"{args.run}: {config.moe_num_experts} experts, top-{config.moe_top_k}, {len(ids)} tokens"
    )
    figure = routing_figure(
        routing, [token_label(one) for one in raw], config.moe_num_experts, title
    )
    write_picture(figure, args.out)
    _print_routing(routing, [token_label(one, 40) for one in raw], config.moe_num_experts)
    print(f"picture  {args.out}")


def _show_heads(args: HeadsArgs) -> None:
    from app.cli.shared.head_scores import head_lines, scored_checkpoints
    from app.viz.heads import heads_figure
    from app.viz.picture import check_picture, write_picture

    check_picture(args.out)
    scores = scored_checkpoints(args.run, args.device)
    write_picture(heads_figure(scores, f"{args.run}: heads on repeated random tokens"), args.out)
    for line in head_lines(scores):
        print(line)
    print(f"picture  {args.out}")


def _moe_layers(args: RoutingArgs, config: GPT2Config) -> tuple[int, ...]:
    if not config.moe_layers:
        raise ValueError(
            f"run={args.run} has moe_num_experts=0: no token is routed; gpt2 upcycle makes experts"
        )
    for layer in args.layer:
        if layer not in config.moe_layers:
            raise ValueError(
                f"layer={layer} has no experts: the MoE layers are "
                f"{', '.join(map(str, config.moe_layers))}"
            )
    return tuple(dict.fromkeys(args.layer)) or config.moe_layers


def _print_routing(
    routing: dict[int, tuple[np.ndarray, np.ndarray]], pieces: list[str], experts: int
) -> None:
    """终端上色；不是终端、或设了 NO_COLOR（no-color.org），就写专家的编号。"""
    import os

    from rich.console import Console
    from rich.text import Text

    from app.viz.routing import coloured_text, legend, plain_text

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    # soft_wrap：不插入换行，词元照原样相接。
    console = Console(highlight=False, soft_wrap=True)
    if colour:
        console.print(legend(experts), Text("  (the one with the largest weight)"))
    else:
        print("token[experts, the largest weight first]")
    for layer, (chosen, weight) in routing.items():
        if colour:
            console.print(f"layer {layer}: ", coloured_text(pieces, chosen, experts, weight))
        else:
            print(f"layer {layer}: {plain_text(pieces, chosen, weight, experts)}")


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
