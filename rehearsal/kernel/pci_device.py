# SPDX-License-Identifier: MIT
"""PCI functions of any id for a QEMU machine: config space and BAR 0 served over QEMU's multi-process protocol.

QEMU's `x-pci-proxy-dev` hands every access to a socket. A guest's drivers so probe a function by its real ids; behind
them is nothing but memory. The protocol is QEMU's hw/remote/mpqemu-link.c and include/hw/remote/mpqemu-link.h.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

CONFIG_BYTES = 256
VENDOR_ID, DEVICE_ID, COMMAND, REVISION, CLASS, HEADER_TYPE = 0x00, 0x02, 0x04, 0x08, 0x0A, 0x0E
BAR0, SUBSYSTEM_VENDOR, SUBSYSTEM_DEVICE, INTERRUPT_LINE, INTERRUPT_PIN = 0x10, 0x2C, 0x2E, 0x3C, 0x3D
CACHE_LINE = 0x0C
#: Header type bit of function 0 of a device with several functions.
MULTIFUNCTION = 0x80
#: Bits of the command register that a PCI function implements: I/O, memory, master, parity, SERR, INTx off.
COMMAND_BITS = 0x0547


class Command(IntEnum):
    """What QEMU asks for. The first, and the interrupt's descriptors, expect no answer."""

    SYNC_SYSMEM = 0
    RET = 1
    CONFIG_WRITE = 2
    CONFIG_READ = 3
    BAR_WRITE = 4
    BAR_READ = 5
    SET_IRQFD = 6
    RESET = 7


#: command, padding, bytes that follow
HEADER = struct.Struct("<i4xQ")
#: address, value, bytes
CONFIG = struct.Struct("<IIi")
#: address in the guest's memory, value, bytes, memory (not I/O)
BAR = struct.Struct("<QQI?3x")
VALUE = struct.Struct("<Q")
#: More descriptors than this come with no message of QEMU's.
DESCRIPTORS = 8


@dataclass(frozen=True)
class Function:
    """A PCI function as its config space tells it.

    `pci_class`: class and subclass (0x0300 is VGA). `bar0_bytes`: size of the 32-bit memory BAR 0, a power of two from
    16 on, or 0 for none. `word0`: the 32-bit word that stands at its begin after a reset.
    """

    vendor: int
    device: int
    pci_class: int
    subsystem: tuple[int, int] = (0, 0)
    revision: int = 0
    bar0_bytes: int = 0
    multifunction: bool = False
    word0: int = 0

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Function:
        return cls(**{**plain, "subsystem": tuple(plain["subsystem"])})


class Registers:
    """Config space and BAR 0 of one function. Values are little-endian integers, lengths are in bytes."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.reset()

    def reset(self) -> None:
        """As after power on."""
        function = self.function
        self._config = bytearray(CONFIG_BYTES)
        struct.pack_into("<HH", self._config, VENDOR_ID, function.vendor, function.device)
        self._config[REVISION] = function.revision
        struct.pack_into("<H", self._config, CLASS, function.pci_class)
        self._config[HEADER_TYPE] = MULTIFUNCTION if function.multifunction else 0
        struct.pack_into("<HH", self._config, SUBSYSTEM_VENDOR, *function.subsystem)
        self._config[INTERRUPT_PIN] = 1
        self._writable = bytearray(CONFIG_BYTES)
        struct.pack_into("<H", self._writable, COMMAND, COMMAND_BITS)
        self._writable[CACHE_LINE] = self._writable[INTERRUPT_LINE] = 0xFF
        if function.bar0_bytes:
            # Who writes all ones reads the size back: the address bits below it do not exist.
            struct.pack_into("<I", self._writable, BAR0, 0x100000000 - function.bar0_bytes)
        self._memory: dict[int, int] = {}
        self._store(0, function.word0, 4)

    def config_read(self, address: int, length: int) -> int:
        """What stands at a config address; 0 beyond the 256 bytes."""
        return int.from_bytes(self._config[address : address + length], "little")

    def config_write(self, address: int, value: int, length: int) -> None:
        """Change the bits that can be changed."""
        for position, byte in enumerate((value & (1 << 8 * length) - 1).to_bytes(length, "little"), start=address):
            if position < CONFIG_BYTES:
                mask = self._writable[position]
                self._config[position] = self._config[position] & ~mask | byte & mask

    def bar_read(self, address: int, length: int) -> int:
        """Memory behind BAR 0; `address` is the guest's, so it moves with the BAR."""
        offset = self._offset(address)
        return int.from_bytes(bytes(self._memory.get(offset + index, 0) for index in range(length)), "little")

    def bar_write(self, address: int, value: int, length: int) -> None:
        """Write memory behind BAR 0."""
        self._store(self._offset(address), value & (1 << 8 * length) - 1, length)

    def _offset(self, address: int) -> int:
        (base,) = struct.unpack_from("<I", self._config, BAR0)
        return (address - base) % (self.function.bar0_bytes or 1)

    def _store(self, offset: int, value: int, length: int) -> None:
        for index, byte in enumerate(value.to_bytes(length, "little")):
            self._memory[offset + index] = byte


def serve(function: Function, connection: socket.socket) -> threading.Thread:
    """Answer QEMU on `connection` in a thread of its own, until QEMU closes it."""
    thread = threading.Thread(target=_answer, args=(Registers(function), connection), daemon=True)
    thread.start()
    return thread


def _answer(registers: Registers, connection: socket.socket) -> None:
    with connection:
        while (header := _receive(connection, HEADER.size)) is not None:
            command, size = HEADER.unpack(header)
            body = _receive(connection, size)
            if body is None:
                return
            value = _handle(registers, command, body)
            if value is not None:
                try:
                    connection.sendall(HEADER.pack(Command.RET, VALUE.size) + VALUE.pack(value))
                except BrokenPipeError:
                    return


def _handle(registers: Registers, command: int, body: bytes) -> int | None:
    """The answer to one message; None where QEMU waits for none."""
    match command:
        case Command.CONFIG_READ:
            address, _, length = CONFIG.unpack_from(body)
            return registers.config_read(address, length)
        case Command.CONFIG_WRITE:
            registers.config_write(*CONFIG.unpack_from(body))
            return 0
        case Command.BAR_READ:
            address, _, length, _ = BAR.unpack_from(body)
            return registers.bar_read(address, length)
        case Command.BAR_WRITE:
            address, value, length, _ = BAR.unpack_from(body)
            registers.bar_write(address, value, length)
            return 0
        case Command.RESET:
            registers.reset()
            return 0
    return None


def _receive(connection: socket.socket, size: int) -> bytes | None:
    """Exactly `size` bytes, None at the end. Descriptors that come along (memory, interrupts) are closed: unused."""
    data = b""
    while len(data) < size:
        try:
            part, descriptors, _, _ = socket.recv_fds(connection, size - len(data), DESCRIPTORS)
        except ConnectionResetError:
            return None
        for descriptor in descriptors:
            os.close(descriptor)
        if not part:
            return None
        data += part
    return data
