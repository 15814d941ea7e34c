# SPDX-License-Identifier: MIT
"""Serves a folder over TLS: the Python index of the lab.

python -m rehearsal.python_index --address 127.0.0.1 --port 8100 --certificate PEM --key PEM FOLDER
"""

from __future__ import annotations

import argparse
import ssl
from functools import partial
from http.server import ThreadingHTTPServer

from rehearsal.nvidia.__main__ import Handler


class Server(ThreadingHTTPServer):
    """A handshake is the business of the connection's own thread: one that never begins holds up nobody."""

    def __init__(self, address: tuple[str, int], folder: str, context: ssl.SSLContext) -> None:
        super().__init__(address, partial(Handler, directory=folder))
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rehearsal.python_index", description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--certificate", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("folder")
    options = parser.parse_args()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(options.certificate, options.key)
    Server((options.address, options.port), options.folder, context).serve_forever()


if __name__ == "__main__":
    main()
