"""What Hypothesis tries: whole calls of `attention`, with every shape, layout, dtype, mask and option.

Hypothesis draws what a call looks like; the numbers themselves come from a generator that it seeds, which is quick and
lets it shrink a failure to the smallest shape. `Call` prints as a line that says all this.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastattn.call.shapes import describe

Array = NDArray[Any]

#: Vector lengths, register tiles and key blocks of the kernels are multiples of these: their edges are what may break.
EDGES = (4, 8, 16, 24, 48, 64, 96, 128)
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from((np.float32, np.float64))

near_edges = st.sampled_from(sorted({edge + step for edge in EDGES for step in (-1, 0, 1)}))
lengths = st.one_of(st.integers(1, 12), st.integers(1, 70), near_edges)
feature_counts = st.one_of(st.integers(1, 12), st.integers(1, 70), near_edges)
#: For what is slow: blocks of 4, as Numba's simulator of CUDA runs them, and what is shorter or longer by some.
small_counts = st.integers(1, 9)
SMALL_BATCHES: tuple[tuple[int, ...], ...] = ((), (), (), (2,), (2, 1))
SMALL_GROUPS = ((1, 1), (1, 1), (2, 1), (1, 2), (2, 2))
scales = st.one_of(st.none(), st.sampled_from((0, 1, -0.25, 1e-3)), st.floats(-2, 2, allow_subnormal=False))
causal = st.sampled_from((False, True, "bottom-right"))


@dataclass(frozen=True)
class Call:
    """The arguments of a call, and a line that says what they are."""

    query: Any
    key: Any
    value: Any
    attn_mask: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    line: str = ""

    @property
    def args(self) -> tuple[Any, Any, Any, Any]:
        """The positional arguments: query, key, value, attn_mask."""
        return self.query, self.key, self.value, self.attn_mask

    def __repr__(self) -> str:
        return f"<call {self.line}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Have Hypothesis print the line, and not the arrays."""
        printer.text(repr(self))


# -- layouts -----------------------------------------------------------------------------------------------------------

LAYOUTS = (
    "contiguous",
    "Fortran",
    "length and features swapped",
    "length before heads",
    "reversed",
    "every second",
    "every third feature",
    "inside NaN",
    "read-only",
    "unaligned",
    "byte-swapped",
)


def laid_out(array: Array, layout: str) -> Array:
    """Return an array of the same values that lies in memory another way; what lies around it is NaN (or True)."""
    array = np.asarray(array)
    rank = array.ndim
    inside: Any
    view: Array
    around: Any = np.nan if array.dtype.kind == "f" else True
    if layout == "contiguous":
        return array.copy()
    if layout == "Fortran":
        return np.asfortranarray(array)
    if layout == "length and features swapped":
        return array.swapaxes(-1, -2).copy().swapaxes(-1, -2) if rank > 1 else array.copy()
    if layout == "length before heads":
        return array.swapaxes(-2, -3).copy().swapaxes(-2, -3) if rank > 2 else array.copy()
    if layout == "reversed":
        return np.asarray(np.flip(np.asarray(np.flip(array)).copy()))
    if layout in ("every second", "every third feature"):
        steps = [2 if layout == "every second" else 1] * rank
        if rank and layout == "every third feature":
            steps[-1] = 3
        place = np.full([n * step for n, step in zip(array.shape, steps, strict=True)], around, array.dtype)
        inside = (..., *(slice(None, None, step) for step in steps))
        view = place[inside]
    elif layout == "inside NaN":
        place = np.full([n + 3 for n in array.shape], around, array.dtype)
        inside = (..., *(slice(1, 1 + n) for n in array.shape))
        view = place[inside]
    elif layout == "unaligned":
        place = np.empty(array.nbytes + 1, np.uint8)
        view = place[1:].view(array.dtype).reshape(array.shape)
    elif layout == "byte-swapped":
        return np.array(array, array.dtype.newbyteorder(), order="C")
    else:
        assert layout == "read-only", layout
        view = array.copy()
        view.flags.writeable = False
        return view
    view[...] = array
    return view


