"""从一份配置到一次完整的训练：打开数据、占住文件夹、组装、复原、训练、画图。"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from app.common.console import say
from app.common.files import write_atomic
from app.common.tell import Tell
from app.distributed.check import check, check_alone, check_peers, check_shared
from app.distributed.mesh import Mesh

from .config import TrainConfig
from .describe import describe
from .engines import build_engine, start_model
from .machine.agreed_stop import AgreedStop
from .machine.runtime import Runtime, choose_runtime, memory_error
from .machine.stop_signal import Interrupted, StopSignal
from .objectives.build import build_objective
from .objectives.objective import Objective
from .opened import Data, held_rows, open_data, with_steps
from .ranks import (
    changed_summing,
    goes_on_exactly,
    job_of,
    keep_threads,
    peer_facts,
    with_leaves,
)
from .references import Comparer
from .report.metrics import METRICS, Metrics
from .report.progress import Progress
from .report.run_charts import PLOT, plot_losses
from .report.run_facts import Decisions, Facts, write_facts
from .report.run_page import REPORT, Reporter
from .report.silent import Silent
from .report.tensorboard import EVENTS, open_tensorboard, require_tensorboard
from .saving.checkpoint import clear_leftovers, step_folder
from .saving.home import leave_origin
from .saving.initial import chat_template, initialize_from
from .saving.lock import run_lock
from .saving.resume import (
    RUN_FILE,
    check_compatible,
    check_out,
    check_same_machine,
    find_start,
    resume_lines,
)
from .saving.state import read_state, set_random_state, versions
from .saving.tuned import base_again, begin, check_tune
from .step import LM
from .trainer import Trainer
from .watch.guidance import small_step
from .watch.samples import usable_prompt
from .watch.validation import Validation


@dataclass(frozen=True)
class Result:
    """训练怎样结束。stopped 是使它停下的信号名；checkpoint 是最后保存的状态。

    Attributes:
        early: 损失不再好转、提前结束的那一句话；没有则 None。
        unwritten: 要写而没写成的东西，一样一句；训练本身照常做完了。
    """

    stopped: str | None
    early: str | None
    unwritten: tuple[str, ...]
    step: int
    best: tuple[int, float] | None
    skipped: int
    seconds: float
    plot: Path | None
    report: Path
    checkpoint: Path
    run_file: Path


def train(
    config: TrainConfig,
    show: Callable[[Decisions], object],
    tell: Tell = say,
    preset: TrainConfig | None = None,
    mesh: Mesh | None = None,
) -> Result:
    """按 config 训练到底，或到收到停止信号为止。

    Args:
        show: 第一步之前收到将要怎样跑。
        preset: 运行文件原来的设置，只用来提醒。
        mesh: 几个 rank 一起训练时我在哪里；文件夹只由 rank 0 写，话只由它说。

    Raises:
        ValueError: 配置、数据、训练文件夹或检查点不可用；那时什么也没有写。
        TrainingDiverged: 连续多步非有限。
        OSError: 最后的检查点写不下去。
        ImportError: 要写 TensorBoard 事件而没有装它。
    """
    world, notes = Mesh().world if mesh is None else mesh.world, []

    def note(text: str) -> None:
        if world.rank == 0:
            notes.append(text)
            tell(text)

    if config.tensorboard:
        world.together(require_tensorboard)
    check_tune(config)
    if mesh is None:
        check_alone(config.parallel)
    else:
        check(job_of(config), world.size)
        config = with_leaves(config, mesh.data.size)
        # 微批这才定下来，流水线要看它。
        check(job_of(config), world.size)
    given = config
    data = world.together(lambda: open_data(given, note))
    config = with_steps(config, data.feed)
    prompted, tokenizer = config, data.train.tokenizer()
    # 只取那一句话：整份设置各 rank 用自己的，下一步才看得出谁的不同。
    prompt = world.first(lambda: usable_prompt(prompted, preset, tokenizer, note).sample_prompt)
    config = config.replace(sample_prompt=prompt)
    runtime = choose_runtime(config)
    check_peers(world, peer_facts(config, data.fingerprints, runtime.device))
    world.first(lambda: check_out(config))
    ready, run = config, Path(config.out)
    # 先于种子（装入教师会用掉随机数），也先于写下任何东西。
    with memory_error(config, 0):
        objective = world.together(lambda: build_objective(ready, tokenizer, runtime, note))
    with StopSignal() as signal, contextlib.ExitStack() as held:
        world.first(lambda: _open_folder(run, held, note))
        world.together(lambda: check_shared(run))
        with memory_error(config, 0):
            trainer = _assemble(config, runtime, data, objective, note, mesh)
        if warning := small_step(config, trainer.engine.whole.parameters, preset):
            note(warning)
        decisions = describe(trainer, _compile(trainer, signal, note))
        world.first(lambda: _write_settings(trainer, data, decisions, notes))
        if world.rank == 0:
            show(decisions)
        stop = AgreedStop(signal, world, config.parallel.grace_s)
        with stop.watching():
            return _run(trainer, stop)


def _open_folder(run: Path, held: contextlib.ExitStack, tell: Tell) -> None:
    run.mkdir(parents=True, exist_ok=True)
    held.enter_context(run_lock(run, tell))
    clear_leftovers(run, tell)


def _write_settings(trainer: Trainer, data: Data, decisions: Decisions, notes: list[str]) -> None:
    run, config = trainer.run_folder, trainer.config
    write_atomic(run / RUN_FILE, _as_yaml(config))
    leave_origin(run, config, data.train.fingerprint)
    write_facts(run, _facts(trainer, data, decisions, notes))


def _assemble(
    config: TrainConfig,
    runtime: Runtime,
    data: Data,
    objective: Objective,
    tell: Tell,
    mesh: Mesh | None,
) -> Trainer:
    world = Mesh().world if mesh is None else mesh.world
    start = world.first(lambda: find_start(config, tell))
    state = world.first(lambda: None if start is None else read_state(start))
    if mesh is None and state is not None and goes_on_exactly(state):
        keep_threads(state, tell)
        mesh, runtime = Mesh(), choose_runtime(config)
        config = with_leaves(config, 1)
    if state is not None:
        world.first(lambda: check_compatible(state, config, data.train.fingerprint, tell))
        now = {
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "device": str(runtime.device),
            "precision": str(runtime.dtype),
        }
        check_same_machine(state, now, tell)
    tokenizer = data.train.tokenizer()
    _seed_everything(config.seed)
    blank = start is not None or config.init_from is None
    model = start_model(config, runtime, mesh, blank)
    started = None
    if start is not None:
        started = world.together(lambda: base_again(config, start, model, tokenizer))
    elif (source := config.init_from) is not None:
        started = world.together(lambda: initialize_from(source, model, tokenizer, tell))
    known = None
    if config.objective.kind == "dpo":
        comparer = Comparer(config, runtime, tokenizer, world, tell)
        known = comparer.find(
            data, model if start is None else None, (state or {}).get("reference")
        )
        data = data.compared(known.log_probs, known.key)
    said, base = world.together(lambda: begin(config, model, started))
    if config.tune.trainable != "all":
        tell(said.line)
    engine = build_engine(model, config, runtime, mesh, objective)
    engine.base = base
    validations = [
        Validation(
            held_rows(name, data, config),
            engine.objective if data.val[name].kind == "preference" else LM,
            engine.readers,
            engine.score,
            name,
        )
        for name in data.val
    ]
    origin = start if start is not None else None if started is None else started.folder
    template = chat_template(data.train.folder, origin, tell if start is None else _nothing)
    key = None if known is None else known.key
    trainer = Trainer(engine, data, validations, tokenizer, key, template)
    if start is not None and state is not None:
        # 先于复原：重量最好的那个要借用模型，之后权重与随机数都会复原。
        trainer.restore_best(tell)
        engine.read(start, trainer.optimizer)
        set_random_state(state["rng"])
        trainer.restore_counters(state, own=start.parent.resolve() == Path(config.out).resolve())
        tell(f"resuming from {start} at step {trainer.step}")
        if (line := changed_summing(state, engine.summing)) is not None:
            tell(line)
        for line in resume_lines(state, config, trainer.feed):
            tell(line)
    return trainer


def _nothing(line: str) -> None:
    """续训时不再说一遍。"""


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % (1 << 32))


def _compile(trainer: Trainer, stop: StopSignal, tell: Tell) -> str:
    # 几个 rank 一起试跑：一个中途走了，别的就在集合操作里空等。它们编译完，第一步之前就停。
    alone = trainer.world.alone
    try:
        with stop.at_once() if alone else contextlib.nullcontext():
            return trainer.compile(tell)
    except Interrupted:
        return f"off: {stop.requested} while compiling"


def _run(trainer: Trainer, stop: AgreedStop) -> Result:
    run, config, begin = trainer.run_folder, trainer.config, time.perf_counter()
    metrics, progress = _records(trainer) if trainer.world.rank == 0 else (Silent(), Silent())
    plot = None
    try:
        with memory_error(config, config.rows_at_once), progress, metrics:
            trainer.run(metrics, progress, stop)
    finally:
        # 中途失败时，曲线正是要看的东西。
        if trainer.world.rank == 0:
            plot = _plot(run, progress.tell, metrics.failed)
    return Result(
        stopped=stop.requested,
        early=trainer.patience.said if trainer.patience.over else None,
        unwritten=tuple(metrics.failed),
        step=trainer.step,
        best=trainer.best,
        skipped=trainer.skipped,
        seconds=time.perf_counter() - begin,
        plot=plot,
        report=run / REPORT,
        checkpoint=step_folder(run, trainer.step),
        run_file=run / RUN_FILE,
    )


def _records(trainer: Trainer) -> tuple[Metrics, Progress]:
    run, config = trainer.run_folder, trainer.config
    progress = Progress(config.steps, trainer.step, config.tokens_per_step)
    metrics = Metrics(run / METRICS, trainer.step, progress.tell)
    metrics.add(Reporter(run))
    if config.tensorboard:
        if events := open_tensorboard(run, trainer.step, progress.tell):
            metrics.add(events)
        else:
            metrics.failed.append(EVENTS)
    return metrics, progress


def _plot(run: Path, tell: Tell, failed: list[str]) -> Path | None:
    """画不出（盘满、matplotlib 坏了）只警告：训练已经做完，也不该盖住它自己的错误。"""
    try:
        return plot_losses(run)
    except Exception as error:
        tell(f"warning: cannot draw {PLOT}: {type(error).__name__}: {error}")
        failed.append(PLOT)
        return None


def _facts(trainer: Trainer, data: Data, decisions: Decisions, notes: list[str]) -> Facts:
    return Facts(
        decisions=decisions,
        notes=notes,
        data=data.fingerprints,
        parameters=trainer.engine.whole.parameters,
        steps=trainer.config.steps,
        expected_loss=trainer.engine.whole.expected_loss,
        unigram=trainer.plateau.entropy,
        trained=_trained(trainer),
    )


def _trained(trainer: Trainer) -> int:
    """训练全部时模型也许已经切开，数不到；只训练一部分时每个 rank 都有整个。"""
    if trainer.config.tune.trainable == "all":
        return trainer.engine.whole.parameters
    return sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)


def _as_yaml(config: TrainConfig) -> bytes:
    text = yaml.safe_dump(config.replace(resume="none").to_dict(), sort_keys=False)
    return text.encode("utf-8")
