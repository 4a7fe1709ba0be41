"""图里画的就是图样与注意力：格子的颜色、标题、标签；写文件不覆盖。"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from app.models.transformer.visibility.coverage import coverage, seen
from app.models.transformer.visibility.pattern_text import parse
from app.viz import attention, picture
from app.viz.attention import attention_figure
from app.viz.pattern import describe_coverage, pattern_figure
from app.viz.picture import check_picture, new_figure, token_label, write_picture

PATTERNS = [parse("local(3) | global(1)"), parse("strided(4)")]


def maps(heads: int, length: int) -> np.ndarray:
    weights = np.random.default_rng(0).random((heads, length, length))
    return weights / weights.sum(-1, keepdims=True)


def test_each_pattern_is_a_panel_with_its_pairs_and_numbers() -> None:
    figure = pattern_figure(PATTERNS, 12)
    assert len(figure.axes) == 2
    for axes, pattern in zip(figure.axes, PATTERNS, strict=True):
        (image,) = axes.get_images()
        colours = image.to_rgba(image.get_array())[..., 0]
        wanted = np.where(np.tri(12, dtype=bool), 1.0, 217 / 255)
        wanted[seen(pattern, 12).numpy()] = 0.0
        np.testing.assert_allclose(colours, wanted)
        first, *rest = axes.get_title().split("\n")
        assert first == str(pattern)
        assert "; ".join(rest) == describe_coverage(coverage(pattern, 12))


def test_many_patterns_are_rows_of_four() -> None:
    figure = pattern_figure([parse(f"local({n})") for n in range(1, 7)], 8)
    figure.draw_without_rendering()
    lines = [round(axes.get_position().y0, 6) for axes in figure.axes]
    assert len(lines) == 6 and len(set(lines)) == 2


def test_the_numbers_say_when_they_are_estimates() -> None:
    assert describe_coverage(coverage(parse("strided(4)"), 12)) == (
        "2.0 keys per query, at most 3; 30.8% of the causal pairs"
    )
    assert describe_coverage(coverage(parse("local(100)"), 20_000)).count("~") == 2


def test_attention_panels() -> None:
    given = {1: maps(3, 6), 0: maps(3, 6)}
    figure = attention_figure(given, PATTERNS, list("abcdef"), [2], "a title")
    titles = [axes.get_title().split("\n")[0] for axes in figure.axes[:6]]
    assert titles == [
        "layer 1: strided(4)", "layer 1, mean of 3 heads", "layer 1, head 2",
        "layer 0: local(3) | global(1)", "layer 0, mean of 3 heads", "layer 0, head 2",
    ]  # fmt: skip
    assert figure.get_suptitle() == "a title"
    for panel, layer, wanted in (
        (1, 1, given[1].mean(0)), (2, 1, given[1][2]), (4, 0, given[0].mean(0)), (5, 0, given[0][2])
    ):  # fmt: skip
        array = figure.axes[panel].get_images()[0].get_array()
        shown = seen(PATTERNS[layer], 6).numpy()
        np.testing.assert_array_equal(~np.ma.getmaskarray(array), shown)
        np.testing.assert_array_equal(array.data[shown], wanted[shown])
    for axis in (figure.axes[1].xaxis, figure.axes[1].yaxis):
        assert [label.get_text() for label in axis.get_ticklabels()] == list("abcdef")


def test_many_tokens_get_few_labels_with_their_numbers() -> None:
    labels = [f"t{i}" for i in range(130)]
    figure = attention_figure({0: maps(1, 130)}, PATTERNS, labels, [], "")
    names = [label.get_text() for label in figure.axes[0].xaxis.get_ticklabels()]
    assert names == [f"{i} t{i}" for i in range(0, 130, 3)]
    assert len(names) <= attention.MOST_LABELS


def test_labels_do_not_overlap() -> None:
    labels = [token_label(b"longest token " * 2)] * 40
    figure = attention_figure({0: maps(2, len(labels))}, PATTERNS, labels, [0, 1], "t")
    figure.draw_without_rendering()
    for axes in figure.axes[:4]:
        boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
        assert all(a.y0 >= b.y1 - 1 for a, b in zip(boxes, boxes[1:], strict=False))
        inside = axes.get_window_extent()
        others = [other for other in figure.axes[:4] if other is not axes]
        assert not any(inside.overlaps(other.get_tightbbox()) for other in others)


def test_too_many_panels() -> None:
    given = dict.fromkeys(range(10), maps(12, 3))
    with pytest.raises(ValueError, match="10 layers with 14 panels .* more than 60 .*--layer"):
        attention_figure(given, PATTERNS * 5, list("abc"), range(12), "")


@pytest.mark.parametrize(
    ("raw", "label"),
    [
        (b" the", "␣the"), (b"\n", "↵"), (b"\t", "→"), (b"$x$", "$x$"), (b"\xe6\xbc", "\\xe6\\xbc"),
        ("é".encode(), "é"), (b"\x00", "U+0000"), (b"", ""), (b"a" * 12, "a" * 12),
        (b"a" * 13, "a" * 11 + "…"),
    ],
)  # fmt: skip
def test_token_labels(raw: bytes, label: str) -> None:
    assert token_label(raw) == label


def test_a_character_without_a_glyph_is_written_as_its_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(picture, "_fonts", lambda: (("DejaVu Sans",), frozenset(map(ord, "ab"))))
    assert token_label("a漢b".encode()) == "aU+6F22b"


@pytest.mark.filterwarnings("error")
def test_odd_labels_are_drawn_without_a_warning(tmp_path: Path) -> None:
    labels = [token_label(text.encode()) for text in ("$\\frac$", "漢", "\U0001f600", "_^{", "%")]
    figure = attention_figure({0: maps(2, 5)}, PATTERNS, labels, [], "a $title_{$ of text")
    write_picture(figure, tmp_path / "odd.png")
    assert (tmp_path / "odd.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        write_picture(new_figure(1, 1), path)
    with pytest.raises(ValueError, match="a.png already exists .* another --out"):
        check_picture(path)
    assert path.read_text() == "mine"
    with pytest.raises(ValueError, match="does not end in .png: use --out .*b.png"):
        check_picture(tmp_path / "b.jpg")
    with pytest.raises(ValueError, match="none does not exist"):
        check_picture(tmp_path / "none" / "a.png")
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="already exists"):
        check_picture(link)
