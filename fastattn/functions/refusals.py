"""What a user's function has that cannot be compiled, said to whoever wrote it: which line it is, and what is wrong."""

import dis
import linecache
import re

from numba.core import ir, types
from numba.core.compiler_machinery import FunctionPass, register_pass

from fastattn.functions.captured import ArrayType

__all__ = [
    "WORDS",
    "CannotCompile",
    "FindUnassigned",
    "Refused",
    "check_statements",
    "refused",
    "said_of",
    "said_of_type",
]

#: What others are, and statements, to whoever wrote them.
WORDS = {
    "build_list": "a list",
    "build_set": "a set",
    "build_map": "a dictionary",
    "build_slice": "a slice",
    "make_function": "a function that is made inside of one, or a generator,",
    "inplace_binop": "an operator",
    "Raise": "raise, or assert,",
    "StaticRaise": "raise, or assert,",
    "DynamicRaise": "raise, or assert,",
    "TryRaise": "raise, or assert,",
    "StaticTryRaise": "raise, or assert,",
    "DynamicTryRaise": "raise, or assert,",
    "SetItem": "an assignment to an element",
    "StaticSetItem": "an assignment to an element",
    "DelItem": "del of an element",
    "SetAttr": "an assignment to an attribute",
    "DelAttr": "del of an attribute",
    "StoreMap": "a dictionary",
    "EnterWith": "with",
    "PopBlock": "with, or try,",
    "Yield": "yield",
    "Print": "print",
    "mark_try_block": "try",
    "code": "a function that is made inside of one, or a generator,",
}


#: Instructions that change what stands around a function.
STORES = ("STORE_DEREF", "DELETE_DEREF", "STORE_GLOBAL", "DELETE_GLOBAL")


class CannotCompile(Exception):
    """What the user wrote has no meaning here, and where that is."""

    def __init__(self, what, loc=None):
        super().__init__(what)
        self.loc = loc


class Refused(TypeError):
    """The same, as users see it."""


def number_in(text, loc):
    """The number that a string says, as float("inf")."""
    try:
        return float(text)
    except ValueError as error:
        raise CannotCompile(f"{text!r} is no number", loc) from error


def check_statements(function, python):
    """Refuse what is no computation of a number, before anything else of the line is looked at."""
    code = python.__code__
    for step in dis.get_instructions(python):
        if step.opname in STORES and (step.argval in code.co_freevars or "GLOBAL" in step.opname):
            line = next(line for start, end, line in code.co_lines() if start <= step.offset < end)
            what = f"an assignment to {step.argval}, outside of the function, has no meaning here"
            raise CannotCompile(what, ir.Loc(code.co_filename, line))
    for block in function.blocks.values():
        for statement in block.body:
            if not isinstance(statement, (ir.Assign, ir.Jump, ir.Branch, ir.Return, ir.Del)):
                raise CannotCompile(said_of(statement), statement.loc)


@register_pass(mutates_CFG=False, analysis_only=True)
class FindUnassigned(FunctionPass):
    """Refuse a variable that has no value where it is read, on some way there."""

    _name = "find_unassigned"

    def __init__(self):
        FunctionPass.__init__(self)

    def run_pass(self, state):
        """The pass itself, as Numba's pass manager calls it."""
        for block in state.func_ir.blocks.values():
            for statement in block.body:
                value = getattr(statement, "value", None)
                if isinstance(value, ir.Expr) and value.op == "phi" and ir.UNDEFINED in value.incoming_values:
                    name = statement.target.unversioned_name
                    raise CannotCompile(f"{name} may have no value there", statement.loc)
        return False


def said_of(node):
    """What has no meaning, in words."""
    word = getattr(node, "op", type(node).__name__)
    return f"{WORDS.get(word, word)} has no meaning in a function of scores"


def refused(label, python, error):
    """What a user gets to see of an error while a function was compiled; `label` is the function that was given."""
    return Refused(f"{label}{_where(python, error)}: {_why(error)}")


def _where(python, error):
    """Which line it was, as far as that is known, and what stands there."""
    code, loc = python.__code__, getattr(error, "loc", None)
    own = {line for *_, line in code.co_lines() if line}
    line = loc.line if loc is not None and loc.line in own else code.co_firstlineno
    text = linecache.getline(code.co_filename, line).strip()
    return f", line {line} of {code.co_filename}" + (f", {text!r}" if text else "")


def _why(error):
    """What an error in compiling says to who wrote the function."""
    if isinstance(error, CannotCompile):
        return str(error)
    found = re.search(r">>> [^(\n]*\((.*)\)", str(error))
    if found:
        return f"an operation has no meaning for {found[1] or 'no arguments'}"
    lines = [line.strip() for line in str(getattr(error, "msg", error)).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("Failed in", "File ", "During", "[1]"))]
    return f"it cannot be compiled: {lines[0] if lines else type(error).__name__}"


def said_of_type(ty):
    """What a type is to who wrote the function."""
    if isinstance(ty, (types.NoneType, types.Optional)):
        return "nothing"
    return (
        "a captured array" if isinstance(ty, ArrayType) else "a tuple" if isinstance(ty, types.BaseTuple) else str(ty)
    )
