"""Commands that exist to test the frame that real commands stand in."""

from types import MappingProxyType

from lorafind.cli.app import Group


class SampleGroup(Group):
    """The real group over the commands of this package."""

    package = "tests.cli.sample"
    panels = MappingProxyType({"Samples": ("things", "one", "fail", "wait-here")})
