"""Elements as they lie in memory: half precision is widened as it is loaded, and rounded as it is stored.

`place` is what a piece of memory belongs to: a kernel, whose `storage` the arrays of a call have, or a tile shape,
whose dtype working memory has.
"""

from dataclasses import replace

from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from fastattn.machine.kernel import Kernel
from fastattn.machine.tile import BLOCK
from fastattn.simd.static import StaticType
from fastattn.simd.tile import (
    TileType,
    call_llvm,
    call_named,
    element_of,
    is_shape,
    load_from,
    make_tile,
    pointer_to,
    shifted,
    splat,
    vector_of,
    vectors_of,
)

WORD = 4  # bytes of a pair
BYTE, SHORT, INT, FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()


class BFloat(ir.types.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, BFloat)

    def __hash__(self):
        return hash(BFloat)


def is_place(ty):
    """Whether a Numba type is that of a kernel or of a tile shape."""
    return is_shape(ty) or (isinstance(ty, StaticType) and isinstance(ty.value, Kernel))


class _Memory:
    """How elements of a place lie, and how numbers of the tile's dtype are made of them, and they of numbers."""

    def __init__(self, place):
        self.tile = place.tile if isinstance(place, Kernel) else place
        self.dtype = place.storage
        self.converts = isinstance(place, Kernel) and place.row.halves
        self.itemsize = place.itemsize

    @property
    def element(self):
        """What lies there; where it has to be widened, the bits of it."""
        if self.dtype == self.tile.dtype:
            return element_of(self.tile)
        return {"int8": BYTE, "float32": FLOAT}.get(self.dtype, SHORT)

    def load(self, builder, address, count):
        """So many elements in a vector of the tile's dtype; one alone, where `count` is None."""
        kind = self.element if count is None else ir.VectorType(self.element, count)
        return self.widen(builder, load_from(builder, address, kind, self.itemsize))

    def load_part(self, builder, address, present):
        """A vector of the elements that are there, one for each of these truth values, and of 0: no others are read."""
        kind = ir.VectorType(self.element, present.type.count)
        name = f"llvm.masked.load.v{kind.count}{'i16' if self.element == SHORT else f'f{8 * self.itemsize}'}.p0"
        pointer, align = pointer_to(builder, address, kind), INT(self.itemsize)
        return self.widen(builder, call_named(builder, name, kind, pointer, align, present, ir.Constant(kind, None)))

    def widen(self, builder, found):
        """Numbers of the tile's dtype."""
        if self.dtype == self.tile.dtype:
            return found
        real = like(found, element_of(self.tile))
        if self.dtype == "int8":
            return builder.sitofp(builder.sext(found, like(found, INT)), real)
        found = self._in_float32(builder, found)
        return found if found.type == real else builder.fpext(found, real)

    def _in_float32(self, builder, found):
        """Numbers of float32, of what is no wider."""
        if self.dtype == "float32":
            return found
        if self.dtype == "bfloat16":
            return widen_bfloat16(builder, found)
        if not self.converts:
            return widen_float16(builder, found)
        return builder.fpext(builder.bitcast(found, like(found, ir.HalfType())), like(found, FLOAT))

    def store(self, builder, value, address):
        """Write numbers of the tile's dtype; in int8, those near whole ones."""
        if self.dtype == "int8":
            value = builder.fptosi(call_llvm(builder, "rint", value.type, [value]), like(value, BYTE))
        if self.dtype == "bfloat16":
            value = round_to_bfloat16(builder, value)
        elif self.dtype == "float16":
            short = like(value, ir.HalfType())
            value = builder.fptrunc(value, short) if self.converts else round_to_float16(builder, value)
        builder.store(value, pointer_to(builder, address, value.type), align=self.itemsize)


def like(value, element):
    """The type of so many elements as a value has."""
    return ir.VectorType(element, value.type.count) if isinstance(value.type, ir.VectorType) else element


def constant(kind, value):
    """A constant, in each element of a vector."""
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def widen_bfloat16(builder, bits):
    """float32 of the bits of bfloat16, which are the upper half."""
    ints = like(bits, INT)
    return builder.bitcast(builder.shl(builder.zext(bits, ints), constant(ints, 16)), like(bits, FLOAT))


def widen_float16(builder, bits):
    """float32 of the bits of float16, by integer operations, which every machine has.

    Exponent and fraction move to float32's place, the product with 2**112 corrects the exponent (and normalises
    subnormals); infinities and NaNs get all exponent bits.
    """
    ints, floats = like(bits, INT), like(bits, FLOAT)
    half = builder.zext(bits, ints)
    sign = builder.shl(builder.and_(half, constant(ints, 0x8000)), constant(ints, 16))
    moved = builder.shl(builder.and_(half, constant(ints, 0x7FFF)), constant(ints, 13))
    scaled = builder.fmul(builder.bitcast(moved, floats), constant(floats, 2.0**112))
    special = builder.icmp_unsigned("==", builder.and_(half, constant(ints, 0x7C00)), constant(ints, 0x7C00))
    whole = builder.select(special, builder.or_(moved, constant(ints, 0x7F800000)), builder.bitcast(scaled, ints))
    return builder.bitcast(builder.or_(whole, sign), floats)


