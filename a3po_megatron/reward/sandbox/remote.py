"""A sandbox on another machine, by the protocol of sandbox-fusion: `POST {sandbox.url}/run_code`.

    {code, language, stdin, run_timeout} ──▶ {status, message, run_result: {status, return_code, stdout, stderr}}

(bytedance.github.io/SandboxFusion, Run Code.) It runs one program, so that tests and what they test are two processes
of one: the tests start the program, and no other process may look into theirs. The limits are the server's, but for the
time. What does not answer is asked again so often, and then failed: no program can cause that.
"""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from ..endpoint import NoAnswer, ask, turns
from .program import Chosen, Program, Ran, SandboxFailed

MARGIN_SECONDS = 30.0  # beyond a program's own time, for the way and the queue
# The tests' own process: nobody traces it or reads its memory; the program's ends with it.
_TOGETHER = """
import ctypes, os, socket, subprocess, sys
ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
ours, theirs = socket.socketpair()
start = "import ctypes; ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)\\n" + {answering!r}
number = theirs.fileno()
command = [sys.executable, "-c", start, str(number)]
program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, pass_fds=[number])
theirs.close()
program.stdin.write({source!r})
program.stdin.close()
sys.argv = ["tests.py", str(ours.fileno())]
exec(compile({asking!r}, "tests.py", "exec"), globals())
"""


class Remote:
    """Programs on a server that speaks sandbox-fusion's protocol."""

    def __init__(self, chosen: Chosen) -> None:
        self.chosen = chosen
        self._address = f"{chosen.url.rstrip('/')}/run_code"

    def run(self, program: Program) -> Ran:
        """Returns how a program ended. Raises SandboxFailed where the server gives no answer."""
        limits = self.chosen.limits
        body = {
            "code": program.source,
            "language": "python",
            "stdin": program.stdin.decode(errors="replace"),
            "run_timeout": limits.wall_seconds,
        }
        said = self._asked(json.dumps(body).encode("utf-8", "replace"))
        result = said.get("run_result")
        if said.get("status") == "SandboxError" or not isinstance(result, dict):
            raise SandboxFailed(f"the sandbox at {self._address} failed: {said.get('message')!s:.200}")
        stdout, stderr = (str(result.get(name) or "").encode("utf-8", "replace") for name in ("stdout", "stderr"))
        stopped = ""
        if result.get("status") == "TimeLimitExceeded":
            stopped = f"it ran for more than {limits.wall_seconds:g} s"
        elif max(len(stdout), len(stderr)) > limits.output_bytes:
            stopped = f"it wrote more than {limits.output_bytes:,} bytes of output"
        code = result.get("return_code")
        code = code if isinstance(code, int) else 1
        return Ran(None if stopped else max(code, 0), max(-code, 0), stdout, stderr, stopped)

    def pair(self, asking: Program, answering: Program) -> tuple[Ran, Ran | None]:
        """Returns how the tests ended, that start what they test."""
        source = _TOGETHER.format(asking=asking.source, answering=answering.source, source=answering.stdin)
        return self.run(Program(source, asking.stdin)), None

    def _asked(self, body: bytes) -> dict[str, Any]:
        request = urllib.request.Request(self._address, body, {"Content-Type": "application/json"})
        why = ""
        for _ in turns(self.chosen.retries):
            try:
                said = ask(request, self.chosen.limits.wall_seconds + MARGIN_SECONDS)
            except NoAnswer as error:
                why = f"it answers {error}" if error.status else str(error)
                if error.is_final:
                    break
            except ValueError:
                why = "what comes back is no JSON"
            else:
                if isinstance(said, dict):
                    return said
                why = "what comes back is no answer of sandbox-fusion"
        raise SandboxFailed(f"the sandbox at {self._address} does not answer: {why}")
