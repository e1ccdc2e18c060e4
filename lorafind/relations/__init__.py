"""Pairs of adapters → proofs of what one is to the other."""
