"""重组之前（提交 3225a70）写下的文件夹：装得起，续得上，写出的一样。

哪些逐位比，哪些不：
- 装入的权重与文件里的，原地续训与分出去续训的结果：总是逐位比。
- 与旧代码记下的 logits、损失、末尾的权重：算术相同时逐位比（records.arithmetic：torch 版本、CPU
  能力与一小段纯 torch 训练的位都相同）；否则 logits 与损失按容差比，权重不比。所以在别的 CPU 上，
  只差末位的改动这里看不出来。续训与从头的一次也只在那时才逐位相等：检查点里已有旧机器的末位。
- 同一份权重贪心写出的词元与文字：总是全等；写记录时已拒绝最好的两个词元几乎打平的提示。

文件夹是 write_fixtures.py 写的；先解到临时文件夹，再在那里用。
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from app.cli.main import main
from app.models.transformer import GPT2Model

from .records import arithmetic, from_hex, logits_hex, measure

FIXTURES = Path(__file__).with_name("fixtures")
RECORDED = json.loads((FIXTURES / "recorded.json").read_text(encoding="utf-8"))
SAME = RECORDED["arithmetic"] == arithmetic()
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
LOSS_TOLERANCE = 1e-3


def unpack(name: str, folder: Path) -> Path:
    with tarfile.open(FIXTURES / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def close(now: Tensor, before: Tensor) -> None:
    """算术相同就逐位比。"""
    torch.testing.assert_close(now, before, **({"rtol": 0, "atol": 0} if SAME else TOLERANCE))


def check(now: dict[str, Any], before: dict[str, Any]) -> None:
    """now 由 measure 量出；词表可以少了导出时补的那几个。"""
    assert now["greedy_ids"] == before["greedy_ids"]
    logits, wanted = (from_hex(one["logits"], one["vocab"]) for one in (now, before))
    close(logits, wanted[:, : now["vocab"]])


def generated(folder: Path, capsys: pytest.CaptureFixture[str], prompt: str, new: int) -> str:
    capsys.readouterr()
    argv = ["generate", str(folder), "--prompt", prompt, "--greedy", "--max-new-tokens", str(new)]
    assert main(argv) == 0
    return capsys.readouterr().out


@dataclass(frozen=True)
class Trained:
    """一个旧的训练文件夹，续到底之后（run/）；旁边是分出去续的（branch/）与从头的（straight/）。"""

    home: Path
    recorded: dict[str, Any]
    before: list[str]

    @property
    def stopped_at(self) -> int:
        return self.recorded["stopped_at"]

    def end(self, run: str) -> Path:
        return self.home / run / f"step-{self.recorded['steps']:08d}"

    def lines(self, run: str) -> list[str]:
        return (self.home / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()

    def rows(self, run: str) -> list[dict[str, Any]]:
        """旧代码记下的那几种行、那几个键。"""
        keys = {row["kind"]: row.keys() for row in self.recorded["rows"]}
        rows = [row for row in map(json.loads, self.lines(run)) if row["kind"] in keys]
        return [{key: row[key] for key in keys[row["kind"]]} for row in rows]


@pytest.fixture(scope="module", params=list(RECORDED["runs"]))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    home = unpack(request.param, tmp_path_factory.mktemp(request.param))
    before = (home / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    with pytest.MonkeyPatch.context() as patch:
        # run.yaml 里的路径相对于当时的当前文件夹。
        patch.chdir(home)
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        for how in (
            ["--resume", "run", "--out", "branch"],
            ["--resume", "auto"],
            ["--out", "straight"],
        ):
            assert main(["train", "--config", "run/run.yaml", *how]) == 0
    return Trained(home, RECORDED["runs"][request.param], before)


def test_resuming_in_place_and_branching_off_agree(trained: Trained) -> None:
    for name in ("model.safetensors", "optim.safetensors"):
        here, there = (load_file(trained.end(run) / name) for run in ("run", "branch"))
        assert here.keys() == there.keys()
        for key, value in there.items():
            assert torch.equal(here[key], value), f"{name}: {key}"
    rows = [row for row in trained.rows("run") if row["step"] > trained.stopped_at]
    assert rows == [row for row in trained.rows("branch") if row["step"] > trained.stopped_at]


def test_a_resumed_run_goes_on_and_does_not_begin_again(trained: Trained) -> None:
    """之前各步的行原样还在，连用时也没有变：从头再来会换掉它们。"""

    def early(lines: list[str]) -> list[str]:
        rows = [json.loads(line) for line in lines]
        return [
            line
            for line, row in zip(lines, rows, strict=True)
            if row["kind"] == "train" and row["step"] <= trained.stopped_at
        ]

    assert len(early(trained.before)) == trained.stopped_at
    assert early(trained.lines("run")) == early(trained.before)


@pytest.mark.parametrize("run", ["run", "straight"])
def test_a_run_ends_as_the_old_code_did(
    run: str, trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    """续到底的与从头的；每步的损失、梯度、学习率，验证与样文，末尾的权重与它写的文字。"""
    now, before = trained.rows(run), trained.recorded["rows"]
    assert [(row["kind"], row["step"]) for row in now] == [
        (row["kind"], row["step"]) for row in before
    ]
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in (now, before)]
    assert losses[0] == pytest.approx(losses[1], rel=LOSS_TOLERANCE)
    if not SAME:
        # 权重不比：梯度本该为零的参数（键的偏置），AdamW 把舍入的噪声放大成整步。
        return
    assert now == before
    weights = load_file(trained.end(run) / "model.safetensors")
    wanted = load_file(trained.home / "end.safetensors")
    assert weights.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(weights[key], value), key
    facts = trained.recorded["checkpoint"]
    text = generated(trained.home / run, capsys, facts["prompt"], len(facts["greedy_ids"]))
    assert text == trained.recorded["end_text"]


@pytest.mark.parametrize("name", list(RECORDED["runs"]))
def test_a_checkpoint_loads(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """检查点与训练文件夹：同样的权重、logits、词元与文字；只读，不改动任何文件。"""
    run, facts = unpack(name, tmp_path) / "run", RECORDED["runs"][name]
    files = content(run)
    folder = run / f"step-{facts['stopped_at']:08d}"
    model = GPT2Model.from_pretrained(folder)
    held = load_file(folder / "model.safetensors")
    assert model.state_dict().keys() == held.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, held[key]), key
    wanted = facts["checkpoint"]
    check(measure(model, wanted["prompt_ids"]), wanted)
    for place in (run, run / "best", folder):
        new = len(wanted["greedy_ids"])
        assert generated(place, capsys, wanted["prompt"], new) == wanted["text"]
    assert content(run) == files


@pytest.mark.parametrize("name", list(RECORDED["models"]))
def test_a_model_folder_loads(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, wanted = unpack("models", tmp_path) / name, RECORDED["models"][name]
    model = GPT2Model.from_pretrained(folder)
    check(measure(model, wanted["prompt_ids"]), wanted)
    new = len(wanted["greedy_ids"])
    assert generated(folder, capsys, wanted["prompt"], new) == wanted["text"]
    # 再存一次：旧的键一个不少，值都没有变（新的版本可以添键）。
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()
    was, now = (
        json.loads((place / "config.json").read_text(encoding="utf-8"))
        for place in (folder, tmp_path / "again")
    )
    assert was.items() <= {key: now[key] for key in was}.items()


def test_prepare_knows_its_finished_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """同样的命令再来一次：认出已经做完，一个字节也不改；另做一份，词元也相同。"""
    monkeypatch.chdir(unpack("dense", tmp_path))
    files = content(Path("data"))
    for out in ("data", "fresh"):
        assert main(["prepare", "text.txt", "--out", out, "--tokenizer", "chars"]) == 0
        now = content(Path(out))
        assert {name: now[name] for name in files} == files


def test_the_backbone_reads_an_own_code_export(tmp_path: Path) -> None:
    wanted = RECORDED["own_code"]
    model = GPT2Model.from_pretrained(unpack("own_code", tmp_path))
    check(measure(model, wanted["prompt_ids"]), wanted)


OUTSIDE = """
import json, sys


class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "app":
            raise ImportError("blocked: " + name)


sys.meta_path.insert(0, Block())
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained("own", trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model)
ids = torch.tensor([json.loads(sys.argv[1])])
with torch.no_grad():
    logits = model(ids).logits[0].tolist()
made = model.generate(ids, max_new_tokens=int(sys.argv[2]), do_sample=False)
print(json.dumps({"logits": logits, "greedy_ids": made[0, ids.shape[1] :].tolist()}))
"""


@pytest.mark.slow
def test_an_own_code_export_runs_without_this_package(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    unpack("own_code", tmp_path / "own")
    wanted = RECORDED["own_code"]
    given = [json.dumps(wanted["prompt_ids"]), str(len(wanted["greedy_ids"]))]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE, *given],
        cwd=tmp_path, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    logits = torch.tensor(found["logits"])
    assert logits.shape[-1] == wanted["vocab"]
    check({**found, "vocab": wanted["vocab"], "logits": logits_hex(logits)}, wanted)
