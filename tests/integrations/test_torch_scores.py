"""PyTorch: windows, offsets, lengths, softcaps and pairs of masks, against attention that is composed by hand."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch.autograd import gradcheck  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention as theirs  # noqa: E402

from fastattn.call.score_options import FurtherOptions  # noqa: E402
from fastattn.integrations import keywords  # noqa: E402
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
ADDITIVE_BACKWARD = torch.ops.fastattn.additive_attention_backward.default
QUERIES, KEYS = 7, 9


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def leaves(*shapes: tuple[int, ...], grad: bool = True) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).requires_grad_(grad) for shape in shapes]


def operands(heads: int = 4, kv_heads: int = 2, grad: bool = True) -> list[Tensor]:
    return leaves((2, heads, QUERIES, 8), (2, kv_heads, KEYS, 8), (2, kv_heads, KEYS, 5), grad=grad)


def positions(
    is_causal: bool | str = False, query_offset: Any = 0, key_lengths: Tensor | None = None, **_: Any
) -> Tensor:
    """Return the positions of the queries, (2, 1, Lq, 1)."""
    lengths = torch.full((2,), KEYS) if key_lengths is None else key_lengths
    offset = lengths - QUERIES if is_causal == "bottom-right" else torch.as_tensor(query_offset).expand(2)
    return torch.arange(QUERIES)[:, None] + offset[:, None, None, None]


def visible(
    keep: Tensor | None = None,
    is_causal: bool | str = False,
    window: tuple[int | None, int | None] = (None, None),
    query_offset: Any = 0,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """Return the mask of all that hides keys, (2, 1, Lq, Lk)."""
    lengths = torch.full((2,), KEYS) if key_lengths is None else key_lengths
    position = positions(is_causal, query_offset, key_lengths)
    key = torch.arange(KEYS)
    seen = key < lengths[:, None, None, None]
    seen = seen if keep is None else seen & keep
    seen = seen & (key <= position) if is_causal else seen
    seen = seen if window[0] is None else seen & (key >= position - window[0])
    return seen if window[1] is None else seen & (key <= position + window[1])


def by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | float = 0.0,
    sinks: Tensor | None = None,
    **hiding: Any,
) -> tuple[Tensor, Tensor]:
    """Return attention of explicit scores, and its log-sum-exp; a query that sees nothing gives 0."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).mT / query.shape[-1] ** 0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    scores = (
        scores
        - torch.as_tensor(alibi_slopes).double()[..., None, None] * (positions(**hiding) - torch.arange(KEYS)).abs()
    )
    seen = visible(**hiding)
    empty = ~seen.any(-1, keepdim=True)
    if sinks is not None:
        column = torch.as_tensor(sinks).double()[..., None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores.masked_fill(~seen, -torch.inf), column), -1)
        return scores.softmax(-1)[..., :-1] @ value.repeat_interleave(groups, 1), scores.logsumexp(-1)
    scores = scores.masked_fill(~(seen | empty), -torch.inf)
    out = (scores.softmax(-1) @ value.repeat_interleave(groups, 1)).masked_fill(empty, 0)
    return out, scores.logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)


CALLS: dict[str, dict[str, Any]] = {
    "window": {"window": (2, 1)},
    "sliding window": {"window": (3, 0), "query_offset": 2},
    "left alone, causal": {"window": (1, None), "is_causal": True},
    "right alone": {"window": (None, 2)},
    "offset, causal": {"query_offset": 1, "is_causal": True},
    "offsets, causal": {"query_offset": torch.tensor([2, -3]), "is_causal": True},
    "lengths": {"key_lengths": torch.tensor([4, 9], dtype=torch.int32)},
    "lengths, bottom-right": {"key_lengths": torch.tensor([8, 3]), "is_causal": "bottom-right"},
    "softcap": {"softcap": 0.7},
    "slopes": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.0, -0.1])},
    "slopes, bottom-right": {"alibi_slopes": torch.rand(2, 4), "is_causal": "bottom-right", "window": (4, None)},
    "sinks": {"sinks": torch.tensor([0.5, -2.0, 0.0, 3.0])},
    "sinks, lengths of none": {"sinks": torch.rand(2, 4), "key_lengths": torch.tensor([0, 5])},
    "all": {
        "softcap": 0.5,
        "window": (2, 1),
        "query_offset": torch.tensor([0, 4]),
        "key_lengths": torch.tensor([9, 6]),
    },
}


