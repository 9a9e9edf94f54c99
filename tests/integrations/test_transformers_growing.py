"""A cache with room for tokens to come: what DynamicCache gives, and one token written in a step."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.24")

from fastattn.integrations import transformers as ours  # noqa: E402

pytestmark = pytest.mark.usefixtures("registered")

SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TOKENS = {"bos_token_id": 0, "eos_token_id": 98, "pad_token_id": 98}
CONFIG = transformers.LlamaConfig(**SIZES, **TOKENS, num_attention_heads=4, num_key_value_heads=2)


def model_of(implementation: str = "sdpa", config: Any = CONFIG) -> Any:
    """Return a small model."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def states(tokens: int, rows: int = 2) -> Any:
    """Return keys, or values, of so many tokens."""
    return torch.randn((rows, 2, tokens, 8))


def text(rows: int = 2, tokens: int = 5) -> Any:
    """Return the beginning of some texts."""
    return torch.randint(0, 90, (rows, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("implementation", ["sdpa", "fastattn"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampled"])
def test_models_write_what_they_write_with_a_dynamic_cache(implementation: str, how: dict[str, Any]) -> None:
    model, found = model_of(implementation), []
    for cache in (transformers.DynamicCache(config=CONFIG), ours.GrowingCache(config=CONFIG)):
        torch.manual_seed(1)
        options = {"max_new_tokens": 70, "min_new_tokens": 70, "do_sample": False, **how}
        found.append(model.generate(text(), cache=cache, **options))
    assert torch.equal(*found)


def test_layers_with_a_window_are_those_of_the_dynamic_cache() -> None:
    config = transformers.MistralConfig(
        **SIZES, **TOKENS, num_attention_heads=4, num_key_value_heads=2, sliding_window=4
    )
    kinds = [
        [type(layer) for layer in cache(config=config).layers]
        for cache in (transformers.DynamicCache, ours.GrowingCache)
    ]
    assert kinds[0] == kinds[1]
    model = model_of(config=config)
    caches = transformers.DynamicCache(config=config), ours.GrowingCache(config=config)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    assert torch.equal(*[model.generate(text(), cache=cache, **options) for cache in caches])


def test_a_step_copies_no_other_token() -> None:
    cache = ours.GrowingCache()
    places = set()
    for _ in range(1000):
        keys, values = cache.update(states(1), states(1), 0)
        places.add(keys.data_ptr())
    assert keys.shape == values.shape == (2, 2, 1000, 8)
    assert len(places) <= 6


def test_tokens_are_those_that_were_appended() -> None:
    growing, dynamic = ours.GrowingCache(), transformers.DynamicCache()
    for tokens in (40, 1, 30, 1, 500, 1):
        new = states(tokens), states(tokens)
        for one, other in zip(growing.update(*new, 0), dynamic.update(*new, 0), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-3),
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.reset(),
    ],
    ids=["crop", "reorder", "select", "repeat", "reset"],
)
def test_what_is_done_to_it_is_what_is_done_to_a_dynamic_cache(change: Any) -> None:
    growing, dynamic = ours.GrowingCache(), transformers.DynamicCache()
    first = states(9), states(9)
    for cache in (growing, dynamic):
        cache.update(*first, 0)
        change(cache)
    rows = len(dynamic.layers[0].keys) if dynamic.layers[0].keys is not None else 2
    for tokens in (1, 2):
        new = states(tokens, rows), states(tokens, rows)
        for one, other in zip(growing.update(*new, 0), dynamic.update(*new, 0), strict=True):
            assert torch.equal(one, other)


def test_a_copy_goes_its_own_way() -> None:
    cache = ours.GrowingCache()
    cache.update(states(9), states(9), 0)
    other = copy.deepcopy(cache)
    kept = cache.update(states(1), states(1), 0)[0].clone()
    other.update(states(1), states(1), 0)
    assert torch.equal(cache.layers[0].keys, kept)


def test_what_was_written_in_inference_mode_may_be_continued_outside() -> None:
    cache, first = ours.GrowingCache(), states(9)
    with torch.inference_mode():
        cache.update(first, first, 0)
        places = {cache.update(states(1), states(1), 0)[0].data_ptr() for _ in range(9)}
    assert len(places) == 1
    keys, _ = cache.update(states(1), states(1), 0)
    assert torch.equal(keys[:, :, :9], first)


def test_gradients_pass_through() -> None:
    cache, first, second = ours.GrowingCache(), states(3).requires_grad_(), states(2).requires_grad_()
    cache.update(first, first, 0)
    keys, _ = cache.update(second, second, 0)
    keys.sum().backward()
    assert torch.equal(first.grad, torch.ones_like(first))
    assert torch.equal(second.grad, torch.ones_like(second))
