"""Room in the address space for what has to lie together.

LLVM's loader has the system map memory for code, for its constants, and for what it writes to, one after the other.
They refer to each other with 32 bits, but the system gives each the first gap that is large enough: among arrays of
gigabytes, a page of constants may go into a small gap far from the code, and LLVM ends the process.
"""

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

__all__ = ["room_together"]

NEAR = 1 << 30  # bytes: half of what 32 bits reach
MOST = 10_000  # gaps that are filled


@contextmanager
def room_together(size: int) -> Iterator[None]:
    """Have the system map what is mapped meanwhile, up to `size` bytes in all, in one place.

    Memory of this size shows where that is: in the first gap that is large enough for all. Smaller gaps that come
    before it, as smaller pieces show, are filled meanwhile, unless they are near.
    """
    with ExitStack() as gaps:
        with suppress(OSError):  # no memory to spare: what follows may fit all the same
            _fill(gaps, -(-size // mmap.PAGESIZE))
        yield


def _fill(gaps: ExitStack, pages: int) -> None:
    """Fill the gaps that are smaller than so many pages, but for those near the first that is not."""
    large, place = _mapped(pages)
    large.close()  # so that smaller pieces go there as well, where no gap is left before it
    for _ in range(MOST):
        small, address = _mapped(pages)
        if abs(address - place) >= NEAR:
            gaps.enter_context(small)
            continue
        small.close()
        if pages == 1:
            return
        pages = (pages + 1) // 2


def _mapped(pages: int) -> tuple[mmap.mmap, int]:
    """Memory that is nothing else's until it is closed, and its address."""
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))
