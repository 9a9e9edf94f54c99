"""Several sequences in one: position_ids that begin anew, in models of transformers, without a mask of Lq x Lk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import small_models  # noqa: E402
from transformers import masking_utils  # noqa: E402

from fastattn.integrations import intervals, masks  # noqa: E402
from fastattn.integrations import transformers as ours  # noqa: E402

LENGTHS = ((5, 9, 2), (16,), (1, 15))  # of each row of a batch


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    ours.register()
    with small_models.quiet():
        yield


def positions(rows: Any = LENGTHS) -> Any:
    """Return position_ids."""
    return torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in rows])


def functions(position_ids: Any, inner: Any) -> Any:
    """Return the mask function that transformers makes for positions that begin anew."""
    return masking_utils.and_masks(
        masking_utils.remap_positions_for_packed_sequence(inner, position_ids),
        masking_utils.packed_sequence_mask_function(masking_utils.find_packed_sequence_indices(position_ids)),
    )


INNER = {
    "causal": masking_utils.causal_mask_function,
    "sliding": masking_utils.sliding_window_causal_mask_function(3),
    "one chunk": masking_utils.chunked_causal_mask_function(16, torch.zeros(3, dtype=torch.int64)),
    "chunks": masking_utils.chunked_causal_mask_function(4, torch.zeros(3, dtype=torch.int64)),
    "or": masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k == 4),
}


class Layer:
    """A layer that says that it is causal."""

    is_causal = True


@pytest.mark.parametrize("name", INNER)
def test_a_mask_of_several_sequences_says_what_eagers_does(name: str) -> None:
    function = functions(positions(), INNER[name])
    call = (3, 16, 16, 0, 0, function)
    mask = ours.padding_mask(*call, dtype=torch.float64)
    known = name in ("causal", "sliding", "one chunk")
    assert (mask.visible.sequences is not None) is known
    assert (intervals.packed(function) is not None) is known
    wanted = masking_utils.eager_mask(*call, dtype=torch.float64)
    torch.manual_seed(0)
    tensors = [torch.randn(3, heads, 16, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    found = ours.attention(Layer(), *tensors, mask, softcap=0.7)[0]
    exact = ours.attention(Layer(), *tensors, wanted, softcap=0.7)[0]
    torch.testing.assert_close(found, exact)
    for one, other in zip(*(torch.autograd.grad(out.sin().sum(), tensors) for out in (found, exact)), strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(masks.as_eager(mask), wanted)


@pytest.mark.parametrize("told", ["position_bias", "output_attentions", "s_aux"])
def test_sequences_stay_apart_whatever_else_is_asked_for(told: str) -> None:
    call = (3, 16, 16, 0, 0, functions(positions(), INNER["causal"]))
    torch.manual_seed(0)
    tensors = [torch.randn(3, heads, 16, 4, dtype=torch.float64) for heads in (4, 2, 2)]
    options: dict[str, Any] = {
        "position_bias": {"position_bias": torch.randn(1, 4, 16, 16, dtype=torch.float64)},
        "output_attentions": {"output_attentions": True},
        "s_aux": {"s_aux": torch.randn(4, dtype=torch.float64)},
    }[told]
    found, exact = (
        ours.attention(Layer(), *tensors, mask, **options)
        for mask in (
            ours.padding_mask(*call, dtype=torch.float64),
            masking_utils.eager_mask(*call, dtype=torch.float64),
        )
    )
    torch.testing.assert_close(found[0], exact[0])
    if told == "output_attentions":
        torch.testing.assert_close(found[1], exact[1])


def test_no_matrix_of_queries_and_keys_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a matrix was made")

    mask = ours.padding_mask(3, 16, 16, 0, 0, functions(positions(), INNER["sliding"]))
    monkeypatch.setattr(masks.Visible, "matrix", refuse)
    tensors = [torch.randn(3, heads, 16, 4) for heads in (4, 2, 2)]
    ours.attention(Layer(), *tensors, mask)
    ours.attention(Layer(), *tensors, mask, cu_seq_lens_q=torch.tensor([0, 5, 14, 16]))


@pytest.mark.parametrize(
    ("kind", "name"),
    [("llama", "LlamaForCausalLM"), ("mistral", "MistralForCausalLM"), ("gemma3_text", "Gemma3ForCausalLM"),
     ("gpt_oss", "GptOssForCausalLM")],
)  # fmt: skip
def test_models_compute_packed_sequences_as_eager_does(kind: str, name: str) -> None:
    found: list[list[Any]] = []
    tokens = torch.arange(48).reshape(3, 16) * 7 % 91 + 3
    for implementation in ("eager", "fastattn"):
        model = small_models.build(name, small_models.small_config(kind), implementation)
        model.config.use_cache = False
        out = model(input_ids=tokens, position_ids=positions(), use_cache=False, labels=tokens)
        out.loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        found.append([out.logits.detach(), *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_packed_sequences_are_the_same_alone() -> None:
    model = small_models.build("LlamaForCausalLM", small_models.small_config("llama"), "fastattn")
    tokens = torch.arange(16)[None] * 5 % 91 + 3
    with torch.no_grad():
        packed = model(input_ids=tokens, position_ids=positions([(5, 9, 2)]), use_cache=False).logits
        alone = [model(input_ids=part, use_cache=False).logits for part in tokens.split((5, 9, 2), 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-4, atol=1e-5)
