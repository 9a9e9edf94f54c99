"""One check for each function of the package, of a call that may have all options at once.

What a call gives is right by `tolerances`, or has the bits of `attention` of each row alone, which is right by them. It
leaves its arguments as they were, and gives the same bits the next time, when its plan is known, at any number of
threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import additive_gradients
import numpy as np
import tolerances
import weight_cases
from additive_cases import additive_calls
from hypothesis import strategies as st
from packed_cases import row_of, starts
from paged_cases import paged
from strategies import (
    HALVES,
    LAYOUTS,
    MASKS,
    SIZES,
    Call,
    bias_in,
    bits_of,
    calls,
    each,
    laid_out,
    layouts,
    numbers,
    rarely,
)

import fastattn
from fastattn.call.halves import cast, finfo, name_of, native, real_of
from fastattn.call.shapes import describe
from fastattn.call.upstream import captured_by_function
from fastattn.kv_cache.formats import FORMATS

Draw = Callable[..., Any]
Array = np.ndarray[Any, Any]
FUNCTIONS = ("score_mod", "mask_mod", "block_mask")
OF_BATCH = ("query_offset", "key_lengths")
OF_HEADS = ("alibi_slopes", "sinks")
FARTHEST = 1000  # an offset beyond which slopes have no gradients that mean anything
STEEPEST = 30.0  # a slope, or a sink, beside which all weights of a row are next to nothing
SWALLOWS = 1e6  # what is added to scores, of the numbers that functions add
#: Sizes beside infinite numbers, times which subnormal ones of bfloat16 are what 0 is, where a machine has no others.
NORMAL = tuple(size for size in SIZES if size != "denormal")
#: Layouts of results: what can be written to.
WRITEABLE = tuple(name for name in LAYOUTS if name not in ("read-only", "byte-swapped"))


def drawn(draw: Draw, tame: bool = False, dropout: bool = True) -> Call:
    """Draw a call of attention; `tame` ones are of usual numbers alone, which gradients mean something of."""
    small = draw(st.sampled_from((True, True, False)))
    kinds: dict[str, Any] = {"masks": (None, None, *MASKS[:-1])}
    if not tame and draw(st.integers(0, 5)) == 0:
        kinds = {"masks": (None, "bool", "padding", "float", "float, -inf"), "sizes": tuple(SIZES)}
        if draw(st.booleans()):
            kinds = {
                "masks": (None, "bool", "padding", "float, -inf", "float, odd"),
                "sizes": NORMAL,
                "odd": True,
            }
    return draw(
        calls(
            small=small,
            further=True,
            empty=draw(st.integers(0, 15)) == 0,
            with_functions=draw(st.integers(0, 4)) == 0,
            dropout=dropout and draw(rarely),
            **kinds,
        )
    )


@dataclass
class Runner:
    """Makes calls twice, and counts them."""

    draw: Draw
    count: int = 0

    def __call__(self, function: Any, *args: Any, bits: tuple[Any, ...] | None = None, **options: Any) -> Any:
        """Call a function at some number of threads, and again at another: with copies of its arrays, it may be."""
        before = [array.tobytes() for array in arrays_in(args, options)]
        with fastattn.num_threads(self.draw(st.integers(1, 3))):
            found = function(*args, **options)
        moved = args
        if self.draw(rarely):
            name = self.draw(layouts)
            moved = tuple(each(partial(laid_out, layout=name), a) if is_operand(a) else a for a in args)
        with fastattn.num_threads(self.draw(st.integers(1, 3))):
            again = function(*moved, **options)
        self.count += 2
        assert [array.tobytes() for array in arrays_in(args, options)] == before, "an argument was written to"
        assert bits_of(*as_tuple(again)) == bits_of(*as_tuple(found)), "the second call gave other bits"
        return found


def is_operand(argument: Any) -> bool:
    """Whether an argument is an array of numbers, or a pair of masks."""
    if isinstance(argument, tuple):
        return len(argument) == 2 and any(isinstance(one, np.ndarray) for one in argument)
    return isinstance(argument, np.ndarray) and argument.dtype.kind in "fbV"


def arrays_in(args: Any, options: Any) -> Iterator[Array]:
    """Yield the arrays among arguments."""
    for argument in (*args, *options.values()):
        for one in argument if isinstance(argument, tuple) else (argument,):
            if isinstance(one, np.ndarray):
                yield one


def as_tuple(results: Any) -> tuple[Any, ...]:
    """Return results as a tuple."""
    return tuple(results) if isinstance(results, tuple) else (results,)


# -- calls of attention itself -----------------------------------------------------------------------------------------


def attention(draw: Draw, call: Call, run: Runner) -> None:
    """The result, its log-sum-exp and the weights; the same without these, and somewhere else."""
    wanted = tolerances.expected(*call.args, **call.options)
    out, lse, weights = run(fastattn.attention, *call.args, **call.options, return_lse=True, return_weights=True)
    tolerances.check_all((out, lse, weights), wanted)
    own = laid_out(np.full_like(out, np.nan), draw(st.sampled_from(WRITEABLE)))
    found = run(fastattn.attention, *call.args, **call.options, return_lse=draw(st.booleans()))
    assert bits_of(*as_tuple(found)) == bits_of(out, lse)[: len(as_tuple(found))]
    assert fastattn.attention(*call.args, **call.options, out=own) is own
    assert bits_of(own) == bits_of(out)


def backward(draw: Draw, call: Call, run: Runner) -> None:
    """Gradients of all that has them."""
    query, key, value, mask = call.args
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    options = with_gradients(call)
    out, lse = fastattn.attention(query, key, value, mask, **options, return_lse=True)
    grad_out = laid_out(numbers(rng, out.shape, out.dtype), draw(layouts))
    grad_lse = numbers(rng, lse.shape, lse.dtype) if draw(st.booleans()) else None
    captured = captured_by_function(options["score_mod"]) if "score_mod" in options else {}
    of_heads = tuple(name for name in OF_HEADS if name in options)
    names = ("query", "key", "value", *(("attn_mask",) if bias_in(mask) is not None else ()), *of_heads, *captured)
    given = grad_out, query, key, value, out, lse, mask
    found = run(fastattn.attention_backward, *given, **options, grad_lse=grad_lse, grads=names)
    by_name = dict(zip(names, found, strict=True))
    arriving: Any = {"grad_lse": grad_lse, **options}
    usual = tuple(by_name.pop(name) for name in names[: 4 if bias_in(mask) is not None else 3])
    tolerances.check_gradients(usual, call.args, *tolerances.expected_gradients(grad_out, *call.args, **arriving))
    if of_heads:
        tolerances.check_head_gradients({name: by_name[name] for name in of_heads}, grad_out, *call.args, **arriving)
    if captured:
        arrays = {name: by_name[name] for name in captured}
        tolerances.check_captured_gradients(arrays, captured, grad_out, *call.args, **arriving)


def with_gradients(call: Call) -> dict[str, Any]:
    """Return the options of a call of which something is left in gradients: slopes, offsets, a function beside a mask.

    Where a mask swallows what the function adds, the reference, which differentiates it by steps, finds nothing.
    """
    options, bias = dict(call.options), bias_in(call.attn_mask)
    if bias is not None and "score_mod" in options and tolerances.largest(bias) > SWALLOWS:
        del options["score_mod"]
    if isinstance(options.get("query_offset"), int):
        options["query_offset"] = min(max(options["query_offset"], -FARTHEST), FARTHEST)
    for name in ("alibi_slopes", "sinks"):
        if name in options:
            options[name] = np.clip(options[name], -STEEPEST, STEEPEST)
    return options


def weights(draw: Draw, call: Call, run: Runner) -> None:
    """The weights of some rows and columns."""
    args = weight_cases.without_values(call)
    choice = [draw(weight_cases.selections(length)) for length in (call.query.shape[-2], call.key.shape[-2])]
    weight_cases.check_chosen(args, call.options, *choice)
    run(fastattn.attention_weights, *args, **call.options, rows=choice[0], columns=choice[1])


def summary(draw: Draw, call: Call, run: Runner) -> None:
    """What is said of all weights."""
    args, top_k = weight_cases.without_values(call), draw(st.sampled_from((0, 1, 2, 3, 8, 9, 17, 40)))
    weight_cases.check_summary(args, call.options, top_k)
    run(fastattn.attention_summary, *args, **call.options, top_k=top_k)


def blocks(draw: Draw, call: Call, run: Runner) -> None:
    """Keys that come in blocks."""
    query, key, value, mask = call.args
    wanted = tolerances.expected(*call.args, **call.options)
    size = draw(st.integers(1, max(1, key.shape[-2])))
    pair: Any = {"block_size": size, "return_lse": True}
    out, lse = run(fastattn.attention_blocks, query, (key, value), mask, **pair, **call.options)
    tolerances.check_out(out, wanted)
    tolerances.check_lse(lse, wanted)


def merge(draw: Draw, call: Call, run: Runner) -> None:
    """Pieces of the keys, each of them a call, whose results are merged."""
    query, key, value, mask = call.args
    wanted = tolerances.expected(*call.args, **call.options)
    problem = wanted.problem
    offset, lengths, sinks = (call.options.get(name) for name in ("query_offset", "key_lengths", "sinks"))
    if call.options["is_causal"] == "bottom-right":
        offset = (problem.keys if lengths is None else lengths.astype(np.int64)) - problem.queries
    cuts = sorted(draw(st.lists(st.integers(0, problem.keys), max_size=3)))
    pieces = []
    for a, b in pairwise((0, *cuts, problem.keys)):
        own = {**call.options, "is_causal": bool(call.options["is_causal"])}
        own["query_offset"] = (0 if offset is None else offset) - a
        own["key_lengths"] = None if lengths is None else np.clip(lengths.astype(np.int64) - a, 0, b - a)
        own["sinks"] = None if a or pieces else sinks  # which count once
        columns = each(lambda m, a=a, b=b: m if not m.ndim or m.shape[-1] == 1 else m[..., a:b], mask)  # type: ignore[misc]
        target = np.empty(problem.out_shape, problem.real)
        operands = query, key[..., a:b, :], value[..., a:b, :], columns
        pieces.append(fastattn.attention(*operands, **own, return_lse=True, out=target))
        run.count += 1
    out, lse = run(fastattn.merge, *zip(*pieces, strict=True))
    eps = float(np.finfo(problem.real).eps) * (len(pieces) + 2)
    room = eps * (np.abs(np.where(np.isfinite(wanted.lse), wanted.lse, 0)) + 4)
    with np.errstate(all="ignore"):
        more = 2 * wanted.out_bound + 4 * room[..., None] * max(1.0, tolerances.largest(value))
    check = replace(wanted, out_bound=more, lse_bound=2 * wanted.lse_bound + room, largest_out=2 * wanted.largest_out)
    tolerances.check_out(cast(out, problem.storage), check)
    tolerances.check_lse(lse, check)


# -- rows of a batch ---------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """A call whose arrays have the axes (B, H, L, features), and its options what is one for each row."""

    query: Array
    key: Array
    value: Array
    mask: Any
    options: dict[str, Any]
    lengths: Array

    def alone(self, number: int, queries: int | None = None, keys: int | None = None) -> dict[str, Any]:
        """Return the arguments of a call of `attention` that has this row as its last one, at its place in the batch.

        Functions and dropout are told of the place: without these the row is the only one.
        """
        own = row_of(self.options, number)
        count = number + 1 if any(name in own for name in (*FUNCTIONS, "dropout_p")) else 1
        keys = int(self.lengths[number]) if keys is None else keys
        parts = self.query[number, :, :queries], self.key[number, :, :keys], self.value[number, :, :keys]
        arrays = (np.broadcast_to(part, (count, *part.shape)) for part in parts)
        return dict(zip(("query", "key", "value"), arrays, strict=True)) | own | {"enable_gqa": True}


def rows_of(call: Call) -> Rows:
    """Return a call of any leading axes as rows of a batch."""
    options = dict(call.options)
    problem, _ = describe(*call.args[:3], None, is_causal=False, enable_gqa=options.pop("enable_gqa"))
    batch, heads, rows = problem.batch, problem.heads, int(np.prod(problem.batch))
    kv_heads = problem.kv_heads

    def as_rows(array: Array, count: int) -> Array:
        return np.broadcast_to(array, (*batch, count, *array.shape[-2:])).reshape(rows, count, *array.shape[-2:])

    arrays = [as_rows(array, count) for array, count in zip(call.args[:3], (heads, kv_heads, kv_heads), strict=True)]
    for name, shape in {**dict.fromkeys(OF_BATCH, batch), **dict.fromkeys(OF_HEADS, (*batch, heads))}.items():
        if isinstance(options.get(name), np.ndarray):
            options[name] = np.broadcast_to(options[name], shape).reshape(rows, *shape[len(batch) :])
    mask = call.attn_mask
    if mask is not None and len(batch) != 1:
        mask = each(
            lambda one: np.broadcast_to(one, problem.weights_shape).reshape(rows, *problem.weights_shape[-3:]), mask
        )
    lengths = options.pop("key_lengths", None)
    lengths = np.full(rows, problem.keys) if lengths is None else lengths.astype(np.int64)
    return Rows(*arrays, mask, options, lengths)  # type: ignore[call-arg]


def checked_row(run: Runner, rows: Rows, number: int, queries: int | None = None) -> tuple[Array, Array]:
    """Return result and log-sum-exp of a row alone, lengths first, which are right."""
    own = rows.alone(number, queries)
    arrays = [own.pop(name) for name in ("query", "key", "value")]
    out, lse = fastattn.attention(*arrays, **own, return_lse=True)
    run.count += 1
    wanted = tolerances.expected(*arrays, **own)
    tolerances.check_out(out, wanted)
    tolerances.check_lse(lse, wanted)
    return out[-1].swapaxes(0, 1), lse[-1].swapaxes(0, 1)


def packed(draw: Draw, array: Array, counts: list[int]) -> Array:
    """Return the first so many of each row, one row behind the other, lengths first, somehow in memory."""
    parts = [row[:, :count].swapaxes(0, 1) for row, count in zip(array, counts, strict=True)]
    none = np.zeros((0, *array.swapaxes(1, 2).shape[2:]), array.dtype)
    return laid_out(np.concatenate([none, *parts]), draw(layouts))


def counts_of(draw: Draw, rows: Rows) -> list[int]:
    """Draw how many queries each row has: all, the same few, or any."""
    most = rows.query.shape[2]
    how = draw(st.sampled_from(("all", "alike", "any", "any")))
    alike = most if how == "all" else draw(st.integers(0, most))
    return [draw(st.integers(0, most)) if how == "any" else alike for _ in rows.query]


def varlen(draw: Draw, call: Call, run: Runner) -> None:
    """Packed sequences have the bits of each of them alone, and so have their gradients."""
    rows = rows_of(call)
    counts, lengths = counts_of(draw, rows), rows.lengths.tolist()
    arrays = [
        packed(draw, array, each_row)
        for array, each_row in ((rows.query, counts), (rows.key, lengths), (rows.value, lengths))
    ]
    ends: Any = starts(counts), starts(lengths)
    options = with_gradients(replace(call, options=rows.options)) | {"enable_gqa": True}
    rows.options = {name: option for name, option in options.items() if name != "enable_gqa"}
    found = run(fastattn.attention_varlen, *arrays, *ends, **options, return_lse=True)
    rng = np.random.default_rng(0)
    above = numbers(rng, found[0].shape, found[0].dtype), numbers(rng, found[1].shape, found[1].dtype)
    given: Any = (above[0], *arrays, *found, *ends)
    gradients = run(fastattn.attention_varlen_backward, *given, **options, grad_lse=above[1])
    for number, (count, (at, end), (k, k_end)) in enumerate(zip(counts, *map(pairwise, ends), strict=True)):
        wanted = checked_row(run, rows, number, count)
        assert bits_of(*(array[at:end] for array in found)) == bits_of(*wanted), f"row {number}"
        own = rows.alone(number, count)
        operands = [own.pop(name) for name in ("query", "key", "value")]
        one = [np.broadcast_to(a.swapaxes(0, 1), (len(operands[0]), *a.swapaxes(0, 1).shape)) for a in wanted]
        arriving = [np.zeros_like(one[0]), np.zeros_like(one[1])]
        for whole, part in zip(arriving, above, strict=True):
            whole[-1] = part[at:end].swapaxes(0, 1)
        alone = fastattn.attention_backward(arriving[0], *operands, *one, **own, grad_lse=arriving[1])
        parts = (slice(at, end), slice(k, k_end), slice(k, k_end))
        for got, part, array in zip(gradients, parts, alone, strict=True):
            assert bits_of(got[part].swapaxes(0, 1)) == bits_of(array[-1]), f"gradients of row {number}"


def in_pages(draw: Draw, rows: Rows) -> tuple[Array, Any]:
    """Put keys and values into pages, perhaps of half precision; return the queries, lengths first, and these."""
    if rows.query.dtype == np.float32 and draw(rarely):  # the keys of whom are then those that are left
        half = np.dtype(draw(st.sampled_from(HALVES)))
        with np.errstate(all="ignore"):
            kept = [cast(array, half) for array in (rows.key, rows.value)]
        rows.key, rows.value = (cast(array, rows.query.dtype) for array in kept)
    else:
        kept = [rows.key, rows.value]
    page = draw(st.sampled_from((1, 2, 5, 16, 64, 100, 256, 512)))
    how = draw(st.sampled_from(("contiguous", "shuffled", "heads first")))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    held = paged(*kept, rows.lengths, page, rng, how)
    pages = [laid_out(array, draw(layouts)) for array in (held.key_pages, held.value_pages)]
    return rows.query.swapaxes(1, 2), (*pages, held.page_table, held.key_lengths)


def in_paged(draw: Draw, call: Call, run: Runner) -> None:
    """Keys in pages have the bits of keys in an array, of which each row has so many."""
    rows = rows_of(call)
    query, held = in_pages(draw, rows)
    padded: dict[str, Any] = {**rows.options, "key_lengths": rows.lengths, "enable_gqa": True}
    arrays = rows.query, rows.key, rows.value, rows.mask
    wanted = fastattn.attention(*arrays, **padded, return_lse=True)
    exact = tolerances.expected(*arrays, **padded)
    tolerances.check_out(wanted[0], exact)
    tolerances.check_lse(wanted[1], exact)
    query = laid_out(query, draw(layouts))
    found = run(fastattn.attention_paged, query, *held, None, rows.mask, **rows.options, return_lse=True)
    assert bits_of(*(array.swapaxes(1, 2) for array in found)) == bits_of(*wanted)
    own = laid_out(np.full_like(found[0], np.nan), draw(st.sampled_from(WRITEABLE)))
    assert fastattn.attention_paged(query, *held, None, rows.mask, **rows.options, out=own) is own
    assert bits_of(own) == bits_of(found[0])


def packed_in_paged(draw: Draw, call: Call, run: Runner) -> None:
    """So have packed queries, of each row alone."""
    rows = rows_of(call)
    _, held = in_pages(draw, rows)
    counts = counts_of(draw, rows)
    query, ends = packed(draw, rows.query, counts), starts(counts)
    found = run(fastattn.attention_paged, query, *held, ends, **rows.options, return_lse=True)
    for number, (at, end) in enumerate(pairwise(ends)):
        wanted = checked_row(run, rows, number, counts[number])
        assert bits_of(*(array[at:end] for array in found)) == bits_of(*wanted), f"row {number}"


#: What keys and values are kept as, by the dtype of queries: some of all pairs, as each has kernels of its own.
KEPT = {
    "float64": (("float32", "float32"), ("int8", "int8")),
    "float32": (("float32", "float32"), ("int8", "int8"), ("bfloat16", "bfloat16"), ("float16", "int8")),
    "float16": (("float16", "float16"), ("float16", "float16"), ("int8", "int8")),
    "bfloat16": (("bfloat16", "bfloat16"), ("bfloat16", "bfloat16"), ("int8", "int8")),
}


def cache(draw: Draw, call: Call, run: Runner) -> None:
    """A cache has the bits of attention to what is left of its keys, or is as near to it as that is said to be."""
    rows = rows_of(call)
    count, kv_heads, keys = rows.key.shape[:3]
    if not all(rows.key.shape[1::2] + rows.value.shape[3:]):
        return  # a cache has heads and features
    if count and keys:
        rows.lengths[draw(st.integers(0, count - 1))] = keys  # a mask has as many
    kept = [FORMATS[name] for name in draw(st.sampled_from(KEPT[name_of(native(rows.query.dtype))]))]
    held = fastattn.KVCache(
        count, kv_heads, rows.key.shape[3], rows.value.shape[3], dtype=tuple(each_kept.name for each_kept in kept)
    )
    cut = draw(st.integers(0, keys))
    for at, end in ((0, cut), (cut, keys)):
        lengths = np.clip(rows.lengths - at, 0, end - at)
        held.append(laid_out(rows.key[:, :, at:end], draw(layouts)), rows.value[:, :, at:end], lengths)
    options = {**rows.options, "return_lse": True}
    if options["is_causal"] == "bottom-right" and draw(st.booleans()):
        del options["is_causal"]  # as it is unless it is said
    found = run(held.attention, rows.query, rows.mask, **options)
    dtype = native(rows.query.dtype)
    real, alike = real_of(dtype), all(each_kept.name == name_of(dtype) for each_kept in kept)
    with np.errstate(all="ignore"):
        arrays = [
            one.decode(one.encode(a), a.shape[-1], real) for one, a in zip(kept, (rows.key, rows.value), strict=True)
        ]
    arrays = [cast(array, dtype if alike else real) for array in (rows.query, *arrays)]
    padded: dict[str, Any] = {**rows.options, "key_lengths": rows.lengths, "enable_gqa": True}
    exact = tolerances.expected(*arrays, rows.mask, **padded)
    out, lse = found
    if alike:
        wanted = fastattn.attention(*arrays, rows.mask, **padded, return_lse=True)
        assert bits_of(*found) == bits_of(*wanted)
    elif dtype != real:
        rounding, least = tolerances.roundings(out.dtype)
        bound = exact.out_bound + 2 * rounding * np.abs(np.where(np.isfinite(exact.out), exact.out, 0)) + 2 * least
        problem = replace(exact.problem, storage=out.dtype)
        exact = replace(exact, out_bound=bound, problem=problem, largest_out=exact.largest_out * (1 + 2 * rounding))
    if tolerances.largest(arrays[2]) > float(finfo(dtype).max):
        exact = replace(exact, largest_out=np.inf)  # what is left of a value may be more than the dtype holds
    tolerances.check_out(out, exact)
    tolerances.check_lse(lse, exact)


# -- additive attention ------------------------------------------------------------------------------------------------


def additive(draw: Draw, call: Call, run: Runner) -> None:
    """Scores that are sums."""
    if not np.isfinite(tolerances.in_float64(call.value)).all():  # then no weight may be in doubt
        call = replace(call, options=with_gradients(call))
    options = dict(call.options)
    weight = options.pop("weight")
    wanted = tolerances.expected(*call.args, **call.options)
    given = (*call.args[:3], weight, call.attn_mask)
    out, lse, matrix = run(fastattn.additive_attention, *given, **options, return_lse=True, return_weights=True)
    tolerances.check_all((out, lse, matrix), wanted)
    assert bits_of(run(fastattn.additive_attention, *given, **options)) == bits_of(out)


def additive_backward(draw: Draw, call: Call, run: Runner) -> None:
    """And their gradients."""
    additive_gradients.check(replace(call, options=with_gradients(call)))
    run.count += 2


@dataclass(frozen=True)
class Path:
    """A function of the package: its check, what calls it is given, and which options it has not."""

    check: Callable[[Draw, Call, Runner], None]
    strategy: Callable[[Draw], Call] = drawn
    without: tuple[str, ...] = ()


def drawn_additive(draw: Draw, tame: bool = False) -> Call:
    """Draw a call of additive attention; of `tame` ones, what is not finite meets no function whose slope may be 0."""
    odd = draw(st.integers(0, 5)) == 0
    return draw(additive_calls(odd=odd, with_functions=draw(st.integers(0, 4)) == 0 and not (odd and tame)))


tame = partial(drawn, tame=True)
without_dropout = partial(drawn, dropout=False)
PATHS = {
    "attention": Path(attention),
    "attention_backward": Path(backward, tame),
    "attention_weights": Path(weights, without_dropout),
    "attention_summary": Path(summary, without_dropout),
    "attention_blocks": Path(blocks),
    "merge": Path(merge, partial(drawn, tame=True, dropout=False), ("score_mod", "mask_mod", "block_mask")),
    "attention_varlen": Path(varlen, tame, ("attn_mask", "block_mask")),
    "attention_paged": Path(in_paged),
    "attention_paged, packed": Path(packed_in_paged, without=("attn_mask", "block_mask")),
    "KVCache": Path(cache),
    "additive_attention": Path(additive, drawn_additive),
    "additive_attention_backward": Path(additive_backward, partial(drawn_additive, tame=True)),
}


def without(call: Call, names: tuple[str, ...]) -> Call:
    """Return a call without some options."""
    options = {name: option for name, option in call.options.items() if name not in names}
    return replace(call, options=options, attn_mask=None if "attn_mask" in names else call.attn_mask)
