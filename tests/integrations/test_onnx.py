"""ONNX's operator Attention: its node tests, random nodes and a whole model, against ONNX's own evaluator."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import processes
import pytest
import tolerances
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

onnx = pytest.importorskip("onnx", minversion="1.23", reason="ONNX is not installed, or is older than 1.23")

import ml_dtypes  # noqa: E402
from onnx.backend.test.case import node as node_tests  # noqa: E402
from onnx.backend.test.case.node import attention, flexattention  # noqa: E402, F401
from onnx.backend.test.runner import Runner  # noqa: E402
from onnx.inliner import inline_local_functions  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

import fastattn  # noqa: E402
from fastattn.call.advice import to_install  # noqa: E402
from fastattn.integrations.onnx import Attention, FlexAttention  # noqa: E402

Array = NDArray[Any]
NODE_TESTS = {case.name: case for case in node_tests._NodeTestCases if "_expanded" not in case.name}
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
    last = max(map(INPUTS.index, inputs))
    names = [name if name in inputs else "" for name in INPUTS[: last + 1]]
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
    attributes: dict[str, Any] = {
        "is_causal": draw(st.integers(0, 1)),
        "qk_matmul_output_mode": draw(st.integers(0, 3)),
    }

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


# -- what nodes ask for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32, np.float64])
def test_results_have_the_type_of_the_query(dtype: Any) -> None:
    inputs = arrays((1, 4, 5, 8), (1, 2, 7, 8), (1, 2, 7, 3), dtype=dtype)
    inputs |= {f"past_{name}": inputs[short][:, :, :2] for name, short in (("key", "K"), ("value", "V"))}
    model = model_of({"qk_matmul_output_mode": 3, "softmax_precision": PRECISION["DOUBLE"]}, inputs)
    assert [array.dtype for array in ours(model, inputs)] == [np.dtype(dtype)] * 4


def test_double_precision_of_the_softmax_is_that_of_all() -> None:
    inputs = arrays((1, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 3))
    out = ours(model_of({"softmax_precision": PRECISION["DOUBLE"]}, inputs), inputs)[0]
    exact = fastattn.attention(*(array.astype(np.float64) for array in inputs.values()))
    np.testing.assert_array_equal(out, exact.astype(np.float32))


def test_what_is_not_asked_for_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Causality, windows, a past, lengths and masks of few keys or queries take no matrix of all scores."""
    length = 2048
    asked = Mock(wraps=fastattn.attention)
    monkeypatch.setattr(fastattn, "attention", asked)
    operands = arrays((2, 1, length, 8), (2, 1, length, 8), (2, 1, length, 8))
    past = {f"past_{name}": operands[short][:, :, :100] for name, short in (("key", "K"), ("value", "V"))}
    mask = {"attn_mask": np.arange(length - 10) % 7 > 0}
    lengths = {"nonpad_kv_seqlen": np.array([length, 1500])}
    for further in ({}, past, lengths, mask, {**lengths, **mask}):
        inputs = {**operands, **further}
        model = model_of({"is_causal": 1, "left_window_size": 300, "softcap": 5.0}, inputs, OUTPUTS[:1])
        evaluator = ReferenceEvaluator(model, new_ops=[Attention])
        evaluator.run(None, inputs)
        tracemalloc.start()
        evaluator.run(None, inputs)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < length * length
        assert not asked.call_args.kwargs["return_weights"]


def test_a_query_that_may_look_at_no_key_gives_zeros() -> None:
    inputs = arrays((2, 1, 4, 8), (2, 1, 6, 8), (2, 1, 6, 3))
    inputs["V"][:] = np.nan
    inputs["nonpad_kv_seqlen"] = np.array([0, 0])
    out, _, _, weights = ours(model_of({"qk_matmul_output_mode": 3}, inputs), inputs)
    assert (out == 0).all()
    assert (weights == 0).all()
    inputs = arrays((2, 1, 4, 8), (2, 1, 0, 8), (2, 1, 0, 3))
    assert (ours(model_of({}, inputs), inputs)[0] == 0).all()


