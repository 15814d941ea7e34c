# SPDX-License-Identifier: MIT
"""Operation cases: facts in, commands out; one YAML file a case, folders `operations/<package>.<module>.<operation>`.

pyinfra-testing runs them; its format is documented in pyinfra's own tests. Eight things are added here, so that a
case shows only what it is about:

- `like: NAME` in a fact's value takes the rest of it from `hosts/NAME.yaml`;
- `template: PATH` is what that template renders to without arguments;
- a file's content may be given as `text:`, `operations.files` has it in base64;
- `as_written: MODULE` with `for: [arguments]` stands for the files that `operations.MODULE.wanted_files` has;
- `library: pinned` is the digest of NVML's module as it is installed here;
- `assumed: true` is a guest that does not exist yet;
- a shell script with a name after it is shown as `{sh: the name, arguments: […]}`;
- a Python program sent to a host is shown as `{write: {path: [mode, text]}}` when it writes files, otherwise as
  `{python: its first line, argument: …, stdin: …}`.
"""

from __future__ import annotations

import base64
import importlib
import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pyinfra_testing.operations
import yaml
from pyinfra.api import QuoteString, StringCommand
from pyinfra_testing.operations import make_operation_tests
from pyinfra_testing.util import FakeHost

from operations.files import _WRITE, render
from operations.nvidia.settings import library_digest

HERE = Path(__file__).parent

#: The name of the host in every message.
HOST = "host1"

KEYS = {"args", "kwargs", "facts", "commands", "noop_description", "exception", "local_files", "assumed"}

# Steps ask the connector whether the host exists yet.
FakeHost.connector = None

_parse_commands = pyinfra_testing.operations.parse_commands
_create_host = pyinfra_testing.operations.create_host
_patch_files = pyinfra_testing.operations.patch_files


def named_host(*args: Any, **kwargs: Any) -> FakeHost:
    host = _create_host(*args, **kwargs)
    host.name = HOST
    return host


def pretended_files(local_files: dict[str, Any]) -> AbstractContextManager[None]:
    """pyinfra-testing hides every real file, our templates among them; only a case with `local_files` asks for that."""
    return _patch_files(local_files) if local_files else nullcontext()


def readable(commands: list[Any]) -> list[Any]:
    """As pyinfra-testing shows commands, Python programs in short."""
    return [_program(command) or _parse_commands([command])[0] for command in commands]


def _program(command: Any) -> dict[str, Any] | None:
    bits = command.bits if isinstance(command, StringCommand) else ()
    words = [bit.obj if isinstance(bit, QuoteString) else bit for bit in bits]
    if words[:2] == ["sh", "-c"] and len(words) > 3:
        return {"sh": words[3], "arguments": words[4:]}
    # A virtual environment's own, too.
    if words[1:2] != ["-c"] or words[0].rpartition("/")[2] not in ("python3", "python"):
        return None
    script, argument = words[2:]
    stdin = json.loads(command.connector_arguments.get("_stdin", "null"))
    if script == _WRITE.strip():
        return {"write": {path: _written(file) for path, file in stdin.items()}}
    return {"python": script.splitlines()[0], "argument": json.loads(argument), "stdin": stdin}


def _written(file: dict[str, Any] | None) -> list[str] | None:
    return None if file is None else [f"{file['mode']:04o}", base64.b64decode(file["content"]).decode()]


def expanded(value: Any) -> Any:
    """A case with every `like` and `text` replaced by what they stand for."""
    if isinstance(value, list):
        return [expanded(item) for item in value]
    if not isinstance(value, dict):
        return value
    value = {key: expanded(item) for key, item in value.items()}
    if "like" in value:
        path = HERE / "hosts" / f"{value.pop('like')}.yaml"
        value = merged(expanded(yaml.safe_load(path.read_text())), value)
    if set(value) == {"template"}:
        return render(value["template"])
    if "as_written" in value:
        return _as_written(value["as_written"], value["for"]) | {key: value[key] for key in value if "/" in key}
    if value.get("library") == "pinned":
        value["library"] = library_digest()
    if "text" in value:
        value["content"] = base64.b64encode(value.pop("text").encode()).decode()
    return value


def _as_written(module: str, arguments: list[Any]) -> dict[str, Any]:
    files = importlib.import_module(f"operations.{module}").wanted_files(*arguments)
    return {
        path: file and {"content": base64.b64encode(file.content.encode()).decode(), "mode": file.mode, "mtime": 0.0}
        for path, file in files.items()
    }


def merged(base: Any, over: Any) -> Any:
    """`base` with what `over` says otherwise; lists are replaced as a whole."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return base | {key: merged(base.get(key), value) for key, value in over.items()}


def cases(folder: Path) -> type[Any]:
    tests = make_operation_tests("operations", folder.name, folder)
    run = tests._test

    def expanded_test(self: Any, name: str, data: dict[str, Any]) -> None:
        unknown = set(data) - KEYS
        assert not unknown, f"{folder.name}/{name}: unknown keys {unknown}"
        whole = {**data, "facts": expanded(data.get("facts", {})), "kwargs": expanded(data.get("kwargs", {}))}
        with patch.object(FakeHost, "connector", SimpleNamespace(assumed=data.get("assumed", False))):
            run(self, name, whole)

    tests._test = expanded_test
    return tests


pyinfra_testing.operations.parse_commands = readable
pyinfra_testing.operations.create_host = named_host
pyinfra_testing.operations.patch_files = pretended_files
for _folder in sorted(path for path in (HERE / "operations").iterdir() if path.is_dir()):
    globals()[f"Test_{_folder.name}"] = cases(_folder)
