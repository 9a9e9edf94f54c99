"""Arrays in and out: whatever library an array in device memory is of, and NumPy arrays that are moved there.

`read` makes a `Given` of an array in device memory: an address, a shape, strides and the type that elements are stored
in. A `Place` is where a call's results come to be: it makes arrays, and says on which stream work is to be queued.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numba import cuda
from numpy.typing import NDArray

from fastattn.call.halves import name_of
from fastattn.cuda.available import SIMULATED
from fastattn.cuda.detect import is_on_device, library_of
from fastattn.cuda.kernels.elements import MASKS

Shape = tuple[int, ...]

OPERANDS = ("float16", "bfloat16", "float32", "float64")
TYPESTR = {"<f2": "float16", "<f4": "float32", "<f8": "float64", "|b1": "bool"}
DLPACK = {(2, 16): "float16", (2, 32): "float32", (2, 64): "float64", (4, 16): "bfloat16", (6, 8): "bool"}
OWN_STREAMS = (None, 0)  # where an array names none, work goes to Numba's default stream
LEGACY = 1  # CUDA's name for the default stream of a whole device, which 0 may be, or a thread's own


class Given(NamedTuple):
    """An array in device memory, as kernels see it.

    Attributes
    ----------
    owner : object
        What keeps the memory alive.
    address : int
        Of the first element.
    shape, strides : tuple of int
        In elements.
    storage : str
        The type of the elements: "float16", "bfloat16", "float32", "float64" or "bool".
    device : int
        The number of the device.
    stream : int or None
        The stream on which the array is written, where it says so.
    writeable : bool
    """

    owner: Any
    address: int
    shape: Shape
    strides: Shape
    storage: str
    device: int
    stream: int | None = None
    writeable: bool = True

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return np.dtype(MASKS[self.storage]).itemsize

    @property
    def span(self) -> tuple[int, int]:
        """Which element from the lowest address on is the first, and how many there are up to the last."""
        if 0 in self.shape:
            return 0, 0
        reach = [(count - 1) * stride for count, stride in zip(self.shape, self.strides, strict=True)]
        below = -sum(step for step in reach if step < 0)
        return below, below + sum(step for step in reach if step > 0) + 1

    @property
    def extent(self) -> tuple[int, int]:
        """The addresses of the first byte and after the last."""
        first, count = self.span
        start = self.address - first * self.itemsize
        return start, start + count * self.itemsize

    @property
    def layout(self) -> tuple[Shape, Shape, int]:
        """All that tables of offsets depend on: shape too, as an axis of length 1 is broadcast whatever its stride."""
        return self.shape, self.strides, self.span[0]

    def carrier(self, dtype: Any) -> NDArray[Any]:
        """An ndarray of this shape and these strides, in elements, that has no memory: for shapes to be checked by."""
        dtype = np.dtype(dtype)
        strides = [stride * dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(np.empty((), dtype), self.shape, strides)

    def memory(self) -> Any:
        """What a kernel is given: a one-dimensional array from the lowest address to the highest."""
        start, end = self.extent
        kind = np.dtype(MASKS[self.storage])
        if start == end:
            return nothing(kind)
        interface = {
            "shape": ((end - start) // kind.itemsize,),
            "typestr": kind.str,
            "data": (start, False),
            "strides": None,
            "version": 3,
        }
        if not SIMULATED:
            return cuda.from_cuda_array_interface(interface, owner=self.owner, sync=False)
        return simulated(np.asarray(_Interface(interface)))


class _Interface:
    """Memory of the host, for NumPy to look at."""

    def __init__(self, interface: dict[str, Any]):
        self.__array_interface__ = interface


def simulated(array: NDArray[Any]) -> Any:
    """The simulator's array in "device memory" that is this very array."""
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

    return FakeCUDAArray(array)


def nothing(kind: Any) -> Any:
    """What a kernel is given where there is no array: it never reads it."""
    return _nothing(0 if SIMULATED else int(cuda.get_current_device().id), np.dtype(kind))


