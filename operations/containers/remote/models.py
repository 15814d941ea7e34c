# SPDX-License-Identifier: MIT
"""Runs on the guest: have Ollama pull, make and remove models, telling of it on stdout; stderr says what went wrong.

What cannot be had leaves the others alone, and what is there stays there until its successor is complete.
"""

import hashlib
import http.client
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from operations.containers.remote.ollama import weights

#: A download that reports no progress for this many seconds has failed. Making a model reads its whole file.
IDLE_S = 600
#: A line is printed for each so many percent.
STEP = 20
BLOCK = 4 * 1024 * 1024


class Failed(Exception):
    """What went wrong with one model; Ollama's own words where it said some."""


class Progress:
    """Percent and MB of a model: a few lines, however large it is."""

    def __init__(self, verb: str, model: str) -> None:
        self.what = f"{verb} {model}"
        self.told = 0

    def at(self, done: int, total: int) -> None:
        percent = done * 100 // total if total else 0
        if percent >= self.told + STEP or (percent == 100 and self.told < 100):
            self.told = percent - percent % STEP
            say(f"{self.what}: {percent} % of {total / 1e6:.1f} MB")


def say(words: str) -> None:
    print(words, flush=True)


def send(url: str, body: Any = None, method: str | None = None, **headers: str) -> Any:
    """The open answer of a request."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    given = {"Content-Type": "application/json", **{key.replace("_", "-"): value for key, value in headers.items()}}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return opener.open(urllib.request.Request(url, data, given, method=method), timeout=IDLE_S)
    except urllib.error.HTTPError as error:
        raise Failed(words_of(error)) from None
    except (OSError, http.client.HTTPException) as error:
        raise Failed(str(error)) from None


def words_of(error: urllib.error.HTTPError) -> str:
    """What Ollama says of an error, or whatever else came in its place."""
    content = error.read()[:500].decode(errors="replace")
    try:
        return str(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {error.code}: {content}".rstrip(": ")


def stream(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The messages of a long answer, which must end with `success`."""
    last = "no answer"
    try:
        with send(url, body) as response:
            for line in response:
                message = json.loads(line)
                if "error" in message:
                    raise Failed(str(message["error"]))
                last = message.get("status", last)
                yield message
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Failed(f"{error} (last: {last})") from None
    if last != "success":
        raise Failed(f"ended with: {last}")


def full(model: str) -> str:
    return model if ":" in model.rpartition("/")[2] else f"{model}:latest"


def digests(url: str) -> dict[str, str]:
    """The models that Ollama has, by full name."""
    with send(f"{url}/api/tags") as response:
        return {full(item["name"]): str(item.get("digest", "")) for item in json.load(response)["models"] or []}


def pull(url: str, model: str, wanted: str | None) -> None:
    before = digests(url).get(full(model))
    if before is not None and wanted in (None, before):
        return
    progress, layers = Progress("pulling", model), {}
    for message in stream(f"{url}/api/pull", {"model": model, "stream": True}):
        if message.get("total"):
            layers[message["digest"]] = (message.get("completed", 0), message["total"])
            progress.at(sum(done for done, _ in layers.values()), sum(total for _, total in layers.values()))
    got = digests(url).get(full(model), "none")
    if wanted not in (None, got):
        raise Failed(f"its digest is {got}, declared is {wanted}; the model stays as it was pulled")


def make(url: str, model: str, path: str, wanted: str) -> None:
    """Make a model of a file on this guest. Ollama keeps what it has under that name until the new one is complete."""
    if weights(url, model) == wanted:
        return
    blob = f"{url}/api/blobs/sha256:{wanted}"
    if not has(blob):
        try:
            size, got = os.path.getsize(path), digest_of(path, model)
        except OSError as error:
            raise Failed(f"{path}: {error.strerror}") from None
        if got != wanted:
            raise Failed(f"{path}: its SHA-256 is {got}, declared is {wanted}")
        say(f"handing {path} to Ollama: {size / 1e6:.1f} MB")
        with open(path, "rb") as file:
            send(blob, file, "POST", Content_Length=str(size)).close()
    for _ in stream(f"{url}/api/create", {"model": model, "files": {os.path.basename(path): f"sha256:{wanted}"}}):
        pass
    say(f"made {model} of {path}")


def has(blob: str) -> bool:
    """Does Ollama have that blob?"""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(urllib.request.Request(blob, method="HEAD"), timeout=IDLE_S).close()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return False
        raise Failed(f"HTTP {error.code} for {blob}") from None
    except (OSError, http.client.HTTPException) as error:
        raise Failed(str(error)) from None
    return True


def digest_of(path: str, model: str) -> str:
    progress, total, done = Progress("checking the file of", model), os.path.getsize(path), 0
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            done += len(block)
            progress.at(done, total)
    return digest.hexdigest()


def remove(url: str, model: str) -> None:
    send(f"{url}/api/delete", {"model": model}, "DELETE").close()
    say(f"removed {model}")


def had(model: str, act: Callable[..., None], *arguments: Any) -> bool:
    """Do one thing for one model, or say on stderr what kept it from being done."""
    try:
        act(*arguments)
    except Failed as failed:
        print(f"model {model}: {failed}", file=sys.stderr, flush=True)
        return False
    return True


def main() -> int:
    order = json.loads(sys.argv[1])
    url = order["url"]
    done = [had(each["name"], make, url, each["name"], each["gguf"], each["sha256"]) for each in order["make"]]
    done += [had(each["name"], pull, url, each["name"], each["digest"]) for each in order["pull"]]
    # Only once all that is declared is there: the others may be what the lab still works with.
    if order["keep"] is not None and all(done):
        try:
            others = sorted(digests(url).keys() - order["keep"])
        except Failed as failed:
            print(failed, file=sys.stderr)
            return 1
        done += [had(model, remove, url, model) for model in others]
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
