"""Try every class of models of transformers that can be made small: attn_implementation="fastattn" against "eager".

Run it as ``python tests/transformers_survey.py``; it takes about an hour, each class in a process of its own. It writes
the table of docs/integrations.md, between the markers ``<!-- models:begin -->`` and ``<!-- models:end -->``. ``--only
bert gpt2`` tries some kinds of models, and prints what it found. With ``--out FILE`` what was found is kept, a line of
JSON for each class, and a class that the file has is not tried again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import small_models
import torch
import transformers

from fastattn.integrations import transformers as ours

DOCS = Path(__file__).parents[1] / "docs" / "integrations.md"
BEGIN, END = "<!-- models:begin -->", "<!-- models:end -->"

#: How far apart results may be, of the largest; gradients have come through every layer twice.
TOLERANCE = {"": 1e-3, "gradients": 1e-2}

#: What is found, in the order of the table.
OUTCOMES = {
    "computed": "Attention by fastattn, eager's result.",
    "own": "No layer asks for attention, and none for a mask: eager's result.",
    "class": "Refused when the model is made: its layers compute attention themselves.",
    "option": "Refused in the first call: an option of attention that fastattn does not compute.",
    "wrong": "Something else.",
    "not built": "Not tried: cannot be made small, needs another package, or takes what the script does not give.",
}
PARAMETERS = 50_000_000


def outcome(kind: str, name: str) -> dict[str, Any]:
    """Return what comes of a class of models, and why."""
    calls = 0
    attention = ours.attention

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return attention(*args, **options)

    try:
        level, index = buildable(kind, name)
    except Exception as error:
        return {"outcome": "not built", "why": said(error)}
    ours.register()
    transformers.AttentionInterface.register("fastattn", counted)
    try:
        found = compared(kind, name, level, index, torch.float32)
        if found["outcome"] == "wrong":  # or what is left of it in float32
            found = compared(kind, name, level, index, torch.float64)
    finally:
        ours.register()
    return found | ({} if calls or found["outcome"] != "computed" else {"outcome": "own"})


def compared(kind: str, name: str, level: int, index: int, dtype: Any) -> dict[str, Any]:
    """Return whether a class has eager's results, or how it is refused."""
    refused = None
    try:
        for part, eager, own in pairs(kind, name, level, index, dtype):
            if isinstance(own, ValueError) and "fastattn does not compute it" in str(own):
                refused = {"outcome": "option", "why": str(own)}
            elif isinstance(own, Exception) and not isinstance(eager, Exception):
                return {"outcome": "wrong", "why": f"{part}: {said(own)}"}
            elif not isinstance(eager, Exception):
                apart = difference(own, eager)
                if not apart <= TOLERANCE["gradients" if "gradients" in part else ""]:
                    return {"outcome": "wrong", "why": f"{part}: {apart:.1e} apart"}
    except ValueError as error:
        refusing = "its layers compute" in str(error) or "its attention is one of" in str(error)
        return {"outcome": "class", "why": str(error)} if refusing else {"outcome": "wrong", "why": said(error)}
    except Exception as error:
        return {"outcome": "wrong", "why": said(error)}
    return refused or {"outcome": "computed", "why": ""}


def buildable(kind: str, name: str) -> tuple[int, int]:
    """Return at which level a class can be made, and which of the inputs it takes, with eager's attention."""
    reasons: list[str] = []
    for level in small_models.LEVELS:
        try:
            config = small_models.small_config(kind, level)
            with torch.device("meta"):
                model = getattr(transformers, name)._from_config(config, attn_implementation="eager")
            size = sum(parameter.numel() for parameter in model.parameters())
            if size > PARAMETERS:
                raise RuntimeError(f"{size / 1e6:.0f} million parameters")
            model = small_models.build(name, small_models.small_config(kind, level), "eager")
        except Exception as error:
            reasons.append(said(error))
            continue
        for index, given in enumerate(small_models.given_to(model)):
            try:
                with torch.no_grad():
                    found = small_models.tensors(model(**given))
                if found and all(bool(tensor.isfinite().all()) for tensor in found.values()):
                    return level, index
                reasons.append("nothing, or nothing finite")
            except Exception as error:
                reasons.append(said(error))
    raise RuntimeError("; ".join(reasons[:3]))