def test_a_mask_of_one_key_is_repeated_in_opset_23_and_hides_the_others_later() -> None:
    inputs = {**arrays((1, 1, 4, 8), (1, 1, 6, 8), (1, 1, 6, 3)), "attn_mask": np.ones((4, 1), np.float32)}
    repeated, first = (ours(model_of({}, inputs, opset=opset), inputs)[0] for opset in (23, 24))
    np.testing.assert_allclose(repeated, fastattn.attention(*(inputs[name] for name in "QKV")), atol=1e-6)
    np.testing.assert_allclose(first, np.broadcast_to(inputs["V"][:, :, :1], first.shape), atol=1e-6)


@pytest.mark.parametrize("mode", range(4))
def test_matrices_have_columns_for_the_keys_that_a_mask_leaves_out(mode: int) -> None:
    inputs = {**arrays((1, 1, 4, 8), (1, 1, 6, 8), (1, 1, 6, 3)), "attn_mask": np.ones((4, 5), np.float32)}
    model = model_of({"qk_matmul_output_mode": mode}, inputs)
    np.testing.assert_allclose(ours(model, inputs)[3], theirs(model, inputs)[3], atol=1e-6)


@pytest.mark.parametrize("causal", [0, 1])
def test_a_mask_of_integers_is_added(causal: int) -> None:
    inputs = {**arrays((1, 1, 4, 8), (1, 1, 6, 8), (1, 1, 6, 3)), "attn_mask": np.arange(24).reshape(4, 6) % 5}
    floating = {**inputs, "attn_mask": inputs["attn_mask"].astype(np.float32)}
    out = ours(model_of({"is_causal": causal}, inputs), inputs)[0]
    np.testing.assert_allclose(out, theirs(model_of({"is_causal": causal}, floating), floating)[0], atol=1e-6)


def test_a_negative_scale_is_one() -> None:
    """ONNX's own evaluator takes its root."""
    inputs = arrays((1, 1, 4, 8), (1, 1, 6, 8), (1, 1, 6, 3))
    out = ours(model_of({"scale": -0.5}, inputs), inputs)[0]
    np.testing.assert_array_equal(out, fastattn.attention(*inputs.values(), scale=-0.5))


# -- what is refused ---------------------------------------------------------------------------------------------------

