"""The terminal: bars, heat maps, shaded text, progress, and when there may be colours."""

from __future__ import annotations

import io
import math
import re
import sys
from itertools import count
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastattn.console import terminal
from fastattn.console.terminal import Progress, Style

PLAIN = Style(colour=False, blocks=True, width=80)
ASCII = Style(colour=False, blocks=False, width=80)
COLOUR = Style(colour=True, blocks=True, width=80)
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


class TestPictures:
    @pytest.mark.parametrize("width", [1, 7, 40])
    @pytest.mark.parametrize("fraction", [-0.1, 0.0, 0.001, 0.33, 0.999, 1.0, 1.7])
    def test_bar_is_as_long_as_its_fraction(self, fraction: float, width: int) -> None:
        length = min(max(fraction, 0), 1) * width
        assert abs(len(terminal.bar(fraction, width, blocks=False)) - length) <= 0.5
        drawn = terminal.bar(fraction, width)
        assert math.floor(length) <= len(drawn) <= width
        assert len(drawn) - length < 1

    def test_bar_table(self) -> None:
        lines = terminal.bar_table(["one", "two"], [("left", [0.5, 1.0]), ("right", [0.25, 0.0])], PLAIN, mark=1)
        assert lines[0].split() == ["left", "right"]
        assert lines[1].split() == ["one", "0.50", "█" * 15, "0.25", "█" * 7 + "▌"]
        assert lines[2].split() == ["▸", "two", "1.00", "█" * 30, "0.00"]
        assert lines[0].index("right") == lines[1].index("0.25") == lines[2].index("0.00")

    def test_bar_tables_are_stacked_in_a_narrow_terminal_on_one_scale(self) -> None:
        narrow = Style(width=40)
        lines = terminal.bar_table(["one"], [("left", [1.0]), ("right", [0.5])], narrow)
        assert [line.strip()[:5].strip() for line in lines] == ["left", "one", "", "right", "one"]
        assert lines[1].count("█") == 2 * lines[4].count("█")

    @pytest.mark.parametrize("style", [PLAIN, ASCII, COLOUR])
    @pytest.mark.parametrize("width", [24, 40, 80, 120])
    @pytest.mark.parametrize("labels", [["a", "bb", "ccc"], ["[CLS]", "unbelievable", "東京", "café", ".", "[SEP]"]])
    def test_nothing_is_wider_than_the_terminal(self, style: Style, width: int, labels: list[str]) -> None:
        style = Style(style.colour, style.blocks, width)
        weights = np.full((len(labels), len(labels)), 1 / len(labels)).tolist()
        lines = terminal.heat_map(labels, weights, style, mark=1) or []
        assert lines
        lines += terminal.bar_table(labels, [("x", weights[0]), ("y", weights[1])], style, 0)
        lines += terminal.legend(style)
        lines += terminal.shaded_text([(" ", label, 0.4) for label in labels], style)
        for line in lines:
            assert terminal.display_width(ESCAPE.sub("", line)) <= width
            assert style.colour or "\x1b" not in line

    def test_heat_map_has_a_row_for_each_word_and_shades_by_weight(self) -> None:
        lines = terminal.heat_map(["who", "what"], [[0.9, 0.1], [0.0, 0.3]], PLAIN, mark=0)
        assert lines == [
            "       who   what",
            "▸ who  █████ ░░░░░",
            "  what       ▒▒▒▒▒",
        ]

    def test_heat_map_writes_the_weights_on_colours(self) -> None:
        lines = terminal.heat_map(["who", "what"], [[0.9, 1.0], [0.04, 0.3]], COLOUR) or []
        assert ESCAPE.sub("", lines[1]).split() == ["who", ".90", "1.0"]
        assert ESCAPE.sub("", lines[2]).split() == ["what", ".30"]

    def test_heat_map_in_narrow_columns_has_labels_written_downwards(self) -> None:
        lines = terminal.heat_map(["abc", "[D]"], [[0, 1], [1, 0]], Style(width=8)) or []
        assert lines == ["      a", "      b", "      cD", "  abc  █", "  [D] █"]

    def test_heat_map_of_many_words_is_none(self) -> None:
        assert terminal.heat_map(["x"] * 60, np.zeros((60, 60)).tolist(), PLAIN) is None

    def test_legend_names_every_shade(self) -> None:
        assert terminal.legend(PLAIN) == ["  ·· .05  ░░ .10  ▒▒ .20  ▓▓ .35  ██ .50"]
        assert "".join(terminal.legend(ASCII)).isascii()
        assert ESCAPE.sub("", "".join(terminal.legend(COLOUR))).split() == [".05", ".10", ".20", ".35", ".50", ".75"]

    def test_shaded_text_keeps_the_sentence(self) -> None:
        parts = [("", "Don't", 0.0), (" ", "stop", 0.68), ("", ".", 0.01)]
        assert terminal.shaded_text(parts, PLAIN) == ["  Don't stop(.68)."]
        assert ESCAPE.sub("", "".join(terminal.shaded_text(parts, COLOUR))) == "  Don't stop."

    def test_wrap(self) -> None:
        assert terminal.wrap("aa bb cc", 5) == ["aa bb", "cc"]
        assert terminal.wrap("abcdefgh", 5, "  ") == ["  abc", "  def", "  gh"]
        assert terminal.wrap("東京東京", 5) == ["東京", "東京"]
        assert terminal.wrap("", 5) == []

    def test_printable_has_no_controls(self) -> None:
        assert terminal.printable("a\x1b[2J\n\tb\u202e\x9b c") == "a [2J b c"


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        """Return True."""
        return True


