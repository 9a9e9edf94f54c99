"""How fast on a GPU: fastattn's CUDA kernels and PyTorch's, on arrays that are in its memory already.

Measured as on the CPU, in alternating rounds of which medians are compared (`fastattn.bench.measure`), but a sample is
a queue of calls: the clock is stopped when the GPU has done them all. PyTorch has several kernels of attention, each of
which is an engine here: FlashAttention-2, cuDNN's, the "efficient" one of xFormers, and plain matrix products ("math").
"""

from __future__ import annotations

import importlib.metadata
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

import fastattn
from fastattn.bench.cases import Arguments
from fastattn.bench.host import Host, this_host
from fastattn.bench.measure import Effort, Result
from fastattn.bench.peers import OURS, Unavailable, check

__all__ = ["CASES", "ENGINES", "QUICK", "DeviceCase", "gpu_host", "measure", "why_not"]

TOKENS = 16384  # of all rows of a batch, as benchmarks of attention have it since FlashAttention's
WIDTH = 2048  # features of all heads
EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-17}


@dataclass(frozen=True)
class DeviceCase:
    """One row of the table.

    Parameters
    ----------
    kind : {"forward", "backward", "decode"}
        "decode": one query against many keys, grouped heads; measured is how fast keys and values are read.
    storage : str
        "float16", "bfloat16" or "float32".
    batch, heads, kv_heads, queries, keys, size : int
    causal : bool

    Examples
    --------
    >>> from fastattn.bench.gpu import DeviceCase
    >>> case = DeviceCase("forward", "bfloat16", 4, 16, 16, 4096, 4096, 128, causal=True)
    >>> case.name, case.unit, round(case.figure(1e-3))
    ('bfloat16 forward causal (4,16,4096,128)', 'TF/s', 275)
    """

    kind: Literal["forward", "backward", "decode"]
    storage: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    size: int
    causal: bool = False

    @property
    def name(self) -> str:
        """What tables and ``--case`` call it."""
        causal = " causal" if self.causal else ""
        return f"{self.storage} {self.kind}{causal} ({self.batch},{self.heads},{self.keys},{self.size})"

    @property
    def flops(self) -> int:
        """Operations of the two products, or five of a backward pass, half of them where causal."""
        products = 10 if self.kind == "backward" else 4
        whole = products * self.batch * self.heads * self.queries * self.keys * self.size
        return whole // 2 if self.causal else whole

    @property
    def bytes(self) -> int:
        """What keys and values take."""
        return 2 * self.batch * self.kv_heads * self.keys * self.size * (4 if self.storage == "float32" else 2)

    @property
    def unit(self) -> str:
        """What the table shows: 10^12 operations, or of decoding 10^9 bytes, a second."""
        return "GB/s" if self.kind == "decode" else "TF/s"

    def figure(self, seconds: float) -> float:
        """Return what the table shows, in its `unit`, of a call that takes so long."""
        return self.bytes / seconds / 1e9 if self.kind == "decode" else self.flops / seconds / 1e12


