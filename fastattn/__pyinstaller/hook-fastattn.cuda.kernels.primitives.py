"""The instructions of a GPU: the module is imported by name."""

hiddenimports = ["fastattn.cuda.kernels.ptx"]
