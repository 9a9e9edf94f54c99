"""`attn_implementation="fastattn"` in models that use transformers' attention in part, or not at all: as eager."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.24")

import small_models  # noqa: E402
import transformers_survey  # noqa: E402

from fastattn.integrations import masks, model_code  # noqa: E402
from fastattn.integrations import transformers as ours  # noqa: E402

pytestmark = pytest.mark.usefixtures("registered")


def build(kind: str, name: str, implementation: Any = "fastattn") -> Any:
    return small_models.build(name, small_models.small_config(kind), implementation)


def same_as_eager(kind: str, name: str, change: Any = lambda model: None, **given: Any) -> None:
    """Assert that a model has eager's hidden states, padding's as well, after something was done to it."""
    given = next(small_models.given_to(build(kind, name), "left")) | given
    found = []
    for implementation in ("eager", "fastattn"):
        changed = change(model := build(kind, name, implementation))
        model = model if changed is None else changed
        with torch.no_grad():
            found.append(small_models.tensors(model(**given)))
    assert transformers_survey.difference(*reversed(found)) < 1e-4


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("bigbird_pegasus", "BigBirdPegasusForCausalLM"),  # its layers do not say that they are causal
        ("clip_text_model", "CLIPTextModel"),  # looks at what padding computes
        ("beit", "BeitModel"),
        ("deepseek_v4", "DeepseekV4ForCausalLM"),  # extends the mask
        ("doge", "DogeForCausalLM"),  # computes with the mask
        ("gemma3_text", "Gemma3ForCausalLM"),
        ("gpt_oss", "GptOssForCausalLM"),
        ("hubert", "HubertModel"),
        ("modernbert", "ModernBertModel"),
        ("splinter", "SplinterModel"),  # its layers say nothing of causality, and are not causal
        ("t5", "T5ForConditionalGeneration"),
        ("wav2vec2", "Wav2Vec2Model"),
        ("whisper", "WhisperForConditionalGeneration"),
        ("jamba", "JambaForCausalLM"),
    ],
)
def test_models_that_ask_for_attention_are_computed_as_eager_is(kind: str, name: str) -> None:
    found = transformers_survey.outcome(kind, name)
    assert found == {"outcome": "computed", "why": ""}


@pytest.mark.parametrize(("kind", "name"), [("xlnet", "XLNetModel"), ("fnet", "FNetModel")])
def test_models_without_a_mask_of_ours_are_left_alone(kind: str, name: str) -> None:
    assert transformers_survey.outcome(kind, name) == {"outcome": "own", "why": ""}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("bloom", "BloomModel"),
        ("bloom", "BloomForCausalLM"),
        ("bros", "BrosModel"),
        ("lilt", "LiltModel"),
        ("longformer", "LongformerModel"),
        ("mpt", "MptForCausalLM"),
        ("rembert", "RemBertModel"),
        ("xglm", "XGLMForCausalLM"),
    ],
)
def test_models_that_compute_attention_themselves_are_refused(kind: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: its layers compute attention themselves"):
        build(kind, name)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("falcon", "FalconForCausalLM"),
        ("git", "GitModel"),
        ("gpt_neo", "GPTNeoModel"),
        ("data2vec-vision", "Data2VecVisionModel"),
    ],
)
def test_models_that_choose_from_attentions_of_their_own_are_refused(kind: str, name: str) -> None:
    with pytest.raises(ValueError, match=f'^{name}: "fastattn", and its attention is one of "eager"'):
        build(kind, name)


def test_a_part_of_a_model_is_refused_by_its_own_name() -> None:
    with pytest.raises(ValueError, match="^BlipTextModel: its layers compute attention themselves"):
        build("blip", "BlipModel")
    for implementation in ({"vision_config": "fastattn", "text_config": "eager"}, "eager"):
        build("blip", "BlipModel", implementation)


def test_set_attn_implementation_is_refused_as_well() -> None:
    model = build("rembert", "RemBertModel", "eager")
    given = next(small_models.given_to(model, "right"))
    before = model(**given).last_hidden_state
    model.set_attn_implementation("fastattn")  # transformers itself leaves such a model as it is
    assert torch.equal(model(**given).last_hidden_state, before)
    model = build("gpt2", "GPT2Model", "eager")
    before = model(**given).last_hidden_state
    model.set_attn_implementation("fastattn")
    assert model.config._attn_implementation == "fastattn"
    torch.testing.assert_close(model(**given).last_hidden_state, before, rtol=1e-4, atol=1e-4)


def test_other_attentions_are_not_refused() -> None:
    for implementation in ("eager", "sdpa"):
        build("falcon", "FalconModel", implementation)
    build("bloom", "BloomModel", "eager")
    assert model_code.refusal(transformers.BloomModel, "eager") is not None  # it is asked for ours alone
    assert model_code.refusal(transformers.LlamaForCausalLM, "fastattn") is None


def test_copies_compute_the_same() -> None:
    same_as_eager("llama", "LlamaModel", copy.deepcopy)
    same_as_eager("bert", "BertModel", lambda model: pickle.loads(pickle.dumps(model)))


def test_a_part_of_a_model_may_have_it() -> None:
    config = small_models.small_config("clip")
    model = small_models.build("CLIPModel", config, {"text_config": "fastattn", "vision_config": "eager"})
    assert [part._attn_implementation for part in (config.text_config, config.vision_config)] == ["fastattn", "eager"]
    others = build("clip", "CLIPModel", "eager")
    given = list(small_models.given_to(model, "left"))[1]  # text and pictures
    with torch.no_grad():
        found = [small_models.tensors(each(**given)) for each in (model, others)]
    assert transformers_survey.difference(*found) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_compiled(whole: bool) -> None:
    def compiled(model: Any) -> Any:
        torch._dynamo.reset()
        if whole:
            return torch.compile(model, backend="eager", fullgraph=True)
        for layer in model.layers:
            layer.compile(backend="eager")
        return None

    same_as_eager("llama", "LlamaModel", compiled)
    same_as_eager("llama", "LlamaModel", compiled, attention_mask=None)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_generate_with_a_static_cache(padding: str) -> None:
    eager, own = (build("llama", "LlamaForCausalLM", each) for each in ("eager", "fastattn"))
    given = next(small_models.given_to(own, padding))
    options = {"max_new_tokens": 5, "cache_implementation": "static", "disable_compile": True, "do_sample": False}
    assert torch.equal(*(model.generate(**given, **options, pad_token_id=0) for model in (eager, own)))


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "name"), [("llama", "LlamaForCausalLM"), ("gpt2", "GPT2LMHeadModel")])
def test_half_precision(kind: str, name: str, dtype: Any, padding: str) -> None:
    """Logits are no further from those of the same numbers in float32 than eager's are, with room for luck."""
    eager, own = (build(kind, name, each).to(dtype) for each in ("eager", "fastattn"))
    exact = build(kind, name, "eager").to(dtype).float()
    given = next(small_models.given_to(own, padding))
    with torch.no_grad():
        wanted = exact(**given).logits
        errors = [(model(**given).logits.float() - wanted).abs().max() for model in (eager, own)]
    assert errors[1] <= 2 * errors[0]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert own.generate(**given, **options).shape == eager.generate(**given, **options).shape


