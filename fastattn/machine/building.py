"""From a Python function to machine code for one row of the ISA table, by way of Numba and LLVM.

Numba types the functions and lowers them to LLVM IR. Linking, optimisation and code generation happen here, once for
the whole kernel, and for the row's processor instead of the host's: a forced ISA is then really the one that runs.
(Numba by itself optimises and compiles every callee on its own before it is inlined, which takes three times as long.)
"""

import re
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import binding as llvm
from llvmlite import ir
from numba.core import types
from numba.core.codegen import JITCodeLibrary, JITCPUCodegen
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from fastattn.machine.loading import target_machine
from fastattn.machine.mode import with_default_mode
from fastattn.machine.table import Isa


class _Library(JITCodeLibrary):
    """The IR of one function. It is never compiled alone: `emit` links it into the kernel."""

    def finalize(self) -> None:
        self._finalized = True

    def add_llvm_module(self, ll_module: Any) -> None:
        self._final_module.link_in(ll_module)

    def get_pointer_to_function(self, name: str) -> int:
        return 0

    def reachable(self) -> list["_Library"]:
        """This library and all that it calls."""
        found: dict[_Library, None] = {}
        waiting = [self]
        while waiting:
            library = waiting.pop()
            if library not in found:
                found[library] = None
                waiting.extend(library._linking_libraries)
        return list(found)


class _Codegen(JITCPUCodegen):
    _library_class = _Library

    def set_env(self, env_name: str, env: Any) -> None:
        pass


@contextmanager
def _remembered_operators() -> Iterator[None]:
    """Numba's typing context, with a memory of what it has found out about operators and intrinsics on given types."""
    typing = cpu_target.typing_context
    resolve = typing.resolve_function_type
    known: dict[Any, Any] = {}

    def resolve_once(function: Any, args: Any, kws: Any) -> Any:
        if kws or not isinstance(function, types.Function):
            return resolve(function, args, kws)
        key = function, tuple(args)
        found = known.get(key)
        if found is None:
            found = known[key] = resolve(function, args, kws)
        return found

    typing.resolve_function_type = resolve_once
    try:
        yield
    finally:
        del typing.resolve_function_type


class _swapped_codegen:
    """Numba's CPU target, for the time of a kernel's compilation, with a code generator that only collects IR."""

    codegen: Any = None

    def __enter__(self) -> None:
        if self.codegen is None:
            type(self).codegen = _Codegen("fastattn")
        self.before = cpu_target.target_context._internal_codegen
        cpu_target.target_context._internal_codegen = self.codegen

    def __exit__(self, *exception: object) -> None:
        cpu_target.target_context._internal_codegen = self.before


def emit(functions: dict[str, tuple[Any, int]], row: Isa, vectorise: bool = False) -> bytes:
    """Object code that exports C functions.

    Parameters
    ----------
    functions : dict of str to (function, int)
        What each exported symbol runs: a function under `fastattn.simd.jit`, and the number of its arguments, which are
        64-bit integers. Those that return nothing return 0. It runs in the default floating-point mode, whatever its
        caller's is.
    row : Isa
        The row of the ISA table to generate code for.
    vectorise : bool
        Whether LLVM shall make vectors of loops. What is written for tiles has them.
    """
    with global_compiler_lock:
        typing, target = cpu_target.typing_context, cpu_target.target_context
        typing.refresh()
        target.refresh()
        libraries: dict[_Library, None] = {}
        entries = []
        with _swapped_codegen(), _remembered_operators():
            for symbol, (function, count) in functions.items():
                arguments = (types.intp,) * count
                function.compile(arguments)
                compiled = function.overloads[arguments]
                libraries.update(dict.fromkeys(compiled.library.reachable()))
                entries.append(_entry(compiled.fndesc, target, symbol, row))
        module = llvm.parse_assembly("")  # nothing of LLVM's is in what a refused function raises
        for entry in entries:
            module.link_in(llvm.parse_assembly(entry))
        for library in libraries:
            module.link_in(library._final_module, preserve=True)
    return _generate(module, row, functions, vectorise)


def _entry(descriptor: Any, target: Any, symbol: str, row: Isa) -> str:
    """LLVM IR of an exported function: it calls Numba's, whose convention adds a result pointer and a status.

    Here, and nowhere else, compiled code begins and ends: so this is where the floating-point mode changes.
    """
    module = ir.Module(symbol)
    module.triple = llvm.get_process_triple()
    fnty = target.call_conv.get_function_type(descriptor.restype, descriptor.argtypes)
    callee = ir.Function(module, fnty, descriptor.llvm_func_name)
    word = ir.IntType(64)
    entry = ir.Function(module, ir.FunctionType(word, list(fnty.args)[2:]), symbol)
    builder = ir.IRBuilder(entry.append_basic_block())
    result, status = builder.alloca(fnty.args[0].pointee), ir.Constant(fnty.args[1], None)  # no kernel raises
    arguments = [result, status, *entry.args]
    with_default_mode(builder, lambda: builder.call(callee, arguments, attrs=("noinline",)))
    builder.ret(builder.load(result) if descriptor.restype in types.integer_domain else ir.Constant(word, 0))
    return _in_place(str(module), row) if symbol == "task" else str(module)


def _in_place(text: str, row: Isa) -> str:
    """IR of the first function of a kernel, with what is not executed in front of it: all that follows moves."""
    return text.replace(")\n{", f") prefix [{row.code_offset} x i8] zeroinitializer\n{{", 1)


def _lasting(name: str) -> str:
    """A name without the numbers in Numba's, which are other ones in each process: object code is to be the same.

    LLVM adds numbers to those that become equal.
    """
    return re.split(r"B\d+v\d|\.const\.|numba\.dynamic\.", name)[0] or "data"


def _generate(module: Any, row: Isa, exported: Container[str], vectorise: bool) -> bytes:
    machine = target_machine(row)
    for item in (*module.functions, *module.global_variables):
        if not item.is_declaration and item.name not in exported:
            item.linkage = "internal"
            item.name = _lasting(item.name)
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    # The kernels are vectorised by hand: what LLVM would vectorise or unroll besides are loops over tails.
    options.loop_unrolling = options.slp_vectorization = False
    options.loop_vectorization = vectorise
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    code: bytes = machine.emit_object(module)
    return code
