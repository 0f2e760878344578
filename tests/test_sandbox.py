"""The sandboxes: hostile programs get nothing and end as they should; what is innocent runs as it would elsewhere."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from a3po_megatron.errors import RequestError
from a3po_megatron.reward.sandbox import choose, filter, syscalls
from a3po_megatron.reward.sandbox.choose import check_sandbox, sandbox_of, why_not
from a3po_megatron.reward.sandbox.local import Local, threads_of
from a3po_megatron.reward.sandbox.program import Chosen, Limits, Program, Ran, SandboxFailed
from tests.harness.programs import programs

HERE = Path(__file__).parent
SHORT = Limits(cpu_seconds=1, wall_seconds=3.0, memory_bytes=1 << 30, output_bytes=1 << 20)
PATIENT = replace(SHORT, wall_seconds=60.0)  # where something else ends the program, also on a busy machine
CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")
CORE_DUMPS = CORE_PATTERN.read_text()
MAY = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def may(call, *arguments):
    try:
        result = call(*arguments)
    except OSError:
        return False
    return result is None or not isinstance(result, int) or result >= 0
"""
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(bool(why_not(kind)), reason=f"{kind} does not hold here"))
    for kind in choose.AUTO
]


HOSTILE = programs("hostile_programs.txt")


@functools.cache
def results_of(kind: str, secret: Path) -> dict[str, Ran]:
    """All of them at once, as the workers of a node would."""
    sandbox = Local(Chosen(limits=SHORT), kind)
    tempfile.tempdir = str(secret.parent)

    def run(name: str) -> Ran:
        source = MAY + HOSTILE[name][0].replace("SECRET", str(secret))
        return sandbox.run(Program(source, b"x" * (4 << 20) if name == "stdin is never read" else b""))

    try:
        with ThreadPoolExecutor(12) as threads:
            return dict(zip(HOSTILE, threads.map(run, HOSTILE), strict=True))
    finally:
        tempfile.tempdir = None


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("trainer") / "secret.txt"
    path.write_text("of the trainer")
    os.environ["A3PO_TEST_SECRET"] = "of the trainer"
    yield path
    del os.environ["A3PO_TEST_SECRET"]
    assert path.read_text() == "of the trainer"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HOSTILE)
