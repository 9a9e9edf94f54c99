"""Atomic operations on 64-bit integers in memory, for the scheduler's shared words."""

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from fastattn.machine.features import architecture
from fastattn.simd.tile import call_named

_WORD = ir.IntType(64)


def _word(builder, address):
    return builder.inttoptr(address, _WORD.as_pointer())


@intrinsic
def atomic_load(typingctx, address):
    """The word; what its writer wrote before it is visible after this."""

    def codegen(context, builder, sig, values):
        return builder.load_atomic(_word(builder, values[0]), "seq_cst", 8)

    return signature(types.int64, types.intp), codegen


@intrinsic
def atomic_store(typingctx, address, value):
    """Write the word; what was written before it is visible to whoever reads it."""

    def codegen(context, builder, sig, values):
        builder.store_atomic(values[1], _word(builder, values[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return signature(types.none, types.intp, types.int64), codegen


def _read_modify_write(operation):
    def typed():
        def codegen(context, builder, sig, values):
            return builder.atomic_rmw(operation, _word(builder, values[0]), values[1], "seq_cst")

        return signature(types.int64, types.intp, types.int64), codegen

    return typed


@intrinsic
def atomic_add(typingctx, address, value):
    """Add to the word; returns what it was before."""
    return _read_modify_write("add")()


@intrinsic
def atomic_exchange(typingctx, address, value):
    """Replace the word; returns what it was before."""
    return _read_modify_write("xchg")()


@intrinsic
def atomic_replace(typingctx, address, expected, value):
    """Write the word if it is as expected; returns whether it was."""

    def codegen(context, builder, sig, values):
        pair = builder.cmpxchg(_word(builder, values[0]), values[1], values[2], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 1)

    return signature(types.boolean, types.intp, types.int64, types.int64), codegen


@intrinsic
def pause(typingctx):
    """Tell the processor that this is a waiting loop."""

    def codegen(context, builder, sig, values):
        processor, i32 = architecture(builder.module.triple), ir.IntType(32)
        if processor == "x86-64":
            call_named(builder, "llvm.x86.sse2.pause", ir.VoidType())
        elif processor == "arm64":  # what its yield does is nothing on most of them; a barrier takes a while
            call_named(builder, "llvm.aarch64.isb", ir.VoidType(), ir.Constant(i32, 15))
        return context.get_dummy_value()

    return signature(types.none), codegen


@intrinsic
def give_way(typingctx):
    """Let another thread run that waits for this CPU: a function of the system's, found when the code is loaded."""

    def codegen(context, builder, sig, values):
        name = "SwitchToThread" if "windows" in builder.module.triple else "sched_yield"
        call_named(builder, name, ir.IntType(32))
        return context.get_dummy_value()

    return signature(types.none), codegen


@intrinsic
def call_compiled(typingctx, address, arguments):
    """Call the exported function at an address with a tuple of integers; returns what it returns."""

    def codegen(context, builder, sig, values):
        given = cgutils.unpack_tuple(builder, values[1])
        fnty = ir.FunctionType(_WORD, [_WORD] * len(given))
        return builder.call(builder.inttoptr(values[0], fnty.as_pointer()), given)

    return signature(types.int64, types.intp, arguments), codegen
