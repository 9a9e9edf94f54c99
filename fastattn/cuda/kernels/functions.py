"""A user's functions in kernels: on a GPU the LLVM IR that Numba makes of them for CPUs, in the simulator machine code.

The compiler of a GPU is of LLVM 7 in its language, and has its own names for elementary functions.
"""

from __future__ import annotations

import ctypes
import functools
import re
from typing import Any

import numpy as np
from numba import njit

from fastattn.cuda.available import SIMULATED
from fastattn.functions.function import Function
from fastattn.functions.scalar import arguments_of, in_llvm, refresh, scalar

__all__ = ["byte_at", "calling"]

#: What is different in the language of another LLVM.
DIALECT = (
    (r'@"llvm\.(\w+)\.f32"', r"@__nv_\1f"),
    (r'@"llvm\.(\w+)\.f64"', r"@__nv_\1"),
    (r"captures\(none\)", "nocapture"),
    (r"fneg (float|double) ", r"fsub \1 -0.0, "),
    (r", !(alias\.scope|noalias) !\d+", ""),
    (r", align 1\b", ""),  # elements of what is captured lie at multiples of their size here
    (r'^@"_ZN08NumbaEnv.*$', ""),
)


def calling(function: Function, real: Any, sloping: bool = False, by: tuple[int, int] | None = None) -> Any:
    """A device function that calls `fastattn.functions.scalar.scalar`, which says what it returns.

    Its arguments are a tuple of a score, if the function is one of scores, batch, head, query and key; the array of
    words that tell of captured values; and at which of them those of this function begin.
    """
    return _calling(function, np.dtype(real).name, sloping, by)


def numbers_of(function: Function, sloping: bool, by: tuple[int, int] | None) -> int:
    """How many of the first that a call returns are of the dtype of scores."""
    return 0 if function.role == "mask_mod" else 2 if sloping or by is not None else 1


if SIMULATED:

    def byte_at(address: Any) -> int:
        """The byte at an address."""
        return ctypes.c_uint8.from_address(int(address)).value

    def _calling(function: Function, dtype: str, sloping: bool, by: tuple[int, int] | None) -> Any:
        """Machine code, called from Python."""
        compiled = scalar(function, dtype, sloping, by, njit(error_model="numpy"))
        compiled.compile(arguments_of(function, dtype))
        real, numbers = np.dtype(dtype).type, numbers_of(function, sloping, by)

        def call(given: Any, captured: Any, place: int) -> Any:
            found = compiled(*given, np.asarray(captured).ctypes.data + 8 * place)
            return (*map(real, found[:numbers]), *found[numbers:])

        return call

else:
    from llvmlite import ir
    from numba.cuda import cgutils, types
    from numba.cuda.codegen import CUDACodeLibrary
    from numba.cuda.cudadrv import nvvm
    from numba.cuda.extending import intrinsic
    from numba.cuda.typing.templates import signature

    @intrinsic
    def byte_at(typingctx, address):
        """The byte at an address."""

        def codegen(context, builder, sig, values):
            return builder.load(builder.inttoptr(values[0], ir.IntType(8).as_pointer()))

        return signature(types.uint8, address), codegen

    class _Module:
        """The text of a module, for Numba to compile beside those of a kernel."""

        functions = ()

        def __init__(self, text: str):
            self.text = text

        def __str__(self) -> str:
            return self.text

    @functools.lru_cache(maxsize=256)
    def _texts(function: Function, dtype: str, sloping: bool, by: tuple[int, int] | None) -> tuple[str, ...]:
        """The modules of a function."""
        made = []
        for module in in_llvm(function, dtype, sloping, by).modules:
            module.triple, module.data_layout = "nvptx64-nvidia-cuda", nvvm.NVVM().data_layout
            nvvm.add_ir_version(module)
            for each in module.functions:
                if not each.is_declaration:
                    each.linkage = "linkonce_odr"
                    each.attributes.add("alwaysinline")
            text = str(module)
            for pattern, other in DIALECT:
                text = re.sub(pattern, other, text, flags=re.MULTILINE)
            made.append(text)
        return tuple(made)

    def _library(context: Any, texts: tuple[str, ...]) -> Any:
        """Numba's object for modules, each behind one that calls it: what nobody has called yet would be left out."""
        library = CUDACodeLibrary(context.codegen(), "a user's function")
        library.add_ir_module(_Module(texts[0]))
        if len(texts) > 1:
            library.add_linking_library(_library(context, texts[1:]))
        library.finalize()
        return library

    def _calling(function: Function, dtype: str, sloping: bool, by: tuple[int, int] | None) -> Any:
        """An intrinsic, which compiles the function when a kernel is compiled that calls it."""
        refresh()

        @intrinsic
        def call(typingctx, given, captured, place):
            _, name, kind = in_llvm(function, dtype, sloping, by)
            real = types.float32 if dtype == "float32" else types.float64
            numbers = (real,) * numbers_of(function, sloping, by)
            others = 3 if by is not None else 2 if function.role == "mask_mod" else 1
            result = types.Tuple((*numbers, *[types.int64] * others))
            wanted = [real] * (len(given) - 4) + [types.int64] * 4

            def codegen(context, builder, sig, values):
                library = _library(context, _texts(function, dtype, sloping, by))
                context.active_code_library.add_linking_library(library)
                arguments = [
                    context.cast(builder, value, ty, target)
                    for value, ty, target in zip(cgutils.unpack_tuple(builder, values[0]), given, wanted, strict=True)
                ]
                words = context.make_array(captured)(context, builder, values[1]).data
                where = builder.ptrtoint(builder.gep(words, [values[2]]), ir.IntType(64))
                callee = cgutils.get_or_insert_function(builder.module, kind, name)
                found = cgutils.alloca_once(builder, kind.args[0].pointee)
                builder.call(callee, [found, ir.Constant(kind.args[1], None), *arguments, where])
                parts = cgutils.unpack_tuple(builder, builder.load(found))
                return context.make_tuple(builder, result, parts)

            return signature(result, given, captured, types.int64), codegen

        return call
