# SPDX-License-Identifier: MIT
"""The process that serves the API of each node of the lab: `python -m rehearsal.pve NODE=ADDRESS:PORT …`."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import sys
import threading
from contextlib import AsyncExitStack

from aiohttp import web

from rehearsal import ca, network, paths
from rehearsal.pve import etc_pve, images, service
from rehearsal.pve.containers import ContainerPower
from rehearsal.pve.front import Emulator, Front, Secrets
from rehearsal.pve.hardware import NodeHardware
from rehearsal.pve.state import Store
from rehearsal.pve.upstream import FakepveProcess, Upstream


async def main(words: list[str]) -> None:
    """Serve until SIGTERM. The nodes' VMs go on without us, and are found again at the next start."""
    authority = ca.authority(paths.ca())
    gateway = network.current().gateway
    names = threading.Lock()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    async with AsyncExitStack() as stack:
        for word in words:
            node, _, rest = word.partition("=")
            address, _, port = rest.partition(":")
            folder = paths.lab() / "pve" / node
            fakepve = FakepveProcess(folder, authority)
            stack.callback(fakepve.stop)
            store = Store(node, folder / "state.json")
            power = ContainerPower(node, folder / "volumes", folder / "hosts.json", names)
            emulator = Emulator(
                store=store,
                power=power,
                hardware=NodeHardware(node),
                certificate=authority.issue(node, [node, f"{node}.lab", address, "localhost", "127.0.0.1", gateway]),
                folder=folder / "storage",
                secrets=Secrets(password=secrets.token_hex(16), node=service.root_secret(node)),
            )
            front = Front(emulator, Upstream(fakepve))
            await front.start(gateway, int(port))
            stack.push_async_callback(front.stop)
            shown = asyncio.create_task(etc_pve.keep_up(node, store, power.running))
            stack.callback(shown.cancel)
            logging.info("%s: https://%s:%s, fakepve pid %d at %s", node, gateway, port, fakepve.pid, fakepve.url)
        await stack.enter_async_context(_ImageServer(gateway))
        await ended.wait()


class _ImageServer:
    """Serves the stand-in cloud image over plain HTTP, as a mirror would."""

    def __init__(self, address: str) -> None:
        app = web.Application()
        app.router.add_static("/", images.folder())
        self._address = address
        self._runner = web.AppRunner(app, access_log=None)

    async def __aenter__(self) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, self._address, images.PORT, reuse_address=True).start()

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    asyncio.run(main(sys.argv[1:]))
