"""The compiled half of the scheduler: tasks are claimed from a countdown in shared memory, by the caller too.

One atomic word, the offer, holds the number of tasks left and the number of workers that may take part. Whoever lowers
it by one owns a task, of the call that is current at that moment: the call's fields were written before the offer, and
stay until its last task is done. A late worker finds nothing and harms nothing. `pending` counts the tasks that are not
finished; the caller waits for it alone, so for workers that hold a task and for no others.

A call takes the pool and gives it back in here too, under its own address: wherever a signal may interrupt Python code,
`cancel` can tell whether the call had the pool.
"""

from fastattn.cpu.kernels.records import (
    ASLEEP,
    CALL_AT,
    DONE,
    LIMIT_SHIFT,
    MORE,
    OFFER,
    OWNER,
    PENDING,
    SPINS_AT,
    STAFF,
    TAKEN,
    TASK,
    TASKS,
    TASKS_MASK,
    WAITING,
    WOKEN,
    WORKER_BYTES,
    WORKERS,
)
from fastattn.simd import (
    atomic_add,
    atomic_exchange,
    atomic_load,
    atomic_replace,
    atomic_store,
    call_compiled,
    give_way,
    jit,
    load_i64,
    pause,
    store_i64,
)


@jit
def claim_one(pool, worker):
    """Claim a task and run it; False if there is none for this worker. The caller is worker -1."""
    while True:
        offer = atomic_load(pool + OFFER)
        if offer & TASKS_MASK == 0 or worker >= offer >> LIMIT_SHIFT:
            return False
        if atomic_replace(pool + OFFER, offer, offer - 1):
            number = load_i64(pool + TASKS) - (offer & TASKS_MASK)
            call_compiled(load_i64(pool + TASK), (load_i64(pool + CALL_AT), worker + 1, number))
            atomic_add(pool + PENDING, -1)
            return True


@jit
def start(pool, task, call, tasks, limit, turn):
    """Open a call to `limit` workers, if there are so many, unless another has the pool (TAKEN), and take part.

    Where some of them sleep, it is left at ASLEEP plus how many, and their indices stand where the pool's WOKEN says:
    the caller wakes them first.
    """
    if not atomic_replace(pool + OWNER, 0, call):
        return TAKEN
    limit = min(limit, load_i64(pool + STAFF))
    store_i64(pool + TASK, task)
    store_i64(pool + CALL_AT, call)
    store_i64(pool + TASKS, tasks)
    atomic_store(pool + PENDING, tasks)
    atomic_store(pool + OFFER, limit << LIMIT_SHIFT | tasks)
    count, woken = 0, load_i64(pool + WOKEN)
    for worker in range(limit):
        if atomic_exchange(pool + WORKERS + worker * WORKER_BYTES, 0) == 1:
            store_i64(woken + 8 * count, worker)
            count += 1
    return ASLEEP + count if count else take_part(pool, turn)


@jit
def take_part(pool, turn):
    """The caller's share: at most `turn` tasks, then, if none is left, wait for the others for a while.

    Returns DONE, MORE (tasks are left) or WAITING (the others are not done), so that the caller comes back to Python
    now and then and sees signals.
    """
    for _ in range(turn):
        if not claim_one(pool, -1):
            break
    if atomic_load(pool + OFFER) & TASKS_MASK:
        return MORE
    for _ in range(load_i64(pool + SPINS_AT)):
        if atomic_load(pool + PENDING) == 0:
            atomic_store(pool + OWNER, 0)
            return DONE
        pause()
    give_way()  # to the worker that we wait for, if it waits for this CPU
    return WAITING


@jit
def cancel(pool, call):
    """If the call has the pool: withdraw what nobody has claimed, wait for what somebody has, give the pool back."""
    if atomic_load(pool + OWNER) != call:
        return DONE
    left = atomic_exchange(pool + OFFER, 0) & TASKS_MASK
    atomic_add(pool + PENDING, -left)
    while atomic_load(pool + PENDING) != 0:
        give_way()  # to those that we wait for
    atomic_store(pool + OWNER, 0)
    return DONE


@jit
def work(pool, worker, spins):
    """A worker's life between two sleeps: run tasks; when none came for `spins` rounds, lie down and return."""
    idle = 0
    asleep = pool + WORKERS + worker * WORKER_BYTES
    atomic_store(asleep, 0)  # who woke it has done so already, except after a call was interrupted
    while True:
        if claim_one(pool, worker):
            idle = 0
            continue
        idle += 1
        if idle < spins:
            pause()
            continue
        atomic_store(asleep, 1)
        # A call may have been opened between the last look and the store: then either this worker or that call's
        # `start` takes the 1 back, and only if `start` did will there be a wake-up to wait for.
        offer = atomic_load(pool + OFFER)
        if offer & TASKS_MASK and worker < offer >> LIMIT_SHIFT and atomic_exchange(asleep, 0) == 1:
            idle = 0
            continue
        return 0
