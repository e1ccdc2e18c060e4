"""lorafind: find similar, duplicate and related LoRA files from their weights alone."""

__version__ = "0.1.0"
