"""An emulated matrix unit: what AMX instructions do, on a processor that has none.

There each of them is an illegal instruction, for which the system calls a handler of the process. This one reads the
instruction, does what Intel's manual says of it (Intel 64 and IA-32 Architectures Software Developer's Manual, volume
2, LDTILECFG to TILEZERO), and goes on behind it. So tests run the machine code that is run elsewhere, slowly: a
microsecond or two for each instruction.

Emulated is what `fastattn.simd.matrix` emits: ldtilecfg, tilerelease, tilezero, tileloadd, tilestored, tdpbf16ps. All
else that is illegal ends the process, as ever, after a line that says what it was.
"""

import ctypes
import signal
import sys
from dataclasses import replace
from functools import cache

import numpy as np
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from fastattn.cpu.host import plan
from fastattn.cpu.host.session import Session
from fastattn.machine import table

TILES, ROWS, ROW_BYTES = 8, 16, 64
CONFIG = TILES * ROWS * ROW_BYTES  # where the 64 bytes of ldtilecfg are kept, behind the tiles
STATE = CONFIG + 64
SMALLEST = np.float32(2.0**-126)  # all that is below counts as 0

# <sys/ucontext.h>: where the registers of a signal's context are, and which is which.
REGISTERS_AT = 40
ORDER = (13, 14, 12, 11, 15, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7)  # rax rcx rdx rbx rsp rbp rsi rdi r8 ... r15
NEXT = 16  # rip

# Of the three bytes of a VEX prefix: the map of opcodes, and by what would be a prefix, which instruction.
VEX, MAP = 0xC4, 2
NONE, X66, XF3, XF2 = range(4)
CONFIGURE, MOVE, MULTIPLY = 0x49, 0x4B, 0x5C


@intrinsic
def pointer(typingctx, address):
    """An address as a pointer that `carray` takes."""

    def codegen(context, builder, sig, values):
        return builder.inttoptr(values[0], cgutils.voidptr_t)

    return signature(types.voidptr, types.intp), codegen


@njit
def signed(byte):
    """A byte as a number from -128 on."""
    return byte - ((byte & 128) << 1)


@njit
def flushed(x):
    """What counts as 0 is 0."""
    return np.float32(0.0) if abs(x) < SMALLEST else x


@njit
def widened(pairs):
    """Both halves of pairs of bfloat16."""
    bits = np.empty((2, *pairs.shape), np.uint32)
    bits[0], bits[1] = pairs << np.uint32(16), pairs & np.uint32(0xFFFF0000)
    found = bits.view(np.float32)
    return np.where(np.abs(found) < SMALLEST, np.float32(0.0), found)


@njit
def multiply(c, a, b, rows, pairs, columns):
    """tdpbf16ps: sums of the first elements of all pairs, and of the second, both from 0; then their sum is added."""
    left, right = widened(a), widened(b)
    sums = np.empty((2, ROWS), np.float32)
    for m in range(rows):
        sums[:] = np.float32(0.0)
        for k in range(pairs):
            for half in range(2):
                for n in range(columns):
                    sums[half, n] = flushed(sums[half, n] + left[half, m, k] * right[half, k, n])
        for n in range(columns):
            c[m, n] = flushed(flushed(c[m, n]) + flushed(sums[0, n] + sums[1, n]))


@njit
def address_of(code, registers, order, prefix, modrm):
    """The address that an instruction has for memory, the stride of rows, and how long all of it is."""
    mode, base = modrm >> 6, modrm & 7
    length, stride, from_here = 5, 0, base == 5 and mode == 0
    if base == 4:  # a byte more says which registers
        length, base = 6, code[5] & 7
        index = (code[5] >> 3) & 7 | ((~prefix >> 6) & 1) << 3
        if index != 4:
            stride = registers[order[index]] << (code[5] >> 6)
    no_base = base == 5 and mode == 0
    address = 0 if no_base else registers[order[base | ((~prefix >> 5) & 1) << 3]]
    if mode == 1:
        address += signed(code[length])
        length += 1
    elif mode == 2 or no_base:
        address += code[length] | code[length + 1] << 8 | code[length + 2] << 16 | signed(code[length + 3]) << 24
        length += 4
    return address + (registers[NEXT] + length if from_here else 0), stride, length


