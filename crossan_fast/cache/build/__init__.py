"""Building a cache from raw items: each encoder runs once, frozen; stopped builds go on; new items append.

Run again with the same arguments, a build goes on where it was stopped; with more items, it encodes the new
ones and appends them: rows keep their items. An item of the cache is encoded again where its text, or the
bytes of its file, are not those that its row was made from; an emptied cell takes the modality away. A
changed input that cannot be used leaves the row as it was, until it changes again. All of it counts at once,
when all is done: until then the cache is what it was, and so it stays for who has it open. Changed
modalities' files are written anew, which takes their room twice meanwhile.

Items are encoded in batches sorted by length, so the result does not depend on where a build was stopped,
bit for bit, at the same batch size.

    specs -> passes     what is asked for, and the runs over the items that serve it
    changes -> plan     which rows are to be encoded, and to which cache they are appended
    runner, journal     batches of inputs through the encoders, and what of it is done
    finish              the commit, the report
    features, imports   states that were computed elsewhere, and a cache of them alone
"""

from crossan_fast.cache.build.build import build_cache
from crossan_fast.cache.build.finish import BuildReport
from crossan_fast.cache.build.imports import ImportReport, import_features
from crossan_fast.cache.build.runner import BrokenItemError
from crossan_fast.cache.build.specs import ModalitySpec

__all__ = [
    "BrokenItemError",
    "BuildReport",
    "ImportReport",
    "ModalitySpec",
    "build_cache",
    "import_features",
]
