"""The inner steps of products: terms of sums that stay in registers.

    acc[m][n] += column[m] · row[n]              rows + vectors loads and rows × vectors multiply-adds

`tile_rank1` takes elements of float32 or float64, `tile_rank2` pairs of bfloat16 (`fastattn.simd.storage`): a tile's
accumulators are float32 then, and the products of both halves are added.

Most machines repeat an element in all lanes of a register as they load it. Where a multiply-add takes one element of a
register instead (`by_element` of a tile), elements that lie next to each other are loaded together: those of a column,
or four that follow each other in each row of what is multiplied.
"""

from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from fastattn.machine.features import architecture
from fastattn.simd.storage import FLOAT, INT, WORD, BFloat
from fastattn.simd.tile import (
    TileType,
    call_llvm,
    call_named,
    element_of,
    elementwise,
    load_from,
    make_tile,
    shifted,
    splat,
    vector_of,
    vectors_of,
)

STEPS = 4  # that one step along rows takes together


class Elements:
    """Multiply-adds of elements of the tile's dtype."""

    def __init__(self, shape):
        self.shape, self.element, self.itemsize, self.align = shape, element_of(shape), shape.itemsize, shape.itemsize

    def load(self, builder, address, count):
        """So many elements that lie next to each other."""
        return load_from(builder, address, ir.VectorType(self.element, count), self.align)

    def multiply_add(self, builder, repeated, vector, acc):
        """acc + repeated * vector, by lanes."""
        return call_llvm(builder, "fmuladd", acc.type, [repeated, vector, acc])


class Pairs(Elements):
    """Multiply-adds of pairs of bfloat16, in words."""

    def __init__(self, shape):
        self.shape, self.element, self.itemsize, self.align = shape, FLOAT, WORD, WORD // 2

    def load(self, builder, address, count):
        """The same of pairs. Of what it knows to be loaded, LLVM repeats a pair before bfdot, which could take it."""
        if architecture(builder.module.triple) != "arm64":
            return super().load(builder, address, count)
        found = load_from(builder, address, ir.VectorType(BFloat(), 2 * count), self.align)
        found = call_named(builder, f"llvm.arithmetic.fence.v{2 * count}bf16", found.type, found)
        return builder.bitcast(found, ir.VectorType(FLOAT, count))

    def multiply_add(self, builder, repeated, vector, acc):
        """acc + the products of both halves, by lanes."""
        s = self.shape
        pairs = ir.VectorType(BFloat(), 2 * s.lanes)
        name, factors = f"llvm.x86.avx512bf16.dpbf16ps.{8 * s.vector_bytes}", [repeated, vector]
        if architecture(builder.module.triple) == "arm64":  # where the second may be an element
            name, factors = f"llvm.aarch64.neon.bfdot.v{s.lanes}f32.v{2 * s.lanes}bf16", [vector, repeated]
        return call_named(builder, name, acc.type, acc, *(builder.bitcast(factor, pairs) for factor in factors))


def _load_row(builder, kind, address):
    """The vectors of a row."""
    s = kind.shape
    places = [shifted(builder, address, v * s.vector_bytes) for v in range(s.vectors)]
    return [load_from(builder, place, ir.VectorType(kind.element, s.lanes), kind.align) for place in places]


def _load_repeated(builder, kind, address):
    """One element, in all lanes of a register."""
    return splat(builder, load_from(builder, address, kind.element, kind.align), kind.shape.lanes)


def _load_neighbours(builder, kind, address, count):
    """So many elements that lie next to each other, each in all lanes of a register, for multiply-adds by element."""
    lanes, repeated = kind.shape.lanes, []
    for first in range(0, count, lanes):
        some = kind.load(builder, shifted(builder, address, first * kind.itemsize), min(lanes, count - first))
        for lane in range(some.type.count):
            which = ir.Constant(ir.VectorType(INT, lanes), [lane] * lanes)
            repeated.append(builder.shuffle_vector(some, ir.Constant(some.type, ir.Undefined), which))
    return repeated


def _row_places(builder, address, row_bytes, rows):
    """The address of each of some rows that are `row_bytes` apart."""
    others = [builder.add(address, builder.mul(row_bytes, ir.Constant(row_bytes.type, m))) for m in range(1, rows)]
    return [address, *others]


def _add(builder, kind, accumulators, column, row):
    """The accumulators, with a column's elements, each repeated, times the vectors of a row."""
    acc = iter(accumulators)
    return [kind.multiply_add(builder, repeated, vector, next(acc)) for repeated in column for vector in row]


def _strided(builder, kind, accumulators, column, column_stride, row):
    """One step; elements of the column lie any distance apart."""
    vectors = _load_row(builder, kind, row)
    places = _row_places(builder, column, column_stride, kind.shape.rows)
    return _add(builder, kind, accumulators, (_load_repeated(builder, kind, place) for place in places), vectors)


