"""PyTorch's tensors of half precision: read by their bits, no less exact than PyTorch's own attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch.nn.functional import scaled_dot_product_attention as theirs  # noqa: E402

from fastattn.call.halves import BITS, cast  # noqa: E402
from fastattn.integrations.tensors import array_of, tensor_of  # noqa: E402
from fastattn.integrations.torch import (  # noqa: E402
    additive_attention,
    attention_with_lse,
    scaled_dot_product_attention,
)

# PyTorch's own: functorch uses what it tells others not to
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")

Tensor = Any
DTYPES = [torch.bfloat16, torch.float16]
SHAPES = ((2, 4, 19, 8), (2, 2, 19, 8), (2, 2, 19, 8))
OPTIONS: list[dict[str, Any]] = [
    {},
    {"is_causal": True},
    {"scale": -0.3},
    {"attn_mask": "bool"},
    {"attn_mask": "float"},
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def leaves(dtype: Any, *shapes: tuple[int, ...], grad: bool = True) -> list[Tensor]:
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for shape in shapes]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_and_gradients_are_no_less_exact_than_pytorchs(dtype: Any, options: dict[str, Any]) -> None:
    tensors = leaves(dtype, *SHAPES)
    sources, mask = list(tensors), None
    if "attn_mask" in options:
        mask = torch.rand(19, 19) > 0.3 if options["attn_mask"] == "bool" else leaves(dtype, (4, 19, 19))[0]
        sources += [mask] if options["attn_mask"] == "float" else []
    options = options | {"attn_mask": mask, "enable_gqa": True}
    wide = [tensor.detach().double().requires_grad_() for tensor in sources]
    with_wide = options if len(wide) == 3 else options | {"attn_mask": wide[3]}
    exact = theirs(*wide[:3], **with_wide)
    wanted = torch.autograd.grad(exact.sin().sum(), wide)
    errors = []
    for attend in (scaled_dot_product_attention, theirs):
        out = attend(*tensors, **options)
        found = torch.autograd.grad(out.sin().sum(), sources)
        assert [each.dtype for each in (out, *found)] == [dtype] * (1 + len(sources))
        pairs = zip((out.detach(), *found), (exact.detach(), *wanted), strict=True)
        errors.append([float((each.double() - want).abs().max()) for each, want in pairs])
    # one rounding of the result, and what the one that arrives at the backward pass has lost
    eps = torch.finfo(dtype).eps
    sizes = [max(1.0, float(want.abs().max())) for want in (exact.detach(), *wanted)]
    for own, their, size in zip(*errors, sizes, strict=True):
        assert own <= max(2 * their, eps * size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_is_read_where_it_lies(dtype: Any) -> None:
    for tensor in (torch.randn(4, 6).to(dtype), torch.randn(4, 6).to(dtype).mT[::2], torch.zeros(4, 1).to(dtype)):
        array = array_of("query", tensor)
        assert array.ctypes.data == tensor.data_ptr()
        assert array.shape == tuple(tensor.shape)
        assert tensor_of(array).dtype == dtype
        assert tensor_of(array).data_ptr() == tensor.data_ptr()
        np.testing.assert_array_equal(cast(array, np.dtype(np.float32)), tensor.float().numpy())
    assert array_of("query", torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)).dtype == BITS
    memory = torch.zeros(3, dtype=dtype)
    memory.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match=r"query: a tensor of shape \(3,\) that has no memory"):
        array_of("query", memory)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: Any) -> None:
    query, key, value, weight = leaves(dtype, (2, 5, 8), (2, 6, 8), (2, 6, 3), (8,))
    (mask,) = leaves(dtype, (5, 6))
    torch.library.opcheck(torch.ops.fastattn.attention.default, (query, key, value, mask, 0.0, "no", None, True, None))
    additive = torch.ops.fastattn.additive_attention.default
    torch.library.opcheck(additive, (query, key, value, weight, None, "top-left"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_else_has_gradients(dtype: Any) -> None:
    tensors = leaves(dtype, *SHAPES)
    slopes, sinks, table, weight = leaves(dtype, (4,), (4,), (19,), (8,))

    def relative(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + table[key]

    options = {"alibi_slopes": slopes, "sinks": sinks, "score_mod": relative, "enable_gqa": True}
    out, lse = attention_with_lse(*tensors, **options)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    found = torch.autograd.grad(out.sum() + lse.sum(), (*tensors, slopes, sinks, table))
    assert {gradient.dtype for gradient in found} == {dtype}
    added = additive_attention(tensors[0][:, :2], *tensors[1:], weight)
    gradient = torch.autograd.grad(added.sum(), weight)[0]
    assert (added.dtype, gradient.dtype) == (dtype, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_compiled_program_knows_the_dtypes(dtype: Any) -> None:
    tensors = leaves(dtype, (2, 5, 8), (2, 6, 8), (2, 6, 3))
    compiled = torch.compile(attention_with_lse, backend="aot_eager", fullgraph=True)
    for ours, their in zip(compiled(*tensors), attention_with_lse(*tensors), strict=True):
        assert torch.equal(ours, their)
        assert ours.dtype == their.dtype