@functools.lru_cache(maxsize=256)
def _nothing(device: int, kind: np.dtype[Any]) -> Any:
    return cuda.device_array(1, kind)


@functools.lru_cache(maxsize=256)
def numba_stream(device: int, pointer: int | None) -> Any:
    """Numba's object for a stream of the current device; 1 and 2 are CUDA's names for its default ones."""
    own = {1: cuda.legacy_default_stream, 2: cuda.per_thread_default_stream}
    return own[pointer]() if pointer in own else cuda.external_stream(pointer)


# -- reading -----------------------------------------------------------------------------------------------------------


def read(name: str, given: Any) -> Given:
    """Read what there is to know of an array in device memory.

    Raises
    ------
    TypeError
        If its dtype has no meaning here.
    ValueError
        If its strides are no multiple of its elements.
    """
    if library_of(given) == "torch":
        return _read_torch(name, given)
    if isinstance(given, np.ndarray):  # in the simulator, memory is memory
        return _read_interface(name, given, given.__array_interface__)
    if SIMULATED and getattr(given, "__cuda_ndarray__", False):
        return _read_interface(name, given, given._ary.__array_interface__)
    try:
        interface = given.__cuda_array_interface__
    except Exception:  # there is none, or it does not know this dtype
        return _read_dlpack(name, given)
    return _read_interface(name, given, interface)


def _read_torch(name: str, given: Any) -> Given:
    import torch

    storage = str(given.dtype).removeprefix("torch.")
    _check_storage(name, storage, f"{given.dtype}")
    if given.is_nested or given.layout is not torch.strided:
        kind = "a nested tensor" if given.is_nested else f"a tensor of layout {given.layout}"
        raise TypeError(f"{name}: {kind}; expected one of a single shape, and layout torch.strided")
    if given.is_neg():
        raise TypeError(f"{name}: a tensor whose change of sign PyTorch has put off; expected its .resolve_neg()")
    try:
        address = int(given.data_ptr())
    except RuntimeError:  # it stands for others, under a transform of torch.func
        address = 0
    if not address and given.numel():
        raise TypeError(f"{name}: a tensor of shape {tuple(given.shape)} that has no memory; expected one that has")
    device = 0 if given.device.index is None else int(given.device.index)
    stream = None if SIMULATED else int(torch.cuda.current_stream(given.device).cuda_stream) or LEGACY
    return Given(given, address, tuple(given.shape), tuple(given.stride()), storage, device, stream)


