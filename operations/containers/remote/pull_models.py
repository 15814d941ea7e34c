# SPDX-License-Identifier: MIT
"""Runs on the guest: have Ollama pull the models that it does not have."""

import http.client
import json
import sys
import urllib.error
import urllib.request
from typing import Any

#: A download that reports no progress for this many seconds has failed.
IDLE_S = 300


def request(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=IDLE_S)


def pull(url: str, model: str) -> str:
    """Pull a model; what went wrong, or an empty text."""
    last = "no answer"
    try:
        with request(f"{url}/api/pull", {"model": model, "stream": True}) as response:
            for line in response:
                message = json.loads(line)
                if "error" in message:
                    return str(message["error"])
                last = message.get("status", last)
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}: {error.read()[:500].decode(errors='replace')}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"{error} (last: {last})"
    return "" if last == "success" else f"ended with: {last}"


def full(model: str) -> str:
    return model if ":" in model.rpartition("/")[2] else f"{model}:latest"


def main() -> int:
    order = json.loads(sys.argv[1])
    with request(f"{order['url']}/api/tags") as response:
        present = {full(item["name"]) for item in json.load(response)["models"]}
    failures = 0
    for model in order["models"]:
        if full(model) not in present:
            error = pull(order["url"], model)
            if error:
                failures += 1
                print(f"model {model}: {error}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
