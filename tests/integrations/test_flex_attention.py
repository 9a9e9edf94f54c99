"""flex_attention: examples as PyTorch's users write them, against PyTorch's own, and its gradients by autograd.

Each function is made for a module, torch or numpy, and means the same with either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch.nn.attention import flex_attention as theirs  # noqa: E402

import fastattn  # noqa: E402
from fastattn.integrations.torch import (  # noqa: E402
    additive_attention,
    attention_with_lse,
    flex_attention,
    scaled_dot_product_attention,
)

# PyTorch's own: what it warns of where it is not compiled, and functorch uses what it tells others not to
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*return_lse is deprecated:FutureWarning"),
]

Tensor = Any
ROWS, HEADS, SIDE = 2, 4, 12
LENGTH, FEATURES = SIDE * SIDE, 16


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def operands(grad: bool = True, kv_heads: int = HEADS) -> list[Tensor]:
    shapes = ((ROWS, heads, LENGTH, FEATURES) for heads in (HEADS, kv_heads, kv_heads))
    return [torch.randn(shape, dtype=torch.float64).requires_grad_(grad) for shape in shapes]


# -- examples ----------------------------------------------------------------------------------------------------------
# each takes the module, xp, and what makes one of its arrays, and returns (score_mod, mask_mod)


def causal(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return query >= key


def relative_position(xp: Any, array: Any) -> Any:
    def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + (query - key) / 16

    return score_mod, None


def alibi(xp: Any, array: Any) -> Any:
    def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        slope = xp.exp2(-((head + 1) * 8.0 / HEADS))
        return score + (key - query) * slope

    return score_mod, causal


def alibi_from_a_table(xp: Any, array: Any) -> Any:
    slopes = array(2.0 ** -np.arange(1, HEADS + 1))

    def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score - slopes[head] * xp.abs(query - key)

    return score_mod, None


def softcap(xp: Any, array: Any) -> Any:
    cap = 5

    def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return cap * xp.tanh(score / cap)

    return score_mod, causal


def causal_as_a_score(xp: Any, array: Any) -> Any:
    def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return xp.where(query >= key, score, -float("inf"))

    return score_mod, None


def sliding_window(xp: Any, array: Any) -> Any:
    window = 20

    def mask_mod(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (query - key <= window)

    return None, mask_mod


def dilated_sliding_window(xp: Any, array: Any) -> Any:
    reach, step = 30, 3

    def mask_mod(batch: Any, head: Any, query: Any, key: Any) -> Any:
        distance = xp.abs(query - key)
        return (distance <= reach) & (distance % step == 0)

    return None, mask_mod


def prefix_lm(xp: Any, array: Any) -> Any:
    prefix = array(np.array([70, 11]))

    def mask_mod(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key < prefix[batch]) | (query >= key)

    return None, mask_mod


def documents(xp: Any, array: Any) -> Any:
    document = array(np.repeat(np.arange(4), (9, 64, 1, LENGTH - 74)).astype(np.int32))

    def mask_mod(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (document[query] == document[key]) & causal(batch, head, query, key)

    return None, mask_mod


def stacked_sequences(xp: Any, array: Any) -> Any:
    """Sequences one after the other, and functions of the positions within each."""
    starts = np.array([0, 9, 73, 74])
    document = array(np.repeat(np.arange(4), np.diff([*starts, LENGTH])))
    starts = array(starts)

    def within(inner: Any) -> Any:
        def mask_mod(batch: Any, head: Any, query: Any, key: Any) -> Any:
            own = document[query]
            return (own == document[key]) & inner(batch, head, query - starts[own], key - starts[document[key]])

        return mask_mod

    def even(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query >= key) & ((query + key) % 2 == 0)

    def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score * 0.5 + (key - starts[document[key]]) * 0.01

    return score_mod, within(even)


def neighbourhood(xp: Any, array: Any) -> Any:
    """A picture's points look at the square around them, which is moved inwards at the edges."""
    half = 2

    def place(index: Any) -> Any:
        return index // SIDE, index % SIDE

    def mask_mod(batch: Any, head: Any, query: Any, key: Any) -> Any:
        (row, column), (key_row, key_column) = place(query), place(key)
        row, column = xp.clip(row, half, SIDE - 1 - half), xp.clip(column, half, SIDE - 1 - half)
        return (xp.abs(row - key_row) <= half) & (xp.abs(column - key_column) <= half)

    return None, mask_mod


