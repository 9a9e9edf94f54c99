"""The machine, in one table: instruction set -> lanes, register tile, block sizes.

A new machine is a new row. The algorithm in `fastattn.cpu` reads the row and knows nothing else of the machine.
"""

import os
import platform
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache

from llvmlite import binding as llvm

from fastattn.machine.features import host_features, known_features, may_use_matrix_unit
from fastattn.machine.tile import ITEMSIZE, TileShape
from fastattn.machine.uninterrupted import uninterrupted


@dataclass(frozen=True)
class Blocking:
    """How work is cut into pieces. Compiled code is told the sizes when it runs, so that no kernel depends on them.

    Attributes
    ----------
    least_rows : int
        Keys, or queries, in a block however long their rows are: a multiple of any tile's rows and width.
    block_bytes : int
        What a block of keys and values may take of the second-level cache; blocks of long rows have fewer keys.
    group_bytes : int
        State of the query blocks taken through the keys together, which the packing is shared by.
    cached_bytes : int
        All queries, keys and values of a call: where they are no more, they may still be near from the last call, and
        the next head is not asked for ahead.
    in_place_bytes : int
        From row to row of keys and values that are read in place, at most: farther apart, they fall into few sets of
        the caches.
    matrix_features : int
        Of keys, and of values: from so many on a matrix unit is used, where there is one.
    gradient_query_bytes : int
        Backward pass: a row of queries taken together, which a visit adds to a gradient of keys and values at a time.
    gradient_key_block : int
        Backward pass: keys in a block.
    gradient_state_bytes : int
        Backward pass: a group of key blocks, at most: keys, values, and the gradients of both.
    additive_block : int
        Backward pass of additive attention: queries, and keys, that meet in working memory.
    additive_query_bytes, additive_key_bytes : int
        There: features and values of such a block, at most.
    additive_terms_bytes : int
        There: terms of the queries that meet a vector of keys together, where one query does not have more.
    additive_cost, additive_gradient_cost : float
        What a feature of a query and a key takes the time of in additive attention, forward and backward: operations
        of the micro-kernel.
    """

    least_rows: int = 32
    block_bytes: int = 128 << 10
    group_bytes: int = 512 << 10
    cached_bytes: int = 1 << 20
    in_place_bytes: int = 3 << 10
    matrix_features: int = 32
    gradient_query_bytes: int = 256
    gradient_key_block: int = 128
    gradient_state_bytes: int = 1 << 20
    additive_block: int = 128
    additive_query_bytes: int = 256 << 10
    additive_key_bytes: int = 128 << 10
    additive_terms_bytes: int = 8 << 10
    additive_cost: float = 10.0
    additive_gradient_cost: float = 20.0


_shape = cache(TileShape)


