"""ONNX's operator FlexAttention: graphs as functions of an element, against what ONNX's own evaluator makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

onnx = pytest.importorskip("onnx", minversion="1.23", reason="ONNX is not installed, or is older than 1.23")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from onnx.reference.op_run import OpRun  # noqa: E402

import fastattn  # noqa: E402
from fastattn.integrations import onnx as ours  # noqa: E402
from fastattn.integrations.graphs import function_of  # noqa: E402

Array = NDArray[Any]
B, H, L, S = 2, 4, 5, 6
SHAPE = (B, H, L, S)
FLOAT = TensorProto.FLOAT
OPSETS = {"": 26, "ai.onnx.preview": 1}


def graph_of(
    nodes: list[Any],
    known: dict[str, Any],
    result: str = "result",
    dtype: int = FLOAT,
    inputs: tuple[str, ...] = ("x",),
) -> Any:
    """Return a graph of the input x; numbers that are known are of its type, unless they are arrays."""
    real = helper.tensor_dtype_to_np_dtype(dtype)
    tensors = {
        name: np.asarray(value, None if isinstance(value, np.ndarray) else real) for name, value in known.items()
    }
    return helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, dtype, None) for name in inputs],
        [helper.make_tensor_value_info(result, dtype, None)],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )


def chain(text: str) -> list[Any]:
    """Return nodes from lines such as ``y = Add(x, one) axis=0``."""
    nodes = []
    for line in filter(str.strip, text.splitlines()):
        call, _, attributes = line.strip().partition(") ")
        output, _, rest = call.rstrip(")").partition(" = ")
        op_type, _, inputs = rest.partition("(")
        pairs = (pair.split("=") for pair in attributes.split())
        names = [name.strip() for name in inputs.split(",") if name]
        nodes.append(helper.make_node(op_type, names, output.split(", "), **{name: int(n) for name, n in pairs}))
    return nodes


#: Positions of queries and of keys, of shapes (L, 1) and (S,).
POSITIONS = """
shape = Shape(x)
length = Gather(shape, minus_two) axis=0
count = Gather(shape, minus_one) axis=0
rows = Range(zero, length, one)
q = Reshape(rows, column)
k = Range(zero, count, one)
"""
INTEGERS = {"zero": 0, "one": 1, "minus_one": -1, "minus_two": -2, "three": 3, "column": [-1, 1]}
NUMBERS = {name: np.array(value) for name, value in INTEGERS.items()}


def places() -> tuple[Any, ...]:
    return np.ix_(*map(range, SHAPE))


def made(graph: Any, shape: tuple[int, ...] = SHAPE, dtype: Any = np.float32) -> Callable[..., Any]:
    return function_of("score_mod", ReferenceEvaluator(graph, opsets=OPSETS), shape, np.dtype(dtype), {})


def check(graph: Any, dtype: Any = np.float32) -> Callable[..., Any]:
    """Assert that a function gives what its graph does, and return it."""
    scores = np.random.default_rng(0).standard_normal(SHAPE).astype(dtype)
    function = made(graph, dtype=dtype)
    with np.errstate(all="ignore"):
        exact = ReferenceEvaluator(graph, opsets=OPSETS).run(None, {"x": scores})[0]
        found = np.broadcast_to(function(scores, *places()), SHAPE)
    np.testing.assert_allclose(found.astype(dtype), exact, rtol=8 * np.finfo(dtype).eps, atol=0)
    return function


def flex(inputs: list[Array], dtype: int = FLOAT, outer: dict[str, Array] | None = None, **attributes: Any) -> Any:
    """Return a model of one node, whose graph may use what is outer, and what it is given."""
    node = helper.make_node("FlexAttention", ["Q", "K", "V"], ["Y"], domain="ai.onnx.preview", **attributes)
    given = dict(zip("QKV", inputs, strict=True)) | (outer or {})
    graph = helper.make_graph(
        [node],
        "node",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), None)
            for name, array in given.items()
        ],
        [helper.make_tensor_value_info("Y", dtype, None)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(*item) for item in OPSETS.items()]), given


def ran(model: Any, given: dict[str, Array], own: bool = True) -> Array:
    evaluator = ReferenceEvaluator(model, new_ops=[ours.FlexAttention] if own else None)
    with np.errstate(**({} if own else {"all": "ignore"})):
        out: Array = evaluator.run(None, given)[0]
    return out


def operands(groups: int = 2, dtype: Any = np.float32) -> list[Array]:
    rng = np.random.default_rng(0)
    shapes = (B, H, L, 8), (B, H // groups, S, 8), (B, H // groups, S, 3)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


# -- functions ---------------------------------------------------------------------------------------------------------

ELEMENTWISE = {
    "Abs": "Abs(x)",
    "Ceil": "Ceil(x)",
    "Clip": "Clip(x, a, b)",
    "Clip below": "Clip(x, a)",
    "Clip above": "Clip(x, , b)",
    "Cos": "Cos(x)",
    "Div": "Div(a, x)",
    "Exp": "Exp(x)",
    "Floor": "Floor(x)",
    "Log": "Log(x)",
    "Max of one": "Max(x)",
    "Max of three": "Max(x, a, table)",
    "Min": "Min(b, x)",
    "Mod": "Mod(x, b) fmod=1",
    "Mul": "Mul(x, table)",
    "Neg": "Neg(x)",
    "Pow": "Pow(x, two)",
    "Reciprocal": "Reciprocal(x)",
    "Relu": "Relu(x)",
    "Sigmoid": "Sigmoid(x)",
    "Sign": "Sign(x)",
    "Sin": "Sin(x)",
    "Sqrt": "Sqrt(x)",
    "Sub": "Sub(table, x)",
    "Sum": "Sum(x, a, b)",
    "Tanh": "Tanh(x)",
}
TABLE = np.random.default_rng(1).standard_normal((H, 1, S)).astype(np.float32)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_an_operator(name: str) -> None:
    check(graph_of(chain(f"result = {ELEMENTWISE[name]}"), {"a": -0.5, "b": 0.75, "two": 2, "table": TABLE}))


CONDITIONS = {
    "Equal": "Equal(up, nought)",
    "Greater": "Greater(x, nought)",
    "GreaterOrEqual": "GreaterOrEqual(up, nought)",
    "Less": "Less(x, nought)",
    "LessOrEqual": "LessOrEqual(up, nought)",
    "IsNaN": "IsNaN(root)",
    "And": "And(positive, keep)",
    "Or": "Or(positive, keep)",
    "Xor": "Xor(positive, keep)",
    "Not": "Not(positive)",
    "to bool": "Cast(up) to=9",
}


MEANT_BY_CONDITIONS = """
up = Ceil(x)
root = Sqrt(x)
positive = Greater(x, nought)
"""
KEEP = np.arange(S) % 2 > 0


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_condition(name: str) -> None:
    lines = f"""{MEANT_BY_CONDITIONS}
        condition = {CONDITIONS[name]}
        number = Cast(condition) to={FLOAT}
        chosen = Where(condition, x, low)
        result = Add(number, chosen)"""
    check(graph_of(chain(lines), {"nought": 0, "low": -np.inf, "keep": KEEP}))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_conversions(dtype: Any) -> None:
    """Integers lose the fraction, towards zero, in quotients too."""
    real = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    lines = f"""
        large = Mul(x, ten)
        whole = Cast(large) to={TensorProto.INT64}
        positive = Greater(x, half)
        some = Where(positive, three, whole)
        quotient = Div(some, three)
        rest = Mod(whole, three)
        both = Mul(quotient, rest)
        back = CastLike(both, x)
        double = Cast(x) to={TensorProto.DOUBLE}
        single = Cast(double) to={real}
        result = Add(back, single)"""
    check(graph_of(chain(lines), {"ten": 10, "half": 0.5, "three": np.array(3)}, dtype=real), dtype)


def test_positions_are_arguments_and_no_matrix() -> None:
    """A window: arrays of positions become the numbers of query and key, which change with no length."""
    lines = f"""{POSITIONS}
        distance = Sub(q, k)
        before = GreaterOrEqual(distance, zero)
        near = Less(distance, three)
        seen = And(before, near)
        result = Where(seen, x, low)"""
    function = check(graph_of(chain(lines), {**NUMBERS, "low": -np.inf}))
    assert function(1.0, 0, 0, 4, 2) == 1.0
    assert function(1.0, 0, 0, 10**9, 3) == -np.inf
    captured = [cell.cell_contents for cell in function.__closure__ or ()]
    assert not any(isinstance(value, np.ndarray) for value in captured)


def test_integers_that_are_no_positions() -> None:
    """Documents: a query looks at those keys that are of its own, or of the next one."""
    known = {"of_query": np.arange(L)[:, None] // 2, "of_key": np.arange(S), "next": np.arange(1, S + 1)}
    lines = """
        own = Equal(of_query, of_key)
        following = Equal(of_query, next)
        seen = Or(own, following)
        result = Where(seen, x, low)"""
    check(graph_of(chain(lines), {**known, "low": -np.inf}))


def test_tables_are_captured_with_the_axes_that_they_have() -> None:
    """A bias for each head and key, a slope for each head, and a matrix for all heads."""
    known = {"bias": TABLE, "slope": TABLE[:, :, :1], "whole": np.arange(L * S, dtype=np.float32).reshape(L, S)}
    lines = """
        a = Add(x, bias)
        b = Mul(a, slope)
        result = Sub(b, whole)"""
    function = check(graph_of(chain(lines), known))
    shapes = {cell.cell_contents.shape for cell in function.__closure__ or ()}
    assert shapes == {(H, S), (H,), (L, S)}


def test_a_table_of_distances_is_looked_up_at_once() -> None:
    """What does not depend on the scores may be computed by any operator, such as a relative bias by Gather."""
    lines = f"""{POSITIONS}
        distance = Sub(q, k)
        place = Add(distance, count)
        bias = Gather(table, place)
        result = Add(x, bias)"""
    check(graph_of(chain(lines), {**NUMBERS, "table": np.linspace(-1, 1, L + S).astype(np.float32)}))


def test_the_same_code_for_other_numbers_and_lengths() -> None:
    """Numbers, tables and lengths are what a function is given, not what it is made of."""
    lines = f"""{POSITIONS}
        distance = Sub(q, k)
        far = Cast(distance) to={FLOAT}
        bias = Mul(far, slope)
        result = Add(x, bias)"""
    codes = {
        made(graph_of(chain(lines), {**NUMBERS, "slope": slope * TABLE[:, :, :1]}), shape).__code__
        for slope, shape in ((1, SHAPE), (2, SHAPE), (3, (1, H, 7, 9)))
    }
    assert len(codes) == 1


# what is rounded right, so that differences and comparisons are as ONNX's evaluator has them, too
UNARY = ("Abs", "Neg", "Relu", "Floor", "Ceil", "Sqrt", "Sign")
BINARY = ("Add", "Sub", "Mul", "Max", "Min", "Sum")
COMPARISONS = ("Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Equal")


@st.composite
def graphs(draw: st.DrawFn) -> Any:
    """Draw a graph of elementwise operators on scores, positions, and tables of every shape that broadcasts."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    known: dict[str, Array] = dict(NUMBERS)
    lines = [
        *POSITIONS.strip().splitlines(),
        f"qf = Cast(q) to={FLOAT}",
        f"kf = Cast(k) to={FLOAT}",
    ]
    names = ["x", "qf", "kf"]
    for i in range(draw(st.integers(0, 3))):
        shape = tuple(draw(st.sampled_from((1, axis))) for axis in SHAPE)[draw(st.integers(0, 4)) :]
        known[f"t{i}"] = rng.standard_normal(shape).astype(np.float32)
        names.append(f"t{i}")
    for i in range(draw(st.integers(1, 8))):
        a, b, c, d = (draw(st.sampled_from(names)) for _ in range(4))
        kind = draw(st.sampled_from(("unary", "binary", "where")))
        if kind == "unary":
            lines.append(f"v{i} = {draw(st.sampled_from(UNARY))}({a})")
        elif kind == "binary":
            lines.append(f"v{i} = {draw(st.sampled_from(BINARY))}({a}, {b})")
        else:
            lines += [f"c{i} = {draw(st.sampled_from(COMPARISONS))}({a}, {b})", f"v{i} = Where(c{i}, {c}, {d})"]
        names.append(f"v{i}")
    return graph_of(chain("\n".join([*lines, f"result = Add(x, {names[-1]})"])), known)


