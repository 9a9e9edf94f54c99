"""fastattn inside other libraries: a module for each, which imports that library when it is imported.

``fastattn.integrations.torch``, ``fastattn.integrations.transformers``, ``fastattn.integrations.jax``,
``fastattn.integrations.onnx`` and ``fastattn.integrations.dask``; a package for MPI, ``fastattn.integrations.mpi``.
"""
