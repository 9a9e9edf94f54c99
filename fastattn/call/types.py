"""What users give and get back, in types: for signatures, and for those who have their calls checked.

NumPy's own ArrayLike takes strings and complex numbers as well. What is array_like here has real numbers, or booleans.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from typing_extensions import TypeVar as Variable  # one that has a default

    #: Scalar types of floating arrays: of all arguments that promote together, or of one. What NumPy's typing does not
    #: say of an array, as that of a list, is Any.
    Floating = Variable("Floating", bound=np.floating[Any], default=Any)
    OfQuery = Variable("OfQuery", bound=np.floating[Any], default=Any)
    OfKey = Variable("OfKey", bound=np.floating[Any], default=Any)
    OfValue = Variable("OfValue", bound=np.floating[Any], default=Any)
    OfWeight = Variable("OfWeight", bound=np.floating[Any], default=Any)
    #: Any scalar type: ml_dtypes declares bfloat16 as no more than that.
    Scalar = Variable("Scalar", bound=np.generic, default=Any)
else:
    Floating = OfQuery = OfKey = OfValue = OfWeight = Scalar = Any

__all__ = [
    "Backend",
    "Causal",
    "DeviceBackend",
    "Floating",
    "IntegerLike",
    "MaskLike",
    "Number",
    "NumberLike",
    "OfKey",
    "OfQuery",
    "OfValue",
    "OfWeight",
    "OnDevice",
    "Operand",
    "Scalar",
]

T_co = TypeVar("T_co", covariant=True)
DType_co = TypeVar("DType_co", bound="np.dtype[Any]", covariant=True)


class HasArray(Protocol[DType_co]):
    """Whatever NumPy makes an array of by its own method: arrays of all libraries, in the host's memory."""

    def __array__(self) -> np.ndarray[Any, DType_co]: ...


class OnDevice(Protocol):
    """An array that may be in the memory of a GPU: what is made of it is of its own library there."""

    @property
    def __cuda_array_interface__(self) -> Any: ...


class Nested(Protocol[T_co]):
    """A list, or a list of such lists; a string, whose elements are strings again, is none."""

    def __len__(self, /) -> int: ...
    def __contains__(self, item: object, /) -> bool: ...  # strings ask for a string
    def __getitem__(self, index: int, /) -> T_co | Nested[T_co]: ...
    def __iter__(self, /) -> Iterator[T_co | Nested[T_co]]: ...
    def __reversed__(self, /) -> Iterator[T_co | Nested[T_co]]: ...
    def count(self, item: Any, /) -> int: ...
    def index(self, item: Any, /) -> int: ...


AnyArray: TypeAlias = HasArray[np.dtype[Any]]
IntegerArray: TypeAlias = HasArray[np.dtype[np.integer[Any]]]
CountingArray: TypeAlias = HasArray[np.dtype[np.bool_ | np.integer[Any]]]

#: Queries, keys, values and what comes of them. One that is an array of a floating dtype says what `Scalar` is.
Operand: TypeAlias = NDArray[Scalar] | CountingArray | Nested[float] | Nested[AnyArray]
Number: TypeAlias = float | np.floating[Any] | np.integer[Any]
NumberLike: TypeAlias = float | AnyArray | Nested[float] | Nested[AnyArray]
IntegerLike: TypeAlias = int | IntegerArray | Nested[int] | Nested[IntegerArray]
MaskLike: TypeAlias = NumberLike | tuple[NumberLike | None, NumberLike | None]  # a pair is (bias, keep)

Causal: TypeAlias = bool | Literal["bottom-right"]
Backend: TypeAlias = Literal["cpu", "reference"]  # of everything
DeviceBackend: TypeAlias = Literal["cpu", "cuda", "reference"]  # of attention, which CUDA has kernels for
