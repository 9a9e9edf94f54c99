"""PyTorch: the operators against PyTorch's own attention and its checks of operators, and what they refuse."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import tolerances

import fastattn
from fastattn.call.advice import to_install

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch.autograd import forward_ad, gradcheck  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention as theirs  # noqa: E402

from fastattn.integrations.torch import (  # noqa: E402
    additive_attention,
    attention_with_lse,
    scaled_dot_product_attention,
)

# PyTorch's own: functorch uses what it tells others not to
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")

Tensor = Any
OPERATOR = torch.ops.fastattn.attention.default
BACKWARD = torch.ops.fastattn.attention_backward.default
ADDITIVE = torch.ops.fastattn.additive_attention.default
#: How far a gradient may be from the exact one, as a part of max(1, max|gradient|).
GRADIENT = {torch.float32: 2e-5, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def leaves(*shapes: tuple[int, ...], dtype: Any = torch.float64, grad: bool = True) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype).requires_grad_(grad) for shape in shapes]


def heads_of(tensor: Tensor) -> Tensor:
    """Return the same numbers as they lie where heads have been split: (B, L, H, D), transposed."""
    return tensor.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(tensor.requires_grad)


def exact(function: Callable[..., Tensor], tensors: list[Tensor], *others: Any, **options: Any) -> tuple[Any, Any]:
    """Return PyTorch's result and gradients in float64."""
    wide = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]
    out = function(*wide, *others, **options)
    return out.detach(), torch.autograd.grad(out.sin().sum(), [t for t in wide if t.requires_grad])


def check_gradients(found: Any, wanted: Any) -> None:
    for ours, their in zip(found, wanted, strict=True):
        bound = GRADIENT[ours.dtype] * max(1.0, their.abs().max().item())
        assert ours.shape == their.shape
        assert (ours.double() - their).abs().max() <= bound


# -- against PyTorch ---------------------------------------------------------------------------------------------------

