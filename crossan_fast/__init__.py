"""CROSSAN and IISAN: sequential recommendation from frozen multimodal foundation models.

The names here are the public API; docs/mathematics.md has the formulas, `crossan-fast --help` the commands.
"""

from crossan_fast.cache import HiddenStateCache
from crossan_fast.config import CrossanConfig, Modality
from crossan_fast.model import CrossanModel
from crossan_fast.output import CrossanOutput

__version__ = "0.1.0"
__all__ = ["CrossanConfig", "CrossanModel", "CrossanOutput", "HiddenStateCache", "Modality"]
