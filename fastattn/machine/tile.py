"""The shape of a register tile: what the micro-kernel holds in registers, known before anything is compiled."""

from __future__ import annotations

from dataclasses import dataclass, replace

ITEMSIZE = {"int8": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
MATRIX_ROWS, MATRIX_DEPTH = 16, 32  # of a tile of a matrix unit: rows, and elements of bfloat16 in each
MATRIX_TILE = 2 * MATRIX_ROWS * MATRIX_DEPTH  # its bytes
BLOCK = 32  # numbers of int8 that have a scale in common


@dataclass(frozen=True)
class TileShape:
    """A register tile: `rows` rows of `vectors` vectors of `lanes` elements of a floating dtype.

    `by_element`: multiply-adds of the machine take one factor from an element of a register.
    """

    dtype: str
    lanes: int
    rows: int
    vectors: int
    by_element: bool = False

    @property
    def storage(self) -> str:
        """The dtype of what lies in working memory."""
        return self.dtype

    @property
    def pairs_of_rows(self) -> bool:
        """As `Kernel` has it: what lies in working memory is multiplied by itself."""
        return False

    @property
    def near(self) -> bool:
        """As `Kernel` has it: who reads working memory is told of no machine."""
        return False

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def width(self) -> int:
        """Elements in one row."""
        return self.lanes * self.vectors

    @property
    def row_bytes(self) -> int:
        return self.width * self.itemsize

    @property
    def vector_bytes(self) -> int:
        return self.lanes * self.itemsize

    @property
    def buffer_bytes(self) -> int:
        """Room for a square of elements of any dtype."""
        return 8 * self.lanes * self.lanes

    @property
    def single(self) -> TileShape:
        """The same row, once: what a tail of fewer than `rows` rows is made of."""
        return replace(self, rows=1)

    @property
    def pair(self) -> TileShape:
        """The same row, twice."""
        return replace(self, rows=2)

    @property
    def wide_pair(self) -> TileShape:
        """Two rows twice as long."""
        return replace(self, rows=2, vectors=2 * self.vectors)

    @property
    def triple(self) -> TileShape:
        """The same row, three times."""
        return replace(self, rows=3)

    @property
    def column(self) -> TileShape:
        """As many rows of one vector."""
        return replace(self, vectors=1)

    @property
    def square(self) -> TileShape:
        """`lanes` rows of one vector: what is transposed in registers."""
        return replace(self, rows=self.lanes, vectors=1)

    @property
    def panel(self) -> TileShape:
        """A square of as many elements as the tile has rows: what is packed at a time."""
        return TileShape(self.dtype, self.rows, self.rows, 1)

    @property
    def quad(self) -> TileShape:
        """Four rows of one vector."""
        return replace(self, rows=4, vectors=1)

    @property
    def factor(self) -> TileShape:
        """Two or four rows of one vector: with each of these, the rows of `cofactor` are as many as a square has."""
        return replace(self, rows=4 if self.lanes >= 8 else 2, vectors=1)

    @property
    def cofactor(self) -> TileShape:
        return replace(self, rows=self.lanes // self.factor.rows, vectors=1)

    @property
    def cofactor_row(self) -> TileShape:
        """A row of as many elements as `cofactor` has rows."""
        return TileShape(self.dtype, self.cofactor.rows, 1, 1)

    @property
    def long(self) -> TileShape:
        """One row of eight vectors."""
        return replace(self, rows=1, vectors=8)

    @property
    def half_long(self) -> TileShape:
        return replace(self, rows=1, vectors=4)

    @property
    def double(self) -> TileShape:
        """One row of two."""
        return replace(self, rows=1, vectors=2)

    @property
    def block(self) -> TileShape:
        """One row of as many elements as have a scale in common in int8."""
        return replace(self, rows=1, vectors=BLOCK // self.lanes)

    @property
    def strip(self) -> TileShape:
        """Up to four rows of one vector, no more than a square has."""
        return replace(self, rows=min(4, self.lanes), vectors=1)

    @property
    def lane(self) -> TileShape:
        """A single element: a block of one query, whose scores stand side by side."""
        return TileShape(self.dtype, 1, 1, 1)

    @property
    def vector(self) -> TileShape:
        return replace(self, rows=1, vectors=1)
