# SPDX-License-Identifier: MIT
"""Runs on the guest: the container engine, and what Ollama says of the models that were made of files."""

import http.client
import json
import re
import urllib.error
import urllib.request
from typing import Any

from operations.containers.remote.engine import read
from operations.remote.common import answer

#: The model file that `/api/show` prints of a GGUF model names its weights' blob; the blob's name is its digest.
WEIGHTS = re.compile(r"^FROM .*\bsha256[-:]([0-9a-f]{64})\s*$", re.MULTILINE)


def read_with_models(url: str, of_files: list[str], **engine: Any) -> dict[str, Any]:
    """The engine's state; `made_of`: SHA-256 of the weights of each of the models `of_files`, None: not known."""
    found = read(**engine)
    found["made_of"] = {model: weights(url, model) for model in of_files}
    return found


def weights(url: str, model: str) -> str | None:
    """SHA-256 of the file that a model was made of, without reading that file."""
    # A proxy of the environment has nothing to say on this guest's own addresses.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    body = json.dumps({"model": model}).encode()
    request = urllib.request.Request(f"{url}/api/show", body, {"Content-Type": "application/json"})
    try:
        with opener.open(request, timeout=10) as response:
            shown = WEIGHTS.search(str(json.load(response).get("modelfile")))
    except (OSError, ValueError, http.client.HTTPException):
        return None
    return shown[1] if shown else None


if __name__ == "__main__":
    answer(read_with_models)
