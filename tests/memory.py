"""How much memory a call takes, as code for processes of their own."""

from __future__ import annotations

MEASURE = """
import numpy as np
import fastattn

def kibibytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

def growth(call):
    "The peak of resident memory during a call above what it was before, in MiB."
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak is what it is now
    before = kibibytes("VmRSS:")
    call()
    return (kibibytes("VmHWM:") - before) / 1024
"""
