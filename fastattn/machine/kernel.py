"""What is compiled, described in full: a value that names a file of the cache, and that kernels branch on."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

from fastattn.machine.table import Isa
from fastattn.machine.tile import ITEMSIZE, TileShape

NO_TILE = TileShape("", 0, 0, 0)
PLAIN: tuple[str, ...] = ()  # steps of a kernel in which nothing more happens to scores
TERMS = {"bfloat16": 1, "float16": 2, "float32": 3}


@dataclass(frozen=True)
class Kernel:
    """One compiled library. All of this is known while it is compiled, and decides its branches.

    Attributes
    ----------
    work : str
        What its tasks do: "forward", "weights" (the matrix of weights), "known_weights" (the same where the sums are
        known), "summary" (what is said of the weights of each query, and of each key), "backward", "mask_gradient",
        "captured_gradient", "additive_backward", "additive_mask_gradient", "additive_captured_gradient"; "several" are
        calls of these as one. "peak" is the micro-kernel alone.
        "schedule", "signature", "overlaps", "own_heads" and "longest" are compiled functions around all of these;
        "convert" writes rows in another dtype.
    row : Isa
        The row of the ISA table to generate code for.
    tile : TileShape
        The register tile, of the dtype that is computed in; `NO_TILE` where nothing is computed.
    storage : str
        The dtype of what lies in memory: of keys, and of the others unless they have one of their own. "int8" are
        numbers in blocks (`fastattn.cpu.kernels.int8`).
    score : {"dot", "additive"}
        What the score of a query and a key is made of.
    reads : {"strided", "rows", "panels", "pairs", "matrix"}
        How the micro-kernel finds keys and values: where they lie, with any strides; in rows of which each is
        contiguous, where they lie or copied; or laid out anew in panels, in the order of their use. "pairs" are rows
        of bfloat16 that are multiplied pair by pair: neighbours in the rows of keys, and from two rows of values.
        "matrix" are tiles of a matrix unit (`fastattn.cpu.kernels.matrix`).
    steps : tuple of str
        What may happen to scores besides: "dropout", "mask", "softcap", "function". (Every kernel knows causality.)
        Code for a step that is not among them is not even typed.
    queries : str
        The dtype of queries, and of results, where it is not that of keys.
    values : str
        The dtype of values, where it is not that of keys.
    pages : str
        The dtype of keys and values that lie in pages, where they do.
    function : hashable
        A user's function (`fastattn.functions.function.Function`), where that is what is compiled: its work is
        "score_function" or "seen_function".
    """

    work: str
    row: Isa
    tile: TileShape = NO_TILE
    storage: str = ""
    score: str = "dot"
    reads: str = "strided"
    steps: tuple[str, ...] = PLAIN
    queries: str = ""
    values: str = ""
    pages: str = ""
    function: Hashable = None

    @property
    def itemsize(self) -> int:
        """Bytes of an element in memory."""
        return ITEMSIZE[self.storage]

    @property
    def query_place(self) -> Kernel:
        """The kernel as if its storage were that of queries, and of results."""
        return self.place(self.queries or self.storage)

    @property
    def value_place(self) -> Kernel:
        """The kernel as if its storage were that of values."""
        return self.place(self.values or self.storage)

    @property
    def key_place(self) -> Kernel | TileShape:
        """What keys are read from where features are in the lanes: of pairs, words as they are."""
        return self.tile if self.reads == "pairs" else self

    @property
    def pairs_of_rows(self) -> bool:
        """Whether values that lie here are multiplied in pairs, each of two rows, where features are in the lanes."""
        return self.reads == "pairs" and self.storage == "bfloat16"

    @property
    def near(self) -> bool:
        """Whether what is asked for ahead comes to the first-level cache."""
        return self.row.near

    @property
    def of_bfloat16(self) -> bool:
        """Whether what is multiplied are numbers of bfloat16, and queries times a power of two alone."""
        return self.reads in ("pairs", "matrix")

    @property
    def terms(self) -> int:
        """Of how many numbers of bfloat16 an element is the sum, for a matrix unit: of what is computed with."""
        return TERMS[self.tile.dtype if self.queries or self.values else self.storage]

    @property
    def scale_place(self) -> Kernel:
        """The kernel as if its storage were that of the scales of int8."""
        return self.half_place

    @property
    def half_place(self) -> Kernel:
        """The kernel as if its storage were float16."""
        return self.place("float16")

    @property
    def bfloat16_place(self) -> Kernel:
        """The kernel as if its storage were bfloat16."""
        return self.place("bfloat16")

    def place(self, storage: str) -> Kernel:
        """The kernel as if all memory were of one dtype."""
        if storage == self.storage:
            return self
        return replace(self, storage=storage, queries="", values="")

    @property
    def label(self) -> str:
        """The kernel in short, for people: a kernel is known by all of its attributes."""
        words = [self.work]
        if self.tile != NO_TILE:
            words += [self.tile.dtype, f"{self.tile.rows}x{self.tile.vectors}"]
            if self.storage != self.tile.dtype:
                words.append(f"of-{self.storage}")
            if self.values:
                words.append(f"and-{self.values}")
            if self.queries:
                words.append(f"for-{self.queries}")
        words.append(self.row.name)
        if self.score != "dot":
            words.append(self.score)
        if self.pages:
            words.append("pages")
        return "-".join([*words, *self.steps])
