"""Functions of the user's together with every other option, at random, against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import additive_gradients
import numpy as np
import tolerances
from additive_cases import additive_calls
from hypothesis import assume, given, settings
from strategies import Call, bias_in, calls

import fastattn
from fastattn import reference
from fastattn.call.arrays import as_operands
from fastattn.call.shapes import describe
from fastattn.call.upstream import captured_sources

PLAIN = ("usual", "tiny")


def captured_by(call: Call) -> dict[str, Any]:
    """Return the floating arrays that the function of scores of a call captures, by name."""
    options = {name: given for name, given in call.options.items() if name != "rng"}
    problem, operands = describe(*as_operands(*call.args), **options)
    return captured_sources(problem, operands.captured)


@settings(max_examples=settings().max_examples // 2)
@given(call=calls(with_functions=True, dropout=False))
def test_any_call(call: Call) -> None:
    tolerances.check_call(fastattn.attention, *call.args, **call.options)


@settings(max_examples=settings().max_examples // 4)
@given(call=calls(with_functions=True, dropout=True))
def test_dropout(call: Call) -> None:
    tolerances.check_call(fastattn.attention, *call.args, **call.options)


@settings(max_examples=settings().max_examples // 4)
@given(call=calls(with_functions=True, odd=True, masks=(None, "bool", "float, -inf")))
def test_values_that_are_not_finite(call: Call) -> None:
    tolerances.check_call(fastattn.attention, *call.args, **call.options)


@settings(max_examples=settings().max_examples // 4)
@given(call=calls(with_functions=True, empty=True))
def test_axes_of_length_zero(call: Call) -> None:
    tolerances.check_call(fastattn.attention, *call.args, **call.options)


@settings(max_examples=settings().max_examples // 4)
@given(call=calls(with_functions=True, any_layout=False))
def test_the_same_bits_at_any_thread_count(call: Call) -> None:
    found: list[Any] = []
    for threads in (1, 2, 3):
        with fastattn.num_threads(threads):
            found.append(fastattn.attention(*call.args, **call.options, return_lse=True, return_weights=True))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert a.tobytes() == b.tobytes()


@settings(max_examples=settings().max_examples // 4)
@given(call=calls(with_functions=True, sizes=PLAIN))
def test_gradients(call: Call) -> None:
    query, key, value, mask = call.args
    out, lse = fastattn.attention(*call.args, **call.options, return_lse=True)
    grad_out = np.random.default_rng(0).standard_normal(out.shape).astype(out.dtype)
    with_mask = bias_in(mask) is not None
    gradients = fastattn.attention_backward(
        grad_out, query, key, value, out, lse, mask, **call.options, grad_mask=with_mask
    )
    problem, exact, bounds = tolerances.expected_gradients(grad_out, *call.args, **call.options)
    tolerances.check_gradients(gradients, call.args, problem, exact, bounds)


@settings(max_examples=settings().max_examples // 4)
@given(call=calls(with_functions=True, sizes=PLAIN, dropout=True))
def test_gradients_of_captured_arrays(call: Call) -> None:
    sources = captured_by(call)
    assume(sources)
    query, key, value, mask = call.args
    out, lse = fastattn.attention(*call.args, **call.options, return_lse=True)
    rng = np.random.default_rng(0)
    grad_out, grad_lse = (rng.standard_normal(array.shape).astype(out.dtype) for array in (out, lse))
    told = {**call.options, "grad_lse": grad_lse}
    gradients = fastattn.attention_backward(grad_out, query, key, value, out, lse, mask, **told, grads=tuple(sources))
    tolerances.check_captured_gradients(
        dict(zip(sources, gradients, strict=True)), sources, grad_out, *call.args, **told
    )


@settings(max_examples=settings().max_examples // 4)
@given(call=calls(with_functions=True, sizes=PLAIN, masks=(None,)))
def test_summary_and_weights(call: Call) -> None:
    query, key = call.query, call.key
    # numbers of query heads, and of rows, are drawn for those of value, which is not here
    options = {name: given for name, given in call.options.items() if name not in ("sinks", "alibi_slopes")}
    if "block_mask" in options and options["block_mask"].shape[:2] != (1, 1):
        options.pop("block_mask")
    wanted = tolerances.expected(query, key, key, **options)
    summary = fastattn.attention_summary(query, key, **options, top_k=3)
    problem, operands = describe(*as_operands(query, key, key), **options)
    tolerances.check_summary(summary, reference.summarise(problem, operands, 3), wanted)
    tolerances.check_weights(fastattn.attention_weights(query, key, **options), wanted)
    rows, columns = slice(None, None, 3), slice(1, None, 2)
    few = replace(wanted, weights=wanted.weights[..., rows, columns], weights_bound=wanted.weights_bound[..., rows, :])
    tolerances.check_weights(fastattn.attention_weights(query, key, **options, rows=rows, columns=columns), few)


@settings(max_examples=settings().max_examples // 4)
@given(call=additive_calls(with_functions=True))
def test_additive_attention(call: Call) -> None:
    def attend(*arrays: Any, weight: Any, rng: Any, **options: Any) -> Any:
        return fastattn.additive_attention(*arrays[:3], weight, *arrays[3:], **options)

    tolerances.check_call(attend, *call.args, **call.options)


@settings(max_examples=settings().max_examples // 4)
@given(call=additive_calls(with_functions=True))
def test_gradients_of_additive_attention(call: Call) -> None:
    additive_gradients.check(call)
