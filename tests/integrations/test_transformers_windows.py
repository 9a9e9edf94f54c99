"""`attn_implementation="fastattn"` in models with sliding windows and softcaps: as eager, without a mask for them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.24")

import small_models  # noqa: E402
import transformers_survey  # noqa: E402
from transformers import masking_utils  # noqa: E402

from fastattn.integrations import intervals, masks  # noqa: E402
from fastattn.integrations import transformers as ours  # noqa: E402

WINDOW = 5  # of the small models, whose texts have 12 tokens


def exact(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Any, Any]:
    """Compute attention as Gemma 2's eager does, which takes its softmax in float32 whatever the model is in."""
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


@pytest.fixture(scope="module", autouse=True)
def _exact(registered: None) -> None:
    transformers.AttentionInterface.register("exact", exact)
    transformers.AttentionMaskInterface.register("exact", masking_utils.eager_mask)


def pair(kind: str, name: str, **options: Any) -> tuple[Any, Any]:
    """Return a small model with attention as eager's, but exact, and the same with ours, in float64."""
    made = []
    for implementation in ("exact", "fastattn"):
        config = small_models.small_config(kind)
        for option, value in options.items():
            assert hasattr(config, option)
            setattr(config, option, value)
        made.append(small_models.build(name, config, implementation, torch.float64))
    return made[0], made[1]


def gemma2(name: str = "Gemma2ForCausalLM", softcap: float = 0.5) -> tuple[Any, Any]:
    eager, own = pair("gemma2", name, attn_logit_softcapping=softcap)
    assert set(own.config.layer_types) == {"sliding_attention", "full_attention"}
    assert own.config.sliding_window == WINDOW
    return eager, own


def close(some: Any, others: Any) -> None:
    torch.testing.assert_close(some, others, rtol=1e-9, atol=1e-10)


# -- Gemma 2 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_gemma2_forward_and_gradients(padding: str) -> None:
    found = []
    for model in gemma2("Gemma2Model"):
        given = next(small_models.given_to(model, padding))
        out = model(**given).last_hidden_state
        out.sin().sum().backward()
        found.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 10
    for some, others in zip(*found, strict=True):
        close(some, others)


def test_the_softcap_of_gemma2_matters() -> None:
    given = next(small_models.given_to(gemma2()[0]))
    with torch.no_grad():
        some, others = (gemma2(softcap=softcap)[1](**given).logits for softcap in (0.5, 50.0))
    assert (some - others).abs().max() > 1e-2


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_gemma2_prefill_and_decode(padding: str, cache: str) -> None:
    """Pieces of a text, in turn: longer and shorter than the window, and single tokens."""
    found = []
    for model in gemma2():
        given = next(small_models.given_to(model, padding))
        tokens, kept = given["input_ids"], given.get("attention_mask")
        if cache == "static":
            past = transformers.StaticCache(config=model.config, max_cache_len=16)
        else:
            past = transformers.DynamicCache(config=model.config)
        outs, begin = [], 0
        for length in (3, 6, 1, 1, 1):
            end = begin + length
            seen = None if kept is None else kept[:, :end]
            with torch.no_grad():
                out = model(input_ids=tokens[:, begin:end], attention_mask=seen, cache=past)
            outs.append(out.logits)
            begin = end
        found.append(torch.cat(outs, 1))
    close(found[1], found[0])


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_gemma2_generates(padding: str) -> None:
    texts = []
    for model in gemma2():
        given = next(small_models.given_to(model, padding))
        texts.append(model.generate(**given, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0))
    assert torch.equal(*texts)


def test_weights_of_gemma2() -> None:
    (eager, own), found = gemma2(), []
    for model in (eager, own):
        given = next(small_models.given_to(model, "left"))
        found.append(model(**given, output_attentions=True))
    close(found[1].logits, found[0].logits)
    for some, others in zip(found[1].attentions, found[0].attentions, strict=True):
        close(some, others)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_gemma2_compiled(whole: bool) -> None:
    eager, own = gemma2("Gemma2Model")
    given = next(small_models.given_to(own, "left"))
    torch._dynamo.reset()
    compiled = torch.compile(own, backend="eager", fullgraph=True) if whole else own
    if not whole:
        for layer in own.layers:
            layer.compile(backend="eager")
    with torch.no_grad():
        close(compiled(**given).last_hidden_state, eager(**given).last_hidden_state)


