"""Adapter → numbers: exact products, features and their sketches."""
