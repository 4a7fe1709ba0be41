"""docs/first-hour.md：每条命令都认得（平时），整页按次序用玩具的尺寸跑一遍（slow）。

换掉的只有尺寸：配方 quickstart 换成小模型、几步；TOY 里的几处。其余一字不改。
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from app.cli.main import COMMANDS, main, parse_command
from app.cli.shared.trained import load_trained
from app.serving.served import serve_model
from app.training.sweep import expand, parse_switch
from tests.serving.conftest import Running, serving

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "first-hour.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINES = [x for kind, text in BLOCK.findall(PAGE) if kind == "bash" for x in text.splitlines()]
HOME = "http://127.0.0.1:8080"
TOY = [
    ("gpt2 prepare", "gpt2 prepare library --tokenizer bpe --vocab-size 300"),
    (r"--steps \d+", "--steps 4 --schedule.warmup-steps 1 --eval-every 2"),
    (r"--model\.n-layer \d+", "--model.n-layer 3"),
    (r"--max-new-tokens \d+", "--max-new-tokens 8"),
    # 这么小的模型，快慢只是噪声。
    ("gpt2 quantize", "gpt2 quantize --allow-slower"),
]


def load_start() -> ModuleType:
    spec = importlib.util.spec_from_file_location("start", ROOT / "start.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


START = load_start()


def check_line(line: str) -> None:
    """不认得的词、坏的选项、不存在的文件都在这里报错。"""
    match shlex.split(line):
        case ["gpt2", name, *rest]:
            assert name in COMMANDS, line
            args = parse_command(name, rest)
            if name == "sweep":
                expand(args.train, [parse_switch(one) for one in args.vary], args.seeds or (0,))
        case ["curl", url, "-H", _, "-d", body]:
            assert url.startswith(HOME + "/v1/") and json.loads(body)["max_tokens"] > 0
        case ["pip", "install", "-e", what]:
            folder, _, extras = what.rstrip("]").partition("[")
            known = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())
            assert set(extras.split(",")) <= set(known["project"]["optional-dependencies"])
        case ["cp", *sources, _]:
            assert all((ROOT / one).is_file() for one in sources), line
        case ["python3", "start.py"] | ["source", ".venv/bin/activate"] | ["mkdir", _]:
            pass
        case _:
            raise ValueError(f"the test does not know {line!r}: teach it or use another command")


@pytest.mark.parametrize("line", dict.fromkeys(LINES))
def test_every_command_of_the_page_is_understood(line: str) -> None:
    check_line(line)


def test_what_the_quickstart_runs_and_proposes_is_understood(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(START, "create_environment", lambda: None)
    monkeypatch.setattr(START, "install", lambda extras: None)
    monkeypatch.setattr(START, "run", lambda words: ran.append([str(word) for word in words]))
    assert START.main([]) == 0
    said = capsys.readouterr().out
    lines = [line for _, line in (*START.STEPS, *START.NEXT)]
    assert [shlex.split(line)[1:] for line in lines[:3]] == [words[3:] for words in ran]
    for line in lines:
        assert f"    {line}\n" in said
        check_line(line)


@pytest.mark.parametrize(
    "line", ["gpt2 sweep --config quickstart --vary model.norm=pst --out runs/x", "gtp2 train",
             "curl http://127.0.0.1:8080/v1/completions -H a -d {", "pip install -e 'backend[no]'",
             "cp nowhere.md my-text", "gpt2 show head --run runs/x"],
)  # fmt: skip
def test_a_wrong_command_is_seen(line: str) -> None:
    with pytest.raises((ValueError, AssertionError)):
        check_line(line)


def toy(line: str) -> str:
    for pattern, with_what in TOY:
        line = re.sub(pattern, with_what, line)
    return line


def toy_recipe(folder: Path) -> None:
    recipe: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    recipe["model"] |= {"n_layer": 2, "n_head": 2, "n_embed": 32, "context_size": 32}
    recipe["schedule"]["warmup_steps"] = 1
    recipe |= {"steps": 4, "batch_size": 4, "eval_every": 2, "eval_batches": 2, "save_every": 2}
    recipe |= {"sample_every": 2, "sample_tokens": 8}
    folder.mkdir()
    (folder / "quickstart.yaml").write_text(yaml.safe_dump(recipe))


class Reader:
    """照着页面做的人：一行一行做，curl 问的是上一行 serve 起的那个。"""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, held: contextlib.ExitStack) -> None:
        self.held, self.served = held, Running("", None, {})  # type: ignore[arg-type]
        monkeypatch.setattr(START, "create_environment", lambda: None)
        monkeypatch.setattr(START, "install", lambda extras: None)
        monkeypatch.setattr(START, "run", lambda words: self.do(shlex.join(["gpt2", *words[3:]])))

    def do(self, line: str) -> None:
        words = shlex.split(toy(line))
        words = [one for word in words for one in (sorted(glob.glob(word)) or [word])]
        match words:
            case ["gpt2", "serve", *rest]:
                (name,) = parse_command("serve", rest).models
                self.held.close()
                trained = load_trained(name, "cpu")
                model = serve_model(Path(name).name, trained.model, trained.tokenizer, rows=2)
                self.served = self.held.enter_context(serving([model]))
            case ["gpt2", *rest]:
                assert main(rest) == 0, line
            case ["python3", "start.py"]:
                assert START.main([]) == 0
            case ["curl", *rest]:
                self.ask([word.replace(HOME, self.served.url) for word in rest])
            case ["mkdir", folder]:
                Path(folder).mkdir()
            case ["cp", *sources, folder]:
                for source in sources:
                    # 开头就够。
                    text = (ROOT / source).read_text(encoding="utf-8")[:2000]
                    (Path(folder) / Path(source).name).write_text(text, encoding="utf-8")
            case _:
                check_line(line)

    @staticmethod
    def ask(words: list[str]) -> None:
        if shutil.which("curl") is None:
            return
        whole = ["curl", "-sS", "--noproxy", "*", *words]
        done = subprocess.run(whole, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0 and '"choices":' in done.stdout, done.stdout + done.stderr
        print(done.stdout)


@pytest.mark.slow
def test_the_whole_hour_at_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    toy_recipe(tmp_path / "recipes")
    library = tmp_path / "library"
    library.mkdir()
    for name in ("shlex", "glob", "textwrap", "string", "heapq", "bisect", "stat", "queue"):
        shutil.copy(importlib.import_module(name).__file__ or "", library)
    said = io.StringIO()
    with contextlib.ExitStack() as held, contextlib.redirect_stdout(said):
        reader = Reader(monkeypatch, held)
        for line in LINES:
            reader.do(line)
    sys.stderr.write(said.getvalue())
    check_shown(said.getvalue())
    for picture in re.findall(r"images/hour-(\w+)\.png", PAGE):
        assert (tmp_path / "runs" / f"{picture}.png").read_bytes().startswith(b"\x89PNG"), picture


def check_shown(said: str) -> None:
    """页面上印着的每一行（数字除外）都以程序真的印出的词开头。"""
    heads = {line.split()[0] for line in said.splitlines() if line.split()}
    for kind, text in BLOCK.findall(PAGE):
        for line in text.splitlines() if kind == "text" else ():
            first = line.split()[0]
            assert first in heads or not first.isalpha(), f"nothing printed begins like {line!r}"
