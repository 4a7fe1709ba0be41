"""从零开始的两个命令，只用标准库：

    python3 start.py         建环境、安装、准备语料、训练一个小模型、打印它写的东西
    python3 start.py test    在同一个环境里跑测试

再运行一次会接着上次做完的地方继续，不会重来。
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
BACKEND = ROOT / "backend"
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
CONSTRAINTS = BACKEND / "constraints.txt"

STEPS = (
    (
        "the data: the source of your Python's own standard library, cut into tokens",
        "gpt2 prepare --out data/stdlib",
    ),
    (
        "the training: about 3 minutes on 2 cores; Ctrl-C saves, the same command goes on",
        "gpt2 train --config quickstart --resume auto",
    ),
    (
        "what it writes: three methods, each up to its first blank line, at temperature 0.6",
        "gpt2 generate runs/quickstart/best --prompt 'def __init__(self' --num-samples 3 "
        r"--temperature 0.6 --max-new-tokens 200 --overflow slide --stop '\n\n'",
    ),
)
NEXT = (
    (
        "look inside: open http://127.0.0.1:8080 while this runs",
        "gpt2 serve runs/quickstart",
    ),
    (
        "ask it, from a second terminal while that runs",
        "curl http://127.0.0.1:8080/v1/completions -H 'Content-Type: application/json' "
        """-d '{"prompt": "class ", "max_tokens": 64, "temperature": 0.6}'""",
    ),
    (
        "change one part and compare, two seeds each, a few minutes",
        "gpt2 sweep --config quickstart --steps 150 --vary model.position=learned,rope "
        "--seeds 0 1 --out runs/position",
    ),
)

USAGE = """usage: python3 start.py [quickstart|test] [arguments for pytest]

  quickstart  (default) create .venv, install, prepare the default corpus, train a small
              model in about 3 minutes on 2 cores, print what it writes
  test        run the tests in the same environment"""


def main(argv: list[str]) -> int:
    command, rest = (argv[0], argv[1:]) if argv else ("quickstart", [])
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command not in ("quickstart", "test") or (rest and command != "test"):
        return fail(f"unknown arguments {argv}\n{USAGE}", 2)
    if sys.version_info < (3, 11):  # noqa: UP036 - 这里就是挡住旧 Python 的地方
        return fail(f"Python {sys.version.split()[0]} is too old: use 3.11 or newer", 2)
    try:
        create_environment()
        return quickstart() if command == "quickstart" else test(rest)
    except subprocess.CalledProcessError as error:
        return fail(f"{' '.join(map(str, error.cmd))} ended with {error.returncode}", 1)
    except KeyboardInterrupt:
        return 130


def create_environment() -> None:
    if PYTHON.exists():
        return
    say(f"creating the environment in {VENV}")
    existed = VENV.exists()
    try:
        run([sys.executable, "-m", "venv", VENV])
    except BaseException as error:
        # venv 先放 bin/python、后装 pip：留下半个，下次就以为装好了。
        if not existed:
            shutil.rmtree(VENV, ignore_errors=True)
        if isinstance(error, subprocess.CalledProcessError):
            print("on Debian or Ubuntu: sudo apt install python3-venv python3-pip", file=sys.stderr)
        raise


def install(extras: str) -> None:
    """torch 先装、按 constraints 里的精确版本：让别的包去挑，可能换成另一个数 GB 的版本。"""
    inputs = (CONSTRAINTS.read_bytes(), (BACKEND / "pyproject.toml").read_bytes(), extras.encode())
    wanted = hashlib.sha256(b"\0".join(inputs)).hexdigest()
    stamp = VENV / f"installed{extras.replace(',', '-')}"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    say("installing (the first time downloads torch)")
    pip = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pins = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    run([*pip, next(line for line in pins if line.startswith("torch=="))])
    run([*pip, "--constraint", CONSTRAINTS, "--editable", f"{BACKEND}{extras}"])
    stamp.write_text(wanted)


def quickstart() -> int:
    install("[serve]")
    for number, (what, line) in enumerate(STEPS, start=1):
        say(f"{number} of {len(STEPS)}, {what}\n    {line}")
        run([PYTHON, "-m", "app.cli", *shlex.split(line)[1:]])
    activate = BIN / "activate"
    say("done. Curves, speed and samples: open runs/quickstart/report.html in a browser")
    print(f"\nNext, in this folder:\n    source {activate.relative_to(ROOT)}")
    for what, line in NEXT:
        print(f"{what}\n    {line}")
    print("An hour with all of it: docs/first-hour.md. The tests: python3 start.py test")
    return 0


def test(arguments: list[str]) -> int:
    install("[dev,hf,export,eval,serve,tensorboard]")
    # 张量都很小：两个进程各一个线程，比一个进程两个线程快。
    run([PYTHON, "-m", "pytest", *(arguments or ["-n", "2"])], cwd=BACKEND)
    return 0


def run(command: list[object], cwd: Path = ROOT) -> None:
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)


def fail(text: str, code: int) -> int:
    print(f"error: {text}", file=sys.stderr)
    return code


def say(text: str) -> None:
    print(f"==> {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