class TestStyle:
    @pytest.mark.parametrize(
        ("stream", "environ", "colour"),
        [
            (Screen(), {}, True),
            (Screen(), {"NO_COLOR": ""}, True),
            (Screen(), {"NO_COLOR": "0"}, False),
            (Screen(), {"TERM": "dumb"}, False),
            (io.StringIO(), {}, False),
        ],
    )
    def test_colours_are_for_terminals_that_want_them(self, stream: Any, environ: dict[str, str], colour: bool) -> None:
        assert Style.of(stream, environ).colour is colour

    @pytest.mark.parametrize(
        ("encoding", "blocks"), [("utf-8", True), ("ascii", False), ("latin-1", False), ("x", False)]
    )
    def test_blocks_are_for_encodings_that_have_them(self, encoding: str, blocks: bool) -> None:
        stream = Screen()
        stream.encoding = encoding
        assert Style.of(stream, {}).blocks is blocks

    def test_progress_is_one_line_that_goes_away(self) -> None:
        screen, ticks = Screen(), count()
        with Progress("reading", screen, lambda: float(next(ticks)), {}) as progress:
            progress(1, 4)
            progress(2, 4, "file\n")
        text = screen.getvalue()
        assert "\n" not in text
        assert "1/4, 3 s left" in text
        assert "2/4, 2 s left  file" in text
        assert text.endswith("\r\x1b[K")

    def test_progress_is_not_shown_more_than_ten_times_a_second(self) -> None:
        screen = Screen()
        with Progress("reading", screen, lambda: 0.0, {}) as progress:
            for done in range(1000):
                progress(done, 1000)
            progress(1000, 1000)
        assert screen.getvalue().count("\r") == 3

    def test_progress_is_silent_where_nobody_looks(self) -> None:
        stream = io.StringIO()
        with Progress("reading", stream) as progress:
            progress(1, 2)
        assert stream.getvalue() == ""

    def test_progress_in_a_notebook_is_one_output_that_is_empty_at_the_end(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shown: list[str] = []

        def display(data: dict[str, str], *, raw: bool, display_id: bool) -> SimpleNamespace:
            shown.append(data["text/plain"])
            return SimpleNamespace(update=lambda data, *, raw: shown.append(data["text/plain"]))

        monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
        for name in ("IPython", "IPython.display"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["IPython.display"].__dict__["display"] = display
        with Progress("reading") as progress:
            progress(4, 4, "file")
        assert shown[1].startswith("reading")
        assert shown[2].endswith(" 4/4  file")
        assert (shown[0], shown[-1]) == ("", "")
        assert "\x1b" not in "".join(shown)
