"""Attention for JAX on CPUs: a callback into fastattn's kernels, with their derivative."""

from __future__ import annotations

from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import numpy as np

from fastattn.call.advice import to_install

try:
    import jax
except ImportError as error:
    raise ImportError(f"fastattn.integrations.jax needs JAX: {to_install('jax')}") from error

import fastattn
from fastattn.call.advice import to_convert
from fastattn.call.arrays import DTYPES, as_masks
from fastattn.call.halves import is_floating, name_of, real_of
from fastattn.call.options import check_flag
from fastattn.call.score_options import FurtherOptions, check_names
from fastattn.call.shapes import shapes_of_results
from fastattn.call.types import Causal, Number
from fastattn.functions.function import described, rebuilt

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["attention"]

ARRAYS = (jax.Array, np.ndarray, np.generic)
OPERANDS = ("query", "key", "value")
SOURCES = (*OPERANDS, "bias", "alibi_slopes", "sinks")  # of gradients
FUNCTIONS = ("score_mod", "mask_mod")
Array: TypeAlias = jax.Array

#: What a compiled program is given from call to call: operands, a floating mask as `bias`, a boolean one as `keep`,
#: those options that are arrays, and what functions capture that is traced, as `score_mod 0` and so on.
Arrays: TypeAlias = "dict[str, Array]"
#: What else a call is told, by names: part of a compiled program, and as hashable.
Told: TypeAlias = "tuple[tuple[str, Any], ...]"


# fmt: off
@overload
def attention(
    query: Array, key: Array, value: Array, attn_mask: Array | tuple[Array | None, Array | None] | None = ...,
    is_causal: Causal = ..., scale: Number | None = ..., enable_gqa: bool = ..., *, return_lse: Literal[False] = ...,
    **options: Unpack[FurtherOptions],
) -> Array: ...
@overload
def attention(
    query: Array, key: Array, value: Array, attn_mask: Array | tuple[Array | None, Array | None] | None = ...,
    is_causal: Causal = ..., scale: Number | None = ..., enable_gqa: bool = ..., *, return_lse: Literal[True],
    **options: Unpack[FurtherOptions],
) -> tuple[Array, Array]: ...
@overload
def attention(
    query: Array, key: Array, value: Array, attn_mask: Array | tuple[Array | None, Array | None] | None = ...,
    is_causal: Causal = ..., scale: Number | None = ..., enable_gqa: bool = ..., *, return_lse: bool = ...,
    **options: Unpack[FurtherOptions],
) -> Array | tuple[Array, Array]: ...
# fmt: on
def attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | tuple[Array | None, Array | None] | None = None,
    is_causal: Causal = False,
    scale: Number | None = None,
    enable_gqa: bool = False,
    *,
    return_lse: bool = False,
    **options: Unpack[FurtherOptions],
) -> Any:
    """Scaled dot-product attention: `fastattn.attention`, differentiable once in reverse mode.

    Works under ``jit``, ``grad`` and ``vmap``, on the CPU. Layouts are fastattn's, heads before lengths.

    Parameters
    ----------
    query : jax.Array, shape (..., Hq, Lq, D)
        float16, bfloat16, float32, or float64 where JAX has that enabled.
    key : jax.Array, shape (..., Hk, Lk, D)
    value : jax.Array, shape (..., Hk, Lk, Dv)
    attn_mask : jax.Array, broadcasting to (..., Hq, Lq, Lk), optional
        Boolean, where True takes part, or floating, added to the scores; or one of each, as a tuple (bias, keep).
    is_causal : bool or "bottom-right"
        True: query i looks at the keys up to i. "bottom-right": up to i + Lk - Lq, as in decoding.
    scale : float, optional
        Factor of query · key, 1/sqrt(D) unless given.
    enable_gqa : bool
        Grouped queries: Hq is a multiple of Hk.
    return_lse : bool
        Return the natural logarithm of the sum of exp(score) over the keys as well. It is differentiable, too.
    **options
        What `fastattn.attention` takes by keyword: ``window=(left, right)``, ``query_offset``, an int or an array of
        integers, ``key_lengths``, an array of integers, ``softcap``, and ``alibi_slopes`` and ``sinks``, arrays that
        have gradients. Arrays may be traced. ``score_mod`` and ``mask_mod`` are functions, written with ``jax.numpy``
        or ``numpy``, which are compiled by fastattn and never traced. Arrays that they capture may be traced, and those
        that ``score_mod`` captures have gradients. Where nothing that a function captures is traced, it is read when
        the call runs. Under ``vmap`` each call counts its own batch. ``block_mask`` is a `fastattn.BlockMask`.

    Returns
    -------
    out : jax.Array, shape (..., Hq, Lq, Dv)
    lse : jax.Array, shape (..., Hq, Lq)
        If `return_lse`, of half precision in float32; with sinks over these as well. -inf, or the sink, for a query
        that may look at no key.

    Raises
    ------
    TypeError
        If an argument is no array, or query, key and value are not of one dtype that has a meaning here.
    ValueError
        If shapes do not go together. The message names the argument.

    Examples
    --------
    >>> import jax
    >>> from fastattn.integrations.jax import attention
    >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 8, 16, 64))
    >>> jax.jit(jax.grad(lambda query: attention(query, key, value).sum()))(query).shape
    (2, 8, 16, 64)
    """
    check_names(options)
    operands: Arrays = dict(zip(OPERANDS, (query, key, value), strict=True))
    given: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa, **options}
    varying = {name: option for name, option in given.items() if isinstance(option, (jax.Array, np.ndarray))}
    for name in FUNCTIONS:
        if isinstance(given.get(name), FunctionType):
            function = _Function(name, given[name])
            if function.traced:
                given[name] = function
                varying |= function.named()
    told = tuple((name, _hashable(option)) for name, option in given.items() if name not in varying)
    arrays = {**operands, **({} if attn_mask is None else _masks(attn_mask)), **varying}
    _check_operands(operands)
    _check_shapes(told, arrays)
    results = _attention(2 if check_flag("return_lse", return_lse) else 1, told, arrays)
    return results if return_lse else results[0]


