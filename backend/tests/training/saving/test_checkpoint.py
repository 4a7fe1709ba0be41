"""检查点文件夹的故障试验：被杀、断在每个系统调用之间、翻转、截断、写不下、混入与缺失。"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.training.saving import checkpoint as ck

BACKEND = Path(__file__).parents[3]


def save(run: Path, *steps: int, size: int = 4096) -> None:
    def fill(folder: Path) -> None:
        data = random.Random(step).randbytes(size)
        (folder / "model.safetensors").write_bytes(data)
        (folder / "state.json").write_text(json.dumps({"step": step}))
        (folder / "optim.safetensors").write_bytes(data[::-1])

    for step in steps:
        ck.write_checkpoint(run, step, fill)


def newest(run: Path) -> int | None:
    folder = ck.find_latest(run)[0]
    return None if folder is None else ck.step_of(folder)


def test_round_trip_and_order(tmp_path: Path) -> None:
    save(tmp_path, 2, 10, 123456789)
    assert [step for step, _ in ck.list_steps(tmp_path)] == [2, 10, 123456789]
    assert newest(tmp_path) == 123456789
    assert ck.verify_checkpoint(ck.step_folder(tmp_path, 10))["step"] == 10
    assert not list(tmp_path.glob(".tmp-*"))


SAVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from app.training.saving.checkpoint import write_checkpoint, list_steps, prune
run = Path(sys.argv[1])
data = bytes(range(256)) * 4096 * 4
step = max([step for step, _ in list_steps(run)], default=0)
def fill(folder):
    for name in ("a.bin", "b.bin", "c.bin"):
        (folder / name).write_bytes(data)
while True:
    step += 1
    write_checkpoint(run, step, fill)
    print(step, flush=True)
    prune(run, 2)
"""


@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_while_saving(tmp_path: Path, kills: int) -> None:
    """A1：杀在任意时刻，最后一个被确认的步（或更新的）必能读出。"""
    source, delay = random.Random(kills), 0.05
    acknowledged = 0
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path), str(BACKEND)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        start = time.perf_counter()
        acknowledged = int(process.stdout.readline())
        first = time.perf_counter() - start
        delay = min(delay, first)
        time.sleep(source.uniform(0, 3 * delay))
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split("\n")
        process.wait()
        process.stdout.close()
        # 最后一行可能没有写完：没有换行就不算确认。
        acknowledged = max([acknowledged, *(int(line) for line in rest[:-1])])
        found = newest(tmp_path)
        assert found is not None and found >= acknowledged
    ck.clear_leftovers(tmp_path)
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_stop_between_system_calls(tmp_path: Path) -> None:
    """A2：在第 k 次 fsync 或改名之前断电。"""
    died = 0
    for point in range(1, 100):
        run = tmp_path / str(point)
        save(run, 1, 2)
        child = os.fork()
        if child == 0:
            _die_at(point)
            save(run, 3)
            ck.prune(run, 1)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        # 半成品从不以正式的名字出现。
        assert newest(run) in (2, 3) and ck.find_latest(run)[1] == []
        if code == 0:
            assert newest(run) == 3 and len(ck.list_steps(run)) == 1
            break
        died += 1
        ck.clear_leftovers(run)
        assert all(ck.step_of(entry) for entry in run.iterdir())
    # 三个数据文件、清单、两次文件夹、一次改名、两次清理改名。
    assert died == 9


def _at(point: int, action):  # type: ignore[no-untyped-def]
    """(fsync, replace)，第 point 次调用改做 action。"""
    calls = 0

    def hooked(real):  # type: ignore[no-untyped-def]
        def call(*args):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            return action() if calls == point else real(*args)

        return call

    return hooked(os.fsync), hooked(os.replace)


def _die_at(point: int) -> None:
    os.fsync, os.replace = _at(point, lambda: os._exit(9))


