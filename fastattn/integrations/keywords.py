"""What may be said of scores by keyword alone, on its way through an operator of PyTorch's.

An operator takes tensors and numbers, and no pairs or lists of either. An option becomes arguments of this kind, which
are None where it is not given, and is itself again where the operator's kernel calls fastattn. What else
`fastattn.attention` may be told by keyword is one entry more in `KEYWORDS`.

Functions of the user's, and masks that are made of them, are no arguments of an operator's. They come behind all of
these, as `fastattn.integrations.functions` makes them, to the kernel alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from fastattn.call.score_options import FurtherOptions, check_names, check_softcap, check_window
from fastattn.call.scores import FARTHEST
from fastattn.integrations.functions import FUNCTIONS, adapted, has_functions
from fastattn.integrations.tensors import check_integers, check_memory

__all__ = ["KEYWORDS", "SCHEMA", "flattened", "restore"]

Tensor: TypeAlias = Any  # PyTorch's types are not known where it is not installed


class Keyword(NamedTuple):
    """How an option gets through an operator.

    Attributes
    ----------
    arguments : tuple of str
        The operator's, as its schema has them, less that they are None unless given.
    flat : callable
        From what a user gave to these arguments, checked: to a tuple, where they are several.
    """

    arguments: tuple[str, ...]
    flat: Callable[[Any], Any]


def _offset(given: Any) -> Tensor:
    """Return a tensor, of one offset for all rows as well: a program that is compiled is so for any of them."""
    if isinstance(given, (int, np.integer)) and not isinstance(given, bool):
        return torch.full((), min(max(int(given), -FARTHEST), FARTHEST), dtype=torch.int64)
    return check_integers("query_offset", given)


KEYWORDS: dict[str, Keyword] = {
    "window": Keyword(("SymInt? left", "SymInt? right"), check_window),
    "query_offset": Keyword(("Tensor? query_offset",), _offset),
    "key_lengths": Keyword(("Tensor? key_lengths",), partial(check_integers, "key_lengths")),
    "softcap": Keyword(("float? softcap",), check_softcap),
    "alibi_slopes": Keyword(("Tensor? alibi_slopes",), partial(check_memory, "alibi_slopes")),
    "sinks": Keyword(("Tensor? sinks",), partial(check_memory, "sinks")),
    **{name: Keyword((), lambda given: ()) for name in FUNCTIONS},
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
    arguments: list[Any] = []
    for name, (own, flat) in KEYWORDS.items():
        given = options.get(name)
        found = (None,) * len(own) if given is None else flat(given)
        arguments += found if isinstance(found, tuple) else (found,)
    return (*arguments, *adapted(options)) if has_functions(options) else tuple(arguments)


def restore(options: dict[str, Any]) -> None:
    """Make again of the operator's arguments, of those that are given, what the user gave: most are that already."""
    if "left" in options or "right" in options:
        options["window"] = (options.pop("left", None), options.pop("right", None))
