"""PyTorch: which tensors are taken, of any ranks, strides and classes, and which are refused by name."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import fastattn

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch.nn.functional import scaled_dot_product_attention as theirs  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402

from fastattn.integrations.torch import (  # noqa: E402
    additive_attention,
    attention_with_lse,
    scaled_dot_product_attention,
)

# PyTorch's own: functorch uses what it tells others not to
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")

Tensor = Any
Shape = tuple[int, ...]
OPERATOR = torch.ops.fastattn.attention.default
NAMES = ("query", "key", "value", "attn_mask")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Leave out what PyTorch says of prototypes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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


def test_the_fake_kernel_knows_how_a_result_lies_without_features() -> None:
    tensors = [split(torch.randn(2, 3, length, features)) for length, features in ((5, 0), (7, 0), (7, 6))]
    torch.library.opcheck(OPERATOR, (*tensors, None, 0.0, "no", None, False, None))


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


# -- PyTorch's biases that mean causality ------------------------------------------------------------------------------


def bias_of(variant: str, queries: int, keys: int) -> Tensor:
    from torch.nn.attention import bias

    with quietly():  # a bias warns that PyTorch makes NaN of queries that look at nothing
        return {"top-left": bias.causal_upper_left, "bottom-right": bias.causal_lower_right}[variant](queries, keys)


@pytest.mark.parametrize("queries", [5, 7, 9])
@pytest.mark.parametrize("causal", [False, True, "bottom-right"])
@pytest.mark.parametrize("variant", ["top-left", "bottom-right"])
def test_a_causal_bias_means_is_causal(variant: str, causal: bool | str, queries: int) -> None:
    """Together with is_causal both hold, as they do of any mask."""
    _, key, value = small()
    query, weight = torch.randn(2, 3, queries, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    bias = bias_of(variant, queries, 7)
    mask = bias._materialize()
    for out, wanted in (
        (attention_with_lse(query, key, value, bias, is_causal=causal),
         attention_with_lse(query, key, value, mask, is_causal=causal)),
        (additive_attention(query, key, value, weight, bias, causal),
         additive_attention(query, key, value, weight, mask, causal)),
    ):  # fmt: skip
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("variant", ["top-left", "bottom-right"])
def test_a_causal_bias_with_gradients_and_compiled(variant: str) -> None:
    tensors = [tensor.requires_grad_() for tensor in small()]
    bias = bias_of(variant, 5, 7)
    mask = bias._materialize()
    wanted = torch.autograd.grad(theirs(*tensors, mask).sin().sum(), tensors)
    for attend in (scaled_dot_product_attention, compiled(scaled_dot_product_attention)):
        found = torch.autograd.grad(attend(*tensors, bias).sin().sum(), tensors)
        for ours, their in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, their, rtol=0, atol=1e-12)

    def made_inside(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, bias_of(variant, query.shape[-2], key.shape[-2]))

    with quietly():  # PyTorch does not compile the making of a bias
        out = compiled(made_inside, fullgraph=False)(*tensors)
    torch.testing.assert_close(out, theirs(*tensors, mask), rtol=0, atol=1e-12)


def test_a_causal_bias_of_other_lengths_or_in_another_place() -> None:
    tensors = small()
    with pytest.raises(
        ValueError, match=r"attn_mask: a CausalBias for 5 queries and 8 keys; expected lengths \(5, 7\)"
    ):
        scaled_dot_product_attention(*tensors, bias_of("top-left", 5, 8))
    bias = bias_of("top-left", 5, 7)
    for place, name in enumerate(NAMES[:3]):
        with pytest.raises(TypeError, match=f"{name}: a CausalBias, which has no numbers"):
            scaled_dot_product_attention(*tensors[:place], bias, *tensors[place + 1 :])


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_causal_bias_among_arrays(backend: str | None) -> None:
    """NumPy makes an array of it, of whatever lies in its memory."""
    query, key, value = (tensor[0, 0].numpy() for tensor in small())
    with pytest.raises(TypeError, match="attn_mask: a CausalBias, which has no numbers; expected is_causal"):
        fastattn.attention(query, key, value, bias_of("top-left", 5, 7), backend=backend)  # type: ignore[arg-type]


# -- classes of tensors ------------------------------------------------------------------------------------------------


class Named(torch.Tensor):  # type: ignore[misc]
    """A subclass without overrides."""


class OwnParameter(torch.nn.Parameter):  # type: ignore[misc]
    """A parameter without overrides."""


class Watching(torch.Tensor):  # type: ignore[misc]
    """A subclass that sees every function, and hands it on."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(function, types, args, kwargs or {})


