"""A conversation with SmolLM2-135M-Instruct in NumPy, every attention by fastattn.

What it is made of, from the bottom: `gguf` reads the file, `tokenizer` cuts text into tokens, `model` computes what
comes next, `caches` keep keys and values, `reader` reads tokens into them, `sampling` chooses, `conversation` takes
turns, and `cli` talks.
"""
