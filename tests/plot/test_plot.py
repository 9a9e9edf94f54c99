"""All plots: axes, settings and arguments, and a Python without matplotlib."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import processes
import pytest
from plot_cases import (
    assert_apart,
    assert_inside,
    shown,
    softmax_like,
)

from fastattn import plot
from fastattn.call.advice import to_install

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib, which draws the plots, is not installed")
matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402

SQUARE = softmax_like(4, 4)
CALLS = {
    "heatmap": lambda ax: plot.heatmap(SQUARE, list("abcd"), ax=ax),
    "links": lambda ax: plot.links(SQUARE, list("abcd"), ax=ax),
    "heads": lambda ax: plot.heads(SQUARE, ax=ax),
    "text": lambda ax: plot.text(SQUARE, list("abcd"), ax=ax) if ax else plot.text(SQUARE, list("abcd")).draw(),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@every_call
def test_axes_that_are_given_are_drawn_on(call: Any) -> None:
    figure, axes = pyplot.subplots(1, 2, layout="constrained")
    size = figure.get_size_inches().tolist()
    assert call(axes[0]) is axes[0]
    assert pyplot.get_fignums() == [figure.number]
    assert pyplot.gca() is axes[1]
    assert figure.get_size_inches().tolist() == size
    assert_apart(shown(axes[0].yaxis))
    assert call(None).figure is not figure


@every_call
def test_figures_without_pyplot(call: Any) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 3))
    ax = figure.subplots()
    call(ax)
    for kind in ("png", "svg", "pdf"):
        figure.savefig(io.BytesIO(), format=kind)
    assert pyplot.get_fignums() == []


@every_call
def test_settings_and_windows_are_left_alone(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyplot, "show", lambda *_, **__: pytest.fail("a window was opened"))
    before = copy.deepcopy(dict(matplotlib.rcParams))
    call(None)
    assert dict(matplotlib.rcParams) == before


@every_call
def test_settings_of_the_user_do_no_harm(call: Any) -> None:
    with matplotlib.rc_context(
        {"image.origin": "lower", "figure.constrained_layout.use": True, "font.family": "serif"}
    ):
        assert_inside(call(None))


def test_inputs_are_not_written_to() -> None:
    weights = softmax_like(2, 3, 3)
    weights.flags.writeable = False
    plot.heatmap(weights, head=0)
    plot.links(weights)
    plot.heads(weights)
    plot.text(weights, ["a", "b", "c"], head=1).draw()


@pytest.mark.parametrize("function", [plot.heatmap, plot.links, plot.heads])
@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([0.5, 0.5], ValueError, r"^weights: shape \(2,\); expected \(queries, keys\)"),
        ([[0.5, -0.1]], ValueError, "^weights: has -0.1; expected weights, finite and not negative"),
        ([[0.5, np.inf]], ValueError, "^weights: has inf"),
        ([[1j]], TypeError, "^weights: dtype complex128; expected real numbers"),
        ([["a"]], TypeError, "^weights: dtype <U1"),
        (np.zeros((0, 3)), ValueError, "0 queries and 3 keys; expected at least one of each"),
        (np.zeros((2, 0)), ValueError, "2 queries and 0 keys"),
        (
            np.zeros((2, 2, 2, 2, 2)),
            ValueError,
            r"stack of shape \(2, 2, 2\) of maps of 2 queries and 2 keys; expected",
        ),
        (
            SimpleNamespace(top_weights=np.ones((2, 1)), top_indices=np.ones((2, 2), int), received=np.ones(2)),
            ValueError,
            r"top_weights of shape \(2, 1\) and top_indices of shape \(2, 2\)",
        ),
        (
            SimpleNamespace(top_weights=np.ones((2, 1)), top_indices=np.full((2, 1), 5), received=np.ones(2)),
            ValueError,
            "^weights.top_indices: from 5 to 5; expected indices of 2 keys, or -1",
        ),
        (
            SimpleNamespace(top_weights=np.ones((3, 2, 1)), top_indices=np.zeros((3, 2, 1), int), received=np.ones(2)),
            ValueError,
            r"received of shape \(2,\); expected \(3, 'keys'\)",
        ),
        (
            SimpleNamespace(top_weights=np.ones((2, 1)), top_indices=np.ones((2, 1)), received=np.ones(2)),
            TypeError,
            "^weights.top_indices: dtype float64; expected integers",
        ),
    ],
)
def test_bad_weights(function: Any, weights: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        function(weights)
    assert pyplot.get_fignums() == []


STACK = softmax_like(2, 3, 3)
BATCH = softmax_like(2, 5, 3, 3)  # and heads


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plot.heatmap(STACK), ValueError, r"stack of shape \(2,\).*expected one head, .*head="),
        (lambda: plot.links(STACK[None].repeat(2, 0)), ValueError, r"stack of shape \(2, 2\).*expected heads"),
        (lambda: plot.heatmap(STACK), ValueError, "choose with head=0$"),
        (lambda: plot.heatmap(BATCH), ValueError, r"choose with head=\(0, 0\)$"),
        (lambda: plot.heatmap(BATCH, head=0), ValueError, r"^head: 0 for the axes \(2, 5\).* such as head=\(0, 0\)$"),
        (lambda: plot.text(BATCH, ["a", "b", "c"], head=1), ValueError, r"^head: 1 for .* such as head=\(0, 0\)$"),
        (lambda: plot.links(BATCH), ValueError, r"expected heads, \(H, Lq, Lk\): choose with head=0$"),
        (lambda: plot.links(BATCH[None].repeat(3, 0), head=0), ValueError, r"^head: 0 for .* such as head=\(0, 0\)$"),
        (lambda: plot.heatmap(BATCH[:1], head=5), ValueError, r"^head: 5; expected an index of the axes \(5,\)"),
        (
            lambda: plot.heads(BATCH[None].repeat(3, 0)),
            ValueError,
            r"choose with weights\[:, 0\], the first of",
        ),
        (
            lambda: plot.heads([BATCH] * 3),
            ValueError,
            r"^layer 0 .* choose with \[layer\[0\] for layer in",
        ),
        (lambda: plot.heatmap(STACK, head=2), ValueError, r"^head: 2; expected an index of the axes \(2,\)"),
        (lambda: plot.heatmap(STACK, head=(0, 0)), ValueError, r"^head: \(0, 0\)"),
        (lambda: plot.heatmap(STACK, head=0.5), TypeError, "^head: 0.5 of type float"),
        (
            lambda: plot.heatmap(SQUARE, "abcd"),
            TypeError,
            "^queries: 'abcd' of type str; expected a sequence of 4 strings",
        ),
        (lambda: plot.heatmap(SQUARE, ["a"]), ValueError, "^queries: 1 strings; expected 4, one for each query"),
        (lambda: plot.heatmap(SQUARE, None, list("abc")), ValueError, "^keys: 3 strings; expected 4, one for each key"),
        (lambda: plot.links(STACK, names=["a"]), ValueError, "^names: 1 strings; expected 2, one for each head"),
        (lambda: plot.links(SQUARE, [1, 2, 3, 4]), TypeError, "^queries: 1 of type int at 0"),
        (lambda: plot.links(SQUARE, query=4), ValueError, "^query: 4; expected the number of one of 4 queries"),
        (lambda: plot.links(SQUARE, query=True), TypeError, "^query: True of type bool"),
        (lambda: plot.heatmap(SQUARE, vmax=0), ValueError, "^vmax: 0.0; expected a finite number above 0"),
        (lambda: plot.heads(SQUARE, vmax=np.nan), ValueError, "^vmax: nan"),
        (lambda: plot.links(SQUARE, vmax="1"), TypeError, "^vmax: '1' of type str"),
        (lambda: plot.heatmap(SQUARE, cmap="nope"), ValueError, "^cmap: 'nope'"),
        (lambda: plot.heads(SQUARE, cmap=3), TypeError, "^cmap: 3 of type int"),
        (lambda: plot.heatmap(SQUARE, colorbar=2), TypeError, "^colorbar: "),
        (lambda: plot.heatmap(SQUARE, ax=3), TypeError, "^ax: 3 of type int; expected None or a matplotlib Axes"),
        (lambda: plot.text(SQUARE, list("abcd"), ax=3), TypeError, "^ax: 3"),
        (lambda: plot.heads([SQUARE, -SQUARE]), ValueError, "^layer 1 of weights: has -"),
        (lambda: plot.text(SQUARE, None), TypeError, "^tokens: None; expected a sequence of 4 strings"),
        (lambda: plot.text(SQUARE, ["a"]), ValueError, "^tokens: 1 strings; expected 4"),
        (
            lambda: plot.text(SQUARE[0], list("abcd"), query=0),
            ValueError,
            r"^query: given with weights of shape \(4,\)",
        ),
        (lambda: plot.text(SQUARE[0], list("abcd"), head=0), ValueError, r"^head: given with weights of shape \(4,\)"),
        (lambda: plot.text(0.5, ["a"]), ValueError, r"^weights: shape \(\)"),
        (lambda: plot.text([-1.0], ["a"]), ValueError, "^weights: has -1"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
    assert pyplot.get_fignums() == []


def test_without_matplotlib() -> None:
    """Text is printed without it, and everything else says in one clear error what to install."""
    code = """
import sys
sys.modules["matplotlib"] = None
from fastattn import plot
print(plot.text([0.9], ["cat"])._repr_html_().count("cat"))
for call in (plot.heatmap, plot.links, plot.heads, lambda _: plot.text([0.9], ["cat"]).draw()):
    try:
        call([[1.0]])
    except ImportError as error:
        print(error)
"""
    message = f"fastattn.plot draws with matplotlib, which is not installed here: {to_install('plot')}\n"
    assert processes.run(code) == "1\n" + 4 * message


def test_importing_it_loads_no_matplotlib() -> None:
    assert processes.run("import sys\nfrom fastattn import plot\nprint('matplotlib' in sys.modules)") == "False\n"
