"""Assembles the seccomp filter of a program, in classic BPF: the calls that are allowed (syscalls.py), and how."""

from __future__ import annotations

import errno
import platform
import struct

from . import syscalls

# linux/bpf_common.h, linux/filter.h, linux/seccomp.h, linux/audit.h
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column in syscalls.py, AUDIT_ARCH
_X32 = 0x40000000  # the numbers of another ABI on x86-64

CLONE_THREAD = 0x00010000
_TMPFILE = 0o20000000  # a file without a name, which no look into the folder sees
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
# Duplicate, flags and a pipe's size. Not F_SETOWN and F_SETSIG, with which the kernel signals whom it is told, and no
# locks: others may want them on files that all programs read.
_FCNTLS = (0, 1, 2, 3, 4, 1030, 1032)
_UNIX, _STREAMS = 1, (0x1, 0x801, 0x80001, 0x80801)  # of a pair of sockets: with and without NONBLOCK and CLOEXEC
_CLOCKS = 16  # above are the clocks of other processes
_PRCTLS = (3, 15, 16, 0x53564D41)  # whether it can be traced, a thread's name, names of mappings


def assemble(machine: str | None = None) -> bytes:
    """Returns the filter for a machine, this one by default, as an array of struct sock_filter.

    Raises KeyError for an architecture that syscalls.py does not know.
    """
    column, arch = MACHINES[machine or platform.machine()]
    code = [_instruction(_LOAD, _ARCH), _instruction(_EQUAL, arch, 1, 0), _instruction(_RETURN, _KILL)]
    code += [_instruction(_LOAD, _NUMBER)]
    if column == 0:
        code += [_instruction(_AT_LEAST, _X32, 0, 1), _refuse(errno.ENOSYS)]
    for numbers in syscalls.ALLOWED.values():
        code += _on(numbers[column], [_instruction(_RETURN, _ALLOW)])
    code += _on(syscalls.CLONE3[column], [_refuse(errno.ENOSYS)])
    code += _on(syscalls.CLONE[column], _with_bits(0, CLONE_THREAD, _ALLOW, _ERRNO | errno.EPERM))
    for call, flags in ((syscalls.OPEN, 1), (syscalls.OPENAT, 2)):
        code += _on(call[column], _with_bits(flags, _TMPFILE, _ERRNO | errno.EOPNOTSUPP, _ALLOW))
    code += _on(syscalls.IOCTL[column], _one_of(1, _IOCTLS, errno.ENOTTY))
    code += _on(syscalls.FCNTL[column], _one_of(1, _FCNTLS, errno.EPERM))
    code += _on(syscalls.PRCTL[column], _one_of(0, _PRCTLS, errno.EPERM))
    for call in (syscalls.PRLIMIT, syscalls.SCHED_GETAFFINITY):
        code += _on(call[column], _one_of(0, (0,), errno.EPERM))  # of itself, which is 0
    pair = [_argument(0), _instruction(_EQUAL, _UNIX, 1, 0), _refuse(errno.EPERM), *_one_of(1, _STREAMS, errno.EPERM)]
    code += _on(syscalls.SOCKETPAIR[column], pair)
    clock = [_argument(0), _instruction(_AT_LEAST, _CLOCKS, 1, 0), _instruction(_RETURN, _ALLOW), _refuse(errno.EINVAL)]
    code += _on(syscalls.CLOCK_GETTIME[column], clock)
    code += [_instruction(_AT_LEAST, syscalls.NEWEST + 1, 0, 1), _refuse(errno.ENOSYS), _refuse(errno.EPERM)]
    return b"".join(code)


def _instruction(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", operation, if_true, if_false, value)


def _refuse(number: int) -> bytes:
    return _instruction(_RETURN, _ERRNO | number)


def _on(number: int | None, block: list[bytes]) -> list[bytes]:
    """What is done on one call; every block ends the filter."""
    return [] if number is None else [_instruction(_EQUAL, number, 0, len(block)), *block]


def _argument(place: int) -> bytes:
    """Loads the lower half of an argument; these all have 32 bits."""
    return _instruction(_LOAD, _ARGUMENTS + 8 * place)


def _with_bits(place: int, bits: int, yes: int, no: int) -> list[bytes]:
    return [
        _argument(place),
        _instruction(_ANY_BIT, bits, 0, 1),
        _instruction(_RETURN, yes),
        _instruction(_RETURN, no),
    ]


def _one_of(place: int, values: tuple[int, ...], otherwise: int) -> list[bytes]:
    block = [_argument(place)]
    for value in values:
        block += [_instruction(_EQUAL, value, 0, 1), _instruction(_RETURN, _ALLOW)]
    return [*block, _refuse(otherwise)]
