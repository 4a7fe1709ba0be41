"""out/prepare.json：这个文件夹属于哪一条命令、做到了哪里；别人的文件一个也不碰。"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from app.common.files import write_atomic

SCHEMA_VERSION = 1
JOURNAL_FILE = "prepare.json"
LOCK_FILE = "prepare.lock"
_OUR_FILES = re.compile(
    r"(tokens-\d{5}\.bin|(index|scored)\.npy|(meta|chat|examples|tokenizer|tokenizer_meta)\.json)(\.tmp)?"
    r"|(index|scored)\.tmp"
    # DPO 的训练记在数据旁边的（training/objectives/reference.py）
    r"|reference-[\w.-]+\.npy(\.tmp)?"
)


def save_journal(out: Path, journal: dict[str, Any]) -> None:
    data = json.dumps(journal, indent=2) + "\n"
    write_atomic(out / JOURNAL_FILE, data.encode("ascii"))


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """同一时刻只有一个 `gpt2 prepare` 写 out（没有就建）。"""
    from filelock import FileLock, Timeout

    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{out}: another `gpt2 prepare` is writing there: wait for it, or choose another --out"
        ) from None
    try:
        check_folder(out)
        yield
    finally:
        lock.release()


def write_once(
    out: Path, command: dict[str, Any], write: Callable[[], object], say: Callable[[str], object]
) -> None:
    """整个一次写完的 out：write 做完才算数；同一条命令已做完就只说一句。

    Raises:
        ValueError: out 里有别的东西，或不是同一条命令。
    """
    journal: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "finished": False,
    }
    with locked(out):
        if (out / JOURNAL_FILE).exists():
            journal = read_journal(out / JOURNAL_FILE, journal)
        if journal["finished"]:
            say(f"{out} is already prepared from these sources: nothing to do")
            return
        save_journal(out, journal)
        write()
        save_journal(out, {**journal, "finished": True})


def check_folder(out: Path) -> None:
    """别人的文件一个也不碰。"""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file: choose another --out")
    ours = {JOURNAL_FILE, JOURNAL_FILE + ".tmp", LOCK_FILE}
    if (out / JOURNAL_FILE).exists():
        ours |= {"train", "val"}
    foreign = [p for p in out.iterdir() if p.name not in ours]
    for side in ("train", "val"):
        if side in ours and (out / side).is_dir():
            foreign += [p for p in (out / side).iterdir() if not _OUR_FILES.fullmatch(p.name)]
    if foreign:
        raise ValueError(
            f"{out} holds {min(foreign)}, which `gpt2 prepare` did not write: choose another --out"
        )


def read_journal(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """读回日志；命令或内容不同就点名拒绝。"""
    try:
        journal = json.loads(path.read_bytes())
        version, command = journal["schema_version"], journal["command"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not readable ({error}): choose another --out") from None
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path}: schema_version={version!r} but this version writes {SCHEMA_VERSION}: "
            "choose another --out"
        )
    before, now = _flat(command), _flat(fresh["command"])
    differences = [
        f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if differences:
        raise ValueError(
            f"{path.parent} belongs to another `gpt2 prepare` ({'; '.join(differences)}): "
            "repeat that command, or choose another --out"
        )
    return journal


def _flat(command: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in command.items() if k != "content"} | {
        f"content.{k}": v for k, v in command.get("content", {}).items()
    }