def round_to_bfloat16(builder, value):
    """The bits of the nearest bfloat16, of two the even one; NaN stays NaN."""
    ints = like(value, INT)
    bits = builder.bitcast(value, ints)
    odd = builder.and_(builder.lshr(bits, constant(ints, 16)), constant(ints, 1))
    rounded = builder.add(builder.add(bits, constant(ints, 0x7FFF)), odd)
    quiet = builder.or_(bits, constant(ints, 0x400000))
    kept = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.trunc(builder.lshr(kept, constant(ints, 16)), like(value, SHORT))


def round_to_float16(builder, value):
    """The bits of the nearest float16, of two the even one, by integer operations and a sum.

    The sum with a power of two that is 2**13 times as large as the number's last place rounds it there; for subnormals
    that place is fixed.
    """
    ints, floats = like(value, INT), like(value, FLOAT)
    bits = builder.bitcast(value, ints)
    sign = builder.and_(bits, constant(ints, 0x80000000))
    size = builder.xor(bits, sign)
    # Too small for a normal float16: 0.5 has its last place where a subnormal's is, 2**-24.
    small = builder.fadd(builder.bitcast(size, floats), constant(floats, 0.5))
    small = builder.sub(builder.bitcast(small, ints), constant(ints, 0x3F000000))
    odd = builder.and_(builder.lshr(size, constant(ints, 13)), constant(ints, 1))
    usual = builder.add(size, constant(ints, 0xC8000FFF))  # the exponent less 112, and just below half a last place
    usual = builder.lshr(builder.add(usual, odd), constant(ints, 13))
    usual = builder.select(builder.icmp_unsigned("<", usual, constant(ints, 0x7C00)), usual, constant(ints, 0x7C00))
    found = builder.select(builder.icmp_unsigned("<", size, constant(ints, 0x38800000)), small, usual)
    is_nan = builder.icmp_unsigned(">", size, constant(ints, 0x7F800000))
    found = builder.select(is_nan, constant(ints, 0x7E00), found)
    found = builder.or_(found, builder.lshr(sign, constant(ints, 16)))
    return builder.trunc(found, like(value, SHORT))


@intrinsic
def load_stored(typingctx, place, address):
    """The number at `address`, as the tile's dtype has it."""
    if not is_place(place):
        return None
    memory = _Memory(place.value)

    def codegen(context, builder, sig, values):
        return memory.load(builder, values[1], None)

    return signature(TileType(memory.tile).element, place, types.intp), codegen


@intrinsic
def store_stored(typingctx, place, address, value):
    """Write a number to `address`, rounded to what lies there."""
    if not (is_place(place) and isinstance(value, types.Number)):
        return None
    memory = _Memory(place.value)

    def codegen(context, builder, sig, values):
        memory.store(builder, context.cast(builder, values[2], value, TileType(memory.tile).element), values[1])
        return context.get_dummy_value()

    return signature(types.none, place, types.intp, value), codegen


def places_of(builder, shape, itemsize, address, row_bytes):
    """The address of each vector of a tile in memory."""
    for row in range(shape.rows):
        start = address if row == 0 else builder.add(address, builder.mul(row_bytes, ir.Constant(address.type, row)))
        for v in range(shape.vectors):
            yield shifted(builder, start, v * shape.lanes * itemsize)


@intrinsic
def tile_load_stored(typingctx, place, shape, address, row_bytes):
    """The tile at `address`, its rows `row_bytes` apart, of numbers as `shape` has them."""
    if not (is_place(place) and is_shape(shape)):
        return None
    memory = _Memory(place.value)

    def codegen(context, builder, sig, values):
        s = shape.value
        places = places_of(builder, s, memory.itemsize, values[2], values[3])
        return make_tile(builder, s, [memory.load(builder, at, s.lanes) for at in places])

    return signature(TileType(shape.value), place, shape, types.intp, types.intp), codegen


def _load_part(memory, s, builder, address, row_bytes, rows, columns):
    """The tile at `address` of which the first so many rows and columns are there. One vector in a row."""
    word, loaded = ir.IntType(64), []
    numbers = ir.Constant(ir.VectorType(word, s.lanes), list(range(s.lanes)))
    for r, at in enumerate(places_of(builder, s, memory.itemsize, address, row_bytes)):
        there = builder.icmp_signed("<", ir.Constant(word, r), rows)
        count = builder.select(there, columns, ir.Constant(word, 0))
        present = builder.icmp_signed("<", numbers, splat(builder, count, s.lanes))
        loaded.append(memory.load_part(builder, at, present))
    return make_tile(builder, s, loaded)


@intrinsic
def tile_load_part(typingctx, shape, address, row_bytes, rows, columns):
    """The tile at `address` of which the first so many rows and columns are there: nothing else is read, but is 0.

    One vector in a row.
    """
    if not is_shape(shape):
        return None
    memory = _Memory(shape.value)

    def codegen(context, builder, sig, values):
        return _load_part(memory, shape.value, builder, *values[1:])

    return signature(TileType(shape.value), shape, *[types.intp] * 4), codegen


