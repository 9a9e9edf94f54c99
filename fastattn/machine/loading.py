"""Object code, run: LLVM's view of the processor, and the loader."""

import sys
from collections.abc import Iterable
from typing import Any

from llvmlite import binding as llvm

from fastattn.machine.room import room_together
from fastattn.machine.table import Isa

MORE = 1 << 20  # bytes, for sections that begin on pages of their own


def triple() -> str:
    """What LLVM calls this system, with the format of object code that its loader takes there."""
    found: str = llvm.get_process_triple()
    return f"{found}-elf" if sys.platform == "win32" else found


def target_machine(row: Isa, jit: bool = False) -> Any:
    """LLVM's target machine for a row of the table."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(triple())
    features = ",".join(f"+{name}" for name in row.features)
    return target.create_target_machine(
        cpu=row.cpu, features=features, opt=3, reloc="pic", codemodel="default", jit=jit
    )


def load(code: bytes, row: Isa, symbols: Iterable[str]) -> tuple[dict[str, int], Any]:
    """The addresses of functions in object code, by name, and the engine that keeps them alive."""
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine(row, jit=True))
    with room_together(4 * len(code) + MORE):
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
    return {symbol: engine.get_function_address(symbol) for symbol in symbols}, engine
