"""Floating-point modes that a thread may be in, and calls whose results would depend on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from llvmlite import binding as llvm

import fastattn
from fastattn.cpu.host import session
from fastattn.machine import loading as machine
from fastattn.machine.features import HOST
from fastattn.machine.libraries import Library
from fastattn.machine.table import host

# What the control register holds. On x86-64 its lowest bits, exceptions that have occurred, are no part of the mode.
RAISED = 0x3F
X86 = {"default": 0x1F80, "flush": 0x9FC0, "up": 0x5F80, "toward zero": 0x7F80}
AARCH64 = {"default": 0, "flush": 1 << 24, "up": 1 << 22, "toward zero": 3 << 22}
# before LLVM 17 a pointer says what it points at
BYTES, WORD = ("i8*", "i32*") if llvm.llvm_version_info < (17,) else ("ptr", "ptr")
X86_FUNCTIONS = f"""
declare void @llvm.x86.sse.stmxcsr({BYTES})
declare void @llvm.x86.sse.ldmxcsr({BYTES})
define i64 @get() {{
    %at = alloca i32
    %bytes = bitcast {WORD} %at to {BYTES}
    call void @llvm.x86.sse.stmxcsr({BYTES} %bytes)
    %word = load i32, {WORD} %at
    %wide = zext i32 %word to i64
    ret i64 %wide
}}
define i64 @set(i64 %wide) {{
    %at = alloca i32
    %bytes = bitcast {WORD} %at to {BYTES}
    %word = trunc i64 %wide to i32
    store i32 %word, {WORD} %at
    call void @llvm.x86.sse.ldmxcsr({BYTES} %bytes)
    ret i64 0
}}
"""
AARCH64_FUNCTIONS = """
declare i64 @llvm.aarch64.get.fpcr()
declare void @llvm.aarch64.set.fpcr(i64)
define i64 @get() {
    %word = call i64 @llvm.aarch64.get.fpcr()
    ret i64 %word
}
define i64 @set(i64 %word) {
    call void @llvm.aarch64.set.fpcr(i64 %word)
    ret i64 0
}
"""
is_x86 = HOST == "x86-64"
is_known = is_x86 or HOST == "arm64"
WORDS, FUNCTIONS = (X86, X86_FUNCTIONS) if is_x86 else (AARCH64, AARCH64_FUNCTIONS)
MODES = [name for name in WORDS if name != "default"]
needs_modes = pytest.mark.skipif(not is_known, reason="this machine's control register is not known")


def _library() -> Library:
    module = llvm.parse_assembly(FUNCTIONS)
    return Library(machine.target_machine(host()).emit_object(module), host(), {"get": 0, "set": 1})


register = _library() if is_known else None


@contextmanager
def thread_in(mode: str) -> Iterator[Callable[[], bool]]:
    """Have this thread in a mode; what comes is a function that tells whether it is in there still."""
    assert register is not None
    register.set(WORDS[mode])
    try:
        yield lambda: register.get() & ~RAISED == WORDS[mode]
    finally:
        register.set(WORDS["default"])


def _arrays(dtype: Any, *shapes: tuple[int, ...], seed: int = 0, size: float = 1.0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal(shape) * size).astype(dtype) for shape in shapes]


class Calls:
    """Every function, on arrays of one dtype. Some of their numbers are subnormal, or make results so."""

    def __init__(self, dtype: Any) -> None:
        tiny = float(np.finfo(dtype).tiny)
        # key and value are broadcast, so their gradients are sums; 1/sqrt(24), the scale, rounds
        shapes = (2, 4, 37, 24), (1, 2, 70, 24), (1, 2, 70, 9)
        self.query, self.key, self.value = _arrays(dtype, *shapes)
        self.mixed = self.query.astype(np.float64), (self.key * 2.0**-128).astype(np.float32)
        self.value[..., :4] *= tiny / 4
        self.key[..., 5] *= tiny / 4
        self.query[..., 5] /= tiny * 4
        self.grad_out = _arrays(dtype, (2, 4, 37, 9), seed=1)[0]
        self.grad_out[:, :, ::2] *= tiny / 4
        wide, half = _arrays(np.float64, (37, 70), (4, 1, 70), seed=2, size=3.0)
        wide[3], half[0, 0, 3] = -np.inf, 6e-8
        self.masks = {"same": wide.astype(dtype), "other": wide if dtype == np.float32 else wide.astype(np.float32)}
        self.masks["half"] = half.astype(np.float16)
        self.options: dict[str, Any] = {"enable_gqa": True}
        self.rows = _arrays(dtype, (2, 33, 12), (2, 50, 12), (2, 50, 6), (12,), (2, 33, 6), seed=3)
        self.rows[2][..., :3] *= tiny / 4
        self.rows[4][..., ::2] *= tiny / 4
        self.rows[4][:, ::2] *= tiny / 4

    def attention(self) -> Any:
        return fastattn.attention(self.query, self.key, self.value, **self.options, return_lse=True)

    def masked(self) -> Any:
        given = self.query, self.key, self.value
        return [
            result
            for mask in self.masks.values()
            for result in fastattn.attention(*given, mask, is_causal=True, **self.options, return_weights=True)
        ]

    def dropout(self) -> Any:
        return fastattn.attention(self.query, self.key, self.value, None, 0.3, rng=5, **self.options)

    def mixed_dtypes(self) -> Any:
        query, key = self.mixed
        return fastattn.attention(query, key, self.value, self.masks["same"], scale=2.0**128 / 3, **self.options)

    def backward(self) -> Any:
        given = self.query, self.key, self.value
        plain = fastattn.attention(*given, **self.options, return_lse=True)
        found = list(fastattn.attention_backward(self.grad_out, *given, *plain, **self.options))
        for mask in self.masks.values():
            masked = fastattn.attention(*given, mask, **self.options, return_lse=True)
            found += fastattn.attention_backward(
                self.grad_out, *given, *masked, mask, **self.options, grad_lse=masked[1], grad_mask=True
            )
        return found

    def varlen(self) -> Any:
        query, key, value = (array[0].swapaxes(0, 1) for array in (self.query, self.key, self.value))
        lengths = [0, 5, 37], [0, 50, 70]
        out, lse = fastattn.attention_varlen(query, key, value, *lengths, **self.options, return_lse=True)
        grad_out = self.grad_out[0].swapaxes(0, 1)
        call = grad_out, query, key, value, out, lse, *lengths
        return [out, lse, *fastattn.attention_varlen_backward(*call, **self.options)]

    def paged(self) -> Any:
        query, key, value = (array.swapaxes(1, 2) for array in (self.query, self.key, self.value))
        pages = [array.reshape(2, 35, 2, -1) for array in (key, value)]
        call = query, *pages, np.array([[1, 0], [0, -1]]), np.array([60, 35])
        return [
            *fastattn.attention_paged(*call, is_causal="bottom-right", return_lse=True),
            fastattn.attention_paged(query[:, 0], *call[1:], [0, 1, 2]),
        ]

    def cached(self) -> Any:
        query, key, value = self.query[:1], self.key, self.value
        found: list[Any] = []
        for dtype in ("bfloat16", "int8"):
            cache = fastattn.KVCache(1, 2, 24, 9, dtype=dtype)
            cache.append(key, value)
            found += cache.attention(query, return_lse=True)
            found.append(cache.attention(query, scale=1e-60, backend="reference"))
        return found

    def merge(self) -> Any:
        out, lse = self.attention()
        return fastattn.merge([out, out[..., ::-1], self.grad_out], [lse, lse[..., ::-1], lse[:, ::-1]])

    def chosen(self) -> Any:
        lse = fastattn.attention(self.query, self.key, self.value, **self.options, return_lse=True)[1]
        rows = {"rows": [0, 5, 36], "columns": slice(3, 60)}
        return [
            fastattn.attention_weights(self.query, self.key, **self.options, **rows),
            fastattn.attention_weights(self.query, self.key, **self.options, **rows, lse=lse),
        ]

    def summary(self) -> Any:
        found = fastattn.attention_summary(self.query, self.key, self.masks["half"], **self.options, top_k=3)
        return [found.top_weights, found.top_indices, found.entropy, found.lse, found.received]

    def additive(self) -> Any:
        *given, _ = self.rows
        return [
            *fastattn.additive_attention(*given, return_lse=True),
            *fastattn.additive_attention(*given, is_causal=True, return_weights=True),
        ]

    def additive_backward(self) -> Any:
        *given, grad_out = self.rows
        results = fastattn.additive_attention(*given, return_lse=True)
        return fastattn.additive_attention_backward(grad_out, *given, *results)


CALLS = [name for name in vars(Calls) if not name.startswith("_")]


def _bits(results: Any) -> list[bytes]:
    arrays = results if isinstance(results, (list, tuple)) else [results]
    assert not any(np.isnan(array).any() for array in arrays)
    return [array.tobytes() for array in arrays]


def forget_plans() -> None:
    session.current.plans = session.Plans()


def check(*dtypes: Any, names: Iterable[str] = CALLS) -> int:
    """Assert that calls have the same bits in all modes; return how many there were.

    In each mode, one is planned anew, and one finds the plan.
    """
    count = 0
    for dtype in dtypes:
        calls = Calls(dtype)
        for name in names:
            wanted = _bits(getattr(calls, name)())
            for mode in MODES:
                forget_plans()
                with thread_in(mode) as is_still:
                    first = getattr(calls, name)()
                    is_first_still = is_still()
                    second = getattr(calls, name)()
                    assert is_first_still, (name, mode)
                    assert is_still(), (name, mode)
                assert _bits(first) == wanted, (name, mode)
                assert _bits(second) == wanted, (name, mode)
                count += 1
    return count
