"""What all layers share: parameters that are plain arrays, their names and shapes, and ways to keep them.

A layer is a class that names its constructor's `arguments`, says in `parameter_shapes` what its parameters are called
and how large they are, and in `initial` what they start as. The rest is here.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from fastattn.call.advice import is_tensor, said
from fastattn.call.arrays import DTYPES, as_array, as_common
from fastattn.call.halves import cast, finfo, is_bfloat16, name_of, native, real_of
from fastattn.call.problem import FLOAT32, FLOAT64, Array, Shape
from fastattn.call.seeds import generator_from
from fastattn.call.shapes import MAX_RANK
from fastattn.call.widening import widened

__all__ = [
    "Layer",
    "as_arrays",
    "check_choice",
    "check_dtype",
    "check_size",
    "common_batch",
    "linear",
]

INSTALL = "pip install safetensors"
Self = TypeVar("Self", bound="Layer")


class Known(NamedTuple):
    """The parameters of a layer, given in place of what draws them: none is made that a file only speaks of."""

    state: Mapping[str, Array]


class Layer(ABC):
    """The base of all layers.

    A subclass's constructor sets its `arguments` as attributes, then calls `start`.

    Attributes
    ----------
    dtype : numpy.dtype
        float16, bfloat16, float32 or float64, of all parameters.

    Notes
    -----
    A layer of half precision computes in float32, and rounds its results, and gradients, once.

    A parameter is an ndarray attribute: read it, write into it, assign another one. What is assigned is checked, and
    converted to the dtype of the layer and to C order. A parameter called ``out_proj.weight`` in a state dict is the
    attribute ``out_proj_weight``.
    """

    #: Names of the constructor's arguments but for rng and dtype: with them a layer of the same shapes can be made.
    arguments: tuple[str, ...]
    dtype: np.dtype[Any]
    # name of the attribute -> name in a state dict, and shape
    _parameters: dict[str, tuple[str, Shape]]

    @abstractmethod
    def parameter_shapes(self) -> dict[str, Shape]:
        """Return the name and the shape of each parameter, as in a state dict and in its order."""

    @abstractmethod
    def initial(self, name: str, shape: Shape, generator: np.random.Generator) -> Array:
        """Return what a parameter is before it has been trained, as float64."""

    def start(self, rng: object, dtype: DTypeLike) -> None:
        """Make the parameters.

        Parameters
        ----------
        rng : int, numpy.random.Generator or RandomState, or None
            The same number gives the same parameters, in float32 those of float64, rounded. Of `Known` they are known.
        dtype : dtype_like
            float16, bfloat16, float32 or float64.
        """
        self.dtype = check_dtype(dtype, half=True)
        self._parameters = {name.replace(".", "_"): (name, shape) for name, shape in self.parameter_shapes().items()}
        if isinstance(rng, Known):
            self.load_state_dict(rng.state)
            return
        generator = generator_from(rng)
        for attribute, (name, shape) in self._parameters.items():
            setattr(self, attribute, self.initial(name, shape, generator))

    def __setattr__(self, attribute: str, given: Any) -> None:
        """Check what is assigned to a parameter."""
        known = self.__dict__.get("_parameters", {}).get(attribute)
        super().__setattr__(attribute, given if known is None else self._as_parameter(attribute, given, known[1]))

    def _as_parameter(self, name: str, given: Any, shape: Shape) -> Array:
        """Return an array of the layer's dtype: the one given if it is one."""
        if is_tensor(given) and not given.requires_grad and str(given.dtype) == "torch.bfloat16":
            given = given.float()  # NumPy has no bfloat16 to make an array of
        array = as_array(name, given)
        if name_of(array.dtype) not in DTYPES or array.dtype.type is np.longdouble:
            raise TypeError(f"{name}: dtype {array.dtype}; expected float16, float32 or float64, or bfloat16")
        if array.shape != shape:
            raise ValueError(f"{name}: shape {array.shape}; expected {shape}")
        converted = cast(array, self.dtype)
        if finfo(array.dtype).max > finfo(self.dtype).max and (np.isinf(converted) & np.isfinite(array)).any():
            raise ValueError(
                f"{name}: the largest magnitude is {np.abs(array).max()}; expected one that {self.dtype} holds"
            )
        return np.require(converted, requirements=["C", "A"])

    def state_dict(self) -> dict[str, Array]:
        """Return copies of all parameters, by name.

        Returns
        -------
        dict of str to ndarray
        """
        return {name: getattr(self, attribute).copy() for attribute, (name, _) in self._parameters.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over all parameters from a state dict; nothing changes if one of them does not fit.

        Parameters
        ----------
        state : mapping of str to array_like
            What `state_dict` returns, with the same names and shapes; PyTorch's tensors are arrays as well, those of
            bfloat16 too. Values are copied, and converted to the dtype of the layer.

        Raises
        ------
        TypeError
            If it is no mapping, or a value is not of a floating dtype.
        ValueError
            If a name is missing or unknown, a shape is another one, or a number is too large for the layer's dtype.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: {said(state)}; expected a mapping of names to arrays, as state_dict() returns")
        names = [name for name, _ in self._parameters.values()]
        missing = [name for name in names if name not in state]
        unknown = [name for name in state if name not in names]
        if missing or unknown:
            what = [f"without {', '.join(map(repr, missing))}"] * bool(missing)
            what += [f"with {', '.join(map(repr, unknown))}"] * bool(unknown)
            raise ValueError(f"state: a mapping {' and '.join(what)}; expected the names {', '.join(map(repr, names))}")
        loaded = {
            attribute: self._as_parameter(name, state[name], shape).copy()
            for attribute, (name, shape) in self._parameters.items()
        }
        self.__dict__.update(loaded)

    def as_gradients(self, gradients: Mapping[str, Array]) -> dict[str, Array]:
        """Return the gradients of all parameters, in the order and the dtype of `state_dict`; 0 where there is none."""
        with np.errstate(all="ignore"):
            return {
                name: cast(gradients[name], self.dtype) if name in gradients else np.zeros(shape, self.dtype)
                for name, shape in self._parameters.values()
            }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the layer to a safetensors file.

        Parameters
        ----------
        path : str or os.PathLike
            Parameters have the names of the state dict; the constructor's arguments go into the metadata.

        Raises
        ------
        ImportError
            If the package safetensors is not installed.
        """
        try:
            from safetensors.numpy import save_file
        except ImportError as error:
            raise ImportError(f"saving a layer needs safetensors, not installed here: {INSTALL}") from error
        arguments = {name: getattr(self, name) for name in self.arguments}
        metadata = {"layer": type(self).__name__, "arguments": json.dumps(arguments)}
        save_file(self.state_dict(), path, metadata=metadata)

    @classmethod
    def load(cls: type[Self], path: str | os.PathLike[str]) -> Self:
        """Read a layer that `save` has written.

        Parameters
        ----------
        path : str or os.PathLike

        Returns
        -------
        Layer
            One of this class, with the dtype that it was saved with.

        Raises
        ------
        ImportError
            If the package safetensors is not installed.
        ValueError
            If the file holds something else. Parameters alone are read with safetensors, and `load_state_dict`.
        """
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise ImportError(f"loading a layer needs safetensors, not installed here: {INSTALL}") from error
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                names = file.keys()
                state = {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"path: {os.fspath(path)} is not a safetensors file: {error}") from error
        except TypeError as error:
            said_so = "bfloat16, of which NumPy makes arrays once ml_dtypes is imported"
            raise TypeError(f"path: {os.fspath(path)} holds {said_so}: {error}") from error
        if metadata.get("layer") != cls.__name__:
            holds = metadata.get("layer", "no layer")
            raise ValueError(
                f"path: {os.fspath(path)} holds {holds}; expected a {cls.__name__} that save() has written"
            )
        dtype = next(iter(state.values())).dtype if state else FLOAT32
        constructor: Any = cls
        try:
            layer: Self = constructor(**json.loads(metadata["arguments"]), rng=Known(state), dtype=dtype)
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"path: {os.fspath(path)} holds no {cls.__name__} that can be read: {error}") from error
        return layer

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.arguments)
        lines = [f"  {name}: {shape}" for name, shape in self._parameters.values()]
        return "\n".join([f"{type(self).__name__}({given}, dtype={self.dtype})", *lines])


# -- arguments of calls ------------------------------------------------------------------------------------------------


def common_batch(arrays: list[Array], features: tuple[int, int, int]) -> Shape:
    """Return the axes of query, key and value before the last two, broadcast.

    Raises
    ------
    ValueError
        If they do not broadcast, or the last two axes do not go with each other, or with the features of a layer.
    """
    for name, array, expected in zip(("query", "key", "value"), arrays, features, strict=True):
        if array.ndim < 2 or array.shape[-1] != expected:
            raise ValueError(f"{name}: shape {array.shape}; expected (..., length, {expected})")
        if array.ndim >= MAX_RANK:  # heads are one axis more
            raise ValueError(f"{name}: shape {array.shape} has rank {array.ndim}; expected 2 to {MAX_RANK - 1}")
    query, key, value = (array.shape for array in arrays)
    if key[-2] != value[-2]:
        raise ValueError(f"value: shape {value}; expected length {key[-2]} on axis -2, as key of shape {key}")
    try:
        return np.broadcast_shapes(query[:-2], key[:-2], value[:-2])
    except ValueError:
        raise ValueError(
            f"query, key, value: shapes {query}, {key}, {value}; expected the axes before the last two to broadcast"
        ) from None


def as_arrays(given: Mapping[str, ArrayLike], dtype: np.dtype[Any]) -> tuple[list[Array], np.dtype[Any]]:
    """Return arrays of the arguments of a layer, in the dtype that it computes in, and the dtype of its results.

    Parameters
    ----------
    given : mapping of str to array_like
        Where one object is given twice, it comes back as one array.
    dtype : numpy.dtype
        Of the layer, which has a part in the common one.

    Raises
    ------
    TypeError, ValueError
        As `fastattn.call.arrays.as_common`.
    """
    arrays = as_common(given, also=dtype)
    storage = arrays[0].dtype
    return list(widened(*arrays, mask=None, to=real_of(storage))[:-1]), storage


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Map each row of `x`, shape (..., n), by a matrix of shape (m, n): one product of NumPy's BLAS for all rows."""
    weight = cast(weight, real_of(weight.dtype))
    # BLAS takes transposed rows as well, but may round otherwise: a layout of the same values gives the same bits
    rows = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    with np.errstate(all="ignore"):
        y: Array = rows @ weight.T
        if bias is not None:
            y += cast(bias, real_of(bias.dtype))
    return y.reshape(*x.shape[:-1], len(weight))


# -- arguments of constructors -----------------------------------------------------------------------------------------


def check_dtype(given: DTypeLike, half: bool = False) -> np.dtype[Any]:
    """Return a dtype, float32 or float64, or if `half` float16 or bfloat16.

    Raises
    ------
    TypeError
        If it is another one, or none.
    """
    expected = f"expected {'float16, bfloat16, ' if half else ''}float32 or float64"
    try:
        dtype = np.dtype(given)
    except TypeError:
        unknown = ", which NumPy knows once ml_dtypes is imported" if half and given == "bfloat16" else ""
        raise TypeError(f"dtype: {said(given)}{unknown}; {expected}") from None
    if given is None or not (dtype in (FLOAT32, FLOAT64) or (half and (dtype == np.float16 or is_bfloat16(dtype)))):
        raise TypeError(f"dtype: {said(given)}; {expected}")
    return native(dtype)


def check_choice(name: str, given: object, choices: tuple[str, ...]) -> str:
    """Return one of some words.

    Raises
    ------
    TypeError
        If it is not a string.
    ValueError
        If it is another one.
    """
    if isinstance(given, str) and given in choices:
        return given
    kind = ValueError if isinstance(given, str) else TypeError
    raise kind(f"{name}: {said(given)}; expected one of {', '.join(map(repr, choices))}")


def check_size(name: str, given: object, least: int = 1) -> int:
    """Return a size as an int.

    Raises
    ------
    TypeError
        If it is not a whole number.
    ValueError
        If it is below `least`.
    """
    if isinstance(given, bool) or not isinstance(given, (int, np.integer)):
        raise TypeError(f"{name}: {said(given)}; expected an int of at least {least}")
    if given < least:
        raise ValueError(f"{name}: {given}; expected at least {least}")
    return int(given)
