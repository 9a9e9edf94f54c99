"""The matrix unit of x86 processors (AMX): eight tiles of 16 rows of 64 bytes, in registers of their own.

A row is 16 numbers of float32, or 16 pairs of bfloat16. A product adds to sums[m][n] those of left[m][k] · right[k][n],
k a pair, of which both products are added: both operands are pairs of neighbours in what is summed over.

Four of the tiles are sums, of two tiles of rows and two of columns, two are left operands, and two right ones, so that
four loads serve four products. An operand may be the sum of some *terms* of bfloat16 (`Kernel.terms`), and a product of
two such is a list of products of terms: each of these differs from the one before in one operand alone, which is all
that is loaded for it.

These registers are a thread's. They are empty until `matrix_begin`, and have to be given back by `matrix_end`: the
system saves what is in them whenever it turns to another thread.
"""

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from fastattn.machine.kernel import Kernel
from fastattn.machine.tile import MATRIX_ROWS, MATRIX_TILE
from fastattn.simd.static import StaticType
from fastattn.simd.tile import call_named, elementwise, integers_of, pointer_to, shifted

TILE_ROW = MATRIX_TILE // MATRIX_ROWS  # bytes
TILES = 8
SUMS, LEFT, RIGHT = 0, 4, 6  # the numbers of the first tile of each kind
WIDE_ROW = 2 * TILE_ROW  # bytes of a row of two tiles side by side
WIDE = 2 * MATRIX_TILE

# Which terms are multiplied, the left one and the right one, by how many there are of each. Of three terms, products
# that are below 2^-22 of all are left out; where weights are rounded to two, that of the second ones is.
OF_SCORES = {1: ((0, 0),), 2: ((0, 1), (0, 0), (1, 0), (1, 1)), 3: ((0, 2), (0, 1), (1, 1), (1, 0), (0, 0), (2, 0))}
OF_VALUES = {**OF_SCORES, 2: ((0, 1), (0, 0), (1, 0))}

_BYTE, _WORD, _VOID = ir.IntType(8), ir.IntType(64), ir.VoidType()


def _call(builder, name, *arguments):
    """Call one of LLVM's functions that name tiles by numbers."""
    call_named(builder, f"llvm.x86.{name}", _VOID, *(_BYTE(x) if isinstance(x, int) else x for x in arguments))


def _move(builder, name, tile, address, row_bytes):
    """Load or store a tile, whose rows are so many bytes apart."""
    _call(builder, name, tile, pointer_to(builder, address, _BYTE), row_bytes)


def _each_sum(rows):
    """The numbers of the sums of so many tiles of rows, with their places: of rows, and of columns."""
    return [(SUMS + 2 * m + n, m, n) for m in range(rows) for n in range(2)]


@intrinsic
def matrix_begin(typingctx):
    """Have all eight tiles be of full size, as the thread's."""

    def codegen(context, builder, sig, values):
        palette, reserved = [1], [0] * 15
        row_bytes = [TILE_ROW, 0] * TILES + [0] * 2 * TILES  # sixteen numbers of two bytes
        rows = [MATRIX_ROWS] * TILES + [0] * TILES
        content = bytearray(palette + reserved + row_bytes + rows)
        layout = cgutils.global_constant(builder, "layout", ir.Constant(ir.ArrayType(_BYTE, len(content)), content))
        _call(builder, "ldtilecfg", builder.bitcast(layout, _BYTE.as_pointer()))
        return context.get_dummy_value()

    return signature(types.none), codegen


@intrinsic
def matrix_end(typingctx):
    """Give the tiles back."""

    def codegen(context, builder, sig, values):
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return signature(types.none), codegen


