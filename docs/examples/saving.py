"""What the examples' command lines share: their options, and where results and pictures are kept."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np

import fastattn

FOLDER = Path(__file__).parent


def options(description: str | None) -> argparse.Namespace:
    """Return what the command line asks for: `quick`, `save` and `seed`."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a miniature, in seconds; it learns little")
    parser.add_argument("--save", action="store_true", help="write docs/examples/results/ and docs/examples/figures/")
    parser.add_argument("--seed", type=int, default=0, help="what everything random is drawn from (0)")
    return parser.parse_args()


def save_result(name: str, result: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Write results/NAME.json: what was measured, and with which versions."""
    versions = {"python": platform.python_version(), "numpy": np.__version__, "fastattn": fastattn.__version__}
    path = folder / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    text = json.dumps({**result, "versions": versions}, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", "utf-8")
    return path


def save_figure(name: str, figure: Any, folder: Path = FOLDER) -> Path:
    """Write figures/NAME.png, without a date or a version: what looks the same is the same file."""
    path = folder / "figures" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    return path
