"""From a user's function to code that kernels call.

Numba makes its bytecode an intermediate representation; before types are given to it, what the user wrote is replaced
by what it means here: names of functions, operators, and what is captured. Nothing of the function is run in Python.
"""

import builtins
import linecache
import operator
from functools import cache, reduce
from types import FunctionType, ModuleType

import numpy as np
from numba import njit
from numba.core import cgutils, ir, types
from numba.core.compiler import CompilerBase
from numba.core.compiler_machinery import FunctionPass, PassManager, register_pass
from numba.core.errors import NumbaError
from numba.core.ir_utils import build_definitions, get_definition, guard
from numba.core.typed_passes import NativeLowering, NoPythonBackend, NopythonTypeInference, PreLowerStripPhis
from numba.core.typing.templates import signature
from numba.core.untyped_passes import FixupArgs, IRProcessing, ReconstructSSA, TranslateByteCode
from numba.extending import intrinsic

from fastattn.functions import names
from fastattn.functions.captured import ArrayType, captured, item_at, length
from fastattn.functions.operations import Operations

__all__ = ["compiled"]

RECORD, FLAG_NAME = "$captured", "$flag"  # no variables of the user's: where what is captured is, and a flag


class CannotCompile(Exception):
    """What the user wrote has no meaning here."""


class Meaning:
    """What the words of one function mean, where calls compute in one dtype.

    `chosen` is an array that the function is differentiated by, and `place` which of the places where something is
    indexed, in the order in which they are compiled, is looked at.
    """

    def __init__(self, function, real, chosen=None, place=-1):
        self.function = function
        self.real = real
        self.chosen, self.place = chosen, place
        self.operations = operations_of(real)
        self._places = {}

    def item(self, python, statement):
        """What indexes a captured array, at this place in a function."""
        number = self._places.setdefault((python, statement.target.name), len(self._places))
        return item_at(self.real, number == self.place)


@cache
def operations_of(real):
    """The operations of calls that compute in one dtype."""
    return Operations(real)


# From Python functions to their `Meaning`, while they are compiled.
_meanings = {}


@register_pass(mutates_CFG=True, analysis_only=False)
class GiveMeaning(FunctionPass):
    """Replace names, operators and captured values by what they mean."""

    _name = "give_meaning"

    def __init__(self):
        FunctionPass.__init__(self)

    def run_pass(self, state):
        """The pass itself, as Numba's pass manager calls it."""
        function = state.func_ir
        python = function.func_id.func
        rewriter = _Rewriter(function, _meanings[python], python)
        rewriter.add_arguments()
        for block in function.blocks.values():
            block.body = [new for statement in block.body for new in rewriter.rewritten(statement)]
        function._definitions = build_definitions(function.blocks)
        state.typingctx.refresh()  # for the intrinsics that were made meanwhile
        return True


