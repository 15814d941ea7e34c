# SPDX-License-Identifier: MIT
"""A PCI function served over QEMU's multi-process protocol, asked as QEMU asks: through a socket, without QEMU."""

from __future__ import annotations

import os
import socket

import pytest

from rehearsal.kernel import pci_device
from rehearsal.kernel.pci_device import BAR, BAR0, COMMAND, CONFIG, HEADER, VALUE, Command, Function
from rehearsal.kernel.topology import A4000, A4000_AUDIO, TOPOLOGY, Part

BASE = 0xFE000000


class Qemu:
    """QEMU's end of the socket."""

    def __init__(self, function: Function) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(5)
        self.thread = pci_device.serve(function, theirs)

    def send(self, command: Command, body: bytes = b"", descriptors: tuple[int, ...] = ()) -> None:
        socket.send_fds(self.socket, [HEADER.pack(command, len(body)) + body], list(descriptors))

    def ask(self, command: Command, body: bytes = b"") -> int:
        self.send(command, body)
        answer = self.socket.recv(HEADER.size + VALUE.size, socket.MSG_WAITALL)
        assert HEADER.unpack_from(answer) == (Command.RET, VALUE.size)
        return VALUE.unpack_from(answer, HEADER.size)[0]

    def config(self, address: int, length: int) -> int:
        return self.ask(Command.CONFIG_READ, CONFIG.pack(address, 0, length))

    def set_config(self, address: int, value: int, length: int) -> None:
        assert self.ask(Command.CONFIG_WRITE, CONFIG.pack(address, value, length)) == 0

    def memory(self, address: int, length: int) -> int:
        return self.ask(Command.BAR_READ, BAR.pack(address, 0, length, True))

    def set_memory(self, address: int, value: int, length: int) -> None:
        assert self.ask(Command.BAR_WRITE, BAR.pack(address, value, length, True)) == 0


@pytest.fixture
def card():
    qemu = Qemu(A4000)
    yield qemu
    qemu.socket.close()
    qemu.thread.join(5)
    assert not qemu.thread.is_alive()


def test_messages_have_the_sizes_of_qemus_structures():
    assert (HEADER.size, CONFIG.size, BAR.size) == (16, 12, 24)


def test_card_tells_its_ids_class_and_subsystem(card):
    assert card.config(0x00, 4) == 0x24B010DE
    assert card.config(0x0A, 2) == 0x0300
    assert card.config(0x2C, 4) == 0x14AD10DE
    assert card.config(0x0E, 1) == 0x80, "function 0 says that there are more"


def test_ids_cannot_be_written(card):
    card.set_config(0x00, 0, 4)
    assert card.config(0x00, 4) == 0x24B010DE


def test_command_register_takes_only_bits_that_exist(card):
    card.set_config(COMMAND, 0xFFFF, 2)
    assert card.config(COMMAND, 2) == 0x0547


def test_bar_tells_its_size_to_who_writes_all_ones(card):
    card.set_config(BAR0, 0xFFFFFFFF, 4)
    assert card.config(BAR0, 4) == 0xFF000000, "16 MiB of 32-bit memory"


def test_other_bars_and_the_rom_do_not_exist(card):
    for address in (0x14, 0x18, 0x1C, 0x20, 0x24, 0x28, 0x30):
        card.set_config(address, 0xFFFFFFFF, 4)
        assert card.config(address, 4) == 0


def test_function_without_a_bar_has_none():
    qemu = Qemu(Function(0x8086, 0x1234, 0x0200))
    qemu.set_config(BAR0, 0xFFFFFFFF, 4)
    assert qemu.config(BAR0, 4) == 0


def test_config_space_ends_at_256_bytes(card):
    card.set_config(0x100, 1, 4)
    assert card.config(0x100, 4) == 0


def test_memory_moves_with_the_bar(card):
    card.set_config(BAR0, BASE, 4)
    assert card.memory(BASE, 4) == 0x174000A1, "the chip by which nouveau knows it"
    card.set_memory(BASE + 0x1000, 0x1122334455667788, 8)
    assert card.memory(BASE + 0x1004, 2) == 0x3344
    card.set_config(BAR0, BASE + 0x1000000, 4)
    assert card.memory(BASE + 0x1001000, 4) == 0x55667788


def test_reset_forgets_what_was_written(card):
    card.set_config(BAR0, BASE, 4)
    card.set_memory(BASE, 0, 4)
    assert card.ask(Command.RESET) == 0
    assert card.config(BAR0, 4) == 0
    assert card.memory(0, 4) == 0x174000A1


def test_messages_without_an_answer_are_passed_over_and_their_descriptors_closed(card):
    read, write = os.pipe()
    card.send(Command.SYNC_SYSMEM, bytes(96), (write,))
    card.send(Command.SET_IRQFD, b"", (write,))
    os.close(write)
    assert card.config(0x00, 2) == 0x10DE
    with open(read, "rb") as pipe:
        assert pipe.read() == b"", "all copies of the other end are closed"


def test_topology_survives_json():
    assert tuple(Part.from_plain(part.plain()) for part in TOPOLOGY) == TOPOLOGY
    assert Function.from_plain(A4000_AUDIO.plain()) == A4000_AUDIO
