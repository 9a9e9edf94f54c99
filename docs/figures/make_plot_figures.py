"""Make the pictures of docs/plot.md by running the page: ``python docs/figures/make_plot_figures.py``.

A picture is what the piece of code above it has drawn. The page's text and its pictures cannot disagree that way.
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

FOLDER = Path(__file__).parent
PIECE = re.compile(r"^```python\n(.*?)^```$|^!\[.*?\]\(figures/(.*?)\)$", re.MULTILINE | re.DOTALL)


def main() -> None:
    """Run the page, and save the last figure wherever a picture stands."""
    namespace: dict[str, object] = {}
    for piece in PIECE.finditer((FOLDER.parent / "plot.md").read_text("utf-8")):
        code, picture = piece.groups()
        if code is not None:
            pyplot.close("all")
            exec(compile(code, "docs/plot.md", "exec"), namespace)
        else:
            # no date and no version, so that what looks the same is the same file
            pyplot.gcf().savefig(FOLDER / picture, dpi=110, metadata={"Software": None})
            print(f"{picture}: {(FOLDER / picture).stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
