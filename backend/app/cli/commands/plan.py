"""`gpt2 plan`：先说会跑什么：参数、运算量、内存、时间、图样、后端与理由；放不下的拒绝。"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typing_extensions import Doc

from app.cli.shared.command_line import Usage
from app.cli.shared.runfile import (
    RunArgs,
    fit_vocabulary,
    load_model_config,
    names_vocabulary,
    parse_run,
    start_shape,
)
from app.cli.shared.tables import Table, print_table
from app.common.tell import to_stderr
from app.common.units import size
from app.models.transformer.config import GPT2Config
from app.training.config import TrainConfig

if TYPE_CHECKING:
    from app.models.transformer.backends.choose import Choice
    from app.planning.sizes import CacheSize
    from app.planning.tuned import Beside
    from app.training.machine.runtime import Runtime

SUMMARY = (
    "what `gpt2 train` would run: parameters, compute, memory, attention backends and why; "
    "refuses what does not fit. Allocates nothing, unless --probe measures time and memory."
)
EXAMPLES = """\
  gpt2 plan --config recipes/gpt2-small.yaml --micro-batch 1
  gpt2 plan --config quickstart --probe
  gpt2 plan --config runs/train/best/config.json --length 4096
  gpt2 plan --config gpt2-small --parallel.shard 8 --ranks 64 --batch-size 512 --bandwidth 25
  gpt2 plan --model.attention-pattern "local(256) | global(16)" --model.position rope"""

# 长文的例子：窗口与整个上下文的缓存在这里差得最清楚。
_LONG = 100_000
_MOST_RANKS = 1024


@dataclass(frozen=True, kw_only=True)
class Args(RunArgs):
    """训练的一切设置（把 `gpt2 train` 换成 `gpt2 plan` 就能先看一眼），外加要看的长度与试跑。"""

    config: Annotated[
        str | None,
        Doc("config.json of a model, or a run file (path, or name in recipes/); flags override it"),
    ] = None
    length: Annotated[
        int | None, Doc("tokens at once in the attention and cache tables; None = context_size")
    ] = None
    ranks: Annotated[
        int | None,
        Doc("plan for this many ranks, up to 1,024, without having them; see --parallel.shard"),
    ] = None
    bandwidth: Annotated[
        float | None, Doc("with --ranks: GB/s that a rank sends, for the time of a step's traffic")
    ] = None
    probe: Annotated[
        bool, Doc("train a few steps of a model with few layers and extrapolate time and memory")
    ] = False


def parse(argv: Sequence[str]) -> Args:
    """没有写明词表大小时，与训练一样取数据集的；没有运行文件则用默认的大小。

    有 init_from 时，没有写明的形状取自那里。

    Raises:
        ValueError: 文件找不到或读不懂。
    """
    args = parse_run(Args, argv, Usage("plan", SUMMARY, EXAMPLES), load_model_config)
    if args.train.init_from is not None:
        return start_shape(args, argv)
    if args.file is None or names_vocabulary(args, argv):
        return args
    folder = Path(args.train.data.folder)
    if not (folder / "train").is_dir():
        to_stderr(
            f"note: vocabulary {args.train.model.vocab_size} for now: training takes that of the "
            f"data, and {folder} does not exist yet"
        )
    return fit_vocabulary(args)


def run(args: Args) -> None:
    """
    Raises:
        ValueError: 长度放不下，没有这个设备，点名的后端做不了训练，或内存不够。
    """
    from app.cli.shared.estimates import show_training
    from app.training.machine.runtime import choose_runtime
    from app.training.saving.tuned import check_tune

    config = _with_steps(args.train)
    check_tune(config)
    shape = config.model
    length = shape.context_size if args.length is None else args.length
    if length < 1:
        raise ValueError(f"length={length} must be at least 1")
    if shape.position == "learned" and length > shape.context_size:
        raise ValueError(
            f"length={length} is beyond context_size={shape.context_size}: learned positions end "
            "there; use a smaller --length, a larger --model.context-size, or position='rope'"
        )
    _check_ranks(args)
    runtime = choose_runtime(config)
    beside = _beside(config)
    print_table([*_summary(shape, runtime), *_tuned(config, beside)])
    refused = _show_attention(shape, runtime, length)
    _show_cache(shape, length)
    if refused is not None:
        raise ValueError(f"training cannot run on {runtime.device}: {refused}")
    if args.ranks is not None:
        from app.cli.shared.rank_tables import show_ranks

        show_ranks(config, args.ranks, args.bandwidth)
        return
    refused = show_training(config, runtime, args.probe, beside)
    for note in _notes(args, config):
        print(note)
    if refused is not None:
        raise ValueError(refused)


def _with_steps(config: TrainConfig) -> TrainConfig:
    """
    Raises:
        ValueError: epochs 数的是还没有的数据。
    """
    if config.epochs is None:
        return config
    from app.data.shards import TokenDataset
    from app.training.opened import feed_of, with_steps

    folder = Path(config.data.folder) / "train"
    if not folder.is_dir():
        raise ValueError(
            f"epochs={config.epochs} counts passes over {folder}, which does not exist yet: "
            "prepare it, or give --steps"
        )
    data = TokenDataset.open(folder)
    return with_steps(config, feed_of(data, config, config.batch_size, config.seed))


def _beside(config: TrainConfig) -> Beside:
    """新词元要数据已经准备好才知道。

    Raises:
        ValueError: 教师、参考或起点不在那里，或数据的分词器不是起点的。
    """
    from app.data.shards import META_FILE, TokenDataset
    from app.data.tokenizers import load_tokenizer
    from app.planning.tuned import Beside
    from app.training.saving.checkpoint import resolve_checkpoint
    from app.training.saving.initial import new_tokens

    new, folder = range(0), Path(config.data.folder) / "train"
    if config.init_from is not None and (folder / META_FILE).is_file():
        start = resolve_checkpoint(config.init_from, to_stderr)
        now = TokenDataset.open(folder).tokenizer()
        new = new_tokens(load_tokenizer(start), now, f"init_from={start}")
    return Beside.of(config, new, to_stderr)


def _tuned(config: TrainConfig, beside: Beside) -> Table:
    parts = beside.parts(config)
    if parts is None:
        return []
    trained, frozen = (sum(map(math.prod, x.values())) for x in (parts.trained, parts.frozen))
    return [
        ("trained", f"{trained:,} parameters", parts.what),
        ("frozen", f"{frozen:,} parameters", "no gradients, no optimizer state"),
    ]


def _check_ranks(args: Args) -> None:
    from app.distributed.check import check_alone

    if args.ranks is None:
        check_alone(args.train.parallel)
        if args.bandwidth is not None:
            raise ValueError(
                f"bandwidth={args.bandwidth} is for traffic between ranks: add --ranks N"
            )
    elif not 2 <= args.ranks <= _MOST_RANKS:
        raise ValueError(f"ranks={args.ranks} must be between 2 and {_MOST_RANKS:,}")
    elif args.bandwidth is not None and args.bandwidth <= 0:
        raise ValueError(f"bandwidth={args.bandwidth} must be above 0 GB/s")
    elif args.probe:
        raise ValueError(
            f"probe=true measures this machine, ranks={args.ranks} plans for others: use only one"
        )


def _notes(args: Args, config: TrainConfig) -> list[str]:
    from app.planning.sizes import parameters_by_part
    from app.training.watch.guidance import token_notes

    preset = None
    if args.file is not None and Path(args.config or "").suffix != ".json":
        preset = args.file.config
    return token_notes(config, sum(parameters_by_part(config.model).values()), preset)


def _summary(shape: GPT2Config, runtime: Runtime) -> Table:
    from app.models.transformer.experts.dispatch import explain_dispatch
    from app.planning.sizes import FLOAT32_BYTES, active_parameters, parameters_by_part

    parts = parameters_by_part(shape)
    total = sum(parts.values())
    positions = " and learned positions" if shape.position == "learned" else ""
    notes = {
        "embedding": f"{shape.vocab_size:,} tokens{positions}",
        "attention": f"{shape.n_head} heads of {shape.head_dim}, {shape.kv_heads} for keys",
        "mlp": f"{shape.activation}, width {shape.mlp_hidden}",
        "norms": f"{shape.norm}, {shape.norm_type}",
        "head": "tied to the embedding: no weights of its own" if shape.tie_weights else "untied",
    }
    if shape.moe_layers:
        layers = layer_names(shape.moe_layers)
        notes["router"] = f"{shape.moe.router}, top-{shape.moe_top_k} of {shape.moe_num_experts}"
        notes["experts"] = f"width {shape.expert_hidden}, in layers {layers}"
    experts: Table = []
    found = explain_dispatch(shape, device=runtime.device, dtype=runtime.dtype)
    if found is not None:
        active = active_parameters(shape)
        experts = [
            ("active", f"{active:,} parameters", f"per token, {active / total:.0%} of all"),
            ("dispatch", *found),
        ]
    return [
        ("device", str(runtime.device), runtime.device_why),
        ("precision", str(runtime.dtype).removeprefix("torch."), runtime.dtype_why),
        (
            "model",
            f"{total:,} parameters",
            f"{shape.n_layer} layers, width {shape.n_embed}, context {shape.context_size:,}, "
            f"positions {shape.position}",
        ),
        *(
            (f"  {part}", f"{count:,}", notes[part])
            for part, count in parts.items()
            if part in notes
        ),
        *experts,
        ("weights", size(total * FLOAT32_BYTES), "float32"),
    ]


def _show_attention(shape: GPT2Config, runtime: Runtime, length: int) -> str | None:
    """打印两张表；点名的后端做不了训练时返回理由（生成也做不了则直接抛出）。"""
    from app.models.transformer.backends.choose import explain_backends
    from app.models.transformer.visibility.coverage import coverage

    prompts = explain_backends(shape, device=runtime.device, length=length)
    training: list[Choice] | None = None
    refused = None
    try:
        training = explain_backends(
            shape, device=runtime.device, dtype=runtime.dtype, training=True, length=length
        )
    except ValueError as error:
        refused = str(error)
    seen: Table = [("layers", "pattern", "keys per query", "at most", "of the causal scores")]
    why: Table = [("layers", "when", "backend", "why")]
    for index, prompt in enumerate(prompts):
        found, layers = coverage(prompt.pattern, length), layer_names(prompt.layers)
        about = "" if found.exact else "~"
        row = (f"{about}{found.mean:,.1f}", f"{about}{found.most:,}", f"{about}{found.share:.1%}")
        seen.append((layers, str(prompt.pattern), *row))
        generated = (prompt.backend, prompt.reason)
        trained = ("none", refused or "")
        if training is not None:
            trained = (training[index].backend, training[index].reason)
        if trained == generated:
            why.append((layers, "training, prompt", *trained))
        else:
            why += [(layers, "training", *trained), ("", "prompt", *generated)]
    print(f"attention, {length:,} tokens at once")
    print_table(seen)
    print_table(why)
    return refused


def _show_cache(shape: GPT2Config, length: int) -> None:
    from app.planning.sizes import cache_sizes

    learned = shape.position == "learned"
    lengths = [length] if learned else sorted({length, _LONG})
    by_column = {
        f"{'float32' if kind is None else kind} at {n:,}": cache_sizes(shape, n, kind)
        for n in lengths
        for kind in (None, "int8")
    }
    slots = {f"slots at {n:,}": by_column[f"float32 at {n:,}"] for n in lengths}
    table: Table = [("layers", *slots, *by_column)]
    patterns = dict.fromkeys(shape.patterns)
    for pattern in patterns:
        layers = [i for i, other in enumerate(shape.patterns) if other == pattern]
        held = [f"{column[layers[0]].slots:,}" for column in slots.values()]
        table.append((layer_names(layers), *held, *_sums(by_column.values(), layers)))
    if len(patterns) > 1:
        everything = range(shape.n_layer)
        table.append(("all", *[""] * len(slots), *_sums(by_column.values(), everything)))
    print("KV cache of one row")
    print_table(table)
    if learned:
        print(f"  learned positions end at {shape.context_size:,} tokens: no cache is longer")


def _sums(columns: Iterable[tuple[CacheSize, ...]], layers: Sequence[int]) -> list[str]:
    return [size(sum(column[i].nbytes for i in layers)) for column in columns]


def layer_names(layers: Sequence[int]) -> str:
    """层号：连着的写成 0-11，等距的写成 0, 2, .., 10，其余逐段写。"""
    steps = {b - a for a, b in zip(layers, layers[1:], strict=False)}
    if len(layers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{layers[0]}, {layers[1]}, .., {layers[-1]}"
    runs = []
    for _, group in groupby(enumerate(layers), lambda pair: pair[1] - pair[0]):
        run = [layer for _, layer in group]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    if len(runs) > 4:
        runs = [*runs[:2], "..", runs[-1]]
    return ", ".join(runs)