@dataclass(frozen=True)
class Isa:
    """One row of the table.

    Attributes
    ----------
    name : str
        What ``FASTATTN_ISA`` calls it.
    cpu : str
        LLVM's name of the processor model to generate code for; "" is the architecture's baseline.
    needs : tuple of str
        CPU features without which the row's code does not run.
    features : tuple of str
        Those that code is generated for besides the processor model's.
    processors : tuple of str
        LLVM's names of the processors that the row is for; () where it is for all that run it.
    vector_bytes : int
        Bytes of one SIMD register.
    rows, vectors : int
        The register tile, `rows` x `vectors` accumulators: enough to hide the latency of the multiply-adds, and with
        the operands no more than there are registers (16 of AVX2 and SSE, 32 of AVX-512 and NEON).
    tall_rows : int
        Rows of the tile that is one vector wide, for calls with few queries.
    key_block : int
        Keys taken through the softmax at a time.
    scalef : bool
        Whether the machine scales by a power of two in one instruction (AVX-512's vscalef).
    pairs : bool
        Whether the machine multiplies pairs of bfloat16, and adds both products to a float32, in one instruction that
        takes no longer than a multiply-add (NEON's bfdot, and AVX512_BF16 on Zen 4; on Intel's it takes four times as
        long).
    halves : bool
        Whether the machine widens and rounds float16 by an instruction (F16C, NEON).
    matrix : bool
        Whether the machine has a matrix unit, which multiplies tiles of bfloat16 (AMX).
    only_named : bool
        Whether a process uses the row only where ``FASTATTN_ISA`` names it.
    by_element : bool
        Whether a multiply-add takes one factor from an element of a register, whichever (NEON). Elements that lie next
        to each other are loaded together then; elsewhere each is repeated in all lanes as it is loaded.
    panels : bool
        Whether blocks of keys and values are laid out anew for a group of query blocks, in the order of their use.
        Otherwise they are read where they lie, or if that is awkward, from a copy of the rows.
    near : bool
        Whether what is asked for ahead comes to the first-level cache, where it has room for it, and not to the second.
    code_offset : int
        Where in a cache line a kernel's code begins, in bytes. It changes the time of a call of some microseconds:
        (1,8,8,32) took 6.8, 6.4, 7.2 and 6.2 us on Zen 4 where it begins at 0, 16, 32 and 48.
    blocking : Blocking
        How work is cut into pieces. Rows that differ in nothing else are equal: they have the same kernels.
    """

    name: str
    cpu: str
    needs: tuple[str, ...]
    vector_bytes: int
    rows: int
    vectors: int
    tall_rows: int = 8
    key_block: int = 128
    features: tuple[str, ...] = ()
    processors: tuple[str, ...] = ()
    scalef: bool = False
    pairs: bool = False
    halves: bool = False
    matrix: bool = False
    only_named: bool = False
    by_element: bool = False
    panels: bool = True
    near: bool = False
    code_offset: int = 48
    blocking: Blocking = field(default=Blocking(), compare=False, repr=False)

    def __hash__(self) -> int:
        return hash(self.name)  # each call that is planned asks for it

    def tile(self, dtype: str) -> TileShape:
        """The register tile for a dtype, with no more rows than columns: queries of a column are rows elsewhere."""
        width = self.vector_bytes // ITEMSIZE[dtype] * self.vectors
        times = 2 if self.rows > width else 1
        return self._tile(dtype, self.rows // times, self.vectors * times)

    def tall_tile(self, dtype: str) -> TileShape:
        """The tile that is one vector wide, for calls with few queries."""
        return self._tile(dtype, self.tall_rows, 1)

    def wide_tile(self, dtype: str) -> TileShape:
        """The tile with features in the lanes, for very few queries: four rows, as many accumulators as the others."""
        return self._tile(dtype, 4, max(1, self.rows * self.vectors // 4))

    def _tile(self, dtype: str, rows: int, vectors: int) -> TileShape:
        return _shape(dtype, self.vector_bytes // ITEMSIZE[dtype], rows, vectors, self.by_element)


_GENERIC = Isa("generic", cpu="", needs=(), vector_bytes=16, rows=4, vectors=2)
_AVX2 = replace(
    _GENERIC,
    name="avx2",
    cpu="x86-64-v3",
    needs=("avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe", "popcnt"),
    vector_bytes=32,
    halves=True,
)
_AVX512 = replace(
    _AVX2,
    name="avx512",
    cpu="x86-64-v4",
    needs=(*_AVX2.needs, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    vector_bytes=64,
    rows=8,
    scalef=True,
    panels=False,
    blocking=Blocking(block_bytes=256 << 10),
)
_ZEN4 = replace(
    _AVX512,
    name="zen4",
    needs=(*_AVX512.needs, "avx512bf16"),
    features=("avx512bf16",),
    processors=("znver4",),
    pairs=True,
)
_ZEN5 = replace(_ZEN4, name="zen5", processors=("znver5",), near=True)
_AMX = replace(
    _AVX512,
    name="amx",
    needs=(*_AVX512.needs, "avx512bf16", "amx-tile", "amx-bf16"),
    features=("avx512bf16", "amx-tile", "amx-bf16"),
    matrix=True,
    only_named=True,  # it has been timed on no processor yet
)
_NEON = replace(_GENERIC, name="neon", needs=("neon",), rows=8, halves=True, by_element=True)
_NEON_BF16 = replace(_NEON, name="neon_bf16", needs=("neon", "bf16"), features=("bf16",), pairs=True)
TABLE = (
    _ZEN5,
    _ZEN4,
    _AMX,
    _AVX512,
    _AVX2,
    _NEON_BF16,
    _NEON,
    _GENERIC,
)  # the first that is meant for this machine is used
NAMES = tuple(row.name for row in TABLE)


def of_this_architecture() -> tuple[Isa, ...]:
    """The rows that code can be generated for here, whether this machine executes it or not.

    LLVM names all features of x86, and says which of them a machine has; elsewhere it names those that a machine has.
    """
    known = set(host_features())
    with suppress(RuntimeError):
        known |= known_features().keys()
    return tuple(row for row in TABLE if known.issuperset(row.needs))


def runs_here(row: Isa) -> bool:
    """Whether this machine executes the row's instructions, and its system lets it."""
    return set(row.needs) <= host_features() and (not row.matrix or may_use_matrix_unit())


def is_meant_for(row: Isa, processor: str) -> bool:
    """Whether a row is the right one for a processor that runs it, unless another is named."""
    return not row.only_named and (not row.processors or processor in row.processors)


@cache
def host() -> Isa:
    """The row that this process uses: the first that runs here and is meant to, or the one that ``FASTATTN_ISA`` names.

    Raises
    ------
    ValueError
        If ``FASTATTN_ISA`` names no row, or one that this machine does not execute.
    """
    return uninterrupted("row", _chosen)  # LLVM is asked, whose lock an interrupt could leave taken


def _chosen() -> Isa:
    forced = os.environ.get("FASTATTN_ISA", "")
    if not forced:
        return next(row for row in TABLE if is_meant_for(row, llvm.get_host_cpu_name()) and runs_here(row))
    for row in TABLE:
        if row.name == forced:
            if not runs_here(row):
                missing = ", ".join(sorted(set(row.needs) - host_features())) or "the system's leave to use amx-tile"
                here = f"this {platform.machine()} machine with LLVM {llvm.llvm_version_info[0]}"
                raise ValueError(f"FASTATTN_ISA={forced}: {here} lacks {missing}")
            return row
    raise ValueError(f"FASTATTN_ISA={forced!r} is unknown, expected one of {', '.join(NAMES)}")
