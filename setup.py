"""Only the ahead-of-time build of the extension will live here; pyproject.toml says the rest."""

from setuptools import setup

setup()