@intrinsic
def tile_load_part_stored(typingctx, place, shape, address, row_bytes, rows, columns):
    """The same of elements as they lie in a place."""
    if not (is_place(place) and is_shape(shape)):
        return None
    memory = _Memory(place.value)

    def codegen(context, builder, sig, values):
        return _load_part(memory, shape.value, builder, *values[2:])

    return signature(TileType(shape.value), place, shape, *[types.intp] * 4), codegen


@intrinsic
def copy_stored(typingctx, place, target, source):
    """Copy the element at one address to another, as it is."""
    if not is_place(place):
        return None
    kind = ir.IntType(8 * place.value.itemsize)

    def codegen(context, builder, sig, values):
        found = load_from(builder, values[2], kind, place.value.itemsize)
        builder.store(found, pointer_to(builder, values[1], kind), align=place.value.itemsize)
        return context.get_dummy_value()

    return signature(types.none, place, types.intp, types.intp), codegen


@intrinsic
def tile_store_stored(typingctx, place, tile, address, row_bytes):
    """Write a tile to `address`, its rows `row_bytes` apart, rounded to what lies there."""
    if not (is_place(place) and isinstance(tile, TileType)):
        return None
    memory = _Memory(place.value)

    def codegen(context, builder, sig, values):
        s = tile.shape
        places = places_of(builder, s, memory.itemsize, values[2], values[3])
        for vector, at in zip(vectors_of(builder, s, values[1]), places, strict=True):
            memory.store(builder, vector, at)
        return context.get_dummy_value()

    return signature(types.none, place, tile, types.intp, types.intp), codegen


@intrinsic
def tile_load_scales(typingctx, place, shape, address, row_bytes, factor):
    """The tile that has the scale of each number, times a factor; those of a row lie at `address`, or rows after it.

    The first number of a row is the first of its block, or all are of one.
    """
    if not (is_place(place) and is_shape(shape) and isinstance(factor, types.Number)):
        return None
    scales, tile = _Memory(place.value.scale_place), TileType(shape.value)

    def codegen(context, builder, sig, values):
        s, count = shape.value, max(1, shape.value.width // BLOCK)
        factors = splat(builder, context.cast(builder, values[4], factor, tile.element), count)
        blocks = ([v * s.lanes // BLOCK] * s.lanes for v in range(s.vectors))
        lanes = [ir.Constant(ir.VectorType(INT, s.lanes), block) for block in blocks]
        vectors = []
        for row in places_of(builder, s.column, s.itemsize, values[2], values[3]):
            every = builder.fmul(scales.load(builder, row, count), factors)
            vectors += [builder.shuffle_vector(every, ir.Constant(every.type, ir.Undefined), each) for each in lanes]
        return make_tile(builder, s, vectors)

    return signature(tile, place, shape, types.intp, types.intp, factor), codegen


@intrinsic
def tile_load_apart(typingctx, shape, address, row_bytes):
    """The tile at `address` of numbers that lie there in bfloat16, of each two vectors those of even places first.

    So a word is widened twice, by a shift and by a mask, where vectors of neighbours take two instructions each.
    """
    if not (is_shape(shape) and shape.value.vectors % 2 == 0):
        return None

    def codegen(context, builder, sig, values):
        s = shape.value
        words, twos, vectors = ir.VectorType(INT, s.lanes), replace(s, vectors=s.vectors // 2), []
        for at in places_of(builder, twos, s.itemsize, values[1], values[2]):
            found = load_from(builder, at, words, SHORT.width // 8)
            halves = builder.shl(found, constant(words, 16)), builder.and_(found, constant(words, 0xFFFF0000))
            vectors += [builder.bitcast(half, vector_of(s)) for half in halves]
        return make_tile(builder, s, vectors)

    return signature(TileType(shape.value), shape, types.intp, types.intp), codegen


def shuffle_twos(tile, places_of_elements, back=False):
    """Signature and lowering of a tile of which each two vectors are their elements from these places, or go back."""
    if not (isinstance(tile, TileType) and tile.shape.vectors % 2 == 0):
        return None

    def codegen(context, builder, sig, values):
        s, vectors = tile.shape, vectors_of(builder, tile.shape, values[0])
        places = places_of_elements(s.lanes)
        if back:
            places = [places.index(place) for place in range(2 * s.lanes)]
        lanes = [ir.Constant(ir.VectorType(INT, s.lanes), some) for some in (places[: s.lanes], places[s.lanes :])]
        twos = zip(vectors[::2], vectors[1::2], strict=True)
        return make_tile(builder, s, [builder.shuffle_vector(*two, order) for two in twos for order in lanes])

    return signature(tile, tile), codegen


def _even_first(lanes):
    return [*range(0, 2 * lanes, 2), *range(1, 2 * lanes, 2)]


@intrinsic
def tile_apart(typingctx, tile):
    """A tile whose elements stand as `tile_load_apart` has them: of each two vectors those of even places first."""
    return shuffle_twos(tile, _even_first)


@intrinsic
def tile_together(typingctx, tile):
    """The same back again."""
    return shuffle_twos(tile, _even_first, back=True)
