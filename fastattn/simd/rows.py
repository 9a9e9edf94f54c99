"""Rows with features, or keys, in the lanes: sums over lanes, and tiles that a few of them make."""

from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from fastattn.machine.tile import BLOCK, TileShape
from fastattn.simd.arithmetic import select_max
from fastattn.simd.products import Elements, Pairs
from fastattn.simd.storage import places_of
from fastattn.simd.tile import TileType, call_llvm, is_shape, make_tile, pointer_to, vector_of, vectors_of


@intrinsic
def tile_stretch(typingctx, shape, tile):
    """A tile of which each row is one of another tile, the first ones first, each as often as it takes."""
    if not (is_shape(shape) and isinstance(tile, TileType)):
        return None

    def codegen(context, builder, sig, values):
        s, given = shape.value, tile.shape
        vectors, times = vectors_of(builder, given, values[1]), s.rows // given.rows
        rows = [vectors[r // times * s.vectors + v] for r in range(s.rows) for v in range(s.vectors)]
        return make_tile(builder, s, rows)

    return signature(TileType(shape.value), shape, tile), codegen


@intrinsic
def store_split(typingctx, shape, vector, address, row_bytes):
    """Write a vector in pieces, each a row of a shape that has fewer lanes, to rows `row_bytes` apart."""
    if not (is_shape(shape) and isinstance(vector, TileType)):
        return None

    def codegen(context, builder, sig, values):
        s, whole = shape.value, vectors_of(builder, vector.shape, values[1])[0]
        rows = TileShape(s.dtype, s.lanes, vector.shape.lanes // s.lanes, 1)
        for r, place in enumerate(places_of(builder, rows, rows.itemsize, values[2], values[3])):
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), s.lanes), list(range(r * s.lanes, (r + 1) * s.lanes)))
            piece = builder.shuffle_vector(whole, whole, lanes)
            builder.store(piece, pointer_to(builder, place, vector_of(s)), align=s.itemsize)
        return context.get_dummy_value()

    return signature(types.none, shape, vector, types.intp, types.intp), codegen


def _are_rows(a, b, c):
    """Whether two types are that of one row, and a third one that of a vector of it."""
    return isinstance(a, TileType) and a == b and a.shape.rows == 1 and c == TileType(a.shape.vector)


def _dot(kind, a, b, c):
    """Signature and lowering of c plus products of two rows, vector after vector, by a kind of multiply-add."""
    if not _are_rows(a, b, c):
        return None

    def codegen(context, builder, sig, values):
        one, other, total = (vectors_of(builder, ty.shape, value) for ty, value in zip(sig.args, values, strict=True))
        acc, multiply_add = total[0], kind(c.shape).multiply_add
        for left, right in zip(one, other, strict=True):
            acc = multiply_add(builder, left, right, acc)
        return make_tile(builder, c.shape, [acc])

    return signature(c, a, b, c), codegen


@intrinsic
def add_dot(typingctx, a, b, c):
    """c plus the sum over the vectors of a * b, one after the other: a and b are rows, c is one vector."""
    return _dot(Elements, a, b, c)


@intrinsic
def add_dot_of_pairs(typingctx, a, b, c):
    """The same where the elements of a and b are pairs of bfloat16."""
    return _dot(Pairs, a, b, c)


@intrinsic
def add_dot_of_blocks(typingctx, a, b, scales, c):
    """The same where the factors of `scales` are one for each block: the sum of a block is multiplied by it."""
    if not (_are_rows(a, b, c) and scales == a):
        return None

    def codegen(context, builder, sig, values):
        lists = [vectors_of(builder, ty.shape, value) for ty, value in zip(sig.args, values, strict=True)]
        acc, together = lists.pop()[0], max(1, BLOCK // a.shape.lanes)
        for first in range(0, a.shape.vectors, together):
            one, other, scale = (vectors[first : first + together] for vectors in lists)
            part = builder.fmul(one[0], other[0])
            for left, right in zip(one[1:], other[1:], strict=True):
                part = call_llvm(builder, "fmuladd", part.type, [left, right, part])
            acc = call_llvm(builder, "fmuladd", acc.type, [part, scale[0], acc])
        return make_tile(builder, c.shape, [acc])

    return signature(c, a, b, scales, c), codegen


def _halves(count, width):
    """Lanes of two vectors side by side: of each run of so many lanes one half where it stands, then the other half.

    Of the first vector the first half of a run stays, of the second the second: a blend, for which machines have more
    units than for shuffles.
    """
    half = width // 2
    stay = [lane if lane % width < half else count + lane for lane in range(count)]
    return stay, [lane + half if lane % width < half else count + lane - half for lane in range(count)]


@intrinsic
def row_sums(typingctx, a):
    """The sum of each row of a square tile, row r's in lane r: one vector.

    Always in one order: the halves of a row are added, then the halves of what that gives, and so on.
    """
    if not (isinstance(a, TileType) and a.shape == a.shape.square):
        return None
    row = TileType(a.shape.vector)

    def codegen(context, builder, sig, values):
        lanes, rows = a.shape.lanes, vectors_of(builder, a.shape, values[0])
        width = lanes
        while len(rows) > 1:
            stay, move = (ir.Constant(ir.VectorType(ir.IntType(32), lanes), half) for half in _halves(lanes, width))
            middle, width = len(rows) // 2, width // 2
            rows = [
                builder.fadd(builder.shuffle_vector(one, other, stay), builder.shuffle_vector(one, other, move))
                for one, other in zip(rows[:middle], rows[middle:], strict=True)
            ]
        return make_tile(builder, row.shape, rows)

    return signature(row, a), codegen


def _over_lanes(combine, a):
    """Signature and lowering of one number made of a vector's lanes by `combine(builder, shape, one, other)`."""
    if not (isinstance(a, TileType) and a.shape == a.shape.vector):
        return None

    def codegen(context, builder, sig, values):
        vector, i32 = vectors_of(builder, a.shape, values[0])[0], ir.IntType(32)
        half = a.shape.lanes // 2
        while half:
            order = ir.Constant(ir.VectorType(i32, a.shape.lanes), [lane ^ half for lane in range(a.shape.lanes)])
            vector = combine(builder, a.shape, vector, builder.shuffle_vector(vector, vector, order))
            half //= 2
        return builder.extract_element(vector, ir.Constant(i32, 0))

    return signature(a.element, a), codegen


@intrinsic
def largest_lane(typingctx, a):
    """The maximum over the lanes of a vector."""
    return _over_lanes(select_max, a)


@intrinsic
def sum_lanes(typingctx, a):
    """The sum over the lanes of a vector, in the order of `row_sums`."""
    return _over_lanes(lambda builder, shape, a, b: builder.fadd(a, b), a)
