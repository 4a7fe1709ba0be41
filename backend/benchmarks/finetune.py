"""微调的几个数：装箱对补齐；LoRA 与末两层对全部；我们对 TRL 的 SFTTrainer。

cd backend && python -m benchmarks.finetune                      # 三部分，各写一个 results/
cd backend && python -m benchmarks.finetune --parts packed --tiny   # 几秒，只看走不走得通，不写

对话是假想的（随机的词元，长度取对数正态，中位数是上下文的五分之一）：速度只看长短。各跑法各在一个
子进程里（峰值内存才各是各的），由这里轮流叫它们各走一步。TRL 要另装（pip install --no-deps trl），
没有就说一句、略过。
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.adapters.adapter import Adapter
from app.adapters.files import write_adapter
from app.adapters.trainable import apply_trainable
from app.data.batch import UNSCORED, Batch, restarting
from app.data.feeding.plan import best_fit
from app.models.transformer import GPT2Config, GPT2Model
from app.training.config import OptimConfig, TuneConfig
from app.training.machine.runtime import Runtime
from app.training.optim.build import build_optimizer
from app.training.saving.state import optimizer_tensors
from app.training.step import accumulate, clip_gradients, gradient_norm

from .common import table, write_result
from .worker import Worker, peak

PARTS = ("packed", "trainable", "trl")
WAYS = {
    "packed": ("packed", "padded"),
    "trainable": ("all", "lora", "last:2"),
    "trl": ("ours-packed", "trl"),
}
CPU = Runtime(torch.device("cpu"), "", torch.float32, "")
OPTIM = OptimConfig(lr=3e-5, weight_decay=0.0, grad_clip=1.0, betas=(0.9, 0.999))
Example = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Size:
    shape: GPT2Config
    examples: int
    steps: int

    @classmethod
    def of(cls, tiny: bool) -> Size:
        small = GPT2Config(norm="pre", vocab_size=50257, context_size=1024, dropout=0.0)
        if not tiny:
            return cls(small, 8, 2)
        shape = small.replace(vocab_size=97, context_size=64, n_layer=2, n_head=2, n_embed=32)
        return cls(shape, 12, 2)


def conversations(size: Size, step: int) -> list[Example]:
    """一步的例：(词元, 计不计分)；后三分之二是回答。"""
    random, context = np.random.default_rng(step), size.shape.context_size
    lengths = np.exp(random.normal(np.log(context / 5), 0.6, size.examples))
    found = []
    for length in np.clip(lengths, 8, context).astype(int).tolist():
        ids = random.integers(size.shape.vocab_size, size=length)
        found.append((ids, np.arange(length) >= length // 3))
    return found


def rowed(examples: list[Example], context: int, pack: bool) -> Batch:
    """同样的例：装进尽量少的行，或一例一行、都补到上下文那么长。"""
    lengths = np.array([len(ids) - 1 for ids, _ in examples])
    order = np.argsort(-lengths, kind="stable")
    rows = best_fit(lengths[order], context) if pack else np.arange(len(order))
    shape = (int(rows.max()) + 1, context)
    inputs, targets = np.zeros(shape, np.int64), np.full(shape, UNSCORED, np.int64)
    segments, used = np.full(shape, len(examples), np.int64), np.zeros(shape[0], int)
    for number, (row, one) in enumerate(zip(rows.tolist(), order.tolist(), strict=True)):
        ids, scored = examples[one]
        place = slice(used[row], used[row] + len(ids) - 1)
        inputs[row, place], segments[row, place] = ids[:-1], number
        targets[row, place] = np.where(scored[1:], ids[1:], UNSCORED)
        used[row] = place.stop
    return Batch(inputs, targets, segments, restarting(segments))


def ours(way: str, size: Size) -> Callable[[int], float]:
    """一步；给出损失。"""
    model = start(size)
    apply_trainable(model, TuneConfig(trainable=way if way in WAYS["trainable"] else "all"))
    optimizer, _ = build_optimizer(model, OPTIM)
    trained = [p for p in model.parameters() if p.requires_grad]
    pack = "padded" not in way

    def step(number: int) -> float:
        batch = rowed(conversations(size, number), size.shape.context_size, pack)
        loss = accumulate(model, batch, 1, CPU).loss.item()
        norm = gradient_norm(trained)
        clip_gradients(trained, norm, norm.item(), OPTIM.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    step.sizes = lambda: stored(model, optimizer, way)  # type: ignore[attr-defined]
    return step


def start(size: Size) -> GPT2Model:
    torch.manual_seed(0)
    return GPT2Model(size.shape).train()


def stored(model: GPT2Model, optimizer: torch.optim.Optimizer, way: str) -> tuple[int, int]:
    """(要交付的字节数, 续训另要的)：适配器的文件，或整份的权重；优化器的张量。"""
    extra = sum(x.nbytes for x in optimizer_tensors(model, optimizer).values())
    if way != "lora":
        return sum(x.nbytes for x in model.state_dict().values()), extra
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Adapter.of(model), model.config, TuneConfig(trainable="lora"), Path(folder))
        return sum(path.stat().st_size for path in Path(folder).iterdir()), extra


def trl(size: Size, steps: int) -> Callable[[int], float]:
    """SFTTrainer 走同样的例：它自己补齐到一批里最长的；每步从一个生成器里放行。"""
    import threading
    from queue import Queue

    go, done = Queue[int](), Queue[float | Exception]()

    def run() -> None:
        try:
            _train_trl(size, steps, go, done)
        # 什么错都要送回去：否则等着的那一步永远等下去。
        except Exception as error:
            done.put(error)

    threading.Thread(target=run, daemon=True).start()

    def step(number: int) -> float:
        go.put(number)
        found = done.get()
        if isinstance(found, Exception):
            raise found
        return found

    return step


def _train_trl(size: Size, steps: int, go: Any, done: Any) -> None:
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    model = hugging_face(size)
    found = [one for number in range(steps) for one in conversations(size, number)]
    rows = [{"input_ids": ids.tolist(), "completion_mask": scored.astype(int).tolist()}
            for ids, scored in found]  # fmt: skip

    class Gate(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            go.get()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                done.put(float(logs["loss"]))

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *given: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, max_length=size.shape.context_size, packing=False,
            per_device_train_batch_size=size.examples, gradient_accumulation_steps=1,
            num_train_epochs=1, learning_rate=OPTIM.lr, lr_scheduler_type="constant",
            weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.999, max_grad_norm=1.0,
            completion_only_loss=True, gradient_checkpointing=False, logging_steps=1,
            report_to=[], save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
            optim="adamw_torch_fused",
        )  # fmt: skip
        trainer = InOrder(
            model=model, args=config, train_dataset=Dataset.from_list(rows),
            processing_class=_plain_tokenizer(size), callbacks=[Gate()],
        )  # fmt: skip
        trainer.train()


def hugging_face(size: Size) -> Any:
    """transformers 的同一个模型，同样的权重。"""
    from transformers import GPT2LMHeadModel

    from app.interop.equivalent import Weights
    from app.interop.hf import write_hf

    with tempfile.TemporaryDirectory() as folder:
        write_hf(Weights.of(start(size)), "gpt2", None, Path(folder), None)
        return GPT2LMHeadModel.from_pretrained(folder)


def _plain_tokenizer(size: Size) -> Any:
    """SFTTrainer 非要一个；数据已是词元，只用得到补齐的号。"""
    from tokenizers import Tokenizer as Fast
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {str(i): i for i in range(size.shape.vocab_size)}
    fast = Fast(WordLevel(words, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="0", eos_token="0")


def work(way: str, size: Size) -> None:
    """子进程：标准输入每来一行走一步，回答用时、至今的峰值与损失。"""
    torch.set_num_threads(2)
    step = trl(size, size.steps + 1) if way == "trl" else ours(way, size)
    print("ready", flush=True)
    for number, _ in enumerate(sys.stdin):
        begin = time.perf_counter()
        loss = step(number)
        print("step", time.perf_counter() - begin, peak(), loss, flush=True)
    sizes = getattr(step, "sizes", lambda: (0, 0))()
    print("sizes", *sizes, flush=True)


@dataclass(frozen=True)
class Found:
    """seconds: 一步的中位数；losses: 每步的损失；sizes: 见 stored。"""

    seconds: float
    peak: float
    losses: list[float]
    sizes: list[float]


def measure(ways: tuple[str, ...], size: Size, tiny: bool) -> dict[str, Found]:
    """轮流各走一步，头一步只作热身（它的损失照样要相同）。"""
    small = ["--tiny"] if tiny else []
    workers = {way: Worker("benchmarks.finetune", "--way", way, *small) for way in ways}
    rows: dict[str, list[list[float]]] = {way: [] for way in ways}
    for number in range(size.steps + 1):
        for way, worker in workers.items():
            rows[way].append(worker.step())
            print(number, way, rows[way][-1], flush=True)
    return {
        way: Found(
            statistics.median(row[0] for row in rows[way][1:]), max(row[1] for row in rows[way]),
            [row[2] for row in rows[way]], worker.close("sizes"),
        )
        for way, worker in workers.items()
    }  # fmt: skip


def tokens_a_step(size: Size) -> float:
    """真正的词元，补的不算；各步的中位数。"""
    steps = range(1, size.steps + 1)
    return statistics.median(sum(len(ids) for ids, _ in conversations(size, n)) for n in steps)


def apart(found: dict[str, Found]) -> float:
    """各跑法同一步的损失最多差多少。"""
    steps = zip(*(f.losses for f in found.values()), strict=True)
    return max(max(step) - min(step) for step in steps)


def speeds(part: str, found: dict[str, Found], size: Size, against: str, goal: str) -> str:
    tokens = tokens_a_step(size)
    lines: list[list[object]] = [
        [way, f"{one.seconds:.2f}", f"{tokens / one.seconds:,.0f}",
         f"{found[against].seconds / one.seconds:.2f}x", f"{one.peak / 1e6:,.0f}",
         f"{one.losses[0]:.6f}", f"{one.losses[-1]:.6f}"]
        for way, one in found.items()
    ]  # fmt: skip
    lengths = [len(ids) for n in range(1, size.steps + 1) for ids, _ in conversations(size, n)]
    share = statistics.median(lengths) / size.shape.context_size
    head = ["way", "seconds a step", "tokens/s", f"speed vs {against}", "peak MB", "first loss",
            "last loss"]  # fmt: skip
    return (
        f"{table(head, lines)}\n\n{shape_of(size)}; {size.examples} conversations a step, their "
        f"median {share:.0%} of the context; only their own tokens are counted. The same examples, "
        f"steps, weights and optimizer for all: losses of a step differ by at most "
        f"{apart(found):.1e}. Goal: {goal}. Medians of {size.steps} steps after one to warm up."
    )


def shape_of(size: Size) -> str:
    shape = size.shape
    return (
        f"{shape.n_layer} layers, width {shape.n_embed}, vocabulary {shape.vocab_size:,}, context "
        f"{shape.context_size:,}, float32, AdamW, clipping"
    )


def trainables(found: dict[str, Found], size: Size) -> str:
    whole = found["all"]
    lines: list[list[object]] = [
        [way, f"{one.seconds:.2f}", f"{one.seconds / whole.seconds:.2f}",
         f"{one.peak / 1e6:,.0f}", f"{one.peak / whole.peak:.2f}", f"{one.sizes[0] / 1e6:,.1f}",
         f"{one.sizes[0] / whole.sizes[0]:.2%}",
         f"{sum(one.sizes) / sum(whole.sizes):.2%}"]
        for way, one in found.items()
    ]  # fmt: skip
    head = ["trained", "seconds a step", "of all", "peak MB", "of all", "weights MB", "of all",
            "with optimizer, of all"]  # fmt: skip
    return (
        f"{table(head, lines)}\n\n{shape_of(size)}; {size.examples} conversations a step, packed. "
        "Weights: what a checkpoint holds of them (LoRA: rank 8 on four matrices, its two files). "
        f"Medians of {size.steps} steps after one to warm up."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="seconds; prints, writes nothing")
    parser.add_argument("--way", help="run as the worker of one way")
    args = parser.parse_args()
    size = Size.of(args.tiny)
    if args.way:
        work(args.way, size)
        return
    for part in args.parts:
        if part == "trl" and importlib.util.find_spec("trl") is None:
            print("trl is not installed (pip install --no-deps trl): its part is skipped")
            continue
        found = measure(WAYS[part], size, args.tiny)
        goal = {"packed": "1.8x", "trl": "ours-packed at least 1.15x"}.get(part, "")
        if part == "trainable":
            body = trainables(found, size)
        else:
            body = speeds(part, found, size, WAYS[part][-1], goal)
        if args.tiny:
            print(body)
        else:
            write_result(
                f"finetune_{part}",
                f"cd backend && python -m benchmarks.finetune --parts {part}",
                body,
            )


if __name__ == "__main__":
    main()
