"""SQLite → answers. Nothing here reads a LoRA file unless a target is not in the index."""
