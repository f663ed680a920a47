"""The `crossan-fast` command line: a file a command, each with `add_parser(subparsers)` and `run(args)`."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from crossan_fast.cli._suggesting import SuggestingParser

# Modules are imported only for the command that was asked for: `doctor` must work where others can't.
COMMANDS = {
    "demo": "a synthetic shop end to end: encoders, cache, training, and what each modality adds",
    "cache": "build, import, describe, verify or convert a cache of hidden states",
    "train": "train a model as a YAML file says",
    "evaluate": "rank a run's held-out targets in the full catalogue",
    "recommend": "the next items for a history of item names",
    "verify": "compare a run's files with their digests, and with each other",
    "doctor": "what is installed, which backend each op uses, and why",
}

# A dotted key, `=`, and a value. A file of such a name is written `./key=value`.
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it succeeded, 2 with one line on stderr for a wrong input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser(arguments).parse_args(arguments)
    if args.command is None:
        _parser(arguments).print_help()
        return 2
    try:
        with warnings.catch_warnings():
            if not args.debug:
                warnings.showwarning = _show_warning
            return int(importlib.import_module(f"crossan_fast.cli.{args.command}").run(args))
    except KeyboardInterrupt:
        print(f"crossan-fast {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        sys.stderr.close()
        return 1
    # Bad input raises these everywhere in the package, with a message that names it. What else comes is a
    # fault of ours and keeps its traceback.
    except (ValueError, TypeError, LookupError, OSError, ImportError, RuntimeError) as error:
        if args.debug:
            raise
        print(f"crossan-fast {args.command}: error: {_message(error)}", file=sys.stderr)
        return 2


class _CommandParser(SuggestingParser):
    """A command with the positional `overrides` takes `key=value` wherever it stands.

    argparse by itself fills a positional from one place only: what follows a flag would be left over, or be
    taken for the flag's own value.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.get_default("overrides") is None:
            return super().parse_known_args(args, namespace)
        words = list(sys.argv[1:] if args is None else args)
        overrides = [word for word in words if _OVERRIDE.match(word)]
        rest = [word for word in words if not _OVERRIDE.match(word)]
        parsed, unknown = super().parse_known_args(rest, namespace)
        parsed.overrides = [*overrides, *parsed.overrides]
        return parsed, unknown


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    from crossan_fast import __version__

    parser = SuggestingParser(
        prog="crossan-fast",
        description="Sequential recommendation from frozen multimodal foundation models: CROSSAN and IISAN.",
    )
    parser.add_argument("--version", action="version", version=f"crossan-fast {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_CommandParser)
    asked = next((word for word in arguments if not word.startswith("-")), None)
    for name, text in COMMANDS.items():
        if name == asked:
            importlib.import_module(f"crossan_fast.cli.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=text)
    return parser


def _message(error: BaseException) -> str:
    """The message on one line; `str` of a KeyError is its repr."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
