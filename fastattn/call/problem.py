"""One validated description of a call: what it computes, in numbers, and views of its arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastattn.call.scores import Scores

if TYPE_CHECKING:
    from fastattn.call.blocks import Blocks

Array: TypeAlias = NDArray[Any]
Shape: TypeAlias = tuple[int, ...]

#: A mask of either kind, or the floating and the boolean one together.
Mask: TypeAlias = "Array | tuple[Array | None, Array | None] | None"

FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)


@dataclass(frozen=True, slots=True)
class Problem:
    """What one call computes, in numbers: everything but the data.

    Attributes
    ----------
    storage : numpy.dtype
        What query, key and value are in memory, and the result: of half precision, float32 or float64.
    real : numpy.dtype
        What is computed in, and the log-sum-exp: float32 or float64.
    batch : tuple of int
        The axes before the head axis, broadcast.
    heads, kv_heads : int
        Query heads Hq, and the key and value heads Hk they are grouped on. Equal unless ``enable_gqa`` makes groups;
        both 1 where no operand has a head axis.
    queries, keys : int
        Lq and Lk.
    head_dim, value_dim : int
        D and Dv.
    out_shape : tuple of int
        The shape of the result, which has a head axis only if an operand has one.
    dropout_p : float
        The probability that a weight is dropped.
    scores : Scores
    """

    storage: np.dtype[Any]
    real: np.dtype[Any]
    batch: Shape
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    out_shape: Shape
    dropout_p: float
    scores: Scores

    @property
    def group(self) -> int:
        """Query heads per key head, G."""
        return self.heads // self.kv_heads if self.kv_heads else 1

    @property
    def lse_shape(self) -> Shape:
        """Shape of the log-sum-exp: the result's, less the feature axis."""
        return self.out_shape[:-1]

    @property
    def weights_shape(self) -> Shape:
        """Shape of the weights, (..., Hq, Lq, Lk)."""
        return (*self.out_shape[:-1], self.keys)

    @property
    def rows_shape(self) -> Shape:
        """Axes of the operands before the last two: ``(*batch, Hk, G)``."""
        return (*self.batch, self.kv_heads, self.group)

    @property
    def drop_threshold(self) -> int:
        """A random 32-bit word below this drops its weight: round(dropout_p · 2**32), which 2**32 itself may be."""
        return round(self.dropout_p * 2**32)

    @property
    def keep_scale(self) -> float:
        """Factor of the weights that dropout keeps, 1 / (1 - dropout_p); 0 where it keeps none."""
        return 1.0 / (1.0 - self.dropout_p) if self.dropout_p < 1.0 else 0.0


class Captures(NamedTuple):
    """The values that the functions of a call capture, in the order of `Function.captured`; () without a function.

    Attributes
    ----------
    score, seen : tuple
        Arrays, and numbers.
    blocks : Blocks or None
        Knows of which kind blocks of keys are, for exactly the queries and keys of the call.
    """

    score: tuple[Any, ...]
    seen: tuple[Any, ...]
    blocks: Blocks | None = None


class Operands(NamedTuple):
    """Views of the arrays of a call, with the axes of ``Problem``.

    Nothing is copied: broadcast axes have stride 0, and so has the group axis of key and value.

    Attributes
    ----------
    query : ndarray, shape (*batch, Hk, G, Lq, D)
    key : ndarray, shape (*batch, Hk, G, Lk, D)
    value : ndarray, shape (*batch, Hk, G, Lk, Dv)
    bias : ndarray, shape (*batch, Hk, G, Lq, Lk), or None
        What is added to scores: of a floating dtype, whatever that of the others is.
    keep : ndarray of bool, shape (*batch, Hk, G, Lq, Lk), or None
        Which keys take part.
    heads : ndarray of `fastattn.call.scores.HEAD`, shape (B · Hq,), or None
        What each query head of each row of the batch has of its own, leading axes flattened.
    captured : Captures, or None
        What the user's functions capture.
    """

    query: Array
    key: Array
    value: Array
    bias: Array | None = None
    keep: Array | None = None
    heads: Array | None = None
    captured: Captures | None = None
