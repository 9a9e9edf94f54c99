"""The compiled functions that Python calls as builtins: given objects, of which they read what they need themselves.

Each is what CPython calls METH_FASTCALL: it is given the object that it is bound to (a record of `LINK`, as an array),
the address of the arguments' own addresses, and their number; or METH_VARARGS | METH_KEYWORDS: that object, a tuple and
a dictionary. `fastattn.cpu.host.builtin` makes builtins of them.
"""

from fastattn.cpu.kernels.records import ALIGNMENT, LINK, RECORD_BYTES, SCHEDULE, START
from fastattn.machine.objects import (
    ARRAY_DIMENSIONS,
    ARRAY_DTYPE,
    ARRAY_RANK,
    ARRAY_STRIDES,
    DTYPE_NUMBER,
    OBJECT_HEADER,
)
from fastattn.simd import call_compiled, jit, load_i32, load_i64, record_view, stack_memory, store_i64

MOST_OBJECTS = 24  # of which a signature is made, and each may be an array
MOST_AXES = 32  # of an array that has a signature
WORD = 8
NONE, TRUE, FALSE, FLOAT, INT = -1, -2, -3, -4, -5  # in a signature, in the place of an array's rank
ITEMSIZE = 8  # of an element, at most
STRUCTURE = 0x56  # the kind of such dtypes, "V"

link_view, schedule_view = record_view(LINK), record_view(SCHEDULE)
signature_memory = stack_memory(MOST_OBJECTS * (3 + 2 * MOST_AXES) * WORD)
overflow_memory = stack_memory(WORD)


@jit
def number_of(link, thing):
    """What a record has of an object: the address of an array's first element, an integer, or 0 for None."""
    if thing == link.none:
        return 0
    if load_i64(thing + OBJECT_HEADER - WORD) == link.int_type:
        return call_compiled(link.from_int, (thing,))
    return load_i64(thing + OBJECT_HEADER)


@jit
def aligned(address):
    """The first address from there on where working memory may begin."""
    return (address + (ALIGNMENT - 1)) & -ALIGNMENT


@jit
def fill(link, objects, count):
    """Write a call's record, with its working memory behind it; returns where.

    `objects`: the working memory, the plan's record, then what the call's record has, in its order.
    """
    at = aligned(load_i64(load_i64(objects) + OBJECT_HEADER))
    store_i64(at, load_i64(load_i64(objects + WORD) + OBJECT_HEADER))
    store_i64(at + WORD, at + RECORD_BYTES)
    for offset in range(2 * WORD, count * WORD, WORD):
        store_i64(at + offset, number_of(link, load_i64(objects + offset)))
    return at


@jit
def note(self, objects, count):
    """Write a call's record, and return where it is."""
    link = link_view(load_i64(self + OBJECT_HEADER))
    return call_compiled(link.to_int, (fill(link, objects, count),))


def quick_function(task):
    """Make the function that runs a whole call in the calling thread."""

    @jit
    def quick(self, objects, count):
        link = link_view(load_i64(self + OBJECT_HEADER))
        at = fill(link, objects, count)
        thread = call_compiled(link.save_thread, ())
        for number in range(schedule_view(load_i64(at)).tasks):
            task(at, 0, number)
        call_compiled(link.restore_thread, (thread,))
        return call_compiled(link.to_int, (0,))

    return quick


@jit
def shared(self, objects, count):
    """Run a call's tasks, with others (see `schedule.start`). The first object is the pool's memory."""
    link = link_view(load_i64(self + OBJECT_HEADER))
    pool = aligned(load_i64(load_i64(objects) + OBJECT_HEADER))
    at = fill(link, objects + WORD, count - 1)
    thread = call_compiled(link.save_thread, ())
    plan = schedule_view(load_i64(at))
    arguments = (pool, link.task, at, plan.tasks, plan.workers, plan.turn)
    state = call_compiled(load_i64(pool + START), arguments)
    call_compiled(link.restore_thread, (thread,))
    return call_compiled(link.to_int, (state,))


@jit
def in_default_mode(self, arguments, keywords):
    """Call a function of Python's: in the default floating-point mode, since that is what compiled code runs in."""
    link = link_view(load_i64(self + OBJECT_HEADER))
    return call_compiled(link.call, (link.function, arguments, keywords))


@jit
def describe_array(at, array):
    """Write down an array's rank, dtype, shape and strides; returns where this ends, 0 if it has very many axes.

    Dtypes that are structures have one number together: where theirs is tells them apart, as long as they live.
    """
    array += OBJECT_HEADER
    rank = load_i64(array + ARRAY_RANK) & 0xFFFFFFFF
    if rank > MOST_AXES:
        return 0
    dtype = load_i64(array + ARRAY_DTYPE)
    number = load_i64(dtype + OBJECT_HEADER + DTYPE_NUMBER)
    store_i64(at, rank)
    store_i64(at + WORD, number)
    store_i64(at + 2 * WORD, dtype if number & 0xFF == STRUCTURE else 0)
    at += 3 * WORD
    for axes in (load_i64(array + ARRAY_DIMENSIONS), load_i64(array + ARRAY_STRIDES)):
        for offset in range(0, rank * WORD, WORD):
            store_i64(at, load_i64(axes + offset))
            at += WORD
    return at


