"""Which weights dropout keeps, by the definition of its random numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn.call.problem import Problem

__all__ = ["keep_mask", "kept_weights", "philox"]


def kept_weights(problem: Problem, seed: int) -> NDArray[np.bool_]:
    """Say which weights dropout keeps, shape (..., Lq, Lk)."""
    batch = problem.scores.first_batch + np.arange(int(np.prod(problem.batch)))[:, None]
    scores = problem.scores
    head, first = scores.first_head + np.arange(problem.heads), (scores.first_query, scores.first_key)
    kept = keep_mask(seed, batch, head, problem.queries, problem.keys, problem.dropout_p, first)
    return kept.reshape(*problem.rows_shape, problem.queries, problem.keys)


def keep_mask(
    seed: int,
    batch_index: ArrayLike,
    head_index: ArrayLike,
    queries: int,
    keys: int,
    p: float,
    first: tuple[int, int] = (0, 0),
) -> NDArray[np.bool_]:
    """Say which weights dropout keeps: this depends on seed, batch, head, query and key alone.

    Key j of query i has word j % 4 of the Philox block of the counter (j // 4, i, head, batch) and the key (low half
    of the seed, high half), all taken modulo 2**32. It is kept if that word is not below round(p · 2**32).

    Parameters
    ----------
    seed : int
        In [0, 2**64).
    batch_index, head_index : int or array_like of int
        Position in the flattened batch axes, and number of the query head; they broadcast.
    queries, keys : int
        Lq and Lk.
    p : float
        Probability that a weight is dropped.
    first : tuple of two int
        The numbers of the first query and key.

    Returns
    -------
    ndarray of bool, shape (..., Lq, Lk)
        With the axes of the broadcast indices on the left.
    """
    batch_index, head_index = np.broadcast_arrays(batch_index, head_index)
    query, key = first
    blocks = np.arange(key // 4, -(-(key + keys) // 4))
    words = philox(
        (
            blocks,
            query + np.arange(queries)[:, None],
            head_index[..., None, None],
            batch_index[..., None, None],
        ),
        (seed & 0xFFFFFFFF, seed >> 32),
    )
    words = words.reshape(*words.shape[:-2], 4 * len(blocks))[..., key % 4 :][..., :keys]
    return words >= np.uint64(round(p * 2**32))


def philox(counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Return four random 32-bit words for each counter: Philox4x32-10 [1]_.

    Parameters
    ----------
    counter : tuple of four array_like of int
        The words of the counter, which broadcast, each taken modulo 2**32.
    key : tuple of two int
        The words of the key.

    Returns
    -------
    ndarray of uint64, shape (..., 4)
        Numbers below 2**32.

    References
    ----------
    .. [1] J. Salmon, M. Moraes, R. Dror and D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC11, 2011.

    Examples
    --------
    >>> from fastattn.reference import philox
    >>> [hex(word) for word in philox((0, 0, 0, 0), (0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    # 64-bit integers hold the products of two words whole
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word).astype(np.uint64) & low for word in counter))
    k0, k1 = key
    for _ in range(10):
        product0, product1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (product1 >> half) ^ c1 ^ np.uint64(k0),
            product1 & low,
            (product0 >> half) ^ c3 ^ np.uint64(k1),
            product0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3), axis=-1)
