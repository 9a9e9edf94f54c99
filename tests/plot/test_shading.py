"""Shaded text: in HTML, in a terminal, and drawn."""

from __future__ import annotations

import html.parser
import io
import itertools
import sys
from typing import Any

import pytest
from plot_cases import (
    assert_inside,
    close_to,
    pixels,
    softmax_like,
    summary_of,
)

from fastattn import plot
from fastattn.console import terminal
from fastattn.console.terminal import Style
from fastattn.plot import colours

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib, which draws the plots, is not installed")
matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402


class _Spans(html.parser.HTMLParser):
    """Text and style of each span, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.spans, self.depth = "", [], 0  # type: ignore[var-annotated]
        self.feed(page)
        assert self.depth == 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.depth += 1
        assert tag in ("div", "span")
        if tag == "span":
            self.spans.append([dict(attrs), ""])

    def handle_endtag(self, tag: str) -> None:
        self.depth -= 1

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.spans:
            self.spans[-1][1] += data


class _Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class TestText:
    def test_which_weights(self) -> None:
        weights = softmax_like(2, 4, 4)
        names = ["a", "b", "c", "d"]

        def shown_weights(*args: Any, **kwargs: Any) -> list[float]:
            return [weight for _, _, weight in plot.text(*args, names, **kwargs).words]

        assert shown_weights(weights[0, 1]) == weights[0, 1].tolist()
        assert shown_weights(weights, head=1, query=-1) == weights[1, 3].tolist()
        assert shown_weights(weights, head=0) == pytest.approx(weights[0].sum(axis=0))
        assert shown_weights(summary_of(weights, 1), head=0) == pytest.approx(weights[0].sum(axis=0))
        assert shown_weights(summary_of(weights, 4), head=1, query=2) == weights[1, 2].tolist()
        assert plot.text(weights[0], names, query=1).about == "weight, from query 1, “b”"
        assert plot.text(summary_of(weights[:, :3], 2), names, head=0, query=1).about == (
            "weight, the 2 largest of each query, from query 1"
        )
        assert plot.text(weights[0], names).about == "weight received from 4 queries"

    def test_html_is_escaped_and_has_the_colours(self) -> None:
        names = ["<script>", "&amp;", '"x"', "##'y", "plain"]
        weights = [0.1, 0.2, 0.3, 0.4, float("nan")]
        page = _Spans(plot.text(weights, names)._repr_html_())
        assert page.text.startswith('<script> &amp; "x"\'y plain')
        for (attributes, _), weight in zip(page.spans, weights, strict=False):
            assert f"background:{colours.shade(weight / 0.4)};" in attributes["style"]
            assert attributes["title"] == f"{weight:.4g}"

    @pytest.mark.parametrize(
        ("stream", "environ", "coloured"),
        [(_Terminal, {}, True), (_Terminal, {"NO_COLOR": "1"}, False), (io.StringIO, {}, False)],
    )
    def test_colours_are_for_terminals_and_not_under_no_color(
        self, stream: Any, environ: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "stdout", stream())
        printed = str(plot.text([0.7, 0.3], ["animal", "street"]))
        assert ("\x1b[" in printed) is coloured
        assert ("animal(.70)" in printed) is not coloured

    def test_small_weights_are_shaded_relative_to_the_largest(self) -> None:
        shaded = plot.text([0.004, 0.002, 0.0001], ["one", "two", "three"])
        first, _, about = shaded.lines(Style(colour=False, width=60))
        assert first == "one(.004) two(.002) three"
        assert about == "weight"
        coloured = shaded.lines(Style(colour=True, width=60))
        strongest = Style(colour=True).shade(1.0, "one")
        assert coloured[0].startswith(strongest)
        assert coloured[0].endswith(" three")
        assert ".0002" in coloured[-1]

    def test_words_stay_whole_in_a_terminal(self) -> None:
        names = ["aaaa", "bbbb", "##cc", "##dd", "e"]
        lines = plot.text([0.0] * 5, names).lines(Style(width=12))
        assert lines[:3] == ["aaaa", "bbbbccdd e", ""]
        lines = plot.text([0.0] * 4, ["abcdef", "##ghijkl", "##mnopqr", "z"]).lines(Style(width=12))
        assert lines[:3] == ["abcdefghijkl", "mnopqr z", ""]

    def test_nothing_is_wider_than_the_terminal(self) -> None:
        names = [word for place in range(40) for word in (f"word{place}", "##piece", ",")]
        for width in (24, 40, 80):
            for line in plot.text(softmax_like(120), names).lines(Style(width=width)):
                assert terminal.display_width(line) <= width

    @pytest.mark.parametrize("given_axes", [False, True])
    def test_each_word_is_on_its_field(self, given_axes: bool) -> None:
        names = [word for place in range(30) for word in (f"word{place}", "##piece", ",")]
        weights = softmax_like(90)
        if given_axes:
            ax = pyplot.figure(figsize=(5, 3)).add_subplot()
            assert plot.text(weights, names, ax=ax) is ax
        else:
            ax = plot.text(weights, names).draw()
        ax.figure.canvas.draw()
        shaded = plot.text(weights, names)
        texts = [text for text in ax.texts if text.get_text()][:90]
        fields = [patch for patch in ax.patches if isinstance(patch, Rectangle)][:90]
        area = ax.get_window_extent()
        rows = set()
        for (_, word, weight), text, field in zip(shaded.words, texts, fields, strict=True):
            assert text.get_text() == word
            assert to_hex(field.get_facecolor()) == colours.shade(weight / shaded.vmax)
            box, ground = text.get_window_extent(), field.get_window_extent()
            assert ground.x0 - 1 <= box.x0 <= box.x1 <= ground.x1 + 1
            assert ground.y0 - 1 <= box.y0 <= box.y1 <= ground.y1 + 1
            assert area.x0 - 1 <= ground.x0 <= ground.x1 <= area.x1 + 1
            assert area.y0 - 1 <= ground.y0 <= ground.y1 <= area.y1 + 1
            rows.add(round(ground.y0))
        assert len(rows) > 2
        boxes = [field.get_window_extent() for field in fields]
        for one, other in itertools.combinations(boxes, 2):
            across, down = min(one.x1, other.x1) - max(one.x0, other.x0), min(one.y1, other.y1) - max(one.y0, other.y0)
            assert min(across, down) <= 0.01
        assert_inside(ax)

    def test_pieces_of_a_word_stay_together(self) -> None:
        names = [word for place in range(60) for word in (f"w{place}", "##abc", "##defg")]
        ax = plot.text(softmax_like(180), names).draw()
        boxes = [patch.get_window_extent() for patch in ax.patches][:180]
        for word in range(60):
            assert len({round(box.y0, 3) for box in boxes[3 * word : 3 * word + 3]}) == 1

    def test_the_largest_weight_is_the_darkest_word(self) -> None:
        ax = plot.text([0.1, 0.9, 0.0], ["one", "$two$", "three"]).draw()
        drawn = pixels(ax)
        for patch, weight in zip(ax.patches, (0.1, 0.9, 0.0), strict=False):
            box = patch.get_window_extent()
            corner = drawn[int(box.y0) + 1, int(box.x0) + 1].astype(int)
            assert close_to(corner, colours.shade(weight / 0.9))
        assert [text.get_text() for text in ax.texts][:3] == ["one", "$two$", "three"]

    def test_repr(self) -> None:
        assert repr(plot.text([0.5, 0.25], ["a", "b"])) == "ShadedText(2 tokens, weight, vmax=0.5)"
