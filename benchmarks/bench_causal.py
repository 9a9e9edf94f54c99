"""Is the half that a causal mask leaves done in half the time?"""

from collections.abc import Callable

import pytest

from fastattn.bench.cases import Case, select
from fastattn.bench.peers import ENGINES, Engine


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
@pytest.mark.parametrize("case", select(["float32 causal"]), ids=lambda case: case.name)
def test_causal(compare: Callable[[Case, Engine], None], case: Case, engine: Engine) -> None:
    compare(case, engine)
