"""Only the ahead-of-time build of the compiled extension will live here; pyproject.toml says everything else."""

from setuptools import setup

setup()
