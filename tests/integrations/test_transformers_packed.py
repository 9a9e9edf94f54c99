"""Several sequences in one: position_ids that begin anew, in models of transformers, without a mask of Lq x Lk."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import small_models  # noqa: E402
from transformers import masking_utils  # noqa: E402

from fastattn.integrations import intervals, masks  # noqa: E402
from fastattn.integrations import transformers as ours  # noqa: E402

pytestmark = pytest.mark.usefixtures("registered")

LENGTHS = ((5, 9, 2), (16,), (1, 15))  # of each row of a batch


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


# -- where sequences end, said in numbers ------------------------------------------------------------------------------


def ends(*lengths: int) -> dict[str, Any]:
    """Return what flash-attention's layers are told of sequences of these lengths."""
    numbers = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    longest = {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return {"cu_seq_lens_q": numbers, "cu_seq_lens_k": numbers, **longest}


@pytest.mark.parametrize(
    ("kind", "name"),
    [("llama", "LlamaForCausalLM"), ("mistral", "MistralForCausalLM"), ("gemma2", "Gemma2ForCausalLM"),
     ("gpt_oss", "GptOssForCausalLM")],
)  # fmt: skip
def test_sequences_that_end_where_it_is_said_are_eagers_alone(kind: str, name: str) -> None:
    tokens = torch.arange(16)[None] * 5 % 91 + 3
    found: list[list[Any]] = []
    for implementation in ("eager", "fastattn"):
        model = small_models.build(name, small_models.small_config(kind), implementation)
        if implementation == "eager":
            logits = torch.cat(
                [model(input_ids=part, use_cache=False).logits for part in tokens.split((5, 9, 2), 1)], 1
            )
        else:
            logits = model(input_ids=tokens, use_cache=False, **ends(5, 9, 2)).logits
        logits.sin().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        found.append([logits.detach(), *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_a_collator_of_flat_batches_returns() -> None:
    rows = [{"input_ids": list(range(3, 3 + length))} for length in (5, 9, 2)]
    model = small_models.build("LlamaForCausalLM", small_models.small_config("llama"), "fastattn")
    found = []
    for with_positions in (True, False):
        collator = transformers.DataCollatorWithFlattening(
            return_position_ids=with_positions, return_flash_attn_kwargs=True, return_seq_idx=True
        )
        with torch.no_grad():
            found.append(model(**collator(rows, return_tensors="pt"), use_cache=False).logits)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_layers_without_a_mask_are_told_ends_as_well(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    lengths = (5, 11, 3, 0, 13)  # of two rows
    tensors = [torch.randn(2, heads, 16, 4, dtype=torch.float64) for heads in (4, 2, 2)]
    numbers = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths)).reshape(2, 1, 16)
    visible = numbers[..., None] == numbers[..., None, :]
    if is_causal:
        visible = visible & torch.ones(16, 16, dtype=torch.bool).tril()
    exact = ours.attention(Layer(), *tensors, visible)[0]
    weights = ours.attention(Layer(), *tensors, None, is_causal=is_causal, output_attentions=True, **ends(*lengths))[1]
    assert torch.equal(weights != 0, visible.expand_as(weights))
    monkeypatch.setattr(masks.Visible, "matrix", None)
    found = ours.attention(Layer(), *tensors, None, is_causal=is_causal, **ends(*lengths))[0]
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize(
    "told",
    [
        ends(5, 9),
        ends(5, 27),
        ends(5, 11, 17),
        {**ends(16, 16), "cu_seq_lens_k": torch.tensor([0, 16])},
        {**ends(5, 11, 16), "cu_seq_lens_k": torch.tensor([0, 6, 16, 32])},
        {**ends(5, 11, 16), "cu_seq_lens_k": None},
        {**ends(5, 11, 16), "max_length_q": None},
        {name: each for name, each in ends(5, 11, 16).items() if name.startswith("cu")},
    ],
    ids=str,
)
def test_ends_that_are_none_of_all_tokens_are_refused(told: dict[str, Any]) -> None:
    tensors = [torch.zeros(2, heads, 16, 4) for heads in (4, 2, 2)]
    with pytest.raises(ValueError, match="Layer: cu_seq_lens_q, .*several sequences in one"):
        ours.attention(Layer(), *tensors, None, **told)


def test_ends_are_refused_with_padding_or_a_cache() -> None:
    tensors = [torch.zeros(1, heads, 16, 4) for heads in (4, 2, 2)]
    kept = torch.ones(1, 16, dtype=torch.bool)
    kept[:, -1] = False
    mask = ours.padding_mask(1, 16, 16, attention_mask=kept)
    with pytest.raises(ValueError, match="several sequences in one"):
        ours.attention(Layer(), *tensors, mask, **ends(5, 11))
    tensors[0] = tensors[0][:, :, :1]
    with pytest.raises(ValueError, match="several sequences in one"):
        ours.attention(Layer(), *tensors, ours.padding_mask(1, 1, 16, 15, allow_is_causal_skip=False), **ends(5, 11))