def _read_interface(name: str, given: Any, interface: dict[str, Any]) -> Given:
    typestr, shape = interface["typestr"], tuple(map(int, interface["shape"]))
    if interface.get("mask") is not None:
        raise TypeError(f"{name}: a masked array was given; expected an array, and its mask as attn_mask")
    dtype = getattr(given, "dtype", None)
    storage = TYPESTR.get(typestr, "bfloat16" if getattr(dtype, "name", "") == "bfloat16" else "")
    _check_storage(name, storage, str(dtype if dtype is not None else typestr))
    itemsize = np.dtype(MASKS[storage]).itemsize
    strides = interface.get("strides")
    if strides is None:
        strides = [itemsize * int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]
    if any(stride % itemsize for stride, count in zip(strides, shape, strict=True) if count > 1):
        raise ValueError(
            f"{name}: strides {tuple(strides)} in bytes; expected multiples of {itemsize}, an element's size"
        )
    address, read_only = interface["data"]
    stream = interface.get("stream")
    if library_of(given) == "cupy":
        import cupy

        with given.device:
            stream = int(cupy.cuda.get_current_stream().ptr) or LEGACY
    steps = tuple(int(stride) // itemsize for stride in strides)
    return Given(given, int(address), shape, steps, storage, _device_of(int(address)), stream, not read_only)


def _device_of(address: int) -> int:
    """The number of the device that an address belongs to."""
    if SIMULATED or address == 0:
        return 0
    from cuda.bindings import driver

    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    status, number = driver.cuPointerGetAttribute(attribute, address)
    return int(number) if int(status) == 0 else int(cuda.get_current_device().id)


class _Tensor(ctypes.Structure):
    """DLTensor, with which DLPack's managed tensors begin; those of version 1 have 32 bytes before it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _read_dlpack(name: str, given: Any) -> Given:
    capsule = given.__dlpack__(stream=LEGACY)  # it frees what it holds when it goes
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = _Tensor.from_address(pointer_of(capsule, b"dltensor"))
    storage = DLPACK.get((tensor.code, tensor.bits), "") if tensor.lanes == 1 else ""
    _check_storage(name, storage, str(getattr(given, "dtype", (tensor.code, tensor.bits))))
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    if tensor.strides:
        strides = tuple(tensor.strides[axis] for axis in range(tensor.ndim))
    else:
        strides = tuple(int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape)))
    address = (tensor.data or 0) + tensor.byte_offset
    return Given((given, capsule), address, shape, strides, storage, int(tensor.device_id), LEGACY, False)


def on_host(given: Any) -> Any:
    """What was given, as NumPy arrays may be made of it: an array in device memory, a small one, is copied."""
    if not is_on_device(given):
        return given
    if library_of(given) == "torch":
        return given.detach().cpu().numpy()
    if not hasattr(given, "copy_to_host"):
        given = cuda.as_cuda_array(given)
    return given.copy_to_host()


def _check_storage(name: str, storage: str, said: str) -> None:
    expected = (*OPERANDS, "bool") if name == "attn_mask" else OPERANDS
    if storage not in expected:
        raise TypeError(
            f"{name}: dtype {said} is not supported in device memory; expected one of {', '.join(expected)}"
        )


# -- places ------------------------------------------------------------------------------------------------------------


class Place:
    """Where the results of a call come to be: arrays of Numba, in device memory."""

    def __init__(self, device: int, stream: int | None):
        self.device = device
        self._stream = stream

    @property
    def stream(self) -> Any:
        """Numba's object for the stream on which work is queued."""
        return 0 if SIMULATED or self._stream in OWN_STREAMS else numba_stream(self.device, self._stream)

    def wait(self) -> None:
        """Wait for what is queued on this stream."""
        stream = self.stream
        if stream == 0:
            cuda.default_stream().synchronize()
        else:
            stream.synchronize()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Make the device of this place the current one."""
        if SIMULATED:
            yield
        else:
            with cuda.gpus[self.device]:
                yield

    def empty(self, shape: Shape, storage: str) -> Any:
        """An array in device memory."""
        return cuda.device_array(shape, MASKS[storage], stream=self.stream)

    def new(self, name: str, shape: Shape, storage: str) -> Given:
        """An array in device memory for what is called `name`, whose owner `deliver` makes the result of."""
        with allocating(name, shape, storage):
            array = self.empty(shape, storage)
        if storage == "bfloat16" and library_of(array) != "torch":  # Numba's bits have no dtype that would say so
            given = read(name, _Renamed(array))
            return given._replace(owner=array)
        return read(name, array)

    def deliver(self, given: Given) -> Any:
        """The result of a call, of an array of `new`."""
        return given.owner


class TorchPlace(Place):
    """The same with tensors of PyTorch."""

    def empty(self, shape: Shape, storage: str) -> Any:
        """A tensor in device memory."""
        import torch

        device = torch.device("cpu") if SIMULATED else torch.device("cuda", self.device)
        return torch.empty(shape, dtype=getattr(torch, storage), device=device)


class CupyPlace(Place):
    """The same with arrays of CuPy."""

    def empty(self, shape: Shape, storage: str) -> Any:
        """An array in device memory."""
        import cupy

        with cupy.cuda.Device(self.device):
            return cupy.empty(shape, storage)


class HostPlace(Place):
    """The same with NumPy arrays: what is moved to the device and back."""

    def __init__(self, dtypes: dict[str, Any]):
        super().__init__(0 if SIMULATED else int(cuda.get_current_device().id), None)
        self.dtypes = dtypes  # of the results, for each storage

    def move(self, name: str, array: NDArray[Any]) -> Given:
        """Copy an array to the device: of elements that stand in for many, by strides of 0, one."""
        one = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in array.strides)
        core = np.asarray(array[one], order="C")
        storage = name_of(array.dtype)
        with allocating(name, core.shape, storage):
            moved = cuda.to_device(core.reshape(-1).view(MASKS[storage]), stream=self.stream)
        address = int(_interface_of(moved)["data"][0])
        strides = (
            0 if given == 0 else stride // core.itemsize
            for given, stride in zip(array.strides, core.strides, strict=True)
        )
        return Given(moved, address, array.shape, tuple(strides), storage, self.device)

    def deliver(self, given: Given) -> Any:
        """The result of a call, in host memory."""
        host = given.owner.copy_to_host()
        return host.view(self.dtypes.get(given.storage, np.dtype(MASKS[given.storage])))


class _Renamed:
    """Numba's array of 16-bit words, which says that they are bfloat16."""

    class dtype:
        name = "bfloat16"

    def __init__(self, array: Any):
        self.array = array
        self.__cuda_array_interface__ = _interface_of(array)


def _interface_of(array: Any) -> dict[str, Any]:
    interface: dict[str, Any] = array._ary.__array_interface__ if SIMULATED else array.__cuda_array_interface__
    return interface


@contextlib.contextmanager
def allocating(name: str, shape: Shape, storage: str) -> Iterator[None]:
    """Turn the failure to get device memory into a MemoryError that says for what."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or "OUT_OF_MEMORY" in str(error) or "out of memory" in str(error):
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(MASKS[storage]).itemsize
            raise MemoryError(
                f"{name}: no {size} bytes of device memory for shape {shape} of {storage} were to be had: {error}"
            ) from error
        raise


def place_of(givens: dict[str, Given]) -> Place:
    """Where the results of a call on these arrays come to be: with the arrays of the query's library.

    Raises
    ------
    ValueError
        If the arrays are on different devices.
    """
    first, *others = givens
    device = givens[first].device
    for name in others:
        if givens[name].device != device:
            raise ValueError(
                f"{name}: on device {givens[name].device}; expected device {device}, as {first} is: move one of them"
            )
    named = list(dict.fromkeys(given.stream for given in givens.values() if given.stream is not None))
    makers = {"torch": TorchPlace, "cupy": CupyPlace}
    owner = givens[first].owner
    library = library_of(owner[0] if isinstance(owner, tuple) else owner)
    place: Place = makers.get(library, Place)(device, named[0] if named else None)
    if not SIMULATED and len(named) > 1:
        with place.active():
            for stream in named[1:]:  # what is still being written there has to be ready
                Place(device, stream).wait()
    return place


def settle(givens: dict[str, Given], place: Place) -> None:
    """Wait for the work where memory may be used again as soon as it is let go.

    A library that gives capsules does not know the stream on which what they hold is read.
    """
    if not SIMULATED and any(isinstance(given.owner, tuple) for given in givens.values()):
        place.wait()


def check_together(given: dict[str, Any]) -> bool:
    """Whether the arrays of a call are in device memory; None is none.

    Raises
    ------
    TypeError
        If some are and some are not.
    """
    where = {name: is_on_device(array) for name, array in given.items() if array is not None}
    if not any(where.values()):
        return False
    first = next(name for name, on_device in where.items() if on_device)
    for name, on_device in where.items():
        if not on_device:
            raise TypeError(
                f"{name}: {type(given[name]).__module__}.{type(given[name]).__qualname__} in host memory; expected an "
                f"array in device memory, as {first} is: move one of them"
            )
    return True
