"""A parser whose complaints about unknown options and commands name the nearest known ones."""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

_CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)")


class SuggestingParser(argparse.ArgumentParser):
    """argparse's, with `did you mean` behind `unrecognized arguments` and `invalid choice`."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = super().parse_known_args(args, namespace)
        # Here and not in the parser above, which knows none of this one's options.
        wrong = next((word for word in unknown if word.startswith("--")), None)
        if wrong is not None:
            from crossan_fast._checks import nearest

            name = wrong.partition("=")[0]
            # Nearer than a key: all options share their hyphens.
            hint = nearest(name, self._option_string_actions, cutoff=0.6)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        if (found := _CHOICE.search(message)) is not None:
            from crossan_fast._checks import nearest

            message += nearest(found[1], re.findall(r"[\w.-]+", found[2]))
        super().error(message)
