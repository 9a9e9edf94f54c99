"""Try every model class of transformers that can be built small: what attn_implementation="fastattn" gives, and eager.

Run it as ``python tests/transformers_survey.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import small_models
import torch
from small_models import BATCH, LENGTH

from fastattn.integrations import transformers as ours

TOLERANCE = 1e-4
IMPLEMENTATIONS = ("eager", "fastattn", "sdpa")


def first_that_works(model: Any) -> int:
    """Return which of the inputs a model takes."""
    reasons = []
    for index, given in enumerate(small_models.given_to(model)):
        try:
            with torch.no_grad():
                found = small_models.tensors(model(**given))
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {str(error)[:100]}")
            continue
        if found and all(bool(t.isfinite().all()) for t in found.values() if t.numel()) :
            return index
        reasons.append("nothing finite")
    raise RuntimeError("; ".join(reasons[:3]) or "no inputs")


def input_of(model: Any, index: int, padding: str) -> dict[str, Any]:
    return list(small_models.given_to(model, padding))[index]


def outcome(name: str, config_of: Any, index: int, implementation: str, dtype: Any) -> dict[str, Any]:
    """Compute everything with one implementation."""
    results: dict[str, Any] = {}
    model = small_models.build(name, config_of(), implementation, dtype)
    for padding in ("none", "right", "left"):
        given = input_of(model, index, padding)
        if padding != "none" and "attention_mask" not in given:
            continue
        kept = given.get("attention_mask")
        model.zero_grad()
        torch.manual_seed(0)
        try:
            out = small_models.tensors(model(**given))
            shown = {key: small_models.looked_at(tensor, kept) for key, tensor in out.items()}
            results[padding] = {key: tensor.detach() for key, tensor in shown.items()}
            loss = sum(tensor.sin().sum() for tensor in shown.values() if tensor.requires_grad)
            if torch.is_tensor(loss):
                loss.backward()
                grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
                results[padding + " gradients"] = grads
        except Exception as error:
            results[padding] = error
        if model.can_generate() and "input_ids" in given and len(given) - ("attention_mask" in given) - ("decoder_input_ids" in given)== 1:
            given.pop("decoder_input_ids", None)
            try:
                with torch.no_grad():
                    generated = model.generate(**given, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0, **({'decoder_start_token_id': 1} if model.config.is_encoder_decoder else {}))
                results[padding + " generate"] = {"tokens": generated}
            except Exception as error:
                results[padding + " generate"] = error
    return results


def difference(some: Any, others: Any) -> float:
    if set(some) != set(others):
        return float("inf")
    worst = 0.0
    scale = max((float(t.abs().max()) for t in others.values() if t.numel()), default=1.0)
    for key, tensor in others.items():
        if some[key].shape != tensor.shape:
            return float("inf")
        if tensor.numel():
            own = max(float(tensor.abs().max()), 1e-3 * scale, 1e-30)
            apart = float((some[key] - tensor).abs().max()) / own
            worst = max(worst, apart if apart == apart else float("inf"))
    return worst


def said(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    at = frames[-1]
    return f"{type(error).__name__}: {str(error)[:300]} [{Path(at.filename).name}:{at.lineno}]"


def survey(kind: str, name: str) -> dict[str, Any]:
    """Return what is to be said of a class."""
    calls = [0]
    unsaid: set[str] = set()
    inner = ours.attention

    def counted(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if args[4] is None and args[1].shape[2] > 1:
            unsaid.add(f"{type(args[0]).__name__} {options.get('is_causal')} {getattr(args[0], 'is_causal', 'absent')}")
        return inner(*args, **options)

    ours.attention = counted  # type: ignore[assignment]
    ours.register()
    reason = ""
    for level in (0, 1, 2):
        for dtype in (torch.float32, torch.float64):
            try:
                config_of = lambda: small_models.small_config(kind, level)  # noqa: E731
                with torch.device("meta"):
                    size = sum(p.numel() for p in getattr(__import__("transformers"), name)._from_config(config_of(), attn_implementation="eager").parameters())
                if size > 5e7:
                    raise RuntimeError(f"{size / 1e6:.0f} million parameters")
                model = small_models.build(name, config_of(), "eager", dtype)
                index = first_that_works(model)
                break
            except Exception as error:
                reason = reason or said(error)
        else:
            continue
        break
    else:
        return {"status": "not built", "reason": reason}
    del model
    found: dict[str, Any] = {}
    for implementation in IMPLEMENTATIONS:
        try:
            found[implementation] = outcome(name, config_of, index, implementation, dtype)
        except Exception as error:
            found[implementation] = said(error)
    entry: dict[str, Any] = {"level": level, "dtype": str(dtype), "size": size, "calls": calls[0], "parts": {}, "unsaid": sorted(unsaid)}
    eager = found["eager"]
    for implementation in ("fastattn", "sdpa"):
        theirs = found[implementation]
        if isinstance(theirs, str):
            entry[implementation] = theirs
            continue
        for part, wanted in eager.items():
            got = theirs.get(part)
            if isinstance(wanted, Exception):
                line = "eager: " + said(wanted)
            elif isinstance(got, Exception):
                line = said(got)
            elif got is None:
                line = "missing"
            elif "tokens" in wanted:
                line = 0.0 if torch.equal(wanted["tokens"], got["tokens"]) else float("inf")
            else:
                line = difference(got, wanted)
            entry["parts"].setdefault(part, {})[implementation] = line
    entry["status"] = "tried"
    return entry


def in_a_child(kind: str, name: str, seconds: int, out: Path) -> None:
    """Try a class in a process of its own."""
    child = os.fork()
    if child == 0:
        code = 0
        try:
            sys.stdout.flush()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            os.dup2(null, 1)
            signal.alarm(seconds)
            started = time.perf_counter()
            with small_models.quiet():
                try:
                    entry = survey(kind, name)
                except Exception as error:
                    entry = {"status": "not built", "reason": said(error)}
            entry |= {"kind": kind, "class": name, "seconds": round(time.perf_counter() - started, 1)}
            with out.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        except BaseException:
            code = 1
        os._exit(code)
    _, status = os.waitpid(child, 0)
    if status:
        with out.open("a") as file:
            file.write(json.dumps({"kind": kind, "class": name, "status": "died", "reason": str(status)}) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=int, default=90)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with small_models.quiet():
        for kind in args.names or small_models.kinds():
            for name in small_models.classes(kind):
                in_a_child(kind, name, args.seconds, args.out)
                print(kind, name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
