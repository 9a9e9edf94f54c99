"""Where a token stands, told to a model: by sines that are added, or by a rotation of queries and keys."""

from __future__ import annotations

from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastattn.call.arrays import as_common
from fastattn.call.broadcasting import check_broadcasts
from fastattn.call.halves import cast, real_of
from fastattn.call.options import check_flag, finite_real
from fastattn.call.problem import FLOAT64, Array, Shape
from fastattn.call.types import NumberLike, Operand, Scalar
from fastattn.layers.base import check_dtype, check_size

__all__ = ["as_positions", "rotary", "sinusoidal_positions"]

#: The longest wavelength is 2π times this: the choice of both papers.
BASE = 10000.0


@overload
def sinusoidal_positions(length: int, dim: int) -> NDArray[np.float64]: ...
@overload
def sinusoidal_positions(length: int, dim: int, *, dtype: type[Scalar] | np.dtype[Scalar]) -> NDArray[Scalar]: ...
@overload
def sinusoidal_positions(length: int, dim: int, *, dtype: DTypeLike) -> NDArray[Any]: ...
def sinusoidal_positions(length: int, dim: int, *, dtype: DTypeLike = np.float64) -> NDArray[Any]:
    """Encode positions by sines and cosines of geometrically falling frequencies, to be added to embeddings [1]_.

    Parameters
    ----------
    length : int
        How many positions.
    dim : int
        Features of a position. Where it is odd, the last feature is a sine without its cosine.
    dtype : dtype_like
        float32 or float64. Angles are computed in float64 either way.

    Returns
    -------
    ndarray, shape (length, dim)
        Feature 2i of position t is sin(t / 10000^(2i / dim)), feature 2i + 1 the cosine of the same angle.

    Raises
    ------
    TypeError
        If an argument is of another kind.
    ValueError
        If `length` is negative, or `dim` below 1.

    References
    ----------
    .. [1] Vaswani et al., "Attention is all you need", 2017, arXiv 1706.03762, section 3.5.

    Examples
    --------
    >>> from fastattn import sinusoidal_positions
    >>> sinusoidal_positions(3, 4).round(4)
    array([[ 0.    ,  1.    ,  0.    ,  1.    ],
           [ 0.8415,  0.5403,  0.01  ,  1.    ],
           [ 0.9093, -0.4161,  0.02  ,  0.9998]])
    """
    length, dim = check_size("length", length, least=0), check_size("dim", dim)
    result = np.empty((length, dim), check_dtype(dtype))
    angles = _angles(np.arange(length, dtype=np.float64), dim, BASE)
    result[:, 0::2] = np.sin(angles)
    result[:, 1::2] = np.cos(angles[:, : dim // 2])
    return result


def rotary(
    x: Operand[Scalar],
    positions: NumberLike | None = None,
    *,
    base: float = BASE,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    angles: NumberLike | tuple[NumberLike, NumberLike] | None = None,
) -> NDArray[Scalar]:
    """Rotate pairs of features by angles that grow with the position [1]_.

    The product of a query and a key that have been rotated depends on how far they are apart, and not on where.

    Parameters
    ----------
    x : array_like, shape (..., L, D)
        Queries or keys, of a floating dtype, or integers, which compute in float64.
    positions : array_like, broadcasting to (..., L)
        Where each row stands: whole or real finite numbers.
    base : float
        Pair i turns by position / base^(2i / R).
    interleaved : bool
        Which features are a pair: 2i and 2i + 1, as in the paper, GPT-J and Cohere's models; or, by default, i and
        i + R/2, as in GPT-NeoX, Llama and most others.
    rotary_dim : int, optional
        R, how many features turn, the first ones of x; the others stay as they are, as in GPT-J, GPT-NeoX and Phi. It
        is even, and D unless given.
    angles : array_like, broadcasting to (..., L, R/2), or a tuple of two, optional
        Given in place of positions: by which angle each pair of each row turns; or (cosine, sine) of that, which may
        have a factor in them. These say R as well. Those of a batch, (B, L, R/2), are ``angles[:, None]`` where x has
        an axis of heads.

    Returns
    -------
    ndarray, shape (..., L, D)
        Of the dtype of `x`. Angles are computed in float64.

    Raises
    ------
    TypeError
        If an argument is of a kind or dtype that has no meaning here.
    ValueError
        If the number of features that turn is odd, or above D; positions or angles do not broadcast, are not finite, or
        both are given; or `base` is not a positive finite number.

    Notes
    -----
    A rotation is undone, and a gradient taken back through it, by the same call with ``-positions``, ``-angles`` or
    ``(cosine, -sine)``.

    References
    ----------
    .. [1] Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021, arXiv 2104.09864.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import rotary
    >>> rotary(np.array([[1.0, 0.0], [1.0, 0.0]]), [0, np.pi / 2]).round(6)
    array([[1., 0.],
           [0., 1.]])
    >>> query, key = np.random.default_rng(0).standard_normal((2, 1, 64))
    >>> near, far = (rotary(query, [at + 3]) @ rotary(key, [at]).T for at in (0, 1000))
    >>> np.allclose(near, far)
    True
    >>> rotary(np.array([[1.0, 0.0, 5.0]]), angles=[[np.pi / 2]]).round(6)
    array([[0., 1., 5.]])
    """
    (given,) = as_common({"x": x})
    rows = cast(given, real_of(given.dtype))
    if rows.ndim < 2:
        raise ValueError(f"x: shape {rows.shape}; expected (..., length, features)")
    turning = _turning(rows.shape, rotary_dim, angles)
    base = finite_real("base", base, "expected a positive finite number", above=0.0)
    result = np.empty(rows.shape, rows.dtype)
    with np.errstate(all="ignore"):
        if angles is None:
            if positions is None:
                raise TypeError("positions: None without angles; expected where each row stands")
            turns = _angles(as_positions(positions, rows.shape[:-1]), turning, base)
            cosine, sine = np.cos(turns), np.sin(turns)
        elif positions is not None:
            raise ValueError("angles: given together with positions; expected one of them")
        else:
            cosine, sine = _as_turns(angles, (*rows.shape[:-1], turning // 2))
        cosine, sine = cosine.astype(rows.dtype), sine.astype(rows.dtype)
        first: Any = np.s_[..., : turning // 2]
        second: Any = np.s_[..., turning // 2 : turning]
        if check_flag("interleaved", interleaved):
            first, second = np.s_[..., 0:turning:2], np.s_[..., 1:turning:2]
        result[first] = rows[first] * cosine - rows[second] * sine
        result[second] = rows[first] * sine + rows[second] * cosine
        result[..., turning:] = rows[..., turning:]
    return cast(result, given.dtype)


def _turning(shape: Shape, rotary_dim: int | None, angles: Any) -> int:
    """Return how many features of rows turn."""
    dim = shape[-1]
    turning: int
    if rotary_dim is not None:
        turning = check_size("rotary_dim", rotary_dim, least=0)
        if turning % 2 or turning > dim:
            raise ValueError(f"rotary_dim: {rotary_dim}; expected an even number up to {dim}, the features of x")
        return turning
    if angles is not None:
        one = angles[0] if isinstance(angles, tuple) and len(angles) == 2 else angles
        turning = 2 * (np.shape(one) or (0,))[-1]
        if turning <= dim:
            return turning
        raise ValueError(f"angles: shape {np.shape(one)}; expected up to {dim // 2} for each row, the pairs of x")
    if dim % 2:
        raise ValueError(
            f"x: shape {shape}; expected (..., length, features), with an even number of features, or rotary_dim"
        )
    return dim


def _as_turns(angles: Any, pairs: Shape) -> tuple[Array, Array]:
    """Return the cosine and the sine of what was given as angles, or what was given as these."""
    both = isinstance(angles, tuple) and len(angles) == 2
    named = {"angles[0]": angles[0], "angles[1]": angles[1]} if both else {"angles": angles}
    found = as_common(named, also=FLOAT64)
    for name, array in zip(named, found, strict=True):
        check_broadcasts(name, array.shape, pairs, "the pairs of x")
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: some are NaN or infinite; expected finite numbers")
    return (found[0], found[1]) if both else (np.cos(found[0]), np.sin(found[0]))


def as_positions(given: ArrayLike, rows: Shape) -> Array:
    """Return where rows stand, as float64.

    Raises
    ------
    TypeError
        If the dtype has no meaning here.
    ValueError
        If they do not broadcast to the axes `rows`, or are not finite.
    """
    (positions,) = as_common({"positions": given}, also=FLOAT64)
    check_broadcasts("positions", positions.shape, rows)
    if not np.isfinite(positions).all():
        raise ValueError("positions: some are NaN or infinite; expected finite numbers")
    return positions


def _angles(positions: Array, dim: int, base: float) -> Array:
    """Return the angle of each position for each pair of features, shape (*positions.shape, (dim + 1) // 2)."""
    exponents = np.arange(0, dim, 2) / max(dim, 1)
    angles: Array = positions[..., None] * base**-exponents
    return angles