@given(graph=graphs())
def test_random_graphs(graph: Any) -> None:
    check(graph)


# -- nodes -------------------------------------------------------------------------------------------------------------

SOFTCAP = """
small = Div(x, cap)
bent = Tanh(small)
result = Mul(bent, cap)
"""
CAUSAL = f"""{POSITIONS}
seen = GreaterOrEqual(q, k)
result = Where(seen, x, low)
"""


def test_functions_are_options_that_there_are() -> None:
    inputs = operands()
    causal = graph_of(chain(CAUSAL), {**NUMBERS, "low": -np.inf})
    out = ran(*flex(inputs, score_mod=causal))
    np.testing.assert_allclose(out, fastattn.attention(*inputs, is_causal=True, enable_gqa=True), atol=1e-6)
    out = ran(*flex(inputs, scale=2.0, score_mod=graph_of(chain(SOFTCAP), {"cap": 3})))
    np.testing.assert_allclose(out, fastattn.attention(*inputs, scale=2.0, softcap=3, enable_gqa=True), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [1, 2, 100])
def test_scores_and_weights_are_changed_some_rows_at_a_time(
    dtype: Any, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "ELEMENTS", B * H * S * rows)
    real = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    lines = f"""{POSITIONS}
        near = Equal(q, k)
        double = Mul(x, two)
        result = Where(near, double, x)"""
    graph = graph_of(chain(lines), {**NUMBERS, "two": 2}, dtype=real)
    capped = graph_of(chain(SOFTCAP), {"cap": 3}, dtype=real)
    # ONNX's own evaluator takes the root of a scale in float32
    model, given = flex(operands(dtype=dtype), real, scale=0.25, score_mod=capped, prob_mod=graph)
    tolerance = 32 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(ran(model, given), ran(model, given, own=False), rtol=0, atol=tolerance)


