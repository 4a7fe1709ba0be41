"""报告：训练途中就有，全由文件得来，脚本不会跑，坏了也不毁掉训练。"""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from app.common.memory import peak_memory
from app.data.batch import Batch
from app.models.transformer import GPT2Model
from app.training.report import run_page as report_module
from app.training.report.history import History
from app.training.report.metrics import METRICS, Metrics, read_metrics
from app.training.report.run_charts import speeds
from app.training.report.run_facts import FACTS, read_facts
from app.training.report.run_page import REPORT, Reporter, write_report
from app.training.step import accumulate
from app.training.watch.gradient_norms import gradient_norms

from ..conftest import Make, rows, train
from ..test_parts import CPU, tiny

BAD = "<script>alert('x')</script>&amp;<img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """标签都配对，记下文字与属性。"""

    VOID = {"meta", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def opened(run: Path | str) -> Page:
    return Page((Path(run) / REPORT).read_text(encoding="utf-8"))


def test_the_whole_page(make: Make) -> None:
    config = make(steps=12, eval_every=4, sample_every=6, sample_tokens=8, seed=5)
    result = train(config)
    page = opened(config.out)
    assert result.report == Path(config.out) / REPORT
    assert page.tags.count("figure") == 6 and page.tags.count("svg") >= 6
    assert "nothing measured yet" not in page.text
    for wanted in (
        "step 12 of 12", "384 tokens", "best validation loss", "fused AdamW", "token frequencies",
        "expected before training", "optim.lr", "block 0", "block 1", "embed", "tokens/s", "none",
    ):  # fmt: skip
        assert wanted in page.text
    assert [row["step"] for row in rows(config.out, "sample")] == [6, 12]
    assert page.tags.count("details") == 2
    assert rows(config.out, "sample")[-1]["text"].split()[0] in page.text
    assert page.links == []
    seed = re.search(
        r"<tr class=mark><td>seed</td><td>5</td><td>0</td>", (result.report).read_text()
    )
    assert seed is not None


def test_written_during_the_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """每次验证与保存都重画：看得到已做的步。"""
    monkeypatch.setattr(report_module, "_REST", 0.0)
    seen: list[str] = []
    plain = Reporter.sync

    def sync(self: Reporter) -> None:
        plain(self)
        seen.append(opened(self._run).text)

    monkeypatch.setattr(Reporter, "sync", sync)
    train(make(steps=6, eval_every=2, save_every=3))
    for step in (0, 2, 3, 4, 6):
        assert any(f"step {step} of 6" in text for text in seen)


def test_slow_pages_are_drawn_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """画一次用 2 秒：其后 100 秒之内不再画；结束时总要画。"""
    clock = [0.0]
    drawn: list[float] = []

    def slow(run: Path, history: History) -> None:
        drawn.append(clock[0])
        clock[0] += 2.0

    monkeypatch.setattr(report_module, "write_report", slow)
    monkeypatch.setattr(report_module.time, "perf_counter", lambda: clock[0])
    reporter = Reporter(tmp_path)
    for now in (0.0, 3.0, 50.0, 101.0, 102.0, 110.0):
        clock[0] = max(clock[0], now)
        reporter.sync()
    reporter.close()
    assert drawn == [0.0, 102.0, 110.0]


def test_hostile_texts_stay_text(make: Make) -> None:
    config = make(steps=5, eval_every=1)
    train(config)
    run = Path(config.out)
    with (run / METRICS).open("a") as file:
        for row in (
            {"kind": "sample", "step": 2, "text": BAD + "\ud800\x00 $x$"},
            {"kind": "skipped", "step": 2, "where": BAD, "rows": [1]},
            {"kind": BAD, "step": 2, BAD: BAD},
            {"kind": "groups", "step": 2, "norms": {BAD: 1.0, "block 0": None}},
        ):
            file.write(json.dumps(row) + "\n")
    facts = json.loads((run / FACTS).read_text())
    facts["plan"], facts["notes"] = [[BAD, BAD, BAD]], [BAD]
    (run / FACTS).write_text(json.dumps(facts))
    write_report(run)
    page = opened(run)
    assert not {"script", "img", "iframe", "link", "object"} & set(page.tags)
    assert page.text.count("alert('x')") >= 6
    assert "default-src 'none'" in (run / REPORT).read_text()


def test_rewritten_from_the_files_alone(make: Make) -> None:
    config = make(eval_every=2, sample_tokens=4)
    train(config)
    path = Path(config.out) / REPORT
    before = path.read_text()
    path.unlink()
    assert write_report(Path(config.out)) == path and path.read_text() == before
    assert not list(path.parent.glob("*.tmp"))


def test_damaged_files_become_warnings(make: Make) -> None:
    config = make()
    train(config)
    run = Path(config.out)
    (run / FACTS).write_text("{")
    (run / "run.yaml").write_text("steps: [")
    with (run / METRICS).open("a") as file:
        file.write('{"kind": "eval"}\n{"kind": "train", "step": 7, "loss": "x"}\nnull\n{"kind"')
    write_report(run)
    text = opened(run).text
    assert "facts.json cannot be read" in text and "run.yaml cannot be read" in text
    with pytest.raises(ValueError, match=r"facts.json cannot be read .*: delete it"):
        read_facts(run)


def test_an_empty_folder_gives_a_page(tmp_path: Path) -> None:
    write_report(tmp_path)
    assert opened(tmp_path).text.count("nothing measured yet") == 6


def test_a_failing_report_does_not_stop(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """C8：一句提醒，权重与没有失败时逐位相同。"""

    def broken(run: Path, history: History | None = None) -> Path:
        raise OSError(28, "No space left on device")

    config = make(steps=6, eval_every=2)
    whole = train(config)
    monkeypatch.setattr(report_module, "write_report", broken)
    told: list[str] = []
    monkeypatch.setattr(
        "app.training.report.progress.Progress.tell", lambda self, text: told.append(text)
    )
    other = train(config.replace(out=config.out + "-broken"))
    said = [text for text in told if REPORT in text]
    assert len(said) == 1 and "No space left" in said[0] and "training goes on" in said[0]
    name = "model.safetensors"
    assert (whole.checkpoint / name).read_bytes() == (other.checkpoint / name).read_bytes()


def test_resuming_repeats_nothing(make: Make) -> None:
    """样文、内存与各层的梯度也一步一行；层组的数与不间断的相同。"""
    changes = {"eval_every": 2, "sample_every": 2, "sample_tokens": 4, "save_every": 2}
    whole = make(steps=8, **changes)
    train(whole)
    config = make(steps=8, out=whole.out + "-broken", **changes)
    train(config)
    shutil.rmtree(Path(config.out) / "step-00000008")
    train(config.replace(resume="auto"))
    for kind in ("sample", "groups", "memory", "eval", "train"):
        wanted = [row["step"] for row in rows(whole.out, kind)]
        assert [row["step"] for row in rows(config.out, kind)] == wanted, kind
    for kind in ("sample", "groups"):
        assert rows(whole.out, kind) == rows(config.out, kind)


def test_group_norms_add_up_to_the_total() -> None:
    torch.manual_seed(0)
    model = GPT2Model(tiny(norm="pre", tie_weights=False)).double()
    ids = np.random.default_rng(0).integers(0, 13, (2, 3, 6))
    accumulate(model, Batch(ids[0], ids[1]), 3, CPU)
    norms = gradient_norms(model.named_parameters())
    assert list(norms) == ["embed", "block 0", "block 1", "ln_f", "lm_head"]
    total = float(
        nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    )
    assert sum(v * v for v in norms.values()) ** 0.5 == pytest.approx(total, rel=1e-5)
    block = torch.cat([p.grad.flatten() for p in model.h["1"].parameters() if p.grad is not None])
    assert norms["block 1"] == pytest.approx(float(block.norm()), rel=1e-5)
    assert gradient_norms(GPT2Model(tiny()).named_parameters()) == {}


def test_groups_are_measured_before_clipping(make: Make) -> None:
    config = make(eval_every=2)
    train(config)
    norms = {row["step"]: row["norms"] for row in rows(config.out, "groups")}
    assert sorted(norms) == [1, 3, 5]
    for row in rows(config.out):
        if row["step"] in norms:
            total = sum(value**2 for value in norms[row["step"]].values()) ** 0.5
            assert total == pytest.approx(row["grad_norm"], rel=1e-5)
            assert total > config.optim.grad_clip


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(64 << 20, dtype=torch.uint8)
    after = peak_memory(torch.device("cpu"))
    assert after.keys() == before.keys() == {"resident"}
    assert after["resident"] >= before["resident"] > held.numel() // 8


def test_what_is_done_again_after_a_resume_is_there_once(tmp_path: Path) -> None:
    """检查点 2 是验证、样文、收尾之前的状态：那几行会再写一遍，旧的先删去。"""
    path = tmp_path / METRICS
    again = ("eval", "memory", "sample", "answers", "ending")
    for _ in range(2):
        with Metrics(path, 2, print) as metrics:
            kept = [(row["kind"], row["step"]) for row in read_metrics(path)]
            for kind in again:
                metrics.write({"kind": kind, "step": 2})
            metrics.write({"kind": "train", "step": 3})
        assert kept == []
    with Metrics(path, 3, print):
        kinds = [row["kind"] for row in read_metrics(path)]
    assert kinds == [*again, "train"]


def test_history_reads_on_from_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    history = History(path)
    history.refresh()
    assert history.last_step == 0
    with Metrics(path, 0, print) as metrics:
        metrics.write({"kind": "train", "step": 1, "loss": 2.0})
        metrics.write({"kind": "eval", "step": 1, "loss": 3.0})
        history.refresh()
        metrics.write({"kind": "train", "step": 2, "loss": float("nan")})
        metrics.sync()
        history.refresh()
    with path.open("a") as file:
        file.write('{"kind": "train", "step": 3')
        file.flush()
        history.refresh()
        assert history.last_step == 2
        file.write(', "loss": 1.5}\n')
    history.refresh()
    history.refresh()
    assert history.column("step").tolist() == [1, 2, 3]
    np.testing.assert_equal(history.column("loss"), [2.0, np.nan, 1.5])
    assert [values.tolist() for values in history.evals()] == [[1.0], [3.0]]


def test_speed_is_tokens_over_seconds(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    with Metrics(path, 0, print) as metrics:
        for step in range(1, 7):
            seconds = 1.0 if step % 2 else 3.0
            row = {"kind": "train", "step": step, "loss": 1.0, "tokens": 100 * step}
            metrics.write(row | {"seconds": seconds})
    history = History(path)
    history.refresh()
    step, speed = speeds(history, most=3)
    assert step.tolist() == [2, 4, 6] and speed.tolist() == [50.0, 50.0, 50.0]
