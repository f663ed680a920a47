"""The ahead-of-time build: `CROSSAN_FAST_BUILD=cpu,cuda pip install --no-build-isolation .`

It puts the compiled libraries into the wheel. Without the variable the wheel is pure and needs no torch;
pyproject.toml says the rest.
"""

import os
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

WANTED = [part for part in os.environ.get("CROSSAN_FAST_BUILD", "").replace(" ", "").split(",") if part]


class BuildLibraries(build_py):
    """Copies the package, then compiles what was asked for beside it."""

    def run(self) -> None:
        super().run()
        if not WANTED:
            return
        if self.editable_mode:
            raise SystemExit("CROSSAN_FAST_BUILD: an editable install compiles on first use; leave it unset")
        sys.path.insert(0, str(Path(__file__).resolve().parent))
        from crossan_fast import _build

        for name in WANTED:
            if name not in _build.PARTS:
                raise SystemExit(f"CROSSAN_FAST_BUILD: expected some of {list(_build.PARTS)}, got {name!r}")
            _build.compile_into(
                name, Path(self.build_lib) / "crossan_fast" / _build.AHEAD_OF_TIME.name / name
            )


class PlatformDistribution(Distribution):
    """A wheel that holds libraries is for one platform."""

    def has_ext_modules(self) -> bool:
        return bool(WANTED)


setup(cmdclass={"build_py": BuildLibraries}, distclass=PlatformDistribution)