class Doubled(torch.Tensor):  # type: ignore[misc]
    """A subclass without memory: its numbers are twice those of another tensor."""

    @staticmethod
    def __new__(cls, half: Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(
            cls, half.shape, strides=half.stride(), dtype=half.dtype, requires_grad=half.requires_grad
        )

    def __init__(self, half: Tensor) -> None:
        self.half = half

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Doubled({self.half!r})"

    def __tensor_flatten__(self) -> Any:  # torch.compile asks for this
        return ["half"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, context: Any, size: Any, stride: Any) -> Any:
        return Doubled(inner["half"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].half)
        args, kwargs = tree_map(lambda a: 2 * a.half if isinstance(a, cls) else a, (args, kwargs or {}))
        return function(*args, **kwargs)


class Refusing(torch.Tensor):  # type: ignore[misc]
    """A subclass that knows none of the operators."""

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return super().__torch_dispatch__(function, types, args, kwargs or {})
        return NotImplemented


class Silent(torch.Tensor):  # type: ignore[misc]
    """A subclass that does not even tell its dtype."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


MADE: dict[str, Any] = {
    "subclass": lambda tensor: tensor.as_subclass(Named),
    "parameter": torch.nn.Parameter,
    "buffer": torch.nn.Buffer,
    "subclass of parameter": OwnParameter,
    "torch function": lambda tensor: tensor.as_subclass(Watching),
    "torch dispatch": lambda tensor: Doubled(tensor / 2),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("place", range(4), ids=NAMES)
@pytest.mark.parametrize("kind", MADE)
def test_subclasses_that_hand_the_operator_on(kind: str, place: int, grad: bool) -> None:
    plain = [*small(), torch.randn(5, 7, dtype=torch.float64)]
    given: list[Tensor] = [*plain]
    given[place] = MADE[kind](plain[place])
    if given[place].requires_grad is not grad and given[place].is_leaf:
        given[place].requires_grad_(grad)
    wanted, out = theirs(*plain), scaled_dot_product_attention(*given)
    assert isinstance(out, type(given[place])) is (kind in ("subclass", "torch function", "buffer"))
    torch.testing.assert_close(out.detach().as_subclass(torch.Tensor), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["parameter", "buffer", "subclass of parameter", "torch dispatch"])
def test_subclasses_in_a_compiled_program(kind: str) -> None:
    query, key, value = small()
    with quietly():
        out = compiled(scaled_dot_product_attention)(MADE[kind](query), key, value)
    torch.testing.assert_close(out.detach(), theirs(query, key, value), rtol=0, atol=1e-12)


def test_fake_tensors_have_a_shape_and_no_numbers() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        query, key, value = (torch.empty(2, length, 3, 8).transpose(1, 2) for length in (5, 7, 7))
        out = scaled_dot_product_attention(query, key, value)
        assert isinstance(out, type(query))
        assert (out.shape, out.stride()) == ((2, 3, 5, 8), query.stride())
    with pytest.raises(TypeError, match="attn_mask: a FakeTensor, which fastattn's operator cannot be called with"):
        scaled_dot_product_attention(*small(), mode.from_tensor(torch.zeros(5, 7)))


def nested(layout: Any) -> Tensor:
    with quietly():
        return torch.nested.nested_tensor([torch.randn(length, 8) for length in (5, 4)], layout=layout)


def masked() -> Tensor:
    with quietly():
        return torch.masked.masked_tensor(torch.randn(5, 8), torch.rand(5, 8) > 0.3)


REFUSED: dict[str, tuple[Any, str]] = {
    "nested": (lambda: nested(torch.strided), "a nested tensor; expected one of a single shape"),
    "jagged": (lambda: nested(torch.jagged), "a nested tensor; expected one of a single shape"),
    "masked": (masked, "a MaskedTensor, which fastattn's operator cannot be called with"),
    "of another mind": (
        lambda: torch.randn(5, 8).as_subclass(Refusing),
        "a Refusing, which fastattn's operator cannot be called with",
    ),
    "silent": (lambda: torch.randn(5, 8).as_subclass(Silent), "a Silent whose is_nested cannot be read"),
    "uninitialized": (torch.nn.UninitializedParameter, "a UninitializedParameter whose shape cannot be read"),
    "sparse": (lambda: torch.randn(5, 8).to_sparse(), "a tensor of layout torch.sparse_coo"),
    "rows": (lambda: torch.randn(5, 8).to_sparse_csr(), "a tensor of layout torch.sparse_csr"),
    "mkldnn": (lambda: torch.randn(5, 8).to_mkldnn(), "a tensor of layout torch._mkldnn"),
    "meta": (lambda: torch.empty(5, 8, device="meta"), "a tensor on device meta"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.randn(5, 8), 0.1, 0, torch.quint8), "dtype torch.quint8"),
    "conjugate": (lambda: torch.randn(5, 8, dtype=torch.complex64).conj(), "dtype torch.complex64"),
    "of no class": (lambda: np.zeros((5, 8)), "ndarray; expected a torch.Tensor"),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("place", range(4), ids=NAMES)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_numbers_to_read_is_refused_by_name(kind: str, place: int, grad: bool) -> None:
    make, message = REFUSED[kind]
    given: list[Tensor] = [torch.randn(5, 8).requires_grad_(grad) for _ in range(3)] + [torch.zeros(5, 5)]
    with quietly():
        given[place] = make()
    for attend, last in ((scaled_dot_product_attention, given[3:]), (additive_attention, [torch.randn(8), given[3]])):
        with quietly(), pytest.raises(TypeError, match=f"{NAMES[place]}: {message}"):
            attend(*given[:3], *last)


@pytest.mark.parametrize("kind", ["nested", "jagged", "masked", "uninitialized", "sparse", "meta", "of no class"])
def test_what_has_no_numbers_to_read_is_refused_by_name_in_a_compiled_program(kind: str) -> None:
    make, message = REFUSED[kind]
    with quietly():
        attend, odd = compiled(scaled_dot_product_attention, fullgraph=False), make()
        with pytest.raises(TypeError, match=f"query: {message}"):
            attend(odd, torch.randn(5, 8), torch.randn(5, 8))


def without_memory() -> Tensor:
    tensor = torch.randn(5, 8)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("make", [without_memory, lambda: torch._to_functional_tensor(torch.randn(5, 8))])
def test_tensors_without_memory(make: Any) -> None:
    """PyTorch makes arrays of these, of whatever lies somewhere."""
    query = torch.randn(5, 8)
    with pytest.raises(TypeError, match=r"key: a tensor of shape \(5, 8\) that has no memory"):
        scaled_dot_product_attention(query, make(), query)
    with pytest.raises(TypeError, match=r"value: a tensor of shape \(5, 8\) that has no memory"):
        fastattn.attention(query.numpy(), query.numpy(), make())


def test_zeros_that_pytorch_keeps_no_memory_for() -> None:
    query, key, value = small()
    zeros = torch._efficientzerotensor(query.shape, dtype=query.dtype)
    torch.testing.assert_close(
        scaled_dot_product_attention(zeros, key, value), theirs(torch.zeros_like(query), key, value), rtol=0, atol=1e-12
    )
    query.requires_grad_()
    (gradient,) = torch.autograd.grad(scaled_dot_product_attention(query, key, value), query, zeros)
    assert not gradient.any()


def test_a_tensor_of_a_transform_that_has_ended() -> None:
    query, key, value = small()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor.sum()

    torch.func.grad(keep)(query)
    with torch.no_grad():
        out = scaled_dot_product_attention(kept[0], key, value)
        again = fastattn.attention(kept[0], key, value)
    wanted = scaled_dot_product_attention(query, key, value)
    assert torch.equal(out, wanted)
    assert torch.equal(torch.from_numpy(again), wanted)