def _packed(builder, kind, accumulators, column, row):
    """One step; elements of the column are neighbours."""
    vectors = _load_row(builder, kind, row)
    return _add(builder, kind, accumulators, _load_neighbours(builder, kind, column, kind.shape.rows), vectors)


def _along(builder, kind, accumulators, a, a_row, b):
    """Some steps, of which neighbours in the rows of a are the factors."""
    together = min(STEPS, kind.shape.lanes)  # as many as a register holds
    for first in range(0, STEPS, together):
        start = shifted(builder, a, first * kind.itemsize)
        places = _row_places(builder, start, a_row, kind.shape.rows)
        rows = [_load_neighbours(builder, kind, place, together) for place in places]
        for step in range(together):
            vectors = _load_row(builder, kind, shifted(builder, b, (first + step) * kind.shape.row_bytes))
            accumulators = _add(builder, kind, accumulators, [each[step] for each in rows], vectors)
    return accumulators


def _typed(acc, kind_of, steps, arguments):
    """Signature and lowering of a tile and what `steps(builder, kind, accumulators, *addresses)` adds to it."""
    if not isinstance(acc, TileType):
        return None

    def codegen(context, builder, sig, values):
        accumulators = vectors_of(builder, acc.shape, values[0])
        return make_tile(builder, acc.shape, steps(builder, kind_of(acc.shape), accumulators, *values[1:]))

    return signature(acc, acc, *[types.intp] * arguments), codegen


@intrinsic
def tile_rank1(typingctx, acc, column, column_stride, row):
    """acc + column ⊗ row: element m of the column is at `column + m * column_stride`, row is a row in memory."""
    return _typed(acc, Elements, _strided, 3)


@intrinsic
def tile_rank2(typingctx, acc, column, column_stride, row):
    """The same of pairs: pair m of the column is at `column + m * column_stride`, row is a row of pairs."""
    return _typed(acc, Pairs, _strided, 3)


@intrinsic
def tile_rank1_packed(typingctx, acc, column, row):
    """acc + column ⊗ row, of a column whose elements are neighbours; only for a tile that says `by_element`."""
    return _typed(acc, Elements, _packed, 2)


@intrinsic
def tile_rank2_packed(typingctx, acc, column, row):
    """The same of pairs."""
    return _typed(acc, Pairs, _packed, 2)


@intrinsic
def tile_rank1_along(typingctx, acc, a, a_row, b):
    """acc and four terms of a sum, of which neighbours in the rows of `a` are factors; only for `by_element`.

    Rows of a are `a_row` bytes apart; the four rows of b are a tile's, one behind the other.
    """
    return _typed(acc, Elements, _along, 3)


@intrinsic
def tile_rank2_along(typingctx, acc, a, a_row, b):
    """The same of pairs."""
    return _typed(acc, Pairs, _along, 3)


@intrinsic
def fma_of_pairs(typingctx, a, b, c):
    """c + the products of both halves of a and b, element by element."""

    def emit(builder, shape, one, other, acc):
        return Pairs(shape).multiply_add(builder, one, other, acc)

    return elementwise(emit, a, b, c)


@intrinsic
def tile_rank1_reciprocals(typingctx, acc, column, column_stride, next_column, row, next_row, factor, next_factor):
    """acc + factor / (1 + column ⊗ row) + next_factor / (1 + next_column ⊗ next_row), element by element.

    Addresses are as in `tile_rank1`; the factors are scalars in memory. The two terms have a denominator in common,
    their product, and so one division: divisions are what the step costs. Vector after vector, so that all of a tile's
    intermediate results are never wanted in registers at the same time.
    """
    if not isinstance(acc, TileType):
        return None

    def codegen(context, builder, sig, values):
        s = acc.shape
        accumulators, stride = vectors_of(builder, s, values[0]), values[2]
        vector, step = vector_of(s), s.lanes * s.itemsize
        one = ir.Constant(vector, [1.0] * s.lanes)

        def scalar(place):
            return splat(builder, load_from(builder, place, element_of(s), s.itemsize), s.lanes)

        def fused(*operands):
            return call_llvm(builder, "fmuladd", vector, operands)

        rows = [
            [load_from(builder, shifted(builder, row, v * step), vector, s.itemsize) for v in range(s.vectors)]
            for row in values[4:6]
        ]
        factor, next_factor = scalar(values[6]), scalar(values[7])
        out = []
        for m in range(s.rows):
            offset = builder.mul(stride, ir.Constant(stride.type, m))
            left, right = (scalar(builder.add(place, offset)) for place in (values[1], values[3]))
            for v in range(s.vectors):
                a, b = fused(left, rows[0][v], one), fused(right, rows[1][v], one)
                numerator = fused(factor, b, builder.fmul(next_factor, a))
                quotient = builder.fdiv(numerator, builder.fmul(a, b))
                out.append(builder.fadd(accumulators[m * s.vectors + v], quotient))
        return make_tile(builder, s, out)

    return signature(acc, acc, *[types.intp] * 7), codegen
