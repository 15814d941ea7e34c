# SPDX-License-Identifier: MIT
"""The files that land on a host: read together in one command, written together in one, previous versions kept."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pyinfra.api import StringCommand

from operations import step
from operations.facts import JsonFact, python
from operations.plan import file_diff

TEMPLATES = Path(__file__).parent.parent / "templates"

_READ = """
import base64, json, os, pwd, stat, sys
found = {}
for path in json.loads(sys.argv[1])["paths"]:
    try:
        with open(path, "rb") as file:
            content = file.read()
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        found[path] = None
        continue
    found[path] = {
        "content": base64.b64encode(content).decode(),
        "mode": stat.S_IMODE(status.st_mode),
        "mtime": status.st_mtime,
    }
print(json.dumps(found))
"""

#: For each file that was ever written: `before-N` is what write N found, `after-N` what it put there; `.absent` behind
#: the name: no file. So `before-1` is the file as it was before gpulab; what a rollback puts back is no `after`.
VERSIONS = "/var/lib/gpulab/versions"

# Both versions are kept before the new one is renamed into place, so a run that is killed loses neither.
_WRITE = """
import base64, json, os, shutil, sys
def keep(folder, name, path):
    if not os.path.exists(path):
        open(os.path.join(folder, name + ".absent"), "w").close()
        return
    shutil.copy2(path, os.path.join(folder, name))
    status = os.stat(path)
    os.chown(os.path.join(folder, name), status.st_uid, status.st_gid)
argument = json.loads(sys.argv[1])
root = argument["root"]
for path, wanted in json.load(sys.stdin).items():
    folder = root + "/var/lib/gpulab/versions" + path
    path = root + path
    os.makedirs(folder, mode=0o700, exist_ok=True)
    number = 1 + sum(name.startswith("before-") for name in os.listdir(folder))
    if wanted is None:
        keep(folder, f"before-{number}", path)
        argument["ours"] and keep(folder, f"after-{number}", "")
        os.path.exists(path) and os.unlink(path)
        continue
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".gpulab-new", "wb", opener=lambda p, f: os.open(p, f, wanted["mode"])) as file:
        file.write(base64.b64decode(wanted["content"]))
        os.fchmod(file.fileno(), wanted["mode"])
        os.fsync(file.fileno())
    keep(folder, f"before-{number}", path)
    argument["ours"] and keep(folder, f"after-{number}", path + ".gpulab-new")
    os.rename(path + ".gpulab-new", path)
"""


@dataclass(frozen=True)
class File:
    """A file as it is or should be. `secret`: its content is never shown, only that it changes."""

    content: str
    mode: int = 0o644
    secret: bool = False


class Files(JsonFact):
    """The files named by `paths`: `{path: {content (base64), mode, mtime (seconds since the epoch)} | None}`."""

    script = _READ

    def command(self, paths: Sequence[str]) -> StringCommand:
        return super().command(paths=list(paths))


def render(template: str, **values: Any) -> str:
    """A file of `templates/`, with every variable required."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    return environment.get_template(template).render(**values)


def content_of(found: Mapping[str, Any], path: str) -> str | None:
    """The text of a file in a `Files` fact, None when it is absent (or the host is)."""
    return text_of(found.get(path))


def text_of(entry: Mapping[str, Any] | None) -> str | None:
    """The text of one file of a fact, None when it is absent."""
    return None if entry is None else base64.b64decode(entry["content"]).decode(errors="surrogateescape")


def kept_file(entry: Mapping[str, Any] | None) -> File | None:
    """A kept version as a file to write, None: the file was absent."""
    text = text_of(entry)
    return None if entry is None or text is None else File(text, entry["mode"])


def differing(found: Mapping[str, Any], wanted: Mapping[str, File | None]) -> dict[str, File | None]:
    """Those files of `wanted` that are not as they should be. None: the file should be absent."""
    result: dict[str, File | None] = {}
    for path, file in wanted.items():
        entry = found.get(path)
        if file is None:
            if entry is not None:
                result[path] = None
        elif entry is None or content_of(found, path) != file.content or entry["mode"] != file.mode:
            result[path] = file
    return result


def record(found: Mapping[str, Any], changing: Mapping[str, File | None]) -> None:
    """Put each changing file with its difference into the plan."""
    for path, file in changing.items():
        if file is not None and file.secret:
            step.changes(f"file {path} (secret content)")
            continue
        lines = file_diff(content_of(found, path), None if file is None else file.content)
        step.changes(f"file {path}" if file is not None else f"remove file {path}", lines)


def write(changing: Mapping[str, File | None], ours: bool = True) -> StringCommand:
    """One command that writes (or removes) all the files. Contents travel over stdin, never in the argument list.

    `ours`: the contents are gpulab's; a rollback puts back what is not.
    """
    payload = {
        path: None
        if file is None
        else {"content": base64.b64encode(file.content.encode(errors="surrogateescape")).decode(), "mode": file.mode}
        for path, file in changing.items()
    }
    return python(_WRITE, {"root": "", "ours": ours}, _stdin=json.dumps(payload))


@step.step
def files(wanted: Mapping[str, File | None], of: str) -> step.Commands:
    """
    Ensure that files have the given content and mode, or are absent.

    + wanted: path to `File`, or None for a file that must not exist
    + of: what the files are for, in a few words; said when nothing has to be done
    """
    found = step.read(Files, paths=sorted(wanted))
    changing = differing(found, wanted)
    if not changing:
        step.noop(f"the {len(wanted)} files of {of} are as declared")
        return
    record(found, changing)
    yield write(changing)


def newest(found: Mapping[str, Any], paths: Iterable[str]) -> float:
    """The latest modification time (seconds since the epoch) of those files, 0 when none exists."""
    return max((entry["mtime"] for path in paths if (entry := found.get(path)) is not None), default=0.0)
