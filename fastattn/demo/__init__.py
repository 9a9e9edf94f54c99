"""A real sentence encoder on fastattn: what its heads look at, and semantic search in text files."""
