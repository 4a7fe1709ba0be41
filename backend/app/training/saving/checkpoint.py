"""检查点文件夹：先写在旁边，同步到盘，再改名；凡读必先按清单核对。

一个检查点是 `step-00001000/`，其中 manifest.json 记每个文件的字节数与 sha256。
就地覆盖会丢掉整个训练：保存途中被杀，旧文件已毁、新文件未成。没有校验和则发现不了翻转的一位。
本文件不导入 torch，也不知道文件里是什么；内容见 state.py。
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.common.files import sha256_file, sync_folder, write_atomic, written_beside
from app.common.tell import Tell

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
BEST = "best.json"
MODEL_FILES = ("config.json", "model.safetensors")

_STEP = re.compile(r"step-(\d{8,})")
_TEMPORARY = (".tmp-", ".trash-")
_MANIFEST_LIMIT = 1 << 20


class CheckpointError(ValueError):
    """检查点不可用；信息里点名文件与原因。"""


@dataclass(frozen=True)
class Skipped:
    """被跳过的检查点和原因。"""

    path: Path
    reason: str


def step_folder(run: Path, step: int) -> Path:
    return run / f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """名字不是 step-NNNNNNNN 的（副本、临时文件夹）一律不算检查点。"""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def list_steps(run: Path) -> list[tuple[int, Path]]:
    """按步数升序；只看名字，不核对内容。"""
    if not run.is_dir():
        return []
    found = [(step_of(entry), entry) for entry in run.iterdir()]
    return sorted((step, entry) for step, entry in found if step is not None)


def write_checkpoint(run: Path, step: int, fill: Callable[[Path], object]) -> Path:
    """原子地写一个检查点；fill 收到一个空文件夹，把文件直接写在里面。

    Returns:
        写好的文件夹。返回之后，断电也不会失去它。
    Raises:
        FileExistsError: 这一步已有一个完好的检查点。
        OSError: 写不下去；已有的检查点不受影响，半成品已删去或留待 clear_leftovers。
    """
    target = step_folder(run, step)
    if os.path.lexists(target):
        _set_aside(target)
    temporary = run / f".tmp-{target.name}-{os.getpid()}"
    with written_beside(target, temporary):
        fill(temporary)
        _write_manifest(temporary, step)
    return target


def _write_manifest(folder: Path, step: int) -> None:
    entries = {}
    for path in sorted(folder.iterdir()):
        _sync_file(path)
        entries[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    manifest = {"schema_version": SCHEMA_VERSION, "step": step, "files": entries}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    _sync_file(folder / MANIFEST)
    sync_folder(folder)


def _set_aside(target: Path) -> None:
    """坏掉的同名检查点改名留证，不删除；完好的绝不覆盖。"""
    try:
        verify_checkpoint(target)
    except CheckpointError:
        number = 1
        while os.path.lexists(aside := target.with_name(f"damaged-{target.name}-{number}")):
            number += 1
        os.replace(target, aside)
        return
    raise FileExistsError(f"{target} already holds a valid checkpoint: it is never overwritten")


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """按清单核对每个文件的大小与 sha256，返回清单。

    Raises:
        CheckpointError: 缺文件、多文件、坏字节、符号链接、版本不识，或根本不是检查点。
    """
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a symbolic link: give the real folder")
    manifest = _read_manifest(folder)
    files: dict[str, dict[str, Any]] = manifest["files"]
    for entry in folder.iterdir():
        if entry.is_symlink():
            raise CheckpointError(f"{entry} is a symbolic link: a checkpoint holds plain files")
        # 点开头的文件（.DS_Store 之类）从不被加载，不算混入。
        if entry.name not in files and entry.name != MANIFEST and entry.name[0] != ".":
            raise CheckpointError(f"{entry} is not listed in {MANIFEST}: remove it")
    for name, facts in files.items():
        _verify_file(folder / name, facts)
    return manifest


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{folder} has no {MANIFEST}: the checkpoint is incomplete")
    if path.stat().st_size > _MANIFEST_LIMIT:
        raise CheckpointError(f"{path} is larger than {_MANIFEST_LIMIT} bytes")
    try:
        manifest = json.loads(path.read_bytes())
        version, files = manifest["schema_version"], manifest["files"]
        if not all(os.path.basename(name) == name and name for name in files):
            raise ValueError("file names must be plain names")
        sizes = [(int(entry["bytes"]), str(entry["sha256"])) for entry in files.values()]
        step = int(manifest["step"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a checkpoint manifest: {error}") from None
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema_version={version!r}, this version reads {SCHEMA_VERSION}"
        )
    if not sizes or step_of(folder) not in (None, step):
        raise CheckpointError(f"{path} says step {step} but the folder is {folder.name}")
    return manifest


def _verify_file(path: Path, facts: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if (size := path.stat().st_size) != facts["bytes"]:
        raise CheckpointError(f"{path} has {size} bytes, {MANIFEST} says {facts['bytes']}")
    if sha256_file(path) != facts["sha256"]:
        raise CheckpointError(f"{path} does not match its sha256: the file is damaged")


def find_latest(run: Path) -> tuple[Path | None, list[Skipped]]:
    """最新的完好检查点，和比它新却被跳过的那些（附原因）。"""
    skipped = []
    for _, folder in reversed(list_steps(run)):
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            skipped.append(Skipped(folder, str(error)))
        else:
            return folder, skipped
    return None, skipped


def mark_best(run: Path, step: int, loss: float) -> None:
    """记下验证损失最低的检查点（只记名字，不复制）。"""
    write_atomic(run / BEST, (json.dumps({"step": step, "loss": loss}) + "\n").encode())


def read_best(run: Path) -> tuple[int, float] | None:
    """(步数, 损失)；没有记录则 None。

    Raises:
        CheckpointError: 记录读不懂。
    """
    path = run / BEST
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_bytes())
        return int(data["step"]), float(data["loss"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): delete it") from None


def prune(run: Path, keep_last: int) -> None:
    """只留最新 keep_last 个和最好的那个；先改名再删，删到一半也不会被当成检查点。"""
    best = read_best(run)
    keep = {step for step, _ in list_steps(run)[-keep_last:]} | ({best[0]} if best else set())
    for step, folder in list_steps(run):
        if step not in keep and not folder.is_symlink():
            trash = run / f".trash-{folder.name}-{os.getpid()}"
            os.replace(folder, trash)
            shutil.rmtree(trash)


def clear_leftovers(run: Path) -> list[Path]:
    """删去被杀的进程留下的半成品；只可在持有运行锁时调用。"""
    found = [entry for entry in run.iterdir() if entry.name.startswith(_TEMPORARY)]
    for entry in found:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return found


def resolve_checkpoint(path: str | Path, tell: Tell = print) -> Path:
    """把用户给的路径变成一个可加载的模型文件夹。

    可以是：训练文件夹（最新的完好检查点）、`训练文件夹/best`、某一步的文件夹、导出的模型文件夹。

    Raises:
        CheckpointError: 路径不存在、什么也不是，或损坏；信息里有原因。
    """
    path = Path(path)
    if path.name == "best" and not path.exists() and path.parent.is_dir():
        return _resolve_best(path.parent)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist: give a run, checkpoint or model folder")
    if step_of(path) is not None or (path / MANIFEST).exists():
        verify_checkpoint(path)
        return path
    if all((path / name).is_file() for name in MODEL_FILES):
        return path
    folder, skipped = find_latest(path)
    for item in skipped:
        tell(f"skipped {item.path.name}: {item.reason}")
    if folder is None:
        why = "all its checkpoints are damaged" if skipped else "it holds no checkpoint"
        raise CheckpointError(
            f"{path} cannot be loaded: {why} and no {' + '.join(MODEL_FILES)}; "
            "give a run folder, a step-NNNNNNNN folder or a saved model"
        )
    return folder


def _resolve_best(run: Path) -> Path:
    best = read_best(run)
    if best is None:
        raise CheckpointError(f"{run} has no best checkpoint yet: give {run} for its newest one")
    folder = step_folder(run, best[0])
    verify_checkpoint(folder)
    return folder


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
