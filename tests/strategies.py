"""What Hypothesis tries: whole calls of `attention`, with every shape, layout, dtype, mask, interval and option.

Hypothesis draws what a call looks like; the numbers themselves come from a generator that it seeds, which is quick and
lets it shrink a failure to the smallest shape. `Call` prints as a line that says all this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastattn.api.block_mask import BlockMask
from fastattn.call.halves import cast, finfo, is_floating
from fastattn.call.problem import Problem
from fastattn.call.shapes import describe

Array = NDArray[Any]

#: Vector lengths, register tiles and key blocks of the kernels are multiples of these: their edges are what may break.
EDGES = (4, 8, 16, 24, 48, 64, 96, 128)
SEEDS = st.integers(0, 2**32 - 1)
BFLOAT16 = ml_dtypes.bfloat16
HALVES = (np.float16, BFLOAT16)
DTYPES = st.sampled_from((np.float32, np.float64))
ALL_DTYPES = st.sampled_from((np.float32, np.float64, *HALVES))

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

    @property
    def bits(self) -> list[bytes]:
        """What all its arrays hold, those among its options included."""
        return bits_of(*self.args, *(option for option in self.options.values() if isinstance(option, np.ndarray)))

    def __repr__(self) -> str:
        return f"<call {self.line}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Have Hypothesis print the line, and not the arrays."""
        printer.text(repr(self))


def each(function: Callable[[Array], Array], given: Any) -> Any:
    """Apply a function to an array, or to both of a pair of masks; None stays."""
    if isinstance(given, tuple):
        return tuple(each(function, mask) for mask in given)
    return None if given is None else function(given)


def bits_of(*arrays: Any) -> list[bytes]:
    """Return what arrays hold, of pairs of masks both; nothing for None."""
    found: list[bytes] = []
    for array in arrays:
        if isinstance(array, tuple):
            found += bits_of(*array)
        elif array is not None:
            found.append(array.tobytes())
    return found


def bias_in(mask: Any) -> Any:
    """Return the floating mask, alone or in a pair, None if there is none."""
    if isinstance(mask, tuple):
        return mask[0]
    return None if mask is None or mask.dtype.kind == "b" else mask


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
    around: Any = np.nan if is_floating(array.dtype) else True
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
        return np.asarray(array.byteswap().view(array.dtype.newbyteorder()), order="C")
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
    """Return normally distributed numbers of a size; finite ones in float16, too, which has no room for huge ones."""
    found = np.asarray(rng.standard_normal(shape) * size)
    return cast(np.clip(found, -65504, 65504) if dtype is np.float16 else found, np.dtype(dtype))


def with_odd(rng: np.random.Generator, array: Array, which: tuple[float, ...], share: float = 0.02) -> Array:
    """Return the array with some elements replaced by odd ones.

    Of bfloat16 none is subnormal: beside infinities those count as 0 on some machines, and make NaN there.
    """
    if array.dtype == BFLOAT16:
        array = np.where(np.abs(array) < finfo(array.dtype).tiny, array * 0, array)
    odd = cast(np.asarray(rng.choice(np.array(which), size=array.shape)), array.dtype)
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
        values = np.where(rng.random(shape) < 0.5, -float(finfo(np.dtype(dtype)).max), values)
    elif kind == "float, odd":
        values = with_odd(rng, values, (np.nan, np.inf, -np.inf, -1e4, 50.0))
    else:
        assert kind == "float", kind
    return cast(np.asarray(values), np.dtype(dtype))


MASKS = ("bool", "bool, few rows", "padding", "float", "float, -inf", "float, lowest", "float, odd")


# -- scores ------------------------------------------------------------------------------------------------------------

#: None, mostly: a call with all options at once says little of any of them.
rarely = st.sampled_from((False, False, True))
softcaps = st.sampled_from((0.25, 1, 5.0, 30, 50.0, 1e4))
slopes = st.sampled_from((0.0, 2.0**-8, 0.1, 1.0, 30.0, -0.05, 1e300))
sinks = st.sampled_from((0.0, 1.0, -2.5, 6.0, -30.0, 300.0, -300.0, 1e30, -1e30, 1e300, -1e300, -np.inf))
HUGE = 10**30  # beyond every integer of NumPy's


@st.composite
def windows(draw: st.DrawFn, keys: int) -> Any:
    """Draw a window: narrow ones, wide ones, open ones."""
    reach = st.one_of(st.none(), st.integers(0, 3), st.integers(0, keys + 2), st.just(HUGE))
    return draw(st.tuples(reach, reach))


@st.composite
def query_offsets(draw: st.DrawFn, batch: tuple[int, ...], queries: int, keys: int) -> Any:
    """Draw the position of query 0, one for all rows of a batch or one for each: among the keys, mostly."""
    near = st.integers(-queries - 2, keys + 2)
    if not draw(st.booleans()):
        return draw(st.one_of(near, near, near, st.sampled_from((HUGE, -HUGE))))
    shape = draw(_broadcasting(batch))
    rng = np.random.default_rng(draw(SEEDS))
    return rng.integers(-queries - 2, keys + 3, shape).astype(draw(st.sampled_from((np.int64, np.int32))))


