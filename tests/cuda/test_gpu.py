"""What only a GPU can show: compiled kernels on long sequences, streams, device memory that runs out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.cuda.available import SIMULATED

pytestmark = pytest.mark.skipif(SIMULATED, reason="needs an NVIDIA GPU, and there is none")

# what rounding of inputs of order 1 to this type may do to a result: some units of it, as weights are rounded too
ERROR = {"float16": 4 * 2.0**-10, "bfloat16": 4 * 2.0**-7, "float32": 2e-5}


@pytest.fixture(scope="module")
def torch() -> Any:
    module = pytest.importorskip("torch")
    if not module.cuda.is_available():
        pytest.skip("this build of PyTorch cannot use the GPU")
    return module


def tensors(torch: Any, count: int, *shape: int, storage: str) -> list[Any]:
    generator = torch.Generator("cuda").manual_seed(0)
    made = [torch.randn(shape, generator=generator, device="cuda") for _ in range(count)]
    return [tensor.to(getattr(torch, storage)) for tensor in made]


def exact(torch: Any, query: Any, key: Any, value: Any, causal: bool) -> Any:
    """Return attention by PyTorch's matrix products, in float64."""
    wider = (tensor.double() for tensor in (query, key, value))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(*wider, is_causal=causal)


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1024, 2047])
def test_long_sequences_agree_with_pytorch(torch: Any, storage: str, size: int, causal: bool, length: int) -> None:
    query, key, value = tensors(torch, 3, 2, 4, length, size, storage=storage)
    out = fastattn.attention(query, key, value, is_causal=causal)
    assert out.is_cuda
    assert (out.double() - exact(torch, query, key, value, causal)).abs().max() <= ERROR[storage] * value.abs().max()
    for _ in range(3):
        assert torch.equal(fastattn.attention(query, key, value, is_causal=causal), out)


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_agree_with_pytorch(torch: Any, storage: str, size: int, causal: bool) -> None:
    query, key, value, grad_out = tensors(torch, 4, 1, 4, 1023, size, storage=storage)
    out, lse = fastattn.attention(query, key, value, is_causal=causal, return_lse=True)
    grads = fastattn.attention_backward(grad_out, query, key, value, out, lse, is_causal=causal)
    wider = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    wanted = torch.autograd.grad(exact(torch, *wider, causal), wider, grad_out.double())
    for grad, other in zip(grads, wanted, strict=True):
        assert (grad.double() - other).abs().max() <= 4 * ERROR[storage] * max(1.0, float(other.abs().max()))
    again = fastattn.attention_backward(grad_out, query, key, value, out, lse, is_causal=causal)
    assert all(torch.equal(one, other) for one, other in zip(grads, again, strict=True))


@pytest.mark.parametrize("keys", [1, 1000, 100_000])
def test_one_query_of_grouped_heads(torch: Any, keys: int) -> None:
    (query,) = tensors(torch, 1, 2, 32, 1, 128, storage="bfloat16")
    key, value = tensors(torch, 2, 2, 8, keys, 128, storage="bfloat16")
    out = fastattn.attention(query, key, value, enable_gqa=True)
    repeated = (tensor.repeat_interleave(4, dim=1) for tensor in (key, value))
    error = (out.double() - exact(torch, query, *repeated, causal=False)).abs().max()
    assert error <= ERROR["bfloat16"] * value.abs().max()


def test_work_is_queued_on_the_stream_of_the_caller(torch: Any) -> None:
    (square,) = tensors(torch, 1, 4096, 4096, storage="float32")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = square
        for _ in range(20):  # the arguments come late; on another stream, what was there before would be read
            late = (late @ square) / 64
        query = late.reshape(1, 64, 4096, 64)
        out = fastattn.attention(query, query, query)
        after = out.clone()  # as this stream sees it
    stream.synchronize()
    assert torch.equal(after, fastattn.attention(query, query, query))


def test_memory_that_is_not_there(torch: Any) -> None:
    query, key, value = tensors(torch, 3, 1, 1, 400_000, 64, storage="float16")
    with pytest.raises(MemoryError, match="weights"):
        fastattn.attention(query, key, value, return_weights=True)  # 320 GB
    assert fastattn.attention(query[..., :9, :], key, value).isfinite().all()


def test_numpy_arrays_go_there_and_come_back() -> None:
    query, key, value = np.random.default_rng(0).standard_normal((3, 2, 4, 700, 64), dtype=np.float32)
    there, here = (fastattn.attention(query, key, value, is_causal=True, backend=name) for name in ("cuda", "cpu"))
    assert isinstance(there, np.ndarray)
    assert np.abs(there - here).max() <= ERROR["float32"]
