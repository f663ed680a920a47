"""Runs a static program for 64-bit Arm Linux on another machine: `python emulate.py PROGRAM NUMBERS`.

Unicorn emulates the processor; the few calls of the system that such a program makes are answered here. What
it writes to standard output appears there, what it writes to descriptor 3 goes to the file NUMBERS.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unicorn import UC_ARCH_ARM64, UC_HOOK_INTR, UC_MODE_ARM, Uc, UcError
from unicorn import arm64_const as arm

PAGE = 4096
STACK, STACK_BYTES = 0x7F00_0000_0000, 8 << 20
HEAP, HEAP_BYTES = 0x4000_0000, 64 << 20  # brk
ARENA, ARENA_BYTES = 0x10_0000_0000, 1 << 30  # mmap
ENVIRONMENT = ("CROSSAN_FAST_CPU_L2",)
SILENT = {29, 96, 98, 113, 124, 134, 135, 178, 226, 233}  # ioctl to madvise: answered, and nothing is done


def up(value: int) -> int:
    return (value + PAGE - 1) // PAGE * PAGE


class Program:
    """One process: its memory, its system calls, and how it ended."""

    def __init__(self, path: Path, numbers: Path) -> None:
        self.machine = Uc(UC_ARCH_ARM64, UC_MODE_ARM)
        self.machine.ctl_set_cpu_model(arm.UC_CPU_ARM64_MAX)  # atomics of one instruction, as the target has
        self.files = {1: sys.stdout.buffer, 2: sys.stderr.buffer, 3: numbers.open("wb")}
        self.free: defaultdict[int, list[int]] = defaultdict(list)
        self.top, self.end = ARENA, HEAP
        self.status: int | None = None
        for start, size in ((STACK, STACK_BYTES), (HEAP, HEAP_BYTES), (ARENA, ARENA_BYTES)):
            self.machine.mem_map(start, size)
        self.entry, headers = self.load(path.read_bytes())
        self.machine.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # vectors are allowed
        self.machine.reg_write(arm.UC_ARM64_REG_SP, self.arguments(path, headers))
        self.machine.hook_add(UC_HOOK_INTR, self.interrupt)

    def load(self, image: bytes) -> tuple[int, dict[int, int]]:
        """Maps the segments; where to begin, and what the program is told of its headers."""
        if image[:4] != b"\x7fELF" or struct.unpack_from("<HH", image, 16) != (2, 183):
            raise SystemExit("expected a static executable for aarch64")
        entry, offset = struct.unpack_from("<QQ", image, 24)
        each, count = struct.unpack_from("<HH", image, 54)
        mapped, at = 0, 0
        for i in range(count):
            header = struct.unpack_from("<IIQQQQQ", image, offset + i * each)
            kind, _, start, address, _, stored, size = header
            if kind != 1:
                continue
            if start <= offset < start + stored:
                at = address + offset - start
            low, high = max(mapped, address // PAGE * PAGE), up(address + size)
            if high > low:
                self.machine.mem_map(low, high - low)
                mapped = high
            self.machine.mem_write(address, image[start : start + stored])
        return entry, {3: at, 4: each, 5: count, 6: PAGE, 9: entry}

    def arguments(self, path: Path, headers: dict[int, int]) -> int:
        """The stack as Linux hands it over: arguments, environment, auxiliary vector; its pointer."""
        at = STACK + STACK_BYTES - 64

        def put(data: bytes) -> int:
            nonlocal at
            at -= len(data)
            self.machine.mem_write(at, data)
            return at

        random = put(bytes(range(16)))
        name = put(os.fsencode(path) + b"\0")
        words = [1, name, 0]
        words += [put(f"{key}={os.environ[key]}\0".encode()) for key in ENVIRONMENT if key in os.environ]
        words.append(0)
        for key, value in (headers | {25: random, 0: 0}).items():
            words += [key, value]
        at = (at - 8 * len(words)) // 16 * 16
        self.machine.mem_write(at, struct.pack(f"<{len(words)}Q", *words))
        return at

    def interrupt(self, machine: Uc, number: int, _: Any) -> None:
        if number != 2:  # not a system call: a fault of the program
            self.status = 128 + number
            machine.emu_stop()
            return
        call = machine.reg_read(arm.UC_ARM64_REG_X8)
        arguments = [machine.reg_read(arm.UC_ARM64_REG_X0 + i) for i in range(6)]
        machine.reg_write(arm.UC_ARM64_REG_X0, self.answer(call, arguments) & (1 << 64) - 1)

    def answer(self, call: int, arguments: list[int]) -> int:
        calls: dict[int, Callable[..., int]] = {64: self.write, 66: self.writev, 93: self.exit, 94: self.exit}
        calls |= {214: self.brk, 215: self.munmap, 222: self.mmap}
        if call in calls:
            return calls[call](*arguments)
        if call == 56:  # openat: the program finds nothing
            return -errno.ENOENT
        return 0 if call in SILENT else -errno.ENOSYS

    def write(self, descriptor: int, address: int, size: int, *_: int) -> int:
        self.files[descriptor].write(self.machine.mem_read(address, size))
        return size

    def writev(self, descriptor: int, address: int, count: int, *_: int) -> int:
        parts = struct.iter_unpack("<QQ", self.machine.mem_read(address, 16 * count))
        return sum(self.write(descriptor, start, size) for start, size in parts)

    def brk(self, address: int, *_: int) -> int:
        if HEAP <= address <= HEAP + HEAP_BYTES:
            self.end = address
        return self.end

    def mmap(self, address: int, size: int, _: int, flags: int, *__: int) -> int:
        if not flags & 0x20 or flags & 0x10:  # of a file, or at a fixed place
            return -errno.ENODEV
        size = up(size)
        if self.free[size]:
            address = self.free[size].pop()
            self.machine.mem_write(address, bytes(size))
            return address
        address, self.top = self.top, self.top + size
        return address if self.top <= ARENA + ARENA_BYTES else -errno.ENOMEM

    def munmap(self, address: int, size: int, *_: int) -> int:
        self.free[up(size)].append(address)
        return 0

    def exit(self, status: int, *_: int) -> int:
        self.status = status & 0xFF
        self.machine.emu_stop()
        return 0

    def run(self) -> int:
        try:
            self.machine.emu_start(self.entry, 0)
        except UcError as error:
            place = self.machine.reg_read(arm.UC_ARM64_REG_PC)
            print(f"the program failed at {place:#x}: {error}", file=sys.stderr)
            return 139
        finally:
            for file in self.files.values():
                file.flush()
        return 1 if self.status is None else self.status


def main() -> None:
    program, numbers = sys.argv[1:]
    start = time.monotonic()
    status = Program(Path(program), Path(numbers)).run()
    print(f"{time.monotonic() - start:.0f} s under the emulator", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
