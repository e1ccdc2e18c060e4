"""The groups of modules, in stored order (without torch, so that queries can use it)."""

from collections.abc import Container

GROUPS = ("self_attn", "cross_attn", "ff", "conv", "text", "other")


def mask(groups: Container[str]) -> int:
    """Bit mask over GROUPS of a collection of group names."""
    return sum(1 << i for i, group in enumerate(GROUPS) if group in groups)


def names(bits: int) -> tuple[str, ...]:
    """Group names of a bit mask."""
    return tuple(group for i, group in enumerate(GROUPS) if bits >> i & 1)
