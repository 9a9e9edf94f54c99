"""`attn_implementation="fastattn"`: models of transformers, small and with random weights, against "sdpa"."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.24")

from fastattn.integrations import transformers as ours  # noqa: E402

pytestmark = pytest.mark.usefixtures("registered")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {"vocab_size": 50, "max_position_embeddings": 64, "pad_token_id": 0}
GROUPED = SMALL | TEXT | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {"image_size": 16, "patch_size": 4}

CONFIGS: dict[str, Any] = {
    "BERT": lambda: transformers.BertConfig(**SMALL, **TEXT),
    "GPT-2": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
    "Llama": lambda: transformers.LlamaConfig(**GROUPED),
    "Qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "Mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=5),
    "ViT": lambda: transformers.ViTConfig(**SMALL, **IMAGE),
    "T5": lambda: transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=50, decoder_start_token_id=0
    ),
}
DECODERS = ("GPT-2", "Llama", "Qwen2", "Mistral")


def models(name: str, kind: str = "AutoModel", others: str = "sdpa", **options: Any) -> tuple[Any, Any]:
    """Return a model with another attention, and the same with ours, in float64."""
    made = []
    for implementation in (others, "fastattn"):
        torch.manual_seed(0)
        config = CONFIGS[name]()
        for option, value in options.items():
            setattr(config, option, value)
        try:
            model = getattr(transformers, kind).from_config(config, attn_implementation=implementation)
        except ValueError as error:
            pytest.skip(f"{name}: transformers does not let its attention be chosen: {str(error)[:60]}")
        made.append(model.double().eval())
    made[1].load_state_dict(made[0].state_dict())
    return made[0], made[1]


def inputs(name: str, padded: bool) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    if name == "ViT":
        return {"pixel_values": torch.from_numpy(rng.standard_normal((3, 3, 16, 16)))}
    tokens = torch.from_numpy(rng.integers(3, 50, (3, 12)))
    given = {"input_ids": tokens}
    if padded:
        kept = torch.ones((3, 12), dtype=torch.long)
        if name in DECODERS:
            kept[0, :4] = kept[2, :9] = 0
        else:
            kept[0, 8:] = kept[2, 3:] = 0
        given["attention_mask"] = kept
    if name == "T5":
        given["decoder_input_ids"] = tokens[:, :7]
    return given


def close(some: Any, others: Any) -> None:
    torch.testing.assert_close(some, others, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_are_those_of_sdpa(name: str, padded: bool) -> None:
    given = inputs(name, padded)
    found = []
    for model in models(name):
        out = model(**given).last_hidden_state
        if padded and name != "T5":  # what padding itself computes is nobody's concern
            out = out * given["attention_mask"][..., None] if "attention_mask" in given else out
        out.sin().sum().backward()
        found.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 10
    for some, others in zip(*found, strict=True):
        close(some, others)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [*DECODERS, "T5"])
def test_generate(name: str, padded: bool) -> None:
    kind = "AutoModelForSeq2SeqLM" if name == "T5" else "AutoModelForCausalLM"
    given = inputs(name, padded)
    given.pop("decoder_input_ids", None)
    texts = [model.generate(**given, max_new_tokens=9, do_sample=False) for model in models(name, kind)]
    assert texts[0].shape[1] > 8
    assert torch.equal(*texts)


@pytest.mark.parametrize("name", CONFIGS)
def test_weights(name: str) -> None:
    given = inputs(name, padded=True)
    eager, own = (model(**given, output_attentions=True) for model in models(name, others="eager"))
    which = [key for key in eager if key.endswith("attentions") and eager[key]]
    assert which
    for key in which:
        assert len(own[key]) == len(eager[key]) > 0
        for some, others in zip(own[key], eager[key], strict=True):
            rows = others.sum(-1, keepdim=True) > 0.5
            looked = torch.ones_like(others, dtype=torch.bool) & rows
            if name in DECODERS:  # of padding itself, eager spreads the weight over what is hidden
                looked &= given["attention_mask"].bool()[:, None, :, None]
            # eager takes its softmax in float32, whatever the model is in
            torch.testing.assert_close(some[looked], others[looked], rtol=1e-5, atol=1e-7)


def test_dropout_in_training_is_that_of_the_seed() -> None:
    _, model = models("BERT", attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0)
    given = inputs("BERT", True)
    model.train()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model(**given).last_hidden_state)
    close(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2])
    model.eval()
    close(model(**given).last_hidden_state, model(**given).last_hidden_state)


def test_padding_alone_makes_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...] | None] = []
    attention = ours.attention_with_lse

    def watched(query: Any, key: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        shapes.append(None if mask is None else tuple(mask.shape))
        return attention(query, key, value, mask, *rest, **options)

    monkeypatch.setattr(ours, "attention_with_lse", watched)
    models("Llama")[1](**inputs("Llama", True))  # padded on the left
    assert set(shapes) == {(3, 1, 1, 12)}
    for name, padded in (("BERT", True), ("Llama", False)):  # on the right it is lengths
        shapes.clear()
        models(name)[1](**inputs(name, padded))
        assert set(shapes) == {None}


class Layer:
    """What a layer of a model is to attention."""

    is_causal = False


def tensors(heads: int = 4) -> list[Any]:
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.standard_normal((2, h, 9, 8))) for h in (heads, 2, 2)]


@pytest.mark.parametrize("option", ["logits_soft_cap", "head_mask", "something_new"])
def test_what_is_not_computed_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}: the model passes it"):
        ours.attention(Layer(), *tensors(), None, **{option: 30.0})
    out, weights = ours.attention(Layer(), *tensors(), None, **{option: None})
    assert out.shape == (2, 9, 4, 8)
    assert weights is None


def test_a_window_without_a_mask_is_refused_where_it_matters() -> None:
    with pytest.raises(ValueError, match="sliding_window: 5 with 9 keys"):
        ours.attention(Layer(), *tensors(), None, sliding_window=5)
    ours.attention(Layer(), *tensors(), None, sliding_window=9)


def test_several_sequences_in_one_are_refused_without_a_mask() -> None:
    with pytest.raises(ValueError, match="several sequences in one"):
        ours.attention(Layer(), *tensors(), None, cu_seq_lens_q=torch.tensor([0, 4, 9]))


def test_position_bias_and_sinks() -> None:
    query, key, value = tensors()
    rng = np.random.default_rng(1)
    bias, sinks = torch.from_numpy(rng.standard_normal((1, 4, 9, 9))), torch.from_numpy(rng.standard_normal(4))
    hidden = torch.ones((9, 9), dtype=torch.bool).tril()[None, None]
    found, _ = ours.attention(Layer(), query, key, value, hidden, position_bias=bias, s_aux=sinks)
    whole, weights = ours.attention(
        Layer(), query, key, value, hidden, position_bias=bias, s_aux=sinks, output_attentions=True
    )
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5 + bias
    scores = torch.cat((scores.masked_fill(~hidden, -torch.inf), sinks[:, None, None].expand(2, 4, 9, 1)), -1)
    wanted = scores.softmax(-1)[..., :-1]
    close(found, (wanted @ value.repeat_interleave(2, 1)).transpose(1, 2))
    close(whole, found)
    close(weights, wanted)


def test_the_name_is_checked() -> None:
    with pytest.raises(TypeError, match="name: 3 of type int; expected a string"):
        ours.register(3)  # type: ignore[arg-type]