OPERANDS = arrays((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 3))
FLAT = {name: array.swapaxes(1, 2).reshape(2, array.shape[2], -1) for name, array in OPERANDS.items()}
PAST = {"past_key": np.zeros((2, 2, 3, 8), np.float32), "past_value": np.zeros((2, 2, 3, 3), np.float32)}
WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "name": ({"causal": 1}, OPERANDS, "causal: no such attribute; expected one of is_causal, "),
    "is_causal": ({"is_causal": 2}, OPERANDS, "is_causal: 2; expected 0 or 1"),
    "mode": ({"qk_matmul_output_mode": 4}, OPERANDS, "qk_matmul_output_mode: 4; expected 0, 1, 2 or 3"),
    "precision": ({"softmax_precision": 7}, OPERANDS, r"softmax_precision: 7; expected 1 \(FLOAT\), 10 "),
    "window": ({"left_window_size": -2}, OPERANDS, "left_window_size: -2; expected a number of keys, or -1"),
    "softcap": ({"softcap": -1.0}, OPERANDS, "softcap: -1.0; expected a finite number, 0 for none"),
    "scale": ({"scale": np.inf}, OPERANDS, "scale: inf; expected a finite number"),
    "heads of rank 4": ({"q_num_heads": 2}, OPERANDS, "q_num_heads: 2; expected 4, the heads of Q, or none"),
    "no heads of rank 3": ({}, FLAT, "q_num_heads: None; expected the number of heads in 32, the last axis of Q"),
    "heads that do not divide": ({"q_num_heads": 4, "kv_num_heads": 5}, FLAT, "kv_num_heads: 5; .* in 16, .* of K"),
    "rank": ({}, {**OPERANDS, "Q": OPERANDS["Q"][0, 0]}, r"Q: rank 2, shape \(5, 8\); expected 3 or 4"),
    "ranks": ({}, {**OPERANDS, "V": FLAT["V"]}, "V: rank 3; expected 4, that of Q"),
    "dtype": ({}, {**OPERANDS, "K": OPERANDS["K"].astype(np.int32)}, "K: dtype int32; expected one of float16"),
    "features": ({}, {**OPERANDS, "K": OPERANDS["V"]}, r"K: shape \(2, 2, 7, 3\), .* expected \(2, heads, keys, 8\)"),
    "keys": ({}, {**OPERANDS, "V": OPERANDS["V"][:, :, 1:]}, r"V: shape \(2, 2, 6, 3\), .* expected \(2, 2, 7, "),
    "groups": ({}, {**OPERANDS, "Q": OPERANDS["Q"][:, 1:]}, "K: 2 heads; expected a number that divides 3"),
    "past alone": ({}, {**OPERANDS, "past_key": PAST["past_key"]}, "past_value: missing; expected past_key and"),
    "past": ({}, {**OPERANDS, **PAST, "past_value": PAST["past_key"]}, r"past_value: shape \(2, 2, 3, 8\)"),
    "past and lengths": (
        {},
        {**OPERANDS, **PAST, "nonpad_kv_seqlen": np.array([1, 1])},
        "nonpad_kv_seqlen: given together with a past",
    ),
    "lengths": ({}, {**OPERANDS, "nonpad_kv_seqlen": np.array([1])}, r"nonpad_kv_seqlen: shape \(1,\)"),
    "long lengths": (
        {},
        {**OPERANDS, "nonpad_kv_seqlen": np.array([8, 1])},
        "nonpad_kv_seqlen: 1 to 8; expected 0 to 7",
    ),
    "mask": ({}, {**OPERANDS, "attn_mask": np.ones((3, 7), bool)}, r"attn_mask: shape \(3, 7\); expected one that"),
    "wide mask": (
        {},
        {**OPERANDS, "attn_mask": np.ones((5, 8), bool)},
        r"attn_mask: shape \(5, 8\); expected one that",
    ),
    "complex mask": ({}, {**OPERANDS, "attn_mask": np.ones((5, 7), np.complex64)}, "attn_mask: dtype complex64"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_by_name(name: str) -> None:
    attributes, inputs, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        ours(model_of(attributes, inputs), inputs)


# -- a whole model -----------------------------------------------------------------------------------------------------

VOCABULARY, WIDTH, HEADS, KV_HEADS, LAYERS = 50, 32, 4, 2, 2


def block(layer: int, weights: dict[str, Array]) -> list[Any]:
    """Return the nodes of a transformer's block, whose input is ``x{layer}``; its weights are added to `weights`."""
    rng = np.random.default_rng(layer)
    narrow = WIDTH // HEADS * KV_HEADS
    shapes = {"q": (WIDTH, WIDTH), "k": (WIDTH, narrow), "v": (WIDTH, narrow), "o": (WIDTH, WIDTH)}
    shapes |= {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
    own = {f"{name}{layer}": rng.standard_normal(shape) / np.sqrt(shape[0]) for name, shape in shapes.items()}
    own |= {f"norm{layer}_{i}": rng.uniform(0.5, 1.5, WIDTH) for i in range(2)}
    weights.update({name: array.astype(np.float32) for name, array in own.items()})

    def node(op_type: str, inputs: str, outputs: str, **attributes: Any) -> Any:
        names = [[name.format(layer) for name in text.split(" ")] for text in (inputs, outputs)]
        return onnx.helper.make_node(op_type, *names, **attributes)

    return [
        node("LayerNormalization", "x{0} norm{0}_0", "normed{0}"),
        *(node("MatMul", f"normed{{0}} {name}{{0}}", f"{name}_of{{0}}") for name in "qkv"),
        node(
            "Attention",
            "q_of{0} k_of{0} v_of{0}  past_key{0} past_value{0}",
            "mixed{0} present_key{0} present_value{0}",
            q_num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            is_causal=1,
            left_window_size=-1 if layer else 5,
            softcap=float(layer),
        ),
        node("MatMul", "mixed{0} o{0}", "attended{0}"),
        node("Add", "x{0} attended{0}", "between{0}"),
        node("LayerNormalization", "between{0} norm{0}_1", "normed_between{0}"),
        node("MatMul", "normed_between{0} up{0}", "wide{0}"),
        node("Gelu", "wide{0}", "bent{0}"),
        node("MatMul", "bent{0} down{0}", "fed{0}"),
        onnx.helper.make_node("Add", [f"between{layer}", f"fed{layer}"], [f"x{layer + 1}"]),
    ]


def transformer() -> Any:
    """Return a small language model with a cache: from tokens, and what was kept, to logits and what to keep."""
    rng = np.random.default_rng(7)
    weights = {"embedding": rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32)}
    nodes = [onnx.helper.make_node("Gather", ["embedding", "tokens"], ["x0"])]
    for layer in range(LAYERS):
        nodes += block(layer, weights)
    weights["head"] = weights["embedding"].T.copy()
    nodes.append(onnx.helper.make_node("MatMul", [f"x{LAYERS}", "head"], ["logits"]))

    def info(name: str, axes: int, dtype: int = onnx.TensorProto.FLOAT) -> Any:
        return onnx.helper.make_tensor_value_info(name, dtype, [None] * axes)

    kept = [f"{name}{layer}" for layer in range(LAYERS) for name in ("key", "value")]
    graph = onnx.helper.make_graph(
        nodes,
        "transformer",
        [info("tokens", 2, onnx.TensorProto.INT64), *(info(f"past_{name}", 4) for name in kept)],
        [info("logits", 3), *(info(f"present_{name}", 4) for name in kept)],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 25)])
    onnx.checker.check_model(model, full_check=True)
    return model