class _Rewriter:
    """Goes through the statements of one function."""

    def __init__(self, function, meaning, python):
        self.function, self.meaning, self.python = function, meaning, python
        self.operations = meaning.operations
        self.temporaries = 0
        self.several = {}  # by variables: functions that are several operations

    def add_arguments(self):
        """Two arguments more than the user's: where what is captured is, and a flag."""
        function = self.function
        first = function.blocks[min(function.blocks)]
        for name in (RECORD, FLAG_NAME):
            index, variable = function.arg_count, ir.Var(first.scope, name, function.loc)
            first.scope.localvars.define(name, variable)
            function.arg_names = (*function.arg_names, name)
            function.arg_count += 1
            first.body.insert(0, ir.Assign(ir.Arg(name, index, function.loc), variable, function.loc))

    def rewritten(self, statement):
        """The statements that one becomes."""
        if not isinstance(statement, ir.Assign):
            return [statement]
        value = statement.value
        if isinstance(value, ir.Const):
            return [self._constant(statement)]
        if isinstance(value, (ir.Global, ir.FreeVar)):
            return self._name(statement, value.name, value.value)
        if isinstance(value, ir.Expr):
            return self._expression(statement, value)
        return [statement]

    def _constant(self, statement):
        value = statement.value.value
        if isinstance(value, float):
            dtype = np.float32 if self.meaning.real == types.float32 else np.float64
            with np.errstate(all="ignore"):
                statement.value = ir.Const(dtype(value), statement.loc)
        return statement

    def _name(self, statement, name, value):
        """A variable around the function: a module, a function, or what is captured."""
        if isinstance(value, ModuleType) or value is None or isinstance(value, str):
            return [statement]
        if isinstance(value, FunctionType) and not _is_of_module(value):
            statement.value = ir.Global(name, helper(value, self.meaning), statement.loc)
            return [statement]
        if callable(value):
            return [self._meant(statement, getattr(value, "__name__", name), value)]
        own = next(each for each in self._own_names(name, value))
        each = next(one for one in self.meaning.function.captured if one.name == own)
        found = captured(each, self.meaning.function.place_of(own), own == self.meaning.chosen)
        return self._call(statement, found, [self._variable(RECORD), self._variable(FLAG_NAME)])

    def _own_names(self, name, value):
        """A helper may capture another variable of the same name."""
        captured_names = {each.name for each in self.meaning.function.captured}
        own = f"{name} of {self.python.__name__}"
        if own in captured_names:
            yield own
        yield name

    def _meant(self, statement, name, value):
        """A function of a module or of Python's own."""
        found = names.meaning(name)
        if found is None:
            if value in (range, len, tuple):
                statement.value = ir.Global(name, _length if value is len else value, statement.loc)
                return statement
            raise CannotCompile(f"{name} has no meaning in a function of scores", statement.loc)
        kind, what = found
        if kind == "special" and what != "where":
            self.several[statement.target.name] = what
            statement.value = ir.Const(None, statement.loc)
            return statement
        statement.value = ir.Global(name, self._operation(kind, what, statement.loc), statement.loc)
        return statement

    def _operation(self, kind, what, loc):
        operations = self.operations
        if kind == "function":
            return operations.function(what)
        if kind == "operator":
            return operations.binary(what)
        if kind == "unary":
            return operations.unary(what)
        if kind == "extreme":
            return operations.extreme(what)
        if kind == "conversion":
            return operations.conversion({"real": self.meaning.real, "int": types.int64, "bool": types.boolean}[what])
        return operations.where

    def _expression(self, statement, value):
        if value.op == "getattr":
            return self._attribute(statement, value)
        if value.op in ("binop", "inplace_binop"):
            function = value.immutable_fn if value.op == "inplace_binop" else value.fn
            return self._operator(statement, function, value.lhs, value.rhs)
        if value.op == "unary":
            operation = self.operations.unary(value.fn)
            return [statement] if operation is None else self._call(statement, operation, [value.value])
        if value.op == "getitem":
            return self._call(statement, self.meaning.item(self.python, statement), [value.value, value.index])
        if value.op == "static_getitem":
            return self._static_item(statement, value)
        if value.op == "call":
            return self._called(statement, value)
        return [statement]

    def _operator(self, statement, function, lhs, rhs):
        if function is operator.pow:
            power = guard(get_definition, self.function, rhs)
            if isinstance(power, ir.Const) and power.value in (1, 2, 3, 4):
                return self._powers(statement, lhs, int(power.value))
        operation = self.operations.binary(function)
        if operation is None:
            sign = getattr(function, "__name__", str(function))
            raise CannotCompile(f"the operator {sign} has no meaning in a function of scores", statement.loc)
        return self._call(statement, operation, [lhs, rhs])

    def _powers(self, statement, base, count):
        """A power of a small whole number is products."""
        if count == 1:
            statement.value = base
            return [statement]
        return self._folded(statement, [(self.operations.binary(operator.mul), base)] * (count - 1), base)

    def _attribute(self, statement, value):
        owner = guard(get_definition, self.function, value.value)
        module = getattr(owner, "value", None) if isinstance(owner, (ir.Global, ir.FreeVar)) else None
        if isinstance(owner, ir.Expr) and owner.op == "getattr":  # torch.nn.functional
            module = getattr(owner, "module", None)
        if not isinstance(module, ModuleType):
            if value.attr == "shape":
                return self._call(statement, _shape, [value.value])
            return [statement]
        found = getattr(module, value.attr, None)
        if isinstance(found, ModuleType):
            value.module = found
            statement.value = ir.Global(value.attr, found, statement.loc)
            return [statement]
        if value.attr in names.CONSTANTS:
            statement.value = ir.Const(names.CONSTANTS[value.attr], statement.loc)
            return [self._constant(statement)]
        return [self._meant(statement, value.attr, found)]

    def _static_item(self, statement, value):
        if value.index_var is not None:
            return self._call(statement, self.meaning.item(self.python, statement), [value.value, value.index_var])
        variable = self._temporary(statement)
        return [
            ir.Assign(ir.Const(value.index, statement.loc), variable, statement.loc),
            *self._call(statement, self.meaning.item(self.python, statement), [value.value, variable]),
        ]

    def _called(self, statement, value):
        function = guard(get_definition, self.function, value.func)
        target = getattr(function, "value", None)
        if value.func.name in self.several:
            return self._special(statement, self.several[value.func.name], value)
        if value.kws:
            raise CannotCompile(f"arguments by keyword: {', '.join(name for name, _ in value.kws)}", statement.loc)
        if getattr(target, "is_helper", False):
            variable = self._temporary(statement)
            given = [*value.args, self._variable(RECORD), self._variable(FLAG_NAME)]
            value.args = (variable,)
            return [ir.Assign(ir.Expr.build_tuple(given, statement.loc), variable, statement.loc), statement]
        if len(value.args) > 2 and target in (self.operations.extreme(">"), self.operations.extreme("<")):
            return self._folded(statement, [(target, other) for other in value.args[1:]], value.args[0])
        return [statement]

    def _special(self, statement, name, value):
        """Functions that are several operations."""
        given = {**dict(zip(("x", "min", "max"), value.args, strict=False)), **dict(value.kws)}
        if name == "clip":
            low = given.get("min", given.get("a_min"))
            high = given.get("max", given.get("a_max"))
            steps = [(self.operations.extreme(relation), bound) for bound, relation in ((low, ">"), (high, "<"))]
            return self._folded(statement, [step for step in steps if step[1] is not None], given["x"])
        number = given["min"] if name == "full_like" else 0.0 if name == "zeros_like" else 1.0
        statement.value = number if isinstance(number, ir.Var) else ir.Const(number, statement.loc)
        return [statement if isinstance(number, ir.Var) else self._constant(statement)]

    def _folded(self, statement, steps, total):
        """The statement with functions as its value that are called one after the other: f(f(total, other), other)."""
        made = []
        for function, other in steps:
            variable = self._temporary(statement)
            made += self._call(ir.Assign(total, variable, statement.loc), function, [total, other])
            total = variable
        statement.value = total
        return [*made, statement]

    def _call(self, statement, function, arguments):
        """The statement with a call of one of our own functions as its value."""
        variable = self._temporary(statement)
        loc = statement.loc
        statement.value = ir.Expr.call(variable, tuple(arguments), (), loc)
        return [ir.Assign(ir.Global(variable.name, function, loc), variable, loc), statement]

    def _temporary(self, statement):
        self.temporaries += 1
        scope = statement.target.scope
        return scope.define(f"$own{self.temporaries}", statement.loc)

    def _variable(self, name):
        first = self.function.blocks[min(self.function.blocks)]
        return first.scope.get_exact(name)


