"""`crossan-fast evaluate --run RUN`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from crossan_fast.cli._forms import USERS, USERS_COLUMNS, add_column_options, columns_of
from crossan_fast.cli._output import add_json, show, table

if TYPE_CHECKING:
    from crossan_fast.model import CrossanModel
    from crossan_fast.training import EvaluationConfig, Result, Task, TrainConfig, TrainedSasRec

VERIFY = "when the cache's bytes are compared with their checksums (default: as the run's config has it)"
_SASREC = ("epochs", "seed", "learning_rates")  # what options say of it, and `train_sasrec` takes

_DESCRIPTION = """\
Rank a run's held-out targets in the full catalogue; prints HR, NDCG and MRR with the protocol. What is not
given is as the run's config has it. Items that were appended to the cache after training take no part unless
asked for: the numbers stay those of the run.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `evaluate`."""
    parser = subparsers.add_parser(
        "evaluate",
        help="rank a run's held-out targets in the full catalogue",
        description=_DESCRIPTION,
        epilog=f"the run's users file, and --users:\n{USERS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", required=True, help="folder of a run")
    parser.add_argument(
        "--users",
        help="another users file, for evaluation alone: each user's last item tests, the one before "
        "validates; users whom the run trained on are left out",
    )
    add_column_options(parser, USERS_COLUMNS)
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="default: best")
    parser.add_argument("--cache", help="folder of another cache of the same items, such as a converted one")
    parser.add_argument(
        "--catalogue",
        choices=("run", "all"),
        default="run",
        help="the items that the run was trained on, or all that the cache has by now (default: run)",
    )
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="default: test")
    parser.add_argument(
        "--filter-history",
        choices=("all", "all_except_target", "none"),
        help="which items of a user's history are no candidates; `all` is IISAN's protocol",
    )
    parser.add_argument("--candidates", choices=("used", "all"), help="rank items of the users file, or all")
    parser.add_argument("--k", type=int, action="extend", nargs="+", help="cut-offs")
    parser.add_argument("--verify", choices=("open", "lazy", "off"), help=VERIFY)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …")
    parser.add_argument(
        "--lists",
        action="store_true",
        help="also coverage, novelty and diversity of the lists of the best, and targets that training never "
        "saw (cold) apart from the others",
    )
    _add_baselines(parser)
    add_json(parser)


def _add_baselines(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--baselines",
        action="extend",
        nargs="*",
        choices=("popularity", "neighbours", "sasrec"),
        help="also what others reach: popularity, and the neighbours of the last item by the model's "
        "embeddings (both where none is named). sasrec, SASRec by ids, has to be named: it is trained first, "
        "on the run's training data and with its settings, but for the learning rate",
    )
    parser.add_argument(
        "--sasrec-epochs",
        type=int,
        metavar="N",
        help="of sasrec at most so many; a better validation NDCG that fails to come ends it before "
        "(default: 100)",
    )
    parser.add_argument("--sasrec-seed", type=int, metavar="N", help="of sasrec (default: the run's seed)")
    parser.add_argument(
        "--sasrec-learning-rates",
        type=float,
        action="extend",
        nargs="+",
        metavar="RATE",
        help="of sasrec, a training with each, the best on validation kept (default: the run's, and a third)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the metrics."""
    from crossan_fast.training import RunFolder, open_task
    from crossan_fast.training.baselines import BASELINES
    from crossan_fast.training.population import Population
    from crossan_fast.training.result import comparison
    from crossan_fast.training.train_config import SplitConfig

    _refuse_idle_options(args)
    folder = RunFolder(args.run)
    config = own = dataclasses.replace(folder.read_config(), **_given(args, "cache", "device", "verify"))
    columns, theirs = columns_of(args, USERS_COLUMNS), None
    if args.users:  # whose columns may have any names; the run's own file keeps its own
        theirs = columns or None
        alone = dataclasses.replace(config.evaluation, users=args.users)
        config = dataclasses.replace(config, split=SplitConfig(), evaluation=alone)
    elif columns:  # those not named stay what they were
        config = dataclasses.replace(config, columns={**config.columns, **columns})
    protocol = dataclasses.replace(config.evaluation, **_given(args, "filter_history", "candidates"))
    model = folder.load_model(args.checkpoint, backend=config.backend)
    held = folder.read_population()
    catalogue = None if held is None else held.catalogue
    task = open_task(config, catalogue if args.catalogue == "run" else None, columns=theirs)
    if held is not None:
        held.require_states(task.cache, model.config.modality_names)
    model.to(task.device)
    result = task.evaluate(model, args.split, protocol, k=args.k, lists=args.lists)
    if held is not None:
        now = Population.of(task)
        validation = args.split == "validation"
        difference = held.difference(now, "validation") if validation else held.difference(now)
        other = f"not what the run was evaluated on: {difference}" if difference else ""
        # What was trained on shows in novelty, in what is cold, and in baselines.
        if not difference and (args.lists or args.baselines is not None):
            difference = held.difference(now, "training")
            other = f"not what the run was trained on: {difference}" if difference else ""
        result = result.noting(held.note, other)
    if args.baselines is None:
        mrr = f"MRR {100 * result.metrics['mrr']:.2f} %"
        lines = (task.describe(), result.protocol, table(comparison({"": result})), mrr)
        show(args, result.to_dict(), "\n".join(lines))
        return 0
    trained = None
    if "sasrec" in args.baselines:
        same = config == own and args.catalogue == "run"
        trained = _train_sasrec(args, own, task if same else open_task(own, catalogue))
    others = _others(args, task, model, protocol, trained)
    values = {**result.to_dict(), "baselines": {name: other.to_dict() for name, other in others.items()}}
    compared = [task.describe(), result.protocol, table(comparison({"this run": result, **others}))]
    if trained is not None:
        name = BASELINES["sasrec"]
        values["baselines"][name]["trained"] = trained.to_dict()
        compared.append(f"{name}: {trained}")
    show(args, values, "\n".join(compared))
    return 0


def _refuse_idle_options(args: argparse.Namespace) -> None:
    """Raise for an option of a baseline that is not asked for."""
    for name in _SASREC:
        if getattr(args, f"sasrec_{name}") is not None and "sasrec" not in (args.baselines or ()):
            option = f"--sasrec-{name.replace('_', '-')}"
            raise ValueError(f"{option}: goes with --baselines sasrec, which was not asked for")


def _train_sasrec(args: argparse.Namespace, config: TrainConfig, task: Task) -> TrainedSasRec:
    from crossan_fast.training import train_sasrec

    options = {name: getattr(args, f"sasrec_{name}") for name in _SASREC}
    return train_sasrec(config, task, **{name: value for name, value in options.items() if value is not None})


def _others(
    args: argparse.Namespace,
    task: Task,
    model: CrossanModel,
    protocol: EvaluationConfig,
    trained: TrainedSasRec | None,
) -> dict[str, Result]:
    options = {"names": args.baselines} if args.baselines else {}
    sasrec = None if trained is None else trained.model
    return task.evaluate_baselines(
        model, args.split, protocol, k=args.k, lists=args.lists, sasrec=sasrec, **options
    )


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that were given, for what the run's config has otherwise."""
    return {name: value for name in names if (value := getattr(args, name))}
