"""The program itself: its help on any terminal, what it imports, and how it reads its arguments."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.ranks import ROOT

# Every command's help and a message, in one process: what each printed, and how it ended.
MANY = """
import io, json, sys
from a3po_megatron import cli
ended = {}
for words in json.loads(sys.argv[1]):
    sys.argv = ["a3po", *words]
    print(f"== {words}", flush=True)
    try:
        cli.main()
    except SystemExit as end:
        ended[" ".join(words)] = end.code or 0
heavy = [name for name in ("torch", "transformers", "vllm", "megatron") if name in sys.modules]
print(json.dumps({"ended": ended, "heavy": heavy}), file=sys.stderr)
"""


def run_many(words: list[list[str]], **around: str) -> tuple[str, dict[str, object]]:
    """What the commands printed, and how each ended."""
    command = [sys.executable, "-c", MANY, json.dumps(words)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | around, capture_output=True, timeout=60)
    assert b"Traceback" not in done.stderr, done.stderr
    lines = done.stderr.decode("ascii").splitlines()
    return done.stdout.decode("ascii") + "\n".join(lines[:-1]), json.loads(lines[-1])


COMMANDS = [
    [],
    ["train"],
    ["submit"],
    ["report"],
    ["compare"],
    ["doctor"],
    ["convert"],
    ["convert", "import"],
    ["convert", "export"],
]
COMMANDS += [["convert", "verify"]]


@pytest.mark.parametrize(
    "around", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_terminal_that_knows_ascii_alone_gets_all_help_and_messages_without_torch(around: dict[str, str]) -> None:
    words = [[*command, "--help"] for command in COMMANDS]
    wrong = ["submit", "configs/demo.yaml", "--set", "trainer.stéps=1"]
    words += [["--version"], ["options"], ["submit", "configs/arithmetic.yaml", "--dry-run"]]
    printed, said = run_many([*words, wrong, ["status", "."]], **around)
    assert said["ended"] == {" ".join(word): 0 for word in words} | {" ".join(wrong): 2, "status .": 2}
    assert said["heavy"] == []
    assert "HF -> a Megatron checkpoint" in printed
    assert "a3po-megatron 0.1.0" in printed
    assert re.search(r"rollout\.top_p +number > 0, <= 1 +1 +share of probability", printed)
    assert "unknown option trainer.st?ps; did you mean trainer.steps?" in printed


def test_arguments_are_expanded_like_paths_in_a_configuration(tmp_path: Path) -> None:
    printed, said = run_many(
        [
            ["report", "~/run", "$HOME/run"],
            ["train", "${NOWHERE}/c.yaml"],
            ["convert", "import", "~/model", "$NOWHERE/x"],
            ["convert", "export", "~nobody-of-this-name", "x"],
            ["submit", "$HOME/c.yaml"],
        ],
        HOME=str(tmp_path),
    )
    assert set(said["ended"].values()) == {2}  # type: ignore[attr-defined]
    for words in (
        f"error: {tmp_path}/run: no such run folder",
        "error: the command line: ${NOWHERE}/c.yaml: the variable NOWHERE is not set",
        "error: the command line: $NOWHERE/x: the variable NOWHERE is not set",
        "error: the command line: ~nobody-of-this-name: there is no home folder of nobody-of-this-name",
        f"error: {tmp_path}/c.yaml: cannot read the configuration",
    ):
        assert words in printed
