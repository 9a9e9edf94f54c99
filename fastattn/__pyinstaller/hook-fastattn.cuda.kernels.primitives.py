"""The instructions for a GPU and those for the simulator: the module is chosen by name."""

hiddenimports = ["fastattn.cuda.emulated", "fastattn.cuda.kernels.ptx"]
