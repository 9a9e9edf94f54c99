"""Pictures of which moment each word listened to: in a terminal, and by `fastattn.plot`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.console.terminal import Style, cut, heat_map, legend, wrap
from fastattn.demo.listen.listener import Segment
from fastattn.demo.listen.vocabulary import TICK

__all__ = ["clock", "draw", "in_steps", "pages", "picture"]

#: Seconds that one picture shows, as far as segments allow, and columns that it may have.
PAGE, COLUMNS = 10.0, 40
#: Seconds of a column: the shortest with which there are few enough.
STEPS = (0.1, 0.2, 0.25, 0.5, 1.0)
#: Inches of a second and of a word in a file, and the most of a side.
SECOND, WORD, LONGEST = 0.9, 0.22, 40.0


def clock(seconds: float) -> str:
    """A moment as people write it.

    Examples
    --------
    >>> clock(83.25)
    '1:23.3'
    """
    tenths = int(seconds * 10 + 0.5)
    return f"{tenths // 600}:{tenths // 10 % 60:02}.{tenths % 10}"


def pages(segments: Iterable[Segment]) -> Iterator[list[Segment]]:
    """Put segments of one window together that fit one picture."""
    page: list[Segment] = []
    for segment in segments:
        if page and (segment.window != page[0].window or segment.end - page[0].start > PAGE):
            yield page
            page = []
        page.append(segment)
    if page:
        yield page


def in_steps(page: Sequence[Segment]) -> tuple[float, float, NDArray[np.float64]]:
    """The looks of all words of a page, in steps of time.

    Returns
    -------
    start, step : float
        When the first step begins, and how long one is, in seconds.
    weights : ndarray, shape (words, steps)
        The part of its look that each word has for each step.
    """
    first = page[0]
    length = max(page[-1].end - first.start, STEPS[0])
    step = next((each for each in STEPS if length <= each * COLUMNS), STEPS[-1])
    start = np.floor(first.start / step) * step
    looks = np.concatenate([segment.looks for segment in page])
    # The step of each moment; what lies outside of the page is not drawn
    place = np.floor((first.window.start + (np.arange(looks.shape[1]) + 0.5) * TICK - start) / step).astype(int)
    count = int(np.ceil((page[-1].end - start) / step - 1e-6)) or 1
    weights = np.zeros((len(looks), count))
    inside = (place >= 0) & (place < count)
    np.add.at(weights.T, place[inside], looks[:, inside].T)
    return float(start), step, weights


def picture(page: Sequence[Segment], style: Style) -> list[str]:
    """A map of the words of a page (rows) over the moments of the sound (columns); whole seconds are written above."""
    start, step, weights = in_steps(page)
    words = [word for segment in page for word in segment.words]
    times = start + step * np.arange(weights.shape[1])
    labels = [f"{time:.0f}" if abs(time - round(time)) < step / 4 else " " for time in times.tolist()]
    square = heat_map(words, weights.tolist(), style, columns=labels)
    lines = wrap(f"Which moment each word listened to: a column is {step:g} s, above it the seconds", style.width)
    if square is None:  # no space for a map: the moment alone
        best = times[weights.argmax(axis=1)].tolist()
        return [
            *lines,
            *(f"  {clock(time)} {cut(word, style.width - 10)}" for word, time in zip(words, best, strict=True)),
        ]
    return [*lines, *square, "", *legend(style)]


def draw(segments: Sequence[Segment], path: Path) -> None:
    """Draw the looks of all words of the first window into a file, with `fastattn.plot.heatmap`."""
    import matplotlib
    from matplotlib.figure import Figure

    from fastattn import plot

    segments = [segment for segment in segments if segment.window == segments[0].window]
    words = [word for segment in segments for word in segment.words]
    looks = np.concatenate([segment.looks for segment in segments])
    heard, moments = segments[0].window.start, looks.shape[1]
    size = (min(LONGEST, 2 + SECOND * moments * TICK), min(LONGEST, 1.5 + WORD * len(words)))
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure = Figure(size, layout="constrained")
        axes: Any = figure.add_subplot()
        plot.heatmap(looks, words, [clock(heard + TICK * moment) for moment in range(moments)], ax=axes)
        every = np.arange(0, moments, round(1 / TICK))  # whole seconds
        axes.set_xticks(every, [f"{heard + TICK * moment:.0f}" for moment in every.tolist()], rotation=0)
        axes.tick_params(axis="x", labelsize="medium")
        axes.set(xlabel="seconds", ylabel="words")
        figure.savefig(path, dpi=110)
