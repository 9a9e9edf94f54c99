"""PyTorch: which tensors are taken, of any ranks and strides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch.nn.functional import scaled_dot_product_attention as theirs  # noqa: E402

from fastattn.integrations.torch import (  # noqa: E402
    scaled_dot_product_attention,
)

# PyTorch's own: functorch uses what it tells others not to
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")

Tensor = Any
Shape = tuple[int, ...]
OPERATOR = torch.ops.fastattn.attention.default


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def small() -> list[Tensor]:
    """Return a query, key and value whose lengths differ."""
    return [torch.randn(2, 3, length, 8, dtype=torch.float64) for length in (5, 7, 7)]


def split(tensor: Tensor) -> Tensor:
    """Return the same numbers as they lie where heads have been split: (..., L, H, D), transposed."""
    return tensor.transpose(-3, -2).contiguous().transpose(-3, -2)


def compiled(function: Any, dynamic: bool | None = None, fullgraph: bool = True) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=fullgraph, dynamic=dynamic)


def broadcast(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's attention, which does not broadcast everything by itself."""
    tensors = (query, key, value)
    leading = torch.broadcast_shapes(*(tensor.shape[:-2] for tensor in tensors))
    return theirs(
        *(t.expand(*leading, *t.shape[-2:]) for t in tensors), None if mask is None else torch.atleast_2d(mask)
    )


def check(tensors: list[Tensor], mask: Tensor | None = None, attend: Any = scaled_dot_product_attention) -> None:
    """Compare the result and all gradients with PyTorch's."""
    sources = [tensor.detach().requires_grad_() for tensor in tensors]
    if mask is not None and mask.is_floating_point():
        mask = mask.detach().requires_grad_()
        sources.append(mask)
    given = (*sources[:3], mask)
    out, wanted = attend(*given), broadcast(*given)
    assert out.shape == wanted.shape
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    found, right = (torch.autograd.grad(result.sin().sum(), sources) for result in (out, wanted))
    for ours, their in zip(found, right, strict=True):
        torch.testing.assert_close(ours, their, rtol=0, atol=1e-11)


# -- ranks and strides -------------------------------------------------------------------------------------------------

RANKS: dict[str, tuple[Shape, ...]] = {
    "key and value of rank 5": ((2, 3, 5, 8), (4, 1, 3, 7, 8), (4, 1, 3, 7, 8)),
    "value of rank 5": ((2, 3, 5, 8), (3, 7, 8), (4, 1, 3, 7, 6)),
    "mask of rank 5": ((4, 2, 3, 5, 8), (3, 7, 8), (7, 8), (4, 1, 1, 5, 7)),
    "query of rank 5": ((4, 2, 3, 5, 8), (2, 3, 7, 8), (1, 7, 6)),
    "query of rank 6": ((2, 1, 2, 3, 5, 8), (4, 1, 1, 7, 8), (7, 6)),
    "query of rank 3": ((3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
    "query of rank 2": ((5, 8), (2, 3, 7, 8), (3, 7, 6)),
    "mask of rank 0": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), ()),
    "mask of rank 1": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (7,)),
    "one head, of many": ((2, 3, 5, 8), (2, 1, 7, 8), (3, 7, 8)),
}


def of_ranks(name: str, lies: str) -> tuple[list[Tensor], Tensor | None]:
    shapes = RANKS[name]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    if lies == "heads split":
        tensors = [split(tensor) if tensor.dim() > 2 else tensor for tensor in tensors]
    return tensors[:3], tensors[3] if len(shapes) > 3 else None


@pytest.mark.parametrize("lies", ["in one piece", "heads split"])
@pytest.mark.parametrize("name", RANKS)
def test_tensors_of_any_ranks_broadcast(name: str, lies: str) -> None:
    tensors, mask = of_ranks(name, lies)
    check(tensors, mask)
    torch.library.opcheck(OPERATOR, (*tensors, mask, 0.0, "no", None, False, None))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["key and value of rank 5", "query of rank 6", "mask of rank 0", "mask of rank 1"])
