"""The build hook: kernels for all machines of this architecture, compiled and put into the wheel.

It is off unless HATCH_BUILD_HOOK_ENABLE_CUSTOM is set, as `make wheel` does: a wheel is then one for all platforms.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import sysconfig
import tempfile
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelHook(BuildHookInterface):  # type: ignore[misc, unused-ignore]
    """Adds object code to a wheel, which is then for one platform, and there for any version of Python."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, in a process that finds the sources in its folder, and have the result packed."""
        if version == "editable":  # a clone compiles what it calls
            return
        folder = self.folder = tempfile.TemporaryDirectory()
        subprocess.run([sys.executable, "-m", "fastattn.cpu.host.prebuild", folder.name], cwd=self.root, check=True)
        build_data["force_include"][folder.name] = "fastattn/prebuilt"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform()}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Take away what has been packed."""
        if version != "editable":
            self.folder.cleanup()


def _platform() -> str:
    """The tag of this platform: of Linux the oldest that there is Numba for, since kernels need less than Numba."""
    if platform.system() == "Linux":
        return f"manylinux_2_17_{platform.machine()}"
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
