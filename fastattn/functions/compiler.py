"""From a user's function to code that kernels call.

Numba makes its bytecode an intermediate representation; before types are given to it, what the user wrote is replaced
by what it means here: names of functions, operators, and what is captured. Nothing of the function is run in Python.
"""

import inspect
import operator
from collections import namedtuple
from types import FunctionType, ModuleType

import numpy as np
from numba import njit
from numba.core import cgutils, ir, types
from numba.core.compiler import CompilerBase
from numba.core.compiler_machinery import FunctionPass, register_pass
from numba.core.ir_utils import build_definitions, get_definition, guard
from numba.core.typing.templates import signature
from numba.core.untyped_passes import FixupArgs, IRProcessing, ReconstructSSA, TranslateByteCode
from numba.extending import intrinsic

from fastattn.functions import names
from fastattn.functions.captured import FLAG, captured, shape_of, size_of
from fastattn.functions.dual import real_of
from fastattn.functions.function import LATER
from fastattn.functions.meaning import Meaning
from fastattn.functions.operations import is_number
from fastattn.functions.refusals import (
    WORDS,
    CannotCompile,
    FindUnassigned,
    Refused,
    check_statements,
    number_in,
    refused,
    said_of,
    said_of_type,
)
from fastattn.simd.compiler import OPTIONS, TYPED, pipelines

__all__ = ["compiled", "reads_of"]

RECORD, FLAG_NAME = "$captured", "$flag"  # no variables of the user's: where what is captured is, and a flag


#: Expressions that stay what they are.
PLAIN = ("build_tuple", "exhaust_iter", "cast", "phi", "getiter", "iternext", "pair_first", "pair_second", "null")
#: What `clip` and its like take, besides a number.
PARAMETERS = {
    "clip": ("min", "max"),
    "masked_fill": ("mask", "value"),
    "full_like": ("fill_value",),
    "zeros_like": (),
    "ones_like": (),
}
NOT_PLAIN = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | LATER

# A function of a module that is several operations, by its name.
_Several = namedtuple("_Several", "name")
# A method of a number, which is in a variable.
_Method = namedtuple("_Method", "name owner")


