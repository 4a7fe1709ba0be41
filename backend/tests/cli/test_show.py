"""`gpt2 show`：图真的写出来，画的是模型的注意力；每个错误一句话、退出码 2。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.cli.main import main
from app.data.tokenizers import CharTokenizer
from app.inspection.heads import heads, plain_ids
from app.inspection.slices import whole
from app.models.transformer import GPT2Model, create_gpt2_model
from app.training.saving.checkpoint import write_checkpoint
from app.viz import attention

CHARS = CharTokenizer("\n abcdefgh")
PATTERN = "local(3) | global(1)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = create_gpt2_model(
        vocab_size=CHARS.vocab_size, context_size=16, n_layer=3, n_head=2, n_embed=16,
        attention_pattern=(PATTERN, "causal"), attention_backend="sdpa",
    )  # fmt: skip
    model.save_pretrained(folder)
    CHARS.save(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def show(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(["show", *argv])
    out = capsys.readouterr()
    return code, out.out, out.err


def is_png(path: str) -> bool:
    return Path(path).read_bytes().startswith(b"\x89PNG")


def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """截下交给画图函数的东西。"""
    found: dict[str, Any] = {}
    whole = attention.attention_figure

    def spy(maps, patterns, labels, heads, title):
        found.update(maps=maps, patterns=patterns, labels=labels, heads=heads, title=title)
        return whole(maps, patterns, labels, heads, title)

    monkeypatch.setattr(attention, "attention_figure", spy)
    return found


def test_alone_it_lists_what_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"]):
        code, out, _ = show(capsys, *argv)
        assert code == 0 and "attention" in out and "pattern" in out and "usage: gpt2 show" in out


def test_patterns_in_letters_and_as_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = show(capsys, "pattern", PATTERN, "strided(2)", "--tokens", "5")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "local(3) | global(1), 5 tokens: 2.8 keys per query, at most 4; 93.3% of the causal pairs",
        *("#", "##", "###", "####", "#.###"),
        "strided(2), 5 tokens: 1.8 keys per query, at most 3; 60.0% of the causal pairs",
        *("#", ".#", "#.#", ".#.#", "#.#.#"),
        "picture  pattern.png",
    ]
    assert is_png("pattern.png")


def test_many_tokens_are_not_written_in_letters(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = show(capsys, "pattern", "strided(2)", "--tokens", "33", "--out", "a.png")
    assert code == 0 and len(out.splitlines()) == 2 and is_png("a.png")


def test_a_window_as_long_as_the_picture_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = show(capsys, "pattern", "local(8)", "--tokens", "8")
    assert code == 0 and "local(8) equals causal up to 8 tokens: raise --tokens" in err
    code, _, err = show(capsys, "pattern", "causal", "--tokens", "8", "--out", "b.png")
    assert (code, err) == (0, "")


def test_the_maps_of_a_saved_model(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = drawn(monkeypatch)
    argv = ("--run", folder, "--text", "abc\nde", "--layer", "2", "--layer", "1", "--head", "1")
    code, out, err = show(capsys, "attention", *argv)
    assert (code, out, err) == (0, "picture  attention.png\n", "") and is_png("attention.png")
    model = GPT2Model.from_pretrained(folder)
    with torch.no_grad():
        wanted = model(torch.tensor([CHARS.encode("abc\nde")]), return_attention=(1, 2))
    assert list(found["maps"]) == [2, 1]
    for layer, maps in found["maps"].items():
        np.testing.assert_array_equal(maps, wanted["attentions"][layer][0].numpy())
    assert found["heads"] == (1,) and found["labels"] == ["a", "b", "c", "↵", "d", "e"]
    assert [str(pattern) for pattern in found["patterns"]] == [PATTERN, "causal", PATTERN]


def test_all_layers_and_heads_where_they_are_few(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = drawn(monkeypatch)
    assert show(capsys, "attention", "--run", folder, "--text", "abc")[0] == 0
    assert list(found["maps"]) == [0, 1, 2] and found["heads"] == (0, 1)
    argv = ("--text", "abc", "--model.n-head", "8", "--out", "b.png")
    code, _, err = show(capsys, "attention", *argv)
    assert code == 0 and found["heads"] == () and "the mean of 8 heads" in err


def test_without_a_run_the_weights_are_random_and_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = drawn(monkeypatch)
    argv = ("--text", "é b", "--model.attention-pattern", PATTERN, "--layer", "0")
    argv += ("--head", "0")
    code, _, err = show(capsys, "attention", *argv)
    assert code == 0 and "random weights, untrained" in err and "random" in found["title"]
    assert found["labels"] == ["\\xc3", "\\xa9", "␣", "b"]
    first = found["maps"][0]
    show(capsys, "attention", *argv, "--out", "same.png")
    np.testing.assert_array_equal(found["maps"][0], first)
    show(capsys, "attention", *argv, "--seed", "1", "--out", "other.png")
    assert not np.array_equal(found["maps"][0], first)


def test_a_long_text_is_cut_and_the_number_is_said(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = drawn(monkeypatch)
    argv = ("attention", "--run", folder, "--text", "abcd" * 10, "--layer", "0")
    code, _, err = show(capsys, *argv, "--tokens", "7")
    assert code == 0 and "the first 7 of 40 tokens are drawn (--tokens 7)" in err
    assert "".join(found["labels"]) == "abcdabc"
    code, _, err = show(capsys, *argv, "--out", "b.png")
    assert code == 0 and "the first 16 of 40 tokens are drawn (context_size=16)" in err


def test_heads_of_one_model_and_of_every_checkpoint(
    folder: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, err = show(capsys, "heads", "--run", folder)
    assert (code, err) == (0, "") and is_png("heads.png")
    model = GPT2Model.from_pretrained(folder)
    scores = whole(heads(model, plain_ids(CHARS, CHARS.vocab_size)))
    lines = out.splitlines()
    assert lines[0].startswith("8 random tokens, written twice")
    for layer, head in np.ndindex(3, 2):
        wanted = f"  {layer}.{head}  induction {scores.induction[layer, head]:.2f}   previous"
        assert any(line.startswith(wanted) for line in lines), wanted
    run = tmp_path / "run"
    run.mkdir()

    def fill(new: Path) -> None:
        model.save_pretrained(new)
        CHARS.save(new)

    for step in (5, 10):
        write_checkpoint(run, step, fill)
    code, out, _ = show(capsys, "heads", "--run", str(run), "--out", "lines.png")
    assert code == 0 and is_png("lines.png")
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["step-00000005", "step-00000010"]
    best = np.unravel_index(scores.induction.argmax(), scores.induction.shape)
    assert f"induction {best[0]}.{best[1]} {scores.induction.max():.2f}" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["heads", "--run", "gone"], "gone"),
        (["atention"], "cannot draw 'atention': did you mean 'attention'?"),
        (["pattern", "lokal(4)"], "unknown pattern 'lokal': did you mean 'local'?"),
        (["pattern"], "0 patterns were given: give 1 to 12"),
        (["pattern", *["causal"] * 13], "13 patterns were given"),
        (["pattern", "causal", "--tokens", "0"], "tokens=0 must be from 1 to 2048"),
        (["pattern", "causal", "--tokens", "9999"], "tokens=9999 must be from 1 to 2048"),
        (["pattern", "global(2) & local(2)"], "the query at position 3 sees no key"),
        (["pattern", "causal", "--out", "a.jpg"], "does not end in .png: use --out a.png"),
        (["pattern", "causal", "--out", "no/a.png"], "the folder no does not exist"),
        (["attention", "--text", ""], "text='' is empty"),
        (["attention", "--text", "a", "--layer", "2"], "layer=2 is not in this model: layers go"),
        (["attention", "--text", "a", "--layer", "-1"], "layer=-1 is not in this model"),
        (["attention", "--text", "a", "--head", "4"], "heads go from 0 to 3"),
        (["attention", "--text", "a", "--tokens", "0"], "tokens=0 must be from 1"),
        (["attention", "--text", "a", "--run", "gone"], "gone"),
        (["attention", "--text", "a", "--device", "toaster"], "device='toaster' cannot be used"),
        (["attention", "--text", "a", "--model.vocab-size", "9"], "use --model.vocab-size 257"),
        (["attention", "--text", "a", "--run", "x", "--model.n-layer", "3"], "brings its own"),
    ],
)  # fmt: skip
def test_wrong_use_is_one_sentence_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: list[str], message: str
) -> None:
    code, _, err = show(capsys, *argv)
    assert code == 2 and list(tmp_path.iterdir()) == []
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and message in last


def test_an_unknown_character_and_a_folder_without_a_model(
    folder: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, err = show(capsys, "attention", "--run", folder, "--text", "é")
    assert code == 2 and "character 'é'" in err and len(err.splitlines()) == 1
    code, _, err = show(capsys, "attention", "--run", str(tmp_path), "--text", "a")
    assert code == 2 and str(tmp_path) in err and len(err.splitlines()) == 1


def test_a_picture_is_never_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path("pattern.png").write_text("mine")
    code, _, err = show(capsys, "pattern", "causal")
    assert code == 2 and "out=pattern.png already exists" in err and "--out" in err
    assert Path("pattern.png").read_text() == "mine"


def test_help_of_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    for kind, flag in (("attention", "--model.n-layer"), ("pattern", "--tokens")):
        with pytest.raises(SystemExit) as stop:
            main(["show", kind, "--help"])
        shown = capsys.readouterr().out
        assert stop.value.code == 0 and flag in shown and f"gpt2 show {kind}" in shown


def test_the_text_that_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["show", "attention"])
    assert stop.value.code == 2 and "--text" in capsys.readouterr().err
