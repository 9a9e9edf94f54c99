"""The instructions of `fastattn.cuda.kernels.ptx` in NumPy, for kernels without a GPU.

Here one thread of Numba's simulator stands for a warp: what is a register of a thread on a GPU is an array of the
registers of all 32 lanes, and what a warp does together is done at once. Kernels whose branches are the same for a
whole warp run so from the same source.

The layouts of fragments are those of the PTX ISA, sections "Matrix Fragments for mma.m16n8k16 with floating point type"
and "ldmatrix". Copies that are asynchronous happen as late as they may, and shared memory begins as NaN: who reads
before waiting reads what is wrong.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "commit",
    "copy_async",
    "exp2",
    "fma",
    "global_address",
    "hold_loads",
    "load_byte",
    "load_float",
    "load_half",
    "load_matrices",
    "load_matrices_transposed",
    "load_shared",
    "load_word",
    "log2",
    "maximum",
    "minimum",
    "mma",
    "narrow",
    "opaque",
    "pack",
    "reciprocal",
    "select",
    "shared_memory",
    "shuffle",
    "shuffle_xor",
    "store_float",
    "store_pair",
    "store_shared",
    "thread_index",
    "unrolled",
    "wait",
    "warp_any",
    "warp_index",
    "widen",
]

Array = NDArray[Any]
LANES = 32
LANE = np.arange(LANES)
GROUP, PLACE = LANE // 4, LANE % 4  # a quad of lanes, and where in it

#: Shared-memory accesses of 16 bytes per lane, as (instruction, byte offsets), while a test wants to know them.
accesses: list[tuple[str, Array]] | None = None


class Address:
    """A byte of an array, or one for each lane."""

    def __init__(self, memory: Array, offset: Any) -> None:
        self.memory = memory
        self.offset = offset

    def __add__(self, further: Any) -> Address:
        return Address(self.memory, self.offset + further)

    def each(self) -> Array:
        """The offset for each lane."""
        return np.broadcast_to(np.asarray(self.offset, np.int64), (LANES,))


def unrolled(function: Any, *known: Any) -> Any:
    """The function itself: Python runs its loops anyway. Integers of a kernel have 64 bits, as they have on a GPU."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        return function(*known, *(np.int64(arg) if type(arg) is int else arg for arg in args))

    return run


# -- where and what ----------------------------------------------------------------------------------------------------


def thread_index() -> Array:
    """The indices of the warp's threads in their block."""
    # a thread of the simulator begins with NumPy's own settings: infinities and NaN are values like others here
    np.seterr(all="ignore")
    return (LANES * warp_index() + LANE).astype(np.int32)


def warp_index() -> Any:
    """The index of the warp in its block."""
    return np.int32(threading.current_thread().threadIdx.x)  # type: ignore[attr-defined]


def narrow(x: Any) -> Any:
    """An integer in 32 bits."""
    return np.asarray(x, np.int64).astype(np.int32)[()]


def opaque(x: Any) -> Any:
    """The number itself."""
    return x


def select(condition: Any, yes: Any, no: Any) -> Any:
    """yes where the condition holds, else no."""
    result = np.where(condition, yes, no)
    return result.astype(np.float32) if result.dtype.kind == "f" else result


# -- memory ------------------------------------------------------------------------------------------------------------


def shared_memory(size: int) -> Address:
    """The address of `size` bytes of shared memory, one and the same for all warps of a block."""
    block: dict[str, Array] = threading.current_thread()._manager.__dict__  # type: ignore[attr-defined]
    return Address(block.setdefault("shared_memory", np.full(size, 0xFF, np.uint8)), 0)


def global_address(array: Any, index: Any) -> Address:
    """The address of an element of an array in global memory."""
    own = array._item._ary if hasattr(array, "_item") else array
    return Address(own.view(np.uint8), index * own.itemsize)


def _pending() -> Any:
    """Groups of copies that this warp has begun, the last one not committed yet."""
    state = threading.current_thread().__dict__
    return state.setdefault("copies", [[]])


