"""Numbers → one SQLite file: what is known of every file and every LoRA, and how it is kept."""