CALLS: dict[str, tuple[tuple[tuple[int, ...], ...], dict[str, Any]]] = {
    "plain": (((2, 3, 17, 8), (2, 3, 21, 8), (2, 3, 21, 5)), {}),
    "causal": (((2, 3, 19, 8), (2, 3, 19, 8), (2, 3, 19, 8)), {"is_causal": True}),
    "groups": (((2, 6, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8)), {"enable_gqa": True, "is_causal": True}),
    "broadcast": (((1, 3, 9, 8), (2, 1, 7, 8), (2, 1, 7, 8)), {}),
    "scale": (((2, 3, 9, 8), (2, 3, 7, 8), (2, 3, 7, 8)), {"scale": -0.3}),
    "one head": (((9, 8), (7, 8), (7, 8)), {}),
    "long": (((1, 2, 300, 16), (1, 2, 300, 16), (1, 2, 300, 16)), {"is_causal": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", CALLS)
def test_output_and_gradients_are_those_of_pytorch(name: str, dtype: Any) -> None:
    shapes, options = CALLS[name]
    tensors = leaves(*shapes, dtype=dtype)
    out = scaled_dot_product_attention(*tensors, **options)
    arrays = [tensor.detach().numpy() for tensor in tensors]
    tolerances.check_out(out.detach().numpy(), tolerances.expected(*arrays, **options))
    # PyTorch's own kernel broadcasts neither one head nor a batch of one
    expanded = [tensor.expand(2, 3, -1, -1) for tensor in tensors] if name == "broadcast" else tensors
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    again = [tensor.expand(2, 3, -1, -1) for tensor in wide] if name == "broadcast" else wide
    assert theirs(*expanded, **options).shape == out.shape
    wanted = torch.autograd.grad(theirs(*again, **options).sin().sum(), wide)
    found = torch.autograd.grad(out.sin().sum(), tensors)
    assert [gradient.dtype for gradient in found] == [dtype] * 3
    check_gradients(found, wanted)


@pytest.mark.parametrize("shape", [(9, 7), (2, 1, 1, 7), (1, 3, 9, 7), (2, 3, 9, 7)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_and_their_gradient(shape: tuple[int, ...], kind: str) -> None:
    tensors = leaves((2, 3, 9, 8), (2, 3, 7, 8), (2, 3, 7, 8))
    mask = torch.rand(shape) > 0.4 if kind == "bool" else torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out = scaled_dot_product_attention(*tensors, mask)
    wanted = theirs(*tensors, mask)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-13)
    sources = tensors if kind == "bool" else [*tensors, mask]
    check_gradients(torch.autograd.grad(out.sin().sum(), sources), torch.autograd.grad(wanted.sin().sum(), sources))


def test_causal_bottom_right_and_with_a_mask() -> None:
    query, key, value = leaves((2, 3, 4, 8), (2, 3, 9, 8), (2, 3, 9, 8))
    padding = torch.rand(2, 1, 1, 9) > 0.3
    padding[..., 0] = True
    visible = padding & torch.ones(4, 9, dtype=torch.bool).tril(5)
    out = scaled_dot_product_attention(query, key, value, padding, is_causal="bottom-right")
    torch.testing.assert_close(out, theirs(query, key, value, visible), rtol=0, atol=1e-13)


def test_a_query_that_may_look_at_nothing_has_no_part() -> None:
    query, key, value = leaves((1, 1, 3, 4), (1, 1, 2, 4), (1, 1, 2, 4))
    mask = torch.tensor([[True, True], [False, False], [True, False]])
    with torch.no_grad():
        query[0, 0, 1] = torch.nan
    out, lse = attention_with_lse(query, key, value, mask)
    assert (out[0, 0, 1] == 0).all()
    assert lse[0, 0, 1] == -torch.inf
    gradients = torch.autograd.grad(out.sum(), (query, key, value))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][0, 0, 1] == 0).all()


def test_lse_is_differentiable_alone_and_with_the_result() -> None:
    tensors = leaves((2, 5, 4), (2, 6, 4), (2, 6, 4))

    def formula(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        scores = query @ key.mT / 2
        return scores.softmax(-1) @ value, scores.logsumexp(-1)

    for of in (lambda out, lse: lse.sin().sum(), lambda out, lse: (out.sum(-1) * lse).sum()):
        found = torch.autograd.grad(of(*attention_with_lse(*tensors)), tensors[:2])
        check_gradients(found, torch.autograd.grad(of(*formula(*tensors)), tensors[:2]))


def test_additive_attention() -> None:
    *tensors, weight = leaves((2, 5, 4), (2, 6, 4), (2, 6, 3), (4,))
    mask = torch.rand(5, 6) > 0.3
    mask[:, 0] = True

    def formula(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
        scores = (torch.tanh(query[..., :, None, :] + key[..., None, :, :]) * weight).sum(-1)
        return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value

    out, wanted = additive_attention(*tensors, weight, mask), formula(*tensors, weight)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-13)
    sources = [*tensors, weight]
    check_gradients(torch.autograd.grad(out.sin().sum(), sources), torch.autograd.grad(wanted.sin().sum(), sources))


# -- PyTorch's own checks ----------------------------------------------------------------------------------------------


def opcheck_calls() -> dict[str, tuple[Any, ...]]:
    q, k, v = leaves((2, 4, 5, 8), (2, 2, 6, 8), (2, 2, 6, 3))
    mask = torch.randn(1, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    narrow = leaves((5, 8), (3, 1, 6, 8), (2, 6, 4), dtype=torch.float32)
    seed = torch.tensor(2**62 + 5)
    return {
        "float mask, groups": (q, k, v, mask, 0.0, "no", None, True, None),
        "dropout, causal": (q, k, v, None, 0.5, "top-left", 0.3, True, seed),
        "heads split": (heads_of(q), heads_of(k), v, None, 0.0, "bottom-right", None, True, None),
        "ranks that differ": (*narrow, torch.rand(6) > 0.3, 0.0, "no", None, False, None),
    }


@pytest.mark.parametrize("name", opcheck_calls())
def test_opcheck(name: str) -> None:
    args = opcheck_calls()[name]
    torch.library.opcheck(OPERATOR, args)


def test_opcheck_of_the_others() -> None:
    query, key, value, weight = leaves((2, 5, 8), (2, 6, 8), (2, 6, 3), (8,))
    torch.library.opcheck(ADDITIVE, (query, key, value, weight, None, "top-left"))
    q, k, v, mask = (t.detach() for t in opcheck_calls()["float mask, groups"][:4])
    for given, options in ((mask, (0.0, "no", None, True, None, True)), (None, (0.0, "no", None, True, None, False))):
        out, lse = OPERATOR(q, k, v, given, *options[:-1])
        torch.library.opcheck(BACKWARD, (torch.ones_like(out), lse, q, k, v, out, lse, given, *options))
        torch.library.opcheck(BACKWARD, (None, lse, q, k, v, out, lse, given, *options))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"enable_gqa": True, "scale": 0.7}], ids=str)
def test_gradcheck(options: dict[str, Any]) -> None:
    kv = 1 if options.get("enable_gqa") else 2
    tensors = leaves((1, 2, 4, 3), (2, kv, 5, 3), (2, kv, 5, 2))
    assert gradcheck(lambda *args: attention_with_lse(*args, **options), tensors, check_batched_grad=True)


def test_gradcheck_of_masks_and_additive_attention() -> None:
    tensors = leaves((2, 4, 3), (2, 5, 3), (2, 5, 2))
    floating = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(scaled_dot_product_attention, (*tensors, floating), check_batched_grad=True)
    assert gradcheck(scaled_dot_product_attention, (*tensors, torch.rand(2, 1, 5) > 0.3))
    (weight,) = leaves((3,))
    assert gradcheck(additive_attention, (*tensors, weight, None, True), check_batched_grad=True)


# -- shared memory -----------------------------------------------------------------------------------------------------


def test_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reads the memory of the tensors, and the result is the memory that it wrote."""
    seen: list[Any] = []

    def spy(*args: Any, **options: Any) -> Any:
        results = real(*args, **options)
        seen.append((args, results))
        return results

    real = fastattn.attention
    monkeypatch.setattr(fastattn, "attention", spy)
    query, key, value = (heads_of(tensor) for tensor in leaves((2, 3, 9, 8), (2, 3, 7, 8), (2, 3, 7, 8)))
    mask = torch.zeros(1, 1, 9, 7)
    out = scaled_dot_product_attention(query, key, value, mask)
    (args, results), *_ = seen
    for tensor, array in zip((query, key, value, mask), args[:4], strict=True):
        assert array.ctypes.data == tensor.data_ptr()
    assert out.data_ptr() == results[0].ctypes.data


def test_a_result_of_split_heads_merges_without_a_copy() -> None:
    query, key, value = (heads_of(tensor) for tensor in leaves((2, 3, 9, 8), (2, 3, 7, 8), (2, 3, 7, 5)))
    out = scaled_dot_product_attention(query, key, value)
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, theirs(query, key, value), rtol=0, atol=1e-13)
    assert scaled_dot_product_attention(*(t.contiguous() for t in (query, key, value))).is_contiguous()


def test_inputs_are_left_alone_and_views_are_read_in_place() -> None:
    base = torch.randn(2, 3, 20, 16)
    query, key, value = base[:, :, ::2, ::2], base[:, :, 1::2, 1::2], base[:, :, :10, :8]
    before = base.clone()
    out = scaled_dot_product_attention(query, key, value)
    assert torch.equal(base, before)
    assert torch.equal(out, scaled_dot_product_attention(*(t.contiguous() for t in (query, key, value))))
    negated = torch._neg_view(query)  # PyTorch puts the change of sign off
    assert torch.equal(
        scaled_dot_product_attention(negated, key, value), scaled_dot_product_attention(-query, key, value)
    )


# -- modes -------------------------------------------------------------------------------------------------------------


def block(x: Tensor, weight: Tensor, attend: Any, mask: Tensor | None = None, **options: Any) -> Tensor:
    """Self-attention of 4 heads with its projection."""
    batch, length, features = x.shape
    query, key, value = (x @ weight).view(batch, length, 3, 4, features // 4).permute(2, 0, 3, 1, 4)
    out = attend(query, key, value, mask, **options)
    return out.transpose(1, 2).reshape(batch, length, features)


def check_compiled(backend: str, dynamic: bool | None, lengths: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=dynamic)
    weight = (torch.randn(32, 96) / 6).requires_grad_()
    for length in lengths:
        (x,) = leaves((2, length, 32), dtype=torch.float32)
        mask = torch.rand(2, 1, 1, length) > 0.3
        mask[..., 0] = True
        out, wanted = (f(x, weight, attend, mask) for f, attend in
                       ((compiled, scaled_dot_product_attention), (block, theirs)))  # fmt: skip
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-4)
        found, right = (torch.autograd.grad(y.sin().sum(), (x, weight)) for y in (out, wanted))
        for ours, their in zip(found, right, strict=True):
            torch.testing.assert_close(ours, their, rtol=0, atol=1e-4 * max(1.0, their.abs().max().item()))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(dynamic: bool) -> None:
    check_compiled("aot_eager", dynamic, (6, 9, 13))


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    with tolerant_of_warnings():
        check_compiled("inductor", None, (6,))


@contextlib.contextmanager
def tolerant_of_warnings() -> Any:
    """Inductor, and old NumPy within PyTorch, warn of their own affairs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_dropout_in_a_compiled_program() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x, weight = leaves((2, 6, 32), (32, 96))

    def step(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        out = compiled(x, weight, scaled_dot_product_attention, dropout_p=0.5)
        return out, *torch.autograd.grad(out.sin().sum(), (x,))

    first, again, other = step(1), step(1), step(2)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    torch.manual_seed(1)
    assert torch.equal(block(x, weight, scaled_dot_product_attention, dropout_p=0.5), first[0])


def test_additive_attention_compiled() -> None:
    torch._dynamo.reset()
    tensors = leaves((2, 5, 4), (2, 6, 4), (2, 6, 3), (4,))
    compiled = torch.compile(lambda *args: additive_attention(*args, None, "bottom-right"), fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    out, wanted = compiled(*tensors), additive_attention(*tensors, None, "bottom-right")
    assert torch.equal(out, wanted)
    for ours, eager in zip(*(torch.autograd.grad(y.sum(), tensors) for y in (out, wanted)), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    tensors = leaves((2, 3, 9, 8), (2, 3, 7, 8), (2, 3, 7, 8))
    with mode():
        out = scaled_dot_product_attention(*tensors)
        assert not out.requires_grad
    assert out.is_inference() is (mode is torch.inference_mode)
    assert torch.equal(out, scaled_dot_product_attention(*tensors))


def test_every_way_to_the_kernel_gives_the_same_bits() -> None:
    """Called directly, by autograd, through the dispatcher, under a mode, and under a transform of torch.func."""
    from torch.utils.flop_counter import FlopCounterMode

    tensors = leaves((2, 3, 9, 8), (2, 3, 7, 8), (2, 3, 7, 8))
    plain = [tensor.detach() for tensor in tensors]
    options = (None, 0.0, "no", None, False, None)
    with FlopCounterMode(display=False):
        counted = scaled_dot_product_attention(*tensors)
    outs = {
        "direct": scaled_dot_product_attention(*plain),
        "autograd": scaled_dot_product_attention(*tensors),
        "operator": OPERATOR(*plain, *options)[0],
        "operator, autograd": OPERATOR(*tensors, *options)[0],
        "mode": counted,
        "vmap": torch.func.vmap(scaled_dot_product_attention)(*plain),
    }
    for way, out in outs.items():
        assert torch.equal(out, outs["direct"]), way
    wanted = torch.autograd.grad(outs["autograd"].sin().sum(), tensors)
    for way in ("operator, autograd", "mode"):
        for ours, first in zip(torch.autograd.grad(outs[way].sin().sum(), tensors), wanted, strict=True):
            assert torch.equal(ours, first), way
    grads = torch.func.grad(lambda *args: scaled_dot_product_attention(*args).sin().sum(), argnums=(0, 1, 2))(*plain)
    for ours, first in zip(grads, wanted, strict=True):
        assert torch.equal(ours, first)


def test_gradients_of_each_sample_by_vmap() -> None:
    query, key, value = leaves((4, 2, 5, 8), (2, 6, 8), (4, 2, 6, 8), grad=False)

    def loss(attend: Any) -> Any:
        return lambda *args: attend(*args).sin().sum()

    for argnums in ((0, 1, 2), (1,)):
        found, wanted = (
            torch.func.vmap(torch.func.grad(loss(attend), argnums), in_dims=(0, None, 0))(query, key, value)
            for attend in (scaled_dot_product_attention, theirs)
        )
        check_gradients(found, wanted)
    jacobian = torch.func.jacrev(scaled_dot_product_attention)(query[0], key, value[0])
    torch.testing.assert_close(jacobian, torch.func.jacrev(theirs)(query[0], key, value[0]), rtol=0, atol=1e-12)


def test_dropout_under_vmap_is_that_of_each_sample() -> None:
    query, key, value = leaves((3, 2, 5, 8), (3, 2, 6, 8), (3, 2, 6, 8), grad=False)
    attend = torch.func.vmap(lambda *args: scaled_dot_product_attention(*args, dropout_p=0.5), randomness="same")
    torch.manual_seed(3)
    out = attend(query, key, value)
    for i in range(3):
        torch.manual_seed(3)
        assert torch.equal(out[i], scaled_dot_product_attention(query[i], key[i], value[i], dropout_p=0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_pytorch_gives(dtype: Any) -> None:
    x, weight = leaves((2, 6, 32), (32, 96), dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        projected = x @ weight
        out, wanted = (block(x, weight, attend) for attend in (scaled_dot_product_attention, theirs))
        added = additive_attention(projected, projected, projected, torch.ones(96))
        wide = [tensor.double() for tensor in leaves((2, 5, 8), (2, 5, 8), (2, 5, 8), dtype=torch.float32)]
        for given in ([tensor.float() for tensor in wide], [wide[0].float(), wide[1].half(), wide[2].bfloat16()], wide):
            assert scaled_dot_product_attention(*given).dtype == theirs(*given).dtype
    assert projected.dtype == out.dtype == added.dtype == wanted.dtype == dtype
    query, key, value = projected.view(2, 6, 3, 4, 8).permute(2, 0, 3, 1, 4)
    assert torch.equal(out, scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(2, 6, 32))
    out.sum().backward()
    assert x.grad.dtype == torch.float32


def test_gradient_checkpointing_repeats_dropout() -> None:
    from torch.utils.checkpoint import checkpoint

    tensors = leaves((2, 3, 9, 8), (2, 3, 7, 8), (2, 3, 7, 8))
    results = []
    for use in (False, True):
        torch.manual_seed(7)
        args = (*tensors, None, 0.5)
        out = (
            checkpoint(scaled_dot_product_attention, *args, use_reentrant=False)
            if use
            else scaled_dot_product_attention(*args)
        )
        results.append(torch.autograd.grad(out.sin().sum(), tensors))
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


# -- dropout -----------------------------------------------------------------------------------------------------------


def test_manual_seed_determines_dropout() -> None:
    tensors = leaves((2, 3, 40, 8), (2, 3, 50, 8), (2, 3, 50, 8))

    def step(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        out = scaled_dot_product_attention(*tensors, dropout_p=0.3)
        return [out, *torch.autograd.grad(out.sin().sum(), tensors)]

    for first, again, other in zip(step(1), step(1), step(2), strict=True):
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    torch.manual_seed(1)
    seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64))
    arrays = [tensor.detach().numpy() for tensor in tensors]
    out = fastattn.attention(*arrays, dropout_p=0.3, rng=seed)
    torch.manual_seed(1)
    np.testing.assert_array_equal(scaled_dot_product_attention(*tensors, dropout_p=0.3).detach().numpy(), out)
    before = torch.get_rng_state()
    scaled_dot_product_attention(*tensors)
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn where nothing is dropped"


def test_gradients_are_those_of_the_weights_that_dropout_kept() -> None:
    tensors = leaves((2, 4, 3), (2, 5, 3), (2, 5, 2))

    def repeated(*args: Tensor) -> Tensor:
        torch.manual_seed(5)
        return scaled_dot_product_attention(*args, dropout_p=0.4)

    assert gradcheck(repeated, tensors)


# -- threads and processes ---------------------------------------------------------------------------------------------


def test_no_more_threads_than_pytorch_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []

    def spy(*args: Any, **options: Any) -> Any:
        used.append(fastattn.get_num_threads())
        return real(*args, **options)

    real = fastattn.attention
    monkeypatch.setattr(fastattn, "attention", spy)
    tensors = leaves((1, 2, 5, 4), (1, 2, 5, 4), (1, 2, 5, 4))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with fastattn.num_threads(2):
            scaled_dot_product_attention(*tensors)
        torch.set_num_threads(3)
        with fastattn.num_threads(2):
            scaled_dot_product_attention(*tensors)
    finally:
        torch.set_num_threads(threads)
    assert used == [1, 2]


WORKERS = """
import sys, torch
from torch.utils.data import DataLoader, Dataset
from fastattn.integrations.torch import scaled_dot_product_attention

class Attended(Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        query, key, value = torch.randn(3, 4, 300, 32, generator=generator)
        return scaled_dot_product_attention(query, key, value, is_causal=True)

if __name__ == "__main__":
    wanted = torch.stack([Attended()[i] for i in range(6)])  # the pool of threads exists before workers are forked
    for context in ("fork", "spawn"):
        loader = DataLoader(Attended(), batch_size=2, num_workers=2, multiprocessing_context=context)
        print(context, torch.equal(torch.cat(list(loader)), wanted))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="fork is what Linux does")
def test_in_workers_of_a_data_loader(tmp_path: Path) -> None:
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    command = [sys.executable, "-W", "ignore", str(script)]
    done = subprocess.run(command, env=processes.environment(), text=True, capture_output=True, timeout=120)
    assert done.stdout == "fork True\nspawn True\n", done.stderr


def test_importing_fastattn_does_not_import_pytorch() -> None:
    code = "import sys, fastattn, fastattn.integrations\nprint({'torch', 'transformers', 'jax'} & set(sys.modules))"
    assert processes.run(code) == "set()\n"


def test_without_pytorch_the_module_says_what_it_needs() -> None:
    code = """
import sys
sys.modules["torch"] = None
try:
    import fastattn.integrations.torch
except ImportError as error:
    print(error)
"""
    assert f"needs PyTorch: {to_install('torch')}\n" in processes.run(code)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.int64, torch.complex64])
def test_other_dtypes(dtype: Any) -> None:
    tensor = torch.ones(2, 3, 4).to(dtype)
    with pytest.raises(TypeError, match=f"query: dtype {dtype} is not supported; expected one of torch.float16, torch"):
        scaled_dot_product_attention(tensor, tensor, tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.complex64])
def test_dtypes_that_differ(dtype: Any) -> None:
    tensor = torch.ones(2, 3, 4).to(dtype)
    with pytest.raises(TypeError, match=f"key: dtype {dtype}; expected torch.float32, as query"):
        scaled_dot_product_attention(torch.ones(2, 3, 4), tensor, tensor)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.int64])
def test_other_dtypes_of_masks(dtype: Any) -> None:
    tensor = torch.ones(2, 3, 4)
    with pytest.raises(TypeError, match=f"attn_mask: dtype {dtype} is not supported; expected one of torch.bool"):
        scaled_dot_product_attention(tensor, tensor, tensor, torch.ones(3, 3).to(dtype))


def test_other_devices_layouts_and_types() -> None:
    tensor = torch.ones(2, 3, 4)
    with pytest.raises(TypeError, match="value: a tensor on device meta; expected one on the CPU"):
        scaled_dot_product_attention(tensor, tensor, tensor.to("meta"))
    with pytest.raises(TypeError, match="attn_mask: a tensor on device meta"):
        scaled_dot_product_attention(tensor, tensor, tensor, torch.ones(3, 3, device="meta"))
    with pytest.raises(TypeError, match="key: a tensor of layout torch.sparse_coo; expected torch.strided"):
        scaled_dot_product_attention(tensor, tensor.to_sparse(), tensor)
    with pytest.raises(TypeError, match=r"query: ndarray; expected a torch\.Tensor"):
        scaled_dot_product_attention(tensor.numpy(), tensor, tensor)


def test_options_and_shapes() -> None:
    tensor = torch.ones(2, 3, 4)
    refused: list[tuple[Any, Any, dict[str, Any]]] = [
        (ValueError, "dropout_p: 1.5", {"dropout_p": 1.5}),
        (ValueError, "is_causal: 'top'", {"is_causal": "top"}),
        (TypeError, "scale: '1'", {"scale": "1"}),
        (TypeError, "enable_gqa: 1", {"enable_gqa": 1}),
        (ValueError, r"attn_mask: shape \(5,\); expected one that broadcasts", {"attn_mask": torch.ones(5)}),
        (ValueError, r"key: shape \(2, 3, 5\); expected 4 features", {"key": torch.ones(2, 3, 5)}),
    ]
    for kind, message, changes in refused:
        for grad in (False, True):
            arguments = {"query": tensor.clone().requires_grad_(grad), "key": tensor, "value": tensor, **changes}
            with pytest.raises(kind, match=message):
                scaled_dot_product_attention(**arguments)


def test_second_derivatives_are_refused() -> None:
    tensors = leaves((2, 4, 3), (2, 5, 3), (2, 5, 3))
    (weight,) = leaves((3,))
    (first,) = torch.autograd.grad(scaled_dot_product_attention(*tensors).sin().sum(), tensors[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="a first derivative only"):
        first.sum().backward()
    (first,) = torch.autograd.grad(additive_attention(*tensors, weight).sin().sum(), [weight], create_graph=True)
    with pytest.raises(NotImplementedError, match="a first derivative only"):
        first.sum().backward()
    plain = [tensor.detach() for tensor in tensors]
    twice = torch.func.jacrev(torch.func.jacrev(lambda query: scaled_dot_product_attention(query, *plain[1:]).sum()))
    with pytest.raises(NotImplementedError, match="a first derivative only"):
        twice(plain[0])


@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_is_refused_and_not_dropped(grad: bool) -> None:
    query, key, value = leaves((2, 4, 3), (2, 5, 3), (2, 5, 3), grad=grad)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        scaled_dot_product_attention(forward_ad.make_dual(query, torch.ones_like(query)), key, value)
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(lambda x: scaled_dot_product_attention(x, key, value), (query,), (torch.ones_like(query),))


def test_a_mask_that_requires_grad_in_additive_attention() -> None:
    query, key, value, weight = leaves((2, 4, 3), (2, 5, 3), (2, 5, 3), (3,))
    for shape in ((4, 5), (2, 1, 5), (1,)):
        mask = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert gradcheck(additive_attention, (query, key, value, weight, mask), check_batched_grad=True)
        keep = torch.rand(4, 5) < 0.7
        assert gradcheck(lambda mask, keep=keep: additive_attention(query, key, value, weight, (mask, keep)), (mask,))
        with torch.no_grad():
            assert not additive_attention(query, key, value, weight, mask).requires_grad
