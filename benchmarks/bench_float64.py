"""Is attention in float64, full and causal, faster than PyTorch's?"""

from collections.abc import Callable

import pytest

from fastattn.bench.cases import Case, select
from fastattn.bench.peers import ENGINES, Engine


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
@pytest.mark.parametrize("case", select(["float64"]), ids=lambda case: case.name)
def test_float64(compare: Callable[[Case, Engine], None], case: Case, engine: Engine) -> None:
    compare(case, engine)