def test_a_node_with_all_operators() -> None:
    """The sum of what each makes of a score, 0 for NaN, and of quotients and remainders of distances."""
    real = TensorProto.DOUBLE
    lines = [f"{POSITIONS}{MEANT_BY_CONDITIONS}"]
    for i, text in enumerate(ELEMENTWISE.values()):
        lines += [
            f"y{i} = {text}",
            f"odd{i} = IsNaN(y{i})",
            f"fine{i} = Where(odd{i}, nought, y{i})",
            f"t{i} = Tanh(fine{i})",
        ]
    for i, text in enumerate(CONDITIONS.values(), len(ELEMENTWISE)):
        lines += [f"y{i} = {text}", f"t{i} = Cast(y{i}) to={real}"]
    lines += ["distance = Sub(q, k)", "third = Div(distance, three)", "rest = Mod(distance, three)"]
    lines += ["both = Add(third, rest)", f"t = Cast(both) to={real}"]
    terms = [f"t{i}" for i in range(len(ELEMENTWISE) + len(CONDITIONS))]
    lines.append(f"result = Sum(t, {', '.join(terms)})")
    known = {"a": -0.5, "b": 0.75, "two": 2, "nought": 0, "table": TABLE.astype(np.float64), "keep": KEEP}
    graph = graph_of(chain("\n".join(lines)), {**NUMBERS, **known}, dtype=real)
    model, given = flex(operands(dtype=np.float64), real, scale=0.25, score_mod=graph)
    np.testing.assert_allclose(ran(model, given), ran(model, given, own=False), rtol=0, atol=1e-13)