def test_a_whole_model_and_its_cache() -> None:
    """A prompt, and token by token what follows it, as ONNX's own evaluator has it, and as the whole text at once."""
    model = transformer()
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 12))
    names = [f"past_{name}{layer}" for layer in range(LAYERS) for name in ("key", "value")]
    empty = dict.fromkeys(names, np.zeros((2, KV_HEADS, 0, WIDTH // HEADS), np.float32))
    logits = []
    for evaluator in (ReferenceEvaluator(model), ReferenceEvaluator(model, new_ops=[Attention])):
        whole = evaluator.run(None, {"tokens": tokens, **empty})[0]
        kept, steps = empty, []
        for part in (tokens[:, :8], *np.split(tokens[:, 8:], 4, axis=1)):
            step, *presents = evaluator.run(None, {"tokens": part, **kept})
            kept = dict(zip(names, presents, strict=True))
            steps.append(step)
        np.testing.assert_allclose(np.concatenate(steps, axis=1), whole, atol=1e-5 * np.abs(whole).max())
        logits.append(whole)
    assert [type(node) for node in evaluator.rt_nodes_].count(Attention) == LAYERS
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-5 * np.abs(logits[0]).max())


def test_functions_of_a_model() -> None:
    """ONNX's evaluator has its own operators in these: they are to be inlined, or run by themselves."""
    node = onnx.helper.make_node("Attention", ["q", "k", "v"], ["y"])
    node.attribute.append(onnx.AttributeProto(name="is_causal", type=onnx.AttributeProto.INT, ref_attr_name="causal"))
    opset = onnx.helper.make_opsetid("", 25)
    function = onnx.helper.make_function("own", "Attend", ["q", "k", "v"], ["y"], [node], [opset], ["causal"])
    inputs = arrays((1, 1, 4, 8), (1, 1, 4, 8), (1, 1, 4, 3))
    for causal in (0, 1):
        expected = fastattn.attention(*inputs.values(), is_causal=bool(causal))
        alone = ReferenceEvaluator(function, new_ops=[Attention])
        operands = dict(zip("qkv", inputs.values(), strict=True))
        np.testing.assert_array_equal(alone.run(None, operands, attributes={"causal": causal})[0], expected)

        model = model_of({"causal": causal}, inputs, OUTPUTS[:1], operator=("Attend", "own"))
        model.functions.append(function)
        model.opset_import.append(onnx.helper.make_opsetid("own", 1))
        np.testing.assert_array_equal(ours(inline_local_functions(model), inputs)[0], expected)


def test_importing_fastattn_does_not_import_onnx() -> None:
    code = "import sys, fastattn, fastattn.integrations\nprint({'onnx', 'ml_dtypes'} & set(sys.modules))"
    assert processes.run(code) == "set()\n"


def test_without_onnx_the_module_says_what_it_needs() -> None:
    code = """
import sys
sys.modules["onnx"] = None
try:
    import fastattn.integrations.onnx
except ImportError as error:
    print(error)
"""
    assert f"needs ONNX: {to_install('onnx')}\n" in processes.run(code)


def test_the_example_of_the_documentation_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text("utf-8")
    _, _, section = page.partition("\n## ONNX\n")
    code = section.partition("```py\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    by_heads = (names[name].reshape(2, 1000, 8, 8).swapaxes(1, 2) for name in ("query", "key", "value"))
    expected = fastattn.attention(*by_heads, is_causal=True, window=(511, 0))
    np.testing.assert_array_equal(names["out"], expected.swapaxes(1, 2).reshape(2, 1000, 64))
