"""A collection sorted into groups of one style."""