def test_errors_between_system_calls(tmp_path: Path) -> None:
    """A2：第 k 次 fsync 或改名报错：不留半成品，最新的仍可读，同一步可以再存。"""

    def fail() -> None:
        raise OSError("Input/output error")

    failed = 0
    for point in range(1, 100):
        run = tmp_path / str(point)
        save(run, 1, 2)
        with pytest.MonkeyPatch.context() as patch:
            fsync, replace = _at(point, fail)
            patch.setattr(os, "fsync", fsync)
            patch.setattr(os, "replace", replace)
            try:
                save(run, 3)
                ck.prune(run, 1)
            except OSError:
                failed += 1
            else:
                break
        assert newest(run) in (2, 3) and ck.find_latest(run)[1] == []
        assert not [entry for entry in run.iterdir() if ck.step_of(entry) is None]
        save(run, 4)
        assert newest(run) == 4
    assert failed == 9


def test_bit_flips(tmp_path: Path) -> None:
    """A3：任何文件的任何一位（清单本身也在内）翻转都被发现，退到上一步，并点名。"""
    save(tmp_path, 1, 2)
    folder = ck.step_folder(tmp_path, 2)
    files, source = sorted(folder.iterdir()), random.Random(0)
    for number in range(100):
        path = files[number % len(files)]
        before = path.read_bytes()
        flipped = bytearray(before)
        flipped[source.randrange(len(flipped))] ^= 1 << source.randrange(8)
        path.write_bytes(flipped)
        found, skipped = ck.find_latest(tmp_path)
        if path.name == ck.MANIFEST and found == folder:
            # 清单里的空白不带信息；其余的位都必须被发现。
            assert json.loads(flipped) == json.loads(before)
        else:
            assert found == ck.step_folder(tmp_path, 1)
            assert [item.path for item in skipped] == [folder]
            assert path.name in skipped[0].reason or path.name == ck.MANIFEST
        path.write_bytes(before)
    assert newest(tmp_path) == 2


def test_truncation(tmp_path: Path) -> None:
    """A4"""
    save(tmp_path, 1, 2)
    folder = ck.step_folder(tmp_path, 2)
    files, source = sorted(folder.iterdir()), random.Random(1)
    for _ in range(50):
        path = source.choice(files)
        before = path.read_bytes()
        path.write_bytes(before[: source.randrange(len(before) - 1)])
        assert newest(tmp_path) == 1
        path.write_bytes(before)
    assert newest(tmp_path) == 2


def test_writing_fails(tmp_path: Path) -> None:
    """A5：盘满（以文件大小上限代替）时旧检查点不动，不留半成品。"""
    save(tmp_path, 1)
    source = random.Random(2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for _ in range(20):
        resource.setrlimit(resource.RLIMIT_FSIZE, (source.randrange(60_000), hard))
        try:
            with pytest.raises(OSError):
                save(tmp_path, 2, size=60_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert newest(tmp_path) == 1
        assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]
    save(tmp_path, 2, size=60_000)
    assert newest(tmp_path) == 2


def _symlink_inside(folder: Path) -> None:
    outside = folder.parent / "outside.bin"
    shutil.move(folder / "model.safetensors", outside)
    (folder / "model.safetensors").symlink_to(outside)


def _symlinked_folder(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    shutil.move(folder, elsewhere)
    folder.symlink_to(elsewhere, target_is_directory=True)


def _future_version(folder: Path) -> None:
    path = folder / ck.MANIFEST
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 99'))


def _renamed(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("step-00000003"))
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "optim.safetensors").unlink(), "optim.safetensors is missing"),
        (lambda f: (f / ck.MANIFEST).unlink(), "has no manifest.json"),
        (_future_version, "schema_version=99"),
        (_symlink_inside, "is a symbolic link"),
        (_symlinked_folder, "is a symbolic link"),
        (_renamed, "says step 2 but the folder is step-00000003"),
        (lambda f: (f / ck.MANIFEST).write_text("[" * 100_000), "not a checkpoint manifest"),
    ],
)
def test_bad_folders_are_refused(tmp_path: Path, damage, reason: str) -> None:  # type: ignore[no-untyped-def]
    """A6"""
    save(tmp_path, 1, 2)
    damage(ck.step_folder(tmp_path, 2))
    found, skipped = ck.find_latest(tmp_path)
    assert found == ck.step_folder(tmp_path, 1)
    assert len(skipped) == 1 and reason in skipped[0].reason