def test_autocast() -> None:
    model = build("llama", "LlamaModel")
    with torch.autocast("cpu", torch.bfloat16):
        model(**next(small_models.given_to(model, "left")))


def test_an_option_is_refused_by_the_layers_name() -> None:
    model = build("deepseek_v32", "DeepseekV32Model")
    with pytest.raises(ValueError, match="^DeepseekV32Attention: indices: the model passes it"):
        model(**next(small_models.given_to(model)))


# -- masks -------------------------------------------------------------------------------------------------------------


def both_masks(kept: Any, queries: int = 5, causal: bool = True) -> tuple[Any, Any]:
    """Return our mask and eager's, of the last queries."""
    made = []
    for implementation in (ours.padding_mask, transformers.masking_utils.eager_mask):
        functions = transformers.masking_utils
        function = functions.causal_mask_function if causal else functions.bidirectional_mask_function
        options = {"allow_is_bidirectional_skip": not causal, "dtype": torch.float32, "attention_mask": kept}
        made.append(implementation(2, queries, 5, 5 - queries, 0, function, **options))
    return made[0], made[1]


KEPT = [None, torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])]


@pytest.mark.parametrize("queries", [3, 5])
@pytest.mark.parametrize("kept", KEPT, ids=["none", "left", "right"])
def test_a_mask_is_eagers_to_what_computes_with_it(kept: Any, queries: int) -> None:
    mask, eager = both_masks(None if kept is None else kept.bool(), queries)
    scores = torch.randn(2, 4, queries, 5)
    for compute in (
        lambda given: scores + given,
        lambda given: given + scores,
        lambda given: torch.cat((given, given), -1),
        lambda given: given[:, :, -1:],
        lambda given: given[..., :3],
        lambda given: given.mT,
        lambda given: given[[1, 0]],
        lambda given: (given == 0) & (given > -1),
        lambda given: torch.nn.functional.pad(given, (1, 0), value=7.0),
        lambda given: given.to(torch.float64),
        lambda given: torch.baddbmm(given[:, 0], torch.ones(2, queries, 2), torch.ones(2, 2, 5)),
        lambda given: scores.clone().masked_fill_(given != 0, 9.0),
    ):
        assert torch.equal(compute(both_masks(None if kept is None else kept.bool(), queries)[0]), compute(eager))
    assert (mask.shape, mask.dtype, mask.device, mask.ndim) == (eager.shape, eager.dtype, eager.device, eager.ndim)
    assert mask.size(-1) == 5
    assert len(mask) == 2
    assert mask.is_floating_point()
    assert mask[:, :, :, :5] is mask
    assert mask.to("cpu", torch.float32) is mask
    assert mask.numbers is None, "looked at, and not computed with"


