"""The compiled functions that Python calls as builtins: given objects, of which they read what they need themselves.

Each is what CPython calls METH_FASTCALL: it is given the object that it is bound to (a record of `LINK`, as an array),
the address of the arguments' own addresses, and their number; or METH_VARARGS | METH_KEYWORDS: that object, a tuple and
a dictionary. `fastattn.cpu.host.builtin` makes builtins of them.
"""

from fastattn.cpu.kernels.records import ALIGNMENT, LINK, RECORD_BYTES, START
from fastattn.cpu.kernels.tasks import call_view, plan_view
from fastattn.machine.objects import (
    ARRAY_DIMENSIONS,
    ARRAY_DTYPE,
    ARRAY_RANK,
    ARRAY_STRIDES,
    DTYPE_NUMBER,
    OBJECT_HEADER,
)
from fastattn.simd import call_compiled, jit, load_i64, record_view, stack_memory, store_i64

MOST_ARRAYS = 5
MOST_AXES = 32  # of an array that has a signature
WORD = 8
MISSING = -1  # in a signature: None

link_view = record_view(LINK)
signature_memory = stack_memory(MOST_ARRAYS * (2 + 2 * MOST_AXES) * WORD)


@jit
def address_of(array, none):
    """The address of an array's first element, which stands behind the object's header; 0 for None."""
    return load_i64(array + OBJECT_HEADER) if array != none else 0


@jit
def aligned(address):
    """The first address from there on where working memory may begin."""
    return (address + (ALIGNMENT - 1)) & -ALIGNMENT


@jit
def fill(link, objects):
    """Write a call's record, with its working memory behind it; returns where.

    `objects`: the working memory, then the arrays in the record's order, None for those there are not, then the seed.
    """
    at, none = aligned(load_i64(load_i64(objects) + OBJECT_HEADER)), link.none
    call = call_view(at)
    call.plan = link.plan
    call.scratch = at + RECORD_BYTES
    call.scratch_bytes = link.scratch_bytes
    call.query = address_of(load_i64(objects + 1 * WORD), none)
    call.key = address_of(load_i64(objects + 2 * WORD), none)
    call.value = address_of(load_i64(objects + 3 * WORD), none)
    call.bias = address_of(load_i64(objects + 4 * WORD), none)
    call.keep = address_of(load_i64(objects + 5 * WORD), none)
    call.offsets = address_of(load_i64(objects + 6 * WORD), none)
    call.lengths = address_of(load_i64(objects + 7 * WORD), none)
    call.out = address_of(load_i64(objects + 8 * WORD), none)
    call.lse = address_of(load_i64(objects + 9 * WORD), none)
    call.weight = address_of(load_i64(objects + 10 * WORD), none)
    call.weights = 0
    call.seed = 0
    if plan_view(link.plan).drop_below > 0:
        call.seed = call_compiled(link.from_int, (load_i64(objects + 11 * WORD),))
    return at


def quick_function(task):
    """Make the function that runs a whole call in the calling thread."""

    @jit
    def quick(self, objects, count):
        link = link_view(load_i64(self + OBJECT_HEADER))
        at = fill(link, objects)
        thread = call_compiled(link.save_thread, ())
        for number in range(plan_view(link.plan).tasks):
            task(at, 0, number)
        call_compiled(link.restore_thread, (thread,))
        return call_compiled(link.to_int, (0,))

    return quick


@jit
def shared(self, objects, count):
    """Run a call's tasks, with others (see `schedule.start`). The first object is the pool's memory."""
    link = link_view(load_i64(self + OBJECT_HEADER))
    pool = aligned(load_i64(load_i64(objects) + OBJECT_HEADER))
    at = fill(link, objects + WORD)
    thread = call_compiled(link.save_thread, ())
    tasks = plan_view(link.plan).tasks
    state = call_compiled(load_i64(pool + START), (pool, link.task, at, tasks, link.workers, link.most))
    call_compiled(link.restore_thread, (thread,))
    return call_compiled(link.to_int, (state,))


@jit
def in_default_mode(self, arguments, keywords):
    """Call a function of Python's: in the default floating-point mode, since that is what compiled code runs in."""
    link = link_view(load_i64(self + OBJECT_HEADER))
    return call_compiled(link.call, (link.function, arguments, keywords))


@jit
def signature(self, objects, count):
    """Ranks, dtypes, shapes and strides of arrays, as bytes; none at all where an object is neither array nor None.

    Nor where an array has very many axes: the bytes are put together on the stack.
    """
    link = link_view(load_i64(self + OBJECT_HEADER))
    begin = at = signature_memory()
    for place in range(objects, objects + count * WORD, WORD):
        array = load_i64(place)
        if array == link.none:
            store_i64(at, MISSING)
            at += WORD
            continue
        if load_i64(array + OBJECT_HEADER - WORD) != link.array_type:
            return call_compiled(link.to_bytes, (begin, 0))
        array += OBJECT_HEADER
        rank = load_i64(array + ARRAY_RANK) & 0xFFFFFFFF
        if rank > MOST_AXES:
            return call_compiled(link.to_bytes, (begin, 0))
        store_i64(at, rank)
        store_i64(at + WORD, load_i64(load_i64(array + ARRAY_DTYPE) + OBJECT_HEADER + DTYPE_NUMBER))
        at += 2 * WORD
        for axes in (load_i64(array + ARRAY_DIMENSIONS), load_i64(array + ARRAY_STRIDES)):
            for offset in range(0, rank * WORD, WORD):
                store_i64(at, load_i64(axes + offset))
                at += WORD
    return call_compiled(link.to_bytes, (begin, at - begin))
