"""Models of transformers, any of them, small and with random weights, and something to give them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

#: Sizes by their names in a configuration, as many as most models share.
SIZES: dict[str, int] = (
    dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "emb_dim"), 32)
    | dict.fromkeys(("hidden_dim", "projection_dim", "text_hidden_size", "encoder_hidden_size", "out_hidden_size"), 32)
    | dict.fromkeys(("decoder_hidden_size", "output_dim", "conv_dim", "output_hidden_size", "pooler_output_size"), 32)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2)
    | dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "depth", "decoder_num_hidden_layers"), 2)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4)
    | dict.fromkeys(("decoder_attention_heads", "attention_heads", "decoder_num_attention_heads"), 4)
    | dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "d_ff", "mlp_dim"), 48)
    | dict.fromkeys(("moe_intermediate_size", "ffn_hidden_size", "d_inner", "shared_expert_intermediate_size"), 48)
    | dict.fromkeys(("decoder_intermediate_size", "n_inner", "dff"), 48)
    | dict.fromkeys(("head_dim", "d_kv", "d_head", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8)
    | dict.fromkeys(("global_head_dim", "rotary_dim", "index_head_dim", "attention_head_dim"), 8)
    | dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16)
    | dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"), 4)
    | dict.fromkeys(("n_group", "topk_group"), 1)
    | dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 64)
    | dict.fromkeys(("n_ctx", "context_length", "max_seq_len"), 64)
    | {
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "num_experts_per_token": 2,
        "vocab_size": 99,
        "qk_head_dim": 16,
        "index_topk": 64,
    }
    | {"image_size": 32, "patch_size": 8, "type_vocab_size": 2, "first_k_dense_replace": 1, "emb_size": 32}
)

#: Where a model cannot be made so, or takes nothing: keys for every head, which latent attention has, and more layers.
MANY_KEYS: dict[str, int] = {"num_key_value_heads": 4, "num_hidden_layers": 4, "attn_layer_period": 2} | {
    "attn_layer_offset": 1,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
}

#: What is a model's own.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
}

#: What must be small whatever else is.
ONLY_FEW = ("layer", "depth", "vocab_size", "image_size")

LEVELS = (0, 1, 2)
LENGTH, BATCH = 12, 3


def small_config(kind: str, level: int = 0) -> Any:
    """Return the configuration of a kind of model, small. That of a higher level may fit where one did not."""
    return CONFIG_MAPPING[kind](**_small(CONFIG_MAPPING[kind], level))


def _small(config_class: Any, level: int) -> dict[str, Any]:
    default = config_class()
    table = SIZES | MANY_KEYS if level == 1 else SIZES
    sizes: dict[str, Any] = {}
    for name, given in default.to_dict().items():
        chosen = 99 if "vocab_size" in name else table.get(name)
        if chosen is not None and type(given) is int and (level < 2 or any(word in name for word in ONLY_FEW)):
            sizes[name] = min(chosen, given) if given > 0 else given
        if name.endswith("_token_id") and type(given) is int and given > 2:
            sizes[name] = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}.get(name, 0)
        if name == "sliding_window" and type(given) is int:
            sizes[name] = 5
        if name == "rope_parameters" and isinstance(given, dict) and ("mrope_section" in given or level == 1):
            sizes[name] = given | {"mrope_section": [1, 1, 2]}
    if "num_hidden_layers" in sizes:
        sizes["num_hidden_layers"] = max(sizes["num_hidden_layers"], _layers_of_all_types(default))
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, transformers.PreTrainedConfig):
            sizes[name] = _small(type(part), level) | {"model_type": part.model_type}
    return sizes | OWN.get(config_class.model_type, {})


def _layers_of_all_types(config: Any) -> int:
    """Return how many layers it takes for each type of layer that a model has, if it is not many."""
    types = getattr(config, "layer_types", None) or [""]
    layers = max(types.index(each) for each in set(types)) + 1
    return layers if layers <= 8 else 0


def classes(kind: str) -> list[str]:
    """Return the names of the model classes of a kind: what it is, and what generates with it."""
    found: list[str] = []
    for mapping in (
        "MODEL_MAPPING_NAMES",
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    ):
        named = getattr(modeling_auto, mapping).get(kind, ())
        found += [named] if isinstance(named, str) else list(named)
    return [name for name in dict.fromkeys(found) if hasattr(transformers, name)]


def randomise(model: Any, seed: int = 0) -> None:
    """Give a model weights with which its attention differs from key to key."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.is_floating_point():
                width = 1.5 / max(parameter[0].numel(), 1) ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * width)