def copy_async(to: Address, source: Address, size: Any) -> None:
    """Begin to copy 16 bytes from global to shared memory, of which those beyond `size`, 0 or 16, are zeros."""
    assert not (to.each() % 16).any(), "cp.async: the address in shared memory is not a multiple of 16"
    observe("cp.async", to)
    _pending()[-1].append((to, source, np.broadcast_to(size, (LANES,))))


def commit() -> None:
    """Make one group of the copies begun since the last."""
    _pending().append([])


def wait(groups: int) -> None:
    """Wait until no more than the last `groups` groups of copies are under way."""
    pending = _pending()
    while len(pending) - 1 > groups:
        for to, source, size in pending.pop(0):
            wanted = size > 0
            chunks = np.zeros((LANES, 16), np.uint8)
            chunks[wanted] = source.memory[source.each()[wanted, None] + np.arange(16)]
            to.memory[to.each()[:, None] + np.arange(16)] = chunks


def hold_loads() -> None:
    """Nothing: what is loaded is not kept in registers here."""


def observe(instruction: str, address: Address) -> None:
    """Note an access to shared memory, if a test wants to know."""
    if accesses is not None:
        accesses.append((instruction, address.each()))


def _matrices(address: Address) -> Array:
    """Shape (4, 8, 8): lane i says where row i % 8 of matrix i // 8 is, 16 bytes."""
    offsets = address.each()
    assert not (offsets % 16).any(), "ldmatrix: an address is not a multiple of 16"
    observe("ldmatrix", address)
    rows = address.memory[offsets[:, None] + np.arange(16)]
    return rows.view(np.uint16).reshape(4, 8, 8)


def _pairs(matrices: Array) -> list[Array]:
    """Lane i gets elements 2 · (i % 4) and the next of row i // 4, in one register for each matrix."""
    low, high = matrices[:, GROUP, 2 * PLACE], matrices[:, GROUP, 2 * PLACE + 1]
    return list(low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16))


def load_matrices(address: Address) -> list[Array]:
    """Four matrices of 8 rows of 16 bytes; lane i says where row i % 8 of matrix i // 8 is."""
    return _pairs(_matrices(address))


def load_matrices_transposed(address: Address) -> list[Array]:
    """The same, each transposed."""
    return _pairs(_matrices(address).swapaxes(1, 2))


def load_shared(address: Address) -> list[Array]:
    """16 bytes of shared memory, in 4 registers."""
    observe("ld.shared", address)
    return list(address.memory[address.each()[:, None] + np.arange(16)].view(np.uint32).T)


def load_word(address: Address) -> Array:
    """32 bits of shared memory."""
    return np.asarray(address.memory[address.each()[:, None] + np.arange(4)].view(np.uint32)[:, 0])


def _load(address: Address, when: Any, kind: Any) -> Array:
    within = np.broadcast_to(when, (LANES,))
    result = np.zeros(LANES, kind)
    where = address.each()[within, None] + np.arange(result.itemsize)
    assert (where >= 0).all(), "an address before the array"
    result[within] = address.memory[where].view(kind)[:, 0]
    return result


def load_byte(address: Address, when: Any) -> Array:
    """A byte in global memory, 0 in lanes where `when` does not hold."""
    return _load(address, when, np.uint8).astype(np.int64)


def load_half(address: Address, when: Any) -> Array:
    """The bits of a half in global memory, 0 in lanes where `when` does not hold."""
    return _load(address, when, np.uint16).astype(np.int64)


def load_float(address: Address, when: Any) -> Array:
    """A float32 in global memory, 0 in lanes where `when` does not hold."""
    return _load(address, when, np.float32)


def _store(address: Address, word: Array, when: Any) -> None:
    within = np.broadcast_to(when, (LANES,))
    where = address.each()[within, None] + np.arange(word.itemsize)
    assert (where >= 0).all(), "an address before the array"
    address.memory[where] = np.ascontiguousarray(word[within, None]).view(np.uint8)


def store_shared(address: Address, word: Array) -> None:
    """Store 32 bits in shared memory."""
    _store(address, word, True)


def store_pair(address: Address, word: Array, when: Any) -> None:
    """Store two halves, 32 bits, in global memory, in lanes where `when` holds."""
    _store(address, word, when)


