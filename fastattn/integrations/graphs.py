"""ONNX graphs of operators that work on each element by itself, as functions in Python.

A graph is given the matrix of scores or weights of each head, and returns it changed. What it computes is read operator
by operator. What the matrix takes part in becomes a formula of an element and its place. What it does not take part in
is computed at once, by ONNX's own evaluator, unless an operator that works on each element by itself would make
something larger of what it is given, as where positions of queries and of keys meet: this becomes a formula, too. The
function that is returned consists of formulas. It is written with NumPy's names, and is called with one element and its
place, or with arrays of both that broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any, TypeAlias

import numpy as np
import onnx

from fastattn.call.problem import Array, Shape
from fastattn.integrations.nodes import in_wider_type

__all__ = ["Function", "function_of"]

#: Of an element, and the numbers of its batch row, head, query and key: what becomes of it.
Function: TypeAlias = Callable[..., Any]

PLACES = ("batch", "head", "query", "key")
#: What an element is called.
ELEMENTS = {"score_mod": "score", "prob_mod": "weight"}

#: Operators as Python, of the names of their inputs.
FORMULAS = {
    "Abs": "np.abs({0})",
    "Add": "{0} + {1}",
    "And": "{0} & {1}",
    "Ceil": "np.ceil({0})",
    "Cos": "np.cos({0})",
    "Div": "{0} / {1}",
    "Equal": "{0} == {1}",
    "Exp": "np.exp({0})",
    "Floor": "np.floor({0})",
    "Greater": "{0} > {1}",
    "GreaterOrEqual": "{0} >= {1}",
    "Identity": "{0}",
    "IsNaN": "{0} != {0}",
    "Less": "{0} < {1}",
    "LessOrEqual": "{0} <= {1}",
    "Log": "np.log({0})",
    "Max": "np.maximum({0}, {1})",
    "Min": "np.minimum({0}, {1})",
    "Mod": "{0} % {1}",
    "Mul": "{0} * {1}",
    "Neg": "-{0}",
    "Not": "np.logical_not({0})",
    "Or": "{0} | {1}",
    "Pow": "{0} ** {1}",
    "Reciprocal": "1 / {0}",
    "Relu": "np.maximum({0}, 0)",
    "Sigmoid": "1 / (1 + np.exp(-{0}))",
    "Sign": "np.sign({0})",
    "Sin": "np.sin({0})",
    "Sqrt": "np.sqrt({0})",
    "Sub": "{0} - {1}",
    "Sum": "{0} + {1}",
    "Tanh": "np.tanh({0})",
    "Where": "np.where({0}, {1}, {2})",
    "Xor": "{0} ^ {1}",
}
VARIADIC = ("Max", "Min", "Sum")  # take any number of inputs
BOOLEAN = ("And", "Equal", "Greater", "GreaterOrEqual", "IsNaN", "Less", "LessOrEqual", "Not", "Or", "Xor")
# the quotient of integers has no fraction, whatever its sign: Python's is that of the next lower integer
TRUNCATED = "{0} // {1} + (({0} % {1} != 0) & (({0} < 0) != ({1} < 0)))"


@dataclass(frozen=True, eq=False)
class Value:
    """What a name in a graph stands for.

    Attributes
    ----------
    shape : tuple of int
    dtype : numpy.dtype
        ONNX's. What a function computes with may be wider.
    array : ndarray, optional
        Its elements, where these are known.
    formula : str
        Else Python for an element, of the names of those of `inputs`.
    inputs : tuple of Value
    changes : bool
        Whether the matrix takes part in it.
    """

    shape: Shape
    dtype: np.dtype[Any]
    array: Array | None = None
    formula: str = ""
    inputs: tuple[Value, ...] = ()
    changes: bool = False

    @classmethod
    def known(cls, array: Array) -> Value:
        """Return what is known: an array."""
        array = np.asarray(array)
        return cls(array.shape, array.dtype, array)


def function_of(name: str, graph: Any, shape: Shape, dtype: np.dtype[Any], outer: Mapping[str, Any]) -> Function:
    """Return what a graph does to a matrix as a function of an element and its place.

    Parameters
    ----------
    name : {"score_mod", "prob_mod"}
        Of the attribute, for messages, and of the function.
    graph : onnx.reference.ReferenceEvaluator
        Of the graph, with one input and one output.
    shape : tuple of int
        (B, Hq, Lq, Lk), that of the matrix.
    dtype : numpy.dtype
        What the matrix is computed in.
    outer : mapping of str to ndarray
        What the graphs around this one have computed.

    Returns
    -------
    function
        Of an element, and of the numbers of its batch row, head, query and key. What it captures is arrays, whose axes
        are some of these four, and numbers.

    Raises
    ------
    ValueError
        If it is no such graph, or has an operator that does not work on each element by itself.
    """
    if len(graph.input_names) != 1 or len(graph.output_names) != 1:
        raise ValueError(
            f"{name}: a graph of {len(graph.input_names)} inputs and {len(graph.output_names)} outputs; "
            "expected one of each"
        )
    matrix = Value(shape, dtype, formula=ELEMENTS[name], changes=True)
    return _Translation(name, matrix).of_graph(graph, outer)


class _Translation:
    """The values of a graph's names, and the formulas among them in the order in which they can be computed."""

    def __init__(self, name: str, matrix: Value) -> None:
        self.name, self.matrix = name, matrix
        self.formulas = [matrix]

    def of_graph(self, graph: Any, outer: Mapping[str, Any]) -> Function:
        """Go through a graph's operators, and return its function."""
        values = {name: Value.known(array) for name, array in outer.items() if isinstance(array, np.ndarray)}
        values |= {name: Value.known(array) for name, array in graph.rt_inits_.items()}
        values[graph.input_names[0]] = self.matrix
        for node in graph.rt_nodes_:
            for name in node.input:
                if name and name not in values:
                    raise ValueError(f"{self.name}: {node.op_type} of {name}, which nothing computes")
            inputs = [values[name] if name else None for name in node.input]
            values |= zip(node.output, self.outputs(node, inputs), strict=False)
        result = values[graph.output_names[0]]
        if result.shape != self.matrix.shape:
            raise ValueError(
                f"{self.name}: a result of shape {result.shape}; expected {self.matrix.shape}, its input's"
            )
        return self.function(result)

    def outputs(self, node: Any, inputs: list[Value | None]) -> list[Value]:
        """Return the outputs of an operator."""
        given = [value for value in inputs if value is not None]
        formula = _formula(node, inputs)
        if formula is not None:
            shape = self.shape(node, given)
            if any(value.array is None for value in given) or _grows(shape, given):
                return [self.add(_dtype(node, given), shape, formula, given)]
        elif node.op_type in ("Shape", "Size"):
            given = [Value.known(np.broadcast_to(np.zeros((), value.dtype), value.shape)) for value in given]
            inputs = [*given]
        if node.need_context() or node.has_linked_attribute or any(value.changes for value in given):
            raise ValueError(
                f"{self.name}: operator {node.op_type}; expected operators that work on each element by itself, "
                "such as Add, Tanh and Where, and others only for what does not depend on the input"
            )
        return [Value.known(array) for array in node.run(*(value and self.array(value) for value in inputs))]

    def shape(self, node: Any, given: list[Value]) -> Shape:
        """Return the shape of what an operator makes of each element: that of the matrix, if this takes part."""
        shapes = [value.shape for value in given]
        shape: Shape | None
        try:
            shape = np.broadcast_shapes(*shapes)
        except ValueError:
            shape = None
        if shape is None or (any(value.changes for value in given) and shape != self.matrix.shape):
            raise ValueError(
                f"{self.name}: {node.op_type} of shapes {', '.join(map(str, shapes))}; expected some that broadcast to "
                f"{self.matrix.shape}"
            )
        return shape

    def add(self, dtype: np.dtype[Any], shape: Shape, formula: str, given: list[Value]) -> Value:
        """Return a formula, which is computed after those that there are."""
        value = Value(shape, dtype, None, formula, tuple(given), any(value.changes for value in given))
        self.formulas.append(value)
        return value

    def array(self, value: Value) -> Array:
        """Return the elements of what does not depend on the matrix."""
        if value.array is not None:
            return value.array
        full = (1,) * (len(PLACES) - len(value.shape)) + value.shape
        with np.errstate(all="ignore"):
            found = np.asarray(self.function(value)(None, *np.ix_(*map(range, full))))
        return np.broadcast_to(found, full).reshape(value.shape).astype(value.dtype)

    def function(self, result: Value) -> Function:
        """Return a function of a formula, and of those that it is made of."""
        needed = {result}
        for value in reversed(self.formulas):
            needed |= {*value.inputs} if value in needed else set()
        names = {self.matrix: self.matrix.formula}
        captured: dict[str, Any] = {}
        lines: list[str] = []
        for value in self.formulas[1:]:
            if value in needed:
                names |= {each: _term(each.array, captured) for each in value.inputs if each not in names}
                lines.append(f"v{len(lines)} = {value.formula.format(*(names[each] for each in value.inputs))}")
                names[value] = f"v{len(lines) - 1}"
        returned = names[result] if result in names else _term(result.array, captured)
        body = "\n        ".join((*lines, f"return {returned}"))
        head = f"def {self.name}({', '.join((self.matrix.formula, *PLACES))}):"
        source = f"def made({', '.join(captured)}):\n    {head}\n        {body}\n    return {self.name}\n"
        function: Function = _maker(source)(**captured)
        return function


