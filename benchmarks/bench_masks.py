"""What do masks cost: a float per head, query and key, booleans, key padding?"""

from collections.abc import Callable

import pytest

from fastattn.bench.cases import Case, select
from fastattn.bench.peers import ENGINES, Engine


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
@pytest.mark.parametrize("case", select(["mask", "padding"]), ids=lambda case: case.name)
def test_masks(compare: Callable[[Case, Engine], None], case: Case, engine: Engine) -> None:
    compare(case, engine)