# -- masks that are not made -------------------------------------------------------------------------------------------

MODELS = [
    ("gemma2", "Gemma2Model", {}),
    ("gemma3_text", "Gemma3TextModel", {}),
    ("mistral", "MistralModel", {"sliding_window": WINDOW}),
    ("qwen2", "Qwen2Model", {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
    ("cohere2", "Cohere2Model", {}),
    ("modernbert", "ModernBertModel", {"local_attention": 2 * WINDOW}),
]


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize(("kind", "name", "options"), MODELS, ids=[kind for kind, *_ in MODELS])
def test_no_mask_is_made_for_a_window(
    kind: str, name: str, options: dict[str, Any], padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager, own = pair(kind, name, **options)
    given = next(small_models.given_to(own, padding))
    with torch.no_grad():
        wanted = eager(**given).last_hidden_state
    told: list[tuple[Any, dict[str, Any]]] = []
    attention = ours.attention_with_lse

    def watched(query: Any, key: Any, value: Any, mask: Any, *rest: Any, **said: Any) -> Any:
        told.append((mask, said))
        return attention(query, key, value, mask, *rest, **said)

    def refused(*args: Any, **others: Any) -> Any:
        raise AssertionError("a matrix is made")

    monkeypatch.setattr(ours, "attention_with_lse", watched)
    for module, made in ((ours, "sdpa_mask"), (ours, "eager_mask"), (masks, "as_eager"), (masks.Visible, "matrix")):
        monkeypatch.setattr(module, made, refused)
    with torch.no_grad():
        close(own(**given).last_hidden_state, wanted)
    windows = [said["window"] for _, said in told if "window" in said]
    assert windows
    assert all(left is not None and left <= WINDOW for left, _ in windows)
    for mask, said in told:
        assert (mask is None) == (padding != "left")
        assert ("key_lengths" in said) == (padding == "right")
        assert mask is None or mask.shape == (small_models.BATCH, 1, 1, small_models.LENGTH)


def test_a_static_cache_needs_no_matrix_either(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **others: Any) -> Any:
        raise AssertionError("a matrix is made")

    eager, own = gemma2()
    for module, made in ((ours, "sdpa_mask"), (ours, "eager_mask"), (masks, "as_eager"), (masks.Visible, "matrix")):
        monkeypatch.setattr(module, made, refused)
    given = next(small_models.given_to(own, "left"))
    caches = [transformers.StaticCache(config=model.config, max_cache_len=16) for model in (eager, own)]
    for begin, end in itertools.pairwise((0, 3, 9, 10, 12)):  # the window's cache is full with the second
        part = {"input_ids": given["input_ids"][:, begin:end], "attention_mask": given["attention_mask"][:, :end]}
        with torch.no_grad():
            found, wanted = (
                model(**part, cache=cache).logits for model, cache in zip((own, eager), caches, strict=True)
            )
        close(found, wanted)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("cohere2", "Cohere2ForCausalLM"),
        ("mistral", "MistralForCausalLM"),
        ("recurrent_gemma", "RecurrentGemmaForCausalLM"),
        ("t5gemma", "T5GemmaForConditionalGeneration"),
        ("vaultgemma", "VaultGemmaForCausalLM"),
    ],
)
def test_models_with_windows_are_computed_as_eager_is(kind: str, name: str) -> None:
    assert transformers_survey.outcome(kind, name) == {"outcome": "computed", "why": ""}


# -- what a mask says --------------------------------------------------------------------------------------------------

FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "both ways": masking_utils.bidirectional_mask_function,
    "sliding": masking_utils.sliding_window_causal_mask_function(3),
    "sliding both ways": masking_utils.sliding_window_bidirectional_mask_function(2),
    "chunks": masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64)),
    "one chunk": masking_utils.chunked_causal_mask_function(20, torch.zeros(2, dtype=torch.int64)),
    "or": masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k == 4),
    "and": masking_utils.and_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k != 1),
    "tokens of two texts": masking_utils.and_masks(
        masking_utils.causal_mask_function,
        masking_utils.packed_sequence_mask_function(torch.arange(20).expand(2, -1) // 3),
    ),
}
READ = ("causal", "both ways", "sliding", "sliding both ways", "one chunk")

