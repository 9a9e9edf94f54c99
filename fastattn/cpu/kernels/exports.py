"""What each kernel exports: its functions by their names, and how many integers each takes.

task                  runs one task: the call, the slot of working memory, the number of the task
alone                 runs the tasks from one number to another in the calling thread
note, quick, shared   builtins of Python (`fastattn.cpu.kernels.entry`): write the record of a call; and run it
"""

_TASKS = {"task": 3, "alone": 3, "note": 3, "quick": 3, "shared": 3}

EXPORTS: dict[str, dict[str, int]] = {
    "forward": _TASKS,
    "decode": _TASKS,
    "weights": _TASKS,
    "known_weights": _TASKS,
    "summary": _TASKS,
    "backward": _TASKS,
    "mask_gradient": _TASKS,
    "captured_gradient": _TASKS,
    "additive_backward": _TASKS,
    "additive_mask_gradient": _TASKS,
    "additive_captured_gradient": _TASKS,
    "score_function": {"value": 8, "slope": 9, "along": 7, "marks": 3},
    "captured_function": {"add": 11},
    "seen_function": {"hide": 8, "look": 9, "marks": 3},
    "several": _TASKS,
    "peak": {"run": 5},
    "schedule": {"start": 6, "take_part": 2, "cancel": 2, "work": 3},
    "signature": {"signature": 3, "in_default_mode": 3},
    "overlaps": {"overlaps": 3},
    "own_heads": {"own_heads": 3},
    "longest": {"longest": 3},
    "convert": {"convert": 3},
}
