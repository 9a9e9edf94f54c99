"""Numba's compiler, cut down to what a kernel needs: `jit`, and compile-time branches on static values.

Most of Numba's passes serve arrays, closures, reference counts and parallel loops, which kernels do not have. Without
them a kernel is typed and lowered in half the time. One pass is new: an ``if`` whose condition depends on static values
alone (``kernel.reads == "panels"``, ``"mask" in kernel.steps``) is decided before anything is typed, so that what
another kind of machine, or of call, would need costs nothing here. Words are never typed: only questions can be asked
of them.
"""

import operator

from numba import njit
from numba.core import ir, types
from numba.core.analysis import compute_cfg_from_blocks
from numba.core.compiler import CompilerBase
from numba.core.compiler_machinery import FunctionPass, PassManager, register_pass
from numba.core.ir_utils import build_definitions, get_definition, guard
from numba.core.transforms import canonicalize_cfg
from numba.core.typed_passes import (
    NativeLowering,
    NoPythonBackend,
    NopythonTypeInference,
    PreLowerStripPhis,
)
from numba.core.untyped_passes import FixupArgs, ReconstructSSA, TranslateByteCode

from fastattn.simd.static import StaticType, is_static

QUESTIONS = {
    operator.eq,
    operator.ne,
    operator.lt,
    operator.le,
    operator.gt,
    operator.ge,
    operator.contains,
    operator.not_,
}  # what has an answer that is true or false


class _Unknown(Exception):
    pass


@register_pass(mutates_CFG=True, analysis_only=False)
class DecideBranches(FunctionPass):
    """Answer what depends on static values alone, replace branches by jumps, drop what can no longer be reached."""

    _name = "decide_branches"

    def __init__(self):
        FunctionPass.__init__(self)

    def run_pass(self, state):
        """The pass itself, as Numba's pass manager calls it."""
        function = state.func_ir
        answered, decided = self._answer(state), self._decide(state)
        if decided:
            for label in compute_cfg_from_blocks(function.blocks).dead_nodes():
                del function.blocks[label]
            function.blocks = canonicalize_cfg(function.blocks)
        if answered or decided:
            self._sweep(state)
            function._definitions = build_definitions(function.blocks)
        return answered or decided

    def _answer(self, state):
        """Put True or False in the place of questions."""
        found = False
        for block in state.func_ir.blocks.values():
            for statement in block.body:
                value = getattr(statement, "value", None)
                if isinstance(value, ir.Expr) and value.op in ("binop", "unary") and value.fn in QUESTIONS:
                    try:
                        answer = bool(self._evaluate(value, state))
                    except _Unknown:
                        continue
                    statement.value = ir.Const(answer, value.loc)
                    found = True
        return found

    def _decide(self, state):
        """Put jumps in the place of branches."""
        found = False
        for block in state.func_ir.blocks.values():
            branch = block.terminator
            if isinstance(branch, ir.Branch):
                try:
                    taken = bool(self._evaluate(branch.cond, state))
                except _Unknown:
                    continue
                block.body[-1] = ir.Jump(branch.truebr if taken else branch.falsebr, loc=branch.loc)
                found = True
        return found

    def _sweep(self, state):
        """Drop what only questions wanted: Numba could not type all of it."""
        blocks = state.func_ir.blocks.values()
        found = True
        while found:
            used = {name for block in blocks for statement in block.body for name in _read_by(statement)}
            found = False
            for block in blocks:
                kept = [each for each in block.body if not self._is_idle(each, used, state)]
                found = found or len(kept) < len(block.body)
                block.body = kept

    def _is_idle(self, statement, used, state):
        """Whether a statement gives a known value a name that nobody reads."""
        if not isinstance(statement, ir.Assign) or statement.target.name in used:
            return False
        try:
            self._evaluate(statement.value, state)
        except _Unknown:
            return False
        return not isinstance(statement.value, ir.Arg)

    def _evaluate(self, value, state):
        """The value of a variable or an expression, if it is known."""
        definition = guard(get_definition, state.func_ir, value) if isinstance(value, ir.Var) else value
        if isinstance(definition, ir.Arg) and isinstance(state.args[definition.index], StaticType):
            return state.args[definition.index].value
        if isinstance(definition, (ir.Const, ir.Global, ir.FreeVar)):
            return definition.value
        operation = getattr(definition, "op", None)
        if operation == "getattr":
            owner = self._evaluate(definition.value, state)
            if is_static(owner):
                return getattr(owner, definition.attr)
        elif operation == "binop":
            return definition.fn(self._evaluate(definition.lhs, state), self._evaluate(definition.rhs, state))
        elif operation == "unary" and definition.fn is operator.not_:
            return not self._evaluate(definition.value, state)
        elif operation == "call" and self._evaluate(definition.func, state) is bool:
            return self._evaluate(definition.args[0], state)
        raise _Unknown


def _read_by(statement):
    """The names of the variables that a statement reads."""
    if isinstance(statement, ir.Assign):
        value = statement.value
        if isinstance(value, ir.Var):
            return [value.name]
        return [variable.name for variable in value.list_vars()] if hasattr(value, "list_vars") else []
    return [variable.name for variable in statement.list_vars()]


#: The last passes: types, and LLVM IR.
TYPED = (NopythonTypeInference, PreLowerStripPhis, NativeLowering, NoPythonBackend)
#: How functions are compiled that nobody calls from Python.
OPTIONS = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def pipelines(name, *steps):
    """Numba's passes, in order, as a compiler of its own has them."""
    manager = PassManager(name)
    for step in steps:
        manager.add_pass(step, step.__name__)
    manager.finalize()
    manager._ENFORCING = False  # it would analyse a function anew after each pass
    return [manager]


class KernelCompiler(CompilerBase):
    """From a Python function to LLVM IR, in the fewest steps."""

    def define_pipelines(self):
        """The passes, in order."""
        return pipelines("kernel", TranslateByteCode, FixupArgs, DecideBranches, ReconstructSSA, *TYPED)


def jit(function, inline=False):
    """A function for kernels: compiled as part of those that call it.

    Numba would compile it again for every integer constant that it is given somewhere; here constants are integers.
    `inline`: not left to LLVM, which calls what is large, and passes tiles through memory then.
    """
    dispatcher = njit(**OPTIONS, forceinline=inline, pipeline_class=KernelCompiler)(function)
    template = dispatcher.get_call_template
    dispatcher.get_call_template = lambda args, kws: template(tuple(types.unliteral(arg) for arg in args), kws)
    return dispatcher


def inline(function):
    """`jit`, for what is to be a part of its callers."""
    return jit(function, inline=True)
