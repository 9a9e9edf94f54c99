"""What a mutation is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One edit: in `file` of the package, `old`, which stands there exactly once, becomes `new`.

    `tests` is what pytest is given, a file of tests and an expression for its -k. `of_pairs`: what it breaks is run on
    machines alone that multiply pairs of bfloat16.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, str]
    of_pairs: bool = False
