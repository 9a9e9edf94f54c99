"""Which tensors of PyTorch's the kernels can read, and their memory as arrays."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch

from fastattn.call.arrays import is_causal_bias, is_hollow
from fastattn.call.halves import BITS
from fastattn.call.problem import Array

__all__ = [
    "PLAIN",
    "array_of",
    "check_integers",
    "check_mask",
    "check_memory",
    "check_operands",
    "draw_seed",
    "in_autocast",
    "is_bias",
    "sums_dtype",
    "tensor_of",
]

Tensor: TypeAlias = Any  # PyTorch's types are not known where it is not installed

PLAIN = (torch.Tensor, torch.nn.Parameter)  # classes that add nothing to what a tensor is
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MASK_DTYPES = (torch.bool, *DTYPES)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


def check_operands(**tensors: Tensor) -> None:
    """Refuse what the kernels cannot read.

    Raises
    ------
    TypeError
        With the argument's name.
    """
    dtype = None
    for name, tensor in tensors.items():
        check_memory(name, tensor)
        if dtype is None:
            dtype = tensor.dtype
            if dtype not in DTYPES:
                raise TypeError(
                    f"{name}: dtype {dtype} is not supported; expected one of {', '.join(map(str, DTYPES))}"
                    f"{_to_convert(name, tensor)}"
                )
        elif tensor.dtype != dtype:
            raise TypeError(f"{name}: dtype {tensor.dtype}; expected {dtype}, as query")


def check_mask(mask: Tensor) -> None:
    """Refuse a mask that the kernels cannot read.

    Raises
    ------
    TypeError
        If it is no tensor in memory, or has a dtype that has no meaning here.
    """
    if check_memory("attn_mask", mask).dtype not in MASK_DTYPES:
        wanted = ", ".join(map(str, MASK_DTYPES))
        raise TypeError(
            f"attn_mask: dtype {mask.dtype} is not supported; expected one of {wanted}{_to_convert('attn_mask', mask)}"
        )


def check_integers(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of integers in memory, and refuse what is none.

    Raises
    ------
    TypeError
        With the argument's name.
    """
    if check_memory(name, tensor).dtype not in INTEGERS:
        raise TypeError(f"{name}: dtype {tensor.dtype}; expected integers, one for each row of the batch")
    return tensor


def check_memory(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor, and refuse what is none, or one whose numbers do not lie in the memory of the CPU, one by one.

    Raises
    ------
    TypeError
        With the argument's name.
    """
    if type(tensor) not in PLAIN:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: {type(tensor).__name__}; expected a torch.Tensor")
        _check_subclass(name, tensor)
    if tensor.is_nested:
        raise TypeError(
            f"{name}: a nested tensor; expected one of a single shape, which torch.nested.to_padded_tensor makes, and "
            "an attn_mask that hides the padding"
        )
    if not tensor.is_cpu:
        raise TypeError(f"{name}: a tensor on device {tensor.device}; expected one on the CPU")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: a tensor of layout {tensor.layout}; expected torch.strided")
    return tensor


def _check_subclass(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that does not say what it is: one that has no shape yet, or whose class tells nothing."""
    if is_bias(tensor):
        raise TypeError(f"{name}: a {type(tensor).__name__}, which has no numbers; expected it as attn_mask")
    for attribute in ("is_nested", "is_cpu", "layout", "dtype", "shape", "requires_grad"):
        try:
            getattr(tensor, attribute)
        except Exception as error:
            raise TypeError(
                f"{name}: a {type(tensor).__name__} whose {attribute} cannot be read; expected a torch.Tensor: {error}"
            ) from error


def is_bias(tensor: Any) -> bool:
    """Whether this is a bias of ``torch.nn.attention.bias``, which means causality."""
    return type(tensor) not in PLAIN and is_causal_bias(tensor)


def _to_convert(name: str, tensor: Tensor) -> str:
    """Say how to get float32 of what is narrower than half precision."""
    return f": {name}.float()" if tensor.dtype.is_floating_point else ""


def array_of(name: str, tensor: Tensor) -> Array:
    """Return the memory of a tensor as an array: a copy only where PyTorch has put off a change of sign.

    That of bfloat16 has the dtype `fastattn.call.halves.BITS`.

    Raises
    ------
    TypeError
        If it has no memory.
    """
    if tensor.dtype is torch.bfloat16:
        return array_of(name, tensor.view(torch.int16)).view(BITS)
    try:
        if tensor.data_ptr():
            plain: Array = tensor.numpy()
            return plain
    except RuntimeError:
        pass  # not without force: it requires grad, has a sign that is put off, or stands for another tensor
    if is_hollow(tensor):
        raise TypeError(f"{name}: a tensor of shape {tuple(tensor.shape)} that has no memory; expected one that has")
    array: Array = tensor.numpy(force=True)
    return array


def tensor_of(array: Array) -> Tensor:
    """Return the memory of an array as a tensor, which may be one of bfloat16."""
    if array.dtype == BITS:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def in_autocast(tensor: Tensor) -> Tensor:
    """Return an operand as autocast has it where that is enabled, for attention in PyTorch: in its dtype."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.dtype is torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype("cpu")) if tensor.is_cpu else tensor


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what a call is computed in, and the log-sum-exp: of half precision, float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def draw_seed() -> Tensor:
    """Draw from PyTorch's generator what decides which weights are dropped."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
