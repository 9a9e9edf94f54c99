"""The floating-point mode of a thread: how it rounds, whether it flushes subnormal numbers to zero, what it traps.

Every thread has its own, in a control register, and whoever wishes may change it: PyTorch's `set_flush_denormal`, a
library that was built with fast-math, C's `fesetround`. Which registers there are, is known here alone.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from fastattn.machine.features import architecture

MXCSR_DEFAULT = 0x1F80  # to nearest, nothing is flushed, all exceptions are masked
MXCSR_RAISED = 0x3F  # the exceptions that have occurred since somebody cleared them: no part of the mode

_I32, _WORD, _VOID, _BYTES = ir.IntType(32), ir.IntType(64), ir.VoidType(), ir.IntType(8).as_pointer()


def with_default_mode(builder: ir.IRBuilder, emit: Callable[[], Any]) -> Any:
    """Emit IR that changes to the default mode, does what `emit` emits, and changes back; returns what `emit` does.

    LLVM knows nothing of modes, and may move arithmetic from one side of a change to the other: what `emit` emits has
    to be a call that is not inlined. On a machine whose registers are not known the mode stays as it is.
    """
    processor = architecture(builder.module.triple)
    if processor == "x86-64":
        return _with_mxcsr(builder, emit)
    if processor == "arm64":
        return _with_fpcr(builder, emit)
    return emit()


def _declared(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Type) -> ir.Function:
    found = builder.module.globals.get(name)
    return found or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def _with_mxcsr(builder: ir.IRBuilder, emit: Callable[[], Any]) -> Any:
    """On x86-64, one register holds the mode and the exceptions raised: both are as before afterwards."""
    store = _declared(builder, "llvm.x86.sse.stmxcsr", _VOID, _BYTES)
    load = _declared(builder, "llvm.x86.sse.ldmxcsr", _VOID, _BYTES)
    before, default = builder.alloca(_I32), builder.alloca(_I32)
    builder.call(store, [builder.bitcast(before, _BYTES)])
    mode = builder.and_(builder.load(before), ir.Constant(_I32, 0xFFFFFFFF ^ MXCSR_RAISED))
    with builder.if_then(builder.icmp_unsigned("!=", mode, ir.Constant(_I32, MXCSR_DEFAULT)), likely=False):
        builder.store(ir.Constant(_I32, MXCSR_DEFAULT), default)
        builder.call(load, [builder.bitcast(default, _BYTES)])
    result = emit()
    builder.call(load, [builder.bitcast(before, _BYTES)])
    return result


def _with_fpcr(builder: ir.IRBuilder, emit: Callable[[], Any]) -> Any:
    """On AArch64, a register of its own holds the mode, and 0 is the default. To write it is slow."""
    read = _declared(builder, "llvm.aarch64.get.fpcr", _WORD)
    write = _declared(builder, "llvm.aarch64.set.fpcr", _VOID, _WORD)
    before = builder.call(read, [])
    is_other = builder.icmp_unsigned("!=", before, ir.Constant(_WORD, 0))
    with builder.if_then(is_other, likely=False):
        builder.call(write, [ir.Constant(_WORD, 0)])
    result = emit()
    with builder.if_then(is_other, likely=False):
        builder.call(write, [before])
    return result
