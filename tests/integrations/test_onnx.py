"""ONNX's operator Attention: its node tests, random nodes and a whole model, against ONNX's own evaluator."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import tolerances
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

onnx = pytest.importorskip("onnx", minversion="1.23", reason="ONNX is not installed, or is older than 1.23")

import ml_dtypes  # noqa: E402
from onnx.backend.test.case.node import _NodeTestCases, attention, flexattention  # noqa: E402, F401
from onnx.backend.test.runner import Runner  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

import fastattn  # noqa: E402
from fastattn.integrations.onnx import Attention, FlexAttention  # noqa: E402

Array = NDArray[Any]
NODE_TESTS = {case.name: case for case in _NodeTestCases if "_expanded" not in case.name}
INPUTS = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
OUTPUTS = ("Y", "present_key", "present_value", "qk_matmul_output")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
PRECISION = {"FLOAT": 1, "FLOAT16": 10, "DOUBLE": 11, "BFLOAT16": 16}


def model_of(
    attributes: dict[str, Any],
    inputs: dict[str, Array],
    outputs: tuple[str, ...] = OUTPUTS,
    opset: int = 25,
    operator: tuple[str, str] = ("Attention", ""),
) -> Any:
    """Return a model of one node, with those of the inputs that are given."""
    op_type, domain = operator
    names = [name if name in inputs else "" for name in INPUTS]
    node = onnx.helper.make_node(op_type, names, [*outputs], domain=domain, **attributes)
    types = {name: onnx.helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in inputs.items()}
    given = [onnx.helper.make_tensor_value_info(name, types[name], None) for name in inputs]
    returned = [onnx.helper.make_tensor_value_info(name, types["Q"], None) for name in outputs]
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("ai.onnx.preview", 1)]
    return onnx.helper.make_model(onnx.helper.make_graph([node], "node", given, returned), opset_imports=opsets)


def ours(model: Any, inputs: dict[str, Array]) -> list[Array]:
    found: list[Array] = ReferenceEvaluator(model, new_ops=[Attention, FlexAttention]).run(None, inputs)
    return found


def theirs(model: Any, inputs: dict[str, Array]) -> list[Array]:
    found: list[Array] = ReferenceEvaluator(model).run(None, inputs)
    return found


def arrays(*shapes: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in zip(INPUTS, shapes, strict=False)}


# -- ONNX's own tests --------------------------------------------------------------------------------------------------


def test_there_are_as_many_node_tests_as_in_this_version() -> None:
    if onnx.__version__.startswith("1.23."):
        assert len(NODE_TESTS) == 104


@pytest.mark.parametrize("name", NODE_TESTS)
def test_node(name: str) -> None:
    """Half precision is computed in float32 here, and step by step in half precision there."""
    case = NODE_TESTS[name]
    evaluator = ReferenceEvaluator(case.model, new_ops=[Attention, FlexAttention])
    assert type(evaluator.rt_nodes_[0]) in (Attention, FlexAttention)
    for inputs, outputs in case.data_sets:
        found = evaluator.run(None, dict(zip(evaluator.input_names, inputs, strict=True)))
        Runner.assert_similar_outputs(outputs, found, case.rtol, case.atol)


# -- random nodes ------------------------------------------------------------------------------------------------------


def widened(array: Array) -> Array:
    """Return real numbers as float64, others as they are."""
    return array if array.dtype.kind in "biu" else array.astype(np.float64)


def check(found: Array, exact: Array, dtype: Any, size: float, largest: float) -> None:
    """Assert that a result is exact, but for roundings in float32 or float64, and those to a narrower type.

    Parameters
    ----------
    found, exact : ndarray
        `exact` as ONNX's evaluator computes it in float64.
    dtype
        Of the node.
    size : float
        How large the terms of a score are.
    largest : float
        How large a result may be.
    """
    assert found.dtype == dtype
    assert found.shape == exact.shape
    computed = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    bound = np.broadcast_to(tolerances.layer_bound(computed, size, largest), exact.shape)
    if computed != dtype:
        # ml_dtypes has one for NumPy's types as well
        information = ml_dtypes.finfo(dtype)
        bound = bound + float(information.eps) * np.abs(exact) + float(information.smallest_subnormal)
    hidden = np.isneginf(exact)
    np.testing.assert_array_equal(np.isneginf(found), hidden)
    error = np.abs(np.where(hidden, 0, found.astype(np.float64)) - np.where(hidden, 0, exact))
    assert (error <= bound).all(), f"the worst error is {(error / bound).max()} times its bound"


@st.composite
def nodes(draw: st.DrawFn) -> tuple[int, dict[str, Any], dict[str, Array], Any]:
    """Draw an opset, attributes, inputs and a dtype of a node of Attention that ONNX's evaluator can run."""
    opset = draw(st.integers(23, 25))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = np.dtype(draw(st.sampled_from((np.float32, np.float64, np.float16, BFLOAT16))))
    batch, kv_heads, group = (draw(st.integers(1, 3)) for _ in range(3))
    queries, keys, features, width = (draw(st.integers(1, 9)) for _ in range(4))
    heads = kv_heads * group
    attributes: dict[str, Any] = {"is_causal": draw(st.integers(0, 1)), "qk_matmul_output_mode": draw(st.integers(0, 3))}

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(dtype)

    inputs = {"Q": normal(batch, heads, queries, features), "K": normal(batch, kv_heads, keys, features)}
    inputs["V"] = normal(batch, kv_heads, keys, width)
    if draw(st.booleans()):
        inputs = {name: array.swapaxes(1, 2).reshape(batch, array.shape[2], -1) for name, array in inputs.items()}
        attributes |= {"q_num_heads": heads, "kv_num_heads": kv_heads}
    past = draw(st.sampled_from(("", "past", "lengths" if opset > 23 else "")))
    if past == "past":
        length = draw(st.integers(0, 5))
        inputs |= {"past_key": normal(batch, kv_heads, length, features)}
        inputs |= {"past_value": normal(batch, kv_heads, length, width)}
        keys += length
    elif past == "lengths":
        inputs["nonpad_kv_seqlen"] = rng.integers(0, keys + 1, batch)
    if draw(st.booleans()):
        attributes["scale"] = draw(st.floats(0, 2, width=32))
    if draw(st.booleans()):
        attributes["softcap"] = draw(st.floats(0.125, 8, width=32))
    if draw(st.booleans()):
        attributes["softmax_precision"] = draw(st.sampled_from(sorted(PRECISION.values())))
    if opset > 24:
        attributes |= {f"{side}_window_size": draw(st.integers(-1, 6)) for side in ("left", "right")}
    kind = draw(st.sampled_from((None, bool, dtype)))
    if kind is not None:
        shape = tuple(draw(st.sampled_from((1, axis))) for axis in (batch, heads, queries))
        shape = (*shape, draw(st.integers(1, keys)) if opset > 23 else keys)[draw(st.integers(0, 3)) :]
        inputs["attn_mask"] = rng.random(shape) < 0.7 if kind is bool else normal(*shape) if shape else normal(1)
        if kind is not bool and draw(st.booleans()):
            inputs["attn_mask"][rng.random(shape) < 0.3] = -np.inf
    return opset, attributes, inputs, dtype