# -- checks ------------------------------------------------------------------------------------------------------------


def _masks(given: Any) -> Arrays:
    """Return the floating mask and the boolean one of an argument, those that there are.

    Raises
    ------
    TypeError
        If it is no array, or none of a dtype that has a meaning here.
    """
    pair = given if isinstance(given, tuple) and len(given) == 2 else None
    masks = [mask for mask in pair or (given,) if mask is not None]
    for mask in masks:
        if not isinstance(mask, ARRAYS):
            raise TypeError(f"attn_mask: {type(mask).__name__}; expected a jax.Array")
    # of different shapes: two alike are no rows of one mask here
    blank = [None if mask is None else np.zeros((1,) * i, mask.dtype) for i, mask in enumerate(pair or (given,))]
    as_masks(tuple(blank) if pair else blank[0])
    return {"keep" if mask.dtype == bool else "bias": mask for mask in masks}


def _hashable(option: Any) -> Any:
    return tuple(option) if isinstance(option, list) else option


def _check_operands(operands: Arrays) -> None:
    """Refuse a call while it is traced, when there are dtypes and no numbers yet."""
    for name, array in operands.items():
        if not isinstance(array, ARRAYS):
            raise TypeError(f"{name}: {type(array).__name__}; expected a jax.Array")
    for name, array in operands.items():
        known = name_of(array.dtype) in DTYPES
        if not known or array.dtype != operands["query"].dtype:
            narrow = "" if known or not np.can_cast(array.dtype, np.float32) else to_convert(name, array.dtype, array)
            raise TypeError(
                f"{name}: dtype {array.dtype}; expected one of {', '.join(DTYPES)}, the same for all three{narrow}"
            )


def _check_shapes(told: Told, arrays: Arrays) -> None:
    """Refuse what does not go together, and functions that capture a list in which something is traced."""
    try:
        _shapes(told, arrays)
    except TypeError as error:
        if isinstance(error.__cause__, jax.errors.TracerArrayConversionError):
            raise TypeError(f"{error}, or one traced jax.Array, in no list") from error
        raise


