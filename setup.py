"""The ahead-of-time build: `CROSSAN_FAST_BUILD=cpu,cuda pip install --no-build-isolation .`

It puts the compiled libraries into the wheel. Without the variable the wheel is pure and needs no torch;
pyproject.toml says the rest. `CROSSAN_FAST_MARCH="x86-64-v3;x86-64-v4"` puts a CPU library for each of these
levels into it, the best of which is chosen where it is loaded: `.ci/wheel` makes such a wheel, and tries it.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import manifest_maker

ROOT = Path(__file__).resolve().parent
WANTED = [part for part in os.environ.get("CROSSAN_FAST_BUILD", "").replace(" ", "").split(",") if part]
# setuptools has no setting for the name of what says which files the sdist holds.
manifest_maker.template = ".manifest.in"


class BuildLibraries(build_py):
    """Copies the package, then compiles what was asked for beside it."""

    def run(self) -> None:
        super().run()
        if not WANTED:
            return
        if self.editable_mode:
            raise SystemExit("CROSSAN_FAST_BUILD: an editable install compiles on first use; leave it unset")
        sys.path.insert(0, str(ROOT))
        from crossan_fast import _build

        for name in WANTED:
            if name not in _build.PARTS:
                raise SystemExit(f"CROSSAN_FAST_BUILD: expected some of {list(_build.PARTS)}, got {name!r}")
            folder = Path(self.build_lib) / "crossan_fast" / _build.AHEAD_OF_TIME.name / name
            levels = [march for march in os.environ.get("CROSSAN_FAST_MARCH", "").split(";") if march]
            if name != "cpu" or len(levels) < 2:
                _build.compile_into(name, folder)
                continue
            for march in levels:
                _compile_for(march, folder.resolve().with_name(f"{name}-{march}"))


def _compile_for(march: str, folder: Path) -> None:
    """In a process of its own: torch loads what it builds, and two libraries of one part can't be loaded."""
    from crossan_fast import _build, _levels

    if march not in _levels.LEVELS:
        raise SystemExit(f"CROSSAN_FAST_MARCH: expected some of {list(_levels.LEVELS)}, got {march!r}")
    if lacking := set(_levels.LEVELS[march]) - set(_build.cpu_flags()):
        raise SystemExit(
            f"CROSSAN_FAST_MARCH: {march} is built on a CPU that has {', '.join(sorted(lacking))}"
        )
    code = "import sys; from pathlib import Path; from crossan_fast import _build\n"
    code += "_build.compile_into('cpu', Path(sys.argv[1]))"
    environment = {**os.environ, "CROSSAN_FAST_MARCH": march}
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, env=environment, check=True)


class LibraryWheel(bdist_wheel):
    """The libraries hold no Python: a wheel with them is for one platform, and for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if WANTED else (python, abi, platform)


class PlatformDistribution(Distribution):
    """A wheel that holds libraries is for one platform."""

    def has_ext_modules(self) -> bool:
        return bool(WANTED)


setup(
    cmdclass={"build_py": BuildLibraries, "bdist_wheel": LibraryWheel},
    distclass=PlatformDistribution,
)
