"""What each kernel exports: its functions by their names, and how many integers each takes.

task                  runs one task: the call, the slot of working memory, the number of the task
alone                 runs the tasks from one number to another in the calling thread
quick, shared         run a whole call, as builtins of Python (`fastattn.cpu.kernels.entry`)
"""

_GRADIENTS = {"task": 3, "alone": 3}
_ATTENTION = {**_GRADIENTS, "quick": 3, "shared": 3}

EXPORTS: dict[str, dict[str, int]] = {
    "forward": _ATTENTION,
    "weights": _ATTENTION,
    "known_weights": _ATTENTION,
    "summary": _ATTENTION,
    "received": _ATTENTION,
    "backward": _GRADIENTS,
    "mask_gradient": _GRADIENTS,
    "additive_backward": _GRADIENTS,
    "peak": {"run": 5},
    "schedule": {"start": 6, "take_part": 2, "cancel": 2, "work": 3},
    "signature": {"signature": 3, "in_default_mode": 3},
}
