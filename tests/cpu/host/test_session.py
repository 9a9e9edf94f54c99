"""What is remembered from call to call."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from fastattn.cpu.host import session
from fastattn.cpu.host.session import Plans


def test_what_has_become_old_is_found_again_whatever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps of blocks are arrays, of which nobody can say whether they are true."""
    monkeypatch.setattr(session, "REMEMBERED", 2)
    plans, made = Plans(), []

    def make(number: int) -> Callable[[], NDArray[np.uint8]]:
        def array() -> NDArray[np.uint8]:
            made.append(number)
            return np.full((2, 2), number, np.uint8)

        return array

    for number in (0, 1, 2, 0, 1, 2):
        assert (plans.of(number, make(number)) == number).all()
    assert made == [0, 1, 2]