def _sums(rows):
    """What is done to the sums of so many tiles of rows."""

    @intrinsic
    def clear(typingctx):
        def codegen(context, builder, sig, values):
            for tile, _, _ in _each_sum(rows):
                _call(builder, "tilezero", tile)
            return context.get_dummy_value()

        return signature(types.none), codegen

    @intrinsic
    def repeat(typingctx, row):
        def codegen(context, builder, sig, values):
            for tile, _, n in _each_sum(rows):
                _move(builder, "tileloadd64", tile, shifted(builder, values[0], n * TILE_ROW), _WORD(0))
            return context.get_dummy_value()

        return signature(types.none, types.intp), codegen

    @intrinsic
    def store(typingctx, address):
        def codegen(context, builder, sig, values):
            for tile, m, n in _each_sum(rows):
                place = shifted(builder, values[0], m * MATRIX_ROWS * WIDE_ROW + n * TILE_ROW)
                _move(builder, "tilestored64", tile, place, _WORD(WIDE_ROW))
            return context.get_dummy_value()

        return signature(types.none, types.intp), codegen

    return clear, repeat, store


def _products(rows, terms_of):
    """What adds a product of terms, of some tiles of rows and two of columns, over one tile of what is summed over."""

    @intrinsic(prefer_literal=True)
    def add(typingctx, kernel, number, left, left_step, right):
        if not (isinstance(kernel, StaticType) and isinstance(kernel.value, Kernel)):
            return None
        if not isinstance(number, types.IntegerLiteral):
            return None
        pairs = terms_of[kernel.value.terms]
        at = number.literal_value

        def codegen(context, builder, sig, values):
            left, left_step, right = values[2:]
            before = pairs[at - 1] if 0 < at < len(pairs) else (None, None)
            for term, other in pairs[at : at + 1]:
                if term != before[0]:
                    for m, place in enumerate([left, builder.add(left, left_step)][:rows]):
                        place = shifted(builder, place, term * MATRIX_TILE)
                        _move(builder, "tileloadd64", LEFT + m, place, _WORD(TILE_ROW))
                if other != before[1]:
                    for n in range(2):
                        place = shifted(builder, right, other * WIDE + n * TILE_ROW)
                        _move(builder, "tileloadd64", RIGHT + n, place, _WORD(WIDE_ROW))
                for tile, m, n in _each_sum(rows):
                    _call(builder, "tdpbf16ps", tile, LEFT + m, RIGHT + n)
            return context.get_dummy_value()

        return signature(types.none, kernel, number, types.intp, types.intp, types.intp), codegen

    return add


#: Set the sums of one or two tiles of rows to 0; to a row, repeated; write them to rows that are `WIDE_ROW` apart.
matrix_clear_one, matrix_repeat_one, matrix_store_one = _sums(1)
matrix_clear_two, matrix_repeat_two, matrix_store_two = _sums(2)
#: Add one of the products of terms, by its number, the one before having been added just now, or nothing, where there
#: are not so many: `(kernel, number, left, left_step, right)`, of one or two tiles of rows, the second `left_step`
#: behind the first, each with its terms one behind the other; with rows of two tiles side by side, and their terms.
matrix_score_one, matrix_score_two = (_products(rows, OF_SCORES) for rows in (1, 2))
matrix_value_one, matrix_value_two = (_products(rows, OF_VALUES) for rows in (1, 2))


def _half(added):
    """What makes numbers of bfloat16 of a tile's, by their bits: these are added, and the lower 16 are cleared."""

    def emit(builder, shape, a):
        words = integers_of(shape)
        bits = builder.bitcast(a, words)
        if added:
            bits = builder.add(bits, ir.Constant(words, [added] * shape.lanes))
        return builder.bitcast(builder.and_(bits, ir.Constant(words, [0xFFFF0000] * shape.lanes)), a.type)

    return emit


@intrinsic
def upper_half(typingctx, a):
    """Numbers of float32 without their lower 16 bits: of bfloat16, none further from 0 than a is."""
    return elementwise(_half(0), a)


@intrinsic
def nearest_half(typingctx, a):
    """The nearest numbers of bfloat16, of two the one further from 0; only for what is not close to overflowing."""
    return elementwise(_half(0x8000), a)
