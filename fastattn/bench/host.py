"""Where it is measured: the name of the machine, and the versions of all that was measured."""

from __future__ import annotations

import datetime
import platform
from dataclasses import dataclass

from fastattn.bench.peers import ENGINES, Unavailable, cores
from fastattn.machine.processor import processor_name

__all__ = ["Host", "this_host"]

# LLVM's names of what people call otherwise
_GENERATIONS = {
    "znver1": "Zen",
    "znver2": "Zen 2",
    "znver3": "Zen 3",
    "znver4": "Zen 4",
    "znver5": "Zen 5",
    "skylake": "Skylake",
    "skylake-avx512": "Skylake",
    "cascadelake": "Cascade Lake",
    "cooperlake": "Cooper Lake",
    "icelake-server": "Ice Lake",
    "sapphirerapids": "Sapphire Rapids",
    "emeraldrapids": "Emerald Rapids",
    "graniterapids": "Granite Rapids",
}


@dataclass(frozen=True)
class Host:
    """A machine, and what is installed on it.

    Attributes
    ----------
    name : str
        The processor's model and generation, and the number of cores: what tells one machine's figures from another's.
    isa : str
        The instruction set that fastattn uses.
    system : str
        Operating system and Python.
    versions : dict of str to str
        Of the engines.
    date : str
        The day, in ISO format.
    """

    name: str
    isa: str
    system: str
    versions: dict[str, str]
    date: str

    def __str__(self) -> str:
        versions = ", ".join(f"{engine} {version}" for engine, version in self.versions.items())
        return f"{self.name}, {self.isa}; {versions}; {self.system}; {self.date}"


def _model() -> str:
    """Return the processor's name as it says itself."""
    name = processor_name().replace("(R)", "").replace("(TM)", "").replace("Processor", "")
    return " ".join(name.split()) or platform.machine()


def _generation() -> str:
    """Return what LLVM takes the processor for."""
    from llvmlite import binding

    name = str(binding.get_host_cpu_name())
    return _GENERATIONS.get(name, name)


def this_host() -> Host:
    """Describe the machine that this runs on."""
    from fastattn.machine import table as isa

    versions = {}
    for engine in ENGINES:
        try:
            versions[engine.name] = engine.version
        except Unavailable:
            continue
    count = cores()
    return Host(
        name=f"{_model()} ({_generation()}), {count} {'core' if count == 1 else 'cores'}",
        isa=isa.host().name,
        system=f"Python {platform.python_version()}, {platform.system()}",
        versions=versions,
        date=datetime.date.today().isoformat(),
    )