def repeated(array: Array) -> Array:
    """Return an array in which all of the longest axis is the first of it, and lies in the same place."""
    if not array.size or not array.ndim:
        return array
    return np.broadcast_to(array.take([0], int(np.argmax(array.shape))), array.shape)


layouts = st.sampled_from(LAYOUTS)


# -- shapes ------------------------------------------------------------------------------------------------------------


@st.composite
def _broadcasting(draw: st.DrawFn, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Draw a shape that broadcasts to `axes`: some axes 1, some missing on the left."""
    kept = axes[draw(st.sampled_from((0, 0, 0, *range(len(axes) + 1)))) :]
    return tuple(1 if draw(st.sampled_from((False, False, False, True))) else axis for axis in kept)


@st.composite
def shapes(
    draw: st.DrawFn, empty: bool = False, small: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]:
    """Draw shapes of query, key and value that go together, and enable_gqa; some axes 0 if `empty`."""
    batch = draw(st.sampled_from(SMALL_BATCHES if small else ((), (), (1,), (2,), (3,), (2, 1), (2, 2))))
    groups = SMALL_GROUPS if small else ((1, 1), (1, 1), (2, 1), (3, 1), (1, 3), (2, 2), (1, 8), (2, 3))
    kv_heads, group = draw(st.sampled_from(groups))
    long, wide = (small_counts, small_counts) if small else (lengths, feature_counts)
    queries, keys, head_dim, value_dim = draw(long), draw(long), draw(wide), draw(wide)
    if draw(st.booleans()):
        value_dim = head_dim
    if empty:
        zero = draw(
            st.sets(st.sampled_from(("batch", "heads", "queries", "keys", "head_dim", "value_dim")), min_size=1)
        )
        batch = (0,) if "batch" in zero else batch
        kv_heads, group = (0, 1) if "heads" in zero else (kv_heads, group)
        queries = 0 if "queries" in zero else queries
        keys = 0 if "keys" in zero else keys
        head_dim = 0 if "head_dim" in zero else head_dim
        value_dim = 0 if "value_dim" in zero else value_dim
    enable_gqa = group > 1 or draw(st.booleans())
    if group > 1:
        # a query of one head, or none, would be a different case: that of broadcasting
        query_axes = (*draw(_broadcasting(batch)), kv_heads * group)
    else:
        query_axes = draw(_broadcasting((*batch, kv_heads)))
    key_axes, value_axes = draw(_broadcasting((*batch, kv_heads))), draw(_broadcasting((*batch, kv_heads)))
    return (
        (*query_axes, queries, head_dim),
        (*key_axes, keys, head_dim),
        (*value_axes, keys, value_dim),
        enable_gqa,
    )


# -- numbers -----------------------------------------------------------------------------------------------------------

#: Sizes of query, key and value. The largest scores are about 1e36, which is finite work in float32.
SIZES = {
    "usual": (1.0, 1.0, 1.0),
    "sharp": (6.0, 6.0, 30.0),
    "tiny": (1e-3, 1e-3, 1e-3),
    "huge scores": (1e17, 1e17, 1.0),
    "huge values": (1.0, 1.0, 1e35),
    "denormal": (1e-40, 1.0, 1e-40),
    "zero": (0.0, 1.0, 1.0),
}
ODD = (np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-42, 1e15, -1e15)


def numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, size: float = 1.0) -> Array:
    """Return normally distributed numbers of a size."""
    with np.errstate(all="ignore"):
        return (rng.standard_normal(shape) * size).astype(dtype)


def with_odd(rng: np.random.Generator, array: Array, which: tuple[float, ...], share: float = 0.02) -> Array:
    """Return the array with some elements replaced by odd ones."""
    with np.errstate(all="ignore"):
        odd = rng.choice(np.array(which), size=array.shape).astype(array.dtype)
    return np.where(rng.random(array.shape) < share, odd, array)


def random_mask(rng: np.random.Generator, shape: tuple[int, ...], kind: str, dtype: Any) -> Array:
    """Return a mask of a kind: see `MASKS`."""
    if kind == "bool":
        return np.asarray(rng.random(shape) < rng.choice((0.1, 0.5, 0.95)))
    if kind == "bool, few rows":
        return np.broadcast_to(rng.random((*shape[:-1], 1)[: len(shape)]) < 0.5, shape).copy()
    if kind == "padding":
        keys = shape[-1] if shape else 1
        return np.broadcast_to((np.arange(keys) < rng.integers(0, keys + 1)).reshape(shape[-1:]), shape).copy()
    values = rng.standard_normal(shape) * 3
    if kind == "float, -inf":
        values = np.where(rng.random(shape) < 0.4, -np.inf, values)
    elif kind == "float, lowest":
        values = np.where(rng.random(shape) < 0.5, np.finfo(dtype).min, values)
    elif kind == "float, odd":
        values = with_odd(rng, values, (np.nan, np.inf, -np.inf, -1e4, 50.0))
    else:
        assert kind == "float", kind
    with np.errstate(all="ignore"):
        return values.astype(dtype)


MASKS = ("bool", "bool, few rows", "padding", "float", "float, -inf", "float, lowest", "float, odd")


@st.composite
def calls(
    draw: st.DrawFn,
    *,
    empty: bool = False,
    sizes: tuple[str, ...] = ("usual", "usual", "sharp", "tiny"),
    odd: bool = False,
    masks: tuple[str | None, ...] = (None, *MASKS[:-1]),
    dropout: bool = False,
    any_layout: bool = True,
    small: bool = False,
) -> Call:
    """Draw a call.

    Parameters
    ----------
    empty
        Whether some axes are 0.
    sizes
        Which of `SIZES`.
    odd
        Whether some numbers are NaN, infinite and so on.
    masks
        Which of `MASKS`; None is none.
    dropout
        Whether weights are dropped.
    any_layout
        Whether the arrays lie in memory in other ways than C-contiguous.
    small
        Whether all axes are short.
    """
    query_shape, key_shape, value_shape, enable_gqa = draw(shapes(empty=empty, small=small))
    dtype = draw(DTYPES)
    size = draw(st.sampled_from(sizes))
    rng = np.random.default_rng(seed := draw(SEEDS))
    arrays: list[Any] = [
        numbers(rng, shape, dtype, of)
        for shape, of in zip((query_shape, key_shape, value_shape), SIZES[size], strict=True)
    ]
    if odd:
        which, share = draw(st.sets(st.integers(0, 2), min_size=1)), draw(st.sampled_from((1 / 32, 1 / 1024)))
        arrays = [with_odd(rng, array, ODD, share) if i in which else array for i, array in enumerate(arrays)]

    options: dict[str, Any] = {"enable_gqa": enable_gqa, "is_causal": draw(causal), "scale": draw(scales)}
    mask, mask_kind = None, draw(st.sampled_from(masks))
    if mask_kind is not None:
        scores = describe(arrays[0], arrays[1], arrays[2], **options)[0].weights_shape
        mask_dtype = draw(st.sampled_from((np.float16, np.float32, np.float64)))
        mask = random_mask(rng, draw(_broadcasting(scores)), mask_kind, mask_dtype)
    if dropout:
        options["dropout_p"] = draw(st.sampled_from((0.1, 0.5, 0.9, 1, 2**-20)))
        options["rng"] = draw(st.integers(0, 2**64 - 1))

    names = ["contiguous"] * 4
    if any_layout:
        names = [draw(st.one_of(layouts, st.just("stride 0"))) for _ in range(4)]
        *arrays, mask = (
            array if array is None else repeated(array) if name == "stride 0" else laid_out(array, name)
            for array, name in zip((*arrays, mask), names, strict=True)
        )
    described = " ".join(str(array.shape) for array in arrays) + f" {np.dtype(dtype)} {size} seed {seed}"
    if mask is not None:
        described += f", mask {mask_kind} {mask.dtype} {mask.shape}"
    return Call(arrays[0], arrays[1], arrays[2], mask, options, f"{described}, {options}, layouts {names}")
