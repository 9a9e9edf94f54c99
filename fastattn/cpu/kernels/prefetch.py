"""What is asked for ahead: rows of matrices that will be wanted soon, brought near a few cache lines at a time.

A core has room for some sixteen lines on their way from memory, and whoever asks for more waits; meanwhile nothing
comes from the second-level cache to the first either. So the list of what is wanted is written down once for each block
of queries, and every register tile of its work asks for its share.
"""

import numpy as np

from fastattn.machine.tile import MATRIX_ROWS
from fastattn.simd import jit, prefetch, prefetch_near, record_view, stack_memory
from fastattn.simd.memory import LINE

i8 = np.int64
LIST = np.dtype([("pieces", i8), ("steps", i8)])
PIECE = np.dtype([("next", i8), ("skip", i8), ("lines", i8), ("done", i8), ("left", i8), ("each", i8)])
MOST_PIECES = 6
NOTHING = 0  # instead of a list's address

list_view, piece_view = record_view(LIST), record_view(PIECE)
LIST_BYTES, PIECE_BYTES = LIST.itemsize, PIECE.itemsize
list_memory = stack_memory(LIST_BYTES + MOST_PIECES * PIECE_BYTES)


@jit
def prefetch_rows(rows, row, count, length):
    """Ask for `count` rows of `length` bytes, at once."""
    for j in range(count):
        for offset in range(0, length, LINE):
            prefetch(rows + j * row + offset)


@jit
def rows_of_step(kernel):
    """After how many rows of a product something is asked for: those of a register tile, or two of a matrix unit."""
    return 2 * MATRIX_ROWS if kernel.reads == "matrix" else kernel.tile.rows


@jit
def want_nothing(at, steps):
    """Begin a list, that will be asked for in so many steps."""
    wanted = list_view(at)
    wanted.pieces, wanted.steps = 0, max(steps, 1)


@jit
def want(at, rows, row, length, count):
    """Append `count` rows of `length` bytes to a list."""
    wanted = list_view(at)
    piece = piece_view(at + LIST_BYTES + wanted.pieces * PIECE_BYTES)
    begin = rows % LINE if row > length else 0  # where rows lie apart, one may reach into a line more
    lines = (begin + length + LINE - 1) // LINE
    total = lines * count
    piece.next, piece.lines, piece.done, piece.left = rows, lines, 0, total
    piece.skip = row - (lines - 1) * LINE
    piece.each = (total + wanted.steps - 1) // wanted.steps
    wanted.pieces += 1


@jit
def want_share(at, rows, row, length, count, share, shares):
    """Append one of `shares` parts of `count` rows."""
    step = (count + shares - 1) // shares
    begin = min(share * step, count)
    want(at, rows + begin * row, row, length, min(step, count - begin))


@jit
def bring(reader, line):
    """Ask for a cache line."""
    if reader.near:
        prefetch_near(line)
    else:
        prefetch(line)


@jit
def ask(reader, at):
    """Ask for a step's share of a list, or for what is left. (From row to row without branches: none is foreseen.)"""
    if at == NOTHING:
        return
    pieces = at + LIST_BYTES
    for place in range(pieces, pieces + list_view(at).pieces * PIECE_BYTES, PIECE_BYTES):
        piece = piece_view(place)
        line, done, lines, skip = piece.next, piece.done, piece.lines, piece.skip
        count = min(piece.each, piece.left)
        if skip == LINE:  # nothing is between the rows
            for _ in range(count):
                bring(reader, line)
                line += LINE
        else:
            for _ in range(count):
                bring(reader, line)
                done += 1
                line += skip if done == lines else LINE
                done = 0 if done == lines else done
        piece.next, piece.done = line, done
        piece.left -= count


@jit
def ask_for_all(reader, at):
    """Ask for what is left of a list, at once."""
    if at != NOTHING:
        for _ in range(list_view(at).steps):
            ask(reader, at)
