"""Arrays that come in from elsewhere and go out again, what is refused and in which words, and where CUDA is missing.

In the simulator device memory is the host's, so that arrays of other libraries are played by what has their interfaces
and lies in host memory.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import processes
import pytest
from numba import config, cuda
from strategies import LAYOUTS, laid_out

import fastattn
from fastattn.call.advice import to_install
from fastattn.cuda import available, detect
from fastattn.cuda.host import arrays, attention, compile

Attention = Callable[..., Any]
simulator_only = pytest.mark.skipif(not config.ENABLE_CUDASIM, reason="plays with addresses of host memory")


def inputs(*heads: int, dtype: Any = np.float32) -> tuple[Any, Any, Any]:
    """Return query, key and value."""
    rng = np.random.default_rng(7)
    shapes = ((*heads, 3, 5), (*heads, 6, 5), (*heads, 6, 4))
    query, key, value = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return query, key, value


class Interface:
    """An array with `__cuda_array_interface__` alone."""

    def __init__(self, array: Any, **changes: Any):
        self.array = array
        interface = {**array.__array_interface__, "version": 3, **changes}
        self.__cuda_array_interface__ = {name: value for name, value in interface.items() if name != "descr"}


class Capsule:
    """An array with DLPack alone, on a GPU as it says; of bfloat16 bits if asked."""

    def __init__(self, array: Any, code: int = 2, device: int = 2):
        self.array, self.device = array, device
        strides = [stride // array.itemsize for stride in array.strides]
        self.shape, self.steps = (ctypes.c_int64 * array.ndim)(*array.shape), (ctypes.c_int64 * array.ndim)(*strides)
        self.tensor = arrays._Tensor(
            array.ctypes.data, device, 0, array.ndim, code, 8 * array.itemsize, 1, self.shape, self.steps, 0
        )
        self.streams: list[int] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0

    def __dlpack__(self, stream: int) -> Any:
        self.streams.append(stream)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self.tensor), b"dltensor", None)


# -- in and out --------------------------------------------------------------------------------------------------------


def test_arrays_in_device_memory_stay_there(cuda_attention: Attention) -> None:
    host = inputs(2)
    wanted = cuda_attention(*host, return_lse=True, return_weights=True)
    device = [cuda.to_device(array) for array in host]
    for backend in (None, "cuda"):
        results = fastattn.attention(*device, backend=backend, return_lse=True, return_weights=True)
        for result, want in zip(results, wanted, strict=True):
            assert type(result) is type(device[0])
            assert result.copy_to_host().tobytes() == want.tobytes()


def test_numpy_arrays_stay_on_the_cpu_unless_told_otherwise() -> None:
    query, key, value = inputs()
    on_cpu = fastattn.attention(query, key, value, backend="cpu")
    assert fastattn.attention(query, key, value).tobytes() == on_cpu.tobytes()


@pytest.fixture(scope="module")
def halves(cuda_attention: Attention) -> tuple[list[Any], tuple[Any, Any]]:
    """Return query, key and value of halves, and what tensor cores make of them."""
    rng = np.random.default_rng(0)
    host = [rng.standard_normal((2, length, 8)).astype(np.float16) for length in (5, 9, 9)]
    wanted = cuda_attention(*host, is_causal=True, return_lse=True)
    assert any(plan.choice.why.startswith("tensor cores;") for plan in attention._plans.values())
    return host, wanted


@simulator_only
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("byte-swapped", "unaligned")])
def test_the_same_bits_in_any_layout_on_tensor_cores(cuda_attention: Attention, halves: Any, layout: str) -> None:
    host, wanted = halves
    device = [Interface(laid_out(array, layout)) for array in host]
    out = Interface(laid_out(np.empty_like(wanted[0]), layout if layout != "read-only" else "reversed"))
    _, lse = fastattn.attention(*device, is_causal=True, return_lse=True, out=out)
    assert out.array.tobytes() == wanted[0].tobytes()
    assert lse.copy_to_host().tobytes() == wanted[1].tobytes()
    assert cuda_attention(*(laid_out(array, layout) for array in host), is_causal=True).tobytes() == wanted[0].tobytes()


@simulator_only
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("byte-swapped", "unaligned")])
def test_the_same_bits_of_gradients_in_any_layout_on_tensor_cores(layout: str) -> None:
    rng = np.random.default_rng(0)
    shapes = {"grad_out": 5, "query": 5, "key": 9, "value": 9, "out": 5}
    host = {name: rng.standard_normal((2, length, 8)).astype(np.float16) for name, length in shapes.items()}
    lse = np.zeros((2, 5), np.float32)
    wanted = fastattn.attention_backward(*host.values(), lse, backend="cuda")
    for names in (("grad_out",), ("key",), ("out",), tuple(host)):
        device = [Interface(laid_out(a, layout) if name in names else a) for name, a in host.items()]
        found = fastattn.attention_backward(*device, Interface(lse))
        assert [one.copy_to_host().tobytes() for one in found] == [one.tobytes() for one in wanted]


@simulator_only
def test_repeated_heads_of_halves_are_copied_once(cuda_attention: Attention) -> None:
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, 5, 16)).astype(np.float16), rng.standard_normal((9, 16)).astype(np.float16)
    repeated = np.broadcast_to(key[:, ::2], (3, 2, 9, 8))
    wanted = cuda_attention(query[..., :8], repeated.copy(), repeated.copy())
    assert (
        fastattn.attention(*map(Interface, (query[..., :8], repeated, repeated))).copy_to_host().tobytes()
        == wanted.tobytes()
    )


@simulator_only
@pytest.mark.parametrize("strided", [False, True])
def test_the_cuda_array_interface(cuda_attention: Attention, strided: bool) -> None:
    host = inputs(2)
    wanted = cuda_attention(*host)
    if strided:
        host = tuple(np.flip(np.flip(array).copy()) for array in host)
    result = fastattn.attention(*map(Interface, host))
    assert result.copy_to_host().tobytes() == wanted.tobytes()


@simulator_only
def test_dlpack_for_bfloat16(cuda_attention: Attention) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="gives NumPy bfloat16")
    host = inputs(2, dtype=ml_dtypes.bfloat16)
    mask = np.linspace(-1, 1, 6).astype(ml_dtypes.bfloat16)
    wanted = cuda_attention(*host, mask)
    device = [Capsule(array.view(np.uint16), code=4) for array in (*host, mask)]
    result = fastattn.attention(*device).copy_to_host()
    assert result.dtype == np.uint16  # its bits: Numba has no bfloat16 for the host
    assert result.tobytes() == wanted.tobytes()
    assert device[0].streams == [1]


@simulator_only
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_tensors_of_pytorch_come_back_as_such(
    cuda_attention: Attention, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(arrays, "is_on_device", lambda given: isinstance(given, torch.Tensor))
    kind = getattr(torch, name)
    query, key, value = (torch.from_numpy(array).to(kind) for array in inputs(2))
    mask = torch.arange(6) < 4
    out, lse = cuda_attention(query, key.mT.contiguous().mT, value, mask, return_lse=True)
    assert (out.dtype, out.shape) == (kind, (2, 3, 4))
    assert lse.dtype == (torch.float64 if name == "float64" else torch.float32)
    wanted = torch.nn.functional.scaled_dot_product_attention(query.double(), key.double(), value.double(), mask)
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=4 * torch.finfo(kind).eps)
    target = torch.empty_like(out)
    assert cuda_attention(query, key, value, mask, out=target) is target
    assert torch.equal(target, out)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning", "ignore:Accessing the data pointer of FakeTensor")
def test_tensors_of_pytorch_without_memory_to_read_are_refused() -> None:
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    plain = torch.ones(2, 3)
    freed = plain.clone()
    freed.untyped_storage().resize_(0)
    refused = {
        "a nested tensor": [torch.nested.nested_tensor([plain])],
        "a tensor of layout torch.sparse_coo": [plain.to_sparse()],
        "a tensor whose change of sign PyTorch has put off": [torch._neg_view(plain)],
        r"a tensor of shape \(2, 3\) that has no memory": [freed, FakeTensorMode().from_tensor(plain)],
    }
    for message, tensors in refused.items():
        for tensor in tensors:
            with pytest.raises(TypeError, match=f"key: {message}"):
                arrays.read("key", tensor)
    with pytest.raises(TypeError, match=r"key: a tensor of shape \(3,\) that has no memory"):
        torch.func.vmap(lambda row: arrays.read("key", row))(plain)


@simulator_only
def test_arrays_of_cupy_come_back_as_such(cuda_attention: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    class Array(Interface):
        """An array of the module that follows."""

        device = nullcontext()

    Array.__module__ = "cupy"
    stream = SimpleNamespace(ptr=0)
    module = ModuleType("cupy")
    module.cuda = SimpleNamespace(Device=lambda number: nullcontext(), get_current_stream=lambda: stream)  # type: ignore[attr-defined]
    module.empty = lambda shape, dtype: Array(np.empty(shape, dtype))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", module)
    host = inputs(2)
    out, lse, weights = fastattn.attention(*map(Array, host), return_lse=True, return_weights=True)
    assert all(type(result) is Array for result in (out, lse, weights))
    assert out.array.tobytes() == cuda_attention(*host).tobytes()


# -- streams -----------------------------------------------------------------------------------------------------------


class Driver:
    """What is asked of Numba where there is a GPU, written down."""

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.gpus = [nullcontext()] * 2

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.said.append((name, *args))
            return SimpleNamespace(name=name, args=args, synchronize=lambda: self.said.append(("wait", name, *args)))

        return call


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Have `arrays` believe in a GPU."""
    driver = Driver()
    monkeypatch.setattr(arrays, "SIMULATED", False)
    monkeypatch.setattr(arrays, "cuda", driver)
    arrays.numba_stream.cache_clear()
    return driver


