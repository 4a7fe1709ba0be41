"""内存限额（C6）：报错里有尺寸与放得下的改法，照它改就放得下，损失不变。"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from app.training.config import ScheduleConfig

from ..child import answer, run_child
from ..conftest import Make

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="needs Linux: /proc and RLIMIT_AS"
)
# 在此刻的用量之上只给 EXTRA 兆；照建议改小，直到放得下。每次另起一个进程。
LIMITED = """
import re, resource
# 限额只给训练：画图的库先装进来，算在此刻的用量里。
import matplotlib.backends.backend_agg, matplotlib.figure
from app.cli import main as cli
def used():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize"))
def attempt(micro, extra):
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.dup2(writer, 2)
        path = folder / f"{micro}-{extra}.yaml"
        out = str(path.with_suffix(""))
        path.write_text(json.dumps(config.replace(micro_batch=micro, out=out).to_dict()))
        if extra:
            resource.setrlimit(resource.RLIMIT_AS, (used() + extra * 2**20,) * 2)
        os._exit(cli.main(["train", "--config", str(path)]))
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read()
    code = os.waitstatus_to_exitcode(os.wait()[1])
    metrics = folder / f"{micro}-{extra}" / "metrics.jsonl"
    text = metrics.read_text() if metrics.exists() else ""
    rows = [json.loads(line) for line in text.splitlines()]
    return code, said, [row["loss"] for row in rows if row["kind"] == "train"]
extra, tries = int(os.environ["EXTRA"]), []
micro = config.batch_size
while True:
    tries.append(attempt(micro, extra))
    smaller = re.search(r"use --micro-batch (\\d+) \\(the result stays the same\\)", tries[-1][1])
    if tries[-1][0] == 0 or smaller is None:
        break
    micro = int(smaller[1])
whole = attempt(config.batch_size, 0)[2] if tries[-1][0] == 0 else []
print()
print(json.dumps([tries, whole]))
"""


def limited(make: Make, folder: Path, extra: int, batch: int, **model: Any) -> Any:
    shape = {"context_size": 256, "n_embed": 64, "dropout": 0.0} | model
    config = make(
        model=make().model.replace(**shape), batch_size=batch, micro_batch=None, steps=3,
        schedule=ScheduleConfig(warmup_steps=1),
    )  # fmt: skip
    config = dataclasses.replace(config, eval_every=1)
    with pytest.MonkeyPatch.context() as patch:
        from .. import child

        patch.setitem(child.ENV, "EXTRA", str(extra))
        return answer(run_child(LIMITED, config, folder))


def one_line(said: str) -> None:
    assert said.startswith("error: out of memory ") and said.count("\n") == 1
    assert re.search(r"\d parameters \(\d+ MB with gradients and AdamW\)", said)


@pytest.mark.slow
def test_a_smaller_micro_batch_fits(make: Make, tmp_path: Path) -> None:
    tries, whole = limited(make, tmp_path, 140, 64)
    assert len(tries) > 1
    for number, (code, said, _) in enumerate(tries[:-1]):
        assert code == 2
        one_line(said)
        rows = 64 >> number
        assert f"{rows} sequences of 256 tokens at once" in said
        assert f"--micro-batch {rows // 2} (" in said
    code, said, losses = tries[-1]
    assert (code, said, len(losses)) == (0, "", 3)
    assert losses == pytest.approx(whole, rel=1e-6)


@pytest.mark.slow
def test_one_long_sequence(make: Make, tmp_path: Path) -> None:
    ((code, said, losses),), _ = limited(
        make, tmp_path, 140, 1, context_size=4096, n_embed=256, n_layer=4
    )
    assert (code, losses) == (2, [])
    one_line(said)
    assert "with one sequence of 4096 tokens" in said and "--model.n-layer (now 4)" in said


def test_a_model_too_large_to_build(make: Make, tmp_path: Path) -> None:
    ((code, said, losses),), _ = limited(make, tmp_path, 140, 8, n_layer=16, n_embed=512)
    assert (code, losses) == (2, [])
    one_line(said)
    assert "for a model of 50," in said and "--model.n-embed (now 512)" in said
