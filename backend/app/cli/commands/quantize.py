"""`gpt2 quantize`：模型的矩阵存成 16、8 或 4 位，说出大小、质量与速度，变慢就不写。"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typing_extensions import Doc

from app.cli.shared.trained import (
    Device,
    Trained,
    TrainedName,
    load_trained,
    own_data,
    own_run_file,
)
from app.common.files import check_new

if TYPE_CHECKING:
    from torch import Tensor

    from app.evaluation.compare_models import Quality
    from app.models.transformer import GPT2Model
    from app.quantization.codes import Codes, Scheme
    from app.quantization.model import QuantizedModel

SUMMARY = "store a model's matrices in 16, 8 or 4 bits: smaller, and faster to decode"
EXAMPLES = """\
  gpt2 quantize runs/mine --to fp16 --out models/mine-fp16
  gpt2 quantize runs/mine --to int8 --out models/mine-int8
  gpt2 quantize models/gpt2 --to int4 --method gptq --data data/mine --out models/gpt2-int4
  gpt2 quantize runs/mine --to int4 --budget 0.22 --out models/mine-mixed

The folder opens like any other model: gpt2 generate, eval, show, export --to gguf."""

Kind = Literal["fp16", "int8", "int4"]
_BITS = {"fp16": 16, "int8": 8, "int4": 4}
_GROUP = 32
# 校准、量代价、比较各取多少个窗口。
_CALIBRATION, _SENSITIVITY, _COMPARED, _RANDOM = 64, 8, 64, 8
_ROUNDS = 5


@dataclass(frozen=True)
class Args:
    """量化一个模型。"""

    model: TrainedName
    to: Annotated[
        Kind,
        Doc(
            "fp16: half the size, practically the same numbers; int8: a quarter; int4: less than "
            "a fifth, with a cost in quality that is printed"
        ),
    ]
    out: Annotated[Path, Doc("folder to write the model to; must not exist")]
    method: Annotated[
        Literal["rtn", "gptq"],
        Doc("round to nearest (no data), or GPTQ, which corrects itself on calibration data"),
    ] = "rtn"
    data: Annotated[
        Path | None,
        Doc("prepared dataset to calibrate and compare on; None = that of the model's run"),
    ] = None
    group: Annotated[
        int | None, Doc("int4: columns that share a scale; must divide the widths; None = 32")
    ] = None
    asymmetric: Annotated[bool, Doc("int4: a minimum per group as well as a scale")] = False
    budget: Annotated[
        float | None,
        Doc("int4: share of the float32 size; the most sensitive matrices get 8 bits within it"),
    ] = None
    head_bits: Annotated[
        Literal[16, 8, 4] | None,
        Doc("bits of the embedding and the head; None = 8 (16 with fp16); 4 costs quality"),
    ] = None
    allow_slower: Annotated[bool, Doc("write the model even if it decodes more slowly")] = False
    device: Device = "cpu"


def run(args: Args) -> int:
    """退出码 0 写好了，1 在这台机器上变慢而没有写。

    Raises:
        ValueError: 选项互相矛盾，模型已量化，组不整除，数据不合或太少，预算办不到；什么也没有写。
    """
    from app.quantization.model import QuantizedModel

    check_new(args.out)
    low, head = _schemes(args)
    trained = load_trained(args.model, args.device)
    model = trained.model
    if isinstance(model, QuantizedModel):
        raise ValueError(
            f"{args.model} is quantized already ({model.describe()}): quantize the float model it "
            "was made from"
        )
    texts = _texts(args, trained)
    chosen = _choose(args, model, low, head, texts)
    # 速度只看存法，不看码：先量它，免得校准完了才知道不值得。
    rounded = _rounded(model, chosen)
    faster = _show_speed(model, rounded)
    if not faster and not args.allow_slower:
        print(
            f"error: {args.to} decodes more slowly than float32 on this machine, so nothing was "
            "written: add --allow-slower to write it all the same",
            file=sys.stderr,
        )
        return 1
    made = rounded if args.method == "rtn" else _calibrated(args, model, chosen, texts)
    _show_quality(args, model, made, texts)
    _write(args.out, made, trained)
    return 0


@dataclass(frozen=True)
class _Texts:
    """calibration 与 compared (W, T + 1)；真的文字，还是随机的词元。"""

    calibration: Tensor | None
    compared: Tensor
    name: str


def _schemes(args: Args) -> tuple[Scheme, Scheme]:
    """(各层的存法, 词表的存法)。"""
    from app.quantization.codes import Scheme

    if args.to != "int4":
        for name in ("group", "asymmetric", "budget"):
            if getattr(args, name) not in (None, False):
                raise ValueError(
                    f"{name}={getattr(args, name)} is for --to int4, not --to {args.to}: "
                    "leave it out"
                )
    if args.to == "fp16" and args.method == "gptq":
        raise ValueError("method='gptq' is for int8 and int4: fp16 has nothing to correct")
    if args.budget is not None and not 0 < args.budget < 1:
        raise ValueError(f"budget={args.budget:g} must be between 0 and 1, such as 0.22")
    group = _GROUP if args.group is None else args.group
    low4 = (4, group, args.asymmetric)
    bits = args.head_bits or (16 if args.to == "fp16" else 8)
    low = Scheme(*low4) if args.to == "int4" else Scheme(_BITS[args.to])
    return low, Scheme(*low4) if bits == 4 else Scheme(bits)


def _texts(args: Args, trained: Trained) -> _Texts:
    """数据是给的，或那次训练自己的；都没有而又用不着时，在随机的词元上比较。"""
    from app.evaluation.perplexity import open_dataset
    from app.evaluation.sampled_windows import random_windows, sample_windows, window_length

    config, tokenizer = trained.model.config, trained.tokenizer
    length = window_length(config.context_size)
    data = args.data or _own_data(trained.folder)
    if data is None:
        if args.method == "gptq" or args.budget is not None:
            raise ValueError(
                f"{args.model} has no data of a run beside it, and --method gptq and --budget "
                "need text: give --data"
            )
        windows = random_windows(config.vocab_size, length, _RANDOM)
        return _Texts(None, windows, "random tokens (give --data for text)")
    whole = not (data / "train").is_dir()
    train = open_dataset(data if whole else data / "train", tokenizer)
    held = train if not (data / "val").is_dir() else open_dataset(data / "val", tokenizer)
    return _Texts(
        sample_windows(train.source, train.name, length, _CALIBRATION),
        sample_windows(held.source, held.name, length, _COMPARED),
        held.name,
    )


def _own_data(folder: Path) -> Path | None:
    """模型所属的训练的数据；不属于哪次训练，或数据不在了，就没有。"""
    if own_run_file(folder) is None:
        return None
    data = own_data(folder, "--data")
    return data if data.is_dir() else None


def _choose(
    args: Args, model: GPT2Model, low: Scheme, head: Scheme, texts: _Texts
) -> dict[str, Scheme]:
    """每个矩阵的存法；有预算时按量出的代价分。"""
    from app.common.progress import count_tokens
    from app.models.transformer import GPT2Model
    from app.models.transformer.weights.own_folder import expected_shapes
    from app.quantization.codes import Scheme
    from app.quantization.model import VOCABULARY, matrices
    from app.quantization.sensitivity import fit_budget, sensitivities

    shapes = matrices(model.config)
    chosen = {name: head if name in VOCABULARY else low for name in shapes}
    for name, scheme in chosen.items():
        scheme.check_width(shapes[name][-1], name)
    if args.budget is None:
        return chosen
    every = expected_shapes(GPT2Model, model.config)
    high = {name: head if name in VOCABULARY else Scheme(8) for name in shapes}
    layers = {name: scheme for name, scheme in chosen.items() if name not in VOCABULARY}
    # 办不到的预算在量之前就说。
    fit_budget(every, chosen, high, dict.fromkeys(layers, 0.0), args.budget)
    assert texts.calibration is not None
    ids = texts.calibration[:_SENSITIVITY, :-1]
    with count_tokens("sensitivity", len(layers) * ids.numel()) as advance:
        cost = sensitivities(model, layers, ids, advance)
    fitted = fit_budget(every, chosen, high, cost, args.budget)
    kept = [name for name in layers if fitted[name].bits == 8]
    worst = sorted(kept, key=cost.__getitem__, reverse=True)[:3]
    named = ", ".join(f"{name} (KL {cost[name]:.1e})" for name in worst)
    print(f"budget   {len(kept)} of {len(layers)} matrices keep 8 bits: {named or 'none'}")
    return fitted


def _rounded(model: GPT2Model, schemes: dict[str, Scheme]) -> QuantizedModel:
    from app.quantization.model import QuantizedModel
    from app.quantization.rtn import round_to_nearest

    state = model.state_dict()
    codes = {name: round_to_nearest(state[name], each, name) for name, each in schemes.items()}
    return QuantizedModel.of(model, codes, "rtn")


def _calibrated(
    args: Args, model: GPT2Model, schemes: dict[str, Scheme], texts: _Texts
) -> QuantizedModel:
    from app.common.progress import count_tokens
    from app.quantization.calibrate import Calibrator
    from app.quantization.model import QuantizedModel

    assert texts.calibration is not None
    work = Calibrator(model, schemes)
    ids = texts.calibration[:, :-1]
    with count_tokens("gptq", model.config.n_layer * ids.numel()) as advance:
        codes = work.run(ids, advance)
    print(f"gptq     calibrated on {ids.numel():,} tokens in {ids.shape[0]} windows")
    for why, count in work.rounded.items():
        print(f"note     {count} matrices rounded to nearest: {why}")
    return QuantizedModel.of(model, codes, args.method)


def _show_speed(before: GPT2Model, after: QuantizedModel) -> bool:
    import torch

    from app.generation.speed import decode_speed
    from app.quantization.kernels import Case, explain_kernels

    for line in explain_kernels(Case.of(codes) for codes in _flat(after)):
        print(f"kernel   {line}")
    old, new = decode_speed((before, after), _ROUNDS)
    print(
        f"speed    {old:,.1f} -> {new:,.1f} tokens/s ({new / old:.2f}x), one row, "
        f"{before.device}, {torch.get_num_threads()} threads"
    )
    return new >= old


def _flat(model: QuantizedModel) -> list[Codes]:
    """叠着的专家拆成一个一个。"""
    every: list[Codes] = []
    for codes in model.codes.values():
        stacked = len(codes.shape) == 3
        every.extend(codes[e] for e in range(codes.shape[0])) if stacked else every.append(codes)
    return every


def _show_quality(args: Args, before: GPT2Model, after: QuantizedModel, texts: _Texts) -> None:
    from app.evaluation.compare_models import compare_quality

    full = 4 * before.num_parameters()
    print(
        f"size     {full:,} -> {after.nbytes():,} bytes "
        f"({after.nbytes() / full:.3f} of float32); {after.describe()}"
    )
    found = compare_quality(before, after, texts.compared)
    print(
        f"quality  KL {found.kl:.2e} nats, likeliest token changed at {100 * found.flips:.2f}% of "
        f"{found.tokens:,} positions; {texts.name}"
    )
    if texts.calibration is not None:
        print(f"         {_perplexity(found)}")
    if args.head_bits == 4:
        print(f"head     4 bits alone cost KL {_head_cost(before, after, texts):.2e} nats")


def _perplexity(found: Quality) -> str:
    before, after = found.perplexity
    change = 100 * (after / before - 1)
    # 一阶：困惑度之比的标准误就是 nat 之差的。
    noise = "one window: no noise known" if found.noise is None else f"± {100 * found.noise:.3f}%"
    return f"perplexity {before:.4f} -> {after:.4f} ({change:+.3f}%, {noise})"


def _head_cost(before: GPT2Model, after: QuantizedModel, texts: _Texts) -> float:
    """只有词表的矩阵用它的码时的 KL。"""
    import torch

    from app.evaluation.compare_models import compare_quality
    from app.models.transformer import GPT2Model
    from app.quantization.model import VOCABULARY

    state, codes = before.state_dict(), after.codes
    state |= {name: codes[name].dequantize() for name in VOCABULARY if name in codes}
    with torch.device("meta"):
        only = GPT2Model(before.config)
    only.load_state_dict(state, assign=True)
    return compare_quality(before, only.eval(), texts.compared).kl


def _write(out: Path, model: QuantizedModel, source: Trained) -> None:
    """写完读回来，码要逐位相同。"""
    import torch

    from app.common.files import write_folder
    from app.data.chat.template import find_template
    from app.models.transformer import GPT2Model

    def fill(new: Path) -> None:
        model.save_pretrained(new)
        source.tokenizer.save(new)
        if (template := find_template(source.folder)) is not None:
            template.save(new)
        written = GPT2Model.from_pretrained(new).state_dict()
        for name, tensor in model.state_dict().items():
            if not torch.equal(written[name], tensor.cpu()):
                raise OSError(f"{name} read back from {new} differs: the disk lost data")

    write_folder(out, fill)
    print(f"written  {out}")