def test_tensors_of_any_ranks_broadcast_in_a_compiled_program(name: str, dynamic: bool) -> None:
    tensors, mask = of_ranks(name, "heads split")
    check(tensors, mask, compiled(scaled_dot_product_attention, dynamic))


@pytest.mark.parametrize("name", ["key and value of rank 5", "query of rank 3", "query of rank 6"])
def test_a_result_of_split_heads_merges_without_a_copy_at_any_rank(name: str) -> None:
    tensors, _ = of_ranks(name, "heads split")
    assert scaled_dot_product_attention(*tensors).transpose(-3, -2).is_contiguous()


def laid_out(tensor: Tensor, rng: np.random.Generator) -> Tensor:
    """Return the same numbers with other strides: permuted axes, gaps, a change of sign that is put off."""
    order = rng.permutation(tensor.dim()).tolist()
    gaps = [int(rng.integers(1, 3)) for _ in order]
    base = torch.empty([tensor.shape[axis] * gap for axis, gap in zip(order, gaps, strict=True)], dtype=tensor.dtype)
    view = base.permute([order.index(axis) for axis in range(tensor.dim())])
    view = view[tuple(slice(None, None, gaps[order.index(axis)]) for axis in range(tensor.dim()))]
    if tensor.dtype == torch.bool or rng.random() < 0.7:
        return view.copy_(tensor)
    return torch._neg_view(view.copy_(-tensor))


@pytest.mark.parametrize("seed", range(40))
def test_random_ranks_and_strides(seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch = rng.integers(1, 4, rng.integers(0, 4)).tolist()
    heads, queries, keys = (int(rng.choice(choices)) for choices in ((1, 3), (1, 5), (1, 6)))

    def leading(shape: list[int]) -> list[int]:
        """Axes that broadcast to these: some of them 1, some on the left missing."""
        shape = [size if rng.random() < 0.7 else 1 for size in shape]
        return shape[rng.integers(0, len(shape) + 1) :]

    shapes = [[*leading([*batch, heads]), *last] for last in ((queries, 4), (keys, 4), (keys, 3))]
    tensors = [laid_out(torch.randn(shape, dtype=torch.float64), rng) for shape in shapes]
    scores = [*torch.broadcast_shapes(*(shape[:-2] for shape in shapes)), queries, keys]
    kind, shape = rng.choice(["none", "bool", "float"]), leading(scores)
    if kind == "none":
        mask = None
    else:
        mask = torch.rand(shape) > 0.3 if kind == "bool" else torch.randn(shape, dtype=torch.float64)
        mask = laid_out(mask, rng)
    check(tensors, mask)


def test_elements_that_share_memory() -> None:
    query, key, value = small()
    repeated = query[:, :, :1].expand(-1, -1, 5, -1)
    windows = torch.randn(40, dtype=torch.float64).as_strided((2, 3, 7, 8), (5, 2, 3, 1))
    mask = torch.zeros(1, dtype=torch.float64).expand(5, 7)
    check([repeated, windows, value], mask)
    check([query, key, windows])


def test_vmap_over_no_samples() -> None:
    tensors = [tensor[:0] for tensor in small()]
    assert torch.func.vmap(scaled_dot_product_attention)(*tensors).shape == (0, 3, 5, 8)
    gradient = torch.func.grad(lambda *args: scaled_dot_product_attention(*args).sum())
    assert torch.func.vmap(gradient)(*tensors).shape == (0, 3, 5, 8)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_scale_that_changes_in_a_compiled_program(dynamic: bool | None) -> None:
    tensors = small()
    attend = compiled(lambda *args: scaled_dot_product_attention(*args[:3], scale=args[3]), dynamic)
    for scale in (0.5, 0.25, -1.0):
        torch.testing.assert_close(attend(*tensors, scale), theirs(*tensors, scale=scale), rtol=0, atol=1e-12)