def test_manifest_cannot_point_outside(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = ck.step_folder(tmp_path, 1) / ck.MANIFEST
    path.write_text(path.read_text().replace('"state.json"', '"../state.json"'))
    with pytest.raises(ck.CheckpointError, match="plain names"):
        ck.verify_checkpoint(path.parent)


def test_odd_names_are_ignored(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in ("step-12-copy", "step-00000009 (copy)", ".tmp-step-00000009-1", "xstep-00000009"):
        shutil.copytree(ck.step_folder(tmp_path, 1), tmp_path / name)
    assert ck.find_latest(tmp_path) == (ck.step_folder(tmp_path, 1), [])
    (ck.step_folder(tmp_path, 1) / ".DS_Store").write_text("x")
    assert newest(tmp_path) == 1


LEFT_BEHIND = [
    ".DS_Store", "._model.safetensors", "Thumbs.db", "desktop.ini", ".nfs000000000012",
    "state.json~", ".state.json.swp", "notes.txt", "model (1).safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_extra_files_damage_nothing(tmp_path: Path, name: str) -> None:
    """多出来的文件、文件夹与链接都不算损坏，只说一句；少了、变了的才算。"""
    save(tmp_path, 1, 2)
    folder, told = ck.step_folder(tmp_path, 2), []
    (folder / name).write_text("x")
    assert ck.find_latest(tmp_path) == (folder, [])
    assert ck.resolve_checkpoint(tmp_path, told.append) == folder
    assert told == [f"note: {folder} also holds {name}: not part of the checkpoint, not read"]
    with pytest.raises(FileExistsError, match="never overwritten"):
        save(tmp_path, 2)
    (folder / "state.json").unlink()
    assert newest(tmp_path) == 1


def test_extra_folders_and_links_damage_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = ck.step_folder(tmp_path, 1)
    (folder / "__MACOSX").mkdir()
    (folder / ".#state.json").symlink_to("user@host.1234")
    assert ck.extra_files(folder) == [".#state.json", "__MACOSX"] and newest(tmp_path) == 1


def test_strays_in_the_run_folder_are_no_checkpoints(tmp_path: Path) -> None:
    """名字像的文件、补了零的副本、断掉的链接：不读，不算数，也不碍着保存与清理。"""
    save(tmp_path, 1)
    (tmp_path / "step-00000009").write_text("a file")
    shutil.copytree(ck.step_folder(tmp_path, 1), tmp_path / "step-000000001")
    (tmp_path / "step-00000007").symlink_to(tmp_path / "gone")
    (tmp_path / ".tmp-notes").write_text("not ours")
    (tmp_path / ".DS_Store").write_text("x")
    before = {path.name for path in tmp_path.iterdir()}
    assert ck.list_steps(tmp_path) == [(1, ck.step_folder(tmp_path, 1))]
    save(tmp_path, 2)
    ck.prune(tmp_path, 1)
    assert ck.clear_leftovers(tmp_path) == [] and newest(tmp_path) == 2
    after = {path.name for path in tmp_path.iterdir()}
    assert after == before - {"step-00000001"} | {"step-00000002"}


def test_pruning_spares_what_someone_put_there(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4)
    (ck.step_folder(tmp_path, 1) / "notes.txt").write_text("an evening's work")
    (ck.step_folder(tmp_path, 2) / ".DS_Store").write_text("x")
    ck.prune(tmp_path, 1)
    assert [step for step, _ in ck.list_steps(tmp_path)] == [1, 4]


def test_a_leftover_that_cannot_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """网络盘上还被占着的 .nfs… 删不掉：说一句，训练照常。"""

    def busy(path: Path) -> None:
        raise OSError(f"Device or resource busy: {path}")

    (tmp_path / ".trash-step-00000001-7").mkdir()
    monkeypatch.setattr(shutil, "rmtree", busy)
    told: list[str] = []
    ck.clear_leftovers(tmp_path, told.append)
    assert len(told) == 1 and "resource busy" in told[0] and "training goes on" in told[0]


def test_read_only_run_folder(tmp_path: Path) -> None:
    """A6：只读时写是一句 OSError，读仍可用；root 不受权限约束，所以在子进程里换身份。"""
    save(tmp_path, 1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            tmp_path.chmod(0o555)
            if os.getuid() == 0:
                for folder in (tmp_path, *tmp_path.parents):
                    if folder.stat().st_uid == 0 and folder.name.startswith(("pytest-", "popen-")):
                        folder.chmod(0o755)
                os.setuid(65534)
            try:
                save(tmp_path, 2)
            except PermissionError:
                code = 0 if newest(tmp_path) == 1 else 2
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    tmp_path.chmod(0o755)
    assert code == 0 and newest(tmp_path) == 1


def test_never_overwrites_and_keeps_the_damaged(tmp_path: Path) -> None:
    save(tmp_path, 5)
    with pytest.raises(FileExistsError, match="never overwritten"):
        save(tmp_path, 5)
    (ck.step_folder(tmp_path, 5) / "state.json").write_text("damaged")
    save(tmp_path, 5)
    assert newest(tmp_path) == 5
    assert (tmp_path / "damaged-step-00000005-1" / "state.json").read_text() == "damaged"


def test_prune_keeps_last_and_best(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, 5)
    ck.mark_best(tmp_path, 2, 1.5)
    ck.prune(tmp_path, 2)
    assert [step for step, _ in ck.list_steps(tmp_path)] == [2, 4, 5]
    assert ck.read_best(tmp_path) == (2, 1.5) and ck.best_measured(tmp_path) is None
    ck.mark_best(tmp_path, 2, 1.5, {"data": "d", "windows": 3, "context": 8})
    assert ck.read_best(tmp_path) == (2, 1.5)
    assert ck.best_measured(tmp_path) == {"data": "d", "windows": 3, "context": 8}
    (tmp_path / ck.BEST).write_text("{")
    with pytest.raises(ck.CheckpointError, match="delete it"):
        ck.read_best(tmp_path)


def test_pruning_counts_no_checkpoint_newer_than_the_one_just_saved(tmp_path: Path) -> None:
    """跳过坏的 80 从 40 续：80 不占 48 的名额，也不动它。"""
    save(tmp_path, 40, 80)
    (ck.step_folder(tmp_path, 80) / "state.json").write_text("damaged")
    ck.mark_best(tmp_path, 40, 1.5)
    save(tmp_path, 48)
    ck.prune(tmp_path, 1, saved=48)
    assert [step for step, _ in ck.list_steps(tmp_path)] == [40, 48, 80] and newest(tmp_path) == 48
    ck.mark_best(tmp_path, 48, 1.0)
    ck.prune(tmp_path, 1, saved=48)
    assert [step for step, _ in ck.list_steps(tmp_path)] == [48, 80]


def test_resolve(tmp_path: Path) -> None:
    run, told = tmp_path / "run", []
    with pytest.raises(ck.CheckpointError, match="does not exist"):
        ck.resolve_checkpoint(run)
    run.mkdir()
    with pytest.raises(ck.CheckpointError, match="holds no checkpoint"):
        ck.resolve_checkpoint(run)
    save(run, 1, 2)
    assert ck.resolve_checkpoint(run) == ck.step_folder(run, 2)
    with pytest.raises(ck.CheckpointError, match="no best checkpoint yet"):
        ck.resolve_checkpoint(run / "best")
    ck.mark_best(run, 1, 2.0)
    assert ck.resolve_checkpoint(run / "best") == ck.step_folder(run, 1)
    (ck.step_folder(run, 2) / "model.safetensors").write_bytes(b"")
    assert ck.resolve_checkpoint(run, told.append) == ck.step_folder(run, 1)
    assert len(told) == 1 and "model.safetensors has 0 bytes" in told[0]
    with pytest.raises(ck.CheckpointError, match="has 0 bytes"):
        ck.resolve_checkpoint(ck.step_folder(run, 2))
    exported = tmp_path / "exported"
    exported.mkdir()
    for name in ck.MODEL_FILES:
        (exported / name).write_text("{}")
    assert ck.resolve_checkpoint(exported) == exported


def test_needs_no_torch() -> None:
    code = "import app.training.saving.checkpoint, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=BACKEND).returncode == 0
