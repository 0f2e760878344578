"""What a sandboxed process does first: it gives up all that it may, then runs the program.

    python -I -S -c THIS FD        FD: a file with the JSON of what follows (local.py: `_told`)

Its text is run, it is never imported by the trainer: standard library only, and nothing of this package. It says that
all is given up by a byte in the pipe `ready`; without that byte no line of the program has run, and the words on stderr
say why.
"""

import base64
import ctypes
import json
import os
import resource
import struct
import sys
from typing import Any

# linux/prctl.h, linux/securebits.h, linux/capability.h, linux/landlock.h
PDEATHSIG, SET_SECCOMP, SECUREBITS, NO_NEW_PRIVS = 1, 22, 28, 38
NO_ROOT, FILTER, KILL = 0b101111, 2, 9  # root is nobody special, and stays so
CAPABILITIES = 0x20080522
CREATE, ADD, RESTRICT = 444, 445, 446  # system calls of Landlock, on all architectures
WRITE_FILE, READ_FILE, READ_DIR, MAKE_REG, TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 8, 1 << 14
FILES = {3: (1 << 15) - 1, 5: (1 << 16) - 1}  # what each version of Landlock rules
NETWORK, SCOPES = {4: 0b11}, {6: 0b11}  # TCP; abstract sockets and signals
OLDEST = 3  # before, it rules no truncation

libc = ctypes.CDLL(None, use_errno=True)


def call(what: str, *arguments: Any) -> int:
    result = (
        libc.syscall(*map(number, arguments)) if what == "syscall" else getattr(libc, what)(*map(number, arguments))
    )
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what} {arguments[0]}: {os.strerror(code)}")
    return int(result)


def number(argument: Any) -> Any:
    return ctypes.c_long(argument) if isinstance(argument, int) else argument


def become(user: dict[str, Any]) -> None:
    """Root becomes somebody without any capability. `files`: it stays the owner of root's files, which the interpreter
    may be; the kernel counts its threads by the real user all the same."""
    if os.geteuid() == 0:
        os.setgroups([])
        stays = 0 if user["files"] else user["id"]
        os.setresgid(user["id"], stays, stays)
        call("prctl", SECUREBITS, NO_ROOT, 0, 0, 0)
        os.setresuid(user["id"], stays, stays)
    header, none = struct.pack("=Ii", CAPABILITIES, 0), bytes(24)
    call("capset", ctypes.c_char_p(header), ctypes.c_char_p(none))


def limit(limits: dict[str, int]) -> None:
    def at_most(what: int, soft: int, hard: int | None = None) -> None:
        highest = resource.getrlimit(what)[1]
        values = [value if highest == resource.RLIM_INFINITY else min(value, highest) for value in (soft, hard or soft)]
        resource.setrlimit(what, (values[0], values[1]))

    at_most(resource.RLIMIT_CPU, limits["cpu_seconds"], limits["cpu_seconds"] + 1)
    at_most(resource.RLIMIT_AS, limits["memory_bytes"])
    at_most(resource.RLIMIT_STACK, min(64 << 20, limits["memory_bytes"] // 4))
    at_most(resource.RLIMIT_FSIZE, limits["files_bytes"])
    at_most(resource.RLIMIT_NPROC, limits["threads"])
    for what, value in (("NOFILE", 64), ("CORE", 0), ("MEMLOCK", 0), ("MSGQUEUE", 0), ("SIGPENDING", 64)):
        at_most(getattr(resource, "RLIMIT_" + what), value)


def rule(readable: list[str], folder: str) -> None:
    """Landlock: reads what is listed and writes plain files into the folder; no other path can be opened."""
    version = libc.syscall(ctypes.c_long(CREATE), None, ctypes.c_size_t(0), ctypes.c_uint(1))
    if version < OLDEST:
        raise OSError(f"this kernel has Landlock {max(version, 0)}, and {OLDEST} is needed (Linux 6.2)")
    files, network, scopes = (
        max((bits for since, bits in table.items() if since <= version), default=0)
        for table in (FILES, NETWORK, SCOPES)
    )
    attributes = struct.pack("=QQQ", files, network, scopes)[: 24 if scopes else 16 if network else 8]
    rules = call("syscall", CREATE, ctypes.c_char_p(attributes), len(attributes), 0)
    allowed = [(path, READ_FILE | READ_DIR) for path in readable]
    allowed += [
        (folder, READ_FILE | READ_DIR | WRITE_FILE | MAKE_REG | TRUNCATE),
        ("/dev/null", READ_FILE | WRITE_FILE),
    ]
    for path, rights in allowed:
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # removed meanwhile: what is not there needs no rule
            continue
        if not os.path.isdir(path):
            rights &= READ_FILE | WRITE_FILE | TRUNCATE
        call("syscall", ADD, rules, 1, ctypes.c_char_p(struct.pack("=Qi", rights, opened)), 0)
        os.close(opened)
    call("syscall", RESTRICT, rules, 0)
    os.close(rules)


def refuse_calls(assembled: bytes) -> None:
    filled = ctypes.create_string_buffer(assembled, len(assembled))
    program = struct.pack("@HP", len(assembled) // 8, ctypes.addressof(filled))
    call("prctl", SET_SECCOMP, FILTER, ctypes.c_char_p(program), 0, 0)


def confine(told: dict[str, Any]) -> None:
    if told["parent"]:
        call("prctl", PDEATHSIG, KILL, 0, 0, 0)
        if os.getppid() != told["parent"]:
            raise OSError("the grader that started it is gone")
    os.umask(0o077)
    if told["user"] is not None:
        become(told["user"])
        if told["parent"]:  # changing the user forgets it
            call("prctl", PDEATHSIG, KILL, 0, 0, 0)
    os.chdir(told["folder"])
    call("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
    limit(told["limits"])
    if told["readable"] is not None:
        rule(told["readable"], told["folder"])
    if told["filter"]:
        refuse_calls(base64.b64decode(told["filter"]))


def main(names: dict[str, Any]) -> None:
    with open(int(sys.argv[1]), "rb") as file:
        told = json.loads(file.read())
    try:
        confine(told)
    except (OSError, ValueError, AttributeError) as error:
        sys.exit(f"sandbox: {error}")
    os.write(told["ready"], b".")  # from here on whatever happens is the program's own doing
    os.close(told["ready"])
    sys.path += told["import_from"]
    sys.set_int_max_str_digits(0)
    sys.argv = ["program.py", *([str(told["channel"])] if told["channel"] is not None else [])]
    run = exec
    for name in [name for name in names if not name.startswith("__")]:
        del names[name]
    run(compile(told["source"], "program.py", "exec"), names)


if __name__ == "__main__":
    main(globals())
