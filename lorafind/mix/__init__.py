"""Combinations of LoRAs that come near to a target in style."""
