"""prepare 可续：真的 kill -9，之后接着做，与没被杀过的逐字节相同。"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .helpers import tree, write_corpus

BACKEND = Path(__file__).parents[2]


# 真的 kill -9：子进程在第 k 次同步、改名或删除之前杀死自己（k < 0：从不），
# 或由父进程在随机的时刻杀死。
CHILD = """
import os, signal, sys
from pathlib import Path
from app.data import prepare, split
from app.data.reading.sources import Reading, Sources

source, out, kind, limit = sys.argv[1:5]
prepare.CHECKPOINT_CHARS, prepare._BATCH_CHARS, split.UNIT_CHARS = 40_000, 10_000, 3_000
count = 0

def guarded(function):
    def call(*args, **kwargs):
        global count
        if count == int(limit):
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return function(*args, **kwargs)
    return call

os.fsync, os.replace, Path.unlink = map(guarded, (os.fsync, os.replace, Path.unlink))
spec = prepare.TokenizerSpec(kind, 300 if kind == "bpe" else None)
prepare.prepare(Sources([source]), Path(out), spec, shard_tokens=30_000)
print("calls", count)
"""


def child(source: Path, out: Path, kind: str, limit: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(source), str(out), kind, str(limit)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=BACKEND,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode, output


def check_kills(tmp_path: Path, kind: str, choose: Callable[[int], list[int]]) -> None:
    source = write_corpus(tmp_path / "in")
    _, output = finish(child(source, tmp_path / "whole", kind, -1))
    wanted, calls = tree(tmp_path / "whole"), int(output.split("calls")[1])
    assert calls > 30
    resumed = 0
    for limit in choose(calls):
        out = tmp_path / f"killed-{limit}"
        assert finish(child(source, out, kind, limit))[0] == -signal.SIGKILL
        code, output = finish(child(source, out, kind, -1))
        assert code == 0
        resumed += "resuming after" in output
        assert tree(out) == wanted, f"killed before call {limit}"
    assert resumed > 0


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_at_some_points(tmp_path: Path) -> None:
    points = random.Random(1)
    check_kills(tmp_path, "bytes", lambda n: sorted({*points.sample(range(n), 8), n - 1, n - 4}))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_killed_at_every_point(kind: str, tmp_path: Path) -> None:
    check_kills(tmp_path, kind, lambda n: list(range(n)))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """同一个文件夹一再被杀，直到做完；与没被杀过的逐字节相同。"""
    source = write_corpus(tmp_path / "in", 20_000)
    start = time.monotonic()
    finish(child(source, tmp_path / "whole", "bytes", -1))
    usual = time.monotonic() - start
    moments, kills = random.Random(2), 0
    while kills < 10:
        process = child(source, tmp_path / "out", "bytes", -1)
        time.sleep(moments.uniform(0.2, 1.0) * usual)
        process.kill()
        code, _ = finish(process)
        kills += 1
        if code == 0:
            break
    finish(child(source, tmp_path / "out", "bytes", -1))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
