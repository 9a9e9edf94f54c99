"""Make the pages of this folder and their pictures: ``python docs/guide/build.py [NAME ...]``, all if none is named.

Needs what the demo and `demo chat` need, and matplotlib. The pages themselves are in fastattn/guide/.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from fastattn.demo.chat.model import SmolLM2
from fastattn.guide import PAGES, language_model, load
from fastattn.guide.markdown import contents, need_matplotlib, write

FOLDER = Path(__file__).parent

if __name__ == "__main__":
    if unknown := set(sys.argv[1:]) - set(PAGES):
        sys.exit(f"no pages of the guide: {', '.join(sorted(unknown))}; they are: {', '.join(PAGES)}")
    need_matplotlib()
    for name in sys.argv[1:] or PAGES:
        start = time.perf_counter()
        page = load(name)
        steps = page.steps()
        if name == "language-model":  # which is read where its model is not installed, too
            language_model.keep(language_model.measured(SmolLM2.load()))
            steps = language_model.told(language_model.kept())
        written = write(page, steps, FOLDER)
        print(f"{name}: {len(written) - 1} pictures, {time.perf_counter() - start:.1f} s")
    (FOLDER / "README.md").write_text(contents(), "utf-8")
