# SPDX-License-Identifier: MIT
"""Runs on the guest: a Python environment with Milvus' driver, made anew."""

import json
import os
import shutil
import sys
import tempfile

from operations.remote.common import run


def make(folder: str, requirements: str, index: str, ca: str) -> str:
    """Make it; what went wrong, or an empty text."""
    status, output, error = run("python3", "-m", "venv", "--clear", folder, timeout=180)
    if status != 0:
        return (output + error).strip()
    pip = (os.path.join(folder, "bin/python"), "-m", "pip", "--disable-pip-version-check")
    with tempfile.TemporaryDirectory() as scratch:
        wanted = os.path.join(scratch, "requirements.txt")
        with open(wanted, "w") as file:
            file.write(requirements)
        # The list names all packages, and nothing is built here.
        words = ["install", "--quiet", "--no-deps", "--only-binary", ":all:", "-r", wanted]
        if index:
            words += ["--index-url", index]
        if ca:
            bundle = os.path.join(scratch, "ca.pem")
            with open(bundle, "w") as file:
                file.write(ca)
            words += ["--cert", bundle, *only_this_authority(pip)]
        status, output, error = run(*pip, *words, timeout=900)
    if status != 0:
        return (error or output).strip()
    with open(os.path.join(folder, "requirements.txt"), "w") as file:
        file.write(requirements)
    return ""


def only_this_authority(pip: tuple[str, ...]) -> list[str]:
    """Words that keep pip to `--cert`. From 24.2 on it asks the system's store, too, and fails with an address."""
    version = run(*pip, "--version")[1].split()[1:2]
    numbers = [int(part) for part in (version or ["0"])[0].split(".")[:2] if part.isdigit()]
    return ["--use-deprecated", "legacy-certs"] if numbers >= [24, 2] else []


def main() -> int:
    order = json.loads(sys.argv[1])
    failed = make(**order)
    if failed:
        # Without its list it is taken for absent.
        shutil.rmtree(order["folder"], ignore_errors=True)
        print(failed, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
