"""控制台的编码写不出的字符不结束任何命令，也不改变退出码；输出写不下则不算成功。"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from app.cli.main import main
from app.data.prepare import TokenizerSpec, prepare
from app.data.reading.sources import Sources
from app.models.transformer import create_gpt2_model
from app.training.saving.checkpoint import list_steps

BACKEND = Path(__file__).parents[2]
HARD = "你好🎉é"
# 每一步的样文都有它：提示就是它。
RUN = """\
out: {out}
data: {{folder: {data}}}
model: {{n_layer: 1, n_head: 2, n_embed: 16, context_size: 16, dropout: 0.0}}
schedule: {{warmup_steps: 1}}
steps: {steps}
batch_size: 2
eval_every: 0
sample_every: 2
sample_tokens: 4
sample_prompt: "{prompt}"
save_every: 2
compile: "off"
device: cpu
"""


class Done(NamedTuple):
    """一个命令结束之后。"""

    code: int
    out: bytes
    err: bytes


@pytest.fixture
def gpt2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Done]:
    """在 tmp_path 里跑一个命令，两条流都是这个编码、严格的，如 PYTHONIOENCODING 所设。"""

    def call(encoding: str, *argv: object) -> Done:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding, "strict") for _ in range(2)]
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            code = main(list(map(str, argv)))
            out, err = (stream.detach().getvalue() for stream in map(_flushed, streams))
        return Done(code, out, err)

    return call


def _flushed(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    stream.flush()
    return stream


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """名字与内容都有难写的字符：一份数据、一个模型、一个有专家的模型、一个任务。"""
    root = tmp_path_factory.mktemp("console") / f"{HARD}"
    root.mkdir()
    (root / "text.txt").write_text((HARD + " and so on\n") * 60, encoding="utf-8")
    spec = TokenizerSpec("chars")
    prepare(Sources([root / "text.txt"]), root / "data", spec, val_fraction=0.2, say=lambda _: None)
    from app.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(root / "data" / "train")
    for name, more in (("dense", {}), ("experts", {"moe_num_experts": 2})):
        torch.manual_seed(0)
        model = create_gpt2_model(
            vocab_size=tokenizer.vocab_size, context_size=16, n_layer=1, n_head=2, n_embed=16,
            dropout=0.0, **more,
        )  # fmt: skip
        model.save_pretrained(root / name)
        tokenizer.save(root / name)
    record = {"prompt": HARD, "choices": ["so", "on"], "answer": 0}
    (root / "task.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", "utf-8")
    return root


COMMANDS = {
    "prepare": (0, ["prepare", "PLACE/text.txt", "--out", "NEW/data", "--tokenizer", "chars"]),
    "generate": (0, ["generate", "PLACE/dense", "--prompt", HARD, "--max-new-tokens", 5]),
    "generate refused": (2, ["generate", "PLACE/dense", "--prompt", "漢"]),
    "generate nowhere": (2, ["generate", f"{HARD}-none", "--prompt", "a"]),
    "eval": (0, ["eval", "PLACE/dense", "--data", "PLACE/data", "--task", "PLACE/task.jsonl"]),
    "plan": (0, ["plan", "--out", f"NEW/{HARD}", "--data.folder", "PLACE/data"]),
    "show": (0, [
        "show", "routing", "--run", "PLACE/experts", "--text", HARD, "--out", f"NEW/{HARD}.png",
    ]),
    "upcycle": (0, ["upcycle", "PLACE/dense", "--out", f"NEW/{HARD}"]),
    "experts": (0, [
        "experts", "PLACE/experts", "--average", "--data", "PLACE/data", "--out", f"NEW/{HARD}",
    ]),
    "verify": (0, [
        "verify", "--model.n-layer", 1, "--model.n-embed", 16, "--model.n-head", 2,
        "--model.vocab-size", 31, "--model.context-size", 16,
    ]),
    "unknown": (2, [HARD]),
}  # fmt: skip


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_as_it_should(gpt2, place, tmp_path, name, encoding):
    code, words = COMMANDS[name]
    argv = [str(word).replace("PLACE", str(place)).replace("NEW", str(tmp_path)) for word in words]
    done = gpt2(encoding, *argv)
    assert done.code == code, done.err
    assert b"codec" not in done.err
    if name == "generate":
        assert done.out.startswith(HARD.encode(encoding, "backslashreplace"))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_run_whose_sample_cannot_be_shown_goes_on_and_resumes(gpt2, place, tmp_path, encoding):
    file = tmp_path / "run.yaml"
    for steps, more in ((4, []), (6, ["--resume", "auto"])):
        text = RUN.format(out=tmp_path / "out", data=place / "data", steps=steps, prompt=HARD)
        file.write_text(text, encoding="utf-8")
        done = gpt2(encoding, "train", "--config", file, *more)
        assert done.code == 0, done.err
        assert list_steps(tmp_path / "out")[-1][0] == steps
        assert HARD.encode(encoding, "backslashreplace") in done.out
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    samples = [row for row in rows if row["kind"] == "sample"]
    assert len(samples) >= 3 and all(row["text"].startswith(HARD) for row in samples)
    assert HARD in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_process_told_by_its_environment(place, tmp_path):
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "generate", place / "dense", "--prompt", HARD],
        cwd=BACKEND, env=env, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(rb"\u4f60\u597d\U0001f389\xe9")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("argv", [["show"], []])
def test_output_that_cannot_be_written_is_no_success(argv):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "app.cli", *argv],
            cwd=BACKEND, stdout=full, stderr=subprocess.PIPE, timeout=120,
        )  # fmt: skip
    assert done.returncode != 0
