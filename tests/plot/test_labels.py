"""Labels of plots: fonts for all writing, and room for what is around maps side by side."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest

from fastattn import plot

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib, which draws the plots, is not installed")
matplotlib.use("agg")
from matplotlib import font_manager, pyplot  # noqa: E402

from fastattn.plot import canvas, fonts  # noqa: E402


def softmax_like(*shape: int) -> Any:
    return np.random.default_rng(0).dirichlet(np.full(shape[-1], 0.2), size=shape[:-1])


# -- fonts -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def few_fonts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have those fonts only that come with matplotlib, whatever else is installed, and nothing said of others yet."""
    own = [font for font in font_manager.fontManager.ttflist if "mpl-data" in font.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    monkeypatch.setattr(fonts, "_named", set())
    monkeypatch.setitem(matplotlib.rcParams, "font.family", ["DejaVu Sans"])
    return own


JAPANESE = ["東京", "は", "とても", "🫠"]


@pytest.mark.usefixtures("few_fonts")
@pytest.mark.parametrize(
    "draw",
    [
        lambda: plot.heatmap(softmax_like(4, 4), JAPANESE),
        lambda: plot.links(softmax_like(4, 4), JAPANESE),
        lambda: plot.text(softmax_like(4), JAPANESE).draw(),
    ],
)
def test_one_warning_names_the_missing_fonts(draw: Any) -> None:
    with pytest.warns(UserWarning, match="drawn as □") as caught:
        ax = draw()
    (warning,) = caught
    ax.figure.canvas.draw()  # matplotlib has nothing to warn of: a warning is an error here
    draw()
    assert warning.filename == __file__
    message = str(warning.message)
    assert "install Noto Sans CJK (fonts-noto-cjk on Debian and Ubuntu)" in message
    assert "🫠 install Symbola (fonts-symbola" in message
    assert matplotlib.get_cachedir() in message


@pytest.mark.usefixtures("few_fonts")
def test_another_font_that_is_missing_is_named_as_well() -> None:
    with pytest.warns(UserWarning, match="東 install Noto Sans CJK"):
        assert fonts.drawable(["東"])[0] == ["□"]
    with pytest.warns(UserWarning, match="ไ install Noto Sans of that script") as caught:
        fonts.drawable(["東ไ"])
    assert "CJK" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fonts.drawable(["東ไ", "a"])[0] == ["□□", "a"]


@pytest.mark.usefixtures("few_fonts")
def test_many_characters_are_told_in_few_words() -> None:
    with pytest.warns(UserWarning, match="…") as caught:
        fonts.drawable([chr(0x4E00 + place) for place in range(3000)])
    assert len(str(caught[0].message)) < 400


@pytest.mark.usefixtures("few_fonts")
def test_any_installed_font_that_has_a_character_is_used() -> None:
    """Not only those that are known for it; but none whose glyph is that of no character."""
    script_a = "\U0001d49c"
    labels, families = fonts.drawable([f"a{script_a}"])
    assert labels == [f"a{script_a}"]
    assert len(families) == 2
    assert not any(fonts.UNFIT.match(family) for family in families)
    ax = plot.heatmap(softmax_like(1, 1), [script_a])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax.figure.canvas.draw()


@pytest.mark.usefixtures("few_fonts")
def test_what_no_font_could_have_has_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fonts.drawable(["a\u0378", "\ue123"])[0] == ["a□", "□"]


def test_settings_are_looked_at_each_time(few_fonts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matplotlib.rcParams, "font.family", ["sans-serif"])
    for first in ("STIXGeneral", "DejaVu Sans"):
        monkeypatch.setitem(matplotlib.rcParams, "font.sans-serif", [first])
        labels, families = fonts.drawable(["\U0001d49c"])
        assert labels == ["\U0001d49c"]
        assert (len(families) == 1) is (first == "STIXGeneral")


def test_widths_are_those_that_are_drawn() -> None:
    texts = ["m" * 9, "i" * 9, "incomprehensible", "❯"]
    ax = pyplot.figure(dpi=720).add_subplot()
    drawn = [ax.text(0, 0, text, fontsize=10).get_window_extent().width / 10 for text in texts]
    found = fonts.widths_of(texts, matplotlib.rcParams["font.family"], 10)
    np.testing.assert_allclose(found, drawn, rtol=0.02)


# -- side by side ------------------------------------------------------------------------------------------------------

LAYOUTS = ["constrained", "compressed", "tight", None]


def apart(first: Any, second: Any) -> float:
    """Return how many pixels there are between two boxes; below 0 if they overlap."""
    return float(
        max(
            max(first.x0, second.x0) - min(first.x1, second.x1),
            max(first.y0, second.y0) - min(first.y1, second.y1),
        )
    )


def labels_of(axis: Any) -> list[Any]:
    """Return the labels along an axis that are drawn."""
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    labels = [label for tick in ticks for label in (tick.label1, tick.label2)]
    return [label for label in labels if label.get_visible() and label.get_text()]


def assert_apart(figure: Any, panels: Any) -> None:
    """Nothing of one picture overlaps another's, no label of one its neighbour, and all is inside of the figure."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    boxes = [panel.get_tightbbox(renderer, for_layout_only=True) for panel in panels]  # without titles, as layouts do
    for one, other in itertools.combinations(boxes, 2):
        assert apart(one, other) >= -0.5
    for box in boxes:
        assert min(box.x0, box.y0, figure.bbox.x1 - box.x1, figure.bbox.y1 - box.y1) >= -1
    for ax in [axes for panel in panels for axes in (panel, *panel.child_axes)]:
        for axis in (ax.xaxis, ax.yaxis):
            for one, other in itertools.pairwise(label.get_window_extent() for label in labels_of(axis)):
                assert apart(one, other) >= -0.5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_of_words_beside_a_curve(layout: Any) -> None:
    """As in the example of pronunciations, where the labels of one map lay on the scale of the other."""
    figure, panels = pyplot.subplots(1, 3, figsize=(11.2, 3.6), layout=layout)
    panels[0].plot([1, 2, 3])
    panels[0].set(xlabel="letters", ylabel="held-out words right, %")
    words = ("thoroughbred", "misinterpretation")
    spoken = ("TH AO R UW B ER D <end>", "M IH S IH N T ER P R EY T EY SH AH N <end>")
    for panel, word, sounds in zip(panels[1:], words, spoken, strict=True):
        said = sounds.split()
        plot.heatmap(softmax_like(len(said), len(word)), said, list(word), vmax=1, ax=panel)
    assert_apart(figure, panels[1:])
    assert apart(*(panel.get_tightbbox(for_layout_only=True) for panel in panels[:2])) >= -0.5
    if layout == "constrained":
        assert [label.get_text() for label in labels_of(panels[2].xaxis)] == list(words[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(6))
def test_pictures_of_any_kind_side_by_side(layout: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = [(1, 2), (2, 2), (1, 3), (2, 1), (2, 3), (1, 2)][seed]
    size = rng.uniform(2.8, 4.2) * columns, rng.uniform(2.8, 4.2) * rows
    figure, panels = pyplot.subplots(rows, columns, figsize=size, layout=layout, squeeze=False)
    for panel in panels.flat:
        lengths = rng.integers(3, 24, 2)
        weights = rng.dirichlet(np.ones(lengths[1]), size=(2, lengths[0]))
        queries, keys = (
            ["m" * width] * length if width else None
            for width, length in zip((rng.choice([0, 1, 5, 9]), rng.choice([0, 1, 3])), lengths, strict=True)
        )
        kind = rng.choice(["heatmap", "heatmap", "links", "heads"])
        if kind == "heads":
            plot.heads(weights, ax=panel)
        elif kind == "links":
            plot.links(weights, queries, keys, ax=panel)
        else:
            plot.heatmap(weights[0], queries, keys, ax=panel)
    assert_apart(figure, list(panels.flat))


def test_a_map_alone_in_its_figure_keeps_its_size() -> None:
    """Without neighbours there is room enough around it."""
    figure, ax = pyplot.subplots(figsize=(6, 6))
    place = ax.get_position(original=True).bounds
    plot.heatmap(softmax_like(5, 5), list("abcde"), colorbar=False, ax=ax)
    figure.canvas.draw()
    assert ax.get_position(original=True).bounds == pytest.approx(place)


def test_a_layout_that_is_asked_for_later_places_maps_as_well() -> None:
    figure, panels = pyplot.subplots(1, 2, figsize=(7, 3))
    for panel in panels:
        plot.heatmap(softmax_like(6, 6), list("abcdef"), ax=panel)
    before = [panel.get_position(original=True).bounds for panel in panels]
    figure.tight_layout()
    assert [panel.get_position(original=True).bounds for panel in panels] != before
    assert_apart(figure, panels)


def test_axes_that_are_in_no_grid_stay_where_they_are() -> None:
    figure = pyplot.figure()
    ax = figure.add_axes((0.3, 0.3, 0.2, 0.2))
    plot.heatmap(softmax_like(6, 6), list("abcdef"), ax=ax)
    assert ax.get_position(original=True).bounds == pytest.approx((0.3, 0.3, 0.2, 0.2))


def test_which_labels_fit() -> None:
    assert canvas.fitting_step(np.full(10, 8.0), 8.0) == 1
    assert canvas.fitting_step(np.full(10, 8.1), 8.0) == 2
    assert canvas.fitting_step(np.array([12.0, 3.0, 12.0, 3.0]), 8.0) == 1  # a wide one between narrow ones
    assert canvas.fitting_step(np.array([12.0, 12.0, 3.0, 3.0]), 8.0) == 2
    assert canvas.fitting_step(np.full(3, 100.0), 1.0) == 3
    assert canvas.fitting_step(np.ones(1), 0.0) == 1