def _square(kind: Literal["forward", "backward"], storage: str, length: int, size: int, causal: bool) -> DeviceCase:
    heads = WIDTH // size
    return DeviceCase(kind, storage, TOKENS // length, heads, heads, length, length, size, causal)


_BOTH = (False, True)
CASES: tuple[DeviceCase, ...] = (
    *(
        _square("forward", "bfloat16", length, size, causal)
        for size in (64, 128)
        for causal in _BOTH
        for length in (1024, 2048, 4096, 8192, 16384)
    ),
    *(_square("forward", "float16", 4096, size, causal) for size in (64, 128) for causal in _BOTH),
    *(_square("forward", "float32", 4096, size, False) for size in (64, 128)),
    *(
        _square("backward", "bfloat16", length, size, causal)
        for size in (64, 128)
        for causal in _BOTH
        for length in (1024, 4096, 16384)
    ),
    *(_square("backward", "float16", 4096, size, True) for size in (64, 128)),
    *(DeviceCase("decode", "bfloat16", batch, 32, 8, 1, keys, 128) for batch, keys in ((1, 16384), (16, 16384))),
)
"""The whole table."""

QUICK = tuple(case for case in CASES if case.keys == 4096 and case.storage == "bfloat16" and case.size == 128)
"""A few of it."""


# -- arrays in device memory -------------------------------------------------------------------------------------------


def _torch() -> Any:
    """PyTorch, if it can use the GPU.

    Raises
    ------
    Unavailable
        If it cannot.
    """
    try:
        import torch
    except ImportError:
        raise Unavailable("PyTorch is not installed") from None
    if not torch.cuda.is_available():
        raise Unavailable("this build of PyTorch cannot use the GPU")
    return torch


def make_inputs(case: DeviceCase) -> tuple[dict[str, Any], Arguments]:
    """Make the inputs of a case, in device memory, and the same numbers in the host's as float32.

    They are PyTorch's tensors where it can use the GPU, else Numba's arrays, which bfloat16 is unknown to.

    Raises
    ------
    Unavailable
        If they cannot be made.
    """
    shapes = {
        "query": (case.batch, case.heads, case.queries, case.size),
        "key": (case.batch, case.kv_heads, case.keys, case.size),
        "value": (case.batch, case.kv_heads, case.keys, case.size),
    }
    if case.kind == "backward":
        shapes["grad_out"] = shapes["query"]
    generator = np.random.default_rng(0)
    host = {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    try:
        torch = _torch()
        device = {name: torch.from_numpy(x).to("cuda", getattr(torch, case.storage)) for name, x in host.items()}
        host = {name: tensor.float().cpu().numpy() for name, tensor in device.items()}
    except Unavailable:
        if case.storage == "bfloat16":
            raise Unavailable("only PyTorch makes arrays of bfloat16 on the GPU") from None
        from numba import cuda

        rounded = {name: x.astype(case.storage) for name, x in host.items()}
        device = {name: cuda.to_device(x) for name, x in rounded.items()}
        host = {name: x.astype(np.float32) for name, x in rounded.items()}
    query, key, value = host["query"], host["key"], host["value"]
    return device, Arguments(query, key, value, None, case.causal, host.get("grad_out"))


def to_host(array: Any) -> Any:
    """Copy an array of a result, or the first of several, to the host, as float32."""
    if isinstance(array, tuple):
        array = array[0]
    if hasattr(array, "copy_to_host"):
        return array.copy_to_host().astype(np.float32)
    return array.detach().float().cpu().numpy()


# -- engines -----------------------------------------------------------------------------------------------------------

Run = Callable[[], Any]


def _ours(case: DeviceCase, inputs: dict[str, Any]) -> Run:
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    options: dict[str, Any] = {"is_causal": case.causal, "enable_gqa": case.heads != case.kv_heads, "backend": "cuda"}
    if case.kind != "backward":
        return lambda: fastattn.attention(query, key, value, **options)
    out, lse = fastattn.attention(query, key, value, return_lse=True, **options)
    return lambda: fastattn.attention_backward(inputs["grad_out"], query, key, value, out, lse, **options)


def _pytorch(backend: str) -> Callable[[DeviceCase, dict[str, Any]], Run]:
    """PyTorch, with one of its kernels."""

    def build(case: DeviceCase, inputs: dict[str, Any]) -> Run:
        torch = _torch()
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = getattr(SDPBackend, backend)
        query, key, value = (inputs[name] for name in ("query", "key", "value"))

        def forward() -> Any:
            with sdpa_kernel(chosen):
                return torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, is_causal=case.causal, enable_gqa=case.heads != case.kv_heads
                )

        if case.kind != "backward":
            return forward
        query, key, value = (tensor.detach().requires_grad_() for tensor in (query, key, value))
        out = forward()
        return lambda: torch.autograd.grad(out, (query, key, value), inputs["grad_out"], retain_graph=True)

    return build


ENGINES: dict[str, Callable[[DeviceCase, dict[str, Any]], Run]] = {
    OURS.name: _ours,
    "flash": _pytorch("FLASH_ATTENTION"),
    "cuDNN": _pytorch("CUDNN_ATTENTION"),
    "efficient": _pytorch("EFFICIENT_ATTENTION"),
    "math": _pytorch("MATH"),
}
"""fastattn, and PyTorch's kernels."""


# -- measuring ---------------------------------------------------------------------------------------------------------


def why_not() -> str | None:
    """Say why nothing can be measured here; None if it can."""
    from fastattn.cuda.available import SIMULATED, missing

    return missing() or ("Numba simulates the GPU, and its times say nothing" if SIMULATED else None)


def gpu_host() -> Host:
    """Describe the GPU, and what is measured on it."""
    from fastattn.cuda.available import device, versions

    found = device()
    engines = {OURS.name: f"{fastattn.__version__} with {versions()}"}
    try:
        torch = _torch()
        engines |= {name: f"of PyTorch {torch.__version__}" for name in ENGINES if name != OURS.name}
    except Unavailable:
        pass
    capability = ".".join(map(str, found.capability))
    here = this_host()
    isa = (
        f"compute capability {capability}, driver for CUDA {found.driver}, numba {importlib.metadata.version('numba')}"
    )
    return Host(found.name, isa, here.system, engines, here.date)


def _synchronize() -> None:
    from numba import cuda

    cuda.synchronize()  # all streams of the device, PyTorch's too


def sample(run: Run, seconds: float) -> float:
    """Return the time of one call of many that were queued together, in about `seconds`."""
    clock = time.perf_counter
    _synchronize()
    begin = clock()
    run()
    _synchronize()
    count = max(1, math.ceil(seconds / (clock() - begin)))
    begin = clock()
    for _ in range(count):
        run()
    _synchronize()
    return (clock() - begin) / count


def measure(
    case: DeviceCase,
    effort: Effort | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    engines: Sequence[str] = tuple(ENGINES),
) -> Result:
    """Measure one case: every engine that can do it, and does it right, in alternation."""
    effort = effort or Effort()
    result = Result(case)
    try:
        inputs, arguments = make_inputs(case)
    except Unavailable as reason:
        result.absent = dict.fromkeys(engines, str(reason))
        return result
    runs: dict[str, Run] = {}
    for name in engines:
        progress(0, effort.rounds, f"preparing {name}")
        try:
            run = ENGINES[name](case, inputs)
            check(to_host(run()), arguments, 8 * EPSILON[case.storage])
        except Exception as reason:  # whatever a library may raise is its reason
            said = str(reason).strip().splitlines()
            result.absent[name] = said[0][:120] if said else type(reason).__name__
            continue
        runs[name], result.times[name] = run, []
    names = list(runs)
    order = random.Random(0)
    for number in range(effort.rounds):
        order.shuffle(names)
        for name in names:
            progress(number, effort.rounds, name)
            result.times[name].append(sample(runs[name], effort.seconds))
    return result