def test_what_is_written_to_a_mask_is_seen_by_attention() -> None:
    class Layer:
        is_causal = True

    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 1, 5, 4) for _ in range(3))
    for write in (
        lambda given: given.__setitem__((..., 2), -torch.inf),
        lambda given: given[..., 2].fill_(-torch.inf),
        lambda given: given.masked_fill_(torch.arange(5) == 2, -torch.inf),
    ):
        mask, eager = both_masks(KEPT[2].bool())
        write(mask)
        write(eager)
        found, wanted = (ours.attention(Layer(), query, key, value, each)[0] for each in (mask, eager))
        assert torch.equal(found, wanted)


def test_a_mask_of_another_shape_than_the_scores_fails_as_eagers_does() -> None:
    mask, _ = both_masks(None)
    bias, visible = masks.read(mask, 5, 5)
    assert bias is visible.kept is visible.lengths is None
    assert visible.options() == {"is_causal": True}
    assert masks.read(mask, 5, 6)[0].shape == (2, 1, 5, 5)


def test_a_query_that_may_look_at_no_key_gets_what_eager_has() -> None:
    class Layer:
        is_causal = True

    torch.manual_seed(0)
    tensors = [torch.randn(2, heads, 5, 4, requires_grad=True) for heads in (4, 2, 2)]
    mask, eager = both_masks(KEPT[1].bool())
    found, _ = ours.attention(Layer(), *tensors, mask)
    query, key, value = tensors[0], *(tensor.repeat_interleave(2, 1) for tensor in tensors[1:])
    wanted = (((query @ key.mT) / 2 + eager).softmax(-1) @ value).transpose(1, 2)
    torch.testing.assert_close(found, wanted)
    for some, others in zip(*(torch.autograd.grad(out.sin().sum(), tensors) for out in (found, wanted)), strict=True):
        torch.testing.assert_close(some, others)
    with torch.no_grad():
        torch.testing.assert_close(ours.attention(Layer(), *tensors, both_masks(KEPT[1].bool())[0])[0], wanted)


def test_no_mask_and_nothing_said_of_causality_is_no_causality() -> None:
    class Silent:
        """A layer that says nothing, as those have it whose mask says everything."""

    class Layer(Silent):
        is_causal = True

    value = torch.arange(5.0).reshape(1, 1, 5, 1)
    zeros = torch.zeros(1, 1, 5, 4)
    for layer, said, wanted in (
        (Silent(), None, 2.0),
        (Silent(), True, 0.0),
        (Layer(), None, 0.0),
        (Layer(), False, 2.0),
    ):
        assert ours.attention(layer, zeros, zeros, value, None, is_causal=said)[0][0, 0, 0, 0] == wanted


def test_padding_does_not_keep_sequences_apart() -> None:
    class Layer:
        is_causal = True

    tensors = [torch.zeros(2, 1, 5, 4) for _ in range(3)]
    for kept in KEPT:
        mask = both_masks(None if kept is None else kept.bool())[0]
        with pytest.raises(ValueError, match=r"^Layer: cu_seq_lens_q, .*several sequences in one"):
            ours.attention(Layer(), *tensors, mask, cu_seq_lens_q=torch.tensor([0, 2, 5]))


@pytest.mark.parametrize("option", ["return_dict", "logits_to_keep"])
def test_what_says_nothing_about_attention_is_ignored(option: str) -> None:
    class Layer:
        is_causal = False

    tensors = [torch.zeros(2, 1, 5, 4) for _ in range(3)]
    assert ours.attention(Layer(), *tensors, None, **{option: 1})[0].shape == (2, 5, 1, 4)
