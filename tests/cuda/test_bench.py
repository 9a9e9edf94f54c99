"""The benchmark of a GPU: all of it but the times, which the simulator's would be no good for."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from fastattn import bench
from fastattn.bench import gpu, report
from fastattn.bench.measure import Effort
from fastattn.console.terminal import Style
from fastattn.cuda.available import SIMULATED

LITTLE = Effort(rounds=2, seconds=1e-6)


@pytest.mark.parametrize(
    "case",
    [
        gpu.DeviceCase("forward", "float16", 1, 2, 2, 9, 9, 8, causal=True),
        gpu.DeviceCase("backward", "float32", 1, 1, 1, 6, 6, 4),
        gpu.DeviceCase("decode", "float16", 2, 4, 2, 1, 11, 8),
    ],
    ids=lambda case: case.kind,
)
def test_a_case_is_measured(case: gpu.DeviceCase) -> None:
    result = gpu.measure(case, LITTLE)
    assert len(result.times["fastattn"]) == 2
    assert result.figure("fastattn") == case.figure(result.seconds("fastattn")) > 0
    assert set(result.times) | set(result.absent) == set(gpu.ENGINES)
    assert case.name in report.bars(result, Style(False, False, 80))[0]
    if SIMULATED:
        assert result.absent["flash"].startswith(("this build of PyTorch cannot", "PyTorch is not installed"))


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(case: gpu.DeviceCase, inputs: dict[str, Any]) -> gpu.Run:
        right = gpu._ours(case, inputs)
        return lambda: (gpu.to_host(right()) + 0.1,)

    monkeypatch.setitem(gpu.ENGINES, "fastattn", wrong)
    monkeypatch.setattr(gpu, "to_host", lambda x: np.asarray(x[0]) if isinstance(x, tuple) else x.copy_to_host())
    result = gpu.measure(gpu.DeviceCase("forward", "float32", 1, 1, 1, 5, 5, 4), LITTLE)
    assert not result.times
    assert re.search(r"its result is off by 0\.\d, where", result.absent["fastattn"])


@pytest.mark.skipif(not SIMULATED, reason="there is a GPU")
def test_bfloat16_needs_pytorch_to_be_made() -> None:
    result = gpu.measure(gpu.DeviceCase("forward", "bfloat16", 1, 1, 1, 5, 5, 4), LITTLE)
    assert set(result.absent.values()) == {"only PyTorch makes arrays of bfloat16 on the GPU"}


def test_what_tables_count() -> None:
    forward = gpu.DeviceCase("forward", "bfloat16", 2, 3, 3, 5, 5, 7)
    assert forward.flops == 2 * (2 * 2 * 3 * 5 * 5 * 7)
    assert gpu.DeviceCase("backward", "bfloat16", 2, 3, 3, 5, 5, 7, causal=True).flops == 5 * (2 * 3 * 5 * 5 * 7)
    decode = gpu.DeviceCase("decode", "bfloat16", 2, 8, 4, 1, 100, 16)
    assert (decode.bytes, decode.unit, decode.figure(1e-6)) == (2 * 2 * 4 * 100 * 16 * 2, "GB/s", pytest.approx(51.2))
    assert len({case.name for case in gpu.CASES}) == len(gpu.CASES)
    assert set(gpu.QUICK) <= set(gpu.CASES)


@pytest.mark.skipif(not SIMULATED, reason="there is a GPU")
def test_the_command_refuses_to_time_the_simulator(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["--backend", "cuda"])
    assert ended.value.code == 2
    assert "--backend cuda: Numba simulates the GPU, and its times say nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--backend", "cuda", "--threads", "2"])
    assert "--threads: a GPU has no use for it" in capsys.readouterr().err


def test_the_command_lists_its_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--backend", "cuda", "--list", "--case", "decode"]) == 0
    assert capsys.readouterr().out.splitlines() == [case.name for case in gpu.CASES if case.kind == "decode"]