def sums(out: Tensor, lse: Tensor) -> Tensor:
    """Return a number that depends on all results, on a log-sum-exp of -inf not."""
    return out.sin().sum() + torch.where(lse == -torch.inf, 0, lse).cos().sum()


@pytest.mark.parametrize("masks", ["none", "bias", "keep", "both"])
@pytest.mark.parametrize("name", CALLS)
def test_results_and_gradients_are_those_by_hand(name: str, masks: str) -> None:
    tensors = operands()
    bias = torch.randn(2, 4, QUERIES, KEYS, dtype=torch.float64, requires_grad=True)
    keep = torch.rand(2, 1, QUERIES, KEYS) > 0.3
    given: Any = {"none": None, "bias": bias, "keep": keep, "both": (bias, keep)}[masks]
    sources = [*tensors, bias] if masks in ("bias", "both") else tensors
    wanted = by_hand(
        *tensors, bias if len(sources) > 3 else None, keep=keep if masks in ("keep", "both") else None, **CALLS[name]
    )
    found = attention_with_lse(*tensors, given, enable_gqa=True, **CALLS[name])
    gradients = [torch.autograd.grad(sums(*results), sources) for results in (found, wanted)]
    for some, others in zip((*found, *gradients[0]), (*wanted, *gradients[1]), strict=True):
        torch.testing.assert_close(some, others, rtol=0, atol=1e-12)
    assert torch.equal(scaled_dot_product_attention(*tensors, given, enable_gqa=True, **CALLS[name]), found[0])


def test_slopes_of_any_floating_dtype() -> None:
    tensors, slopes = operands(), torch.tensor([0.5, 0.25, 0.0, -0.125])
    wanted = scaled_dot_product_attention(*tensors, enable_gqa=True, alibi_slopes=slopes)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        found = scaled_dot_product_attention(*tensors, enable_gqa=True, alibi_slopes=slopes.to(dtype))
        assert torch.equal(found, wanted)


def test_an_interval_is_pytorchs_attention_with_a_mask() -> None:
    tensors = operands(kv_heads=4)
    for name in ("window", "offsets, causal", "lengths"):
        out = scaled_dot_product_attention(*tensors, **CALLS[name])
        torch.testing.assert_close(out, theirs(*tensors, visible(**CALLS[name])), rtol=0, atol=1e-12)


def test_additive_attention() -> None:
    *tensors, weight = leaves((2, 1, QUERIES, 4), (2, 1, KEYS, 4), (2, 1, KEYS, 3), (4,))
    bias, keep = torch.randn(QUERIES, KEYS, dtype=torch.float64), torch.rand(2, 1, 1, KEYS) > 0.3
    hiding = {"window": (3, 2), "key_lengths": torch.tensor([9, 6])}
    found = additive_attention(*tensors, weight, (bias, keep), softcap=0.9, **hiding)
    scores = (torch.tanh(tensors[0][..., :, None, :] + tensors[1][..., None, :, :]) * weight).sum(-1)
    scores = 0.9 * torch.tanh(scores / 0.9) + bias
    seen = visible(keep, **hiding)
    empty = ~seen.any(-1, keepdim=True)
    weights = scores.masked_fill(~(seen | empty), -torch.inf).softmax(-1).masked_fill(empty, 0)
    wanted = weights @ tensors[2]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    sources = [*tensors, weight]
    gradients = (torch.autograd.grad(out.sin().sum(), sources) for out in (found, wanted))
    for some, others in zip(*gradients, strict=True):
        torch.testing.assert_close(some, others, rtol=0, atol=1e-12)


