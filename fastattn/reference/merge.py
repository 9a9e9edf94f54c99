"""One result of results over pieces of the keys, in plain NumPy and in the wider type."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.call.pieces import as_pieces
from fastattn.call.rounding import saturated
from fastattn.call.types import Operand

__all__ = ["merge", "merged"]


def merge(outs: Iterable[Operand], lses: Iterable[Operand]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the result and the log-sum-exp over all keys of those over some: `fastattn.merge`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import reference
    >>> query, key, value = np.eye(2), np.eye(3, 2), np.arange(3.0)[:, None]
    >>> pieces = [reference.attention(query, key[j], value[j], return_lse=True) for j in ([0], [1, 2])]
    >>> out, lse = reference.merge(*zip(*pieces))
    >>> np.allclose(out, reference.attention(query, key, value))
    True
    """
    pieces = as_pieces(outs, lses)
    dtype = pieces[0][0].dtype
    out, lse = merged(pieces)
    with np.errstate(all="ignore"):
        return out.astype(dtype), saturated(lse, dtype).astype(dtype)


@np.errstate(all="ignore")
def merged(pieces: list[tuple[NDArray[Any], NDArray[Any]]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Evaluate the merge in the wider type, and do not round it: Σ exp(lse) out / Σ exp(lse), and log Σ exp(lse)."""
    wide: Any = np.float64 if pieces[0][0].dtype == np.float32 else np.longdouble
    outs, lses = (np.stack(each).astype(wide) for each in zip(*pieces, strict=True))
    highest = lses.max(axis=0)
    weights = np.exp(lses - np.where(highest == -np.inf, 0, highest))
    total = weights.sum(axis=0)
    # a piece without keys counts for nothing, whatever its result says
    taken = np.where(lses[..., None] == -np.inf, 0, (weights / total)[..., None] * outs)
    return taken.sum(axis=0), np.where(highest == -np.inf, -np.inf, highest + np.log(total))
