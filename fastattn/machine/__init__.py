"""The machine: the table of processors; how object code is built, loaded and kept; the interpreter around it."""

from fastattn.machine.interpreter import require_usual

require_usual()
