"""A user's functions on blocks of scores: each is a small library of its own, which kernels call by address.

So a function compiles in a fraction of a second, and no kernel for it. Blocks are scores[j][i], key j, query i, as
everywhere; a lane is a query, and LLVM makes vectors of a loop over the lanes. An index that was out of range leaves a
mark, a NaN of its own; what hides keys overwrites it, and what remains is an error (`fastattn.cpu.kernels.scores`).
"""

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from fastattn.functions.captured import FLAG, writes_elsewhere
from fastattn.functions.compiler import compiled
from fastattn.functions.dual import DualType, make_dual, parts_of
from fastattn.simd import jit