def graphormer(xp: Any, array: Any) -> Any:
    """A bias for each pair of nodes, by their distance in a graph, and head."""
    bias = array(np.random.default_rng(0).standard_normal((HEADS, LENGTH, LENGTH)))

    def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + bias[head, query, key]

    return score_mod, None


def relative_table(xp: Any, array: Any) -> Any:
    """A bias for each distance, those beyond some being alike."""
    farthest = 10
    table = array(np.random.default_rng(0).standard_normal(2 * farthest + 1).astype(np.float32))

    def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + table[xp.clip(key - query, -farthest, farthest) + farthest]

    return score_mod, None


def offset_of_a_cache(xp: Any, array: Any) -> Any:
    """Queries that stand behind some of the keys, by a number that changes from step to step."""
    offset = array(np.array(30))

    def mask_mod(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return causal(batch, head, query + offset, key)

    return None, mask_mod


def pages(xp: Any, array: Any) -> Any:
    """Keys that lie in pages, in another order for each row of the batch; -1 is a page of another's."""
    size = 16
    page_of = np.full((ROWS, LENGTH // size), -1)
    page_of[0, [3, 0, 7, 2]], page_of[1, [8, 1]] = np.arange(4), np.arange(2)
    page_of = array(page_of)

    def mask_mod(batch: Any, head: Any, query: Any, key: Any) -> Any:
        page = page_of[batch, key // size]
        return (page >= 0) & (query >= page * size + key % size)

    return None, mask_mod


EXAMPLES: dict[str, Callable[[Any, Any], Any]] = {
    make.__name__: make
    for make in (
        relative_position,
        alibi,
        alibi_from_a_table,
        softcap,
        causal_as_a_score,
        sliding_window,
        dilated_sliding_window,
        prefix_lm,
        documents,
        stacked_sequences,
        neighbourhood,
        graphormer,
        relative_table,
        offset_of_a_cache,
        pages,
    )
}


class Dense(NamedTuple):
    """What is compared with: attention with all of its scores, which autograd differentiates."""

    out: Tensor
    lse: Tensor
    gradients: tuple[Tensor, ...]


def dense(
    tensors: list[Tensor], score_mod: Any, mask_mod: Any, grad_out: Tensor, grad_lse: Tensor, captured: Any = ()
) -> Dense:
    query, key, value = tensors
    batch, head = torch.arange(ROWS)[:, None, None, None], torch.arange(HEADS)[:, None, None]
    where = (batch, head, torch.arange(query.size(-2))[:, None], torch.arange(key.size(-2)))
    group = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT / FEATURES**0.5
    scores = scores if score_mod is None else score_mod(scores, *where)
    scores = scores if mask_mod is None else scores.masked_fill(~mask_mod(*where), -torch.inf)
    lse = torch.logsumexp(scores, -1)
    out = torch.where(lse[..., None] > -torch.inf, torch.exp(scores - lse.clamp(min=-1e300)[..., None]), 0) @ value
    gradients = torch.autograd.grad((out, lse), [*tensors, *captured], (grad_out, grad_lse))
    return Dense(out, lse, gradients)


def block_mask_of(mask_mod: Any, rows: int | None = ROWS) -> Any:
    if mask_mod is None:
        return None
    return theirs.create_block_mask(mask_mod, rows, None, LENGTH, LENGTH, device="cpu")


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples(name: str) -> None:
    score_mod, mask_mod = EXAMPLES[name](torch, torch.from_numpy)
    tensors = operands()
    grad_out, grad_lse = torch.randn(ROWS, HEADS, LENGTH, FEATURES).double(), torch.randn(ROWS, HEADS, LENGTH).double()
    block_mask = block_mask_of(mask_mod)
    out, lse = flex_attention(*tensors, score_mod, block_mask, return_lse=True)
    theirs_out = theirs.flex_attention(*(tensor.detach() for tensor in tensors), score_mod, block_mask)
    torch.testing.assert_close(out.detach(), theirs_out)
    wanted = dense(tensors, score_mod, mask_mod, grad_out, grad_lse)
    torch.testing.assert_close(out, wanted.out)
    torch.testing.assert_close(lse, wanted.lse)
    for one, other in zip(
        torch.autograd.grad((out, lse), tensors, (grad_out, grad_lse)), wanted.gradients, strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_with_numpy(name: str) -> None:
    score_mod, mask_mod = EXAMPLES[name](torch, torch.from_numpy)
    tensors = operands(grad=False)
    wanted = flex_attention(*tensors, score_mod, block_mask_of(mask_mod))
    arrays = [tensor.numpy() for tensor in tensors]
    score_mod, mask_mod = EXAMPLES[name](np, np.asarray)
    out = fastattn.attention(*arrays, score_mod=score_mod, mask_mod=mask_mod)
    np.testing.assert_allclose(out, wanted.numpy(), rtol=1e-12, atol=1e-13)


# -- functions as they are written for tensors -------------------------------------------------------------------------


def test_methods_of_numbers() -> None:
    cap, document = torch.tensor(3.0), torch.arange(LENGTH) // 50

    def by_methods(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        score = cap * (score.float() / cap).tanh().to(score.dtype)
        score = score.clamp(min=-2.5) + (query - key).abs().to(torch.float64).mul(-0.01)
        near = query.sub(key).abs().lt(40).logical_and(document[query].eq(document[key]))
        return score.masked_fill(near.logical_not(), float("-inf"))

    def by_functions(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        score = torch.clamp(3.0 * torch.tanh(score / 3.0), min=-2.5) - torch.abs(query - key) * 0.01
        near = (torch.abs(query - key) < 40) & (document[query] == document[key])
        return torch.where(near, score, float("-inf"))

    tensors = operands(grad=False)
    assert torch.equal(flex_attention(*tensors, by_methods), flex_attention(*tensors, by_functions))
    torch.testing.assert_close(flex_attention(*tensors, by_functions), theirs.flex_attention(*tensors, by_functions))


@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"]
)
def test_captured_tensors_of_any_dtype(dtype: str) -> None:
    table = torch.arange(HEADS * LENGTH).reshape(HEADS, LENGTH).remainder(7).to(getattr(torch, dtype))
    one = torch.tensor(2).to(getattr(torch, dtype))

    def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + table[head, key] * one

    tensors = operands(grad=False)
    torch.testing.assert_close(flex_attention(*tensors, score_mod), theirs.flex_attention(*tensors, score_mod))


def test_captured_tensors_are_read_in_each_call() -> None:
    table = torch.zeros(LENGTH, 2).double()[:, 1]

    def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + table[key]

    tensors = operands(grad=False)
    before = flex_attention(*tensors, score_mod)
    torch.testing.assert_close(before, flex_attention(*tensors))
    table[:50] = -torch.inf
    wanted = flex_attention(tensors[0], *(tensor[..., 50:, :] for tensor in tensors[1:]))
    torch.testing.assert_close(flex_attention(*tensors, score_mod), wanted)


def test_a_captured_tensor_that_was_changed_has_no_gradients_left() -> None:
    table = torch.zeros(LENGTH).double()
    out = flex_attention(*operands(), lambda score, batch, head, query, key: score * table[key])
    table += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# -- gradients of what is captured -------------------------------------------------------------------------------------


def learned(*shape: int, dtype: Any = torch.float64) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def check_gradients(make: Callable[..., Any], captured: list[Tensor], mask_mod: Any = None) -> None:
    """Compare gradients by the operands and by tensors that a function captures with those of dense attention.

    `make` returns the function; dense attention has tensors of the same numbers in float64.
    """
    tensors = operands()
    grad_out, grad_lse = torch.randn(ROWS, HEADS, LENGTH, FEATURES).double(), torch.randn(ROWS, HEADS, LENGTH).double()
    results = flex_attention(*tensors, make(*captured), block_mask_of(mask_mod), return_lse=True)
    found = torch.autograd.grad(results, [*tensors, *captured], (grad_out, grad_lse))
    exact = [tensor.detach().double().requires_grad_() for tensor in captured]
    wanted = dense(tensors, make(*exact), mask_mod, grad_out, grad_lse, exact).gradients
    for own, one, other in zip([*tensors, *captured], found, wanted, strict=True):
        torch.testing.assert_close(one, other.to(own.dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_learned_bias_for_each_distance(dtype: str) -> None:
    farthest = 10

    def make(table: Tensor) -> Any:
        return lambda score, batch, head, query, key: (
            score + table[torch.clamp(key - query, -farthest, farthest) + farthest]
        )

    check_gradients(make, [learned(2 * farthest + 1, dtype=getattr(torch, dtype))], causal)


def test_a_learned_bias_for_each_pair_that_lies_otherwise() -> None:
    nodes = torch.arange(LENGTH).flip(0)

    def make(leaf: Tensor) -> Any:
        bias = leaf[..., ::2].transpose(0, 1)
        return lambda score, batch, head, query, key: torch.tanh(score) + bias[head, nodes[query], key]

    check_gradients(make, [learned(LENGTH, HEADS, 2 * LENGTH)])


def test_learned_slopes_a_temperature_and_names_that_others_have() -> None:
    """A tensor with two names, of which one is a helper's; one without axes; one that is called as an argument."""

    def make(slopes: Tensor, temperature: Tensor, query: Tensor) -> Any:
        same = slopes

        def away(head: Any, distance: Any) -> Any:
            return slopes[head] * distance

        def score_mod(score: Any, batch: Any, head: Any, i: Any, key: Any) -> Any:
            score = score * temperature - 0.01 * away(head, torch.abs(i - key))
            return torch.where(i > key, score * same[head], score + query[batch])

        return score_mod

    check_gradients(make, [learned(HEADS), learned(dtype=torch.float32), learned(ROWS)])


def test_only_what_requires_a_gradient_gets_one() -> None:
    tensors, table, other = operands(grad=False), learned(LENGTH), torch.zeros(HEADS).double()

    def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + table[key] * (1 + other[head])

    out = scaled_dot_product_attention(*tensors, score_mod=score_mod, alibi_slopes=other.clone().requires_grad_())
    out.square().sum().backward()
    assert table.grad is not None
    assert other.grad is None
    assert not flex_attention(*tensors, lambda score, b, h, q, k: score + other[h]).requires_grad


def test_gradients_of_what_is_captured_in_additive_attention() -> None:
    tensors = [tensor.detach().requires_grad_() for tensor in operands()]
    weight, mask = torch.randn(FEATURES).double().requires_grad_(), torch.randn(LENGTH).double().requires_grad_()
    table = torch.randn(LENGTH).double().requires_grad_()

    def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return torch.tanh(score) * 2 + table[key] * table[query]

    sources = [*tensors, weight, mask, table]
    found = torch.autograd.grad(additive_attention(*tensors, weight, mask, score_mod=score_mod).sin().sum(), sources)
    query, key, value = tensors
    scores = (weight * torch.tanh(query[..., :, None, :] + key[..., None, :, :])).sum(-1) + mask
    scores = torch.tanh(scores) * 2 + table * table[:, None]
    wanted = torch.autograd.grad((scores.softmax(-1) @ value).sin().sum(), sources)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_numerical_gradients_of_what_is_captured() -> None:
    query, key, value, table = (
        torch.randn(shape).double().requires_grad_() for shape in ((7, 4), (9, 4), (9, 3), (5,))
    )

    def attend(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Any:
        def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
            return torch.sigmoid(score * table[(query + key) % 5]) + table[0] * score

        return attention_with_lse(query, key, value, score_mod=score_mod)

    assert torch.autograd.gradcheck(attend, (query, key, value, table))


def test_what_is_read_in_a_loop_has_a_gradient() -> None:
    table, tensors = learned(3), operands()

    def in_a_loop(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        for i in range(3):
            score = score + table[i] * (key % 2)
        return score

    def written_out(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + table[0] * (key % 2) + table[1] * (key % 2) + table[2] * (key % 2)

    found, wanted = (
        torch.autograd.grad(flex_attention(*tensors, each).sin().sum(), table) for each in (in_a_loop, written_out)
    )
    torch.testing.assert_close(found, wanted)


# -- block masks -------------------------------------------------------------------------------------------------------


def test_and_or_of_functions() -> None:
    window, text = sliding_window(torch, torch.from_numpy)[1], documents(torch, torch.from_numpy)[1]
    tensors = operands(grad=False)
    for mask_mod in (
        theirs.and_masks(text, causal),
        theirs.or_masks(window, theirs.and_masks(text, causal)),
        theirs.noop_mask,
        lambda batch, head, query, key: theirs.and_masks(window, text)(batch, head, query, key),
    ):
        if mask_mod.__name__ == "<lambda>":
            both = theirs.and_masks(window, text)
            mask_mod = lambda batch, head, query, key: both(batch, head, query, key)  # noqa: E731, B023
        block_mask = block_mask_of(mask_mod)
        wanted = theirs.flex_attention(*tensors, None, block_mask)
        torch.testing.assert_close(flex_attention(*tensors, None, block_mask), wanted)


@pytest.mark.parametrize("size", [128, 64, 16, (48, 100)])
def test_blocks_of_any_size(size: Any) -> None:
    mask_mod = documents(torch, torch.from_numpy)[1]
    block_mask = theirs.create_block_mask(mask_mod, None, None, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=size)
    tensors = operands(grad=False)
    torch.testing.assert_close(
        flex_attention(*tensors, None, block_mask), theirs.flex_attention(*tensors, None, block_mask)
    )


def test_blocks_alone_say_what_is_seen() -> None:
    counts, indices = torch.tensor([[[1, 2, 0]]]), torch.tensor([[[[2, 0, 1], [0, 1, 2], [0, 1, 2]]]])
    blocks = theirs.BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=48, seq_lengths=(LENGTH, LENGTH))
    tensors = operands(grad=False)
    query, key, value = tensors
    out = flex_attention(*tensors, None, blocks)
    for rows, columns in ((slice(48), slice(96, None)), (slice(48, 96), slice(96))):
        wanted = flex_attention(query[..., rows, :], key[..., columns, :], value[..., columns, :])
        torch.testing.assert_close(out[..., rows, :], wanted)
    assert (out[..., 96:, :] == 0).all()


def test_a_mask_of_ours() -> None:
    tensors = operands()
    mask = fastattn.BlockMask.from_function(causal, LENGTH, LENGTH)
    torch.testing.assert_close(
        flex_attention(*tensors, None, mask), scaled_dot_product_attention(*tensors, is_causal=True)
    )


def test_masks_for_other_lengths_and_parts_of_masks() -> None:
    query, key, value = operands(grad=False)
    block_mask = block_mask_of(causal)
    with pytest.raises(ValueError, match=r"block_mask: made for .*144, 144.*expected .*143, 144"):
        flex_attention(query[..., 1:, :], key, value, block_mask=block_mask)
    with pytest.raises(ValueError, match="block_mask: a part of a BlockMask"):
        flex_attention(query, key, value, block_mask=block_mask[:1])
    with pytest.raises(TypeError, match="block_mask: .*expected a fastattn.BlockMask"):
        flex_attention(query, key, value, block_mask=torch.ones(LENGTH, LENGTH) > 0)


# -- the other arguments -----------------------------------------------------------------------------------------------


def test_groups_of_heads() -> None:
    tensors = operands(kv_heads=2)
    score_mod, mask_mod = alibi(torch, torch.from_numpy)
    grad_out, grad_lse = torch.randn(ROWS, HEADS, LENGTH, FEATURES).double(), torch.zeros(ROWS, HEADS, LENGTH).double()
    out = flex_attention(*tensors, score_mod, block_mask_of(mask_mod), enable_gqa=True)
    wanted = dense(tensors, score_mod, mask_mod, grad_out, grad_lse)
    torch.testing.assert_close(out, wanted.out)
    for one, other in zip(torch.autograd.grad(out, tensors, grad_out), wanted.gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_scale_and_what_is_returned() -> None:
    tensors = operands(grad=False)
    score_mod = softcap(torch, torch.from_numpy)[0]
    out, lse = flex_attention(*tensors, score_mod, scale=0.3, return_lse=True, kernel_options={"BLOCK_M": 32})
    wanted = theirs.flex_attention(*tensors, score_mod, scale=0.3, return_aux=theirs.AuxRequest(lse=True))
    found = flex_attention(*tensors, score_mod, scale=0.3, return_aux=theirs.AuxRequest(lse=True))
    assert isinstance(found[1], theirs.AuxOutput)
    assert torch.equal(found[0], out)
    assert torch.equal(found[1].lse, lse)
    torch.testing.assert_close(out, wanted[0])
    torch.testing.assert_close(lse, wanted[1].lse)
    assert flex_attention(*tensors, return_aux=theirs.AuxRequest())[1] == theirs.AuxOutput()
    with pytest.raises(NotImplementedError, match="return_aux: max_scores"):
        flex_attention(*tensors, return_aux=theirs.AuxRequest(max_scores=True))
    with pytest.raises(ValueError, match="return_lse: given together with return_aux"):
        flex_attention(*tensors, return_lse=True, return_aux=theirs.AuxRequest(lse=True))


def test_the_other_functions_take_functions_as_well() -> None:
    tensors = operands()
    score_mod, mask_mod = softcap(torch, torch.from_numpy)
    out = scaled_dot_product_attention(*tensors, score_mod=score_mod, mask_mod=mask_mod, window=(30, 0))
    near = sliding_window(torch, torch.from_numpy)[1]
    wanted, lse = flex_attention(*tensors, score_mod, block_mask_of(theirs.and_masks(mask_mod, near)), return_lse=True)
    narrow = scaled_dot_product_attention(*tensors, score_mod=score_mod, mask_mod=near, is_causal=True)
    torch.testing.assert_close(narrow, wanted)
    torch.testing.assert_close(out, scaled_dot_product_attention(*tensors, softcap=5.0, window=(30, 0)))
    found = attention_with_lse(*tensors, score_mod=score_mod, block_mask=block_mask_of(near))
    torch.testing.assert_close(found[1], lse)
    weight = torch.randn(FEATURES).double()
    torch.testing.assert_close(
        additive_attention(*tensors, weight, mask_mod=near), additive_attention(*tensors, weight, window=(20, 0))
    )


# -- PyTorch around it -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # PyTorch's own
def test_in_a_compiled_program() -> None:
    tensors = operands()
    score_mod, mask_mod = alibi_from_a_table(torch, torch.from_numpy)[0], block_mask_of(causal)

    def program(*given: Tensor) -> Tensor:
        return flex_attention(*given, score_mod, mask_mod).relu().sum()

    compiled = torch.compile(program, backend="eager")(*tensors)
    torch.testing.assert_close(compiled, program(*tensors))
    one, other = (torch.autograd.grad(each, tensors) for each in (compiled, program(*tensors)))
    torch.testing.assert_close(one, other)


def test_under_torch_func_grad() -> None:
    query, key, value = operands(grad=False)
    score_mod = alibi_from_a_table(torch, torch.from_numpy)[0]

    def loss(query: Tensor) -> Tensor:
        return flex_attention(query, key, value, score_mod).square().sum()

    leaf = query.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(query), torch.autograd.grad(loss(leaf), leaf)[0])


def test_under_torch_func_grad_of_what_is_captured() -> None:
    tensors, table = operands(grad=False), learned(LENGTH)

    def loss(table: Tensor) -> Tensor:
        return flex_attention(*tensors, lambda score, batch, head, query, key: score * table[key]).square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(table.detach()), torch.autograd.grad(loss(table), table)[0])


def test_autocast_and_no_grad() -> None:
    tensors = [tensor.float() for tensor in operands(grad=False)]
    score_mod = softcap(torch, torch.from_numpy)[0]
    with torch.autocast("cpu", torch.bfloat16):
        out = flex_attention(*tensors, score_mod)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, flex_attention(*(tensor.bfloat16() for tensor in tensors), score_mod))
    out = out.float()
    torch.testing.assert_close(out, flex_attention(*tensors, score_mod), rtol=0.05, atol=0.05)


def test_derivatives_that_there_are_not() -> None:
    tensors = operands()
    table = torch.zeros(LENGTH).double().requires_grad_()

    def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score * 2 + table[key]

    weight = torch.ones(FEATURES).double()
    with torch.no_grad():
        assert not additive_attention(*tensors, weight, score_mod=score_mod).requires_grad
        assert not flex_attention(*tensors, score_mod).requires_grad
    table.requires_grad_(False)
    (gradient,) = torch.autograd.grad(flex_attention(*tensors, score_mod).sum(), tensors[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="a first derivative only"):
        gradient.sum().backward()
    with pytest.raises(NotImplementedError):
        torch.func.jvp(lambda query: flex_attention(query, *tensors[1:], score_mod), (tensors[0],), (tensors[0],))
    with pytest.raises(NotImplementedError, match="score_mod, mask_mod, block_mask: .*vmap"):
        torch.vmap(lambda query: flex_attention(query, tensors[1][0], tensors[2][0], score_mod))(tensors[0])


def test_tensors_elsewhere() -> None:
    table = torch.zeros(LENGTH, device="meta")
    with pytest.raises(TypeError, match="score_mod: captures table: a tensor on device meta"):
        flex_attention(*operands(), lambda score, batch, head, query, key: score + table[key])