@st.composite
def key_lengths(draw: st.DrawFn, batch: tuple[int, ...], keys: int) -> Array:
    """Draw how many keys the rows of a batch have: all of them, or none, among others."""
    rng = np.random.default_rng(draw(SEEDS))
    found = rng.integers(0, keys + 1, draw(_broadcasting(batch)))
    ends = rng.choice((0, keys), found.shape)
    return np.where(rng.random(found.shape) < 0.2, ends, found).astype(draw(st.sampled_from((np.int64, np.uint16))))


@st.composite
def of_heads(draw: st.DrawFn, batch: tuple[int, ...], heads: int, numbers: st.SearchStrategy[float]) -> Array:
    """Draw numbers for each head, or each head of each row of a batch, or one for all."""
    shape = draw(_broadcasting((*batch, heads)))
    found = np.array([draw(numbers) for _ in range(int(np.prod(shape)))]).reshape(shape)
    dtype = draw(st.sampled_from((np.float64, np.float32)))
    limit = np.finfo(dtype).max
    return np.where(np.isinf(found), found, np.clip(found, -limit, limit)).astype(dtype)


@st.composite
def score_options(draw: st.DrawFn, problem: Problem, is_causal: Any) -> dict[str, Any]:
    """Draw some of window, query_offset, key_lengths, softcap, slopes and sinks, as go together with `is_causal`."""
    batch, queries, keys = problem.batch, problem.queries, problem.keys
    options: dict[str, Any] = {}
    if draw(rarely):
        options["window"] = draw(windows(keys))
    if is_causal != "bottom-right" and draw(rarely):
        options["query_offset"] = draw(query_offsets(batch, queries, keys))
    if draw(rarely):
        options["key_lengths"] = draw(key_lengths(batch, keys))
    if draw(rarely):
        options["softcap"] = draw(softcaps)
    if draw(rarely):
        options["alibi_slopes"] = draw(of_heads(batch, problem.heads, slopes))
    if draw(rarely):
        options["sinks"] = draw(of_heads(batch, problem.heads, sinks))
    return options


# -- functions ---------------------------------------------------------------------------------------------------------


def of_size(steepest: float, largest: float, bend: float = 0.0) -> Callable[[Any], Any]:
    """Say of a function of scores how large its slope, what it adds, and its second derivative are at most."""

    def known(function: Any) -> Any:
        function.steepest, function.largest, function.bend = steepest, largest, bend
        return function

    return known


