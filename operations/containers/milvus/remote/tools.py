# SPDX-License-Identifier: MIT
"""Runs on the guest: a Python environment with Milvus' driver, made anew."""

import json
import os
import shutil
import sys
import tempfile

from operations.remote.common import pip_words, run


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
        bundle = os.path.join(scratch, "ca.pem") if ca else ""
        if ca:
            with open(bundle, "w") as file:
                file.write(ca)
        words += pip_words(run(*pip, "--version")[1], index, bundle)
        status, output, error = run(*pip, *words, timeout=900)
    if status != 0:
        return (error or output).strip()
    with open(os.path.join(folder, "requirements.txt"), "w") as file:
        file.write(requirements)
    return ""


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
