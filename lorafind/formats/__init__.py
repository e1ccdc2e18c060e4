"""From tensors to adapters: names, families, scales, architectures; knows nothing of SQLite."""
