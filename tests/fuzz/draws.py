"""The strategies of the tests, drawn from without Hypothesis around them: one case for each seed, far more quickly.

What Hypothesis does besides, to shrink a failure and to try what is near, a seed that is found here does not need at
once: `test_fuzz.py` draws the same case.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

WIDEST = 2**64  # of integers without bounds
#: Composites of which there are few different ones, each of them in many calls: what they draw has to be compiled.
COMPILED, FEW = ("functions",), 24


class Draws:
    """A `draw` as `hypothesis.strategies.composite` gives to a function, of numbers that a seed decides.

    In another generation what has to be compiled is something else.
    """

    def __init__(self, seed: int, generation: int = 0) -> None:
        self.random, self.generation = random.Random(seed), generation

    def __call__(self, strategy: Any, label: Any = None) -> Any:
        """Return an element of a strategy."""
        while type(strategy).__name__ == "LazyStrategy":
            strategy = strategy.wrapped_strategy
        return OF_KIND[type(strategy).__name__](self, strategy)

    def composite(self, strategy: Any) -> Any:
        """Return what a function makes of draws."""
        few = strategy.definition.__name__ in COMPILED
        draw = Draws(self.generation * FEW + self.random.randrange(FEW), self.generation) if few else self
        return strategy.definition(draw, *strategy.args, **strategy.kwargs)

    def integer(self, strategy: Any) -> int:
        """Return an integer between the bounds."""
        start = -WIDEST if strategy.start is None else strategy.start
        return self.random.randint(start, WIDEST if strategy.end is None else strategy.end)

    def sampled(self, strategy: Any) -> Any:
        """Return one of some values."""
        return strategy.elements[self.random.randrange(len(strategy.elements))]

    def listed(self, strategy: Any) -> list[Any]:
        """Return a list, of no more than eight elements unless it is said."""
        most = strategy.max_size if strategy.max_size < 1000 else strategy.min_size + 8
        return [self(strategy.element_strategy) for _ in range(self.random.randint(strategy.min_size, most))]

    def unique(self, strategy: Any) -> list[Any]:
        """Return a list of different ones of some values."""
        values = strategy.element_strategy.elements
        return self.random.sample(values, self.random.randint(strategy.min_size, min(strategy.max_size, len(values))))


OF_KIND: dict[str, Callable[[Draws, Any], Any]] = {
    "IntegersStrategy": Draws.integer,
    "SampledFromStrategy": Draws.sampled,
    "JustStrategy": Draws.sampled,
    "BooleansStrategy": lambda draw, strategy: draw.random.random() < 0.5,
    "FloatStrategy": lambda draw, strategy: draw.random.uniform(strategy.min_value, strategy.max_value),
    "OneOfStrategy": lambda draw, strategy: draw(draw.random.choice(strategy.original_strategies)),
    "TupleStrategy": lambda draw, strategy: tuple(map(draw, strategy.element_strategies)),
    "ListStrategy": Draws.listed,
    "UniqueSampledListStrategy": Draws.unique,
    "MappedStrategy": lambda draw, strategy: strategy.pack(draw(strategy.mapped_strategy)),
    "CompositeStrategy": Draws.composite,
}
