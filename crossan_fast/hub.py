"""Models as folders, here or on the Hugging Face hub: `save_pretrained`, `from_pretrained`, `push_to_hub`.

A path is read without a call to the hub. The hub itself needs huggingface_hub, which is imported when it is
first asked, and which transformers brings along; what is pushed goes through its `ModelHubMixin`. What a
download holds is read as any folder is: by its digests, with all refusals of `crossan_fast.serialization`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn

from crossan_fast import serialization
from crossan_fast._checks import nearest
from crossan_fast._places import folder_or_repository
from crossan_fast.card import RECORD

if TYPE_CHECKING:
    from crossan_fast.model import CrossanModel

# What `from_pretrained` hands to the hub.
_DOWNLOAD = ("revision", "token", "cache_dir", "force_download", "local_files_only")
_FILES = [serialization.CONFIG, serialization.WEIGHTS, RECORD]
_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

_Model = TypeVar("_Model", bound="Pretrained")


class Pretrained(nn.Module):
    """Saving and loading by the names that Hugging Face's models have; a base of `CrossanModel`.

    Attributes:
        training_record: of a model that was loaded as a run left it, what training.json says of it (see
            `crossan_fast.card`); saved with it as long as its weights are these. None of any other.
    """

    training_record: dict[str, Any] | None = None

    def save_pretrained(
        self, folder: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None, **push: Any
    ) -> None:
        """Write `config.json` and `model.safetensors`; each file appears whole or not at all.

        Beside them go a model card, README.md, unless the folder has one of its own, and training.json of a
        model as a run left it.

        Args:
            push_to_hub: push them, too; `repo_id` (default: the folder's name) and `push` as `push_to_hub`
                takes them.

        Raises:
            ValueError: a weight that is not finite, by name.
        """
        if not push_to_hub and (repo_id is not None or push):
            given = ["repo_id"] * (repo_id is not None) + list(push)
            raise ValueError(f"{given[0]}: goes with push_to_hub=True; {given[0]} was given without it")
        serialization.save_model(cast("CrossanModel", self), Path(folder))
        if push_to_hub:
            self.push_to_hub(repo_id or Path(folder).resolve().name, **push)

    @classmethod
    def from_pretrained(
        cls: type[_Model],
        folder: str | Path,
        *,
        backend: str = "auto",
        dtype: str | torch.dtype | None = None,
        **download: Any,
    ) -> _Model:
        """Read what `save_pretrained` wrote, or another program as a config and plain safetensors.

        Args:
            folder: a folder, or `owner/name` on the Hugging Face hub. A name that can only be a path is
                never looked for there.
            backend: as `CrossanModel` takes it.
            dtype: of the parameters, such as `torch.bfloat16` or its name; `auto`: as they were saved; None:
                float32. Buffers stay float32.
            download: `revision`, `token`, `cache_dir`, `force_download` and `local_files_only`, for the hub
                alone.

        Raises:
            FileNotFoundError: no such folder or repository, or one of the two files is not there; of a
                run's folder the message names its model's.
            ValueError, RuntimeError: a file is damaged, a weight is not finite, by name, or the two files do
                not fit each other.
        """
        for key in download:
            if key not in _DOWNLOAD:
                known = ("backend", "dtype", *_DOWNLOAD)
                raise TypeError(
                    f"{key}: expected one of {', '.join(known)}, got {key!r}{nearest(key, known)}"
                )
        wanted = _dtype(dtype)
        here = folder_or_repository(folder, "folder", owner=True)
        found = _download(str(folder), download) if here is None else here
        model = serialization.load_model(cast("type[CrossanModel]", cls), found, backend, dtype=wanted)
        return cast(_Model, model)

    def push_to_hub(self, repo_id: str, **push: Any) -> str:
        """Save into a repository of the hub, which is made where missing; gives the commit's address.

        Args:
            push: `commit_message`, `private`, `token`, `branch`, `create_pr` and so on, as
                `huggingface_hub.ModelHubMixin.push_to_hub` has them.

        Raises:
            ImportError: huggingface_hub is not installed.
            ValueError: a weight that is not finite, by name; nothing is pushed.
        """
        mixin = _huggingface_hub().ModelHubMixin
        model = self

        class Pushed(mixin):  # type: ignore[misc,valid-type]
            """Its hook is all that the mixin needs; its constructor would read our config in its own way."""

            def _save_pretrained(self, save_directory: Path) -> None:
                model.save_pretrained(save_directory)

        return str(Pushed().push_to_hub(repo_id, **push))


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    if dtype is None:
        return torch.float32
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype == "auto":
        return "auto"
    if found not in _DTYPES.values():
        known = ("auto", *_DTYPES)
        raise ValueError(
            f"dtype: expected one of {', '.join(known)}, got {dtype!r}{nearest(str(dtype), known)}"
        )
    return cast(torch.dtype, found)


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            "folder: the Hugging Face hub needs the package huggingface_hub, it is not installed; "
            "pip install 'crossan-fast[hub]'"
        ) from error
    return huggingface_hub


def _download(repository: str, options: Mapping[str, Any]) -> Path:
    """A repository's files, in huggingface_hub's cache."""
    try:
        return Path(_huggingface_hub().snapshot_download(repository, allow_patterns=_FILES, **options))
    except OSError as error:  # what it raises for an answer, for none, and for files that it lacks offline
        first = " ".join(str(error).split("\n\n")[0].split())
        raise FileNotFoundError(
            f"folder: no folder {repository} here, and from the hub: {type(error).__name__}: {first}"
        ) from error