def pairs(kind: str, name: str, level: int, index: int, dtype: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield what is computed, with eager's attention and with ours: tensors by name, or an exception."""
    both = [
        small_models.build(name, small_models.small_config(kind, level), implementation, dtype)
        for implementation in ("eager", "fastattn")
    ]
    for padding in ("none", "right", "left"):
        given = list(small_models.given_to(both[0], padding))[index]
        if padding != "none" and "attention_mask" not in given:
            continue
        eager, own = (results(model, given) for model in both)
        for part, wanted in eager.items():
            yield f"{padding} {part}", wanted, own.get(part, own["forward"])


def results(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return what a model computes: forward, gradients, what it generates; an exception in place of what it cannot."""
    found: dict[str, Any] = {}
    model.zero_grad()
    torch.manual_seed(0)
    try:
        kept = given.get("attention_mask")
        out = {key: small_models.looked_at(each, kept) for key, each in small_models.tensors(model(**given)).items()}
        found["forward"] = {key: tensor.detach() for key, tensor in out.items()}
        shares = [tensor / tensor.detach().abs().max().clamp(min=1) for tensor in out.values() if tensor.requires_grad]
        losses = [share.sin().sum() for share in shares]  # a sine of thousands would be rounding, and nothing else
        if losses:
            torch.stack(losses).sum().backward()
            named = model.named_parameters()
            found["gradients"] = {key: each.grad.clone() for key, each in named if each.grad is not None}
    except Exception as error:
        found["forward"] = error
    if model.can_generate() and set(given) <= {"input_ids", "attention_mask", "decoder_input_ids"}:
        start = {"decoder_start_token_id": 1} if model.config.is_encoder_decoder else {}
        text = {key: tensor for key, tensor in given.items() if key != "decoder_input_ids"}
        try:
            tokens = model.generate(
                **text, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0, **start
            )
            found["generated"] = {"tokens": tokens.double()}
        except Exception as error:
            found["generated"] = error
    return found


def difference(some: dict[str, Any], others: dict[str, Any]) -> float:
    """Return how far results are apart, of the largest of each, or of a thousandth of the largest of all."""
    if {key: tensor.shape for key, tensor in some.items()} != {key: tensor.shape for key, tensor in others.items()}:
        return float("inf")
    filled = {key: tensor for key, tensor in others.items() if tensor.numel()}
    largest = {key: float(tensor.abs().max()) for key, tensor in filled.items()}
    floor = max(1e-3 * max(largest.values(), default=0.0), 1e-30)
    apart = [float((some[key] - each).abs().max()) / max(largest[key], floor) for key, each in filled.items()]
    return max((each if each == each else float("inf") for each in apart), default=0.0)


def said(error: BaseException) -> str:
    """Return an exception in a line, with the place it comes from."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"


def in_a_child(kind: str, name: str, seconds: int) -> dict[str, Any]:
    """Try a class in a process of its own, for so long."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        found = {"outcome": "not built", "why": "stopped"}
        try:
            with small_models.quiet():
                found = outcome(kind, name)
        finally:
            os.write(writing, json.dumps(found).encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        written = pipe.read()
    os.waitpid(child, 0)
    ended = {"outcome": "not built", "why": f"it takes more than {seconds} seconds, or more memory than there is"}
    return {"kind": kind, "class": name} | (json.loads(written) if written else ended)


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return the table of the documentation: for each outcome its kinds of models, each where its worst class is."""
    order = [*(outcome for outcome in OUTCOMES if outcome != "not built")]
    worst: dict[str, str] = {}
    for entry in found:
        before = worst.get(entry["kind"], "not built")
        if entry["outcome"] != "not built" and (
            before == "not built" or order.index(before) < order.index(entry["outcome"])
        ):
            worst[entry["kind"]] = entry["outcome"]
        worst.setdefault(entry["kind"], "not built")
    lines = ["| | kinds of models | classes |", "|---|---|---|"]
    for each, sentence in OUTCOMES.items():
        kinds = sorted(kind for kind, outcome in worst.items() if outcome == each)
        classes = len({entry["class"] for entry in found if entry["outcome"] == each})
        if kinds and each != "not built":
            lines.append(f"| {sentence} | {', '.join(kinds)} | {classes} |")
        elif kinds:
            lines.append(f"| {sentence} | {len(kinds)} others | {classes} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Try, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="KIND", help="these kinds of models, and write no table")
    parser.add_argument("--out", type=Path, help="a file to which what was found is added, and where it is looked up")
    parser.add_argument("--seconds", type=int, default=120, help="how long a class may take")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)
    known = args.out.read_text("utf-8").splitlines() if args.out and args.out.exists() else []
    found = {(entry["kind"], entry["class"]): entry for entry in map(json.loads, known)}
    for kind in args.only or small_models.kinds():
        for name in small_models.classes(kind):
            if (kind, name) not in found:
                found[kind, name] = entry = in_a_child(kind, name, args.seconds)
                if args.out:
                    with args.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(entry) + "\n")
            entry = found[kind, name]
            print(f"{entry['outcome']:<10}{name}  {entry['why'][:150]}", flush=True)
    if not args.only:
        text = DOCS.read_text("utf-8")
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        DOCS.write_text(f"{before}{BEGIN}\n{table(list(found.values()))}\n{END}{after}", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
