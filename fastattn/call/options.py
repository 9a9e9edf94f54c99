"""The other arguments: flags, numbers and words, each checked by itself."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np

from fastattn.call.advice import said

Name = TypeVar("Name", bound=str)


def is_real(given: object) -> bool:
    return isinstance(given, numbers.Real) and not isinstance(given, bool)


def finite_real(name: str, given: object, expected: str, above: float = -math.inf) -> float:
    """Return a finite real number above another one as a float.

    Raises
    ------
    TypeError
        If it is not a real number; `expected` is the end of the message.
    ValueError
        If it is not finite, or not above.
    """
    if not is_real(given):
        raise TypeError(f"{name}: {said(given)}; {expected}")
    try:
        number = float(given)  # type: ignore[arg-type]
    except OverflowError:
        number = math.inf
    if not above < number < math.inf:  # torch.compile can trace this, unlike math.isfinite
        raise ValueError(f"{name}: {said(given)}; {expected}")
    return number


def check_flag(name: str, given: object) -> bool:
    """Return a flag as a bool.

    Raises
    ------
    TypeError
        If it is neither True nor False (NumPy's included).
    """
    if given is True or given is False:
        return given
    if isinstance(given, np.bool_):
        return bool(given)
    raise TypeError(f"{name}: {said(given)}; expected True or False")


def check_scale(given: object) -> float | None:
    """Return the scale as a float, None where the default is wanted.

    Raises
    ------
    TypeError
        If it is not a real number.
    ValueError
        If it is not finite.
    """
    if given is None:
        return None
    return finite_real("scale", given, "expected a finite real number, or None for 1/sqrt(head_dim)")


def check_dropout(given: object) -> float:
    """Return the dropout probability as a float.

    Raises
    ------
    TypeError
        If it is not a real number.
    ValueError
        If it is not in [0, 1].
    """
    if type(given) is float and 0.0 <= given <= 1.0:
        return given
    if not is_real(given):
        raise TypeError(f"dropout_p: {said(given)}; expected a real number in [0, 1]")
    # compared as given: converted to a float, a number just above 1 could become 1
    if not 0 <= given <= 1:  # type: ignore[operator]
        raise ValueError(f"dropout_p: {said(given)}; expected a real number in [0, 1]")
    return float(given)  # type: ignore[arg-type]


def check_causal(given: object) -> Literal["no", "top-left", "bottom-right"]:
    """Return which causal mask is meant.

    Raises
    ------
    TypeError
        If it is neither a bool nor a string.
    ValueError
        If it is another string than "bottom-right".
    """
    if given is False:
        return "no"
    if given is True:
        return "top-left"
    if isinstance(given, np.bool_):
        return "top-left" if given else "no"
    if not isinstance(given, str):
        raise TypeError(f"is_causal: {said(given)}; expected False, True or 'bottom-right'")
    if given != "bottom-right":
        raise ValueError(f"is_causal: {said(given)}; expected False, True or 'bottom-right'")
    return "bottom-right"


def check_backend(given: object, existing: Sequence[Name]) -> Name | None:
    """Return the backend's name, None where the best one is wanted.

    Raises
    ------
    TypeError
        If it is neither None nor a string.
    ValueError
        If no backend has that name.
    """
    if given is None or (isinstance(given, str) and given in existing):
        return given  # type: ignore[return-value]  # it is one of them
    kind = ValueError if isinstance(given, str) else TypeError
    raise kind(f"backend: {said(given)}; expected None or one of {', '.join(map(repr, existing))}")
