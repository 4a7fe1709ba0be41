"""`gpt2 plan`：说的就是后端、缓存与参数量自己说的；做不了的拒绝；不建模型。"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from app.cli.commands.plan import layer_names, parse
from app.cli.main import main
from app.cli.shared.estimates import flop, seconds
from app.common.units import size
from app.models.transformer import GPT2Config, GPT2Model, KVCache
from app.models.transformer.backends.choose import explain_backends
from app.planning.flops import flops_per_token
from app.planning.probe import Estimate, ProbeFailed

TINY = GPT2Config(
    vocab_size=61, context_size=128, n_layer=3, n_head=2, n_embed=16, norm="pre",
    position="rope", attention_pattern=("local(8) | global(2)", "causal"),
)  # fmt: skip


def room_for(monkeypatch: pytest.MonkeyPatch, nbytes: int | None) -> None:
    monkeypatch.setattr(
        "app.planning.fit.available_memory", lambda device: (nbytes, "in this test")
    )
    monkeypatch.setattr("app.planning.fit.resident_memory", lambda: 0)


@pytest.fixture(autouse=True)
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """试验不看这台机器有多少内存。"""
    room_for(monkeypatch, 1 << 40)


def plan(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, list[str], str]:
    code = main(["plan", "--device", "cpu", "--precision", "float32", *argv])
    out = capsys.readouterr()
    return code, out.out.splitlines(), out.err


def cells(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


def row(lines: list[str], first: str) -> list[str]:
    return next(cells(line) for line in lines if cells(line)[0] == first)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(TINY.to_json())
    return str(path)


def test_parameters_and_memory(capsys: pytest.CaptureFixture[str], config: str) -> None:
    code, lines, err = plan(capsys, "--config", config)
    assert (code, err) == (0, "")
    total = GPT2Model(TINY).num_parameters()
    assert row(lines, "model")[1] == f"{total:,} parameters"
    parts = [row(lines, name)[1] for name in ("embedding", "attention", "mlp", "norms", "head")]
    assert sum(int(part.replace(",", "")) for part in parts) == total
    assert parts[-1] == "0" and "tied" in row(lines, "head")[2]
    assert row(lines, "weights")[1] == size(4 * total)
    held = row(lines[lines.index("memory in training") :], "optimizer")
    assert held[1:] == [size(8 * total), "AdamW's two moments"]


def test_patterns_and_backends(capsys: pytest.CaptureFixture[str], config: str) -> None:
    _, lines, _ = plan(capsys, "--config", config, "--length", "4096")
    at = lines.index("attention, 4,096 tokens at once")
    assert cells(lines[at + 2])[:4] == ["0, 2", "local(8) | global(2)", "10.0", "10"]
    assert cells(lines[at + 3]) == ["1", "causal", "2,048.5", "4,096", "100.0%"]
    choices = explain_backends(TINY, device=torch.device("cpu"), length=4096)
    assert [choice.backend for choice in choices] == ["blocked", "sdpa"]
    for name, choice in zip(("0, 2", "1"), choices, strict=True):
        wanted = [name, "training, prompt", choice.backend, choice.reason]
        assert wanted in [cells(line) for line in lines]


def test_cache(capsys: pytest.CaptureFixture[str], config: str) -> None:
    _, lines, _ = plan(capsys, "--config", config)
    at = lines.index("KV cache of one row")
    names = cells(lines[at + 1])
    for cache_row, layers in zip(lines[at + 2 : at + 4], ([0, 2], [1]), strict=True):
        found = dict(zip(names, cells(cache_row), strict=True))
        for length in (128, 100_000):
            for kind in (None, "int8"):
                cache = KVCache.for_model(TINY, 1, length, kv_dtype=kind, device="meta")  # type: ignore[arg-type]
                held = sum(store.nbytes for layer in layers for store in cache.stores[layer])
                assert found[f"{kind or 'float32'} at {length:,}"] == size(held)
                slots = cache.keys[layers[0]].shape[2] - 1
                assert found[f"slots at {length:,}"] == f"{slots:,}"
    whole = KVCache.for_model(TINY, 1, 100_000, device="meta").nbytes
    assert cells(lines[at + 4])[0] == "all" and cells(lines[at + 4])[-2] == size(whole)


def test_learned_positions_end_with_the_context(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, _ = plan(capsys, "--model.n-layer", "1")
    wanted = "learned positions end at 1,024 tokens: no cache is longer"
    assert code == 0 and any(wanted in line for line in lines)
    assert not any("100,000" in line for line in lines)


def test_what_a_device_cannot_train_is_shown_and_refused(
    capsys: pytest.CaptureFixture[str], config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--model.attention-backend", "flex", "--model.dropout", "0", "--length", "4096")
    monkeypatch.setattr("app.models.transformer.backends.flex._no_compiler", lambda: None)
    code, lines, err = plan(capsys, "--config", config, *flags)
    assert code == 2 and "training cannot run on cpu" in err and len(err.splitlines()) == 1
    assert row(lines, "prompt")[1:] == ["flex", "asked for"]
    assert any(cells(line)[1:3] == ["training", "none"] for line in lines if line.strip())
    monkeypatch.setattr("app.models.transformer.backends.flex._no_compiler", lambda: "no compiler")
    code, _, err = plan(capsys, "--config", config, *flags)
    assert code == 2 and "no compiler" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--length", "0"], "length=0 must be at least 1"),
        (["--length", "1025"], "length=1025 is beyond context_size=1024"),
        (["--device", "toaster"], "device='toaster' cannot be used"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--config", "none.json"], "none.json"),
    ],
)
def test_wrong_use_is_one_sentence(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    code, lines, err = plan(capsys, *argv)
    assert (code, lines) == (2, []) and len(err.splitlines()) == 1
    assert err.startswith("error: ") and message in err


def test_a_config_that_contradicts_itself(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"n_head": 7}))
    code, _, err = plan(capsys, "--config", str(path))
    assert code == 2 and "n_head=7" in err and "config.json" in err


def test_a_run_file_brings_device_precision_and_the_vocabulary_of_its_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {{folder: {data}}}\ndevice: cpu\nprecision: bfloat16\n")
    args = parse(["--config", str(path)])
    assert (args.train.device, args.train.precision, args.train.model.vocab_size) == (
        "cpu",
        "bfloat16",
        50304,
    )
    assert f"{data} does not exist yet" in capsys.readouterr().err
    (data / "train").mkdir(parents=True)
    (data / "train" / "meta.json").write_text('{"tokenizer": {"vocab_size": 65}}')
    assert parse(["--config", str(path)]).train.model.vocab_size == 65
    named = parse(["--config", str(path), "--model.vocab-size", "70", "--device", "cuda"])
    assert (named.train.model.vocab_size, named.train.device) == (70, "cuda")
    assert capsys.readouterr().err == ""


def test_a_model_of_terabytes_is_planned_and_refused_without_memory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--model.n-layer", "2000", "--model.n-embed", "65536", "--model.n-head", "512"]
    flags += ["--model.context-size", "1000000", "--model.position", "rope", "--probe"]
    code, lines, err = plan(capsys, *flags)
    assert code == 2 and row(lines, "weights")[1].endswith("TiB")
    assert err.startswith("error: training does not fit") and len(err.splitlines()) == 1
    assert row(lines, "step")[1:] == ["unknown", "not measured: it does not fit"]


WIDE = ("--model.n-embed", "256", "--model.n-layer", "6", "--model.n-head", "4", "--model.dropout")
WIDE = (*WIDE, "0", "--model.vocab-size", "512", "--model.context-size", "128")


def suggested(err: str, flag: str) -> int:
    found = re.search(rf"{flag} ([0-9]+)", err)
    assert found is not None, err
    return int(found[1])


def test_what_does_not_fit_is_refused_with_the_largest_micro_batch_that_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    room_for(monkeypatch, 160 << 20)
    code, lines, err = plan(capsys, *WIDE, "--batch-size", "32")
    assert code == 2 and len(err.splitlines()) == 1
    assert "with 32 sequences of 128 tokens at once, but 160.0 MiB are available" in err
    assert "the result stays the same" in err
    assert row(lines, "available")[1:] == ["160.0 MiB", "in this test"]
    micro = suggested(err, "--micro-batch")
    assert 1 <= micro < 32
    flags = (*WIDE, "--batch-size", "32", "--micro-batch")
    assert plan(capsys, *flags, str(micro))[0] == 0
    assert plan(capsys, *flags, str(micro + 1))[0] == 2


def test_activation_checkpointing_is_named_where_it_helps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    room_for(monkeypatch, 160 << 20)
    code, _, err = plan(capsys, *WIDE, "--batch-size", "12")
    assert code == 2 and " or --activation-checkpointing 1 (slower)" in err
    code, lines, _ = plan(capsys, *WIDE, "--batch-size", "12", "--activation-checkpointing", "1")
    assert code == 0 and "every block recomputed" in row(lines, "activations")[2]
    # 一条序列也放不下时，两样一起。
    room_for(monkeypatch, 58 << 20)
    code, _, err = plan(capsys, *WIDE, "--batch-size", "2")
    assert code == 2 and "--activation-checkpointing 1" in err


def test_where_one_sequence_is_too_much_fewer_layers_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    room_for(monkeypatch, 50 << 20)
    code, _, err = plan(capsys, *WIDE)
    assert code == 2 and "a smaller model fits, such as --micro-batch 1" in err
    layers = suggested(err, "--model.n-layer")
    flags = (*WIDE, "--micro-batch", "1", "--model.n-layer")
    assert plan(capsys, *flags, str(layers))[0] == 0
    assert plan(capsys, *flags, str(layers + 1))[0] == 2
    room_for(monkeypatch, 1 << 20)
    code, _, err = plan(capsys, *WIDE)
    assert code == 2 and "not even 1 layer would fit: use a smaller --model.n-embed" in err
    code, _, err = plan(capsys, *WIDE, "--model.attention-pattern", "local(8)", "causal")
    assert code == 2 and "not even 2 layers would fit" in err


def test_unknown_memory_refuses_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    room_for(monkeypatch, None)
    code, lines, _ = plan(capsys, *WIDE, "--batch-size", "100000")
    assert code == 0 and row(lines, "available")[1] == "unknown"


def test_compute_per_token_and_per_step(capsys: pytest.CaptureFixture[str], config: str) -> None:
    _, lines, _ = plan(capsys, "--config", config, "--batch-size", "8")
    total = flops_per_token(TINY).total
    assert "training, 8 x 128 tokens a step" in lines
    assert row(lines, "both")[1:3] == [flop(total), flop(total * 8 * 128)]


def test_a_probe_gives_time_and_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = Estimate(seconds=0.5, peak=100 << 20, base=20 << 20, layers=2, rows=4)
    monkeypatch.setattr("app.planning.fit.probe", lambda *args, **options: given)
    room_for(monkeypatch, 121 << 20)
    flags = (*WIDE, "--batch-size", "4", "--steps", "7200", "--probe")
    code, lines, _ = plan(capsys, *flags)
    assert code == 0
    assert row(lines, "step")[1:] == ["500.0 ms", "extrapolated from measured 2 of 6 layers"]
    assert row(lines, "speed")[1] == "1,024 tokens/s"
    assert row(lines, "run")[1] == "1h00m"
    assert row(lines, "peak")[1] == "120.0 MiB"
    room_for(monkeypatch, 119 << 20)
    code, lines, err = plan(capsys, *flags)
    assert code == 2 and "120.0 MiB (extrapolated from a measurement)" in err
    assert suggested(err, "--micro-batch") < 4


def test_a_failed_probe_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ProbeFailed("the probe of 2 layers took more than 150 s")

    monkeypatch.setattr("app.planning.fit.probe", fail)
    code, lines, err = plan(capsys, *WIDE, "--batch-size", "1", "--probe")
    assert (code, err) == (0, "")
    why = "not measured: the probe of 2 layers took more than 150 s"
    assert row(lines, "step")[1:] == ["unknown", why]


def test_a_step_far_smaller_than_the_run_file_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {n_layer: 1, n_head: 2, n_embed: 16, vocab_size: 64}\nbatch_size: 16\n")
    code, lines, _ = plan(capsys, "--config", str(path), "--batch-size", "2")
    assert code == 0 and any("warning: 2,048 tokens a step, far under" in line for line in lines)
    code, lines, _ = plan(capsys, "--config", str(path))
    assert code == 0 and not any("warning" in line for line in lines)


@pytest.mark.parametrize(
    ("count", "text"),
    [(12, "12.0 FLOP"), (1500, "1.50 kFLOP"), (2.5e11, "250 GFLOP"), (3e24, "3,000 ZFLOP")],
)
def test_flop(count: float, text: str) -> None:
    assert flop(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "12.3 ms"), (4.46, "4.5 s"), (75, "1m15s"), (7500, "2h05m"), (864_000, "10.0 days")],
)
def test_seconds(value: float, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ([3], "3"), (range(12), "0-11"), ([0, 2], "0, 2"), ([0, 2, 4], "0, 2, 4"),
        (range(0, 12, 2), "0, 2, .., 10"), ([0, 1, 3, 4], "0-1, 3-4"),
        ([0, 1, 3, 4, 6, 7, 9, 10, 12, 13], "0-1, 3-4, .., 12-13"),
    ],
)  # fmt: skip
def test_layer_names(layers: list[int], text: str) -> None:
    assert layer_names(list(layers)) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.00 KiB"), (10 << 20, "10.0 MiB"),
        (3 << 29, "1.50 GiB"), (1 << 60, "1,024.0 PiB"),
    ],
)  # fmt: skip
def test_size(count: int, text: str) -> None:
    assert size(count) == text