def on_stream(stream: int | None) -> arrays.Given:
    """Return an array that is written on a stream."""
    return arrays.Given(object(), 4096, (2, 3), (3, 1), "float32", 0, stream)


def test_work_is_queued_on_the_stream_of_the_query(driver: Driver) -> None:
    for pointer, wanted in (
        (1, ("legacy_default_stream",)),
        (2, ("per_thread_default_stream",)),
        (77, ("external_stream", 77)),
    ):
        place = arrays.place_of({"query": on_stream(pointer), "key": on_stream(None), "value": on_stream(pointer)})
        assert (place.stream.name, *place.stream.args) == wanted
        assert driver.said == [wanted]  # once, and nobody waited
        driver.said.clear()
    for pointer in (None, 0):
        assert arrays.place_of({"query": on_stream(pointer)}).stream == 0
    assert not driver.said


def test_what_is_written_on_other_streams_is_waited_for(driver: Driver) -> None:
    place = arrays.place_of({"query": on_stream(77), "key": on_stream(88), "value": on_stream(77)})
    assert ("wait", "external_stream", 88) in driver.said
    assert ("wait", "external_stream", 77) not in driver.said
    assert place.stream.args == (77,)


def test_the_default_stream_of_pytorch_is_that_of_the_device(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")

    class Derived(torch.Tensor):  # type: ignore[misc, name-defined, unused-ignore]
        """A tensor of somebody else's module."""

    for pointer, stream in ((0, 1), (77, 77)):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *a, p=pointer: SimpleNamespace(cuda_stream=p))
        for tensor in (torch.ones(2, 2), torch.ones(2, 2).as_subclass(Derived)):
            assert arrays.read("query", tensor).stream == stream