def _score_mods(rng: np.random.Generator) -> list[Any]:
    table = laid_out(rng.standard_normal((5, 7)).astype(rng.choice(("f4", "f8"))), str(rng.choice(LAYOUTS[:7])))
    kinds, factor, slope = rng.integers(0, 3, 11), float(rng.uniform(-2, 2)), np.array(rng.uniform(0, 1))

    @of_size(1, 5)
    def relative(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + table[head % 5, (query - key) % 7]

    @of_size(2, 3)
    def scaled(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score * factor + (key % 3) * batch * 0.25

    @of_size(1, 0, 0.3)
    def capped(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return 3 * np.tanh(score / 3)

    @of_size(1, 3)
    def stepped(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        if query >= key:
            return score
        return score - (1.5 if head % 2 else slope)

    @of_size(1, 1)
    def hiding(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return np.where(kinds[query % 11] == kinds[-1 - key % 11], score, -np.inf)

    @of_size(0, 5)
    def replacing(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        row = table[head % 5]
        return row[key % len(row)] + min(abs(query - key), 3) * 0.5

    return [relative, scaled, capped, stepped, hiding, replacing]


def _mask_mods(rng: np.random.Generator) -> list[Any]:
    documents, reach = np.sort(rng.integers(0, 4, 37)), int(rng.integers(0, 40))
    allowed = rng.random((3, 5)) < 0.6

    def same_document(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return documents[query % 37] == documents[key % 37]

    def dilated(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query - key) % 3 < 2

    def prefix(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key < reach or key <= query

    def by_head(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return allowed[head % 3, key % 5] & ~(batch == 1)

    return [same_document, dilated, prefix, by_head, lambda batch, head, query, key: False]


@st.composite
def _block_masks(draw: st.DrawFn, rng: np.random.Generator, problem: Problem) -> BlockMask:
    """Draw a block mask, for all rows of a batch and heads or for each of them, and how it is made."""
    queries, keys = problem.queries, problem.keys
    lead = tuple(draw(st.sampled_from((1, size))) for size in (int(np.prod(problem.batch)), problem.heads))
    how = draw(st.sampled_from(("array", "intervals", "function", "made of others")))
    if how == "function":
        rows, heads = (None if size == 1 else size for size in lead)
        offset = draw(st.integers(-queries - 2, keys + 2))
        mask_mod = draw(st.sampled_from(_mask_mods(rng)))
        return BlockMask.from_function(mask_mod, queries, keys, rows, heads, query_offset=offset)
    begins = rng.integers(-2, keys + 1, (*lead, queries))
    intervals = BlockMask.from_intervals(begins, begins + rng.integers(0, keys + 3, (queries,)), keys)
    if how == "intervals":
        return intervals
    array = BlockMask.from_array(rng.random((*lead, queries, keys)) < rng.choice((0.02, 0.5, 0.98)))
    return array if how == "array" else array | ~intervals


#: No call with a function has more scores: Python is asked about each of them.
FEW_SCORES = 20_000
TOGETHER: tuple[tuple[str, ...], ...] = (
    ("score_mod",),
    ("mask_mod",),
    ("score_mod", "mask_mod"),
    ("block_mask",),
    ("score_mod", "block_mask"),
    ("mask_mod", "block_mask"),
)


@st.composite
def functions(draw: st.DrawFn, problem: Problem) -> dict[str, Any]:
    """Draw a function of scores, one that says which keys are seen, a block mask, or two of these."""
    rng = np.random.default_rng(draw(SEEDS))
    which = draw(st.sampled_from(TOGETHER))
    if np.prod(problem.weights_shape) > FEW_SCORES:
        return {}
    made = {
        "score_mod": lambda: st.sampled_from(_score_mods(rng)),
        "mask_mod": lambda: st.sampled_from(_mask_mods(rng)),
        "block_mask": lambda: _block_masks(rng, problem),
    }
    return {name: draw(made[name]()) for name in which}


@st.composite
def masks_of(
    draw: st.DrawFn,
    rng: np.random.Generator,
    scores: tuple[int, ...],
    kinds: tuple[str | None, ...],
    pairs: bool = True,
    dtypes: tuple[Any, ...] = (*HALVES, np.float32, np.float64),
) -> tuple[Any, str]:
    """Draw a mask for scores of a shape, or a pair of them, and what it is."""
    kind = draw(st.sampled_from(kinds))
    if kind is None:
        return None, ""

    def mask_of(kind: str) -> Array:
        dtype = draw(st.sampled_from(dtypes))
        return random_mask(rng, draw(_broadcasting(scores)), kind, dtype)

    mask = mask_of(kind)
    described = f", mask {kind} {mask.dtype} {mask.shape}"
    if not (pairs and draw(rarely)):
        return mask, described
    others = [other for other in kinds if other and other.startswith("float") != kind.startswith("float")]
    other_kind = draw(st.sampled_from((None, *others)))
    other = None if other_kind is None else mask_of(other_kind)
    described += f" with {other_kind}" + ("" if other is None else f" {other.dtype} {other.shape}")
    return ((mask, other) if kind.startswith("float") else (other, mask)), described


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
    further: bool | None = None,
    with_functions: bool = False,
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
    further
        Whether queries have windows, offsets and lengths, scores a softcap and slopes, heads sinks, and masks come in
        pairs; not if small, unless asked for.
    with_functions
        Whether there are functions of the user's, or block masks, where there are few scores.
    """
    query_shape, key_shape, value_shape, enable_gqa = draw(shapes(empty=empty, small=small))
    dtype = draw(ALL_DTYPES)
    size = draw(st.sampled_from(sizes))
    rng = np.random.default_rng(seed := draw(SEEDS))
    arrays: list[Any] = [
        numbers(rng, shape, dtype, of)
        for shape, of in zip((query_shape, key_shape, value_shape), SIZES[size], strict=True)
    ]
    if odd:
        which, share = draw(st.sets(st.integers(0, 2), min_size=1)), draw(st.sampled_from((1 / 32, 1 / 1024)))
        arrays = [with_odd(rng, array, ODD, share if i in which else 0) for i, array in enumerate(arrays)]

    further = not small if further is None else further
    options: dict[str, Any] = {"enable_gqa": enable_gqa, "is_causal": draw(causal), "scale": draw(scales)}
    problem, _ = describe(arrays[0], arrays[1], arrays[2], **options)
    mask, described_mask = draw(masks_of(rng, problem.weights_shape, masks, further))
    if further:
        options |= draw(score_options(problem, options["is_causal"]))
    if with_functions:
        options |= draw(functions(problem))
    if dropout:
        options["dropout_p"] = draw(st.sampled_from((0.1, 0.5, 0.9, 1, 2**-20)))
        options["rng"] = draw(st.integers(0, 2**64 - 1))

    names = ["contiguous"] * 4
    if any_layout:
        names = [draw(st.one_of(layouts, st.just("stride 0"))) for _ in range(4)]
        *arrays, mask = (
            each(repeated, array) if name == "stride 0" else each(partial(laid_out, layout=name), array)
            for array, name in zip((*arrays, mask), names, strict=True)
        )
    described = " ".join(str(array.shape) for array in arrays) + f" {np.dtype(dtype)} {size} seed {seed}"
    line = f"{described}{described_mask}, {options}, layouts {names}"
    return Call(arrays[0], arrays[1], arrays[2], mask, options, line)
