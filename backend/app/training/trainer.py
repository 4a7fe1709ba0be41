"""训练循环。从 Trainer.run 读起：一步、验证、保存、停止，都在那一屏里。

检查点 step 的意思：做完 step 步、其后什么都没做的状态。验证与样文在取下一步之前进行，
所以从检查点续训会照样再做一遍，得到同样的数。
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from app.common.memory import peak_memory
from app.common.tell import Tell
from app.data.chat.template import Template
from app.data.tokenizers import Tokenizer

from .engine import Plain
from .machine.agreed_stop import AgreedStop
from .machine.feeding import Prefetch
from .machine.runtime import compile_blocks
from .opened import Data
from .optim.build import build_optimizer
from .report.metrics import Metrics
from .report.progress import Progress
from .report.silent import Silent
from .saving.best import measured_again, sound_best
from .saving.checkpoint import kept_every, mark_best, prune, step_folder, write_checkpoint
from .saving.resume import windows_read
from .saving.state import keep_every_of, write_state
from .step import Sums, accumulate, first_loss_line
from .watch.answers import Answers, answers_line, answers_of
from .watch.ending import Ending
from .watch.expert_load import balance_row, update_selection_bias
from .watch.patience import Patience
from .watch.plateau import PlateauWatch
from .watch.samples import SAMPLING, sample_text
from .watch.spike import SpikeWatch
from .watch.validation import Validation

_MAX_BAD_STEPS = 3


class TrainingDiverged(ValueError):
    """连续几步的损失或梯度不是有限数，或者权重已经不是。"""


class Trainer:
    """一次训练的全部活动部件；由 run.py 组装与复原。

    Attributes:
        step: 已完成的步数。
        skipped: 没有更新的步数：损失或梯度非有限，或（spike="skip" 时）是尖峰。
    """

    def __init__(
        self,
        engine: Plain,
        data: Data,
        validations: Sequence[Validation],
        tokenizer: Tokenizer,
        reference: str | None = None,
        template: Template | None = None,
    ) -> None:
        self.engine, self.data, self.feed = engine, data.train, data.feed
        self.config, self.runtime, self.model = engine.config, engine.runtime, engine.model
        self.world = engine.mesh.world
        config, model = self.config, self.model
        # 第一个决定 best 与 patience。
        self.validation = validations[0] if validations else None
        self.others = validations[1:]
        self.tokenizer, self.template, self.reference = tokenizer, template, reference
        self.run_folder = Path(config.out)
        self.ahead = Prefetch(lambda step: self.feed.batch(step, engine.rows), self.runtime.device)
        self.optimizer, self.optimizer_why = build_optimizer(model, config.optim)
        self.spikes = SpikeWatch()
        self.plateau = PlateauWatch(data.entropy, config)
        self.ending = Ending(config)
        self.answers = answers_of(data.val.values(), config)
        self.step = self.tokens = self.skipped = 0
        self.best: tuple[int, float] | None = None
        measured = None if self.validation is None else self.validation.measured
        self.patience = Patience(config.patience, measured, config.min_delta)
        self.last_sample: str | None = None
        self.saved: int | None = None
        self._bad_in_a_row = 0
        self._sampled: int | None = None

    def run(self, metrics: Metrics | Silent, progress: Progress | Silent, stop: AgreedStop) -> None:
        """训练到 config.steps，或到要求停止的那一步；返回时最后的状态已保存。

        Raises:
            TrainingDiverged: 连续多步非有限；最后一个好的检查点在信息里。
            OSError: 最后的检查点写不下去。
        """
        self.metrics, self.progress, self.stop = metrics, progress, stop
        every = self.config
        self.model.train()
        stop.agree()
        while self.step < self.ending.last and not stop.requested:
            if _due(self.step, every.eval_every):
                self._validate()
                if self.patience.over:
                    break
            if self.step and _due(self.step, every.sample_every):
                self._sample()
                stop.agree()
            if stop.requested:
                break
            self._mind_time()
            self._train_step()
            if every.saves_at(self.step) and self.step < self.ending.last:
                self._save()
        if not stop.requested:
            self._save(must=True)
            if not self.patience.over:
                self._validate()
            self._sample()
        self._save(must=True)

    def _train_step(self) -> None:
        start = time.perf_counter()
        lr = self.ending.learning_rate(self.step, self.config.optim.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = self.ending.learning_rate(self.step, group["initial_lr"])
        sums = self.engine.gradients(self.ahead.take(self.step), self.step)
        norm = self.engine.norm()
        self.ahead.look_ahead(self.step + 1)
        # 每步只在这里与设备同步一次。
        three = (sums.loss, norm.to(sums.loss.dtype), sums.aux_loss.to(sums.loss.dtype))
        loss, size, aux = torch.stack(three).tolist()
        good = not self.stop.agree(bad=not (math.isfinite(loss) and math.isfinite(size)))
        if good and _due(self.step, self.config.eval_every):
            norms = self.engine.group_norms()
            self.metrics.write({"kind": "groups", "step": self.step + 1, "norms": norms})
        spike = self.spikes.judge(loss, size) if good and self.config.spike != "off" else None
        if good and not (spike and self.config.spike == "skip"):
            self.engine.clip(norm, size)
            self.optimizer.step()
            if sums.load is not None:
                update_selection_bias(self.model, sums.load)
        where = "" if good else self.engine.first_bad_place()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += self.config.tokens_per_step
        self._record(loss, size, lr, time.perf_counter() - start, sums, aux)
        self._count_bad(good, where)
        if spike:
            self._note_spike(spike)
        if good and (hint := self.plateau.note(self.step, loss)):
            self.metrics.write({"kind": "hint", "step": self.step, "text": hint})
            self.progress.tell(hint)

    def _mind_time(self) -> None:
        if not self.ending.limited:
            return
        last = self.world.first(lambda: self.ending.plan(self.step))
        if last is not None:
            self.progress.tell(self.ending.begin(self.step, last))
            self.metrics.write({"kind": "ending", "step": self.step, "last": last})

    def _record(
        self, loss: float, norm: float, lr: float, seconds: float, sums: Sums, aux: float
    ) -> None:
        row = {"kind": "train", "step": self.step, "loss": loss, "grad_norm": norm, "lr": lr}
        row |= {"tokens": self.tokens, "scored": sums.weight, "seconds": round(seconds, 6)}
        if sums.numbers is not None:
            row |= dict(zip(self.engine.objective.names, sums.numbers.tolist(), strict=True))
        if sums.load is not None and sums.dropped is not None:
            row["aux_loss"] = aux
            if _due(self.step - 1, self.config.eval_every):
                layers = balance_row(self.config.model.moe_layers, sums.load, sums.dropped)
                self.metrics.write({"kind": "moe", "step": self.step, "layers": layers})
        self.metrics.write(row)
        if self.step == 1:
            expected = self.engine.whole.expected_loss
            self.progress.tell(first_loss_line(self.config, self.model, loss, expected))
        self.progress.step(self.step, loss, lr, seconds)

    def _count_bad(self, good: bool, where: str) -> None:
        if good:
            self._bad_in_a_row = 0
            return
        self._bad_in_a_row += 1
        self._note_skipped(where)
        self.progress.tell(
            f"warning: step {self.step} has a non-finite loss or gradient (first in {where}): "
            "no update"
        )
        if self._bad_in_a_row >= _MAX_BAD_STEPS:
            raise self._diverged(
                f"{_MAX_BAD_STEPS} steps in a row up to step {self.step} had a non-finite loss or "
                "gradient"
            )

    def _diverged(self, what: str) -> TrainingDiverged:
        good_one = "none yet" if self.saved is None else self._folder(self.saved)
        return TrainingDiverged(
            f"{what}: lower optim.lr={self.config.optim.lr} or lengthen "
            f"schedule.warmup_steps={self.config.schedule.warmup_steps}; "
            f"last good checkpoint: {good_one}"
        )

    def _note_skipped(self, where: str) -> None:
        self.skipped += 1
        self.metrics.write({"kind": "skipped", "where": where, **self._batch_read()})

    def _batch_read(self) -> dict[str, Any]:
        """刚做完的一步与它读的各行从哪里起。"""
        return {"step": self.step, "rows": self.feed.places(self.step - 1)}

    def _note_spike(self, reason: str) -> None:
        skip = self.config.spike == "skip"
        if skip:
            self._note_skipped(reason)
        else:
            self.metrics.write({"kind": "spike", "where": reason, **self._batch_read()})
        done = "no update" if skip else "updated all the same (spike=warn)"
        self.progress.tell(f"warning: step {self.step} is a spike: {reason}: {done}")

    def _validate(self) -> None:
        if self.validation is None:
            return
        found: dict[str, float] = {}
        for one in (self.validation, *self.others):
            lost = one.loss(self.model, self.runtime, self._asked_to_stop)
            if lost is None:
                return
            found[one.name] = lost
        loss = found.pop(self.validation.name)
        memory = peak_memory(self.runtime.device)
        self.metrics.write({"kind": "memory", "step": self.step, **memory})
        row = {"kind": "eval", "step": self.step, "loss": loss, "tokens": self.tokens}
        row |= {"measured": self.validation.measured, **self.validation.numbers}
        if self.others:
            row["set"] = self.validation.name
            row["sets"] = {
                other.name: {
                    "loss": found[other.name], "measured": other.measured, **other.numbers
                }
                for other in self.others
            }  # fmt: skip
        self.metrics.write(row)
        better = self.step > 0 and (self.best is None or loss < self.best[1])
        also = "".join(f", {name} {value:.4f}" for name, value in found.items())
        self.progress.evaluated(self.step, loss, (" (best so far)" if better else "") + also)
        if better:
            self._save()
            if self.saved == self.step and self._mark_best(self.step, loss):
                self.best = (self.step, loss)
                self._prune()
        # 记数在存盘之后：检查点是验证之前的状态，续训会再验证一遍、再记一次。
        if self.step > 0:
            self.patience.note(self.step, loss)
            if self.patience.over:
                self.progress.tell(self.patience.said)

    def _asked_to_stop(self) -> bool:
        self.stop.agree()
        return self.stop.requested is not None

    def _mark_best(self, step: int, loss: float) -> bool:
        assert self.validation is not None
        measured = self.validation.measured
        return self._tidy(
            "record the best checkpoint",
            lambda: mark_best(self.run_folder, step, loss, measured),
        )

    def _sample(self) -> None:
        if self.config.sample_tokens == 0 or self._sampled == self.step:
            return
        self._sampled = self.step
        how = "" if self.answers else f", temperature {SAMPLING.temperature:g}"
        if self.answers is None:
            self.last_sample = sample_text(self.model, self.tokenizer, self.config, self.runtime)
        else:
            self.last_sample = self._answer(self.answers)
        self.metrics.write({"kind": "sample", "step": self.step, "text": self.last_sample})
        self.progress.tell(f"--- sample at step {self.step}{how} ---\n{self.last_sample}\n---")

    def _answer(self, answers: Answers) -> str:
        """问几个验证集里的问题，记下答完了几个；返回头一个的问与答。"""
        row = answers.row(self.model, self.runtime)
        self.metrics.write({"kind": "answers", "step": self.step, **row})
        self.progress.tell(answers_line(row))
        first = row["shown"][0]
        return f"{first['asked']}{first['said']}"

    def _save(self, must: bool = False) -> None:
        """存下此刻；途中存不下（盘满）只警告，训练继续，旧检查点还在。

        坏了的权重不存：存下会把旧的好检查点挤掉。
        """
        if self.saved == self.step:
            return
        bad = self.engine.first_bad_weight()
        if bad is not None:
            raise self._diverged(f"the weight {bad} is not finite after step {self.step}")
        self.metrics.sync()
        try:
            with self.stop.saving():
                self.engine.save(
                    lambda: write_checkpoint(self.run_folder, self.step, self._fill), self.optimizer
                )
        except OSError as error:
            last = "none yet" if self.saved is None else self._folder(self.saved)
            said = f"no checkpoint at step {self.step}: {error}"
            if must:
                raise OSError(
                    f"{said}; last good one: {last}; free some space, then --resume auto"
                ) from error
            self.progress.tell(f"warning: {said}; training goes on; last good one: {last}")
            return
        self.saved = self.step
        self._prune()

    def _prune(self) -> None:
        last, every, saved = self.config.keep_last, self.config.keep_every, self.saved

        def stays(step: int, folder: Path) -> bool:
            return kept_every(step, every) or kept_every(step, keep_every_of(folder))

        self._tidy("delete old checkpoints", lambda: prune(self.run_folder, last, stays, saved))

    def _tidy(self, what: str, action: Callable[[], object]) -> bool:
        """检查点已存好之后的杂事：做不成（盘满、网络盘上删不掉）只提醒，不毁掉训练。"""
        try:
            self.world.first(action)
        except OSError as error:
            self.progress.tell(f"warning: cannot {what}: {error}; training goes on")
            return False
        return True

    def _fill(self, folder: Path) -> dict[str, str]:
        facts = {
            "step": self.step,
            "tokens": self.tokens,
            "windows": self.feed.windows(self.step),
            "skipped": self.skipped,
            "bad_in_a_row": self._bad_in_a_row,
            "spikes": self.spikes.state(),
            "patience": self.patience.state(),
            "ending": self.ending.state(),
            "reference": self.reference,
            "data": self.data.fingerprint,
            "device": str(self.runtime.device),
            "precision": str(self.runtime.dtype),
            "summing": self.engine.summing,
            "ranks": self.world.size,
        }
        known = self.engine.write(folder, self.optimizer)
        write_state(folder, self.config, facts)
        self.tokenizer.save(folder)
        if self.template is not None:
            self.template.save(folder)
        return known

    def restore_counters(self, state: dict[str, Any], own: bool) -> None:
        """接上计数；own 说明检查点就在本训练的文件夹里。"""
        self.step, self.tokens = state["step"], state["tokens"]
        self.feed = self.feed.moved(self.step, windows_read(state))
        self.skipped, self._bad_in_a_row = state["skipped"], state["bad_in_a_row"]
        # 早先的检查点没有尖峰的历史。
        self.spikes.load(state.get("spikes", {}))
        self.patience.load(state.get("patience", {}))
        self.ending.load(state.get("ending", {}), self.step)
        self.saved = self.step if own else None

    def restore_best(self, tell: Tell) -> None:
        """最好的检查点若已不在或损坏，就当没有，由下一次验证重立。

        它的损失若是在别的窗口上量的（换了 eval_batches、批大小或验证集），就重量一遍：
        不同的尺子量出的两个数不能比。会动模型的权重。
        """
        best = self.world.first(lambda: sound_best(self.run_folder, tell))
        self.best = None if best is None else (best.step, best.loss)
        if best is None or self.validation is None or best.measured == self.validation.measured:
            return
        self.engine.read_weights(self._folder(best.step))
        loss = self.validation.loss(self.model, self.runtime)
        assert loss is not None
        now = self.validation.measured
        self.world.first(lambda: mark_best(self.run_folder, best.step, loss, now))
        self.best = (best.step, loss)
        tell(measured_again(best, loss, now))

    def compile(self, tell: Tell) -> str:
        """按配置编译各块；返回一句说明。试跑用下一批，不留痕迹。"""

        def probe() -> None:
            rows = self.config.rows_at_once
            batch = self.feed.batch(self.step, slice(0, rows))
            self.model.train()
            accumulate(self.model, batch, rows, self.runtime, self.engine.objective)

        if self.engine.why_not_compile is not None and self.config.compile != "off":
            return f"off: {self.engine.why_not_compile}"
        try:
            how, device = self.config.compile, self.runtime.device
            return compile_blocks(self.model, how, device, probe, tell, self.world)
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def _folder(self, step: int) -> Path:
        return step_folder(self.run_folder, step)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
