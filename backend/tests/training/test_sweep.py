"""扫描：展开、早错、与单独训练逐位相同、做过的不重做、断了能续。"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.training import run as run_module
from app.training.config import OptimConfig, TrainConfig
from app.training.sweep import check, expand, finished, parse_switch, run_sweep
from app.training.trainer import TrainingDiverged

from .conftest import Make, rows, same_weights, train


def no_plan(plan: Any) -> None:
    """不显示。"""


@pytest.mark.parametrize(
    ("text", "name", "values"),
    [
        ("model.norm=post,pre", "model.norm", ("post", "pre")),
        ("optim.lr=1e-3, 3e-3", "optim.lr", ("1e-3", "3e-3")),
        ("batch-size=8", "batch_size", (8,)),
        ("model.n-kv-head=null,1", "model.n_kv_head", (None, 1)),
        ("model.bias=true,false", "model.bias", (True, False)),
        (
            "model.attention_pattern=fixed(8, 1),local(4) | global(2)",
            "model.attention_pattern",
            ("fixed(8, 1)", "local(4) | global(2)"),
        ),
        ("optim.betas=[0.9, 0.95],[0.9, 0.99]", "optim.betas", ([0.9, 0.95], [0.9, 0.99])),
    ],
)
def test_switches(text: str, name: str, values: tuple[Any, ...]) -> None:
    switch = parse_switch(text)
    assert (switch.name, switch.values) == (name, values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.norm", "write it as name=value"),
        ("=a", "write it as name=value"),
        ("steps= ", "write it as name=value"),
        ("steps=1,,2", "empty value"),
        ("steps=[", "not valid YAML"),
        ("seed=1,2", "use --seeds"),
        ("out=a,b", "cannot vary"),
        ("data.folder=a,b", "do not compare"),
    ],
)
def test_bad_switches(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_switch(text)


def expanded(base: TrainConfig, *switches: str, seeds: tuple[int, ...] = (0,)) -> list[TrainConfig]:
    return expand(base, [parse_switch(text) for text in switches], seeds)


def test_every_combination(make: Make) -> None:
    base = make(out="runs/s")
    configs = expanded(base, "model.norm=post,pre", "optim.lr=1e-3,2e-3", seeds=(0, 3))
    assert len(configs) == 8
    assert {(c.model.norm, c.optim.lr, c.seed) for c in configs} == {
        (norm, lr, seed) for norm in ("post", "pre") for lr in (1e-3, 2e-3) for seed in (0, 3)
    }
    assert configs[0].out == str(Path("runs/s/norm-post_lr-1e-3_seed-0"))
    assert len({c.out for c in configs}) == 8 and {c.resume for c in configs} == {"auto"}
    # 没有换的都不变。
    same = configs[0].replace(out=base.out, resume="none", optim=base.optim, model=base.model)
    assert same == base


@pytest.mark.parametrize(
    ("switches", "seeds", "message"),
    [
        (["model.nrm=post"], (0,), r"with model.nrm=post: unknown option 'model.nrm'.*'norm'"),
        (["modle.norm=post"], (0,), r"unknown option 'modle': did you mean 'model'"),
        (["model.norm=post,sideways"], (0,), r"with model.norm=sideways: norm='sideways'"),
        (["steps.norm=1"], (0,), r"steps is not a group of settings"),
        (["steps=1", "steps=2"], (0,), r"vary names steps twice"),
        (["steps=5"], (1, 1), r"seeds names 1 twice"),
        (["optim.lr=1e-3,0.001"], (0,), r"comes up twice"),
        (["model.n_head=2,3"], (0,), r"with model.n_head=3: n_embed=16 is not a multiple"),
    ],
)
def test_bad_combinations(
    make: Make, switches: list[str], seeds: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        expanded(make(), *switches, seeds=seeds)


def test_a_run_of_a_sweep_is_the_run_alone(make: Make, tmp_path: Path) -> None:
    base = make(out=str(tmp_path / "sweep"), eval_every=3)
    configs = expanded(base, "model.norm=post,pre", seeds=(0, 1))
    outcome = run_sweep(configs, no_plan, lambda text: None)
    assert [str(path) for path in outcome.done] == [config.out for config in configs]
    assert (outcome.failed, outcome.stopped) == ([], None)
    alone = train(configs[-1].replace(out=str(tmp_path / "alone"), resume="none"))
    last = Path(configs[-1].out)
    assert same_weights(alone.checkpoint, last / alone.checkpoint.name)
    assert [r["loss"] for r in rows(last)] == [r["loss"] for r in rows(tmp_path / "alone")]


def test_finished_ones_are_not_repeated_and_broken_ones_go_on(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make(out=str(tmp_path / "sweep"), steps=8, save_every=2, eval_every=4)
    configs = expanded(base, "optim.lr=1e-3,2e-3,3e-3")
    plain, started = run_module.train, []

    def interrupted(config: TrainConfig, *rest: Any) -> Any:
        started.append(Path(config.out).name)
        if len(started) == 2:
            plain(config.replace(steps=8), *rest)
            (Path(config.out) / "step-00000008" / "manifest.json").unlink()
            raise KeyboardInterrupt
        return plain(config, *rest)

    monkeypatch.setattr(run_module, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(configs, no_plan, lambda text: None)
    assert [finished(config) for config in configs] == [True, False, False]
    told: list[str] = []
    outcome = run_sweep(configs, no_plan, told.append)
    assert started == ["lr-1e-3_seed-0", "lr-2e-3_seed-0", "lr-2e-3_seed-0", "lr-3e-3_seed-0"]
    assert len(outcome.done) == 3 and "1/3 lr-1e-3_seed-0: finished before" in told[0]
    assert any("resuming from" in text and "step-00000006" in text for text in told)
    assert all(finished(config) for config in configs)


def test_a_missing_final_validation_is_made_up_for(make: Make) -> None:
    """最后的检查点已存而最后的验证还没做时被杀：不算做完。"""
    config = make(eval_every=3)
    train(config)
    assert finished(config)
    path = Path(config.out) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(
        "".join(line for line in lines if f'"eval", "step": {config.steps}' not in line)
    )
    assert not finished(config)


def test_errors_come_before_the_first_run(make: Make, tmp_path: Path) -> None:
    base = make(out=str(tmp_path / "sweep"), sample_tokens=4)
    for switches, message in (
        (["model.context_size=8,100000"], "100000"),
        (["model.vocab_size=32,2"], r"vocabulary of \d+ but model.vocab_size=2"),
        (["device=cpu,nonsense"], r"device='nonsense' cannot be used"),
        (["sample_prompt=the,ÿÿ"], r"."),
        (["tune.trainable=all,head"], r"tune.trainable=head but init_from=None"),
        (["parallel.shard=1,2"], r"parallel.shard=2 but this is 1 process without ranks"),
    ):
        with pytest.raises(ValueError, match=message):
            run_sweep(expanded(base, *switches), no_plan, print)
        assert not (tmp_path / "sweep").exists()


def test_a_named_validation_set_belongs_to_the_run(make: Make, tmp_path: Path) -> None:
    """数据自己没有验证部分、只点名了别处的：最后那次验证没做，就还没有做完。"""
    data = make().data
    shutil.copytree(Path(data.folder) / "train", tmp_path / "data" / "train")
    other = replace(data, folder=str(tmp_path / "data"), val={"old": f"{data.folder}/val"})
    config = make(data=other, eval_every=3)
    train(config)
    assert finished(config)
    metrics = Path(config.out) / "metrics.jsonl"
    kept = [r for r in metrics.read_text().splitlines(True) if '"eval", "step": 6' not in r]
    metrics.write_text("".join(kept))
    assert not finished(config) and finished(config.replace(data=replace(other, val={})))


def test_another_sweep_in_the_same_folder_is_refused(make: Make, tmp_path: Path) -> None:
    base = make(out=str(tmp_path / "sweep"))
    (config,) = expanded(base, "model.norm=post")
    run_sweep([config], no_plan, lambda text: None)
    check(config.replace(eval_every=2))
    with pytest.raises(ValueError, match=r"holds a run with steps=6, now 7: use another --out"):
        check(config.replace(steps=7))
    other = Path(base.out) / "norm-pre_seed-0"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds other files and no run"):
        run_sweep(expanded(base, "model.norm=post,pre"), no_plan, print)
    assert (other / "thesis.txt").read_text() == "precious"


def test_a_diverging_setting_is_a_result(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run_module.train

    def train_or_fail(config: TrainConfig, *rest: Any) -> Any:
        if config.optim.lr > 1:
            raise TrainingDiverged("3 steps in a row")
        return plain(config, *rest)

    monkeypatch.setattr(run_module, "train", train_or_fail)
    configs = expanded(make(optim=OptimConfig(lr=1e-2)), "optim.lr=50,1e-3")
    outcome = run_sweep(configs, no_plan, lambda text: None)
    assert [path.name for path in outcome.done] == ["lr-1e-3_seed-0"]
    assert [(path.name, why) for path, why in outcome.failed] == [
        ("lr-50_seed-0", "3 steps in a row")
    ]
