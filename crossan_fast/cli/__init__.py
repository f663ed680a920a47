"""The `crossan-fast` command line: a file a command, each with `add_parser(subparsers)` and `run(args)`."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from crossan_fast.cli._suggesting import SuggestingParser

# Modules are imported only for the command that was asked for: `doctor` must work where others can't.
COMMANDS = {
    "demo": "a synthetic shop end to end: encoders, cache, training, and what each modality adds",
    "cache": "build, import, describe, verify or convert a cache of hidden states",
    "train": "train a model as a YAML file says",
    "evaluate": "rank a run's held-out targets in the full catalogue",
    "recommend": "the next items for a history of item names",
    "export": "a run's encoders as ONNX, its items' and users' embeddings as files",
    "convert": "another code's checkpoint to a model's folder",
    "verify": "compare a run's files with their digests, and with each other",
    "plot": "pictures of a run, and a report in one HTML file",
    "build": "compile the kernels now, not on their first use",
    "doctor": "what is installed, which backend each op uses, and why",
}

# A dotted key, `=`, and a value. A file of such a name is written `./key=value`.
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


# What a message that names its argument starts with: `users: …`, `evaluation.k: …`, `cache, users: …`.
_NAMED = re.compile(r"[\w.\[\]', -]+: ")

# Of what is a fault of this package: EX_SOFTWARE of sysexits.h.
FAULT = 70


class _Terminated(KeyboardInterrupt):
    """SIGTERM came: what Ctrl-C would have cleaned up is."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        What the command says, 0 when it succeeded; 2 with one line on stderr for a wrong input; 70 with one
        line for an error that nobody foresaw; 130 and 143 stopped by SIGINT and SIGTERM.
    """
    if argv is None:
        _use_utf8()
    for stream in (sys.stdout, sys.stderr):
        # What a terminal cannot show is escaped: a name in Greek must not fail a run that is done.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in arguments if not word.startswith("-")), "")
    told = f"crossan-fast {command}".strip()
    try:
        with _sigterm_as_interrupt():
            return _run(arguments)
    except KeyboardInterrupt as stopped:
        number = signal.SIGTERM if isinstance(stopped, _Terminated) else signal.SIGINT
        print(f"{told}: {'terminated' if number == signal.SIGTERM else 'interrupted'}", file=sys.stderr)
        return 128 + number
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        sys.stderr.close()
        return 1
    except Exception as error:
        if "--debug" in arguments:
            raise
        if _foreseen(error):
            print(f"{told}: error: {_message(error)}", file=sys.stderr)
            return 2
        print(
            f"{told}: this is a bug of crossan-fast: {type(error).__name__}: {_message(error)[:200]}; run it "
            "again as `crossan-fast --debug …` and report what it shows",
            file=sys.stderr,
        )
        return FAULT


def _run(arguments: list[str]) -> int:
    args = _parser(arguments).parse_args(arguments)
    if args.command is None:
        _parser(arguments).print_help()
        return 2
    with warnings.catch_warnings(), _logging_to_stderr():
        if not args.debug:
            warnings.showwarning = _show_warning
        return int(importlib.import_module(f"crossan_fast.cli.{args.command}").run(args))


class _Stderr(logging.Handler):
    """What the library logs, a line each, on the stderr of the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"crossan_fast: {record.getMessage()}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _logging_to_stderr() -> Iterator[None]:
    logger, handler = logging.getLogger("crossan_fast"), _Stderr()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _foreseen(error: Exception) -> bool:
    """Whether an error tells of an input or of the machine, and not of a fault of ours.

    TypeError and LookupError are raised for both: what is meant for a reader names its argument first.
    """
    if isinstance(error, (TypeError, LookupError)):
        return _NAMED.match(_text(error)) is not None
    return isinstance(error, (ValueError, OSError, ImportError, RuntimeError, MemoryError))


def _use_utf8() -> None:
    """Start again in Python's UTF-8 mode where paths would be ASCII: names of files and items are UTF-8."""
    if sys.getfilesystemencoding().lower().replace("-", "") != "utf8":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Within the block SIGTERM ends a command as Ctrl-C does.

    Not in one of several processes: who waits for the others in a library hears no signal, and `torchrun`
    ends those of a failed run by it.
    """

    def stop(number: int, frame: object) -> None:
        raise _Terminated

    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    ours = threading.current_thread() is threading.main_thread() and alone
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


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
    """The message on one line, with what to do where the system says only what is wrong."""
    text = " ".join(_text(error).split()) or type(error).__name__
    if isinstance(error, MemoryError):
        return f"not enough memory ({text}); a smaller batch or more memory is needed, or a file is damaged"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{text}; make room and run it again: what was there before is as it was"
    return text


def _text(error: BaseException) -> str:
    """`str` of a KeyError is its repr."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
