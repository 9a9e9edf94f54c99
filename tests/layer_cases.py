"""What tests of layers share: masks for PyTorch's layer and ours, inputs, and what gradients are held to."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from tolerances import check_promise

from fastattn import BahdanauAttention, LuongAttention, MultiHeadAttention

Array = np.ndarray[Any, Any]

SCORES = ("dot", "general", "concat")
ALIGNMENTS = ("global", "local-m", "local-p")


def check(found: Any, exact: Any, dtype: Any = np.float64) -> None:
    """Assert that gradients have the shapes of the exact ones, and are as near to them as promised."""
    found, exact = tuple(found), tuple(exact)
    assert [one.shape for one in found] == [one.shape for one in exact]
    check_promise(found, exact, dtype)


def torch_masks(
    rng: np.random.Generator, mask: str | None, batch: int, heads: int, queries: int, keys: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments that say a mask to `MultiHeadAttention`, and the same for PyTorch's layer."""
    import torch

    ours: dict[str, Any] = {}
    their: dict[str, Any] = {}
    visible = rng.random((queries, keys)) < 0.6
    visible[:, 0] = True
    padding = np.arange(keys) < np.array([keys, 3, 5])[:, None]
    if mask in ("bool", "both"):
        ours["attn_mask"], their["attn_mask"] = visible, torch.from_numpy(~visible)
    if mask == "float":
        ours["attn_mask"] = added = rng.standard_normal((queries, keys))
        their["attn_mask"] = torch.from_numpy(added)
    if mask == "heads":
        ours["attn_mask"] = added = rng.standard_normal((batch, heads, queries, keys))
        their["attn_mask"] = torch.from_numpy(added.reshape(batch * heads, queries, keys))
    if mask in ("padding", "both"):
        ours["key_mask"], their["key_padding_mask"] = padding, torch.from_numpy(~padding)
    if mask == "causal":
        ours["is_causal"] = True
        their["attn_mask"] = torch.from_numpy(~np.tri(queries, keys, dtype=bool))
    return ours, their


def everything(results: Any) -> list[Array]:
    """Return all gradients of a backward pass in one list."""
    grad_inputs, gradients = results
    return [*grad_inputs, *gradients.values()]


def strengthened(layer: Any, factor: float = 8.0) -> Any:
    """Make parameters large: weights far from uniform, predicted positions all over the sentence."""
    for name, array in layer.state_dict().items():
        setattr(layer, name.replace(".", "_"), array * layer.dtype.type(factor))
    return layer


def luong_case(score: str, align: str, own_value: bool, mask: str | None) -> tuple[LuongAttention, Any, Any, Array]:
    """Return a layer, inputs, options and the gradient of the result, of five sentences, one of them empty."""
    rng = np.random.default_rng(0)
    key_dim = 6 if score == "dot" else 5
    options: dict[str, Any] = {"value_dim": 7} if own_value else {}
    layer = strengthened(
        LuongAttention(6, key_dim, score, align, window=4, hidden_dim=9, rng=rng, dtype=np.float64, **options)  # type: ignore[arg-type]
    )
    query, key = rng.standard_normal((5, 40, 6)), rng.standard_normal((5, 60, key_dim))
    inputs = (query, key, rng.standard_normal((5, 60, 7))) if own_value else (query, key)
    call: dict[str, Any] = {"key_lengths": np.array([60, 0, 3, 17, 53])}
    if align == "local-m" and own_value:
        call["positions"] = rng.uniform(-6, 66, (5, 40))
    if mask is not None:
        seen = rng.random((5, 40, 60)) < 0.7
        seen[0, 3] = False
        call["attn_mask"] = seen if mask == "bool" else np.where(seen, rng.standard_normal(seen.shape), -np.inf)
    return layer, inputs, call, rng.standard_normal((5, 40, layer.value_dim))


#: Layer, shapes of the inputs, some of which broadcast, and options.
CASES: dict[str, Any] = {
    "multi-head, grouped": lambda rng: (MultiHeadAttention(12, 6, num_kv_heads=2, kdim=5, rng=rng, dtype=np.float64),
                                        [(3, 7, 12), (9, 5), (3, 9, 12)], {"is_causal": "bottom-right"}),
    "multi-head, self": lambda rng: (MultiHeadAttention(12, 3, rng=rng, dtype=np.float64), [(2, 7, 12)],
                                     {"key_mask": np.arange(7) < [[7], [3]]}),
    "bahdanau": lambda rng: (BahdanauAttention(4, 5, 6, rng=rng, dtype=np.float64), [(3, 7, 4), (9, 5)],
                             {"attn_mask": rng.standard_normal((7, 9))}),
} | {
    f"luong, {score}, {align}": lambda rng, score=score, align=align: (
        strengthened(LuongAttention(5, 5, score, align, window=3, hidden_dim=4, rng=rng, dtype=np.float64)),
        [(7, 5), (3, 30, 5)], {"key_lengths": [30, 0, 11]})
    for score, align in itertools.product(SCORES, ALIGNMENTS)
} | {
    "multi-head, options": lambda rng: (MultiHeadAttention(12, 3, rng=rng, dtype=np.float64), [(3, 7, 12), (9, 12)],
                                        {"is_causal": True, "window": (4, None), "query_offset": [2, -3, 1],
                                         "key_lengths": [9, 6, 7], "softcap": 2.0}),
    "bahdanau, options": lambda rng: (BahdanauAttention(4, 5, 6, rng=rng, dtype=np.float64), [(3, 7, 4), (9, 5)],
                                      {"window": (3, 1), "query_offset": 1, "key_lengths": [9, 0, 5], "softcap": 0.7}),
} | {
    f"luong, general, {align}, options": lambda rng, align=align: (
        strengthened(LuongAttention(5, 5, "general", align, window=3, hidden_dim=4, rng=rng, dtype=np.float64)),
        [(7, 5), (3, 30, 5)], {"window": (5, 2), "query_offset": 9, "key_lengths": [30, 0, 13], "softcap": 3.0,
                               "attn_mask": (rng.standard_normal((7, 30)), rng.random((3, 7, 30)) < 0.8)})
    for align in ALIGNMENTS
}  # fmt: skip


def any_case(case: str, dtype: Any = np.float64) -> tuple[Any, tuple[Array, ...], dict[str, Any], Array]:
    """Return a layer, inputs, options and the gradient of the result."""
    rng = np.random.default_rng(1)
    layer, shapes, call = CASES[case](rng)
    if dtype != np.float64:
        narrow = type(layer)(**{name: getattr(layer, name) for name in layer.arguments}, dtype=dtype)
        narrow.load_state_dict(layer.state_dict())
        layer = narrow
    inputs = tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return layer, inputs, call, rng.standard_normal(layer(*inputs, **call).shape).astype(dtype)
