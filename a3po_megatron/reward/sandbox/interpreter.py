"""What of this machine an interpreter needs to start in a sandbox, and no more: no package of the host.

stdlib       each entry of its folder but site-packages
libraries    the folders that the shared libraries of its extension modules came from
"""

from __future__ import annotations

import functools
import glob
import json
import os
import subprocess
import sys
from dataclasses import dataclass

ALWAYS = ("/etc/ld.so.cache", "/usr/share/zoneinfo", "/dev/null", "/dev/zero")
SECONDS = 60
# Imports every extension module that there is, and says which libraries that brought.
_LIST = """
import importlib, json, os, sys
folders = [path for path in sys.path if path.endswith("lib-dynload")]
for name in {name.partition(".")[0] for folder in folders for name in os.listdir(folder)}:
    try:
        importlib.import_module(name)
    except BaseException:
        pass
paths = {line.split(None, 5)[5].strip() for line in open("/proc/self/maps") if line.count("/") > 1 and ".so" in line}
import sysconfig
json.dump({"stdlib": sysconfig.get_path("stdlib"), "libraries": sorted(paths)}, sys.stdout)
"""


@dataclass(frozen=True)
class Interpreter:
    program: str  # its real path
    stdlib: str
    libraries: tuple[str, ...]  # folders
    hidden: tuple[str, ...]  # folders of packages that lie within these

    def entries(self) -> list[str]:
        """Returns paths that together are all of this, and nothing of what is hidden."""
        paths = [self.program, *(path for path in ALWAYS if os.path.exists(path))]
        for folder in dict.fromkeys((self.stdlib, *self.libraries)):
            nested = [hidden for hidden in self.hidden if hidden.startswith(folder + "/")]
            if not nested:
                paths.append(folder)
                continue
            ways = {os.path.relpath(hidden, folder).partition("/")[0] for hidden in nested}
            paths += [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name not in ways]
        return paths


@functools.cache
def interpreter() -> Interpreter:
    """Returns the one that runs this, without its environment. Takes half a second, once a process.

    Raises OSError where it cannot be started.
    """
    program = os.path.realpath(sys.executable)
    ran = subprocess.run(
        [program, "-I", "-S", "-c", _LIST], capture_output=True, timeout=SECONDS, stdin=subprocess.DEVNULL, env={}
    )
    if ran.returncode:
        raise OSError(f"{program}: {ran.stderr.decode(errors='replace')[-200:]}")
    told = json.loads(ran.stdout)
    libraries = tuple(sorted({os.path.dirname(path) for path in told["libraries"]} - {told["stdlib"] + "/lib-dynload"}))
    patterns = [
        f"{folder}/{name}" for folder in (told["stdlib"], *libraries) for name in ("*-packages", "python3*/*-packages")
    ]
    hidden = tuple(sorted({path for pattern in patterns for path in glob.glob(pattern)}))
    return Interpreter(program, told["stdlib"], libraries, hidden)
