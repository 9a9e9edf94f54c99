"""What the processor calls itself."""

import contextlib
import platform
import subprocess
import sys
from pathlib import Path

__all__ = ["processor_name"]


def processor_name() -> str:
    """The processor's name as the system tells it; empty where it does not."""
    names = [platform.processor()]
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # a sandbox may forbid it
        if sys.platform == "darwin":
            ask = ["sysctl", "-n", "machdep.cpu.brand_string"]
            names = [subprocess.check_output(ask, text=True, stderr=subprocess.DEVNULL)]
        elif sys.platform == "linux":
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
            names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return " ".join(names[0].split()) if names else ""
