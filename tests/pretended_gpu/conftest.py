"""Each file here runs in a process of its own, by tests/test_pretended_gpu.py: torch has a CUDA there."""

from __future__ import annotations

import os

collect_ignore_glob = [] if "CROSSAN_FAST_PRETENDED_GPU" in os.environ else ["test_*.py"]
