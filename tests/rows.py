"""Rows of the ISA table that run here beside this machine's own, whose kernels have to be compiled for a test."""

from __future__ import annotations

import pytest
from marks import takes_long

from fastattn.machine import table as isa

# the best of them says most of what there is to say; those with the same registers have the same kernels
_OTHERS = [row for row in isa.TABLE if isa.runs_here(row) and row.vector_bytes != isa.host().vector_bytes]
on_other_rows = pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.name, marks=takes_long if row is not _OTHERS[0] else ()) for row in _OTHERS]
)
