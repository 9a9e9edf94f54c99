"""Pairs of bfloat16: two in the place of one float32, the first in its lower half.

Some machines multiply them pair by pair, and add both products to a float32 (`fastattn.simd.products`). Here they are
loaded, rounded and scaled.
"""

from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from fastattn.machine.features import architecture
from fastattn.simd.storage import INT, SHORT, WORD, BFloat, constant, round_to_bfloat16, shuffle_twos
from fastattn.simd.tile import (
    TileType,
    call_named,
    elementwise,
    is_shape,
    load_from,
    make_tile,
    pointer_to,
    shifted,
    vector_of,
    vectors_of,
)

ZIPPED = 4  # neighbours of a row that are next to each other in a vector of pairs of two rows


@intrinsic
def tile_load_zipped(typingctx, shape, first, second):
    """Pairs of the elements of two rows of bfloat16, of each two vectors by turns: four elements, and four.

    So they are zipped by one instruction, where vectors of neighbours would want their elements to cross registers.
    """
    if not (is_shape(shape) and shape.value.rows == 1 and shape.value.vectors % 2 == 0):
        return None

    def codegen(context, builder, sig, values):
        s, vectors = shape.value, []
        shorts, half = ir.VectorType(SHORT, 2 * s.lanes), s.lanes * 2 * SHORT.width // 8
        for v in range(s.vectors // 2):
            rows = [load_from(builder, shifted(builder, at, v * half), shorts, SHORT.width // 8) for at in values[1:]]
            every = _in_turns(s.lanes)
            for places in (every[: s.lanes], every[s.lanes :]):
                order = [place + row * 2 * s.lanes for place in places for row in range(2)]
                pairs = builder.shuffle_vector(*rows, ir.Constant(ir.VectorType(INT, 2 * s.lanes), order))
                vectors.append(builder.bitcast(pairs, vector_of(s)))
        return make_tile(builder, s, vectors)

    return signature(TileType(shape.value), shape, types.intp, types.intp), codegen


def _in_turns(lanes):
    """Of two vectors' elements, in order, the places of those that are zipped together, and of the others."""
    starts = range(0, 2 * lanes, 2 * ZIPPED)
    return [start + half + i for half in (0, ZIPPED) for start in starts for i in range(ZIPPED)]


@intrinsic
def tile_to_zipped(typingctx, tile):
    """A tile whose elements stand as `tile_load_zipped` has them."""
    return shuffle_twos(tile, _in_turns)


@intrinsic
def tile_from_zipped(typingctx, tile):
    """The same back again."""
    return shuffle_twos(tile, _in_turns, back=True)


@intrinsic
def tile_load_two_rows(typingctx, shape, first, second):
    """Pairs of the elements of two rows of bfloat16: one vector."""
    if not is_shape(shape):
        return None
    tile = TileType(shape.value)

    def codegen(context, builder, sig, values):
        s = shape.value
        ints = ir.VectorType(INT, s.lanes)
        low, high = (builder.zext(load_from(builder, at, ir.VectorType(SHORT, s.lanes), 2), ints) for at in values[1:])
        pairs = builder.or_(low, builder.shl(high, constant(ints, 16)))
        return make_tile(builder, s, [builder.bitcast(pairs, vector_of(s))])

    return signature(tile, shape, types.intp, types.intp), codegen


def _rounded(builder, low, high, order):
    """Two vectors' elements, rounded to bfloat16, in some order. x86 rounds both at once, which LLVM does not know."""
    lanes = low.type.count
    lanes_of = ir.Constant(ir.VectorType(INT, 2 * lanes), order)
    if architecture(builder.module.triple) == "arm64":
        low, high = (builder.fptrunc(each, ir.VectorType(BFloat(), lanes)) for each in (low, high))
        return builder.shuffle_vector(low, high, lanes_of)
    both = ir.VectorType(BFloat(), 2 * lanes)
    both = call_named(builder, f"llvm.x86.avx512bf16.cvtne2ps2bf16.{2 * lanes * SHORT.width}", both, high, low)
    return builder.shuffle_vector(both, ir.Constant(both.type, ir.Undefined), lanes_of)


@intrinsic
def tile_round_to_pairs(typingctx, first, second):
    """Pairs of two tiles' elements, rounded to bfloat16."""

    def emit(builder, shape, low, high):
        order = [half * shape.lanes + lane for lane in range(shape.lanes) for half in range(2)]
        return builder.bitcast(_rounded(builder, low, high, order), vector_of(shape))

    return elementwise(emit, first, second)


@intrinsic
def tile_pair_up(typingctx, first, second):
    """Pairs of the upper halves of two tiles' elements, which is all that numbers of bfloat16 have."""

    def emit(builder, shape, low, high):
        ints = ir.VectorType(INT, shape.lanes)
        low, high = builder.bitcast(low, ints), builder.bitcast(high, ints)
        low, high = builder.lshr(low, constant(ints, 16)), builder.and_(high, constant(ints, 0xFFFF0000))
        return builder.bitcast(builder.or_(low, high), vector_of(shape))

    return elementwise(emit, first, second)


@intrinsic
def tile_store_rounded(typingctx, row, address):
    """Write a row, rounded to bfloat16, its elements next to each other: as pairs of neighbours."""
    if not isinstance(row, TileType):
        return None

    def codegen(context, builder, sig, values):
        s, vectors = row.shape, vectors_of(builder, row.shape, values[0])
        for v in range(0, s.vectors, 2):
            if v + 1 < s.vectors:
                rounded = _rounded(builder, vectors[v], vectors[v + 1], list(range(2 * s.lanes)))
            else:
                rounded = builder.fptrunc(vectors[v], ir.VectorType(BFloat(), s.lanes))
            rounded = builder.bitcast(rounded, ir.VectorType(SHORT, rounded.type.count))
            place = shifted(builder, values[1], v * s.lanes * WORD // 2)
            builder.store(rounded, pointer_to(builder, place, rounded.type), align=WORD // 2)
        return context.get_dummy_value()

    return signature(types.none, row, types.intp), codegen


@intrinsic
def tile_scale_pairs(typingctx, pairs, factor):
    """Pairs times a power of two; what becomes subnormal by that is rounded as `store_stored` does it."""

    def emit(builder, shape, words, by):
        ints = ir.VectorType(INT, shape.lanes)
        words = builder.bitcast(words, ints)
        halves = builder.shl(words, constant(ints, 16)), builder.and_(words, constant(ints, 0xFFFF0000))
        products = (builder.fmul(builder.bitcast(half, by.type), by) for half in halves)
        low, high = (builder.zext(round_to_bfloat16(builder, product), ints) for product in products)
        return builder.bitcast(builder.or_(low, builder.shl(high, constant(ints, 16))), by.type)

    return elementwise(emit, pairs, factor)