def store_float(address: Address, x: Array, when: Any) -> None:
    """Store a float32 in global memory, in lanes where `when` holds."""
    _store(address, np.broadcast_to(np.float32(x), (LANES,)), when)


# -- arithmetic --------------------------------------------------------------------------------------------------------


def fma(a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once."""
    return (np.float64(1) * a * b + c).astype(np.float32)


def maximum(a: Any, b: Any) -> Any:
    """The greater of two; of a number and NaN the number."""
    return np.fmax(a, b)


def minimum(a: Any, b: Any) -> Any:
    """The lesser of two integers."""
    return np.minimum(a, b)


def exp2(x: Array) -> Array:
    """2^x; 0 where that is subnormal."""
    result = np.exp2(x, dtype=np.float32)
    return np.where(result < np.finfo(np.float32).tiny, np.float32(0), result)


def log2(x: Array) -> Array:
    """The logarithm to base 2."""
    return np.log2(x, dtype=np.float32)


def reciprocal(x: Array) -> Array:
    """1 / x."""
    return np.float32(1) / x


def to_halves(x: Array, storage: str) -> Array:
    """The bits of float32 numbers as halves of the type `storage`, rounded to the nearest."""
    if storage == "float16":
        return x.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def from_halves(bits: Array, storage: str) -> Array:
    """The float32 numbers that the bits of halves are."""
    if storage == "float16":
        return np.ascontiguousarray(bits, np.uint16).view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def pack(low: Any, high: Any, storage: str) -> Array:
    """Two float32 numbers as halves of the type `storage` in 32 bits, rounded to the nearest."""
    low, high = (to_halves(np.broadcast_to(np.float32(x), (LANES,)), storage).astype(np.uint32) for x in (low, high))
    return np.asarray(low | high << np.uint32(16))


def widen(bits: Array, storage: str) -> Array:
    """The float32 numbers that halves of the type `storage` are."""
    return from_halves(bits, storage)


# -- warps -------------------------------------------------------------------------------------------------------------


def shuffle_xor(x: Any, mask: int) -> Array:
    """The x of the lane whose index differs in the bits of `mask`."""
    return np.broadcast_to(np.float32(x), (LANES,))[LANE ^ mask]


def shuffle(x: Array, lane: Array) -> Array:
    """The integer x of another lane."""
    return x[lane]


def warp_any(condition: Any) -> bool:
    """Whether the condition holds in any lane."""
    return bool(np.any(condition))


# Where element i of the fragment of a lane stands, each of shape (lanes, elements): registers hold two halves, the
# lower one first, or one float32.
_A, _B, _C = np.arange(8), np.arange(4), np.arange(4)
A_ROWS, A_COLUMNS = GROUP[:, None] + 8 * (_A // 2 % 2), 2 * PLACE[:, None] + _A % 2 + 8 * (_A // 4)
B_ROWS, B_COLUMNS = 2 * PLACE[:, None] + _B % 2 + 8 * (_B // 2), GROUP[:, None] + 0 * _B
C_ROWS, C_COLUMNS = GROUP[:, None] + 8 * (_C // 2), 2 * PLACE[:, None] + _C % 2


def _halves(registers: Any, storage: str) -> Array:
    """Shape (lanes, elements): the numbers in a fragment's registers of 32 bits."""
    words = np.stack([np.asarray(register).astype(np.uint32) for register in registers], axis=1)
    parts = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], axis=2)
    return from_halves(parts.reshape(LANES, -1).astype(np.uint16), storage)


def mma(a: Any, b: Any, c: Any, storage: str) -> list[Array]:
    """c + a · b of a 16×16 and a 16×8 matrix of halves, in fragments of 4, 2 and 4 registers; sums are float32."""
    left, right, sums = np.empty((16, 16)), np.empty((16, 8)), np.empty((16, 8))
    left[A_ROWS, A_COLUMNS] = _halves(a, storage)
    right[B_ROWS, B_COLUMNS] = _halves(b, storage)
    sums[C_ROWS, C_COLUMNS] = np.stack([np.broadcast_to(x, (LANES,)) for x in c], axis=1)
    result = (sums + left @ right).astype(np.float32)
    return list(result[C_ROWS, C_COLUMNS].T.copy())
