"""What goes with a saved model for people and hubs: README.md, a model card, and training.json.

training.json says what a run trained the weights beside it on, and what they reached: encoders, pooling and
levels, digests of the data, versions, protocols and metrics. It names the weights by their digest, carries
its own, and is of no weight once these have changed; the card of such a model, and of one that no run
trained, is of its config alone. A README.md that is not ours stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from crossan_fast._digests import sealed, unsealed
from crossan_fast._files import write_whole
from crossan_fast._untrusted import read_json
from crossan_fast.config import CrossanConfig

CARD, RECORD = "README.md", "training.json"
_MARK = "<!-- written by crossan_fast; without this line the file is left as it is -->"
_MOST = 4 << 20
_PAPERS = {"crossan": "2504.10307", "iisan": "2404.02059"}


def read_record(folder: Path, config: CrossanConfig) -> dict[str, Any] | None:
    """A folder's training.json, None where it has none.

    Raises:
        ValueError: damaged, or nothing that a card of `config` can be made of.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    body = read_json(path, "folder", _MOST)
    if not isinstance(body, dict):
        raise ValueError(f"folder: {path}: expected a JSON object, got {type(body).__name__}")
    record = unsealed(body, "folder", path)
    try:
        card(config, record)
    except (LookupError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(
            f"folder: {path}: expected what a run writes, got {type(error).__name__}: {error}"
        ) from error
    return record


def write_card(folder: Path, config: CrossanConfig, record: Mapping[str, Any] | None) -> None:
    """Write the card, and training.json where there is a record; one of other weights is removed."""
    if record is None:
        (folder / RECORD).unlink(missing_ok=True)
    else:
        write_whole(folder / RECORD, json.dumps(sealed(record), indent=2, ensure_ascii=False) + "\n")
    path = folder / CARD
    if not path.exists() or _MARK in path.read_text(encoding="utf-8", errors="replace"):
        write_whole(path, card(config, record))


def card(config: CrossanConfig, record: Mapping[str, Any] | None) -> str:
    """A model card: metadata as the Hugging Face hub reads it, then the same for people."""
    record = record or {}
    name, sources = config.architecture.upper(), record.get("sources", {})
    lines = [
        f"---\n{yaml.safe_dump(_metadata(config, record), sort_keys=False, allow_unicode=True)}---",
        _MARK,
        f"# {name} of {', '.join(config.modality_names)}",
        "",
        f"Sequential recommendation from frozen foundation models "
        f"([arXiv {_PAPERS[config.architecture]}](https://arxiv.org/abs/{_PAPERS[config.architecture]})), by "
        "crossan_fast.",
        "",
        "| modality | width | levels | encoder | pooling |",
        "| --- | --- | --- | --- | --- |",
    ]
    for modality in config.modalities:
        source = sources.get(modality.name, {})
        levels = source.get("layers", modality.levels)
        made = f"{source.get('encoder', 'not recorded')} | {source.get('pool', 'not recorded')}"
        lines.append(f"| {modality.name} | {modality.width} | {levels} | {made} |")
    lines += ["", *_results(record), *_usage()]
    plain = {key: value for key, value in config.to_dict().items() if key != "modalities"}
    lines += ["## Config", "", "```json", json.dumps(plain, indent=2), "```", ""]
    return "\n".join(lines)


def _results(record: Mapping[str, Any]) -> list[str]:
    lines = []
    for part in ("validation", "test"):
        if found := record.get(part):
            names = list(found["metrics"])
            lines += [f"## {part.capitalize()}", "", f"{found['protocol']}.", ""]
            lines += [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
            lines += ["| " + " | ".join(f"{found['metrics'][name]:.4f}" for name in names) + " |", ""]
    if (origin := record.get("started_from")) is not None:
        if not isinstance(origin, str):
            raise TypeError(f"started_from: expected text, got {origin!r}")
        name = f"run `{origin}`" if origin else "another run, whose name was not kept"
        lines += ["## Start", "", f"Training started from the weights of {name}, not from random ones.", ""]
    if data := record.get("data"):
        lines += [
            "## Data",
            "",
            f"{data['users']:,} users, {data['used']:,} of {data['items']:,} items. SHA-256 of the items' "
            f"names `{data['names']}`, of the sequences `{data['sequences']}`.",
            "",
            "Made with " + ", ".join(f"{k} {v}" for k, v in record["versions"].items() if v) + ".",
            "",
        ]
    return lines


def _usage() -> list[str]:
    code = (
        "from crossan_fast import CrossanModel\n\nmodel = CrossanModel.from_pretrained(FOLDER_OR_REPOSITORY)"
    )
    return ["## Use", "", f"```python\n{code}\n```", ""]


def _metadata(config: CrossanConfig, record: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "library_name": "crossan_fast",
        "tags": ["recommendation", "sequential-recommendation", "multimodal", config.architecture],
    }
    if test := record.get("test"):
        task = {"type": "recommendation", "name": "Sequential recommendation"}
        dataset = {"type": record["data"]["sequences"][:16], "name": test["protocol"]}
        metrics = [{"type": n, "value": round(v, 6), "name": n.upper()} for n, v in test["metrics"].items()]
        found["metrics"] = sorted({name.partition("@")[0] for name in test["metrics"]})
        results = [{"task": task, "dataset": dataset, "metrics": metrics}]
        found["model-index"] = [{"name": config.architecture.upper(), "results": results}]
    return found
