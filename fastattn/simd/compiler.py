"""Numba's compiler, cut down to what a kernel needs: `jit`, and compile-time branches on a `TileShape`.

Most of Numba's passes serve arrays, closures and parallel loops, which kernels do not have. Without them a kernel is
typed and lowered in half the time. One pass is new: an ``if`` whose condition depends on a shape alone is decided
before anything is typed, so that what another kind of machine, or of call, would need costs nothing here.
"""

import operator

from numba import njit
from numba.core import ir, types
from numba.core.analysis import compute_cfg_from_blocks
from numba.core.compiler import CompilerBase
from numba.core.compiler_machinery import FunctionPass, PassManager, register_pass
from numba.core.ir_utils import build_definitions, get_definition, guard
from numba.core.typed_passes import (
    IRLegalization,
    NativeLowering,
    NoPythonBackend,
    NopythonTypeInference,
    PreLowerStripPhis,
)
from numba.core.untyped_passes import FixupArgs, IRProcessing, ReconstructSSA, TranslateByteCode

from fastattn.simd.tile import ShapeType, TileShape


class _Unknown(Exception):
    pass


@register_pass(mutates_CFG=True, analysis_only=False)
class DecideBranches(FunctionPass):
    """Replace branches that depend on a shape alone by jumps, and drop what can no longer be reached."""

    _name = "decide_branches"

    def __init__(self):
        FunctionPass.__init__(self)

    def run_pass(self, state):
        """The pass itself, as Numba's pass manager calls it."""
        function, decided = state.func_ir, False
        for block in function.blocks.values():
            branch = block.terminator
            if not isinstance(branch, ir.Branch):
                continue
            try:
                taken = bool(self._evaluate(branch.cond, state))
            except _Unknown:
                continue
            block.body[-1] = ir.Jump(branch.truebr if taken else branch.falsebr, loc=branch.loc)
            decided = True
        if decided:
            for label in compute_cfg_from_blocks(function.blocks).dead_nodes():
                del function.blocks[label]
            function._definitions = build_definitions(function.blocks)
        return decided

    def _evaluate(self, variable, state):
        definition = guard(get_definition, state.func_ir, variable)
        if isinstance(definition, ir.Arg) and isinstance(state.args[definition.index], ShapeType):
            return state.args[definition.index].shape
        if isinstance(definition, (ir.Const, ir.Global, ir.FreeVar)):
            return definition.value
        operation = getattr(definition, "op", None)
        if operation == "getattr":
            shape = self._evaluate(definition.value, state)
            if isinstance(shape, TileShape):
                return getattr(shape, definition.attr)
        elif operation == "binop":
            return definition.fn(self._evaluate(definition.lhs, state), self._evaluate(definition.rhs, state))
        elif operation == "unary" and definition.fn is operator.not_:
            return not self._evaluate(definition.value, state)
        elif operation == "call" and self._evaluate(definition.func, state) is bool:
            return self._evaluate(definition.args[0], state)
        raise _Unknown


class KernelCompiler(CompilerBase):
    """From a Python function to LLVM IR, in the fewest steps."""

    def define_pipelines(self):
        """The passes, in order."""
        manager = PassManager("kernel")
        for step in (
            TranslateByteCode,
            FixupArgs,
            IRProcessing,
            DecideBranches,
            ReconstructSSA,
            NopythonTypeInference,
            PreLowerStripPhis,
            IRLegalization,
            NativeLowering,
            NoPythonBackend,
        ):
            manager.add_pass(step, step.__name__)
        manager.finalize()
        return [manager]


_OPTIONS = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def jit(function, inline=False):
    """A function for kernels: compiled as part of those that call it.

    Numba would compile it again for every integer constant that it is given somewhere; here constants are integers.
    `inline`: not left to LLVM, which calls what is large, and passes tiles through memory then.
    """
    dispatcher = njit(**_OPTIONS, forceinline=inline, pipeline_class=KernelCompiler)(function)
    template = dispatcher.get_call_template
    dispatcher.get_call_template = lambda args, kws: template(tuple(types.unliteral(arg) for arg in args), kws)
    return dispatcher


def inline(function):
    """`jit`, for what is to be a part of its callers."""
    return jit(function, inline=True)
