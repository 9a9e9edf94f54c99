"""A machine that runs PTX in NumPy: as much of it as the kernels on tensor cores consist of.

It shows that the instructions that the compiler was made to emit compute what they should, without a GPU. A register is
an array of the values of a warp's 32 lanes, so branches have to be the same for a whole warp. What instructions do to
fragments and to shared memory is `emulated_ptx`'s; here is how they are read off their text.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from typing import Any

import emulated_ptx as emulated
import numpy as np
from emulated_ptx import LANE, LANES, Address
from numpy.typing import NDArray

Array = NDArray[Any]

BASE = 1 << 40  # of global memory: an address of 32 bits there is wrong
KINDS: dict[str, Any] = {
    **{f"u{bits}": getattr(np, f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"s{bits}": getattr(np, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"b{bits}": getattr(np, f"uint{bits}") for bits in (16, 32, 64)},
    "f32": np.float32,
    "f64": np.float64,
    "pred": np.bool_,
}
COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "neu": np.not_equal,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    # of NaN these are true
    "ltu": lambda a, b: ~(a >= b), "gtu": lambda a, b: ~(a <= b), "leu": lambda a, b: ~(a > b),
    "geu": lambda a, b: ~(a < b), "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip
#: To whole numbers, by the names of ways to round.
ROUNDED = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
BINARY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "min": np.minimum, "max": np.fmax,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


WIDE = {np.uint16: np.uint32, np.int16: np.int32, np.uint32: np.uint64, np.int32: np.int64}


class Memory:
    """Global memory: arrays one after the other, and where each begins."""

    def __init__(self, *arrays: Array) -> None:
        self.places = np.cumsum([0, *(-(-array.nbytes // 256) * 256 + 256 for array in arrays)])
        self.bytes = np.zeros(self.places[-1], np.uint8)
        for array, place in zip(arrays, self.places, strict=False):
            self.bytes[place : place + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)

    def address(self, number: int) -> int:
        """Where array `number` begins."""
        return int(BASE + self.places[number])

    def array(self, number: int, like: Array) -> Array:
        """What array `number` is now."""
        place = self.places[number]
        return self.bytes[place : place + like.nbytes].view(like.dtype).reshape(like.shape)


class Program:
    """The instructions of the one kernel in a text of PTX."""

    def __init__(self, text: str) -> None:
        shared = re.search(r"fastattn_shared\[(\d+)\]", text)
        self.shared_bytes = int(shared[1]) if shared else 0
        self.labels: dict[str, int] = {}
        self.instructions: list[tuple[str, list[str], list[str]]] = []
        body = re.sub(r"//[^\n]*", "", text[text.index("\n{") + 2 : text.rindex("}")])
        body = re.sub(r"\{\s*\.reg([^}]|\{[^}]*\})*?;\s*\}", lambda block: block[0].strip("{} \n"), body)
        for label, statement in re.findall(r"([$\w]+):|([^;:]+);", body):
            if label:
                self.labels[label] = len(self.instructions)
            elif not statement.strip().startswith("."):
                self._add(statement.strip())

    def _add(self, statement: str) -> None:
        guard, name, rest = re.fullmatch(r"(@!?%?\w+)?\s*([\w.:]+)\s*(.*)", statement, re.S).groups()  # type: ignore[union-attr]
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
        self.instructions.append((guard or "", name.split("."), operands))


class Warp:
    """One warp of a block."""

    def __init__(self, program: Program, memory: Memory, shared: Array, block: int, warp: int, parameters: Any) -> None:
        self.program, self.memory, self.shared, self.parameters = program, memory, shared, parameters
        self.registers: dict[str, Array] = {
            "%tid.x": np.asarray(LANES * warp + LANE, np.uint32),
            "%ctaid.x": np.full(LANES, block, np.uint32),
            "fastattn_shared": np.zeros(LANES, np.uint64),
        }
        self.copies: list[list[Any]] = [[]]

    def run(self) -> Generator[bool, bool, None]:
        """Run to the end, with a stop at each barrier: what is said there, and heard of any warp of the block."""
        at = 0
        while True:
            guard, name, operands = self.program.instructions[at]
            at += 1
            when = np.ones(LANES, bool)
            if guard:
                when = self.registers[guard.lstrip("@!")] ^ ("!" in guard)
            if name[0] == "ret":
                assert when.all() or not when.any()
                if when.all():
                    return
            elif name[0] == "bra":
                assert when.all() or not when.any(), "a branch that lanes of a warp do not share"
                if when.all():
                    at = self.program.labels[operands[0]]
            elif name[:2] == ["bar", "warp"]:
                assert operands == ["-1"]  # the lanes of a warp are never apart here
            elif name[:2] == ["bar", "sync"]:
                yield False
            elif name[:3] == ["bar", "red", "or"]:
                found = yield bool(self.registers[operands[2]].any())
                self.put(operands[0], np.full(LANES, found), when)
            else:
                self.step(name, operands, when)

    # -- operands ------------------------------------------------------------------------------------------------------

    def get(self, text: str, kind: Any) -> Array:
        """The value of an operand, its bits taken as `kind`, of as many of them as there are."""
        if text.startswith(("0f", "0F")):
            return np.full(LANES, int(text[2:], 16), np.uint32).view(np.float32)
        if text.startswith(("0d", "0D")):
            return np.full(LANES, int(text[2:], 16), np.uint64).view(np.float64)
        if re.fullmatch(r"-?\d+", text):
            bits = 8 * np.dtype(kind).itemsize
            whole = np.array([int(text) % (1 << bits)], np.uint64).astype(
                f"u{bits // 8}" if kind is not np.bool_ else bool
            )
            return np.broadcast_to(whole.view(kind), (LANES,))
        value = self.registers[text]
        if value.dtype == kind:
            return value
        size = np.dtype(kind).itemsize
        return value.view(kind) if value.itemsize == size else value.astype(f"u{size}").view(kind)

    def words(self, text: str, kind: Any = np.uint32) -> list[Array]:
        """The values of a vector of operands."""
        return [self.get(part.strip(), kind) for part in text.strip("{}").split(",")]

    def put(self, text: str, values: Any, when: Array) -> None:
        """Set a register, or a vector of them, in the lanes that take part."""
        names = [part.strip() for part in text.strip("{}").split(",")]
        for name, value in zip(names, values if len(names) > 1 else [values], strict=True):
            old = self.registers.get(name)
            self.registers[name] = np.where(when, value, 0 if old is None else old).astype(value.dtype)

    def address(self, text: str) -> Array:
        """The address that is meant by ``[register + offset]``."""
        base, _, offset = text.strip("[]").partition("+")
        return self.registers[base.strip()].astype(np.int64) + int(offset or 0)

    def of_global(self, text: str) -> Address:
        return Address(self.memory.bytes, self.address(text) - BASE)

    def of_shared(self, text: str) -> Address:
        return Address(self.shared, self.address(text))

    # -- instructions --------------------------------------------------------------------------------------------------

    def step(self, name: list[str], operands: list[str], when: Array) -> None:
        """Do one instruction that is no branch."""
        first, kind = name[0], KINDS.get(name[-1])
        special = getattr(self, f"_{first}", None)
        if special is not None:
            special(name, operands, when)
            return
        a = self.get(operands[1], kind)
        if "wide" in name:  # the product has twice the bits
            wide = WIDE[np.dtype(kind).type]
            result = a.astype(wide) * self.get(operands[2], kind).astype(wide)
            self.put(operands[0], result, when)
            return
        if first in BINARY:
            b = self.get(operands[2], kind)
            if first == "div" and kind not in (np.float32, np.float64):
                result = np.trunc(a / b) if np.issubdtype(kind, np.signedinteger) else a // b
            else:
                result = BINARY[first](a, b)
        elif first in ("shl", "shr"):
            count = self.get(operands[2], np.uint32).astype(a.dtype)
            result = np.where(count < 8 * a.itemsize, a << count if first == "shl" else a >> count, 0)
        elif first in ("mad", "fma"):
            b, c = (self.get(operand, kind) for operand in operands[2:])
            result = emulated.fma(a, b, c) if first == "fma" else a * b + c
        else:
            result = {
                "rem": lambda: np.fmod(a, self.get(operands[2], kind)),
                "not": lambda: ~a,
                "neg": lambda: -a,
                "abs": lambda: abs(a),
                "ex2": lambda: emulated.exp2(a),
                "lg2": lambda: emulated.log2(a),
                "rcp": lambda: emulated.reciprocal(a),
                "sqrt": lambda: np.sqrt(a),
                "selp": lambda: np.where(self.registers[operands[3]], a, self.get(operands[2], kind)),
            }[first]()
        self.put(operands[0], result.astype(kind), when)

    def _mov(self, name: list[str], operands: list[str], when: Array) -> None:
        kind = np.float32 if operands[0].startswith("%f") else KINDS[name[-1]]
        self.put(operands[0], self.get(operands[1], kind).astype(kind), when)

    def _cvta(self, name: list[str], operands: list[str], when: Array) -> None:
        self.put(operands[0], self.registers[operands[1]], when)

    def _setp(self, name: list[str], operands: list[str], when: Array) -> None:
        a, b = (self.get(operand, KINDS[name[-1]]) for operand in operands[1:])
        self.put(operands[0], COMPARISONS[name[1]](a, b), when)

    def _cvt(self, name: list[str], operands: list[str], when: Array) -> None:
        if name[-2] in ("bf16x2", "f16x2"):
            high, low = (self.get(operand, np.float32) for operand in operands[1:])
            result = emulated.pack(low, high, "bfloat16" if name[-2] == "bf16x2" else "float16")
        elif name[-1] == "f16":
            result = emulated.from_halves(self.get(operands[1], np.uint16), "float16")
        else:
            number = self.get(operands[1], KINDS[name[-1]])
            result = ROUNDED.get(name[1], lambda number: number)(number).astype(KINDS[name[-2]])
        self.put(operands[0], result, when)

    def _bfi(self, name: list[str], operands: list[str], when: Array) -> None:
        part, whole, begin, count = (self.get(operand, np.uint32) for operand in operands[1:])
        mask = ((1 << count.astype(np.uint64)) - 1 << begin).astype(np.uint32)
        self.put(operands[0], whole & ~mask | part << begin & mask, when)

    def _ld(self, name: list[str], operands: list[str], when: Array) -> None:
        kind = KINDS[name[-1]]
        if name[1] == "param":
            number = int(re.search(r"_param_(\d+)", operands[1])[1])  # type: ignore[index]
            self.put(operands[0], np.full(LANES, self.parameters[number], kind), when)
            return
        where = self.of_shared(operands[1]) if name[1] == "shared" else self.of_global(operands[1])
        if "v4" in name:
            self.put(operands[0], emulated.load_shared(where), when)
            return
        value = emulated._load(where, when, kind)
        narrow = {1: np.uint32, 2: np.uint32}.get(value.itemsize, kind)  # a register has 32 bits at least
        self.put(operands[0], value.astype(narrow), when)

    def _st(self, name: list[str], operands: list[str], when: Array) -> None:
        where = self.of_shared(operands[0]) if name[1] == "shared" else self.of_global(operands[0])
        emulated._store(where, self.get(operands[1], KINDS[name[-1]]), when)

    def _cp(self, name: list[str], operands: list[str], when: Array) -> None:
        if name[2] == "commit_group":
            self.copies.append([])
        elif name[2] == "wait_group":
            while len(self.copies) - 1 > int(operands[0]):
                for to, source, wanted in self.copies.pop(0):
                    chunks = np.zeros((LANES, 16), np.uint8)
                    chunks[wanted] = self.memory.bytes[source[wanted, None] + np.arange(16)]
                    self.shared[to[:, None] + np.arange(16)] = chunks
        else:
            to, source = self.address(operands[0]), self.address(operands[1]) - BASE
            assert operands[2] == "16"
            assert not (to % 16).any()
            self.copies[-1].append((to, source, self.get(operands[3], np.uint32) > 0))

    def _ldmatrix(self, name: list[str], operands: list[str], when: Array) -> None:
        load = emulated.load_matrices_transposed if "trans" in name else emulated.load_matrices
        self.put(operands[0], load(self.of_shared(operands[1])), when)

    def _mma(self, name: list[str], operands: list[str], when: Array) -> None:
        a, b = self.words(operands[1]), self.words(operands[2])
        storage = "bfloat16" if "bf16" in name else "float16"
        self.put(operands[0], emulated.mma(a, b, self.words(operands[3], np.float32), storage), when)

    def _shfl(self, name: list[str], operands: list[str], when: Array) -> None:
        assert operands[3:] == ["31", "-1"]
        value, lane = self.registers[operands[1]], self.get(operands[2], np.int32)
        self.put(operands[0], value[LANE ^ lane if "bfly" in name else lane], when)

    def _vote(self, name: list[str], operands: list[str], when: Array) -> None:
        assert name[2] == "any"
        self.put(operands[0], np.full(LANES, self.registers[operands[1]].any()), when)


@np.errstate(all="ignore")
def launch(text: str, grid: int, warps: int, memory: Memory, parameters: list[Any]) -> None:
    """Run a kernel, one block after the other."""
    program = Program(text)
    for block in range(grid):
        shared = np.full(program.shared_bytes, 0xFF, np.uint8)
        running = [Warp(program, memory, shared, block, warp, parameters).run() for warp in range(warps)]
        heard: bool | None = None
        while True:
            said = []
            for warp in running:
                try:
                    said.append(warp.send(heard))  # type: ignore[arg-type]
                except StopIteration:
                    continue
            assert len(said) in (0, warps), "a barrier that warps of a block do not share"
            if not said:
                break
            heard = any(said)


def call(text: str, grid: int, warps: int, arguments: Sequence[Any]) -> None:
    """Run a kernel on arguments as the simulator takes them: its arrays, tables, numbers."""
    given = [getattr(argument, "_ary", argument) for argument in arguments]
    # memory may be given twice
    numbers: dict[int, int] = {}
    arrays: list[Array] = []
    parameters: list[Any] = []
    views = [np.asarray(argument) if isinstance(argument, (np.ndarray, memoryview)) else None for argument in given]
    for view in views:
        if view is not None and view.ctypes.data not in numbers:
            numbers[view.ctypes.data] = len(arrays)
            arrays.append(view)
    memory = Memory(*arrays)
    for argument, view in zip(given, views, strict=True):
        if view is None:
            parameters.append(argument)
        else:
            place = memory.address(numbers[view.ctypes.data])
            parameters += [0, 0, view.size, view.itemsize, place, *view.shape, *view.strides]
    launch(text, grid, warps, memory, parameters)
    for number, array in enumerate(arrays):
        if array.flags.writeable:
            array[...] = memory.array(number, array)