@intrinsic
def _length(typingctx, array):
    """The size of the first axis."""
    if not isinstance(array, ArrayType):
        return None

    def codegen(context, builder, sig, values):
        find = length._defn(typingctx, array, types.int64)[1]
        return find(context, builder, None, [values[0], context.get_constant(types.int64, 0)])

    return signature(types.int64, array), codegen


@intrinsic
def _shape(typingctx, array):
    """The sizes of all axes."""
    if not isinstance(array, ArrayType):
        return None
    ty = types.UniTuple(types.int64, array.axes)

    def codegen(context, builder, sig, values):
        find = length._defn(typingctx, array, types.int64)[1]
        sizes = [
            find(context, builder, None, [values[0], context.get_constant(types.int64, axis)])
            for axis in range(array.axes)
        ]
        return context.make_tuple(builder, ty, sizes)

    return signature(ty, array), codegen


def _is_of_module(value):
    return (value.__module__ or "").partition(".")[0] in ("numpy", "torch", "jax", "math", "builtins")


class _Compiler(CompilerBase):
    def define_pipelines(self):
        """The passes, in order."""
        manager = PassManager("function")
        for step in (
            TranslateByteCode,
            GiveMeaning,
            FixupArgs,
            IRProcessing,
            ReconstructSSA,
            NopythonTypeInference,
            PreLowerStripPhis,
            NativeLowering,
            NoPythonBackend,
        ):
            manager.add_pass(step, step.__name__)
        manager.finalize()
        manager._ENFORCING = False
        return [manager]


def helper(python, meaning):
    """An intrinsic that calls a Python function, compiled for the types that it is given."""

    @intrinsic
    def call(typingctx, arguments):
        compiled = _compile(python, meaning, tuple(arguments))

        def codegen(context, builder, sig, values):
            given = cgutils.unpack_tuple(builder, values[0])
            context.active_code_library.add_linking_library(compiled.library)
            inner = signature(compiled.signature.return_type, *arguments)
            return context.call_internal(builder, compiled.fndesc, inner, given)

        return signature(compiled.signature.return_type, arguments), codegen

    call.is_helper = True
    return call


def _compile(python, meaning, arguments):
    """Numba's result of compiling a Python function for arguments of these types."""
    before = _meanings.get(python)
    _meanings[python] = meaning
    try:
        dispatcher = njit(
            error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, pipeline_class=_Compiler
        )(python)
        return dispatcher._compiler._compile_core(arguments, None)
    finally:
        if before is None:
            del _meanings[python]
        else:
            _meanings[python] = before


def compiled(function, dtype, chosen=None, place=-1):
    """A function of a tuple for kernels: the user's arguments, where what is captured is, and a flag.

    Scores are of a dtype, or dual numbers of it. With the name of a captured array, and one of the places where the
    function indexes something, what is returned is a dual number if that array was read there.
    """
    real = types.float32 if dtype == "float32" else types.float64
    return helper(function.python, Meaning(function, real, chosen, place))
