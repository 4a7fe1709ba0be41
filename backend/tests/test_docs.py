"""文档：两种语言的代码块与图片相同，README 的 Python 能跑，命令存在，链接有着落。"""

from __future__ import annotations

import io
import re
import shlex
import shutil
from pathlib import Path

import pytest

from app.cli.main import COMMANDS, main
from tests.training.conftest import write_dataset

ROOT = Path(__file__).parents[2]
ENGLISH = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*[!N].md")),
]
PAIRS = [(path, path.with_suffix(".zh-CN.md")) for path in ENGLISH]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)\)")


def blocks(path: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0].name)
def test_both_languages_have_the_same_code_and_pictures(pair: tuple[Path, Path]) -> None:
    english, chinese = pair
    assert blocks(english) == blocks(chinese)
    pictures = [re.findall(r"!\[.*?\]\((.*?)\)", p.read_text(encoding="utf-8")) for p in pair]
    assert pictures[0] == pictures[1]
    tables = [re.findall(r"\d+\.\d+", p.read_text(encoding="utf-8")) for p in pair]
    assert tables[0] == tables[1], "the figures differ"


def test_every_link_leads_somewhere() -> None:
    for path in [p for pair in PAIRS for p in pair]:
        for target in LINK.findall(path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = [text for kind, text in blocks(ROOT / "README.md") if kind == "python"]
    names: dict[str, object] = {}
    exec(code, names)
    assert names["logits"].shape == (2, 16, 1000)  # type: ignore[attr-defined]
    assert (tmp_path / "my-model" / "model.safetensors").exists()


def attention_guide(compiled: bool) -> None:
    """指南的 Python 按次序在同一个命名空间里跑；编译 FlexAttention 的那一段可选。"""
    names: dict[str, object] = {}
    for kind, text in blocks(ROOT / "docs" / "attention.md"):
        if kind == "python" and (compiled or "torch.compile" not in text):
            exec(text, names)
    assert names["tokens"]


def test_the_python_of_the_attention_guide_runs() -> None:
    attention_guide(compiled=False)


def test_the_python_of_the_moe_guide_runs() -> None:
    names: dict[str, object] = {}
    for kind, text in blocks(ROOT / "docs" / "moe.md"):
        if kind == "python":
            exec(text, names)
    assert names["load"].shape == (3, 8)  # type: ignore[attr-defined]


def test_the_python_of_the_quantization_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for kind, text in blocks(ROOT / "docs" / "quantization.md"):
        if kind == "python":
            exec(text, names)
    assert 0 < names["difference"] < 0.05  # type: ignore[operator]


@pytest.mark.slow
def test_the_commands_of_the_adapter_guide_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_dataset(Path("data/letters"))
    start = (
        "train --data.folder data/letters --out runs/mine --steps 20 --schedule.warmup-steps 2 "
        "--model.n-layer 2 --model.n-embed 32 --model.n-head 2 --model.context-size 32"
    )
    assert main(shlex.split(start)) == 0
    (shell,) = [text for kind, text in blocks(ROOT / "docs" / "adapters.md") if kind == "bash"]
    for line in shell.splitlines():
        assert main(shlex.split(line)[1:]) == 0, line


@pytest.mark.slow
def test_the_commands_of_the_fine_tuning_guide_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """除了 serve（不会自己停下）；chat 读管道。"""
    monkeypatch.chdir(tmp_path)
    Path("mail").mkdir()
    for number in range(20):
        Path(f"mail/{number}.txt").write_text(f"a cat sat on the mat and then {number % 2} ran\n")
    (questions,) = [t for kind, t in blocks(ROOT / "docs" / "finetune.md") if kind == "json"]
    Path("questions.jsonl").write_text(questions * 10)
    start = (
        "train --data.folder data/bytes --out runs/first --steps 2 --schedule.warmup-steps 1 "
        "--model.n-layer 1 --model.n-embed 32 --model.n-head 2 --model.context-size 128"
    )
    assert main(["prepare", "mail", "--out", "data/bytes", "--tokenizer", "bytes"]) == 0
    assert main(shlex.split(start)) == 0
    Path("models").mkdir()
    (checkpoint,) = Path("runs/first").glob("step-*")
    shutil.copytree(checkpoint, "models/gpt2")
    for kind, text in blocks(ROOT / "docs" / "finetune.md"):
        for line in text.splitlines() if kind == "bash" else ():
            words = shlex.split(line.split("<")[0])[1:]
            if words[0] == "serve":
                continue
            monkeypatch.setattr("sys.stdin", io.StringIO("When do you open?\n"))
            assert main(words) == 0, line


@pytest.mark.slow
def test_the_whole_attention_guide_runs() -> None:
    attention_guide(compiled=True)


def test_every_command_of_the_readme_exists() -> None:
    shell = "\n".join(text for kind, text in blocks(ROOT / "README.md") if kind == "bash")
    commands = [shlex.split(line) for line in shell.splitlines() if line.startswith("gpt2 ")]
    assert {words[1] for words in commands} == set(COMMANDS)


NAMED = re.compile(r"`((?:\w+/)+test_\w+\.py)::(test_\w+)`")


def test_every_fault_test_exists() -> None:
    """docs/faults.md 点名的每个试验都在，两种语言点的一样。"""
    pair = [ROOT / "docs" / f"faults{end}.md" for end in ("", ".zh-CN")]
    named = [NAMED.findall(path.read_text(encoding="utf-8")) for path in pair]
    assert named[0] == named[1] and len(named[0]) > 40
    for file, name in named[0]:
        text = (ROOT / "backend" / "tests" / file).read_text(encoding="utf-8")
        assert f"\ndef {name}(" in text, f"{file}::{name}"
    counts = [re.findall(r"\| (\d+) \|", path.read_text(encoding="utf-8")) for path in pair]
    assert counts[0] == counts[1]