@lru_cache(maxsize=256)
def _maker(source: str) -> Callable[..., Function]:
    """Return the function that a source defines, of what is captured."""
    names: dict[str, Any] = {"np": np}
    exec(compile(source, "<ONNX graph>", "exec"), names)
    made: Callable[..., Function] = names["made"]
    return made


def _term(array: Array | None, captured: dict[str, Any]) -> str:
    """Return Python for an element of a known array; what that reads is added to what is captured."""
    assert array is not None
    array = in_wider_type(array)
    if array.size == 1:
        name = f"number{len(captured)}"
        captured[name] = array.item()
        return name
    shape = (1,) * (len(PLACES) - array.ndim) + array.shape
    axes = [axis for axis, length in enumerate(shape) if length != 1]
    if len(axes) == 1 and array.dtype.kind in "iu" and (array.reshape(-1) == np.arange(array.size)).all():
        return PLACES[axes[0]]
    name = f"table{len(captured)}"
    captured[name] = array.squeeze()
    return f"{name}[{', '.join(PLACES[axis] for axis in axes)}]"


def _grows(shape: Shape, given: list[Value]) -> bool:
    """Whether an array of a shape is larger than what it is made of, and has no more axes than a matrix."""
    return len(shape) <= len(PLACES) and math.prod(shape) > max((math.prod(value.shape) for value in given), default=0)