def test_a_query_whose_scores_are_all_hidden_gives_zeros() -> None:
    """ONNX's own evaluator gives NaN."""
    inputs = operands()
    before = graph_of(chain(CAUSAL.replace("GreaterOrEqual", "Greater")), {**NUMBERS, "low": -np.inf})
    out = ran(*flex(inputs, score_mod=before))
    assert (out[:, :, 0] == 0).all()
    expected = fastattn.attention(*inputs, is_causal=True, query_offset=-1, enable_gqa=True)
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_a_graph_may_use_what_is_around_it() -> None:
    """As graphs of If and Loop do; a bias that a model computes, or is given."""
    inputs = operands()
    bias = np.random.default_rng(2).standard_normal((H, L, S)).astype(np.float32)
    graph = graph_of(chain("result = Add(x, bias)"), {})
    out = ran(*flex(inputs, score_mod=graph, outer={"bias": bias}))
    np.testing.assert_allclose(out, fastattn.attention(*inputs, bias, enable_gqa=True), atol=1e-6)


@pytest.mark.parametrize("precision", [TensorProto.FLOAT, TensorProto.DOUBLE])
def test_half_precision_is_computed_wider(precision: int) -> None:
    inputs = operands(dtype=np.float16)
    graph = graph_of(chain(SOFTCAP), {"cap": 3}, dtype=precision)
    out = ran(*flex(inputs, TensorProto.FLOAT16, score_mod=graph, softmax_precision=precision))
    exact = fastattn.attention(*(array.astype(np.float64) for array in inputs), softcap=3, enable_gqa=True)
    assert out.dtype == np.float16
    np.testing.assert_allclose(out, exact.astype(np.float16), rtol=float(np.finfo(np.float16).eps))


