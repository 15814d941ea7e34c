# SPDX-License-Identifier: MIT
"""Serves a folder over HTTP: a package repository of the lab.

python -m rehearsal.nvidia --address 127.0.0.1 --port 8099 FOLDER
"""

from __future__ import annotations

import argparse
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer


class Handler(SimpleHTTPRequestHandler):
    """Files with keep-alive, which apt uses for many small packages."""

    protocol_version = "HTTP/1.1"
    server_version = "gpulab-rehearsal-repository (simulated)"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rehearsal.nvidia", description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("folder")
    options = parser.parse_args()
    server = ThreadingHTTPServer((options.address, options.port), partial(Handler, directory=options.folder))
    server.serve_forever()


if __name__ == "__main__":
    main()
