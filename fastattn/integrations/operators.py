"""The operators of attention, of packed sequences as well, and additive attention, as PyTorch's dispatcher knows them.

Each comes with what PyTorch asks of an operator: a kernel, which works on the memory of the tensors; a fake kernel,
which knows the shapes and strides of its results without computing them, for ``torch.compile``; its derivative, which
is an operator, too; and a rule for ``vmap``. Arguments have been checked before, in `fastattn.integrations.torch` and
`fastattn.integrations.varlen`.

An operator's arguments are called as those of the function that its kernel calls, but for these. `causal`, whether
causality is wanted, is one of the words that `fastattn.call.options.check_causal` returns. A `seed` is a tensor, not an
int, so that a compiled program can draw it. Last come arguments that may be left out: `keep`, the boolean one of two
masks, where there are masks, and those of `fastattn.integrations.keywords`. Kernels, but not operators, take
`functions` behind them, and the tensors that these capture; between them that of a derivative takes `with_captured`,
for each of these tensors the names by which fastattn knows it, or none, where its gradient is not wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch

import fastattn
from fastattn.call.shapes import shapes_of_results
from fastattn.cpu.host.threads import threads_of_call
from fastattn.integrations import keywords
from fastattn.integrations.tensors import array_of, sums_dtype, tensor_of

__all__ = ["OPERATORS", "Operator", "refuse", "save_nothing"]

Tensor: TypeAlias = Any  # PyTorch's types are not known where it is not installed

CAUSAL: dict[str, bool | str] = {"no": False, "top-left": True, "bottom-right": "bottom-right"}

NUMBERS = "float dropout_p, str causal, float? scale, bool enable_gqa, Tensor? seed"
OPTIONS = f"Tensor? attn_mask, {NUMBERS}"
LENGTHS = "Tensor cu_seqlens_q, Tensor? cu_seqlens_k"
FURTHER = f"Tensor? keep=None, {keywords.SCHEMA}"
GRADIENTS = "Tensor? grad_out, Tensor? grad_lse"
OPERANDS = "Tensor query, Tensor key, Tensor value"
OF_HEADS = "bool with_alibi_slopes=False, bool with_sinks=False"
GRADIENTS_OF_OPERANDS = "Tensor grad_query, Tensor grad_key, Tensor grad_value"
GRADIENTS_OF_HEADS = "Tensor grad_alibi_slopes, Tensor grad_sinks"
SCHEMAS = {
    "attention": f"({OPERANDS}, {OPTIONS}, {FURTHER}) -> (Tensor out, Tensor lse)",
    "attention_backward": f"({GRADIENTS}, {OPERANDS}, Tensor out, Tensor lse, {OPTIONS}, bool with_attn_mask, "
    f"{FURTHER}, {OF_HEADS}) -> ({GRADIENTS_OF_OPERANDS}, Tensor grad_attn_mask, {GRADIENTS_OF_HEADS})",
    "attention_varlen": f"({OPERANDS}, {LENGTHS}, {NUMBERS}, {keywords.SCHEMA}) -> (Tensor out, Tensor lse)",
    "attention_varlen_backward": f"({GRADIENTS}, {OPERANDS}, Tensor out, Tensor lse, {LENGTHS}, {NUMBERS}, "
    f"{keywords.SCHEMA}, {OF_HEADS}) -> ({GRADIENTS_OF_OPERANDS}, {GRADIENTS_OF_HEADS})",
    "additive_attention": f"({OPERANDS}, Tensor weight, Tensor? attn_mask, str causal, {FURTHER})"
    " -> (Tensor out, Tensor lse)",
    "additive_attention_backward": f"(Tensor grad_out, {OPERANDS}, Tensor weight, Tensor out, Tensor lse, "
    f"Tensor? attn_mask, str causal, {FURTHER}, {OF_HEADS}, bool with_attn_mask=False)"
    f" -> ({GRADIENTS_OF_OPERANDS}, Tensor grad_weight, {GRADIENTS_OF_HEADS}, Tensor grad_attn_mask)",
}


class Operator:
    """The operator of a function of fastattn's, and that of its derivative.

    Attributes
    ----------
    name : str
        Of the function and of the operator. That of the derivative is `derivative`.
    operands : int
        How many tensors come first: those that have gradients.
    """

    #: What else has a gradient, behind those of the operands: one without numbers, where it is not wanted.
    others: tuple[str, ...] = ("alibi_slopes", "sinks", "attn_mask")
    #: Of these, those of which the derivative is told in front of what may be left out whether they are wanted.
    early: tuple[str, ...] = ()
    #: Whether the log-sum-exp has a gradient as well.
    differentiates_lse = False

    def __init__(self, name: str, operands: int) -> None:
        self.name, self.derivative, self.operands = name, f"{name}_backward", operands
        kernels = {name: (self.forward, self.forward_fake), self.derivative: (self.backward, self.backward_fake)}
        self._arguments: dict[str, list[str]] = {}
        for operator, (kernel, fake) in kernels.items():
            torch.library.define(f"fastattn::{operator}", SCHEMAS[operator])
            torch.library.impl(f"fastattn::{operator}", "CPU", kernel)
            torch.library.register_fake(f"fastattn::{operator}", fake)
            torch.library.register_vmap(f"fastattn::{operator}", partial(_one_by_one, operator))
            schema = getattr(torch.ops.fastattn, operator).default._schema
            self._arguments[operator] = [*(argument.name for argument in schema.arguments), "functions"]
        self._arguments[self.derivative].append("with_captured")
        arguments = getattr(torch.ops.fastattn, name).default._schema.arguments
        self._required = sum(not argument.has_default_value() for argument in arguments)  # how many no call leaves out
        torch.library.register_autograd(f"fastattn::{name}", self.differentiate, setup_context=self.save)
        torch.library.register_autograd(f"fastattn::{self.derivative}", refuse, setup_context=save_nothing)

    # -- kernels -------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        """Compute the result and its log-sum-exp."""
        out, lse = _call(self.name, return_lse=True, **_options(self._arguments[self.name], args))
        return tensor_of(out), tensor_of(lse)

    def backward(self, *args: Any) -> tuple[Tensor, ...]:
        """Compute the gradients of the operands and all others, each in one piece; empty if one is not wanted.

        Behind them are those of what functions capture, if any of these is wanted.
        """
        options = _options(self._arguments[self.derivative], args)
        if "grad_out" not in options:
            options["grad_out"] = np.zeros_like(options["out"])
        wanted = [name for name in self.others if options.pop(f"with_{name}", False)]
        captured = options.pop("with_captured", ())
        names = (*self._arguments[self.name][: self.operands], *wanted, *chain.from_iterable(captured))
        found = dict(zip(names, _call(self.derivative, **options, grads=names), strict=True))
        none = np.empty(0, options["out"].dtype)
        results = [found.get(name, none) for name in (*names[: self.operands], *self.others)]
        results += [sum(found[name] for name in each) if each else none for each in captured]
        return tuple(tensor_of(np.ascontiguousarray(array).reshape(array.shape)) for array in results)

    # -- fake kernels --------------------------------------------------------------------------------------------------

    def forward_fake(self, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        """Return empty tensors for what `forward` computes."""
        shape = _rows(query, key, value)
        return query.new_empty((*shape, value.size(-1))), query.new_empty(shape, dtype=sums_dtype(query.dtype))

    def backward_fake(self, *args: Any) -> tuple[Tensor, ...]:
        """Return empty tensors for what `backward` computes."""
        given = dict(zip(self._arguments[self.derivative], args, strict=False))
        sources = [given[name] for name in self._arguments[self.name][: self.operands]]
        gradients = [tensor.new_empty(tensor.shape) for tensor in sources]
        for name in self.others:
            wanted = given.get(f"with_{name}", False)
            gradients.append(given[name].new_empty(given[name].shape) if wanted else sources[0].new_empty(0))
        return tuple(gradients)

    # -- derivatives ---------------------------------------------------------------------------------------------------

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep for the backward pass the results, and what the operator was given, tensors as such."""
        tensors = (given if isinstance(given, torch.Tensor) else None for given in inputs)
        ctx.save_for_backward(*output, *tensors)
        ctx.others = tuple(None if isinstance(given, torch.Tensor) else given for given in inputs)
        ctx.set_materialize_grads(False)
        if not self.differentiates_lse:
            ctx.mark_non_differentiable(output[1])

    def differentiate(
        self, ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *, compute: Callable[..., Any] | None = None
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of all arguments, by the operator of the derivative or another way."""
        out, lse, *tensors = ctx.saved_tensors
        inputs = [other if tensor is None else tensor for tensor, other in zip(tensors, ctx.others, strict=True)]
        gradients: list[Tensor | None] = [None] * len(inputs)
        if grad_out is None and grad_lse is None:
            return tuple(gradients)
        compute = compute or getattr(torch.ops.fastattn, self.derivative).default
        first, last, arguments = self.operands, self._required, self._arguments[self.name]
        end = arguments.index("functions")
        places = {name: arguments.index(name) for name in self.others}
        given = len(ctx.needs_input_grad)  # arguments, of which the last may have been left out
        wanted = {name: place < given and ctx.needs_input_grad[place] for name, place in places.items()}
        upstream = (grad_out, grad_lse) if self.differentiates_lse else (grad_out,)
        early, late = ([wanted[name] for name in self.others if (name in self.early) is own] for own in (True, False))
        further, functions, tensors = inputs[last:end], inputs[end : end + 1], inputs[end + 1 :]
        captured: tuple[tuple[str, ...], ...] = ()
        if functions or any(late):
            left_out = [None] * (end - last - len(further))
            further = [*further, *left_out, *late]
        if any(ctx.needs_input_grad[end + 1 :]):
            needed = zip(functions[0].names, ctx.needs_input_grad[end + 1 :], strict=True)
            captured = tuple(names if needs else () for names, needs in needed)
        if functions:
            further += [*functions, captured, *tensors]
        found = compute(*upstream, *inputs[:first], out, lse, *inputs[first:last], *early, *further)
        gradients[:first] = found[:first]
        for (name, place), gradient in zip(places.items(), found[first:], strict=False):
            if wanted[name]:
                gradients[place] = gradient
        for i, names in enumerate(captured):
            if names:
                gradients[end + 1 + i] = found[first + len(places) + i].to(tensors[i].dtype)
        return tuple(gradients)


class Attention(Operator):
    """The operator of attention."""

    others = ("attn_mask", "alibi_slopes", "sinks")
    early = ("attn_mask",)
    differentiates_lse = True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        causal: str,
        scale: float | None,
        enable_gqa: bool,
        seed: Tensor | None,
        *further: Any,
    ) -> tuple[Tensor, Tensor]:
        """Compute the result and its log-sum-exp; what most calls do not have takes small ones no time."""
        arrays = [array_of("query", query), array_of("key", key), array_of("value", value)]
        options: dict[str, Any] = {}
        if attn_mask is not None or further:
            options = _options(["attn_mask", *self._arguments[self.name][self._required :]], (attn_mask, *further))
        mask = options.pop("attn_mask", None)
        if seed is not None:
            options["rng"] = int(seed)
        in_one_piece = query.numel() > 0 and query.is_contiguous()  # which takes less time to find out
        if not in_one_piece and _length_first(query):
            shapes = arrays[0].shape, arrays[1].shape, arrays[2].shape
            *batch, heads, length, features = shapes_of_results(*shapes, None, None, enable_gqa)[0]
            options["out"] = np.empty((*batch, length, heads, features), arrays[0].dtype).swapaxes(-3, -2)
        numbers = (dropout_p, CAUSAL[causal], scale, enable_gqa)
        out, lse = _call(self.name, *arrays, mask, *numbers, return_lse=True, **options)
        return tensor_of(out), tensor_of(lse)

    def forward_fake(self, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        """Return empty tensors for what `forward` computes."""
        out, lse = super().forward_fake(query, key, value)
        if _length_first(query):
            *batch, heads, length, features = out.shape
            out = query.new_empty((*batch, length, heads, features)).transpose(-3, -2)
        return out, lse


class Varlen(Operator):
    """The operator of attention of packed sequences."""

    others = ("alibi_slopes", "sinks")
    differentiates_lse = True

    def forward_fake(self, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        """Return empty tensors for what `forward` computes."""
        heads = _heads(query.size(1), key.size(1), value.size(1))
        lse = query.new_empty((query.size(0), heads), dtype=sums_dtype(query.dtype))
        return query.new_empty((query.size(0), heads, value.size(-1))), lse


def _options(names: list[str], args: tuple[Any, ...]) -> dict[str, Any]:
    """Return what a function of fastattn's is called with, given arguments of an operator; None stands for none.

    Behind those that have names are the tensors that functions capture.
    """
    options: dict[str, Any] = {}
    for name, given in zip(names, args, strict=False):
        if given is not None:
            told = "attn_mask" if name == "keep" else name
            options[name] = array_of(told, given) if isinstance(given, torch.Tensor) else given
    if "causal" in options:
        options["is_causal"] = CAUSAL[options.pop("causal")]
    if "seed" in options:
        options["rng"] = int(options.pop("seed"))
    if "keep" in options:
        options["attn_mask"] = (options.get("attn_mask"), options.pop("keep"))
    if "functions" in options:
        options |= options.pop("functions").on(args[len(names) :])
    keywords.restore(options)
    return options


def _length_first(query: Tensor) -> bool:
    """Whether query lies as (..., L, H, D), seen as (..., H, L, D): a projection, whose heads were split.

    The result then lies likewise, so that merging the heads again needs no copy.
    """
    return bool(query.dim() > 2 and query.size(-3) > 1 and query.size(-2) > 1 and query.stride(-3) < query.stride(-2))


def save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep nothing: there is no derivative of a derivative here."""


def refuse(ctx: Any, *gradients: Tensor | None) -> None:
    """Refuse to differentiate a derivative.

    Raises
    ------
    NotImplementedError
        Always.
    """
    raise NotImplementedError("fastattn: attention has a first derivative only; expected no backward pass through one")


def _call(name: str, *args: Any, **options: Any) -> Any:
    """Call fastattn's function with no more threads than PyTorch may use; in a worker of a DataLoader that is one."""
    function, threads = getattr(fastattn, name), torch.get_num_threads()
    if threads >= threads_of_call():
        return function(*args, **options)
    with fastattn.num_threads(threads):
        return function(*args, **options)


def _rows(query: Tensor, key: Tensor, value: Tensor) -> tuple[Any, ...]:
    """Return the shape of the log-sum-exp, (..., Hq, Lq)."""
    batch = torch.broadcast_shapes(*(tensor.shape[:-3] for tensor in (query, key, value)))
    heads = _heads(*(tensor.size(-3) if tensor.dim() > 2 else 1 for tensor in (query, key, value)))
    head_axis = (heads,) if max(tensor.dim() for tensor in (query, key, value)) > 2 else ()
    return (*batch, *head_axis, query.size(-2))


def _heads(query: Any, key: Any, value: Any) -> Any:
    """Return how many heads a result has, given how many each operand has."""
    if query != 1:
        return query
    return value if key == 1 else key


def _one_by_one(name: str, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """Call an operator on each sample alone: which weights it drops depends on the sample's seed and nothing else."""
    operator = getattr(torch.ops.fastattn, name).default
    size = info.batch_size

    def sample(arg: Any, axis: int | None, i: int) -> Any:
        if axis is None:
            return arg
        # of no samples the results have a shape nevertheless, which one of zeros tells
        return arg.select(axis, i) if size else arg.new_zeros((*arg.shape[:axis], *arg.shape[axis + 1 :]))

    samples = [
        operator(*(sample(arg, axis, i) for arg, axis in zip(args, in_dims, strict=True))) for i in range(max(1, size))
    ]
    results = tuple(torch.stack(parts)[:size] for parts in zip(*samples, strict=True))
    return results, (0,) * len(results)


#: By their names.
OPERATORS = {
    operator.name: operator
    for operator in (
        Attention("attention", operands=3),
        Varlen("attention_varlen", operands=3),
        Operator("additive_attention", operands=4),
    )
}