def test_capsules_are_ready_on_the_stream_that_they_were_asked_for(driver: Driver) -> None:
    given = arrays.read("key", Capsule(np.zeros((2, 3), np.float32)))
    assert given.stream == 1
    place = arrays.place_of({"query": on_stream(77), "key": given})
    assert ("wait", "legacy_default_stream") in driver.said
    arrays.settle({"query": on_stream(77)}, place)
    assert ("wait", "external_stream", 77) not in driver.said
    arrays.settle({"key": given}, place)  # its memory may go with the capsule
    assert driver.said[-1] == ("wait", "external_stream", 77)


def test_tables_have_arrived_before_any_stream_reads_them(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SIMULATED", False), ("cuda", driver), ("stream_of_tables", driver.external_stream)):
        monkeypatch.setattr(compile, name, value)
    compile.table(np.zeros(3, np.int64), 5)
    assert [said[0] for said in driver.said] == ["external_stream", "to_device", "wait"]
    assert driver.said[-1] == ("wait", "external_stream", 5)


def test_kernels_are_given_all_memory_that_an_array_spans(driver: Driver) -> None:
    given = arrays.Given("owner", 4096, (2, 3), (-8, 2), "float32", 0)
    assert given.span == (8, 13)  # one row lies 8 elements below the first element, and the last element 4 above
    given.memory()
    name, interface = driver.said[0]
    assert name == "from_cuda_array_interface"
    assert (interface["data"], interface["shape"], interface["typestr"]) == ((4096 - 32, False), (13,), "<f4")
    assert arrays.Given("owner", 0, (2, 0), (0, 1), "float32", 0).extent == (0, 0)


# -- memory that is shared ------------------------------------------------------------------------------------------


@simulator_only
def test_out_in_device_memory_may_overlap_what_is_read(cuda_attention: Attention) -> None:
    array = np.random.default_rng(0).standard_normal((2, 5, 4), dtype=np.float32)
    wanted = cuda_attention(array, array, array)
    out = Interface(np.full((2, 5, 8), np.nan, np.float32)[..., ::2])
    assert fastattn.attention(*[Interface(array)] * 3, out=out) is out
    assert out.array.tobytes() == wanted.tobytes()
    own = Interface(array.copy())
    result, lse = fastattn.attention(own, own, own, out=own, return_lse=True)
    assert result is own
    assert lse.shape == (2, 5)
    assert own.array.tobytes() == wanted.tobytes()


@simulator_only
def test_numpy_arrays_with_repeated_axes_are_moved_once(
    cuda_attention: Attention, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    to_device = cuda.to_device
    monkeypatch.setattr(arrays.cuda, "to_device", lambda a, **kw: moved.append(a.size) or to_device(a, **kw))
    query, key, value = inputs()
    wide = [np.broadcast_to(array, (4, *array.shape)) for array in (query, key, value)]
    out = cuda_attention(*wide)
    assert moved == [query.size, key.size, value.size]
    assert out.tobytes() == np.stack([cuda_attention(query, key, value)] * 4).tobytes()


def test_what_is_on_a_device_is_told_apart() -> None:
    array = np.zeros((2, 2))
    for host in (array, [1.0], None, 1, Capsule(array, device=1), object(), memoryview(array)):
        assert not detect.is_on_device(host)
    for device in (Interface(array), Capsule(array), Capsule(array, device=13), cuda.to_device(array)):
        assert detect.is_on_device(device)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_host_and_device_arrays_are_not_mixed(cuda_attention: Attention) -> None:
    query, key, value = inputs()
    device = [cuda.to_device(array) for array in (query, key, value)]
    with pytest.raises(TypeError, match=r"key: numpy.ndarray in host memory; expected .* device memory, as query is"):
        cuda_attention(device[0], key, device[2])
    with pytest.raises(TypeError, match=r"attn_mask: builtins.list in host memory"):
        fastattn.attention(*device, attn_mask=[[True] * 6])
    with pytest.raises(TypeError, match=r"query: numpy.ndarray in host memory; expected .*, as value is"):
        fastattn.attention(query, key, device[2])
    with pytest.raises(TypeError, match=r"out: numpy.ndarray in host memory"):
        fastattn.attention(*device, out=np.empty((3, 4), np.float32))


@simulator_only
@pytest.mark.parametrize("dtype", [np.int32, np.complex64, np.uint8, ">f4"])
def test_dtypes_without_a_meaning_in_device_memory(dtype: Any) -> None:
    query, key, value = inputs()
    with pytest.raises(TypeError, match=r"key: dtype .* is not supported in device memory; expected one of float16"):
        fastattn.attention(Interface(query), Interface(key.astype(dtype)), Interface(value))
    with pytest.raises(TypeError, match=r"attn_mask: dtype .* expected one of .*bool"):
        fastattn.attention(*map(Interface, (query, key, value)), Interface(np.zeros(6).astype(dtype)))


@simulator_only
def test_dtypes_are_not_mixed_in_device_memory() -> None:
    query, key, value = inputs()
    with pytest.raises(TypeError, match=r"value: dtype float64; expected float32, as query has"):
        fastattn.attention(Interface(query), Interface(key), Interface(value.astype(np.float64)))


@simulator_only
def test_out_in_device_memory_has_to_fit() -> None:
    device = list(map(Interface, inputs()))
    for out, error, words in (
        (np.zeros((3, 4)), TypeError, r"out: dtype float64; expected float32"),
        (np.zeros((3, 5), np.float32), ValueError, r"out: shape \(3, 5\); expected \(3, 4\)"),
        (np.broadcast_to(np.zeros(4, np.float32), (3, 4)), ValueError, r"out: the array is read-only"),
    ):
        with pytest.raises(error, match=words):
            fastattn.attention(*device, out=Interface(out))
    repeated = np.lib.stride_tricks.as_strided(np.zeros(4, np.float32), (3, 4), (0, 4))
    with pytest.raises(ValueError, match=r"out: .* elements that share memory"):
        fastattn.attention(*device, out=Interface(repeated))


@simulator_only
def test_strides_that_are_no_multiple_of_an_element() -> None:
    _, key, value = inputs()
    odd = np.lib.stride_tricks.as_strided(np.zeros(40, np.float32), (3, 5), (22, 4))
    with pytest.raises(ValueError, match=r"query: strides \(22, 4\) in bytes; expected multiples of 4"):
        fastattn.attention(Interface(odd), Interface(key), Interface(value))


@simulator_only
def test_arrays_on_two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    device = list(map(Interface, inputs()))
    elsewhere = device[1].__cuda_array_interface__["data"][0]
    monkeypatch.setattr(arrays, "_device_of", lambda address: int(address == elsewhere))
    with pytest.raises(ValueError, match=r"key: on device 1; expected device 0, as query is"):
        fastattn.attention(*device)


def test_memory_that_is_not_to_be_had(cuda_attention: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise RuntimeError("[CUresult.CUDA_ERROR_OUT_OF_MEMORY] Call to cuMemAlloc results in it")

    query, key, value = inputs()
    with monkeypatch.context() as patch:
        patch.setattr(arrays.cuda, "to_device", fail)
        with pytest.raises(MemoryError, match=r"query: no 60 bytes of device memory for shape \(3, 5\) of float32"):
            cuda_attention(query, key, value)
    monkeypatch.setattr(arrays.cuda, "device_array", fail)
    with pytest.raises(MemoryError, match=r"out: no 48 bytes of device memory"):
        cuda_attention(query, key, value)


def test_shapes_and_options_are_checked_before_anything_is_moved(
    cuda_attention: Attention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays.HostPlace, "move", lambda *args: pytest.fail("an array was moved"))
    query, key, value = inputs()
    for args, options, error, words in (
        ((query, key, value[:5]), {}, ValueError, r"value: shape \(5, 4\)"),
        ((query, key, value), {"dropout_p": 2}, ValueError, "dropout_p"),
        ((query, key, value), {"return_lse": 1}, TypeError, "return_lse"),
        ((query, key, value), {"rng": -1}, ValueError, "rng"),
        ((query, key, value), {"out": np.empty((3, 4))}, TypeError, "out: dtype float64"),
        ((query, key, value, np.zeros((3, 6), int)), {}, TypeError, "attn_mask: dtype int64"),
    ):
        with pytest.raises(error, match=words):
            cuda_attention(*args, **options)


# -- where CUDA is missing ---------------------------------------------------------------------------------------------

ASK = """
import numpy as np, fastattn
ones = np.ones((2, 2), np.float32)
try:
    fastattn.attention(ones, ones, ones, backend="cuda")
except RuntimeError as error:
    print(error)
else:
    print("works")
"""


def test_without_numba_cuda_the_error_says_how_to_get_it() -> None:
    hide = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: n != 'numba_cuda' and f(n, *a)"
    said = processes.run(f"{hide}\n{ASK}", NUMBA_ENABLE_CUDASIM="0")
    assert "backend: 'cuda' cannot be used here: the package numba-cuda is not installed" in said
    assert to_install("cuda") in said


@simulator_only
def test_without_a_driver_the_error_says_so() -> None:
    said = processes.run(ASK, NUMBA_ENABLE_CUDASIM="0")
    assert "backend: 'cuda' cannot be used here: the NVIDIA driver" in said
    assert "https://www.nvidia.com/drivers" in said


def test_the_simulator_says_what_it_needs_of_the_tests() -> None:
    away = "import sys; sys.path[:] = [place for place in sys.path if not place.endswith('tests')]"
    said = processes.run(f"{away}\n{ASK}", NUMBA_ENABLE_CUDASIM="1")
    assert "backend: 'cuda' cannot be used here: Numba's simulator needs the module emulated_ptx" in said
    assert "PYTHONPATH" in said


def test_numba_cuda_is_imported_for_cuda_alone() -> None:
    code = "import sys, numpy as np, fastattn; a = np.ones((2, 2), np.float32); fastattn.attention(a, a, a)"
    assert processes.run(f"{code}; print('numba.cuda' in sys.modules)").strip() == "False"


def test_what_is_missing_is_none_where_cuda_works() -> None:
    assert available.missing() is None
    assert available.device().number == 0