@given(node=nodes())
def test_random_nodes(node: tuple[int, dict[str, Any], dict[str, Array], Any]) -> None:
    """ONNX's evaluator computes in the types of the inputs: given float64, it says what is exact.

    In three cases it does not. It takes the root of a scale in float32: it is given larger queries instead. Of a mask
    that is the same for all queries it makes a single causal row: it is given a row for each. And of mode 0, whose
    scores are those before the softcap, it returns those behind: it is given none.
    """
    opset, attributes, inputs, dtype = node
    wide = {name: widened(array) for name, array in inputs.items()}
    queries, width = inputs["Q"].shape[-2:]
    features = width // attributes.get("q_num_heads", 1)
    scale = attributes.get("scale", 1 / np.sqrt(features))
    wide["Q"] = wide["Q"] * (scale * np.sqrt(features))
    if "attn_mask" in wide:
        rows = wide["attn_mask"].shape[:-1]
        wide["attn_mask"] = np.tile(wide["attn_mask"], (queries, 1) if rows[-1:] in ((), (1,)) else (1, 1))
    precise = {name: value for name, value in attributes.items() if name not in ("scale", "softmax_precision")}
    exact = theirs(model_of(precise, wide, opset=opset), wide)
    if attributes["qk_matmul_output_mode"] == 0:
        exact[3] = theirs(model_of({**precise, "softcap": 0.0}, wide, opset=opset), wide)[3]
    found = ours(model_of(attributes, inputs, opset=opset), inputs)

    size = np.abs(wide["Q"]).max() / np.sqrt(features) * np.abs(exact[1]).max() * features
    if inputs.get("attn_mask", np.zeros(1)).dtype != bool:
        size += tolerances.largest(wide.get("attn_mask", np.zeros(1)))
    check(found[0], exact[0], dtype, size, tolerances.largest(exact[2]))
    for present, whole in zip(found[1:3], exact[1:3], strict=True):
        np.testing.assert_array_equal(present, whole.astype(dtype))
    check(found[3], exact[3], dtype, size, 1.0)
