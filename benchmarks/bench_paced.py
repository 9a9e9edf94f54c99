"""How long does a call take where one comes every 20 ms, and threads have gone to sleep?"""

from collections.abc import Callable

import pytest

from fastattn.bench.cases import Case, select
from fastattn.bench.peers import ENGINES, Engine


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
@pytest.mark.parametrize("case", select(["every 20 ms"]), ids=lambda case: case.name)
def test_paced(compare: Callable[[Case, Engine], None], case: Case, engine: Engine) -> None:
    compare(case, engine)
