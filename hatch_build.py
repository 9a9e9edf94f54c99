"""What a package index shows: README.md without its links into the repository, which lead nowhere from there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"\[([^\]]*)\]\((?!https?://|mailto:)[^)]*\)")
PICTURE = re.compile("!" + LINK.pattern)
WHERE = "The pages and pictures that this text speaks of are in the source distribution, below `docs`.\n"


def description(text: str) -> str:
    """A text in which links into the repository are plain words, and pictures in it are what they show."""
    return LINK.sub(r"\1", PICTURE.sub(r"*Picture: \1.*", text)) + "\n" + WHERE


class Readme(MetadataHookInterface):
    """The field `readme`, which pyproject.toml declares dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Fill it in."""
        text = Path(self.root, "README.md").read_text("utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": description(text)}