TEXTS = {
    "whole": None,
    "left": torch.tensor([[0, 0] + [1] * 10, [1] * 12]).bool(),
    "right": torch.tensor([[1] * 9 + [0] * 3, [1] * 12]).bool(),
    "empty": torch.tensor([[0] * 12, [1] * 12]).bool(),
    "between": torch.tensor([[1, 0, 1, 1] * 3, [1] * 12]).bool(),
    "short": torch.tensor([[1] * 8, [1] * 8]).bool(),
}

#: Queries, keys and the positions of the first of each: of a whole text, of its end with a cache, with a sliding one.
PLACES = [(12, 12, 0, 0), (1, 12, 11, 0), (5, 12, 7, 0), (3, 6, 9, 6), (1, 4, 11, 8), (4, 12, 2, 0)]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_mask_says_what_eagers_does(name: str, text: str) -> None:
    for (queries, keys, at, first), skip in itertools.product(PLACES, (False, True)):
        options: dict[str, Any] = {"attention_mask": TEXTS[text], "dtype": torch.float64}
        if name == "both ways":
            options["allow_is_bidirectional_skip"] = skip
        call = (2, queries, keys, at, first, FUNCTIONS[name])
        wanted = masking_utils.eager_mask(*call, **options)
        found = ours.padding_mask(*call, allow_is_causal_skip=skip and name == "causal", **options)
        if found is None:
            assert skip
            assert wanted is None or not wanted.any()
            continue
        kept = found.visible.kept
        assert (kept is None or kept.shape[-2] == 1 or queries == 1) or name not in READ
        assert torch.equal(masks.as_eager(found), torch.zeros_like(found) if wanted is None else wanted)


@pytest.mark.parametrize("text", ["left", "empty", "right"])
@pytest.mark.parametrize("chunk", [4, 12, 20])
def test_chunks_begin_behind_padding(chunk: int, text: str) -> None:
    padded = (TEXTS[text].cumsum(-1) == 0).sum(-1)
    for queries, keys, at, first in PLACES:
        call = (2, queries, keys, at, first, masking_utils.chunked_causal_mask_function(chunk, padded), TEXTS[text])
        mask = ours.padding_mask(*call, allow_is_causal_skip=False)
        assert torch.equal(masks.as_eager(mask), masking_utils.eager_mask(*call))


def test_functions_are_read_by_what_they_are_made_of() -> None:
    assert [intervals.reach(FUNCTIONS[name], 12) for name in READ] == [
        (None, 0),
        (None, None),
        (2, 0),
        (2, 2),
        (None, 0),
    ]
    for name in set(FUNCTIONS) - set(READ):
        assert intervals.reach(FUNCTIONS[name], 12) is None
    assert intervals.reach(FUNCTIONS["one chunk"], 21) is None
    assert intervals.reach(masking_utils.sliding_window_overlay(torch.tensor(3)), 12) is None


def test_what_is_said_of_an_interval() -> None:
    class Layer:
        is_causal = True

    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, length, 4) for heads, length in ((4, 5), (2, 12), (2, 12)))
    for name, text in itertools.product(FUNCTIONS, TEXTS):
        call = (2, 5, 12, 7, 0, FUNCTIONS[name], TEXTS[text])
        found, wanted = (
            ours.attention(Layer(), query, key, value, mask, softcap=0.7)[0]
            for mask in (ours.padding_mask(*call), masking_utils.eager_mask(*call))
        )
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_softcap_is_computed_where_no_key_may_be_looked_at() -> None:
    """As eager: the mean of the values, and gradients through the scores."""

    class Layer:
        is_causal = True

    torch.manual_seed(0)
    tensors = [torch.randn(2, heads, 6, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    call = (2, 6, 6, 0, 0, FUNCTIONS["sliding"], TEXTS["left"][:, :6])
    found, _ = ours.attention(Layer(), *tensors, ours.padding_mask(*call, dtype=torch.float64), softcap=0.6)
    query, key, value = tensors[0], *(tensor.repeat_interleave(2, 1) for tensor in tensors[1:])
    scores = 0.6 * torch.tanh(query @ key.mT / 2 / 0.6) + masking_utils.eager_mask(*call, dtype=torch.float64)
    wanted = (scores.softmax(-1) @ value).transpose(1, 2)
    torch.testing.assert_close(found, wanted)
    for some, others in zip(*(torch.autograd.grad(out.sin().sum(), tensors) for out in (found, wanted)), strict=True):
        torch.testing.assert_close(some, others)
