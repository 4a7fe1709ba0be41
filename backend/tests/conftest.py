"""测试共用：真实输入所在的文件夹（没有就带着说明跳过），与 hypothesis 的设定。"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# 张量都很小：多线程只会互相等待，一个线程快得多。
torch.set_num_threads(1)
# CI 里用固定的例子，失败可重现，个数减半（总是同样的）；本地照常随机。
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True, max_examples=50)
settings.register_profile("local", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """检出目录旁的 shared/data：tinyshakespeare 与真正的 GPT-2 词表。"""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: this check needs the real input files")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _signals_are_heard() -> None:
    """在后台或 nohup 里跑测试时，有的信号被忽略，子进程也继承；那样就试不出什么。"""
    for name, handler in (
        ("SIGINT", signal.default_int_handler), ("SIGTERM", signal.SIG_DFL),
        ("SIGHUP", signal.SIG_DFL),
    ):  # fmt: skip
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _the_same_start() -> None:
    """种子与线程数：CTranslate2 会改这个进程的 OpenMP 线程数，而多一个线程，位就不同。"""
    torch.manual_seed(0)
    torch.set_num_threads(1)
