"""Who is measured: fastattn, and the other libraries that compute exact attention on CPUs.

Each engine turns a case into a function without arguments that makes the call, and nothing else: inputs are converted,
models compiled and outputs allocated beforehand, where the library allows it. Before it is timed, the result of each is
compared with `fastattn.reference`; an engine that cannot do a case, or does it wrong, is not timed, and says why.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastattn
from fastattn import reference
from fastattn.bench.cases import Arguments, Case
from fastattn.call.halves import BITS, cast, name_of
from fastattn.call.problem import FLOAT64
from fastattn.cpu.host import processors

__all__ = ["ENGINES", "OURS", "Call", "Engine", "Unavailable", "check", "cores", "prepare"]


#: What a result may be off by, by its dtype: a share. In half precision, two roundings: of weights, and of results.
LIMITS = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2e-5, "float64": 1e-12}


class Unavailable(Exception):
    """Why an engine does not take part in a case."""


@dataclass(frozen=True)
class Call:
    """A call that is ready to be timed.

    Attributes
    ----------
    run : callable
        Makes the call.
    result : callable
        Returns what the latest call computed, as an array.
    """

    run: Callable[[], Any]
    result: Callable[[], NDArray[Any]]


@dataclass(frozen=True)
class Engine:
    """A library that computes attention.

    Attributes
    ----------
    name : str
        What tables call it.
    packages : tuple of str
        What has to be installed; none for fastattn itself, which runs from its sources, too.
    build : callable
        Makes a `Call` of a case's arguments and a number of threads.
    build_backward : callable, optional
        Makes a `Call` of the backward pass, whose result is the gradient of the query.
    """

    name: str
    packages: tuple[str, ...]
    build: Callable[[Arguments, int], Call]
    build_backward: Callable[[Arguments, int], Call] | None = None

    @property
    def version(self) -> str:
        """The installed version.

        Raises
        ------
        Unavailable
            If a package is not installed.
        """
        if not self.packages:
            return fastattn.__version__
        try:
            version, *_ = [importlib.metadata.version(package) for package in self.packages]
            return version
        except importlib.metadata.PackageNotFoundError as error:
            raise Unavailable(f"{error.name} is not installed") from None


def cores() -> int:
    """Return the number of CPUs that this process may use."""
    return processors.look()


def check(result: NDArray[Any], arguments: Arguments, limit: float | None = None) -> None:
    """Compare a result with the reference; `limit` is what it may be off by, unless as much as its dtype explains.

    Of a forward pass it is a share of the values, whatever their signs, times their weights; of a gradient, of the
    largest number.

    Raises
    ------
    Unavailable
        If they differ by more than rounding explains.
    """
    # the reference makes the whole score matrix: some query rows of the first and last head are evidence enough
    length = arguments.query.shape[-2]
    rows = np.unique(np.linspace(0, length - 1, min(length, 64), dtype=np.intp))
    below = np.arange(length) <= rows[:, None]
    if limit is None:
        limit = LIMITS[name_of(arguments.query.dtype)]
    for batch, head in ((0, 0), (-1, -1)):
        query, key, value = (x[batch, head] for x in (arguments.query, arguments.key, arguments.value))
        mask = arguments.mask
        if mask is not None:
            mask = mask[batch, head if mask.shape[1] > 1 else 0]
            mask = mask[rows] if len(mask) > 1 else mask
        if arguments.causal:
            mask = below
        q, k, v = (cast(x, FLOAT64) for x in (query[rows], key, value))
        expected, lse = reference.attention(q, k, v, mask, return_lse=True)
        if arguments.grad_out is None:
            sizes = reference.attention(q, k, np.abs(v), mask)
        else:
            grad_out = cast(arguments.grad_out[batch, head][rows], FLOAT64)
            expected, *_ = reference.attention_backward(grad_out, q, k, v, expected, lse, mask)
            sizes = np.abs(expected).max()
        error = float((np.abs(cast(result[batch, head][rows], FLOAT64) - expected) / sizes).max())
        if not error <= limit:
            raise Unavailable(f"its result is off by {error:.1g}, where {limit:.0g} is allowed")


def prepare(engine: Engine, case: Case, threads: int) -> Call:
    """Return the engine's call of a case, after checking its result.

    Raises
    ------
    Unavailable
        If the engine is not installed, refuses the case, or computes something else.
    """
    engine.version  # noqa: B018  (raises where a package is missing)
    try:
        build = engine.build_backward if case.backward else engine.build
        if build is None:
            raise Unavailable("it has no backward pass")
        call = build(case.arguments, threads)
        call.run()
        result = call.result()
    except Unavailable:
        raise
    except Exception as error:  # whatever a peer may raise is its reason
        raise Unavailable(f"{type(error).__name__}: {_first_line(error)}") from None
    check(result, case.arguments)
    return call


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:120] if lines else "no message"


# --------------------------------------------------------------------------------------------------------------------
# fastattn
# --------------------------------------------------------------------------------------------------------------------


def _fastattn(arguments: Arguments, threads: int) -> Call:
    fastattn.set_num_threads(threads)
    latest: list[Any] = [None]

    def run() -> None:
        latest[0] = fastattn.attention(
            arguments.query, arguments.key, arguments.value, arguments.mask, is_causal=arguments.causal
        )

    return Call(run, lambda: latest[0])


def _fastattn_backward(arguments: Arguments, threads: int) -> Call:
    fastattn.set_num_threads(threads)
    query, key, value, causal = arguments.query, arguments.key, arguments.value, arguments.causal
    out, lse = fastattn.attention(query, key, value, is_causal=causal, return_lse=True)
    grad_out: Any = arguments.grad_out
    latest: list[Any] = [None]

    def run() -> None:
        latest[0] = fastattn.attention_backward(grad_out, query, key, value, out, lse, is_causal=causal)

    return Call(run, lambda: latest[0][0])


# --------------------------------------------------------------------------------------------------------------------
# NumPy
# --------------------------------------------------------------------------------------------------------------------


def _check_numpy(arguments: Arguments, threads: int) -> None:
    """Refuse what it cannot multiply, or not on so many threads."""
    if arguments.query.dtype.itemsize == 2:
        raise Unavailable("it has no matrix product of half precision")
    if threads != cores():
        raise Unavailable("its BLAS has its own threads")


def _numpy(arguments: Arguments, threads: int) -> Call:
    """Return the formula as it is usually written."""
    _check_numpy(arguments, threads)
    query, key, value, mask = arguments.query, arguments.key, arguments.value, arguments.mask
    scale = query.dtype.type(1 / np.sqrt(query.shape[-1]))
    if arguments.causal:
        mask = np.tri(query.shape[-2], key.shape[-2], dtype=np.bool_)
    latest: list[Any] = [None]

    def run() -> None:
        scores = query @ key.swapaxes(-1, -2)
        scores *= scale
        if mask is not None:
            if mask.dtype == np.bool_:
                scores = np.where(mask, scores, query.dtype.type(-np.inf))
            else:
                scores += mask
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        latest[0] = scores @ value

    return Call(run, lambda: latest[0])


def _numpy_backward(arguments: Arguments, threads: int) -> Call:
    """Return the usual form, with the weights of the forward pass, which take Lq x Lk numbers, at hand."""
    _check_numpy(arguments, threads)
    query, key, value = arguments.query, arguments.key, arguments.value
    grad_out: Any = arguments.grad_out
    scale = query.dtype.type(1 / np.sqrt(query.shape[-1]))
    scores = query @ key.swapaxes(-1, -2) * scale
    if arguments.causal:
        scores[..., ~np.tri(query.shape[-2], key.shape[-2], dtype=np.bool_)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    latest: list[Any] = [None]

    def run() -> None:
        grad_value = weights.swapaxes(-1, -2) @ grad_out
        grad_scores = grad_out @ value.swapaxes(-1, -2)
        grad_scores -= (grad_scores * weights).sum(axis=-1, keepdims=True)
        grad_scores *= weights
        grad_scores *= scale
        latest[0] = grad_scores @ key, grad_scores.swapaxes(-1, -2) @ query, grad_value

    return Call(run, lambda: latest[0][0])


# --------------------------------------------------------------------------------------------------------------------
# PyTorch
# --------------------------------------------------------------------------------------------------------------------


def _torch(arguments: Arguments, threads: int) -> Call:
    import torch

    torch.set_num_threads(threads)
    query, key, value = (_tensor(x) for x in (arguments.query, arguments.key, arguments.value))
    mask = None if arguments.mask is None else _tensor(arguments.mask)
    attention = torch.nn.functional.scaled_dot_product_attention
    latest: list[Any] = [None]

    def run() -> None:  # no torch.no_grad(): nothing here wants a gradient, and entering it takes 5 µs
        latest[0] = attention(query, key, value, mask, 0.0, arguments.causal)

    return Call(run, lambda: _array(latest[0]))


def _tensor(array: NDArray[Any]) -> Any:
    import torch

    if name_of(array.dtype) != "bfloat16":
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)  # PyTorch takes none of NumPy's


def _array(tensor: Any) -> NDArray[Any]:
    return np.asarray(tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor)


def _torch_backward(arguments: Arguments, threads: int) -> Call:
    import torch

    torch.set_num_threads(threads)
    leaves = [_tensor(x).requires_grad_() for x in (arguments.query, arguments.key, arguments.value)]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, None, 0.0, arguments.causal)
    grad_out = _tensor(arguments.grad_out)  # type: ignore[arg-type]
    latest: list[Any] = [None]

    def run() -> None:
        latest[0] = torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

    return Call(run, lambda: _array(latest[0][0]))


# --------------------------------------------------------------------------------------------------------------------
# OpenVINO
# --------------------------------------------------------------------------------------------------------------------


def _openvino(arguments: Arguments, threads: int) -> Call:
    import openvino
    from openvino import opset13

    arrays = [arguments.query, arguments.key, arguments.value]
    if arguments.mask is not None:
        arrays.append(arguments.mask)
    kind = {"bfloat16": openvino.Type.bf16, "float16": openvino.Type.f16}.get(name_of(arguments.query.dtype))
    parameters = [opset13.parameter(x.shape, kind or x.dtype.type) for x in arrays]
    operation = opset13.scaled_dot_product_attention(*parameters, causal=arguments.causal)
    compiled = openvino.Core().compile_model(
        openvino.Model([operation], parameters),
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32" if kind is None else kind.to_string(),
            "INFERENCE_NUM_THREADS": threads,
        },
    )
    precision = compiled.get_property("INFERENCE_PRECISION_HINT")
    if kind == openvino.Type.f16 and precision == openvino.Type.bf16:  # where the machine multiplies that
        raise Unavailable("it computes float16 in bfloat16 here")
    request = compiled.create_infer_request()
    for index, array in enumerate(arrays):
        request.set_input_tensor(index, _openvino_tensor(array))
    like = compiled.output(0).element_type
    output = np.empty(arguments.query.shape, BITS if like == openvino.Type.bf16 else like.to_dtype())
    request.set_output_tensor(0, _openvino_tensor(output))
    # all that the class's own method would add is work on inputs and outputs, 5 µs that tiny calls would show
    infer = super(type(request), request).infer
    return Call(lambda: infer({}, True, False), lambda: output)


def _openvino_tensor(array: NDArray[Any]) -> Any:
    import openvino

    if name_of(array.dtype) == "bfloat16":
        return openvino.Tensor(array.view(np.uint16), array.shape, openvino.Type.bf16)
    return openvino.Tensor(array, shared_memory=True)


# --------------------------------------------------------------------------------------------------------------------
# ONNX Runtime
# --------------------------------------------------------------------------------------------------------------------


def _onnxruntime(arguments: Arguments, threads: int) -> Call:
    import onnxruntime
    from onnx import TensorProto, helper

    names = {"Q": arguments.query, "K": arguments.key, "V": arguments.value}
    if name_of(arguments.query.dtype) == "bfloat16":
        raise Unavailable("it has no kernel for bfloat16 on CPUs")
    if arguments.mask is not None:
        # unlike the others it wants every query's row written out
        wide = (*arguments.mask.shape[:-2], arguments.query.shape[-2], arguments.mask.shape[-1])
        names["mask"] = np.broadcast_to(arguments.mask, wide).copy()
    kinds = {
        "float16": TensorProto.FLOAT16,
        "float32": TensorProto.FLOAT,
        "float64": TensorProto.DOUBLE,
        "bool": TensorProto.BOOL,
    }
    node = helper.make_node("Attention", list(names), ["out"], is_causal=int(arguments.causal))
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(name, kinds[name_of(x.dtype)], x.shape) for name, x in names.items()],
        [helper.make_tensor_value_info("out", kinds[name_of(arguments.query.dtype)], arguments.query.shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    # bound inputs and output: faster than run(), which wraps and allocates anew for each call
    output = np.empty_like(arguments.query)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x) for name, x in names.items()}
    binding = session.io_binding()
    for name, ort_value in values.items():
        binding.bind_ortvalue_input(name, ort_value)
    bound = onnxruntime.OrtValue.ortvalue_from_numpy(output)
    binding.bind_ortvalue_output("out", bound)

    def run() -> None:
        session.run_with_iobinding(binding)

    return Call(run, bound.numpy)


OURS = Engine("fastattn", (), _fastattn, _fastattn_backward)
ENGINES: tuple[Engine, ...] = (
    OURS,
    Engine("PyTorch", ("torch",), _torch, _torch_backward),
    Engine("OpenVINO", ("openvino",), _openvino),
    Engine("ONNX Runtime", ("onnxruntime", "onnx"), _onnxruntime),
    Engine("NumPy", ("numpy",), _numpy, _numpy_backward),
)
"""All engines, ours first."""