def _formula(node: Any, inputs: list[Value | None]) -> str | None:
    """Return Python for what an operator makes of each element; None for one that does not work on each by itself."""
    given = [value for value in inputs if value is not None]
    if node.domain not in ("", "ai.onnx") or node.has_linked_attribute or not given:
        return None
    kind = given[0].dtype.kind
    if node.op_type in ("Cast", "CastLike"):
        return _conversion(given[0].dtype, _dtype(node, given))
    if node.op_type == "Clip":
        formula = "{0}"
        for bound, value in zip(("np.maximum", "np.minimum"), inputs[1:], strict=False):
            formula = formula if value is None else f"{bound}({formula}, {{{given.index(value)}}})"
        return formula
    if node.op_type == "Div" and kind in "iu":
        return TRUNCATED
    if node.op_type == "Mod" and node.fmod:
        return "np.sign({0}) * (np.abs({0}) % np.abs({1}))"
    if node.op_type in VARIADIC:
        pair = FORMULAS[node.op_type]
        return reduce(lambda left, i: pair.format(left, f"{{{i}}}"), range(1, len(given)), "{0}")
    return FORMULAS.get(node.op_type)


def _conversion(given: np.dtype[Any], wanted: np.dtype[Any]) -> str | None:
    """Return Python for a number as one of another type; half precision is not rounded to."""
    if wanted.kind == "b":
        return "{0} != 0"
    if wanted.kind in "iu":
        return "np.where({0}, 1, 0)" if given.kind == "b" else "np.int64({0})"
    real = "float64" if wanted == np.float64 else "float32"
    if in_wider_type(np.empty(0, wanted)).dtype != real:
        return None
    return "np.where({0}, 1.0, 0.0)" if given.kind == "b" else f"np.{real}({{0}})"


def _dtype(node: Any, given: list[Value]) -> np.dtype[Any]:
    """Return the type that ONNX gives to what a formula computes."""
    if node.op_type in BOOLEAN:
        return np.dtype(bool)
    same = given[1 if node.op_type in ("CastLike", "Where") else 0].dtype
    converted: np.dtype[Any] = onnx.helper.tensor_dtype_to_np_dtype(node.to) if node.op_type == "Cast" else same
    return converted
