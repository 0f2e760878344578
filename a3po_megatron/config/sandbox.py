"""Settings of `reward/sandbox/`: where programs of models run, and what they may take."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from .section import NonNegative, Positive, PositiveFloat, Section, by_name, option


class _Sandbox(Section):
    name: str
    wall_seconds: PositiveFloat = option(20.0, "of one program; where tests are inputs and outputs, of each")
    output_bytes: Positive = option(8 << 20, "that a program may write to stdout, and to stderr")


class _LocalSandbox(_Sandbox):
    cpu_seconds: Positive = option(10, "of one program")
    memory_bytes: Annotated[int, Field(ge=256 << 20)] = option(2 << 30, "address space of a program")
    files_bytes: Positive = option(64 << 20, "of all files that a program writes")
    threads: Positive = option(64, "of a program; it can start no other process")
    import_from: tuple[str, ...] = option((), "folders with packages that programs may import; the host's they may not")


class AutoSandbox(_LocalSandbox):
    name: Literal["auto"] = option("auto", "where programs run; auto: bubblewrap, else landlock, else nowhere")


class Bubblewrap(_LocalSandbox):
    name: Literal["bubblewrap"] = option("bubblewrap", "where programs run: in namespaces of their own")


class Landlock(_LocalSandbox):
    name: Literal["landlock"] = option("landlock", "where programs run: under rules of the kernel")


class NoSandbox(_LocalSandbox):
    name: Literal["none"] = option("none", "where programs run: with all that you may do, but for limits")


class RemoteSandbox(_Sandbox):
    name: Literal["remote"] = option("remote", "where programs run: on a server")
    url: Annotated[str, Field(pattern="^https?://")] = option(..., "of what speaks sandbox-fusion's protocol")
    retries: NonNegative = option(2, "further questions where it does not answer")


SandboxOptions = Annotated[
    Annotated[AutoSandbox, Tag("auto")]
    | Annotated[Bubblewrap, Tag("bubblewrap")]
    | Annotated[Landlock, Tag("landlock")]
    | Annotated[NoSandbox, Tag("none")]
    | Annotated[RemoteSandbox, Tag("remote")],
    by_name("auto"),
]
