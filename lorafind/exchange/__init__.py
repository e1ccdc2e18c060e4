"""Indexes that meet: several united into one, and their tables in stores that others read."""
