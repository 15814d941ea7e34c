# SPDX-License-Identifier: MIT
"""Runs on the guest: pull an image, with a line now and then of how far it is."""

import json
import subprocess
import sys
import threading
import time

#: What Docker and Podman say, without a terminal, of a layer that they begin with and one that is there.
BEGUN = ("Pulling fs layer", "Copying blob")
ENDED = ("Pull complete", "Already exists", "done", "skipped: already exists")


class Pull:
    """One pull and what it has said."""

    def __init__(self, engine: str, image: str) -> None:
        self.began = time.monotonic()
        self.image, self.lines = image, [""]
        self.layers: set[str] = set()
        self.ended: set[str] = set()
        self.process = subprocess.Popen(
            [engine, "pull", image], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )

    def follow(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = line.strip()
            layer, _, state = said.partition(": ")
            if said.startswith("Copying blob"):
                layer = " ".join(said.split()[:3])
                state = said.removeprefix(layer).strip() or "Copying blob"
            if state.startswith(BEGUN) or state.startswith(ENDED):
                self.layers.add(layer)
            if state.startswith(ENDED):
                self.ended.add(layer)
            self.lines.append(said)

    def far(self) -> str:
        seconds = time.monotonic() - self.began
        return f"{self.image.partition('@')[0]}: {len(self.ended)} of {len(self.layers)} layers after {seconds:.0f} s"


def main() -> int:
    order = json.loads(sys.argv[1])
    pull = Pull(order["engine"], order["image"])
    follower = threading.Thread(target=pull.follow)
    follower.start()
    wait_s = order["every_s"]
    while follower.is_alive():
        follower.join(wait_s)
        if follower.is_alive():
            print(pull.far(), flush=True)
            # Few lines, however long it takes.
            wait_s = min(wait_s * 2, 120)
    if pull.process.wait() != 0:
        print([line for line in pull.lines if line or len(pull.lines) == 1][-1], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
