# SPDX-License-Identifier: MIT
"""The base of all facts of ours: a whole subject as JSON, from one remote command."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from pyinfra.api import FactBase, QuoteString, StringCommand
from pyinfra.api.exceptions import FactProcessError


class JsonFact(FactBase[Any]):
    """A fact whose command prints one JSON value.

    Its default is None, which `operations.step.read()` takes for "could not be read". `absent` is the value of a
    host that does not exist yet and is planned as such.
    """

    absent: ClassVar[Any] = {}
    script: ClassVar[str]

    @staticmethod
    def default() -> Any:
        return None

    def command(self, *_: Any, **arguments: Any) -> StringCommand:
        """Run `script` (Python, standard library only) with the keyword arguments as JSON in `sys.argv[1]`.

        A fact with arguments overrides this with their names: pyinfra binds them to the signature that it sees, and
        would pass on what it finds in `**arguments` as one argument of that name.
        """
        return python(self.script, arguments)

    def process(self, output: list[str]) -> Any:
        try:
            return json.loads("\n".join(output))
        except ValueError as error:
            raise FactProcessError(f"{type(self).__name__}: expected JSON, got: {output[0][:120]!r}") from error


def python(script: str, argument: Any, **connector: Any) -> StringCommand:
    """A remote command that runs a Python program with one JSON argument. Secrets go over `_stdin` instead."""
    return StringCommand(
        *("python3", "-c", QuoteString(script.strip()), QuoteString(json.dumps(argument))), **connector
    )
