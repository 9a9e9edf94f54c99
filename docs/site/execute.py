"""Run notebooks where they lie, and keep what they print: ``python docs/site/execute.py FILE ...``."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

#: Kernels are talked to by sockets that are files of this user's, and not by ports, which others could listen at.
LOCAL = Config(KernelManager={"transport": "ipc"})


def execute(path: Path) -> None:
    """Run the cells of a notebook in its folder; the first that fails is an error."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, config=LOCAL, resources={"metadata": {"path": str(path.parent)}}).execute()
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"running {name}", flush=True)
        execute(Path(name))
