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
    with tempfile.TemporaryDirectory() as scratch:
        wanted = os.path.join(scratch, "requirements.txt")
        with open(wanted, "w") as file:
            file.write(requirements)
        # The list names all packages, and nothing is built here.
        words = [
            "install",
            "--quiet",
            "--no-deps",
            "--only-binary",
            ":all:",
            "-r",
            wanted,
        ]
        if index:
            words += ["--index-url", index]
        if ca:
            bundle = os.path.join(scratch, "ca.pem")
            with open(bundle, "w") as file:
                file.write(ca)
            words += ["--cert", bundle, *without_truststore(folder)]
        status, output, error = run(os.path.join(folder, "bin/python"), "-m", "pip", *words, timeout=900)
    if status != 0:
        return (error or output).strip()
    with open(os.path.join(folder, "requirements.txt"), "w") as file:
        file.write(requirements)
    return ""


def without_truststore(folder: str) -> list[str]:
    """pip checks certificates by a library that knows no server by its address alone; older ones have none of it."""
    version = run(os.path.join(folder, "bin/python"), "-c", "import pip; print(pip.__version__)")[1].split(".")
    return ["--use-deprecated", "legacy-certs"] if tuple(map(int, version[:2])) >= (24, 2) else []


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