def test_no_hostile_program_gets_what_it_wants(kind: str, name: str, secret: Path) -> None:
    ran = results_of(kind, secret)[name]
    assert b"got it" not in ran.stdout, ran
    assert any(why in ran.why for why in HOSTILE[name][1].split(" or ")), ran


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_of_hostile_programs(kind: str, secret: Path) -> None:
    """No process, no folder, no file; nor has any of them changed what the kernel does with core dumps."""
    results_of(kind, secret)
    folder = str(secret.parent).encode()
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            with contextlib.suppress(OSError):
                assert folder not in (place / "cmdline").read_bytes()
                assert not os.readlink(place / "cwd").encode().startswith(folder)
    assert [path.name for path in secret.parent.iterdir()] == ["secret.txt"]
    assert not Path("/tmp/a3po-was-here").exists()
    assert CORE_PATTERN.read_text() == CORE_DUMPS


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("kind", [KINDS[0], pytest.param(*KINDS[1].values, marks=[pytest.mark.soak, *KINDS[1].marks])])
def test_without_root_they_hold_as_well(kind: str, tmp_path: Path) -> None:
    """The same programs, started by somebody without rights, whose own files and processes they are after."""
    python = shutil.which("python3", path="/usr/bin")
    if python is None or subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode:
        pytest.skip("needs a Python 3.11 that others than root may start")
    place = Path("/var/tmp") / f"a3po-sandbox-{os.getpid()}"
    shutil.copytree(HERE.parent / "a3po_megatron/reward/sandbox", place / "sandbox")
    shutil.copy(HERE / "harness/hostile_programs.txt", place)
    (place / "secret.txt").write_text("of somebody")
    (place / "run.py").write_text(
        f"""
import re, sys
from concurrent.futures import ThreadPoolExecutor
from sandbox.local import Local
from sandbox.program import Chosen, Limits, Program
sandbox = Local(Chosen(limits=Limits(1, 3.0, 1 << 30, 64 << 20, 1 << 20)), {kind!r})
parts = re.split(r"^### (.*?) \\|(.*)\\n", open("{place}/hostile_programs.txt").read(), flags=re.MULTILINE)[1:]
def run(part):
    name, why, source = part
    ran = sandbox.run(Program({MAY!r} + source.replace("SECRET", "{place}/secret.txt")))
    if b"got it" in ran.stdout or not any(part in ran.why for part in why.strip().split(" or ")):
        print(name, ran)
with ThreadPoolExecutor(12) as threads:
    list(threads.map(run, zip(parts[::3], parts[1::3], parts[2::3])))
print("all ran")
"""
    )
    try:
        for path in (place, *place.rglob("*")):
            os.chown(path, 65534, 65534)
        ran = subprocess.run(
            [python, "-B", str(place / "run.py")],
            capture_output=True,
            text=True,
            user=65534,
            group=65534,
            timeout=120,
            cwd="/",
        )
    finally:
        shutil.rmtree(place)
    assert ran.stdout == "all ran\n", ran.stdout + ran.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_an_innocent_program_runs_as_elsewhere(kind: str) -> None:
    source = """
import collections, dataclasses, decimal, fractions, heapq, itertools, json, math, random, re
import datetime, ssl, sqlite3, sys, threading, zoneinfo

@dataclasses.dataclass
class Point:
    x: "int"

def main():
    sys.setrecursionlimit(300_000)
    def depth(n):
        return 0 if n == 0 else 1 + depth(n - 1)
    with open("notes.txt", "w") as file:
        file.write("kept")
    print(input(), sys.stdin.read().split(), depth(50_000), open("notes.txt").read(), Point(1), __name__)

threading.stack_size(1 << 27)
thread = threading.Thread(target=main)
thread.start()
thread.join()
print(sorted({"b", "a"}), list({"one", "two", "three"}), "ü", zoneinfo.ZoneInfo("UTC"), file=sys.stderr)
"""
    sandbox = Local(Chosen(), kind)
    ran = sandbox.run(Program(source, b"first\n2 3\n"))
    assert ran.stdout == b"first ['2', '3'] 50000 kept Point(x=1) __main__\n" and ran.code == 0, ran
    assert sandbox.run(Program(source, b"first\n2 3\n")) == ran  # the order of a set, too


@pytest.mark.parametrize("kind", KINDS)
def test_how_a_program_ends_is_told(kind: str) -> None:
    sandbox = Local(Chosen(limits=PATIENT), kind)
    assert sandbox.run(Program("import sys; sys.exit(3)")).why == "it ended with code 3"
    assert sandbox.run(Program("1 / 0")).why == "ZeroDivisionError: division by zero"
    assert "SyntaxError" in sandbox.run(Program("def f(:")).why
    assert sandbox.run(Program("raise SystemExit('sandbox: it did not start')")).why == "sandbox: it did not start"
    assert sandbox.run(Program("import os; os._exit(0)")).why == ""
    assert sandbox.run(Program("x = bytearray(1 << 31)")).why == "MemoryError"
    written = sandbox.run(Program("import sys\nsys.stderr.write('a' * 500000 + 'end')\nsys.exit(1)"))
    assert written.stderr.startswith(b"aaa") and written.stderr.endswith(b"aend") and len(written.stderr) == 65536


@pytest.mark.parametrize("kind", KINDS)
def test_threads_are_bounded_for_the_program_alone(kind: str) -> None:
    """However many threads others of its user have: none of theirs counts against it, and none of its against them."""
    source = """
import threading, time
count = 0
try:
    while count < 200:
        threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
        count += 1
except RuntimeError:
    pass
print(count, flush=True)
import os
os._exit(0)
"""
    ran = Local(Chosen(limits=replace(SHORT, threads=20)), kind).run(Program(source))
    assert 15 <= int(ran.stdout or b"0") <= 20, ran