@njit
def execute(registers, order, state):
    """One instruction, on the state of the thread it stands in; whether it is one of these."""
    code = carray(pointer(registers[NEXT]), (10,), np.uint8).astype(np.int64)
    prefix, rest, opcode, modrm = code[1], code[2], code[3], code[4]
    if code[0] != VEX or prefix & 0x1F != MAP or rest & 4 != 0:
        return False
    kind, target, length = rest & 3, (modrm >> 3) & 7, 5
    config = state[CONFIG:]
    tiles = state[:CONFIG].reshape(TILES, ROWS, ROW_BYTES)
    in_memory = modrm >> 6 != 3
    if in_memory:
        address, stride, length = address_of(code, registers, order, prefix, modrm)
    if opcode == CONFIGURE and kind == NONE and in_memory:
        config[:] = carray(pointer(address), (64,), np.uint8)
        tiles[:] = 0
    elif opcode == CONFIGURE and kind == NONE:
        state[:] = 0
    elif opcode == CONFIGURE and kind == XF2 and not in_memory:
        tiles[target] = 0
    elif opcode == MOVE and in_memory and kind != NONE:
        rows, row_bytes = config[48 + target], np.int64(config[16 + 2 * target])
        if config[0] != 1 or rows == 0 or row_bytes == 0:
            return False
        for r in range(rows):
            memory = carray(pointer(address + r * stride), (row_bytes,), np.uint8)
            if kind == XF3:
                memory[:] = tiles[target, r, :row_bytes]
            else:
                tiles[target, r] = 0
                tiles[target, r, :row_bytes] = memory
        if kind != XF3:
            tiles[target, rows:] = 0
    elif opcode == MULTIPLY and kind == XF3 and not in_memory:
        a, b = modrm & 7, (~rest >> 3) & 7
        rows, pairs, columns = config[48 + target], config[16 + 2 * a] // 4, config[16 + 2 * target] // 4
        if config[0] != 1 or config[48 + a] != rows or config[48 + b] != pairs or config[16 + 2 * b] != 4 * columns:
            return False
        c = tiles[target].view(np.float32)
        multiply(c, tiles[a].view(np.uint32), tiles[b].view(np.uint32), rows, pairs, columns)
    else:
        return False
    registers[NEXT] += length
    return True


def _function(name, *arguments):
    """A function of the C library whose result is an address or a number."""
    found = getattr(ctypes.CDLL(None), name)
    found.restype, found.argtypes = ctypes.c_ssize_t, arguments
    return found


def _state_of_threads():
    """A function that returns where the calling thread's state is: each has its own, from its first instruction on."""
    key, end = ctypes.c_uint(), ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)
    if _function("pthread_key_create", ctypes.c_void_p, ctypes.c_void_p)(ctypes.addressof(key), end) & 0xFFFFFFFF != 0:
        raise OSError("threads can have no state of their own")
    number, find = key.value, _function("pthread_getspecific", ctypes.c_uint)
    keep = _function("pthread_setspecific", ctypes.c_uint, ctypes.c_ssize_t)
    allocate = _function("calloc", ctypes.c_ssize_t, ctypes.c_ssize_t)

    @njit
    def state():
        found = find(number)
        if found == 0:
            found = allocate(1, STATE)
            keep(number, found)
        return found

    return state


@njit
def spell(code, message):
    """Bytes as hexadecimal digits, at the end of a message of a line."""
    for i in range(2 * len(code)):
        digit = (np.int64(code[i >> 1]) >> (4 - 4 * (i & 1))) & 15
        message[len(message) - 1 - 2 * len(code) + i] = digit + (48 if digit < 10 else 87)


def _handler():
    """The compiled handler."""
    give_up, write = _function("signal", ctypes.c_int, ctypes.c_ssize_t), _function("write", *[ctypes.c_ssize_t] * 3)
    state, order, illegal = _state_of_threads(), ORDER, int(signal.SIGILL)
    told = np.frombuffer(b"\nan instruction that is not emulated: " + b"." * 20 + b"\n", np.uint8)

    @cfunc(types.void(types.int32, types.intp, types.intp))
    def handler(number, info, context):
        registers = carray(pointer(context + REGISTERS_AT), (23,), np.int64)
        if not execute(registers, order, carray(pointer(state()), (STATE,), np.uint8)):
            message = told.copy()
            spell(carray(pointer(registers[NEXT]), (10,), np.uint8), message)
            write(2, message.ctypes.data, len(message))
            give_up(illegal, 0)  # and meet it again

    return handler


class _Action(ctypes.Structure):
    """Linux' struct sigaction, as the C library has it."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_byte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


WITH_CONTEXT = 4  # SA_SIGINFO


@cache
def row():
    """The row of machines with a matrix unit, emulated unless this is one; None where that cannot be."""
    found = next(row for row in table.TABLE if row.name == "amx")
    if not table.runs_here(found):
        if sys.platform != "linux" or not set(found.needs) - {"amx-tile", "amx-bf16"} <= table.host_features():
            return None
        emulate()
    return found


@cache
def for_any_features(row):
    """The same, used for queries of few features as well."""
    return replace(row, blocking=replace(row.blocking, matrix_features=1))


def use_everywhere():
    """Have all calls in this process use it, but for those of sessions that have a row of their own.

    Query blocks of short sequences share a task, as those of long ones do: each works for the next one.
    """
    found = row()
    if found is None:
        raise OSError("this machine can neither run nor emulate the row amx")
    Session.row = property(lambda here: here._row or for_any_features(found))
    plan.TASKS_PER_THREAD = 1


@cache
def emulate():
    """From now on, AMX instructions are emulated in this process. Returns its handler, to be kept."""
    handler = _handler()
    action = _Action(handler=handler.address, flags=WITH_CONTEXT)
    if ctypes.CDLL(None).sigaction(int(signal.SIGILL), ctypes.byref(action), None) != 0:
        raise OSError("no handler of illegal instructions can be had")
    return handler
