"""On PYTHONPATH, beside the checkout: `crossan_fast.kernels` and `.csrc` without an install."""

import importlib.util
import sys
from pathlib import Path

_FOLDERS = ("kernels", "csrc")


class _Beside:
    """Finds the folders that stand beside the package and belong into it."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        package, _, folder = name.partition(".")
        if package != "crossan_fast" or folder not in _FOLDERS:
            return None
        place = Path(__file__).resolve().parents[2] / folder
        init = str(place / "__init__.py")
        return importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(place)])


sys.meta_path.append(_Beside)
