"""`merge`: one result of results over pieces of the keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from numpy.typing import NDArray

from fastattn.call.pieces import Merged, as_pieces
from fastattn.call.types import Operand
from fastattn.cpu.host.builtin import in_default_mode


@in_default_mode
def merge(outs: Iterable[Operand], lses: Iterable[Operand]) -> tuple[NDArray[Any], NDArray[Any]]:
    """One result of attention of results over disjoint keys.

    Keys may be cut into pieces: between processes or machines, into parts of a cache that were kept apart, or because
    not all of them are there at once. Attention to each piece, with ``return_lse=True``, says all that it takes to have
    attention to all of them. It is the online softmax [1]_, as between the splits of FlashDecoding [2]_.

    Parameters
    ----------
    outs : iterable of array_like, shape (..., Hq, Lq, Dv)
        What attention of the same queries to each piece of the keys returned, one or more. An array with an axis more
        does as well.
    lses : iterable of array_like, shape (..., Hq, Lq)
        The log-sum-exps that came with them.

    Returns
    -------
    out : ndarray, shape (..., Hq, Lq, Dv)
        In the dtype that all arguments promote to: float32 or float64, in which half-precision results are merged.
    lse : ndarray, shape (..., Hq, Lq)
        Of the same dtype: both may be merged again.

    Raises
    ------
    TypeError
        If an argument is of a kind or dtype that has no meaning here.
    ValueError
        If there is nothing to merge, there are not as many log-sum-exps as results, or shapes are not the same. The
        message names the element.

    Notes
    -----
    A piece of which a query sees no key has an lse of -inf there, and counts for nothing, whatever its result holds. A
    query that sees no key of any piece gives 0, with an lse of -inf. NaN makes its row NaN, and so does an lse of +inf,
    as a score of that does. (Libraries that return +inf for a query without keys want it replaced first.)

    With `out` and `lse`, `attention_backward` of each piece gives the gradients of its keys and values, and that
    piece's part of those of the queries. The order of pieces changes results by roundings alone, and is the order in
    which they are added. A result that was merged of pieces has other roundings than one that was computed at once.

    References
    ----------
    .. [1] Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv 1805.02867.
    .. [2] Dao, Haziza, Massa and Sizov, "Flash-Decoding for long-context inference", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = rng.standard_normal((3, 8, 16, 64), dtype=np.float32)
    >>> first = fastattn.attention(query, key[:, :10], value[:, :10], return_lse=True)
    >>> second = fastattn.attention(query, key[:, 10:], value[:, 10:], return_lse=True)
    >>> out, lse = fastattn.merge(*zip(first, second))
    >>> np.allclose(out, fastattn.attention(query, key, value), atol=1e-6)
    True
    """
    pieces = as_pieces(outs, lses)
    result = Merged()
    for out, lse in pieces:
        result.add(out, lse)
    return result.finish(pieces[0][0].dtype)
