"""What heads have of their own, made of the arrays of a call: lengths, offsets, slopes and sinks.

The first of calls that are alike is checked and converted with NumPy's help, which takes some 50 µs. For those that
follow the same table is written here: numbers are read where they lie, and if one is out of range, the call has to be
looked at more closely.
"""

from fastattn.call.scores import FARTHEST, HEAD
from fastattn.cpu.kernels.entry import link_view
from fastattn.cpu.kernels.records import OWN, REAL, SHORT_REAL, SOURCE, WHOLE
from fastattn.cpu.kernels.tasks import own_view
from fastattn.machine.objects import OBJECT_HEADER
from fastattn.simd import (
    call_compiled,
    jit,
    load_f32,
    load_f64,
    load_i64,
    load_u8,
    record_view,
    stack_memory,
    store_f32,
    store_f64,
    store_i64,
)

WORD = 8
HEAD_BYTES, OWN_BYTES, SOURCE_BYTES = HEAD.itemsize, OWN.itemsize, SOURCE.itemsize
HALF_SPECIAL, SPECIAL = 0x7C00, 0x7F800000  # all exponent bits of float16, and of float32
NAN, INFINITY = float("nan"), float("inf")

of_call_view, source_view = record_view(OWN), record_view(SOURCE)
number_memory = stack_memory(WORD)


@jit
def bits_at(place, itemsize):
    """The bytes of an element."""
    bits = 0
    for i in range(itemsize):
        bits |= load_u8(place + i) << (8 * i)
    return bits


@jit
def whole_at(kind, place, itemsize):
    """A whole number."""
    bits, rest = bits_at(place, itemsize), 8 * (WORD - itemsize)
    return bits << rest >> rest if kind == WHOLE else bits


@jit
def single(bits):
    """The number that the bits of a float32 are."""
    place = number_memory()
    store_i64(place, bits)
    return load_f32(place) * 1.0


@jit
def real_at(kind, place, itemsize):
    """A real number."""
    if kind < REAL:
        return whole_at(kind, place, itemsize) * 1.0
    if itemsize == 8:
        return load_f64(place)
    bits = bits_at(place, itemsize)
    if itemsize == 4:
        return single(bits)
    if kind == SHORT_REAL:
        return single(bits << 16)
    size, is_special = (bits & 0x7FFF) << 13, bits & HALF_SPECIAL == HALF_SPECIAL
    number = single(size | SPECIAL) if is_special else single(size) * 2.0**112  # which corrects the exponent
    return -number if bits & 0x8000 else number


@jit
def sink_from(source, number):
    """A sink as a kernel takes it; +inf makes NaN of its row, as a score does."""
    if number == INFINITY:
        return NAN
    if number > -INFINITY:
        number = min(max(number, -source.largest), source.largest)
    if source.single:
        place = number_memory()
        store_f32(place, number)
        return load_f32(place) * 1.0
    return number


@jit
def fill_field(source, array, heads, table):
    """Write a field of all heads; False if a number is out of range."""
    kind, itemsize, target = source.kind, source.itemsize, table + source.field
    for place in range(source.places, source.places + heads * WORD, WORD):
        at = array + load_i64(place)
        if source.is_whole:
            whole = whole_at(kind, at, itemsize)
            if whole < source.low or whole > source.high:
                return False
            store_i64(target, min(max(whole, -FARTHEST), FARTHEST) - source.less)
        else:
            real = real_at(kind, at, itemsize)
            if source.finite and not -INFINITY < real < INFINITY:
                return False
            store_f64(target, sink_from(source, real) if source.largest > 0.0 else real)
        target += HEAD_BYTES
    return True


@jit
def own_heads(self, objects, count):
    """Fill the first array, a table of `HEAD`; the second says how, from the others. Returns whether all is well."""
    link = link_view(load_i64(self + OBJECT_HEADER))
    table = load_i64(load_i64(objects) + OBJECT_HEADER)
    how = load_i64(load_i64(objects + WORD) + OBJECT_HEADER)
    given, others = of_call_view(how), objects + 2 * WORD
    for at in range(table, table + given.heads * HEAD_BYTES, HEAD_BYTES):
        head = own_view(at)
        head.offset, head.keys, head.slope, head.sink = given.offset, given.keys, given.slope, given.sink
    fine = 1
    for at in range(how + OWN_BYTES, how + OWN_BYTES + given.sources * SOURCE_BYTES, SOURCE_BYTES):
        source = source_view(at)
        array = load_i64(load_i64(others + source.argument * WORD) + OBJECT_HEADER)
        if not fill_field(source, array, given.heads, table):
            fine = 0
    return call_compiled(link.to_int, (fine,))
