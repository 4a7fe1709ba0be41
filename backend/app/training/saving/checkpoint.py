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
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.common.console import say
from app.common.files import sha256_file, sync_folder, write_atomic, written_beside
from app.common.tell import Tell

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
BEST = "best.json"
MODEL_FILES = ("config.json", "model.safetensors")
# 一套适配器，也是一个可加载的模型：原模型由它旁边的 base.json 找到。
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

_STEP = re.compile(r"step-(\d{8,})")
# 只认自己起的名字：别的程序的 .tmp-… 不是我们的，不删。
_TEMPORARY = re.compile(r"\.(tmp|trash)-(step-\d+|metrics\.jsonl)-\d+")
# 文件管理器、编辑器与网络盘随手留下的：不是谁的心血，可以随检查点一起删。
_CLUTTER = {
    ".ds_store", ".directory", ".fseventsd", ".gitkeep", ".ipynb_checkpoints", ".localized",
    ".spotlight-v100", ".trashes", "$recycle.bin", "__macosx", "desktop.ini", "ehthumbs.db",
    "thumbs.db",
}  # fmt: skip
_CLUTTER_STARTS = ("._", ".#", ".fuse_hidden", ".goutputstream", ".nfs", ".~lock")
_CLUTTER_ENDS = ("~", ".swo", ".swp")
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
    """名字不恰是我们写的 step-NNNNNNNN 的（副本、临时文件夹）一律不算检查点。"""
    match = _STEP.fullmatch(folder.name)
    if match is None or folder.name != step_folder(folder.parent, int(match[1])).name:
        return None
    return int(match[1])


def is_clutter(name: str) -> bool:
    """是不是文件管理器、编辑器或网络盘留下的（.DS_Store、._x、.nfs…、Thumbs.db、x~）。"""
    name = name.lower()
    return name in _CLUTTER or name.startswith(_CLUTTER_STARTS) or name.endswith(_CLUTTER_ENDS)


def list_steps(run: Path) -> list[tuple[int, Path]]:
    """按步数升序；只看名字与它是不是文件夹，不核对内容。"""
    if not run.is_dir():
        return []
    found = [(step_of(entry), entry) for entry in run.iterdir() if entry.is_dir()]
    return sorted((step, entry) for step, entry in found if step is not None)


