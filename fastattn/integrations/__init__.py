"""fastattn inside the libraries people train with: a module for each, which imports that library when it is imported.

``fastattn.integrations.torch``, ``fastattn.integrations.transformers`` and ``fastattn.integrations.jax``.
"""
