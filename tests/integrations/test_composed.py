"""PyTorch and JAX with every option at once, at random: the bits that NumPy's arrays get, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from strategies import Call, bias_in, bits_of, calls, each

import fastattn
from fastattn.call.halves import is_bfloat16

Gradients = dict[str, Any]
FEW = settings().max_examples // 3
composed = calls(any_layout=False, with_functions=True, sizes=("usual",), masks=(None, "bool", "float", "float, -inf"))


def made(call: Call, tensor: Callable[[Any], Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments and options of a call, with tensors in place of arrays; whole numbers are int64."""
    options = {
        name: tensor(option.astype(np.int64) if option.dtype.kind in "iu" else option)
        if isinstance(option, np.ndarray)
        else option
        for name, option in call.options.items()
    }
    return [each(tensor, given) for given in call.args], options


def sources_of(args: Any, options: dict[str, Any]) -> Gradients:
    """Return what has gradients, by the names of arguments."""
    found = dict(zip(("query", "key", "value", "attn_mask"), (*args[:3], bias_in(args[3])), strict=True))
    found |= {name: options.get(name) for name in ("alibi_slopes", "sinks")}
    return {name: array for name, array in found.items() if array is not None}


def by_numpy(call: Call) -> tuple[tuple[Any, Any], tuple[Any, Any], Gradients]:
    """Return the results of a call, gradients by these, and the gradients by its arguments."""
    query, key, value, mask = call.args
    results = fastattn.attention(*call.args, **call.options, return_lse=True)
    rng = np.random.default_rng(0)
    above = tuple(rng.standard_normal(result.shape).astype(result.dtype) for result in results)
    names = tuple(sources_of(call.args, call.options))
    told: Any = call.options | {"grad_lse": above[1], "grads": names}
    gradients = fastattn.attention_backward(above[0], query, key, value, *results, mask, **told)
    return results, above, dict(zip(names, gradients, strict=True))


@settings(max_examples=FEW)
@given(call=composed)
def test_pytorch_has_the_bits_of_numpy(call: Call) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from fastattn.integrations.torch import attention_with_lse

    def tensor_of(array: Any) -> Any:
        if not is_bfloat16(array.dtype):
            return torch.from_numpy(np.array(array))
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)

    def leaf(array: Any) -> Any:
        tensor = tensor_of(array)
        return tensor.requires_grad_(tensor.is_floating_point())

    def array_of(tensor: Any) -> Any:
        found = tensor.detach()
        return found.view(torch.int16).numpy() if found.dtype == torch.bfloat16 else found.numpy()

    results, above, wanted = by_numpy(call)
    args, options = made(call, leaf)
    found = attention_with_lse(*args, **options)
    assert bits_of(*map(array_of, found)) == bits_of(*results)
    sources = sources_of([*args[:3], None], options) | {"attn_mask": torch_bias(args[3])}
    gradients = torch.autograd.grad(found, [sources[name] for name in wanted], list(map(tensor_of, above)))
    assert bits_of(*map(array_of, gradients)) == bits_of(*wanted.values())


def torch_bias(mask: Any) -> Any:
    """Return the floating mask, alone or in a pair."""
    return mask[0] if isinstance(mask, tuple) else mask


@settings(max_examples=FEW)
@given(call=composed)
def test_jax_has_the_bits_of_numpy(call: Call) -> None:
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    from fastattn.integrations.jax import attention

    results, above, wanted = by_numpy(call)
    with jax.enable_x64(True):
        args, options = made(call, jax.numpy.asarray)
        sources = sources_of([*args[:3], None], options) | {"attn_mask": torch_bias(args[3])}

        def compute(sources: Gradients) -> Any:
            keep = args[3][1] if isinstance(args[3], tuple) else args[3]
            bias = sources.get("attn_mask")
            mask = keep if bias is None else (bias, keep) if isinstance(args[3], tuple) else bias
            of_heads = {name: given for name, given in sources.items() if name in options}
            operands = [sources[name] for name in ("query", "key", "value")]
            return attention(*operands, mask, **options | of_heads, return_lse=True)

        found, transposed = jax.vjp(compute, {name: sources[name] for name in wanted})
        (gradients,) = transposed(tuple(map(jax.numpy.asarray, above)))
    assert bits_of(*map(np.asarray, found)) == bits_of(*results)
    assert bits_of(*(np.asarray(gradients[name]) for name in wanted)) == bits_of(*wanted.values())
