"""`attn_implementation="fastattn"` in models with attention sinks: as eager, and without a mask of Lq x Lk."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.24")

import small_models  # noqa: E402

from fastattn.integrations import masks  # noqa: E402
from fastattn.integrations import transformers as ours  # noqa: E402

pytestmark = pytest.mark.usefixtures("registered")

WINDOW = 5  # of a text with 12 tokens


def gpt_oss(name: str = "GptOssModel") -> tuple[Any, Any]:
    """Return a small model with eager's attention, and the same with ours; its sinks are no zeros."""
    made = []
    for implementation in ("eager", "fastattn"):
        config = small_models.small_config("gpt_oss")
        config.sliding_window, config.layer_types = WINDOW, ["sliding_attention", "full_attention"]
        model = small_models.build(name, config, implementation)
        generator = torch.Generator().manual_seed(0)
        for parameter, values in model.named_parameters():
            if parameter.endswith("sinks"):
                values.data = torch.randn(values.shape, generator=generator, dtype=values.dtype) * 2
        made.append(model)
    return made[0], made[1]


def close(some: Any, others: Any) -> None:
    torch.testing.assert_close(some, others, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_forward_and_gradients_without_a_matrix(padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    eager, own = gpt_oss()
    found = []
    for model in (eager, own):
        if model is own:

            def refused(*args: Any, **others: Any) -> Any:
                raise AssertionError("a matrix is made")

            for module, made in ((ours, "sdpa_mask"), (ours, "eager_mask"), (masks, "as_eager"), (ours, "_scores")):
                monkeypatch.setattr(module, made, refused)
            monkeypatch.setattr(masks.Visible, "matrix", refused)
        given = next(small_models.given_to(model, padding))
        out = model(**given).last_hidden_state
        out.sin().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert sum(name.endswith("sinks") for name in gradients) == 2
        found.append([out.detach(), *gradients.values()])
    for some, others in zip(*found, strict=True):
        close(some, others)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_generated_texts(padding: str) -> None:
    texts = []
    for model in gpt_oss("GptOssForCausalLM"):
        given = next(small_models.given_to(model, padding))
        texts.append(model.generate(**given, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0))
    assert torch.equal(*texts)


def test_weights_sum_to_less_than_1() -> None:
    found = []
    for model in gpt_oss():
        found.append(model(**next(small_models.given_to(model)), output_attentions=True))
    close(found[1].last_hidden_state, found[0].last_hidden_state)
    for some, others in zip(found[1].attentions, found[0].attentions, strict=True):
        close(some, others)
        assert (some.sum(-1) < 1).all()
