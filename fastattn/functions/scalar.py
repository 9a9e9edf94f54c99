"""A user's function for one score at a time, and the LLVM IR of that, for kernels of which another compiler makes code.

So what names, operators and captured values mean is said once: a GPU runs the instructions that the CPU runs.
"""

from collections import namedtuple
from functools import lru_cache

from numba import njit
from numba.core import types
from numba.core.codegen import JITCodeLibrary, JITCPUCodegen
from numba.core.compiler import Flags
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numba.core.targetconfig import ConfigStack
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from fastattn.functions.compiler import compiled, reads_of
from fastattn.functions.dual import real_of, value_as
from fastattn.functions.rows import is_set, is_true, new_flag, new_note, noted, slope_of, with_slope
from fastattn.simd.compiler import OPTIONS

__all__ = ["arguments_of", "in_llvm", "number_of_places", "refresh", "scalar"]

WORD = types.int64
COMPILED = njit(**OPTIONS)

InLlvm = namedtuple("InLlvm", "modules name type")


def scalar(function, dtype, sloping=False, by=None, decorated=COMPILED):
    """Numba's function of one score, compiled by what `decorated` is.

    Of a score, batch, head, query, key, and the address of what is captured it returns the new score, if `sloping` the
    derivative by the score, and 1 if every index was in range, else 0. Of a function that says which keys are seen,
    which is given no score, it returns 1 or 0, and the same.

    `by` are the number of a captured array, and that of a place where it is read: then the derivative is by the element
    that is read there, and behind it come the number of that element in an array without gaps, and how often one was
    read.
    """
    if by is None:
        user = compiled(function, dtype)
    else:
        names = (function.captured[by[0]].name,)
        user = compiled(function, dtype, names, reads_of(function, dtype, names)[by[1]][1])

    def seen(batch, head, query, key, captured):
        flag = new_flag()
        answer = is_true(user((batch, head, query, key, captured, flag)))
        return 1 if answer else 0, is_set(flag)

    def value(score, batch, head, query, key, captured):
        flag = new_flag()
        found = user((score, batch, head, query, key, captured, flag))
        return value_of(score, found), is_set(flag)

    def slope(score, batch, head, query, key, captured):
        flag = new_flag()
        found = user((with_slope(score), batch, head, query, key, captured, flag))
        return value_of(score, found), slope_of(score, found), is_set(flag)

    def by_element(score, batch, head, query, key, captured):
        note = new_note(0)
        found = user((score, batch, head, query, key, captured, note))
        number, times = noted(note)
        return value_of(score, found), slope_of(score, found), number, times, is_set(note)

    if function.role == "mask_mod":
        return decorated(seen)
    if by is not None:
        return decorated(by_element)
    return decorated(slope if sloping else value)


@lru_cache(maxsize=256)
def number_of_places(function, dtype, name):
    """At how many places a function reads elements of a captured array."""
    return len(reads_of(function, dtype, (name,)))


def arguments_of(function, dtype):
    """The Numba types of the arguments of `scalar`."""
    score = () if function.role == "mask_mod" else (real_of(dtype),)
    return (*score, *[WORD] * 5)


@intrinsic
def value_of(typingctx, like, score):
    """What a function has returned, without a slope, in the type of a score."""

    def codegen(context, builder, sig, values):
        return value_as(context, builder, score, values[1], like)

    return signature(like, like, score), codegen


# -- LLVM IR -----------------------------------------------------------------------------------------------------------


class _Library(JITCodeLibrary):
    """The IR of one function, as it was made: LLVM would write it as an older one cannot read it."""

    def __init__(self, codegen, name):
        super().__init__(codegen, name)
        self.modules = []

    def add_ir_module(self, module):
        self.modules.append(module)

    def finalize(self):
        self._finalized = True

    def get_pointer_to_function(self, name):
        return 0

    def reachable(self):
        """This library and all that it calls, without Numba's for reference counts, which nothing here has."""
        found, waiting = set(), [self]
        while waiting:
            library = waiting.pop()
            if library not in found and isinstance(library, _Library):
                found.add(library)
                yield library
                waiting.extend(library._linking_libraries)


class _Codegen(JITCPUCodegen):
    _library_class = _Library

    def set_env(self, env_name, env):
        pass


def refresh():
    """Have Numba find all that there is for CPUs: what its compiler of GPUs sees come, it takes for its own."""
    with global_compiler_lock:
        cpu_target.typing_context.refresh()
        cpu_target.target_context.refresh()


@lru_cache(maxsize=256)
def in_llvm(function, dtype, sloping=False, by=None):
    """LLVM IR of `scalar`: its modules, the name of the function, and LLVM's type of it.

    It is called as Numba calls functions: with a pointer to the result, one for exceptions, which there are none of,
    and the arguments.
    """
    context = cpu_target.target_context
    # the options of the kernel that is being compiled are no options of a CPU's
    with global_compiler_lock, ConfigStack().enter(Flags()):
        refresh()
        before = context._internal_codegen, context.cached_internal_func
        context._internal_codegen, context.cached_internal_func = _Codegen("fastattn scalar"), {}
        try:
            made, arguments = scalar(function, dtype, sloping, by), arguments_of(function, dtype)
            made.compile(arguments)
            result = made.overloads[arguments]
        finally:
            context._internal_codegen, context.cached_internal_func = before
    descriptor = result.fndesc
    modules = [module for library in result.library.reachable() for module in library.modules]
    kind = context.call_conv.get_function_type(descriptor.restype, descriptor.argtypes)
    return InLlvm(modules, descriptor.llvm_func_name, kind)
