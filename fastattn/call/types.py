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

    #: Scalar types of arrays: of all that are promoted together, or of one; Any of lists. Of bfloat16 no more is known
    #: than np.generic, which is what ml_dtypes declares it as. All overloads of a function that say anything of results
    #: take the same types of operands: mypy would give up between others where an argument is an NDArray[Any].
    Scalar = Variable("Scalar", bound=np.generic, default=Any)
    OfQuery = Variable("OfQuery", bound=np.generic, default=Any)
    OfKey = Variable("OfKey", bound=np.generic, default=Any)
    OfValue = Variable("OfValue", bound=np.generic, default=Any)
    OfWeight = Variable("OfWeight", bound=np.generic, default=Any)
else:
    Scalar = OfQuery = OfKey = OfValue = OfWeight = Any

__all__ = [
    "Backend",
    "Causal",
    "Chosen",
    "DeviceBackend",
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

#: Queries, keys, values and what comes of them. One that is an array of another dtype says what `Scalar` is.
Operand: TypeAlias = NDArray[Scalar] | CountingArray | Nested[float] | Nested[AnyArray]
#: Which elements of an axis are meant: by their numbers, or by booleans.
Chosen: TypeAlias = CountingArray | Nested[int] | Nested[IntegerArray]
Number: TypeAlias = float | np.floating[Any] | np.integer[Any]
NumberLike: TypeAlias = float | AnyArray | Nested[float] | Nested[AnyArray]
IntegerLike: TypeAlias = int | IntegerArray | Nested[int] | Nested[IntegerArray]
MaskLike: TypeAlias = NumberLike | tuple[NumberLike | None, NumberLike | None]  # a pair is (bias, keep)

Causal: TypeAlias = bool | Literal["bottom-right"]
Backend: TypeAlias = Literal["cpu", "reference"]  # of everything
DeviceBackend: TypeAlias = Literal["cpu", "cuda", "reference"]  # of attention, which CUDA has kernels for