@jit
def describe_option(at, link, thing):
    """Write down None, True, False, a float or an int; returns where this ends, 0 if it is something else."""
    kind = load_i64(thing + OBJECT_HEADER - WORD)
    number = 0
    if thing == link.none:
        store_i64(at, NONE)
    elif thing == link.true:
        store_i64(at, TRUE)
    elif thing == link.false:
        store_i64(at, FALSE)
    elif kind == link.float_type:
        store_i64(at, FLOAT)
        number = load_i64(thing + OBJECT_HEADER)
    elif kind == link.int_type:
        overflow = overflow_memory()
        store_i64(overflow, 0)
        store_i64(at, INT)
        number = call_compiled(link.to_word, (thing, overflow))
        if load_i64(overflow) & 0xFFFFFFFF:
            return 0
    else:
        return 0
    store_i64(at + WORD, number)
    return at + 2 * WORD


@jit
def signature(self, objects, count):
    """Arrays and options, as bytes: what arrays are like, and what options are; none at all where one is neither."""
    link = link_view(load_i64(self + OBJECT_HEADER))
    begin = at = signature_memory()
    for place in range(objects, objects + count * WORD, WORD):
        thing = load_i64(place)
        if load_i64(thing + OBJECT_HEADER - WORD) == link.array_type:
            at = describe_array(at, thing)
        else:
            at = describe_option(at, link, thing)
        if at == 0:
            return call_compiled(link.to_bytes, (begin, 0))
    return call_compiled(link.to_bytes, (begin, at - begin))


@jit
def extent(array):
    """The first address of an array's elements, and the end of them, or a little more; both alike if it has none."""
    fields = array + OBJECT_HEADER
    begin = load_i64(fields)
    end = begin
    shape, strides = load_i64(fields + ARRAY_DIMENSIONS), load_i64(fields + ARRAY_STRIDES)
    for offset in range(0, (load_i64(fields + ARRAY_RANK) & 0xFFFFFFFF) * WORD, WORD):
        steps = load_i64(shape + offset) - 1
        if steps < 0:
            return 0, 0
        length = steps * load_i64(strides + offset)
        begin += min(length, 0)
        end += max(length, 0)
    return begin, end + ITEMSIZE


@jit
def lie_alike(one, other):
    """Whether two arrays have the same elements at the same places."""
    one += OBJECT_HEADER
    other += OBJECT_HEADER
    rank = load_i64(one + ARRAY_RANK) & 0xFFFFFFFF
    if load_i64(one) != load_i64(other) or rank != load_i64(other + ARRAY_RANK) & 0xFFFFFFFF:
        return False
    for axes in (ARRAY_DIMENSIONS, ARRAY_STRIDES):
        for offset in range(0, rank * WORD, WORD):
            if load_i64(load_i64(one + axes) + offset) != load_i64(load_i64(other + axes) + offset):
                return False
    return True


@jit
def overlaps(self, objects, count):
    """Whether the first array may share memory with others, of which the first may be the same array once more."""
    link = link_view(load_i64(self + OBJECT_HEADER))
    out = load_i64(objects)
    begin, end = extent(out)
    found = 0
    for place in range(objects + WORD, objects + count * WORD, WORD):
        array = load_i64(place)
        if array != link.none and not (place == objects + WORD and lie_alike(out, array)):
            first, last = extent(array)
            if first < end and begin < last:
                found = 1
    return call_compiled(link.to_int, (found,))


@jit
def length_of(array, axis):
    """How long an axis of an array is."""
    return load_i64(load_i64(array + OBJECT_HEADER + ARRAY_DIMENSIONS) + axis * WORD)


@jit
def stride_of(array, axis):
    """How far apart the elements along an axis are, in bytes."""
    return load_i64(load_i64(array + OBJECT_HEADER + ARRAY_STRIDES) + axis * WORD)


@jit
def are_there(row, step, itemsize, needed, pages):
    """Whether so many of the pages in a row of a table exist."""
    for at in range(needed):
        place = row + at * step
        number = load_i64(place) if itemsize == WORD else load_i32(place)
        if number < 0 or number >= pages:
            return False
    return True


@jit
def longest(self, objects, count):
    """The most keys that a row has, -1 where one has too many for a table of pages, or needs a page that is not there.

    The objects: the table, of integers of 4 or 8 bytes, and how many these are; the keys of each row, of 8 bytes; how
    many pages there are, and keys in each.
    """
    link = link_view(load_i64(self + OBJECT_HEADER))
    table, lengths = load_i64(objects), load_i64(objects + 2 * WORD)
    itemsize, pages = number_of(link, load_i64(objects + WORD)), number_of(link, load_i64(objects + 3 * WORD))
    page = number_of(link, load_i64(objects + 4 * WORD))
    row, keys = load_i64(table + OBJECT_HEADER), load_i64(lengths + OBJECT_HEADER)
    columns, step, most = length_of(table, 1), stride_of(table, 1), 0
    for _ in range(length_of(lengths, 0)):
        length = load_i64(keys)
        if length < 0 or length > columns * page:
            return call_compiled(link.to_int, (-1,))
        if not are_there(row, step, itemsize, (length + page - 1) // page, pages):
            return call_compiled(link.to_int, (-1,))
        most = max(most, length)
        row += stride_of(table, 0)
        keys += stride_of(lengths, 0)
    return call_compiled(link.to_int, (most,))
