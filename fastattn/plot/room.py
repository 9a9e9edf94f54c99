"""Room around axes that are not ours alone: tokens and scales of one picture do not overlap the next one's.

A layout of the figure is told how much is needed. Where there is none, the axes themselves become smaller, as they do
for a colour bar of matplotlib's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from matplotlib.artist import Artist
from matplotlib.layout_engine import PlaceHolderLayoutEngine
from matplotlib.transforms import Bbox

from fastattn.plot.canvas import PAD, EveryFew

__all__ = ["make_room"]


def make_room(ax: Any) -> None:
    """Let nothing that is around axes of the user's overlap what is around others."""
    ax.add_artist(_Surroundings())
    if not _has_layout(ax) and ax.get_subplotspec() is not None:
        _shrink(ax)


def _has_layout(ax: Any) -> bool:
    """Whether a layout places the axes of the figure, if only for now."""
    return not isinstance(ax.figure.get_layout_engine(), (PlaceHolderLayoutEngine, type(None)))


class _Surroundings(Artist):  # type: ignore[misc]
    """Something invisible as large as the place of axes and what is around them, for layouts to reckon with.

    A layout tries places one after the other, and takes what is around the axes in one for that in the next. But axes
    of a fixed aspect are smaller than their place, by more or less, and small axes do not have all their labels drawn.
    """

    def __init__(self) -> None:
        super().__init__()
        self.set_clip_on(False)  # what is clipped to the axes takes no part in a layout

    def get_tightbbox(self, renderer: Any = None) -> Any:
        """Return the extent in pixels; none where no layout asks, but who cuts off what is empty."""
        if not _has_layout(self.axes):
            return None
        outer = _extent(self.axes, renderer, self)
        if outer is None:
            return None
        figure, spec = self.axes.figure, self.axes.get_subplotspec()
        place = self.axes.get_position(original=True)
        if figure.get_layout_engine().adjust_compatible and spec is not None:
            place = spec.get_position(figure)  # such a layout moves the places of the grid, not those of axes
        points = place.transformed(figure.transSubfigure).get_points()
        return Bbox(points + outer.get_points() - self.axes.bbox.get_points())


def _shrink(ax: Any) -> None:
    """Make axes of a grid so small that they, and what is around them, lie in their place and at the left of it.

    What is at the edge of the figure may use the space up to it.
    """
    figure, spec = ax.figure, ax.get_subplotspec()
    bottoms, tops, _, rights = spec.get_gridspec().get_grid_positions(figure)
    rows, columns = spec.rowspan, spec.colspan
    to_figure = figure.transSubfigure.inverted()
    pad_x, pad_y = PAD * figure.dpi / figure.bbox.width, PAD * figure.dpi / figure.bbox.height
    outer, drawn = _extent(ax, None).transformed(to_figure), ax.bbox.transformed(to_figure)
    place = ax.get_position(original=True)
    left = rights[columns.start - 1] + pad_x if columns.start else pad_x
    right = rights[columns.stop - 1] if columns.stop < len(rights) else 1 - pad_x
    bottom = bottoms[rows.stop - 1] if rows.stop < len(bottoms) else pad_y
    top = tops[rows.start] if rows.start else 1 - pad_y
    ax.set_position(
        Bbox.from_extents(
            max(place.x0, left + drawn.x0 - outer.x0),
            max(place.y0, bottom + drawn.y0 - outer.y0),
            min(place.x1, right + drawn.x1 - outer.x1),
            min(place.y1, top + drawn.y1 - outer.y1),
        )
    )
    ax.set_in_layout(True)  # which a position takes it from: a layout that is asked for later finds another


def _extent(ax: Any, renderer: Any, without: Artist | None = None) -> Any:
    """Return the extent in pixels of axes and all around them but one artist, whichever labels are drawn."""
    artists = [artist for artist in ax.get_default_bbox_extra_artists() if artist is not without]
    with _widest_labels(ax):
        return ax.get_tightbbox(renderer, bbox_extra_artists=artists)


@contextmanager
def _widest_labels(ax: Any) -> Iterator[None]:
    """Have axes, and those that are part of them, draw the widest of their labels only."""
    locators = [axis.get_major_locator() for each in (ax, *ax.child_axes) for axis in (each.xaxis, each.yaxis)]
    for locator in locators:
        if isinstance(locator, EveryFew):
            locator.only_widest = True
    try:
        yield
    finally:
        for locator in locators:
            if isinstance(locator, EveryFew):
                locator.only_widest = False