# -- PyTorch's own checks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"softcap": 0.5}, {"softcap": 3.0, "window": (1, 2)}, {"query_offset": -1}], ids=str
)
def test_gradcheck(options: dict[str, Any]) -> None:
    tensors = leaves((1, 2, 4, 3), (2, 2, 5, 3), (2, 2, 5, 2))
    bias = torch.randn(2, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    keep = torch.rand(4, 5) > 0.3
    keep[:, :2] = True  # no row is empty: a log-sum-exp of -inf has no difference quotient

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return attention_with_lse(query, key, value, (bias, keep), **options)

    if options.get("query_offset"):
        options = {"is_causal": True, "query_offset": 1}
    assert gradcheck(attend, (*tensors, bias), check_batched_grad=True)


def further(**options: Any) -> tuple[Any, ...]:
    return keywords.flattened(options)  # type: ignore[arg-type]


FURTHER = {
    "window": further(window=(2, 1)),
    "rows": further(query_offset=torch.tensor([1, 0]), key_lengths=torch.tensor([9, 6])),
    "left": (3,),  # all others left out
    "softcap": further(softcap=0.7, query_offset=2),
    "slopes": further(alibi_slopes=torch.tensor(0.5), query_offset=2),
    "sinks and slopes that are leaves": further(
        alibi_slopes=torch.tensor(0.5, dtype=torch.float64, requires_grad=True),
        sinks=torch.zeros(1, dtype=torch.float64, requires_grad=True),
    ),
}


@pytest.mark.parametrize("name", FURTHER)
def test_opcheck(name: str) -> None:
    bias = torch.randn(QUERIES, KEYS, dtype=torch.float64, requires_grad=True)
    keep = torch.rand(2, 1, 1, KEYS) > 0.3
    tensors, own = operands(), (0.0, "no", None, True, None)
    for second in (None, keep):
        torch.library.opcheck(OPERATOR, (*tensors, bias, *own, second, *FURTHER[name]))
    plain = [tensor.detach() for tensor in tensors]
    options = [each.detach() if isinstance(each, torch.Tensor) else each for each in FURTHER[name]]
    out, lse = OPERATOR(*plain, bias.detach(), *own, keep, *options)
    for wanted in (True, False):
        given = (torch.ones_like(out), lse, *plain, out, lse, bias.detach(), *own, wanted, keep, *options)
        torch.library.opcheck(BACKWARD, given)
        if "leaves" in name:
            torch.library.opcheck(BACKWARD, (*given, wanted, True))


def test_opcheck_of_additive_attention() -> None:
    tensors = leaves((2, 1, QUERIES, 4), (2, 1, KEYS, 4), (2, 1, KEYS, 3), (4,))
    keep = torch.rand(2, 1, 1, KEYS) > 0.3
    for name in FURTHER:
        torch.library.opcheck(ADDITIVE, (*tensors, None, "no", keep, *FURTHER[name]))
    plain = [tensor.detach() for tensor in tensors]
    out, lse = ADDITIVE(*plain, None, "no", keep, *FURTHER["rows"])
    torch.library.opcheck(ADDITIVE_BACKWARD, (out, *plain, out, lse, None, "no", keep, *FURTHER["rows"]))
    mask = torch.randn(QUERIES, KEYS, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(ADDITIVE, (*tensors, mask, "no"))
    torch.library.opcheck(ADDITIVE, (*tensors, mask, "no", keep, *FURTHER["rows"]))


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_gradients_of_slopes_and_sinks(softcap: float | None) -> None:
    tensors, (slopes, sinks) = operands(), leaves((4,), (2, 4))
    sources = (*tensors, slopes, sinks)

    def attend(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, sinks: Tensor) -> Any:
        options: Any = {"alibi_slopes": slopes, "sinks": sinks, "softcap": softcap, "is_causal": True}
        return attention_with_lse(query, key, value, enable_gqa=True, **options)

    hand = by_hand(*tensors, softcap=softcap, alibi_slopes=slopes, sinks=sinks, is_causal=True)
    wanted = torch.autograd.grad(sums(*hand), sources)
    whole = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for found in (attend(*sources), whole(*sources)):
        for some, others in zip(torch.autograd.grad(sums(*found), sources), wanted, strict=True):
            torch.testing.assert_close(some, others, rtol=0, atol=1e-11)
    assert gradcheck(attend, sources, check_batched_grad=True)
    only = torch.autograd.grad(attend(*[tensor.detach() for tensor in tensors], slopes.detach(), sinks)[0].sum(), sinks)
    assert only[0].shape == (2, 4)


def test_gradients_of_slopes_and_sinks_of_additive_attention() -> None:
    tensors = leaves((2, 1, QUERIES, 4), (2, 1, KEYS, 4), (2, 1, KEYS, 3), (4,), (1,), (2, 1))

    def attend(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, slopes: Tensor, sinks: Tensor) -> Tensor:
        options: Any = {"alibi_slopes": slopes, "sinks": sinks, "softcap": 0.9}
        return additive_attention(query, key, value, weight, **options)

    assert gradcheck(attend, tensors, check_batched_grad=True)


def test_sinks_of_other_dtypes() -> None:
    tensors, sinks = operands(), torch.tensor([0.5, 0.25, 0.0, -1.0])
    wanted = scaled_dot_product_attention(*tensors, enable_gqa=True, sinks=sinks)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        own = sinks.to(dtype).requires_grad_()
        found = scaled_dot_product_attention(*tensors, enable_gqa=True, sinks=own)
        assert torch.equal(found, wanted)
        found.sum().backward()
        assert own.grad.dtype == dtype


def test_second_derivatives_are_refused() -> None:
    tensors = operands()
    out = scaled_dot_product_attention(*tensors, enable_gqa=True, softcap=0.7, key_lengths=torch.tensor([9, 6]))
    (first,) = torch.autograd.grad(out.sin().sum(), tensors[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="a first derivative only"):
        first.sum().backward()


# -- modes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_every_way_to_the_kernel_gives_the_same_bits(name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    tensors, options = operands(kv_heads=4), CALLS[name]
    plain = [tensor.detach() for tensor in tensors]
    with FlopCounterMode(display=False):
        counted = scaled_dot_product_attention(*tensors, **options)
    direct = scaled_dot_product_attention(*plain, **options)
    out = scaled_dot_product_attention(*tensors, **options)
    for way in (out, counted):
        assert torch.equal(way, direct)
    wanted = torch.autograd.grad(out.sin().sum(), tensors)
    grads = torch.func.grad(lambda *args: scaled_dot_product_attention(*args, **options).sin().sum(), (0, 1, 2))(*plain)
    for some in (torch.autograd.grad(counted.sin().sum(), tensors), grads):
        for ours, first in zip(some, wanted, strict=True):
            assert torch.equal(ours, first)


def test_rows_of_a_batch_by_vmap() -> None:
    tensors = operands(grad=False)
    bias, keep = torch.randn(QUERIES, KEYS, dtype=torch.float64), torch.rand(2, 1, 1, KEYS) > 0.3
    offsets, lengths = torch.tensor([2, -3]), torch.tensor([9, 5])

    def loss(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, keep: Tensor, offset: Any, length: Any) -> Tensor:
        options = {"query_offset": offset, "key_lengths": length, "window": (3, 1), "softcap": 0.9}
        return scaled_dot_product_attention(query, key, value, (bias, keep), enable_gqa=True, **options).sin().sum()

    axes = (0, 0, 0, None, 0, 0, 0)
    given = (*tensors, bias, keep, offsets, lengths)
    found = torch.func.vmap(torch.func.grad(loss, (0, 1, 2, 3)), in_dims=axes)(*given)
    for i in range(2):
        each = [tensor[i] if axis == 0 else tensor for tensor, axis in zip(given, axes, strict=True)]
        for some, others in zip(found, torch.func.grad(loss, (0, 1, 2, 3))(*each), strict=True):
            assert torch.equal(some[i], others)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(dynamic: bool) -> None:
    torch._dynamo.reset()
    programs = 0

    def counting(graph: Any, inputs: Any) -> Any:
        nonlocal programs
        programs += 1
        return graph.forward

    def decode(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, keep: Tensor, lengths: Tensor) -> Tensor:
        options = {"window": (4, 0), "softcap": 0.7, "query_offset": lengths - QUERIES, "key_lengths": lengths}
        return scaled_dot_product_attention(query, key, value, (bias, keep), enable_gqa=True, **options)

    compiled = torch.compile(decode, fullgraph=True, backend=counting, dynamic=dynamic)
    whole = torch.compile(decode, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    tensors, keep = operands(), torch.rand(2, 1, 1, KEYS) > 0.3
    bias = torch.randn(QUERIES, KEYS, dtype=torch.float64, requires_grad=True)
    for lengths in ([9, 8], [7, 8], [9, 9]):
        given = (*tensors, bias, keep, torch.tensor(lengths))
        wanted = decode(*given)
        assert torch.equal(compiled(*given), wanted)
        out = whole(*given)
        assert torch.equal(out, wanted)
        gradients = (torch.autograd.grad(each.sin().sum(), (*tensors, bias)) for each in (out, wanted))
        for some, others in zip(*gradients, strict=True):
            assert torch.equal(some, others)
    assert programs == 1, "lengths are data"


def test_numbers_in_a_compiled_program() -> None:
    """Reaches and offsets that change from call to call: of the third value on, one program is for all."""
    torch._dynamo.reset()
    programs = 0

    def counting(graph: Any, inputs: Any) -> Any:
        nonlocal programs
        programs += 1
        return graph.forward

    def attend(query: Tensor, key: Tensor, value: Tensor, left: int, offset: int) -> Tensor:
        return scaled_dot_product_attention(
            query, key, value, enable_gqa=True, window=(left, None), query_offset=offset, is_causal=True
        )

    compiled = torch.compile(attend, fullgraph=True, backend=counting)
    tensors = operands()
    for i in range(2, 8):
        assert torch.equal(compiled(*tensors, i, i + 2), attend(*tensors, i, i + 2))
    assert programs <= 2


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED: list[tuple[Any, str, dict[str, Any]]] = [
    (TypeError, "windows: no such option; expected one of window, query_offset", {"windows": (1, 1)}),
    (TypeError, "window: 3 of type int; expected", {"window": 3}),
    (ValueError, r"window: \(-1, 0\)", {"window": (-1, 0)}),
    (ValueError, "softcap: 0.0", {"softcap": 0.0}),
    (TypeError, "softcap: '1'", {"softcap": "1"}),
    (TypeError, "alibi_slopes: list; expected a torch.Tensor", {"alibi_slopes": [0.5]}),
    (TypeError, "alibi_slopes: dtype bool; expected real numbers", {"alibi_slopes": torch.ones(4) > 0}),
    (ValueError, r"alibi_slopes: shape \(3,\)", {"alibi_slopes": torch.ones(3)}),
    (TypeError, "sinks: float; expected a torch.Tensor", {"sinks": 0.5}),
    (TypeError, "sinks: dtype bool; expected real numbers", {"sinks": torch.ones(4) > 0}),
    (ValueError, r"sinks: shape \(3,\)", {"sinks": torch.ones(3)}),
    (TypeError, "query_offset: dtype torch.float32; expected integers", {"query_offset": torch.ones(2)}),
    (TypeError, "query_offset: float; expected a torch.Tensor", {"query_offset": 1.0}),
    (TypeError, "query_offset: bool; expected a torch.Tensor", {"query_offset": True}),
    (TypeError, "key_lengths: dtype torch.bool; expected integers", {"key_lengths": torch.ones(2, dtype=torch.bool)}),
    (TypeError, "key_lengths: list; expected a torch.Tensor", {"key_lengths": [1, 2]}),
    (ValueError, "key_lengths: 3 to 10; expected 0 to 9", {"key_lengths": torch.tensor([3, 10])}),
    (ValueError, r"key_lengths: shape \(3,\)", {"key_lengths": torch.tensor([3, 3, 3])}),
    (ValueError, "query_offset: given together with", {"query_offset": 1, "is_causal": "bottom-right"}),
    (TypeError, "attn_mask: a pair of dtypes torch.float32, torch.float32", {"attn_mask": (torch.ones(9),) * 2}),
    (TypeError, "attn_mask: a pair of dtypes torch.bool, None", {"attn_mask": (torch.ones(9) > 0, None)}),
    (TypeError, "attn_mask: list; expected a torch.Tensor", {"attn_mask": [torch.ones(9)]}),
]


@pytest.mark.parametrize(("kind", "message", "options"), REFUSED, ids=[message[:30] for _, message, _ in REFUSED])
@pytest.mark.parametrize("grad", [False, True])
def test_refused(kind: Any, message: str, options: dict[str, Any], grad: bool) -> None:
    with pytest.raises(kind, match=message):
        scaled_dot_product_attention(*operands(grad=grad), enable_gqa=True, **options)


def test_every_option_gets_through() -> None:
    assert keywords.KEYWORDS.keys() == FurtherOptions.__annotations__.keys()


def test_a_pair_of_masks_that_is_one_or_none() -> None:
    tensors = operands(kv_heads=4)
    bias, keep = torch.randn(QUERIES, KEYS, dtype=torch.float64), torch.rand(QUERIES, KEYS) > 0.3
    for pair, alone in (((bias, None), bias), ((None, keep), keep), ((None, None), None)):
        assert torch.equal(scaled_dot_product_attention(*tensors, pair), scaled_dot_product_attention(*tensors, alone))
