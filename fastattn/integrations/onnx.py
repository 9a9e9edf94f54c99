"""ONNX's attention for its reference evaluator: the operators Attention and FlexAttention, computed by fastattn."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np

from fastattn.call.advice import to_install

try:
    from onnx.reference.op_run import OpRun
except ImportError as error:
    raise ImportError(f"fastattn.integrations.onnx needs ONNX: {to_install('onnx')}") from error

import fastattn
from fastattn.call.halves import cast
from fastattn.call.problem import Array
from fastattn.call.selection import describe_scores
from fastattn.integrations import nodes
from fastattn.integrations.graphs import Function, function_of
from fastattn.reference.forward import value_of, visibility

__all__ = ["Attention", "FlexAttention"]

#: What is asked of `fastattn.attention` besides its operands, by the names of its arguments.
Options: TypeAlias = "dict[str, Any]"

#: What qk_matmul_output_mode may be: scale · query · key (0), this under the softcap, with all masks, the weights.
CAPPED, MASKED, WEIGHTS = range(1, 4)
PADDING_OPSET = 24  # the first in which a mask may have fewer keys than there are
ELEMENTS = 1 << 22  # of the weights that a function of the node's is given at a time


class Operands(NamedTuple):
    """What a node attends with, heads first: shapes (B, Hq, Lq, D), (B, Hk, Lk, D) and (B, Hk, Lk, Dv)."""

    query: Array
    key: Array
    value: Array


class Attention(OpRun):  # type: ignore[misc]
    """The operator Attention of opsets 23 to 25, for `onnx.reference.ReferenceEvaluator`.

    What a node asks for is asked of `fastattn.attention`: causality and windows are intervals of keys, which a past
    shifts, ``nonpad_kv_seqlen`` is the number of keys of each row of the batch, and a mask of fewer keys than there are
    hides the others without growing. A matrix of all scores exists only if the node has ``qk_matmul_output``.

    Raises
    ------
    ValueError
        If an input or an attribute is one that has no meaning here. The message names it.

    Notes
    -----
    float16 and bfloat16 are computed with in float32, and what is returned is rounded. The softmax is at least as exact
    as ``softmax_precision`` asks; DOUBLE has the whole node computed in float64. A query that may look at no key gives
    0.

    Examples
    --------
    >>> import numpy as np
    >>> from onnx import TensorProto, helper
    >>> from onnx.reference import ReferenceEvaluator
    >>> from fastattn.integrations.onnx import Attention
    >>> names = ["Q", "K", "V", "Y"]
    >>> *inputs, output = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    >>> node = helper.make_node("Attention", names[:3], names[3:], is_causal=1)
    >>> graph = helper.make_graph([node], "attention", inputs, [output])
    >>> model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)])
    >>> arrays = np.random.default_rng(0).standard_normal((3, 2, 8, 16, 64), dtype=np.float32)
    >>> evaluator = ReferenceEvaluator(model, new_ops=[Attention])
    >>> evaluator.run(None, dict(zip(names, arrays)))[0].shape
    (2, 8, 16, 64)
    """

    def _run(
        self,
        Q: Array,
        K: Array,
        V: Array,
        attn_mask: Array | None = None,
        past_key: Array | None = None,
        past_value: Array | None = None,
        nonpad_kv_seqlen: Array | None = None,
        **attributes: Any,
    ) -> tuple[Array, ...]:
        """Return Y, present_key, present_value and, if the node has it, qk_matmul_output."""
        nodes.check_attributes(attributes)
        nodes.check_arrays((3, 4), Q=Q, K=K, V=V)
        query = nodes.heads_first("Q", Q, "q_num_heads", attributes["q_num_heads"])
        key = nodes.heads_first("K", K, "kv_num_heads", attributes["kv_num_heads"])
        value = nodes.heads_first("V", V, "kv_num_heads", attributes["kv_num_heads"])
        nodes.check_shapes(query, key, value)
        offset: Any = 0
        if past_key is not None or past_value is not None:
            if nonpad_kv_seqlen is not None:
                raise ValueError("nonpad_kv_seqlen: given together with a past; expected one of them")
            offset = -key.shape[2]
            key, value = nodes.with_past(past_key, past_value, key, value)
            offset += key.shape[2]

        keys = seen = key.shape[2]
        if attn_mask is not None:
            pads = self.run_params["opsets"].get("", PADDING_OPSET) >= PADDING_OPSET
            attn_mask, seen = nodes.as_mask(attn_mask, (*query.shape[:3], keys), pads)
        lengths = None
        if nonpad_kv_seqlen is not None:
            lengths = nodes.as_lengths(nonpad_kv_seqlen, len(key), keys)
            offset, lengths = lengths - query.shape[2], np.minimum(lengths, seen)
        options = {**_asked(attributes), "attn_mask": attn_mask, "query_offset": offset, "key_lengths": lengths}
        double = attributes["softmax_precision"] == nodes.DOUBLE
        operands = Operands(*(nodes.in_wider_type(array, double) for array in (query, key, value)))
        mode = attributes["qk_matmul_output_mode"] if len(self.output) > 3 and self.output[3] else None
        out, *matrix = _computed(operands, options, seen, mode)
        if Q.ndim == 3:
            out = out.swapaxes(1, 2).reshape(*Q.shape[:2], query.shape[1] * value.shape[3])
        return (cast(out, Q.dtype), key, value, *(cast(scores, Q.dtype) for scores in matrix))


class FlexAttention(OpRun):  # type: ignore[misc]
    """The operator FlexAttention of ai.onnx.preview, for `onnx.reference.ReferenceEvaluator`.

    ``score_mod`` and ``prob_mod`` are graphs of operators that work on each element by itself. They are made functions
    of a score, or a weight, and its place. Of places, which a graph makes of the shape of its input, no matrix is made,
    nor of what it computes with them element by element.

    Raises
    ------
    ValueError
        If an input or an attribute is one that has no meaning here, or a graph has an operator that mixes elements of
        its input. The message names it.

    Notes
    -----
    As in `Attention`, half precision is computed with in float32, the softmax is at least as exact as
    ``softmax_precision`` asks, and a query all of whose scores are -inf gives 0. A graph may use what the graph around
    it has computed.
    """

    op_domain = "ai.onnx.preview"

    def need_context(self) -> bool:
        """Whether the evaluator is to say what has been computed so far, which graphs may use."""
        return bool(self.has_subgraph)

    def _run(
        self,
        Q: Array,
        K: Array,
        V: Array,
        *,
        scale: float | None = None,
        score_mod: Any = None,
        prob_mod: Any = None,
        softmax_precision: int | None = None,
        context: dict[str, Any] | None = None,
        attributes: Any = None,
        bindings: Any = None,
        **others: Any,
    ) -> tuple[Array, ...]:
        """Return Y; `attributes` and `bindings` are what the evaluator gives to nodes that run their graphs."""
        nodes.check_attributes({"scale": scale, "softmax_precision": softmax_precision, **others})
        nodes.check_arrays((4,), Q=Q, K=K, V=V)
        nodes.check_shapes(Q, K, V)
        double = softmax_precision == nodes.DOUBLE
        operands = Operands(*(nodes.in_wider_type(array, double) for array in (Q, K, V)))
        shape = (*Q.shape[:3], K.shape[2])
        changed, weighed = (
            None if graph is None else function_of(name, graph, shape, operands.query.dtype, context or {})
            for name, graph in (("score_mod", score_mod), ("prob_mod", prob_mod))
        )
        options: Options = {"scale": scale, "enable_gqa": True, "score_mod": changed}
        if weighed is None:
            return (cast(fastattn.attention(*operands, **options), Q.dtype),)
        return (cast(_by_rows(operands, options, weighed), Q.dtype),)


# -- results -----------------------------------------------------------------------------------------------------------


def _asked(attributes: dict[str, Any]) -> Options:
    """Return what attributes ask of a score."""
    reach = (attributes["left_window_size"], attributes["right_window_size"])
    return {
        "is_causal": bool(attributes["is_causal"]),
        "window": tuple(None if keys == -1 else keys for keys in reach),
        "scale": attributes["scale"],
        "softcap": attributes["softcap"] or None,
        "enable_gqa": True,
    }


def _computed(operands: Operands, options: Options, seen: int, mode: int | None) -> tuple[Array, ...]:
    """Return the result, and the matrix of a mode if there is one.

    Of the keys only the first ones, as many as are `seen`, are looked at.
    """
    query, key, value = operands
    near = key[:, :, :seen]
    results: Any = fastattn.attention(query, near, value[:, :, :seen], **options, return_weights=mode == WEIGHTS)
    if mode is None:
        return (results,)
    if mode == WEIGHTS:
        return results[0], _with_columns(results[1], key.shape[2], 0)
    if mode == MASKED:
        return results, _with_columns(_scores(query, near, **options), key.shape[2], -np.inf)
    plain = ("scale", "enable_gqa", "softcap") if mode == CAPPED else ("scale", "enable_gqa")
    return results, _scores(query, key, **{name: options[name] for name in plain})


@np.errstate(all="ignore")
def _scores(query: Array, key: Array, attn_mask: Any = None, is_causal: bool = False, **options: Any) -> Array:
    """Return the scores of all queries and keys, -inf where a query may not look."""
    scale, enable_gqa = options.pop("scale"), options.pop("enable_gqa")
    problem, operands = describe_scores(query, key, attn_mask, is_causal, scale, enable_gqa, **options)
    raw = problem.scores.scale * (operands.query @ operands.key.swapaxes(-1, -2))
    scores = np.where(visibility(problem, operands), value_of(problem, operands, raw), -np.inf)
    return scores.reshape(problem.weights_shape)


def _with_columns(matrix: Array, columns: int, filling: float) -> Array:
    """Return a matrix with more columns, of one number."""
    if matrix.shape[-1] == columns:
        return matrix
    whole = np.full((*matrix.shape[:-1], columns), filling, matrix.dtype)
    whole[..., : matrix.shape[-1]] = matrix
    return whole


@np.errstate(all="ignore")
def _by_rows(operands: Operands, options: Options, prob_mod: Function) -> Array:
    """Return attention whose weights are changed by a function, some rows of the matrix at a time."""
    query, key, value = operands
    batch, heads, queries, _ = query.shape
    kv_heads, keys, width = value.shape[1:]
    out = np.empty((batch, heads, queries, width), np.result_type(query, key, value))
    step = max(1, ELEMENTS // max(1, batch * heads * keys))
    for start in range(0, queries, step):
        rows = range(start, min(start + step, queries))
        weights = fastattn.attention_weights(query, key, **options, rows=slice(rows.start, rows.stop))
        places = np.ix_(range(batch), range(heads), rows, range(keys))
        changed = np.broadcast_to(prob_mod(weights, *places), weights.shape).astype(out.dtype)
        grouped = changed.reshape(batch, kv_heads, heads // max(1, kv_heads), len(rows), keys)
        out[:, :, start : rows.stop] = (grouped @ value[:, :, None]).reshape(batch, heads, len(rows), width)
    return out
