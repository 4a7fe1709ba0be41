"""`gpt2 sweep` 与 `gpt2 compare` 作为真的进程：一条命令到底，再来一次不重做，错误一句话。"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from app.cli.main import main

from .test_train import data, write_run_file

__all__ = ["data"]


def gpt2(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(list(args))
    out, err = capsys.readouterr()
    return code, out, err


def test_sweep_then_compare(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("app.training.run.plot_losses", lambda run: None)
    path = write_run_file(tmp_path, data, "unused", steps=12)
    sweep = ("sweep", "--config", str(path), "--out", "s", "--seeds", "0", "1")
    vary = ("--vary", "model.norm=post,pre", "--eval-every", "6")
    code, out, err = gpt2(capsys, *sweep, *vary)
    assert (code, err) == (0, "")
    assert out.startswith("4 runs in s\n") and "4/4 norm-pre_seed-1" in out
    table = re.findall(
        r"^  model.norm=(\w+) +0, 1 +[\d.]+ ± [\d.]+ +[\d.]+ ± [\d.]+ +384 ", out, re.M
    )
    assert sorted(table) == ["post", "pre"]
    page = (tmp_path / "s" / "compare.html").read_text()
    assert "model.norm=pre" in page and "<svg" in page
    code, again, _ = gpt2(capsys, *sweep, *vary)
    assert code == 0 and again.count("finished before") == 4
    assert table == re.findall(r"^  model.norm=(\w+) +0, 1", again, re.M)

    folders = [str(folder) for folder in sorted((tmp_path / "s").glob("norm-*"))]
    for name in ("c.png", "c.html"):
        code, out, err = gpt2(capsys, "compare", *folders, "--out", name)
        assert (code, err) == (0, "") and f"drawn in {name}" in out
        assert (tmp_path / name).stat().st_size > 5000
    before = (tmp_path / "c.html").read_bytes()
    for args, message in (
        ((*folders, "--out", "c.html"), "already exists and is never overwritten"),
        ((*folders, "--out", "c.pdf"), "does not end in .html or .png: use --out c.html"),
        ((folders[0], "--out", "d.html"), "1 run given, at least 2"),
        ((folders[0], folders[0] + "/", "--out", "d.html"), "given twice"),
        ((folders[0], "s", "--out", "d.html"), "s has no metrics.jsonl"),
    ):
        code, out, err = gpt2(capsys, "compare", *args)
        assert code == 2 and err.startswith("error: ") and message in err, err
        assert err.count("\n") == 1
    assert (tmp_path / "c.html").read_bytes() == before and not (tmp_path / "d.html").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "nothing varies"),
        (("--vary", "model.norm=a"), "with model.norm=a: norm='a' is not one of"),
        (("--vary", "model.nom=pre"), "unknown option 'model.nom': did you mean 'norm'"),
        (("--vary", "seed=1,2"), "use --seeds"),
        (("--seeds", "1", "2", "--resume", "auto"), "leave --resume out"),
        (("--seeds", "1", "1"), "seeds names 1 twice"),
        (("--vary", "steps=4,8"), "schedule.warmup_steps=5 is not below steps=4"),
    ],
)
def test_sweep_errors(
    tmp_path: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    args: tuple[str, ...],
    message: str,
) -> None:
    path = write_run_file(tmp_path, data, "unused")
    code, out, err = gpt2(
        capsys, "sweep", "--config", str(path), "--out", str(tmp_path / "s"), *args
    )
    assert (code, err.count("\n")) == (2, 1) and message in err
    assert not (tmp_path / "s").exists()