def _shapes(told: Told, arrays: Arrays) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the result and the log-sum-exp; options that are traced count as zeros."""
    masks = [arrays[name].shape if name in arrays else None for name in ("bias", "keep")]
    options: Any = {name: each.outline if isinstance(each, _Function) else each for name, each in told}
    others = {name for name in arrays if name.startswith(FUNCTIONS)}.union(OPERANDS, ("bias", "keep"))
    options |= {name: _known(array) for name, array in arrays.items() if name not in others}
    return shapes_of_results(*(arrays[name].shape for name in OPERANDS), *masks, **options)


def _known(array: Array) -> Any:
    return np.zeros(array.shape, array.dtype) if isinstance(array, jax.core.Tracer) else np.asarray(array)


# -- functions that capture what is traced -----------------------------------------------------------------------------


class _Function:
    """A user's function with something else in the place of what it captures that is traced, and has no numbers yet.

    Attributes
    ----------
    role : str
        The argument that it was given as.
    traced : list of jax.core.Tracer
        Each once.
    outline : function
        It captures arrays of their shapes and dtypes instead, which have no memory.
    """

    def __init__(self, role: str, given: FunctionType) -> None:
        self.role = role
        self.traced: list[Any] = []
        self._places: list[np.ndarray[Any, Any]] = []
        self.outline = rebuilt(role, given, self._outlined)

    def _outlined(self, name: str, value: Any) -> Any:
        if not isinstance(value, jax.core.Tracer):
            return value
        for known, place in zip(self.traced, self._places, strict=True):
            if known is value:
                return place
        self.traced.append(value)
        self._places.append(np.broadcast_to(np.zeros((), value.dtype), value.shape))
        return self._places[-1]

    def named(self) -> Arrays:
        """Return what is traced under the names that it has among the arrays of a call, and forget it."""
        traced, self.traced = self.traced, []
        return {f"{self.role} {number}": value for number, value in enumerate(traced)}

    def names(self) -> dict[str, list[str]]:
        """Return by which names fastattn knows each of the arrays that have gradients: several, if the function has."""
        function, values = described(self.role, self.outline)
        known = list(zip(function.captured, values, strict=True))
        found = {}
        for number, place in enumerate(self._places):
            names = [each.name for each, value in known if value is place and "float" in each.kind]
            if names and self.role == "score_mod":
                found[f"{self.role} {number}"] = names
        return found

    def on(self, arrays: Arrays) -> FunctionType:
        """Return the function on arrays, which are taken out of those of a call."""
        given = {id(place): arrays.pop(f"{self.role} {number}") for number, place in enumerate(self._places)}
        return rebuilt(self.role, self.outline, lambda name, value: given.get(id(value), value))


# -- calls -------------------------------------------------------------------------------------------------------------


def _called(function: Any, results: Any, *given: Any) -> Any:
    """Call with NumPy arrays, outside of JAX; a batch of vmap one by one."""
    return jax.pure_callback(
        lambda *arrays: function(*jax.tree.map(np.asarray, arrays)), results, *given, vmap_method="sequential"
    )


def _call(told: Told, arrays: Arrays) -> dict[str, Any]:
    """Return what a function of fastattn's is called with."""
    given = {**dict(told), **arrays}
    for name in FUNCTIONS:
        if isinstance(given.get(name), _Function):
            given[name] = given[name].on(given)
    return {"attn_mask": (given.pop("bias", None), given.pop("keep", None)), **given}


def _computed(told: Told, arrays: Arrays) -> tuple[Array, ...]:
    """Return the result and the log-sum-exp."""

    def forward(arrays: Arrays) -> list[Any]:
        return list(fastattn.attention(**_call(told, arrays), return_lse=True))

    dtype = arrays["query"].dtype
    results = zip(_shapes(told, arrays), (dtype, real_of(dtype)), strict=True)
    return tuple(_called(forward, [jax.ShapeDtypeStruct(*each) for each in results], arrays))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(wanted: int, told: Told, arrays: Arrays) -> tuple[Array, ...]:
    """Return the result, or it and the log-sum-exp."""
    return _computed(told, arrays)[:wanted]


def _forward(wanted: int, told: Told, primals: dict[str, Any]) -> tuple[tuple[Array, ...], tuple[Any, ...]]:
    for name, primal in primals.items():
        has_none = name not in SOURCES and not name.startswith(FUNCTIONS)
        if primal.perturbed and has_none and is_floating(primal.value.dtype):
            raise ValueError(
                f"{name}: differentiated by, but its gradient is not computed; expected a constant, such as "
                f"jax.lax.stop_gradient({name})"
            )
    arrays = {name: primal.value for name, primal in primals.items()}
    results = _computed(told, arrays)
    return results[:wanted], (arrays, *results)


def _backward(wanted: int, told: Told, saved: tuple[Any, ...], cotangents: tuple[Any, ...]) -> tuple[Arrays]:
    """Return the gradients of the arrays that have some."""
    arrays, *results = saved
    upstream = [
        jax.numpy.zeros(given.shape, given.dtype) if isinstance(given, jax.custom_derivatives.SymbolicZero) else given
        for given in cotangents
    ]
    named = {name: [name] for name in SOURCES if name in arrays and is_floating(arrays[name].dtype)}
    named |= {"bias": ["attn_mask"]} if "bias" in named else {}
    score_mod = dict(told).get("score_mod")
    named |= score_mod.names() if isinstance(score_mod, _Function) else {}
    grads, sources = [each for names in named.values() for each in names], list(named)

    def backward(arrays: Arrays, out: Any, lse: Any, grad_out: Any, grad_lse: Any = None) -> list[Any]:
        upstream = {"grad_out": grad_out, "out": out, "lse": lse, "grad_lse": grad_lse}
        found = fastattn.attention_backward(**upstream, **_call(told, arrays), grads=grads)
        of_names = dict(zip(grads, found, strict=True))
        sums: list[Any] = [sum(of_names[each] for each in names) for names in named.values()]
        return [each.astype(arrays[name].dtype, copy=False) for name, each in zip(named, sums, strict=True)]

    shapes = [jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype) for name in sources]
    gradients = _called(backward, shapes, arrays, *results, *upstream)
    return ({**dict.fromkeys(arrays), **dict(zip(sources, gradients, strict=True))},)


_attention.defvjp(_forward, _backward, symbolic_zeros=True)
