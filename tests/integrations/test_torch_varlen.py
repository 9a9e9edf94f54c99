"""Packed sequences of PyTorch's tensors: results, gradients, compiled, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fastattn  # noqa: E402
from fastattn.integrations.torch import attention_varlen, attention_with_lse  # noqa: E402

QUERIES, KEYS = [0, 5, 5, 20], [0, 9, 12, 30]
DISTANCES = torch.linspace(-2, 2, 20, dtype=torch.float64)


def by_distance(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return torch.tanh(score) * 3 + DISTANCES[torch.abs(query - key)] * head


def not_every_third(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (query + key) % 3 != 0


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"is_causal": "bottom-right"},
    {"window": (4, 1), "softcap": 2.0, "scale": 0.5},
    {"is_causal": True, "query_offset": torch.tensor([1, 0, -2])},
    {"alibi_slopes": torch.tensor([0.5, 0.25, 1.0, 0.0])},
    {"sinks": torch.tensor([0.5, -3.0, float("-inf"), 2.0])},
    {"score_mod": by_distance, "mask_mod": not_every_third, "softcap": 3.0},
)


def tensors(dtype: Any = torch.float64, **options: Any) -> list[Any]:
    """Return query, key and value of three sequences."""
    generator = torch.Generator().manual_seed(0)
    shapes = (QUERIES[-1], 4, 8), (KEYS[-1], 2, 8), (KEYS[-1], 2, 6)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(**options) for shape in shapes]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_sequence_is_what_it_is_alone_and_so_are_its_gradients(options: dict[str, Any]) -> None:
    packed, alone = tensors(), tensors()
    lengths = torch.tensor(QUERIES), torch.tensor(KEYS, dtype=torch.int32)
    out, lse = attention_varlen(*packed, *lengths, enable_gqa=True, **options)
    assert out.shape == (20, 4, 6)
    assert lse.shape == (20, 4)
    parts = []
    for row in range(3):
        own, others = slice(*QUERIES[row : row + 2]), slice(*KEYS[row : row + 2])
        given = [tensor[part].transpose(0, 1) for tensor, part in zip(alone, (own, others, others), strict=True)]
        told = {**options, "query_offset": options["query_offset"][row]} if "query_offset" in options else options
        parts.append(attention_with_lse(*given, enable_gqa=True, **told))
    wanted = [torch.cat([part.transpose(0, 1) for part in each]) for each in zip(*parts, strict=True)]
    assert torch.equal(out, wanted[0])
    assert torch.equal(lse, wanted[1])
    for results in ((out, lse), wanted):
        (results[0].sin().sum() + results[1].cos().sum()).backward()
    for one, other in zip(packed, alone, strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=0, atol=1e-12)


def test_gradients_are_those_of_small_steps() -> None:
    lengths = torch.tensor(QUERIES), torch.tensor(KEYS)

    def call(*packed: Any) -> Any:
        return attention_varlen(*packed, *lengths, enable_gqa=True, is_causal="bottom-right", window=(6, None))

    assert torch.autograd.gradcheck(call, tensors())


@pytest.mark.parametrize("by_sequence", [False, True])
def test_what_heads_have_has_gradients_as_well(by_sequence: bool) -> None:
    lengths = torch.tensor(QUERIES), torch.tensor(KEYS)
    generator = torch.Generator().manual_seed(1)
    shape = (3, 4) if by_sequence else (4,)
    slopes, sinks = (torch.rand(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))

    def call(query: Any, slopes: Any, sinks: Any) -> Any:
        options = {"alibi_slopes": slopes, "sinks": sinks}
        return attention_varlen(query, *others, *lengths, enable_gqa=True, is_causal="bottom-right", **options)

    query, *others = (tensor.detach() for tensor in tensors())
    assert torch.autograd.gradcheck(call, (query.requires_grad_(), slopes, sinks))
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    found = []
    for function in (call, compiled):
        out, lse = function(query, slopes, sinks)
        found.append(torch.autograd.grad(out.sin().sum() + lse.sum(), (slopes, sinks)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def learned(generator: Any, *shape: int) -> Any:
    """Return a tensor that wants its gradient."""
    return torch.rand(shape, generator=generator, dtype=torch.float64).requires_grad_()


def test_what_functions_capture_has_gradients_as_well() -> None:
    lengths, generator = (torch.tensor(QUERIES), torch.tensor(KEYS)), torch.Generator().manual_seed(1)
    by_sequence, near, sinks = learned(generator, 3, 4), learned(generator, 5), learned(generator, 3, 4)

    def call(query: Any, by_sequence: Any, near: Any, sinks: Any) -> Any:
        def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
            return torch.sigmoid(score * by_sequence[batch, head]) + near[torch.clamp(key - query, -2, 2) + 2]

        options: dict[str, Any] = {"score_mod": score_mod, "mask_mod": not_every_third, "sinks": sinks}
        return attention_varlen(query, *others, *lengths, enable_gqa=True, **options)

    query, *others = (tensor.detach() for tensor in tensors())
    leaves = (query.requires_grad_(), by_sequence, near, sinks)
    assert torch.autograd.gradcheck(call, leaves)
    found = []
    for function in (call, torch.compile(call, backend="eager")):
        out, lse = function(*leaves)
        found.append((out, lse, *torch.autograd.grad(out.sin().sum() + lse.sum(), leaves)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_function_is_told_the_number_of_the_sequence() -> None:
    packed, lengths = tensors(requires_grad=False), (torch.tensor(QUERIES), torch.tensor(KEYS))
    shift = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    out, lse = attention_varlen(
        *packed, *lengths, enable_gqa=True, score_mod=lambda score, batch, head, query, key: score + shift[batch]
    )
    plain, sums = attention_varlen(*packed, *lengths, enable_gqa=True)
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(lse[:5], sums[:5])
    torch.testing.assert_close(lse[5:], sums[5:] + 2)


def test_transforms_of_torch_func() -> None:
    packed, lengths = tensors(requires_grad=False), (torch.tensor(QUERIES), torch.tensor(KEYS))

    def call(query: Any, **functions: Any) -> Any:
        out, _ = attention_varlen(query, *packed[1:], *lengths, enable_gqa=True, is_causal=True, **functions)
        return out.sin().sum()

    leaf = packed[0].clone().requires_grad_()
    for functions in ({}, {"score_mod": by_distance}):
        (wanted,) = torch.autograd.grad(call(leaf, **functions), leaf)
        assert torch.equal(torch.func.grad(call)(packed[0], **functions), wanted)
    several = torch.stack([packed[0], -packed[0]])
    assert torch.equal(torch.vmap(call)(several), torch.stack([call(each) for each in several]))
    with pytest.raises(NotImplementedError, match="score_mod, mask_mod, block_mask: .*vmap"):
        torch.vmap(lambda query: call(query, score_mod=by_distance))(several)


def test_dropout_goes_by_the_seed_of_torch() -> None:
    lengths = torch.tensor(QUERIES), torch.tensor(KEYS)
    found = []
    for seed in (1, 1, 2):
        packed = tensors()
        torch.manual_seed(seed)
        out, _ = attention_varlen(*packed, *lengths, enable_gqa=True, dropout_p=0.5)
        out.sum().backward()
        found.append((out, packed[2].grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[2][0])


def test_one_result_alone_has_a_gradient_as_well() -> None:
    for which in range(2):
        packed = tensors()
        results = attention_varlen(*packed, torch.tensor(QUERIES), torch.tensor(KEYS), enable_gqa=True)
        results[which].sum().backward()
        assert packed[0].grad.isfinite().all()
        assert packed[0].grad.abs().sum() > 0


def test_operators_are_what_pytorch_expects_of_them() -> None:
    packed, lengths = tensors(), (torch.tensor(QUERIES), torch.tensor(KEYS))
    numbers = (0.0, "no", None, True, None)
    torch.library.opcheck(torch.ops.fastattn.attention_varlen.default, (*packed, *lengths, *numbers))


def test_a_compiled_function_computes_the_same() -> None:
    packed, lengths = tensors(), (torch.tensor(QUERIES), torch.tensor(KEYS))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(query: Any, key: Any, value: Any) -> Any:
        out, _ = attention_varlen(query, key, value, *lengths, enable_gqa=True, is_causal=True)
        return (out * out).sum()

    call(*packed).backward()
    again = tensors()
    out, _ = attention_varlen(*again, *lengths, enable_gqa=True, is_causal=True)
    (out * out).sum().backward()
    for one, other in zip(packed, again, strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype: Any) -> None:
    lengths = torch.tensor(QUERIES), torch.tensor(KEYS)
    narrow = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors(torch.float32)]
    wide = [tensor.detach().double().requires_grad_() for tensor in narrow]
    (out, lse), (exact, _) = (attention_varlen(*each, *lengths, enable_gqa=True) for each in (narrow, wide))
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    eps = torch.finfo(dtype).eps
    # the result is rounded, and weights may be (tolerances.py)
    torch.testing.assert_close(
        out.double(), exact, rtol=eps / 2, atol=eps / 2 * float(wide[2].detach().abs().max()) + 1e-5
    )
    out.sin().sum().backward()
    exact.sin().sum().backward()
    for one, other in zip(narrow, wide, strict=True):
        assert one.grad.dtype == dtype
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=2 * eps, atol=8 * eps)
    with torch.autocast("cpu", dtype):
        again, _ = attention_varlen(*(tensor.float() for tensor in narrow), *lengths, enable_gqa=True)
    assert torch.equal(again, out)


def test_arrays_of_numpy_have_the_same_bits() -> None:
    packed = [tensor.detach() for tensor in tensors(torch.float32)]
    out, lse = attention_varlen(*packed, torch.tensor(QUERIES), torch.tensor(KEYS), enable_gqa=True)
    arrays: Any = [tensor.numpy() for tensor in packed]
    wanted = fastattn.attention_varlen(*arrays, QUERIES, KEYS, enable_gqa=True, return_lse=True)
    np.testing.assert_array_equal(out.numpy(), wanted[0])
    np.testing.assert_array_equal(lse.numpy(), wanted[1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": np.ones((20, 4, 8))}, TypeError, "query: ndarray; expected a torch.Tensor"),
        ({"query": torch.ones(20, 4, 8, dtype=torch.int64)}, TypeError, "query: dtype torch.int64"),
        ({"cu_seqlens_q": QUERIES}, TypeError, "cu_seqlens_q: list; expected a torch.Tensor"),
        ({"cu_seqlens_k": torch.tensor([0.0, 30.0])}, TypeError, "cu_seqlens_k: dtype torch.float32"),
        ({"cu_seqlens_k": torch.tensor([0, 9, 30])}, ValueError, "cu_seqlens_k: 3 numbers; expected 4"),
        ({"key_lengths": torch.tensor([1])}, TypeError, "key_lengths: given for packed sequences"),
        ({"block_mask": not_every_third}, TypeError, "block_mask: given for packed sequences, .*expected mask_mod"),
        ({"score_mod": lambda score: score}, TypeError, "score_mod: "),
        ({"mask_mod": 1}, TypeError, "mask_mod: "),
        ({"dropout_p": 2}, ValueError, "dropout_p"),
        ({"is_causal": "yes"}, ValueError, "is_causal"),
        ({"windows": 1}, TypeError, "windows: no such option"),
    ],
    ids=str,
)
def test_what_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    query, key, value = tensors(torch.float32)
    call = {"query": query, "key": key, "value": value, "enable_gqa": True}
    call |= {"cu_seqlens_q": torch.tensor(QUERIES), "cu_seqlens_k": torch.tensor(KEYS)}
    with pytest.raises(error, match=message):
        attention_varlen(**(call | change))


def test_a_second_derivative_is_refused() -> None:
    packed = tensors()
    out, _ = attention_varlen(*packed, torch.tensor(QUERIES), torch.tensor(KEYS), enable_gqa=True)
    (grad,) = torch.autograd.grad(out.sum(), packed[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivative only"):
        grad.sum().backward()