def write_checkpoint(
    run: Path, step: int, fill: Callable[[Path], Mapping[str, str] | None]
) -> Path:
    """原子地写一个检查点；fill 收到一个空文件夹，把文件直接写在里面。

    fill 可以返回边写边算好了的 {文件: sha256}，那些就不再读一遍。

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
        _write_manifest(temporary, step, fill(temporary) or {})
    return target


def _write_manifest(folder: Path, step: int, known: Mapping[str, str]) -> None:
    entries = {}
    for path in sorted(folder.iterdir()):
        _sync_file(path)
        sha256 = known.get(path.name) or sha256_file(path)
        entries[path.name] = {"bytes": path.stat().st_size, "sha256": sha256}
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


def verify_checkpoint(folder: Path, only: Collection[str] = ()) -> dict[str, Any]:
    """按清单核对每个文件的大小与 sha256，返回清单。only：只核对这几个；空 = 全部。

    清单之外多出来的东西从不加载，也不算损坏：为一个 .DS_Store 丢掉几十步才是损失。

    Raises:
        CheckpointError: 缺文件、坏字节、符号链接、版本不识，或根本不是检查点。
    """
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a symbolic link: give the real folder")
    manifest = _read_manifest(folder)
    files: dict[str, dict[str, Any]] = manifest["files"]
    for name in only or files:
        if name not in files:
            raise CheckpointError(f"{folder / MANIFEST} does not list {name}")
        _verify_file(folder / name, files[name])
    return manifest


def extra_files(folder: Path) -> list[str]:
    """不属于这个检查点的名字，按字母排。

    Raises:
        CheckpointError: 清单读不懂。
    """
    known = {*_read_manifest(folder)["files"], MANIFEST}
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in known)


def tell_extra(folder: Path, tell: Tell) -> None:
    """检查点里混有别的文件就说一句：它们不读，也不妨碍。"""
    if extra := extra_files(folder):
        tell(f"note: {folder} also holds {', '.join(extra)}: not part of the checkpoint, not read")


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
    if path.is_symlink():
        raise CheckpointError(f"{path} is a symbolic link: a checkpoint holds plain files")
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


def mark_best(run: Path, step: int, loss: float, measured: Mapping[str, Any] | None = None) -> None:
    """记下验证损失最低的检查点（只记名字，不复制），连同这个数是在什么上量的。"""
    data = {"step": step, "loss": loss} | ({"measured": dict(measured)} if measured else {})
    write_atomic(run / BEST, (json.dumps(data) + "\n").encode())


def read_best(run: Path) -> tuple[int, float] | None:
    """(步数, 损失)；没有记录则 None。

    Raises:
        CheckpointError: 记录读不懂。
    """
    found = _best(run)
    return None if found is None else found[:2]


def best_measured(run: Path) -> dict[str, Any] | None:
    """最好的那个数是在什么上量的；没有记录，或记录早于这一项，则 None。

    Raises:
        CheckpointError: 记录读不懂。
    """
    found = _best(run)
    return None if found is None else found[2]


def _best(run: Path) -> tuple[int, float, dict[str, Any] | None] | None:
    path = run / BEST
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_bytes())
        measured = data.get("measured")
        return int(data["step"]), float(data["loss"]), None if measured is None else dict(measured)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): delete it") from None


def kept_every(step: int, every: int) -> bool:
    """keep_every=every 时，不论后来又存了几个，这一步的都留着。"""
    return every > 0 and step % every == 0


def prune(
    run: Path,
    keep_last: int,
    stays: Callable[[int, Path], bool] = lambda step, folder: False,
    saved: int | None = None,
) -> None:
    """只留最新 keep_last 个、最好的那个，与 stays(步, 文件夹) 的；先改名再删，删到一半也不会被当成
    检查点。

    用户自己放进去的文件不能随着检查点消失：有这样文件的检查点留着。

    Args:
        saved: 刚存下的一步；比它新的是续训时跳过的坏检查点，不占名额，也不动。None = 最新的。
    """
    best = read_best(run)
    steps = [(n, folder) for n, folder in list_steps(run) if saved is None or n <= saved]
    keep = {step for step, _ in steps[-keep_last:]} | ({best[0]} if best else set())
    for step, folder in steps:
        if step in keep or stays(step, folder):
            continue
        if not folder.is_symlink() and not _holds_others_work(folder):
            trash = run / f".trash-{folder.name}-{os.getpid()}"
            os.replace(folder, trash)
            shutil.rmtree(trash)


def _holds_others_work(folder: Path) -> bool:
    try:
        return not all(is_clutter(name) for name in extra_files(folder))
    except CheckpointError:
        return False


def clear_leftovers(run: Path, tell: Tell = say) -> list[Path]:
    """删去被杀的进程留下的半成品；只可在持有运行锁时调用。删不掉的（网络盘占着）说一声。"""
    found = [entry for entry in run.iterdir() if _TEMPORARY.fullmatch(entry.name)]
    for entry in found:
        try:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        except OSError as error:
            tell(f"warning: cannot delete the leftover {entry}: {error}; training goes on")
    return found


def resolve_checkpoint(path: str | Path, tell: Tell = print) -> Path:
    """把用户给的路径变成一个可加载的模型文件夹。

    可以是：训练文件夹（最新的完好检查点）、`训练文件夹/best`、某一步的文件夹、导出的模型文件夹。

    Raises:
        CheckpointError: 路径不存在、什么也不是，或损坏；信息里有原因。
    """
    path = Path(path)
    if path.name == "best" and not path.exists() and path.parent.is_dir():
        return _resolve_best(path.parent, tell)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist: give a run, checkpoint or model folder")
    if step_of(path) is not None or (path / MANIFEST).exists():
        verify_checkpoint(path)
        tell_extra(path, tell)
        return path
    if any(all((path / name).is_file() for name in kind) for kind in (MODEL_FILES, ADAPTER_FILES)):
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
    tell_extra(folder, tell)
    return folder


def _resolve_best(run: Path, tell: Tell) -> Path:
    best = read_best(run)
    if best is None:
        raise CheckpointError(f"{run} has no best checkpoint yet: give {run} for its newest one")
    folder = step_folder(run, best[0])
    verify_checkpoint(folder)
    tell_extra(folder, tell)
    return folder


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