def kept_tokens(padding: str, length: int = LENGTH) -> Any:
    """Return the attention mask of a batch: all ones, or with padding on one side."""
    kept = torch.ones((BATCH, length), dtype=torch.long)
    if padding == "right":
        kept[0, length - length // 3 :] = kept[2, length - length // 2 :] = 0
    elif padding == "left":
        kept[0, : length // 3] = kept[2, : length // 2] = 0
    return kept


def given_to(model: Any, padding: str = "none") -> Iterator[dict[str, Any]]:
    """Yield what a model may want to be given, the simplest first."""
    takes = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Any:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(model.dtype)

    tokens = torch.randint(3, 90, (BATCH, LENGTH), generator=generator)
    config = model.config
    text: dict[str, Any] = {}
    if "input_ids" in takes or "tokens" in takes:
        text["input_ids"] = tokens
        if padding != "none" and "attention_mask" in takes:
            text["attention_mask"] = kept_tokens(padding)
        if "decoder_input_ids" in takes:
            text["decoder_input_ids"] = tokens[:, :7]
        if "bbox" in takes:
            corners = torch.randint(0, 20, (BATCH, LENGTH, 4), generator=generator)
            corners[..., 2:] += corners[..., :2]
            text["bbox"] = corners
        if main_input(model) == "input_ids" or "pixel_values" not in takes:
            yield text
    if "pixel_values" in takes:
        vision = getattr(config, "vision_config", None) or config
        channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", 3)
        for size in dict.fromkeys((_size(vision), 32, 64, 224)):
            yield text | {"pixel_values": random(BATCH, channels, size, size)}
            if "decoder_input_ids" in takes:
                yield {"pixel_values": random(BATCH, channels, size, size), "decoder_input_ids": tokens[:, :7]}
            yield {"pixel_values": random(BATCH, 4, channels, size, size)}
    heard = {"decoder_input_ids": tokens[:, :7]} if "decoder_input_ids" in takes else {}
    if "input_values" in takes:
        mask = {"attention_mask": kept_tokens(padding, 2000)} if padding != "none" and "attention_mask" in takes else {}
        yield {"input_values": random(BATCH, 2000)} | heard | mask
        yield {"input_values": random(BATCH, 1, 2000)} | heard
        yield {"input_values": random(BATCH, 64, getattr(config, "num_mel_bins", 80))} | heard
    if "input_features" in takes:
        bands = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", 80)
        bands = getattr(config, "input_feat_per_channel", bands)
        for frames in (64, 128, 100):
            mask = {"attention_mask": kept_tokens(padding, frames)} if padding != "none" else {}
            yield {"input_features": random(BATCH, frames, bands)} | heard | mask
            yield {"input_features": random(BATCH, bands, frames)} | heard


def main_input(model: Any) -> str:
    return str(getattr(model, "main_input_name", "input_ids"))


def _size(config: Any) -> int:
    size = getattr(config, "image_size", None) or getattr(config, "pretrain_image_size", None) or 32
    return int(size if isinstance(size, int) else size[0])


def build(name: str, config: Any, implementation: Any, dtype: Any = torch.float32) -> Any:
    """Return a model of a class, evaluating."""
    torch.manual_seed(0)
    model = getattr(transformers, name)._from_config(config, attn_implementation=implementation)
    randomise(model)
    return model.to(dtype).eval()


def tensors(out: Any) -> dict[str, Any]:
    """Return what a model returns, tensors alone, by name."""
    found: dict[str, Any] = {}
    for key, entry in out.items() if hasattr(out, "items") else enumerate(out):
        if torch.is_tensor(entry):
            if entry.is_floating_point():
                found[str(key)] = entry
        elif isinstance(entry, (tuple, list)) or (hasattr(entry, "items") and not hasattr(entry, "layers")):
            found |= {f"{key}.{name}": tensor for name, tensor in tensors(entry).items()}
    return found


def looked_at(tensor: Any, kept: Any | None) -> Any:
    """Return a result without what was computed for padding."""
    if kept is None or tensor.ndim < 2 or tensor.shape[0] != kept.shape[0]:
        return tensor
    if tensor.shape[1] == kept.shape[1]:
        there = kept.bool()
    elif kept.shape[1] != LENGTH:  # frames of a sound: those that padding is far from
        frames = torch.arange(tensor.shape[1])
        there = frames[None] < (kept.sum(1, keepdim=True) * tensor.shape[1] / kept.shape[1] - 3)
    else:
        return tensor
    return torch.where(
        there.reshape(*there.shape, *[1] * (tensor.ndim - 2)), tensor, torch.zeros((), dtype=tensor.dtype)
    )


def kinds() -> list[str]:
    """Return the kinds of models that transformers has."""
    return [kind for kind in CONFIG_MAPPING_NAMES if classes(kind)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' remarks about small models from the terminal."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
