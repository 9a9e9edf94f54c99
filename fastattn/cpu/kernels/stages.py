"""Tasks that wait for others of their call: counters of what has finished, in an array of the call's that begins at 0.

A task may wait for tasks with lower numbers, and for no others. These have been claimed before it
(`fastattn.cpu.kernels.schedule`), and whoever has claimed a task works on it to its end, also where the call is
interrupted meanwhile. So of all tasks that are not done, the one with the lowest number waits for nobody: it ends, then
the next, and no task waits for ever, at any number of threads. One thread alone does them in order, and never waits.

A stage is what waits for all tasks of the one before it. A turn waits for a single task, the one before it at the same
rows, so that these are added to in one order. What a task has written before it counts itself is there for whoever has
waited for the counter.
"""

from fastattn.simd import atomic_add, atomic_load, give_way, jit, pause

SPINS = 1000  # rounds of waiting, 20 to 40 µs, before other threads may have the CPU: who is waited for may want it


@jit
def wait_for(counter, number):
    """Wait until a counter has got to a number."""
    spins = 0
    while atomic_load(counter) < number:
        spins += 1
        if spins % SPINS == 0:
            give_way()
        pause()


@jit
def finish(counter):
    """Count one more; returns how many have finished. Who is the last of all may merge what the others have found."""
    return atomic_add(counter, 1) + 1
