"""图样与旋转位置从命令行和运行文件来：写法、覆盖、循环、错误只有一句。"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from app.cli.commands import train, verify
from app.cli.main import main
from app.models.transformer.config import GPT2Config
from app.training.config import TrainConfig


def flags(*argv: str) -> GPT2Config:
    return train.parse(argv).train.model


def run_file(folder: Path, model: str) -> str:
    path = folder / "run.yaml"
    path.write_text(f"model: {{{model}}}\n")
    return str(path)


def test_one_pattern() -> None:
    wanted = "local(256) | global(16)"
    assert flags("--model.attention-pattern", wanted).attention_pattern == wanted
    assert flags(f"--model.attention-pattern={wanted}").attention_pattern == wanted
    model = verify.parse(["--model.attention-pattern", wanted]).model
    assert model.attention_pattern == wanted


def test_a_cycle_and_the_flags_after_it() -> None:
    args = train.parse(
        ["--model.attention-pattern", "local(256)", "causal", "--steps", "7000"]
    ).train
    assert args.model.attention_pattern == ("local(256)", "causal") and args.steps == 7000


def test_sparse_and_rope_flags() -> None:
    model = flags("--model.use-sparse-attention", "--model.position", "rope")
    assert str(model.patterns[0]) == "local(256) | global(16)"
    model = flags("--model.position", "rope", "--model.rope.theta", "500000")
    assert model.rope.theta == 500000.0


@pytest.mark.parametrize(
    "written,kept",
    [
        ('attention_pattern: "local(256) | global(16)"', "local(256) | global(16)"),
        ('attention_pattern: ["local(256)", causal]', ("local(256)", "causal")),
        ("attention_pattern: null", None),
    ],
)
def test_run_files_and_flags_over_them(tmp_path: Path, written: str, kept: object) -> None:
    name = run_file(tmp_path, written)
    assert flags("--config", name).attention_pattern == kept
    over = flags("--config", name, "--model.attention-pattern", "sinks(4, 64)")
    assert over.attention_pattern == "sinks(4, 64)"
    cycle = flags("--config", name, "--model.attention-pattern", "sinks(4, 64)", "causal")
    assert cycle.attention_pattern == ("sinks(4, 64)", "causal")
    assert flags("--config", name, "--model.attention-pattern", "None").attention_pattern is None


def test_rope_in_a_run_file(tmp_path: Path) -> None:
    """YAML 1.1 把 5e5 读成文字，这里也要是数。"""
    name = run_file(tmp_path, "position: rope, rope: {theta: 5e5, scaling: ntk, factor: 4}")
    rope = flags("--config", name).rope
    assert (rope.theta, rope.scaling, rope.factor) == (500000.0, "ntk", 4.0)
    assert flags("--config", name, "--model.rope.factor", "8").rope.factor == 8.0


def test_the_run_file_that_training_writes_reads_back() -> None:
    """训练把配置写成 run.yaml；元组在 YAML 里是列表。"""
    model = GPT2Config(
        attention_pattern=("local(8)", "causal"), position="rope", n_embed=24, n_head=2
    )
    config = TrainConfig(model=model)
    text = yaml.safe_dump(config.to_dict(), sort_keys=False)
    assert TrainConfig.from_dict(yaml.safe_load(text)) == config


@pytest.mark.parametrize(
    "model,message",
    [
        ('attention_pattern: "lokal(4)"', "unknown pattern 'lokal': did you mean 'local'?"),
        ('attention_pattern: ["local(4)", 3]', "attention pattern 3 is not text"),
        ("attention_pattern: {local: 4}", "is not text"),
        ("rope: {thet: 2.0}", "unknown option 'model.rope.thet': did you mean 'theta'?"),
        ("rope: {theta: 2.0}", "has no effect with position='learned'"),
    ],
)
def test_errors_in_a_run_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, message: str
) -> None:
    name = run_file(tmp_path, model)
    assert main(["train", "--config", name]) == 2
    error = capsys.readouterr().err
    assert message in error and name in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("command", ["train", "verify"])
def test_errors_on_the_command_line(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--model.attention-pattern", "lokal(4)"])
    assert stop.value.code == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "unknown pattern 'lokal': did you mean 'local'?" in error
    assert "Traceback" not in error


def test_help_shows_how_to_write_a_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "'local(256) | global(16)'" in shown
    assert "'local(256)' causal" in shown
