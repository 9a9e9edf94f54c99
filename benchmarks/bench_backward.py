"""Is the backward pass faster than PyTorch's?"""

from collections.abc import Callable

import pytest

from fastattn.bench.cases import Case, select
from fastattn.bench.peers import ENGINES, Engine


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
@pytest.mark.parametrize("case", select(["backward"]), ids=lambda case: case.name)
def test_backward(compare: Callable[[Case, Engine], None], case: Case, engine: Engine) -> None:
    compare(case, engine)
