"""默认语料：正在运行的 Python 自带的标准库源码。

真实的文本，不用下载，没有许可问题。只取 .py；略去第三方包、测试（Debian 另行打包，有的
机器没有）和随机器而变的构建配置，所以同一个 Python 版本在各处给出相同或几乎相同的语料。
"""

from __future__ import annotations

import sysconfig
from pathlib import PurePosixPath

from app.data.reading.sources import Reading, Sources

_EXCLUDED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "lib-dynload",
}


def stdlib_excluded(path: str) -> bool:
    """path：相对标准库根的路径。"""
    name = PurePosixPath(path).name
    return (
        name in _EXCLUDED_FOLDERS
        or name.startswith(("_sysconfigdata", "config-"))
        or name == "sitecustomize.py"
    )


def stdlib_sources() -> Sources:
    """标准库源码，每个文件一篇文档，按路径排序。"""
    return Sources(
        [sysconfig.get_paths()["stdlib"]],
        Reading(suffixes=(".py",)),
        exclude=stdlib_excluded,
        description=f"Python {sysconfig.get_python_version()} standard library source",
    )
