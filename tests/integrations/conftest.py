"""Fixtures of the tests with other libraries."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    """Have transformers know our attention, say little, and compute with one thread of PyTorch's."""
    import small_models
    import torch

    from fastattn.integrations import transformers as ours

    ours.register()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with small_models.quiet():
        yield
    torch.set_num_threads(threads)