def test_threads_of_a_user_are_counted() -> None:
    with ThreadPoolExecutor(30) as pool:
        list(pool.map(lambda _: time.sleep(0.1), range(30)))
        assert threads_of(os.getuid()) >= 30


@pytest.mark.parametrize("kind", KINDS)
def test_a_named_folder_of_packages_can_be_imported(kind: str, tmp_path: Path) -> None:
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra/helpful.py").write_text("ANSWER = 42\n")
    sandbox = Local(Chosen(import_from=(str(tmp_path / "extra"),)), kind)
    assert sandbox.run(Program("import helpful; print(helpful.ANSWER)")).stdout == b"42\n"


@pytest.mark.parametrize("kind", KINDS)
def test_a_sandbox_that_does_not_start_is_no_fault_of_the_program(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would fail on another machine: an interpreter, a rule of Landlock, a filter that cannot be had."""
    sandbox = Local(Chosen(), kind)
    monkeypatch.setattr(sandbox, "_filter", "AAAAAAAAAAA=")
    with pytest.raises(SandboxFailed, match="did not start: sandbox: .*prctl 22"):
        sandbox.run(Program("print(1)"))


def test_without_sandbox_only_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "why_not", lambda kind: "no user namespaces" if kind == "bubblewrap" else "Linux 5.4")
    sandbox_of.cache_clear()
    with pytest.raises(RequestError, match="bubblewrap: no user namespaces; landlock: Linux 5.4.*sandbox.name: none"):
        check_sandbox(Chosen())
    check_sandbox(Chosen(name="none"))
    sandbox_of.cache_clear()


def test_without_a_sandbox_limits_still_hold() -> None:
    sandbox = sandbox_of(Chosen(name="none", limits=PATIENT))
    assert sandbox.run(Program("print(input())", b"in\n")).stdout == b"in\n"
    assert sandbox.run(Program("x = bytearray(1 << 31)")).why == "MemoryError"
    assert "CPU time" in sandbox.run(Program("while True:\n    pass")).why


@pytest.mark.parametrize(("machine", "column"), [("x86_64", 0), ("aarch64", 1)])
def test_the_numbers_of_system_calls_are_those_of_linux(machine: str, column: int) -> None:
    """Against the headers of this machine, which has both."""
    place = {
        "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        "aarch64": Path("/usr/include/asm-generic/unistd.h"),
    }[machine]
    if not place.exists():
        pytest.skip(f"{place} is not there (linux-libc-dev)")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", place.read_text())
    numbers = {name: int(number) for name, number in found}
    if machine == "aarch64":
        numbers["newfstatat"] = numbers["fstatat"]
    own = syscalls.ALLOWED | {
        **{"clone": syscalls.CLONE, "clone3": syscalls.CLONE3, "open": syscalls.OPEN, "openat": syscalls.OPENAT},
        **{"ioctl": syscalls.IOCTL, "fcntl": syscalls.FCNTL, "prctl": syscalls.PRCTL, "prlimit64": syscalls.PRLIMIT},
        **{"socketpair": syscalls.SOCKETPAIR, "clock_gettime": syscalls.CLOCK_GETTIME},
        "sched_getaffinity": syscalls.SCHED_GETAFFINITY,
    }
    assert {name: both[column] for name, both in own.items()} == {name: numbers.get(name) for name in own}
    assert len(filter.assemble(machine)) % 8 == 0 and len(filter.assemble(machine)) // 8 < 4096  # BPF_MAXINSNS


def test_the_text_inside_uses_the_standard_library_alone() -> None:
    """The sandboxed process has nothing else."""
    for name in ("inside", "wire", "asking", "answering"):
        text = (HERE.parent / f"a3po_megatron/reward/sandbox/{name}.py").read_text()
        modules = set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE))
        assert modules <= {*sys.stdlib_module_names, "wire"}, name
