"""一次训练住在哪里：复制、移走、改名、换一个当前文件夹，run.yaml 都认得自己的家。"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from app.cli.commands import train as command
from app.cli.shared.runfile import load_config
from app.cli.shared.trained import own_data
from app.training.config import DataConfig
from app.training.saving.checkpoint import list_steps
from app.training.saving.home import home_of, is_run

from ..conftest import Make, rows, train, write_dataset


@pytest.fixture
def project(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """一个项目：data/words 与训练了 6 步的 runs/a，run.yaml 里都是相对路径。"""
    root = tmp_path / "project"
    write_dataset(root / "data" / "words")
    monkeypatch.chdir(root)
    train(make(out="runs/a", data=DataConfig(folder="data/words"), save_every=2))
    return root


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def go(*argv: str) -> int:
    return command.run(command.parse(list(argv)))


def steps(run: Path) -> list[int]:
    assert [row["step"] for row in rows(run)] == list(range(1, len(rows(run)) + 1))
    return [step for step, _ in list_steps(run)]


def test_a_copy_is_a_run_of_its_own(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("runs/a", "runs/b")
    before = everything(project / "runs/a")
    assert go("--config", "runs/b/run.yaml", "--resume", "auto", "--steps", "9") == 0
    assert everything(project / "runs/a") == before
    assert steps(project / "runs/b")[-1] == 9 and len(rows(project / "runs/b")) == 9
    out = capsys.readouterr().out
    assert "note: the run is runs/b, where run.yaml lies (it says runs/a)" in out
    assert "resuming from runs/b/step-00000006 at step 6" in out
    assert yaml.safe_load(Path("runs/b/run.yaml").read_text())["out"] == "runs/b"


@pytest.mark.parametrize("where", [".", "runs", "runs/a", "elsewhere"])
def test_from_any_working_directory(
    project: Path, where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """从别处敲：训练与数据都还是原来的，当前文件夹里什么也不多。"""
    place = tmp_path / "elsewhere" if where == "elsewhere" else project / where
    place.mkdir(exist_ok=True)
    monkeypatch.chdir(place)
    before = set(os.listdir(place))
    run_file = os.path.relpath(project / "runs/a/run.yaml", place)
    assert go("--config", run_file, "--resume", "auto", "--steps", "8") == 0
    assert steps(project / "runs/a")[-1] == 8
    assert set(os.listdir(place)) - before == ({"step-00000008"} if where == "runs/a" else set())


@pytest.mark.parametrize("how", ["renamed", "moved away", "the project renamed", "a link to it"])
def test_moved_and_renamed(
    project: Path, how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = project / "runs/a"
    if how == "renamed":
        run = run.rename(project / "runs/better name")
    elif how == "moved away":
        run = Path(shutil.move(run, tmp_path / "archive"))
    elif how == "the project renamed":
        monkeypatch.chdir(tmp_path)
        run = project.rename(tmp_path / "thesis") / "runs/a"
    else:
        (tmp_path / "latest").symlink_to(run)
        run = tmp_path / "latest"
    if how != "the project renamed":
        monkeypatch.chdir(tmp_path)
    assert go("--config", str(run / "run.yaml"), "--resume", "auto", "--steps", "8") == 0
    assert steps(run)[-1] == 8 and len(rows(run)) == 8
    assert not (tmp_path / "runs").exists()


def test_never_anew_beside_checkpoints(project: Path) -> None:
    """没有 --resume：拒绝，哪怕 out 指着一个空处；文件改了名也一样。"""
    run = project / "runs/b"
    shutil.copytree("runs/a", run)
    data = yaml.safe_load((run / "run.yaml").read_text()) | {"out": "runs/nowhere"}
    (run / "mine.yaml").write_text(yaml.safe_dump(data))
    before = everything(run)
    with pytest.raises(ValueError, match=r"runs/b already exists and is never .*--resume auto"):
        go("--config", "runs/b/mine.yaml")
    assert everything(run) == before and not Path("runs/nowhere").exists()
    assert go("--config", "runs/b/mine.yaml", "--resume", "auto", "--steps", "7") == 0
    assert steps(run)[-1] == 7


def test_another_out_is_a_new_run_and_says_so(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(project / "runs/a")
    assert go("--config", "runs/a/run.yaml", "--out", "runs/new", "--resume", "auto") == 0
    out = capsys.readouterr().out
    assert "note: out=runs/new is a run of its own with the settings of runs/a/run.yaml" in out
    assert "nothing to resume in runs/new: starting from the beginning" in out
    assert everything(project / "runs/a") == before and len(rows("runs/new")) == 6
    # 就是它自己的名字，不算别的。
    capsys.readouterr()
    assert go("--config", "runs/a/run.yaml", "--out", "runs/a", "--resume", "auto") == 0
    assert "of its own" not in capsys.readouterr().out


def test_settings_outside_a_run_folder_mean_what_they_say(project: Path, tmp_path: Path) -> None:
    shutil.copy("runs/a/run.yaml", "recipe.yaml")
    assert home_of(Path("recipe.yaml")) is None and not is_run(project)
    assert load_config("recipe.yaml").config.out == "runs/a"


def test_the_data_is_the_one_it_was_trained_on(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """当前文件夹下恰有同名的别的数据：按指纹认出原来的；eval 读的也是它。"""
    other = tmp_path / "other"
    write_dataset(other / "data" / "words", seed=5)
    monkeypatch.chdir(other)
    found = Path(load_config(str(project / "runs/a/run.yaml")).config.data.folder)
    assert found.resolve() == (project / "data/words").resolve()
    last = project / "runs/a" / "step-00000006"
    assert own_data(last, "--data").resolve() == found.resolve()
    Path(shutil.move(project / "runs/a", tmp_path / "moved"))
    found = Path(load_config(str(tmp_path / "moved" / "run.yaml")).config.data.folder)
    assert found.resolve() == (project / "data/words").resolve()


def test_data_that_is_gone_is_named(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """数据没了：说出它曾在哪里；给了 --data.folder 就用给的。"""
    kept = project.parent / "kept"
    shutil.move("data/words", kept)
    monkeypatch.chdir(tmp_path)
    run_file = str(project / "runs/a/run.yaml")
    with pytest.raises(ValueError, match="there is no such dataset folder"):
        go("--config", run_file, "--resume", "auto", "--steps", "8")
    out = capsys.readouterr().out
    assert f"is no longer in {project / 'data/words'}: give --data.folder" in out
    assert go("--config", run_file, "--resume", "auto", "--steps", "8",
              "--data.folder", str(kept)) == 0  # fmt: skip


def test_a_run_from_before_it_kept_its_origin(project: Path) -> None:
    (project / "runs/a/origin.json").unlink()
    shutil.move("runs/a", "runs/b")
    assert go("--config", "runs/b/run.yaml", "--resume", "auto", "--steps", "8") == 0
    origin = json.loads(Path("runs/b/origin.json").read_text())
    assert origin["data"] == str(project / "data/words")


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "._x", "desktop.ini"])
def test_a_folder_with_only_clutter_is_new(make: Make, name: str) -> None:
    config = make()
    Path(config.out).mkdir()
    (Path(config.out) / name).write_text("x")
    assert train(config).step == 6
