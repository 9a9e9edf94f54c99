"""An array to shares of it, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import ArrayLike, NDArray

from fastattn.call.arrays import as_array
from fastattn.call.problem import Array
from fastattn.call.shares import Layout, Span, check_layout, shares
from fastattn.integrations.mpi.agreement import agree
from fastattn.integrations.mpi.courier import own_communicator

__all__ = ["shard", "unshard"]


def shard(comm: MPI.Intracomm, array: ArrayLike, axis: int = -2, layout: Layout = "zigzag") -> NDArray[Any]:
    """The share of an array that this rank has in `ring_attention`.

    Nothing is sent: each rank takes its own of an array that it has, or that lies in a file. Of a `numpy.memmap` no
    more than that is read.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
    array : array_like
        The whole.
    axis : int
        That of lengths: -2 of queries, keys and values, -1 of a log-sum-exp.
    layout : {"zigzag", "contiguous"}
        Contiguous, each rank has as many positions as the others, one behind the other. In zigzag it has half as many
        from the front and their counterparts from the back, which is the same work for all where queries look back.
        Lengths need not be multiples of anything.

    Returns
    -------
    ndarray
        A copy, contiguous.

    Raises
    ------
    TypeError, ValueError
        If `comm` is no communicator, there is no such axis, or no layout of that name.

    Examples
    --------
    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> from fastattn.integrations.mpi import shard
    >>> shard(MPI.COMM_SELF, np.arange(8), axis=0)
    array([0, 1, 2, 3, 4, 5, 6, 7])

    Of two ranks the first has 0, 1, 6 and 7: what positions a rank has is said by ``shard(comm, np.arange(L), 0)``.
    """
    own_communicator(comm)
    whole, layout = as_array("array", array), check_layout(layout)
    axis = _axis_of(whole, axis)
    spans = shares(whole.shape[axis], comm.size, layout)[comm.rank]
    return np.concatenate([whole[_along(axis, span.begin, span.end)] for span in spans], axis=axis)


def unshard(comm: MPI.Intracomm, array: ArrayLike, axis: int = -2, layout: Layout = "zigzag") -> NDArray[Any]:
    """The whole of which each rank has a share, on every rank. All ranks call this together.

    Parameters
    ----------
    comm, axis, layout
        As in `shard`.
    array : array_like
        The share of this rank.

    Returns
    -------
    ndarray

    Raises
    ------
    TypeError, ValueError
        On every rank the same, if shares are not those of one array.

    Examples
    --------
    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> from fastattn.integrations.mpi import unshard
    >>> unshard(MPI.COMM_SELF, np.arange(8), axis=0)
    array([0, 1, 2, 3, 4, 5, 6, 7])
    """
    own, failure, alike, share = own_communicator(comm), None, {}, np.empty(0)
    try:
        share, layout = as_array("array", array), check_layout(layout)
        axis = _axis_of(share, axis)
        others = share.shape[:axis] + share.shape[axis + 1 :]
        alike = {"array": f"dtype {share.dtype}, shape {others} without axis {axis}", "layout": layout}
    except Exception as error:
        failure = error
    lengths = agree(own, failure, share.shape[axis] if failure is None else 0, alike)
    found = shares(sum(lengths), own.size, layout)
    check_lengths("array", lengths, found, layout)
    return _gathered(own, share, axis, found)


def check_lengths(name: str, lengths: list[int], found: list[list[Span]], layout: str) -> None:
    """Refuse lengths of shares that are not those of a layout.

    Raises
    ------
    ValueError
        With the first rank of which it is so.
    """
    for rank, (length, spans) in enumerate(zip(lengths, found, strict=True)):
        expected = sum(span.end - span.begin for span in spans)
        if length != expected:
            raise ValueError(
                f"{name}: length {length} on rank {rank}; expected {expected}, its share of {sum(lengths)} in layout "
                f"{layout!r}, as shard cuts it"
            )


def _gathered(comm: MPI.Intracomm, share: Array, axis: int, found: list[list[Span]]) -> Array:
    """All shares, each where it belongs."""
    front = np.ascontiguousarray(np.moveaxis(share, axis, 0))
    counts = [sum(span.end - span.begin for span in spans) for spans in found]
    together = np.empty((sum(counts), *front.shape[1:]), front.dtype)
    sizes = [count * (together.nbytes // max(1, len(together))) for count in counts]
    comm.Allgatherv([_bytes(front), MPI.BYTE], [_bytes(together), sizes, MPI.BYTE])
    whole = np.empty_like(together)
    places = np.cumsum([0, *counts])
    for place, spans in zip(places, found, strict=False):
        for span in spans:
            rows = slice(place + span.place, place + span.place + span.end - span.begin)
            whole[span.begin : span.end] = together[rows]
    return np.ascontiguousarray(np.moveaxis(whole, 0, axis))


def _bytes(array: Array) -> Array:
    return array.reshape(-1).view(np.uint8)


def _axis_of(array: Array, axis: int) -> int:
    """The number of an axis, counted from the front."""
    if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
        raise TypeError(f"axis: {axis!r}; expected an int")
    if not -array.ndim <= axis < array.ndim:
        raise ValueError(f"axis: {axis}; expected one of an array of shape {array.shape}")
    return int(axis) % array.ndim


def _along(axis: int, begin: int, end: int) -> tuple[slice, ...]:
    return (*(slice(None),) * axis, slice(begin, end))
