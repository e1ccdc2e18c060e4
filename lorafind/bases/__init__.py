"""Bases: mean and principal components over a feature, in which LoRAs are compared."""
