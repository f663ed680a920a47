"""`crossan-fast train config.yaml [key=value ...]`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence

from crossan_fast.cli._forms import ITEMS, USERS, USERS_COLUMNS, add_column_options, columns_of

_DESCRIPTION = """\
Train a model as a YAML file says; any field of it can be overridden, nested ones with dots. The run's
folder gets the resolved config, a log, checkpoints and results.
"""

_EXAMPLE = """\
example:
  crossan-fast train config.yaml seed=1 model.dropout=0.2 run=runs/second
  crossan-fast train config.yaml run=runs/second --resume epochs=80
  torchrun --nproc-per-node 4 -m crossan_fast train config.yaml
"""


_STATUS = """
exit status:
  0  trained
  2  an input that does not fit, or a loss or gradient that is not finite: nothing of that epoch is kept
  3  trained to its end and written, but diverged: the mean loss of the last epoch is more than 1.25 times
     that of a model that knows nothing (the first step's, or the logarithm of the number of items that a
     target is told from, whichever is larger); results.json then has "diverged": true
  70 an error that nobody foresaw
  130, 143  stopped by SIGINT or SIGTERM: the last whole epoch is kept, --resume goes on behind it
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `train`."""
    parser = subparsers.add_parser(
        "train",
        help="train a model as a YAML file says",
        description=_DESCRIPTION,
        epilog=f"{_EXAMPLE}\nfiles that the config names:\n{USERS}{ITEMS}{_STATUS}{_fields()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="fields to override, each once, anywhere",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on behind the last epoch in the run's folder"
    )
    parser.add_argument(
        "--profile",
        type=int,
        nargs="?",
        const=20,
        metavar="STEPS",
        help="instead of training: where the time of so many steps goes (default 20), and a Chrome trace in "
        "the run's folder",
    )
    add_column_options(parser, USERS_COLUMNS)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _fields() -> str:
    """Every field with its default, for the help."""
    from crossan_fast.config import CrossanConfig, Modality
    from crossan_fast.training.overrides import flatten
    from crossan_fast.training.train_config import TrainConfig

    values = TrainConfig(cache="(required)", users="(required)", run="(required)").to_dict()
    values["model"] = CrossanConfig((Modality("unused", 1, 1),)).to_dict()
    del values["model"]["modalities"]
    lines = [f"  {key}={'null' if value is None else value}" for key, value in flatten(values)]
    return "\nfields and defaults (see TrainConfig and CrossanConfig):\n" + "\n".join(lines)


def refuse_repeated(overrides: Sequence[str]) -> None:
    """Raise ValueError where an override sets again, or replaces with all around it, what one before it set.

    `load_config` lays one over the other, as programs need it; on a command line it is a mistake.
    """
    from crossan_fast._untrusted import parse_yaml
    from crossan_fast.training.overrides import flatten

    whose: dict[str, str] = {}
    for override in overrides:
        key, _, text = override.partition("=")
        lost = next((before for name, before in whose.items() if f"{name}.".startswith(f"{key}.")), None)
        if lost is not None:
            raise ValueError(f"override: expected each field once, got {lost!r} and {override!r}")
        value = parse_yaml(text, "override", f"the value of {override!r}")
        whose |= dict.fromkeys((name for name, _ in flatten({key: value or None})), override)


def run(args: argparse.Namespace) -> int:
    """Train, then print the test result."""
    from crossan_fast.training import Result, load_config
    from crossan_fast.training.divergence import EXIT_STATUS
    from crossan_fast.training.trainer import open_trainer

    named = [f"columns.{role}={json.dumps(name)}" for role, name in columns_of(args, USERS_COLUMNS).items()]
    overrides = [*args.overrides, *named]
    refuse_repeated(overrides)
    with open_trainer(load_config(args.config, overrides)) as trainer:
        first = trainer.processes.first
        if first:
            print(trainer.task.describe())
            to_train = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
            print(f"parameters to train: {to_train:,}")
            if trainer.device.type == "cuda":
                print(f"step: {trainer.eager_because or 'captured in CUDA graphs'}")
        if args.profile is not None:
            from crossan_fast.training.profile import profile_steps

            if first:
                print(f"precision: {trainer.precision}")
            profile = profile_steps(trainer, args.profile)
            if first:
                print(profile)
            return 0
        results = trainer.fit(resume=args.resume, progress=not args.quiet, say=print)
    status = EXIT_STATUS if results["diverged"] else 0
    if not first:
        return status
    names = {field.name for field in dataclasses.fields(Result)}
    best = f"best epoch {results['best_epoch']} of {results['epochs']}"
    print(f"{best}, by validation {trainer.monitor.upper()}")
    if results["skipped_steps"]:
        print(f"steps left out, their loss or gradient being not finite: {results['skipped_steps']}")
    print(Result(**{name: value for name, value in results["test"].items() if name in names}))
    print(f"run: {trainer.folder.path}")
    return status
