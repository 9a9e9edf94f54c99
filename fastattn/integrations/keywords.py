"""What may be said of scores by keyword alone, on its way through an operator of PyTorch's.

An operator takes tensors and numbers, and no pairs or lists of either. Each option becomes a few such arguments, which
are None where it is not given, and is itself again where the operator's kernel calls fastattn. What else
`fastattn.attention` may be told by keyword is one entry more in `KEYWORDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from fastattn.call.score_options import FurtherOptions, check_names, check_softcap, check_window
from fastattn.call.scores import FARTHEST
from fastattn.integrations.tensors import array_of, check_integers

__all__ = ["KEYWORDS", "SCHEMA", "flattened", "restored"]

Tensor: TypeAlias = Any  # PyTorch's types are not known where it is not installed


class Keyword(NamedTuple):
    """How an option gets through an operator.

    Attributes
    ----------
    arguments : tuple of str
        The operator's, as its schema has them, less that they are None unless given.
    flat : callable
        From what a user gave to these arguments, checked.
    whole : callable
        From these arguments to what `fastattn.attention` takes.
    """

    arguments: tuple[str, ...]
    flat: Callable[[Any], tuple[Any, ...]]
    whole: Callable[..., Any]


def _offset(given: Any) -> tuple[Tensor]:
    """Return a tensor, of one offset for all rows as well: a program that is compiled is so for any of them."""
    if isinstance(given, (int, np.integer)) and not isinstance(given, bool):
        return (torch.full((), min(max(int(given), -FARTHEST), FARTHEST), dtype=torch.int64),)
    return _integers("query_offset", given)


def _integers(name: str, given: Any) -> tuple[Tensor]:
    check_integers(name, given)
    return (given,)


KEYWORDS: dict[str, Keyword] = {
    "window": Keyword(("SymInt? left", "SymInt? right"), check_window, lambda left, right: (left, right)),
    "query_offset": Keyword(("Tensor? query_offset",), _offset, lambda given: array_of("query_offset", given)),
    "key_lengths": Keyword(
        ("Tensor? key_lengths",),
        lambda given: _integers("key_lengths", given),
        lambda given: array_of("key_lengths", given),
    ),
    "softcap": Keyword(("float? softcap",), lambda given: (check_softcap(given),), lambda given: given),
}

#: The operators' arguments of all of them.
SCHEMA = ", ".join(f"{argument}=None" for keyword in KEYWORDS.values() for argument in keyword.arguments)


def flattened(options: FurtherOptions) -> tuple[Any, ...]:
    """Return the operator's arguments for what a user gave.

    Raises
    ------
    TypeError, ValueError
        If an option does not exist, or is of a kind or out of a range that has a meaning here. The message names it.
    """
    check_names(options)
    arguments: tuple[Any, ...] = ()
    for name, keyword in KEYWORDS.items():
        given = options.get(name)
        arguments += (None,) * len(keyword.arguments) if given is None else keyword.flat(given)
    return arguments


def restored(arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Return what a user gave, of the operator's arguments; the last of them may be left out where they are None."""
    options: dict[str, Any] = {}
    if not arguments:
        return options  # as most calls have it
    rest = list(arguments)
    for name, keyword in KEYWORDS.items():
        own, rest = rest[: len(keyword.arguments)], rest[len(keyword.arguments) :]
        if any(argument is not None for argument in own):
            options[name] = keyword.whole(*own, *(None,) * (len(keyword.arguments) - len(own)))
    return options
