"""量化的代价：两个配方、两个种子训出的小模型，各种存法的 KL、最可能词元的变动、困惑度与误差。

cd backend && python -m benchmarks.quant_quality tinyshakespeare.txt [--steps 900]

quickstart 的语料（标准库）当场准备；tinyshakespeare 由运行的人给。
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from app.cli.shared.runfile import load_config
from app.data.prepare import TokenizerSpec, prepare
from app.data.reading.corpus import stdlib_sources
from app.data.reading.sources import Sources
from app.data.tokenizers import load_tokenizer
from app.evaluation.compare_models import compare_quality
from app.evaluation.perplexity import open_dataset
from app.evaluation.sampled_windows import sample_windows
from app.models.transformer import GPT2Model
from app.quantization.calibrate import Calibrator
from app.quantization.codes import Scheme
from app.quantization.model import VOCABULARY, QuantizedModel, matrices
from app.quantization.rtn import round_to_nearest
from app.training.run import train
from app.training.saving.checkpoint import resolve_checkpoint

from .common import table, write_result

CALIBRATION, COMPARED = 64, 60
INT8 = Scheme(8)
SCHEMES: dict[str, tuple[Scheme, Scheme, bool]] = {
    "fp16": (Scheme(16), Scheme(16), False),
    "int8": (INT8, INT8, False),
    "int4, round to nearest": (Scheme(4, 32), INT8, False),
    "int4, GPTQ": (Scheme(4, 32), INT8, True),
    "int4 with minimum, GPTQ": (Scheme(4, 32, True), INT8, True),
    "int4 everywhere, round to nearest": (Scheme(4, 32), Scheme(4, 32), False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=None, help="fewer steps than the recipes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data: dict[str, Callable[[Path], object]] = {
            "quickstart": lambda out: prepare(
                stdlib_sources(), out, TokenizerSpec("bpe"), say=_quiet
            ),
            "shakespeare-char": lambda out: prepare(
                Sources((args.text,)), out, TokenizerSpec("chars"), say=_quiet
            ),
        }
        for recipe, make in data.items():
            make(folder / recipe)
            for seed in args.seeds:
                model = trained(recipe, folder / recipe, folder / f"{recipe}-{seed}", seed, args)
                rows += measured(f"{recipe}, seed {seed}", model, folder / recipe)
    header = ["model", "weights", "KL", "flips", "perplexity", "change", "+-"]
    body = table(header, rows) + (
        f"\n\nKL of the predictions from the float model's, nats a token; flips of the likeliest "
        f"token; perplexity on {COMPARED} windows of the validation part; +- is the standard error "
        f"of the change. GPTQ is calibrated on {CALIBRATION} windows of the training part."
    )
    steps = "" if args.steps is None else f" --steps {args.steps}"
    write_result(
        "quant_quality",
        f"cd backend && python -m benchmarks.quant_quality tinyshakespeare.txt{steps}",
        body,
    )


def trained(recipe: str, data: Path, out: Path, seed: int, args: argparse.Namespace) -> GPT2Model:
    config = load_config(recipe).config
    vocabulary = load_tokenizer(data / "train").vocab_size
    config = config.replace(
        model=config.model.replace(vocab_size=vocabulary),
        data=config.data.__class__(folder=str(data)),
        out=str(out), seed=seed, steps=args.steps or config.steps, sample_tokens=0, eval_every=0,
    )  # fmt: skip
    train(config, _quiet, print)
    return GPT2Model.from_pretrained(resolve_checkpoint(str(out)))


def measured(name: str, model: GPT2Model, data: Path) -> list[list[object]]:
    tokenizer, length = load_tokenizer(data / "train"), model.config.context_size
    parts = {part: open_dataset(data / part, tokenizer) for part in ("train", "val")}
    calibration = sample_windows(parts["train"].source, "train", length, CALIBRATION)
    compared = sample_windows(parts["val"].source, "val", length, COMPARED)
    rows: list[list[object]] = []
    for label, (body, head, gptq) in SCHEMES.items():
        schemes = {n: head if n in VOCABULARY else body for n in matrices(model.config)}
        if gptq:
            codes = Calibrator(model, schemes).run(calibration[:, :-1], lambda tokens: None)
        else:
            state = model.state_dict()
            codes = {n: round_to_nearest(state[n], each, n) for n, each in schemes.items()}
        made = QuantizedModel.of(model, codes, label)
        found = compare_quality(model, made, compared)
        before, after = found.perplexity
        rows.append(
            [name, label, f"{found.kl:.1e}", f"{found.flips:.2%}", f"{after:.3f}",
             f"{after / before - 1:+.3%}", "" if found.noise is None else f"{found.noise:.3%}"]
        )  # fmt: skip
    return rows


def _quiet(*_: object) -> None:
    pass


if __name__ == "__main__":
    main()