# From Python functions to their `Meaning`, while they are compiled.
_meanings: dict[FunctionType, Meaning] = {}


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
        check_statements(function, python)
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
        if isinstance(value, (ir.Var, ir.Arg)) or value is ir.UNDEFINED:
            return [statement]
        raise CannotCompile(said_of(value), statement.loc)

    def _constant(self, statement):
        value = statement.value.value
        if isinstance(value, str) and self._is_made_a_number(statement.target):
            return self._unread(statement, value)
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if not (number is None or isinstance(number, (bool, int, float))):
                word = type(number).__name__
                raise CannotCompile(
                    f"{WORDS.get(word, f'a constant of type {word}')} has no meaning here", statement.loc
                )
            if isinstance(number, int) and not -(2**63) <= number < 2**63:
                raise CannotCompile(f"{number} is no whole number of 64 bits", statement.loc)
        if isinstance(value, float):
            dtype = np.float32 if self.meaning.real == types.float32 else np.float64
            with np.errstate(all="ignore"):
                statement.value = ir.Const(dtype(value), statement.loc)
        return statement

    def _name(self, statement, name, value):
        """A variable around the function: a module, a function, or what is captured."""
        if isinstance(value, ModuleType):
            return [statement]
        if value is None or isinstance(value, str):
            raise CannotCompile(f"{name} is {value!r}, which is no number here", statement.loc)
        if callable(value):
            found = names.meaning(value, name)
            if found is None and isinstance(value, FunctionType):
                return [self._defined(statement, ir.Global(name, helper(value, self.meaning), statement.loc))]
            return [self._meant(statement, name, found)]
        own = self.meaning.function.own_names[self.python, name]
        each = next(one for one in self.meaning.function.captured if one.name == own)
        place = self.meaning.function.place_of(own)
        found = captured(each, place, self.meaning.real, own if own in self.meaning.chosen else "")
        where = [self._variable(RECORD), self._variable(FLAG_NAME)]
        if each.axes != 0:
            return self._call(statement, found, where)
        array, nowhere = self._temporary(statement), self._temporary(statement)
        return [
            *self._call(ir.Assign(array, array, statement.loc), found, where),
            ir.Assign(ir.Expr.build_tuple([], statement.loc), nowhere, statement.loc),
            *self._call(statement, self.meaning.item(self.python, statement), [array, nowhere]),
        ]

    def _meant(self, statement, name, found):
        """A function of a module or of Python's own."""
        if found is None:
            raise CannotCompile(f"{WORDS.get(name, name)} has no meaning in a function of scores", statement.loc)
        kind, what = found
        if kind == "special":
            return self._unread(statement, _Several(what))
        # by a name of its own, as Numba looks after what Python's names stand for
        return self._defined(statement, ir.Global(f"${name}", self._operation(kind, what), statement.loc))

    def _defined(self, statement, value):
        """The statement with another value, by which what calls it knows what is called."""
        statement.value = value
        self.function._definitions[statement.target.name] = [value]
        return statement

    def _unread(self, statement, value):
        """The same with a value for those alone who look at the definition."""
        self._defined(statement, ir.Global("$unread", value, statement.loc))
        statement.value = ir.Const(None, statement.loc)  # which Numba can type; nobody reads it
        return statement

    def _operation(self, kind, what):
        operations = self.operations
        return {
            "function": operations.function,
            "operator": operations.binary,
            "logical": operations.logical,
            "unary": operations.unary,
            "extreme": lambda what: operations.extreme(*what),
            "conversion": operations.conversion,
            "whole": operations.whole,
            "where": lambda what: operations.where,
            "python": lambda what: what,
            "length": lambda what: size_of,
        }[kind](what)

    def _expression(self, statement, value):
        if value.op == "getattr":
            return self._attribute(statement, value)
        if value.op in ("binop", "inplace_binop"):
            function = value.immutable_fn if value.op == "inplace_binop" else value.fn
            return self._operator(statement, function, value.lhs, value.rhs)
        if value.op == "unary":
            return self._call(statement, self.operations.unary(value.fn), [value.value])
        if value.op == "getitem":
            return self._call(statement, self.meaning.item(self.python, statement), [value.value, value.index])
        if value.op == "static_getitem":
            return self._static_item(statement, value)
        if value.op == "call":
            return self._called(statement, value)
        if value.op in PLAIN:
            return [statement]
        raise CannotCompile(said_of(value), statement.loc)

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
        if not isinstance(module, ModuleType):
            if value.attr == "shape":
                return self._call(statement, shape_of, [value.value])
            if value.attr == "dtype":
                return [self._meant(statement, value.attr, ("conversion", "same"))]
            if value.attr not in names.KEEPING and names.method(value.attr) is None:
                raise CannotCompile(f".{value.attr} of what is no module has no meaning here", statement.loc)
            return [self._unread(statement, _Method(value.attr, value.value))]
        found = getattr(module, value.attr, None)
        if isinstance(found, ModuleType):
            if not names.module_of(found.__name__):
                raise CannotCompile(
                    f"the module {found.__name__} has no meaning in a function of scores", statement.loc
                )
            return [self._defined(statement, ir.Global(value.attr, found, statement.loc))]
        if value.attr in names.CONSTANTS and isinstance(found, float):
            statement.value = ir.Const(found, statement.loc)
            return [self._constant(statement)]
        name = f"{module.__name__}.{value.attr}"
        return [self._meant(statement, name, names.meaning(found, value.attr))]

    def _static_item(self, statement, value):
        if value.index_var is not None:
            return self._call(statement, self.meaning.item(self.python, statement), [value.value, value.index_var])
        variable = self._temporary(statement)
        return [
            ir.Assign(ir.Const(value.index, statement.loc), variable, statement.loc),
            *self._call(statement, self.meaning.item(self.python, statement), [value.value, variable]),
        ]

    def _called(self, statement, value):
        target = self._known(value.func)
        if value.vararg is not None or value.varkwarg is not None:
            raise CannotCompile("arguments by * or ** have no meaning here", statement.loc)
        if isinstance(target, _Method):
            return self._method(statement, *target, value)
        if isinstance(target, _Several):
            return self._special(statement, target.name, value)
        if target is self._operation("conversion", "real") and value.args:
            text = self._known(value.args[0])
            if isinstance(text, str):
                statement.value = ir.Const(number_in(text, statement.loc), statement.loc)
                return [self._constant(statement)]
        if value.kws:
            given = ", ".join(name for name, _ in value.kws)
            raise CannotCompile(f"an argument by keyword, {given}, has no meaning here", statement.loc)
        if hasattr(target, "python"):
            return self._helped(statement, target.python, value)
        if target is range and len(value.args) == 3:
            step = guard(get_definition, self.function, value.args[2])
            if not (isinstance(step, ir.Const) and step.value):
                raise CannotCompile("a range with a step that is no constant, or 0, has no meaning here", statement.loc)
        if len(value.args) > 2 and target in (
            self.operations.extreme("first", ">"),
            self.operations.extreme("first", "<"),
        ):
            return self._folded(statement, [(target, other) for other in value.args[1:]], value.args[0])
        if hasattr(target, "_defn") and len(value.args) != target._defn.__code__.co_argcount - 1:
            raise CannotCompile(f"a function with {len(value.args)} arguments has no meaning here", statement.loc)
        return [statement]

    def _known(self, variable):
        """What a variable stands for, if that is one thing and known."""
        found = guard(get_definition, self.function, variable)
        return found.value if isinstance(found, (ir.Global, ir.FreeVar)) else None

    def _is_made_a_number(self, variable):
        """Whether a string is what float is given."""
        for block in self.function.blocks.values():
            for call in block.find_exprs(op="call"):
                if call.args and call.args[0].name == variable.name:
                    return self._known(call.func) in (float, self._operation("conversion", "real"))
        return False

    def _method(self, statement, name, owner, value):
        """A method of a number is torch's function of that name, or makes it one of another dtype."""
        given = [*value.args, *(argument for _, argument in value.kws)]
        if name in names.KEEPING:
            if not given:
                statement.value = owner
                return [statement]
            conversions = {self._operation("conversion", kind) for kind in names.CONVERSIONS.values()}
            if len(given) > 1 or self._known(given[0]) not in conversions:
                raise CannotCompile(f".{name} of what is no dtype has no meaning here", statement.loc)
            return self._call(statement, self._known(given[0]), [owner])
        function = ir.Assign(ir.Const(None, statement.loc), self._temporary(statement), statement.loc)
        function = self._meant(function, name, names.method(name))
        value.func, value.args = function.target, (owner, *value.args)
        return [function, *self._called(statement, value)]

    def _helped(self, statement, python, value):
        """A call of another function of the user's."""
        code, count = python.__code__, len(value.args)
        if code.co_argcount != count or code.co_kwonlyargcount or code.co_flags & NOT_PLAIN:
            what = f"{python.__name__} cannot be called with {count} arguments by position, or is no plain function"
            raise CannotCompile(what, statement.loc)
        variable = self._temporary(statement)
        given = [*value.args, self._variable(RECORD), self._variable(FLAG_NAME)]
        value.args = (variable,)
        return [ir.Assign(ir.Expr.build_tuple(given, statement.loc), variable, statement.loc), statement]

    def _special(self, statement, name, value):
        """Functions that are several operations."""
        allowed = ("x", *PARAMETERS[name])
        given = dict(zip(allowed, value.args, strict=False))
        for word, variable in value.kws:
            known = word.removeprefix("a_")
            if known not in allowed[1:] or known in given:
                raise CannotCompile(f"an argument by keyword, {word}, has no meaning here", statement.loc)
            given[known] = variable
        if len(value.args) > len(allowed) or "x" not in given or self._lacks(name, given):
            raise CannotCompile(f"{name} with {len(given)} arguments has no meaning here", statement.loc)
        if name == "masked_fill":
            return self._call(statement, self.operations.where, [given["mask"], given["value"], given["x"]])
        if name == "clip":
            extreme = self.operations.extreme
            steps = [
                (extreme("nan", sign), given[bound]) for bound, sign in (("min", ">"), ("max", "<")) if bound in given
            ]
            return self._folded(statement, [step for step in steps if not self._is_none(step[1])], given["x"])
        number = given["fill_value"] if name == "full_like" else 0.0 if name == "zeros_like" else 1.0
        statement.value = number if isinstance(number, ir.Var) else ir.Const(number, statement.loc)
        return [statement if isinstance(number, ir.Var) else self._constant(statement)]

    @staticmethod
    def _lacks(name, given):
        """Whether something is missing that has no default."""
        return name in ("masked_fill", "full_like") and not all(word in given for word in PARAMETERS[name])

    def _is_none(self, variable):
        found = guard(get_definition, self.function, variable)
        return isinstance(found, ir.Const) and found.value is None

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


