"""`crossan-fast convert iisan CHECKPOINT OUT`."""

from __future__ import annotations

import argparse
from pathlib import Path

_DESCRIPTION = """\
Turn a checkpoint of IISAN's public code (GAIR-Lab/IISAN, Code_Cached and Code_Cached_Asym, a torch file) into
a model's folder, which CrossanModel.from_pretrained and everything else here read. Only tensors are read of
it, no code in it runs; frozen backbones in it are left out.
"""

_EXAMPLE = """\
example:
  crossan-fast convert iisan epoch-20.pt models/iisan
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `convert`."""
    parser = subparsers.add_parser(
        "convert",
        help="another code's checkpoint to a model's folder",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=("iisan",), help="whose checkpoint it is")
    parser.add_argument("checkpoint", type=Path, help="torch file: a state dict, or model_state_dict")
    parser.add_argument("out", type=Path, help="folder to write, without a model so far")


def run(args: argparse.Namespace) -> int:
    """Convert, and say what the model is."""
    from crossan_fast.iisan import read_checkpoint
    from crossan_fast.model import CrossanModel
    from crossan_fast.serialization import CONFIG

    if (args.out / CONFIG).exists():
        raise FileExistsError(f"out: expected a folder without a model, got {args.out}, which has a {CONFIG}")
    model = CrossanModel.from_iisan(read_checkpoint(args.checkpoint))
    model.save_pretrained(args.out)
    config = model.config
    widths = ", ".join(f"{m.name} {m.width}" for m in config.modalities)
    print(
        f"{args.out}: IISAN of {widths}; {config.num_levels} levels, d {config.embedding_dim}, window "
        f"{config.window}, {sum(p.numel() for p in model.parameters()):,} parameters"
    )
    print("note: it holds no popularity of items; training goes on after set_popularity(counts)")
    return 0
