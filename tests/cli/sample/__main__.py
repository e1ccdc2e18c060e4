"""Runs the sample commands as a process."""

from lorafind.cli.app import run
from tests.cli.sample import SampleGroup

run(SampleGroup)
