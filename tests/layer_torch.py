"""The layers as their papers have them, written in PyTorch with explicit masks: what its autograd differentiates."""

from __future__ import annotations

from typing import Any

from fastattn import LuongAttention, MultiHeadAttention


def torch_softmax(torch: Any, scores: Any, visible: Any) -> Any:
    """Return softmaxed scores; rows with nothing visible are 0."""
    least = torch.where(visible, scores, -1e30)
    parts = torch.exp(least - least.detach().amax(-1, keepdim=True)) * visible
    total = parts.sum(-1, keepdim=True)
    return parts / torch.where(total > 0, total, torch.ones_like(total))


def capped(torch: Any, scores: Any, softcap: float | None) -> Any:
    """Return scores after a softcap."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def torch_multi_head(
    torch: Any, layer: MultiHeadAttention, w: Any, q: Any, k: Any, v: Any, visible: Any, added: Any, softcap: Any = None
) -> Any:
    """Evaluate multi-head attention; what is visible and added broadcasts to (..., H, Lq, Lk)."""
    if "in_proj_weight" in w:
        matrices = w["in_proj_weight"].split(layer.embed_dim)
    else:
        matrices = [w[name] for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
    biases = w["in_proj_bias"].split([len(matrix) for matrix in matrices]) if layer.bias else (0, 0, 0)
    heads = []
    for x, matrix, bias in zip((q, k, v), matrices, biases, strict=True):
        split = (x @ matrix.T + bias).unflatten(-1, (-1, layer.head_dim)).transpose(-2, -3)
        heads.append(split.repeat_interleave(layer.num_heads // split.shape[-3], dim=-3))
    scores = capped(torch, heads[0] @ heads[1].mT / layer.head_dim**0.5, softcap)
    context = torch_softmax(torch, scores + added, visible) @ heads[2]
    out = context.transpose(-2, -3).flatten(-2) @ w["out_proj.weight"].T
    return out + w["out_proj.bias"] if layer.bias else out


def torch_bahdanau(torch: Any, w: Any, q: Any, k: Any, v: Any, visible: Any, added: Any, softcap: Any = None) -> Any:
    """Evaluate Bahdanau's attention."""
    inside = (q @ w["query_weight"].T + w["bias"])[..., :, None, :] + (k @ w["key_weight"].T)[..., None, :, :]
    scores = capped(torch, torch.tanh(inside) @ w["weight"], softcap)
    return torch_softmax(torch, scores + added, visible) @ v


def torch_luong(
    torch: Any,
    layer: LuongAttention,
    w: Any,
    q: Any,
    k: Any,
    v: Any,
    visible: Any,
    added: Any,
    t: Any,
    S: Any,
    softcap: Any = None,
) -> Any:
    """Evaluate section 3 of Luong's paper; the ends of a window are no function of p."""
    if layer.score == "dot":
        scores = q @ k.mT
    elif layer.score == "general":
        scores = q @ w["score_weight"] @ k.mT
    else:
        h = q[..., :, None, :].expand(*q.shape[:-1], k.shape[-2], -1)
        s = k[..., None, :, :].expand(*q.shape[:-1], *k.shape[-2:])
        scores = torch.tanh(torch.cat([h, s], dim=-1) @ w["score_weight"].T) @ w["score_vector"]
    scores = capped(torch, scores, softcap)
    j = torch.arange(k.shape[-2], dtype=torch.float64)
    p = t[..., None]
    if layer.align == "local-p":
        p = S * torch.sigmoid(torch.tanh(q @ w["position_weight"].T) @ w["position_vector"])[..., None]
    if layer.align != "global":
        visible = visible & ((j - p.detach()).abs() <= layer.window)
    weights = torch_softmax(torch, scores + added, visible)
    if layer.align == "local-p":
        weights = weights * torch.exp(-((j - p) ** 2) / (2 * (layer.window / 2) ** 2))
    return weights @ v
