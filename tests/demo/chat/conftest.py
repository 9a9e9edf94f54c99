"""The models that tests of the conversation run on."""

from __future__ import annotations

import gguf_files
import pytest

from fastattn.console.terminal import UserError
from fastattn.demo.chat.model import SmolLM2


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmolLM2:
    """Return a model of random weights, which reads up to 256 tokens."""
    return SmolLM2.load(gguf_files.small_model(tmp_path_factory.mktemp("small") / "model"))


@pytest.fixture(scope="session")
def model() -> SmolLM2:
    """Return SmolLM2-135M-Instruct."""
    try:
        return SmolLM2.load()
    except UserError as error:
        pytest.skip(str(error))