class _Compiler(CompilerBase):
    def define_pipelines(self):
        """The passes, in order."""
        return pipelines(
            "function",
            TranslateByteCode,
            GiveMeaning,
            FixupArgs,
            IRProcessing,
            ReconstructSSA,
            FindUnassigned,
            *TYPED,
        )


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

    call.python = python
    return call


def _compile(python, meaning, arguments):
    """Numba's result of compiling a Python function for arguments of these types.

    Raises
    ------
    Refused
        If that cannot be done: with the line of the user's where it cannot.
    """
    before = _meanings.get(python)
    _meanings[python] = meaning
    try:
        dispatcher = njit(**OPTIONS, pipeline_class=_Compiler)(python)
        result = dispatcher._compiler._compile_core(arguments, None)
        returned = result.signature.return_type
        if python is meaning.function.python and not is_number(returned):
            raise CannotCompile(f"it returns {said_of_type(returned)}, or does on some way; expected a number")
        return result
    except (Refused, MemoryError):
        raise
    except Exception as error:
        raise refused(meaning.function.label, python, error) from error
    finally:
        if before is None:
            del _meanings[python]
        else:
            _meanings[python] = before


def reads_of(function, dtype, names):
    """Where a function of scores reads elements of captured arrays: pairs of a name and a place, for `compiled`."""
    meaning = Meaning(function, real_of(dtype), names)
    _compile(function.python, meaning, (meaning.real, *[types.int64] * 5, FLAG))
    return meaning.reads


def compiled(function, dtype, chosen=(), place=None):
    """A function of a tuple for kernels: the user's arguments, where what is captured is, and a flag.

    Scores are of a dtype, or dual numbers of it. With the name of a captured array, and a place where it is read, what
    is returned is a dual number.
    """
    return helper(function.python, Meaning(function, real_of(dtype), chosen, place))
