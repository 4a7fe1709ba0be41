"""图与文字里的专家就是模型挑的；不是终端或 NO_COLOR 时写编号。"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from app.cli.main import main
from app.data.tokenizers import CharTokenizer
from app.models.transformer import GPT2Model, create_gpt2_model
from app.viz import routing
from app.viz.routing import (
    coloured_text,
    expert_colours,
    expert_style,
    load_text,
    plain_text,
    routing_figure,
    weight_table,
)

CHARS = CharTokenizer("\n abcdefgh")
CHOSEN = np.array([[2, 0], [1, 3], [4, 4], [0, 1]])
WEIGHT = np.array([[0.75, 0.25], [0.4, 0.6], [0.5, 0.5], [0.9, 0.1]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    create_gpt2_model(
        vocab_size=CHARS.vocab_size, context_size=16, n_layer=3, n_head=2, n_embed=16,
        moe_num_experts=4, moe={"layers": [0, 2]},
    ).save_pretrained(folder)  # fmt: skip
    CHARS.save(folder)
    return str(folder)


def test_the_table_has_each_weight_in_its_place() -> None:
    table = weight_table(CHOSEN, WEIGHT, 4)
    wanted = np.zeros((4, 4))
    wanted[[2, 0, 1, 3, 0, 1], [0, 0, 1, 1, 3, 3]] = [0.75, 0.25, 0.4, 0.6, 0.9, 0.1]
    np.testing.assert_array_equal(table, wanted)


def test_each_layer_is_a_panel_coloured_where_a_token_went() -> None:
    figure = routing_figure({1: (CHOSEN, WEIGHT), 3: (CHOSEN[::-1], WEIGHT[::-1])}, "abcd", 4, "t")
    figure.draw_without_rendering()
    assert [a.get_title(loc="left").split(":")[0] for a in figure.axes] == ["layer 1", "layer 3"]
    for axes, order in zip(figure.axes, (slice(None), slice(None, None, -1)), strict=True):
        (image,) = axes.get_images()
        pixels = np.asarray(image.get_array())
        table = weight_table(CHOSEN[order], WEIGHT[order], 4)
        empty = np.isclose(pixels, 242 / 255).all(-1)
        np.testing.assert_array_equal(empty, table == 0)
    assert [t.get_text() for t in figure.axes[-1].get_xticklabels()] == list("abcd")
    assert figure.get_suptitle() == "t"


def test_a_long_title_stays_within_the_picture() -> None:
    figure = routing_figure({0: (CHOSEN, WEIGHT)}, "abcd", 4, "runs/" + "long" * 40)
    figure.draw_without_rendering()
    box = figure._suptitle.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1


def test_colours_differ_and_words_stay_legible() -> None:
    assert len(set(expert_colours(20))) == 20
    assert expert_colours(25)[20:] == expert_colours(5)
    assert expert_style(4, 4) == "" and expert_style(0, 4).startswith("white on rgb(31,119,180)")


def test_text_takes_the_largest_weight() -> None:
    text = coloured_text(list("abcd"), CHOSEN, 4, WEIGHT)
    assert text.plain == "abcd"
    styles = [str(span.style) for span in text.spans]
    assert styles == [expert_style(expert, 4) for expert in (2, 3, 0)]
    assert plain_text("abcd", CHOSEN, WEIGHT, 4) == "a[2,0] b[3,1] c[-,-] d[0,1]"


def test_load_in_words() -> None:
    assert load_text(np.array([4, 0, 2, 2])) == "MaxVio 1.00, 1 of 4 experts without a token"
    assert load_text(np.array([2, 2])) == "MaxVio 0.00"
    assert load_text(np.array([0, 0])) == "no tokens, 2 of 2 experts without a token"


def test_too_many_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="49 layers do not fit.*at most 48"):
        routing_figure(dict.fromkeys(range(49), (CHOSEN, WEIGHT)), "abcd", 4, "t")


def model_choice(folder: str, text: str, layer: int) -> list[list[int]]:
    model = GPT2Model.from_pretrained(folder)
    ids = torch.tensor([CHARS.encode(text)])
    found: list[list[int]] = model(ids, return_routing=(layer,))["routing"][layer][0][0].tolist()
    return found


def test_the_command_draws_and_prints_what_the_model_chose(folder, tmp_path, capsys) -> None:
    out = tmp_path / "r.png"
    argv = ["show", "routing", "--run", folder, "--text", "abba hag", "--out", str(out)]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG") and f"picture  {out}" in text
    for layer in (0, 2):
        pairs = zip("abba␣hag", model_choice(folder, "abba hag", layer), strict=True)
        line = " ".join(f"{c}[{a},{b}]" for c, (a, b) in pairs)
        assert f"layer {layer}: {line}\n" in text
    assert "\x1b" not in text and "layer 1" not in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_terminal_gets_colours_unless_no_color(folder, tmp_path, monkeypatch, no_color) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("NO_COLOR", no_color)
    argv = ["show", "routing", "--run", folder, "--text", "abc", "--layer", "2"]
    assert main([*argv, "--out", str(tmp_path / "r.png")]) == 0
    text = screen.getvalue()
    if no_color:
        assert "\x1b" not in text and "layer 2: a[" in text
        return
    assert "expert" in text and text.count("layer") == 1
    for (first, _), char in zip(model_choice(folder, "abc", 2), "abc", strict=True):
        red, green, blue = routing.expert_colours(4)[first]
        assert f"48;2;{red};{green};{blue}m{char}" in text


@pytest.mark.parametrize("argv, words", [
    (["--text", ""], "text='' is empty"),
    (["--text", "ab", "--layer", "1"], "layer=1 has no experts: the MoE layers are 0, 2"),
    (["--text", "ab", "--tokens", "0"], "tokens=0"),
    (["--text", "ab", "--out", "x.jpg"], "does not end in .png"),
])  # fmt: skip
def test_errors(argv, words, folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["show", "routing", "--run", folder, *argv]) == 2
    err = capsys.readouterr().err
    assert words in err and not list(Path().iterdir())


def test_a_dense_model_is_refused(tmp_path, capsys) -> None:
    create_gpt2_model(
        vocab_size=CHARS.vocab_size, context_size=8, n_layer=1, n_head=1, n_embed=8
    ).save_pretrained(tmp_path / "m")
    CHARS.save(tmp_path / "m")
    assert main(["show", "routing", "--run", str(tmp_path / "m"), "--text", "ab"]) == 2
    assert "moe_num_experts=0: no token is routed" in capsys.readouterr().err
