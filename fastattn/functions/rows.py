"""Rows of scores for a user's function: read, written, with slopes, and with marks where an index was out of range.

Rows are typed pointers, not addresses, so that LLVM sees that their elements lie side by side.
"""

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from fastattn.functions.captured import FLAG, writes_elsewhere
from fastattn.functions.dual import DualType, make_dual, parts_of, real_of, value_as

__all__ = [
    "chosen",
    "is_marked",
    "is_set",
    "is_true",
    "marked",
    "new_flag",
    "new_note",
    "noted",
    "numbers_at",
    "put_score",
    "row_at",
    "score_in",
    "slope_of",
    "with_slope",
]

#: The bits of a score whose function has read out of range: a quiet NaN that no arithmetic makes.
MARKS = {"float32": 0x7FE5_A7A1, "float64": 0x7FFC_A771_0000_A7A1}


def _mark(tile):
    return ir.Constant(ir.IntType(8 * tile.value.itemsize), MARKS[tile.value.dtype])


@intrinsic
def row_at(typingctx, tile, address):
    """A row of scores, for `score_in` and `put_score`: LLVM has to see that lanes lie side by side."""
    ty = types.CPointer(real_of(tile.value.dtype))

    def codegen(context, builder, sig, values):
        return builder.inttoptr(values[1], context.get_value_type(ty))

    return signature(ty, tile, types.intp), codegen


@intrinsic
def numbers_at(typingctx, address):
    """The same of whole numbers."""
    ty = types.CPointer(types.int64)

    def codegen(context, builder, sig, values):
        return builder.inttoptr(values[0], context.get_value_type(ty))

    return signature(ty, types.intp), codegen


@intrinsic
def score_in(typingctx, row, lane):
    """A score of a row."""

    def codegen(context, builder, sig, values):
        return builder.load(builder.gep(values[0], [values[1]]))

    return signature(row.dtype, row, types.intp), codegen


@intrinsic
def put_score(typingctx, row, lane, score):
    """Write a score, of any type, to a row."""

    def codegen(context, builder, sig, values):
        value = value_as(context, builder, score, values[2], row.dtype)
        writes_elsewhere(builder, builder.store(value, builder.gep(values[0], [values[1]])))
        return context.get_dummy_value()

    return signature(types.none, row, types.intp, score), codegen


@intrinsic
def with_slope(typingctx, score):
    """A score as the number that is differentiated by."""
    ty = DualType(score)

    def codegen(context, builder, sig, values):
        return make_dual(context, builder, ty, values[0], context.get_constant(score, 1.0))

    return signature(ty, score), codegen


@intrinsic
def slope_of(typingctx, like, score):
    """The slope of what a function has returned: 0 of what is no dual number."""

    def codegen(context, builder, sig, values):
        _, slope = parts_of(context, builder, score, values[1])
        return context.get_constant(like, 0.0) if slope is None else slope

    return signature(like, like, score), codegen


@intrinsic
def marked(typingctx, tile, score, inside):
    """A score, or a mark where a flag is cleared."""
    real = real_of(tile.value.dtype)

    def codegen(context, builder, sig, values):
        value = value_as(context, builder, score, values[1], real)
        mark = builder.bitcast(_mark(tile), value.type)
        return builder.select(builder.icmp_signed("!=", values[2], ir.Constant(values[2].type, 0)), value, mark)

    return signature(real, tile, score, types.int64), codegen


@intrinsic
def is_true(typingctx, answer):
    """What a function has answered, as a boolean."""

    def codegen(context, builder, sig, values):
        return value_as(context, builder, answer, values[0], types.boolean)

    return signature(types.boolean, answer), codegen


@intrinsic
def chosen(typingctx, condition, yes, no):
    """One of two scores."""
    return signature(yes, condition, yes, yes), lambda context, builder, sig, values: builder.select(*values)


@intrinsic
def new_flag(typingctx):
    """A flag that is set."""

    def codegen(context, builder, sig, values):
        flag = cgutils.alloca_once(builder, ir.IntType(8))
        builder.store(ir.Constant(ir.IntType(8), 1), flag)
        return flag

    return signature(FLAG), codegen


@intrinsic
def new_note(typingctx, wanted):
    """A flag that is set, with room behind it for which element of a chosen array was read, and how often one was.

    `wanted`: if elements are read several times, which of these times counts.
    """

    def codegen(context, builder, sig, values):
        word = ir.IntType(64)
        words = cgutils.alloca_once(builder, word, size=4)
        for number, value in enumerate((ir.Constant(word, 1), ir.Constant(word, 0), ir.Constant(word, 0), values[0])):
            builder.store(value, builder.gep(words, [ir.Constant(word, number)]))
        return builder.bitcast(words, ir.IntType(8).as_pointer())

    return signature(FLAG, types.int64), codegen


@intrinsic
def noted(typingctx, flag):
    """The number of the element of a chosen array that was read, and how often one was."""
    pair = types.UniTuple(types.int64, 2)

    def codegen(context, builder, sig, values):
        words = builder.bitcast(values[0], ir.IntType(64).as_pointer())
        found = [builder.load(builder.gep(words, [ir.Constant(ir.IntType(64), number)])) for number in (1, 2)]
        return context.make_tuple(builder, pair, found)

    return signature(pair, flag), codegen


@intrinsic
def is_set(typingctx, flag):
    """1 if a flag is set still, else 0."""

    def codegen(context, builder, sig, values):
        return builder.zext(builder.load(values[0]), ir.IntType(64))

    return signature(types.int64, flag), codegen


@intrinsic
def is_marked(typingctx, tile, score):
    """1 if a score is a mark, else 0."""

    def codegen(context, builder, sig, values):
        mark = _mark(tile)
        return builder.zext(builder.icmp_unsigned("==", builder.bitcast(values[1], mark.type), mark), ir.IntType(64))

    return signature(types.int64, tile, score), codegen
