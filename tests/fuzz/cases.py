"""A case for each seed: a function of the package, a call of it, and what stands in that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tolerances
from fuzz.draws import Draws
from fuzz.paths import FUNCTIONS, PATHS, Draw, Runner, without
from strategies import Call, bias_in

from fastattn.call.halves import is_floating
from fastattn.cpu.host import kernels

GENERATION = 100_000  # seeds with the same few functions
LARGEST_DISTANCE = 1e3  # between positions, but for those that are far away from all


class NotCompiledError(Exception):
    """A call would have to compile something, and is not to."""


class Outcome(NamedTuple):
    """How many calls a case has made, and what stood in it."""

    calls: int
    traits: list[str]


def drawn(draw: Draw, path: str) -> Call:
    """Draw a call for a path, without what it has no option for.

    Nor with a function that makes infinity of what mask and slopes have made of scores: the wider type has numbers
    for that.
    """
    call = without(PATHS[path].strategy(draw), PATHS[path].without)
    score_mod, bias, slopes = call.options.get("score_mod"), bias_in(call.attn_mask), call.options.get("alibi_slopes")
    if score_mod is None:
        return call
    added = [tolerances.largest(np.asarray(array)) for array in (bias, slopes) if array is not None]
    real = np.float64 if call.query.dtype == np.float64 else np.float32
    most = LARGEST_DISTANCE * max(added, default=0.0) * max(1.0, score_mod.steepest)
    return without(call, ("score_mod",)) if most > float(np.finfo(real).max) else call


def path_of(seed: int) -> str:
    """Return the path of a seed: all of them are taken in turn."""
    return list(PATHS)[seed % len(PATHS)]


def run(seed: int) -> Outcome:
    """Make the calls of a seed, and assert that they are right."""
    draw, path = Draws(seed, seed // GENERATION), path_of(seed)
    call = drawn(draw, path)
    runner = Runner(draw)
    try:
        PATHS[path].check(draw, call, runner)
    except NotCompiledError:
        raise
    except Exception as error:
        raise AssertionError(f"{path}: {call!r}") from error
    return Outcome(runner.count, [f"path {path}", *traits_of(call)])


def compile_nothing() -> None:
    """Have calls that would compile something raise an error."""

    def refuse(*_: Any) -> bytes:
        raise NotCompiledError

    kernels.compile_kernel = refuse


def traits_of(call: Call) -> Iterator[str]:
    """Yield what stands in a call, in words."""
    query, key = call.query, call.key
    yield f"dtype {query.dtype.newbyteorder('=')}"
    yield f"queries {size_of(query.shape[-2])}"
    yield f"keys {size_of(key.shape[-2])}"
    yield f"features {size_of(query.shape[-1])}"
    yield f"rank {min(query.ndim, 5)}"
    if any(is_odd(array) for array in call.args[:3]):
        yield "odd numbers"
    if any(not array.flags.c_contiguous for array in call.args[:3]):
        yield "strides"
    if call.attn_mask is not None:
        bias = bias_in(call.attn_mask)
        yield "mask of booleans" if bias is None else f"mask {bias.dtype.newbyteorder('=')}"
        if isinstance(call.attn_mask, tuple):
            yield "mask, a pair"
    for name, option in call.options.items():
        if name in FUNCTIONS[:2]:
            yield f"{name} {option.__name__}"
        elif name == "is_causal" and option:
            yield f"is_causal {option}"
        elif name == "enable_gqa" and option and query.shape[-3:-2] != key.shape[-3:-2]:
            yield "groups"
        elif name in ("query_offset", "alibi_slopes", "sinks"):
            yield f"{name}{' of rows' if np.ndim(option) > (name != 'query_offset') else ''}"
        elif name not in ("is_causal", "enable_gqa", "rng", "weight") and option is not None:
            yield name


def size_of(length: int) -> str:
    """Return about how long an axis is: borders are those of kernels for few queries, and of blocks."""
    return next((f"up to {most}" for most in (0, 1, 8, 64, 128) if length <= most), "more")


def is_odd(array: Any) -> bool:
    """Whether something in an array is not finite."""
    return is_floating(array.dtype) and not np.isfinite(array.astype(np.float64)).all()


def pairs(traits: list[str]) -> Iterator[str]:
    """Yield the pairs of traits."""
    ordered = sorted(set(traits))
    for number, one in enumerate(ordered):
        for other in ordered[number + 1 :]:
            yield f"{one} & {other}"