@pytest.mark.parametrize("empty", ["queries", "keys", "batch"])
def test_nothing_of_something(empty: str) -> None:
    query, key, value = operands()
    if empty == "queries":
        query = query[:, :, :0]
    elif empty == "keys":
        key, value = key[:, :, :0], value[:, :, :0]
    else:
        query, key, value = query[:0], key[:0], value[:0]
    out = ran(*flex([query, key, value], score_mod=graph_of(chain(CAUSAL), {**NUMBERS, "low": -np.inf})))
    assert out.shape == (*query.shape[:3], 3)
    assert (out == 0).all()


REFUSED = {
    "MatMul": ("result = MatMul(x, x)", "score_mod: operator MatMul; expected operators that work on each element"),
    "ReduceMax": ("result = ReduceMax(x)", "score_mod: operator ReduceMax"),
    "Softmax": ("result = Softmax(x)", "score_mod: operator Softmax"),
    "Transpose": ("y = Transpose(x)\nresult = Add(x, x)", "score_mod: operator Transpose"),
    "shape": (
        "result = Add(x, long)",
        r"score_mod: Add of shapes \(2, 4, 5, 6\), \(7,\); expected some that broadcast",
    ),
    "more axes": (
        "result = Add(x, deep)",
        r"score_mod: Add of shapes .*; expected some that broadcast to \(2, 4, 5, 6\)",
    ),
    "result": ("result = Add(long, long)", r"score_mod: a result of shape \(7,\); expected \(2, 4, 5, 6\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_function_of_an_element_is_refused(name: str) -> None:
    lines, message = REFUSED[name]
    known = {"long": np.ones(7, np.float32), "deep": np.ones((1, 1, 1, 1, 1), np.float32)}
    with pytest.raises(ValueError, match=message):
        ran(*flex(operands(), score_mod=graph_of(chain(lines), known)))


def test_an_operator_of_another_domain_is_another_operator() -> None:
    class Tanh(OpRun):  # type: ignore[misc]
        op_domain = "own"

        def _run(self, x: Array) -> tuple[Array]:
            return (x[::-1],)

    graph = graph_of([helper.make_node("Tanh", ["x"], ["result"], domain="own")], {})
    evaluator = ReferenceEvaluator(graph, opsets={**OPSETS, "own": 1}, new_ops=[Tanh])
    with pytest.raises(ValueError, match="score_mod: operator Tanh"):
        function_of("score_mod", evaluator, SHAPE, np.dtype(np.float32), {})


def test_a_graph_of_two_inputs_is_refused() -> None:
    graph = graph_of(chain("result = Add(x, y)"), {}, inputs=("x", "y"))
    with pytest.raises(ValueError, match="prob_mod: a graph of 2 inputs and 1 outputs; expected one of each"):
        ran(*flex(operands(), prob_mod=graph))


def test_what_is_wrong_is_refused_by_name() -> None:
    query, key, value = operands()
    with pytest.raises(ValueError, match=r"Q: rank 3, shape \(4, 5, 8\); expected 4"):
        ran(*flex([query[0], key[0], value[0]]))
    with pytest.raises(ValueError, match="softmax_precision: 2; expected 1"):
        ran(*flex([query, key, value], softmax_precision=2))
    with pytest.raises(ValueError, match="mask_mod: no such attribute; expected one of "):
        ran(*flex([query, key, value], mask_mod=graph_of(chain("result = Abs(x)"), {})))
    with pytest.raises(ValueError, match=r"V: shape \(2, 2, 5, 3\)"):
        ran(*flex([query, key, value[:, :, 1:]]))
