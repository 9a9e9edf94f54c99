"""What does one decoded token cost, against reading its keys and values once, and against peers?

Peers are PyTorch, ONNX Runtime's operator for decoding with a cache, and two products in NumPy.

Each alternates with a peer; the extra info has the ratio of the peer's time to ours. Long contexts come from memory,
where reading is all that counts; short ones stay in the caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.bench.peers import cores
from fastattn.call.halves import BITS, cast

ROUNDS = 21
#: Batch, query heads, heads of keys, keys, features.
LONG = ((1, 32, 32, 8192, 128), (4, 32, 8, 4096, 128), (1, 8, 1, 65536, 64))
SHORT = ((1, 12, 12, 1024, 64), (1, 8, 8, 256, 64), (1, 9, 3, 512, 64))
DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": BITS}

Call = Callable[[], object]


def inputs(case: tuple[int, ...], queries: int = 1, dtype: str = "float32") -> list[Any]:
    """Return query, key and value of a case."""
    batch, heads, kv_heads, keys, features = case
    rng = np.random.default_rng(0)
    shapes = (batch, heads, queries, features), *[(batch, kv_heads, keys, features)] * 2
    return [cast(rng.standard_normal(shape, dtype=np.float32), DTYPES[dtype]) for shape in shapes]


def tensors(*arrays: Any) -> list[Any]:
    """Return PyTorch's views of arrays."""
    torch = pytest.importorskip("torch")
    return [
        torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if array.dtype == BITS else torch.from_numpy(array)
        for array in arrays
    ]


def reading(query: Any, key: Any, value: Any) -> Call:
    """Read keys and values, and nothing else: as float32, whatever they are."""
    arrays = tensors(*(array.reshape(-1).view(np.float32) for array in (key, value)))
    return lambda: [array.sum() for array in arrays]


def by_pytorch(query: Any, key: Any, value: Any) -> Call:
    attend: Any = pytest.importorskip("torch").nn.functional.scaled_dot_product_attention
    arrays = tensors(query, key, value)
    return lambda: attend(*arrays, enable_gqa=True)


def by_onnxruntime(query: Any, key: Any, value: Any) -> Call:
    """GroupQueryAttention, of the last key and value with a cache of all others, which it adds them to in place."""
    onnxruntime = pytest.importorskip("onnxruntime")
    helper = pytest.importorskip("onnx").helper
    if query.dtype == BITS:
        pytest.skip("ONNX Runtime: it has no kernel for bfloat16 on CPUs")
    batch, heads, _, _ = query.shape
    length = key.shape[2]
    rows = {
        name: np.ascontiguousarray(x[:, :, -1:].swapaxes(1, 2)).reshape(batch, 1, -1)
        for name, x in {"query": query, "key": key, "value": value}.items()
    }
    cache = {"past_key": key, "past_value": value}
    lengths = {"seqlens_k": np.full(batch, length - 1, np.int32), "total_sequence_length": np.array(length, np.int32)}
    given: dict[str, Any] = {**rows, **cache, **lengths}
    results = {"out": rows["query"], "present_key": key, "present_value": value}
    infos = [
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for name, x in arrays.items()
        ]
        for arrays in (given, results)
    ]
    node = helper.make_node(
        "GroupQueryAttention", list(given), list(results), domain="com.microsoft", num_heads=heads,
        kv_num_heads=key.shape[1],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "decode", *infos), opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = cores(), 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x) for name, x in given.items()}
    out = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros_like(rows["query"]))
    binding = session.io_binding()
    for name, bound in values.items():
        binding.bind_ortvalue_input(name, bound)
    for name, bound in (("out", out), ("present_key", values["past_key"]), ("present_value", values["past_value"])):
        binding.bind_ortvalue_output(name, bound)
    session.run_with_iobinding(binding)
    wanted = fastattn.attention(query, key, value, enable_gqa=True)
    np.testing.assert_allclose(
        out.numpy().reshape(batch, heads, 1, -1), wanted, atol=1e-2 if query.itemsize < 4 else 1e-4
    )
    return lambda: session.run_with_iobinding(binding)


def by_products(query: Any, key: Any, value: Any) -> Call:
    """Two products of matrices, and the softmax in between, of a group of heads at once."""
    batch, kv_heads, _, features = key.shape
    rows, scale = query.reshape(batch, kv_heads, -1, features), np.float32(features**-0.5)

    def run() -> object:
        scores = rows @ key.swapaxes(-1, -2) * scale
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True) @ value

    return run


PEERS = {"reading": reading, "PyTorch": by_pytorch, "ONNX Runtime": by_onnxruntime, "NumPy": by_products}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", LONG + SHORT, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_query(benchmark: Any, alternate: Any, case: tuple[int, ...], dtype: str, peer: str) -> None:
    if peer == "NumPy" and dtype != "float32":
        pytest.skip("NumPy: it has no product of matrices of half precision worth the name")
    fastattn.set_num_threads(cores())
    if peer in ("reading", "PyTorch"):
        pytest.importorskip("torch").set_num_threads(cores())
    query, key, value = inputs(case, dtype=dtype)
    benchmark.group = f"decode, {dtype}, {case}"
    theirs = PEERS[peer](query, key, value)
    alternate(lambda: fastattn.attention(query, key, value, enable_gqa=True), theirs, peer, ROUNDS)


@pytest.mark.parametrize("queries", [2, 4, 8])
@pytest.mark.parametrize("case", LONG + SHORT, ids=str)
def test_several_queries(benchmark: Any, alternate: Any, case: tuple[int, ...], queries: int) -> None:
    """Queries that are checked at once, alternating with as many calls for one: the ratio is above 1 if that pays."""
    fastattn.set_num_threads(cores())
    query, key, value = inputs(case, queries)
    single = [query[:, :, i : i + 1] for i in range(queries)]
    options: Any = {"enable_gqa": True, "is_causal": "bottom-right"}

    def one_by_one() -> None:
        for one in single:
            fastattn.attention(one, key, value, **options)

    benchmark.group = f"{queries} queries, {case}"
    alternate(lambda: fastattn.attention(query, key, value, **options), one_by_one, "one by one", ROUNDS)
