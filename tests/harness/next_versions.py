"""What holds on a newer Megatron-Core and Transformer Engine: docs/evidence/megatron_next.json.

    .venv-next/bin/python -m tests.harness.next_versions      `make test-next` makes the environment first

Runs layout, learner, conversion and checkpoint tests, and those on tests/harness/te_on_cpu, as they are; every one that
fails is in the file with its last words. Exit code: 0 if all hold, 1 if not.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from tests.harness.ranks import ROOT

EVIDENCE = ROOT / "docs/evidence/megatron_next.json"
CELLS = ("layout", "learner", "convert", "checkpoint", "te")
SECONDS = 3600


def cell(name: str) -> dict[str, Any]:
    """One file of tests: how many passed, were skipped, failed, and what the failed ones said."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"tests/test_{name}.py"]
        settings = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, env=settings, timeout=SECONDS)
        cases = ElementTree.parse(report).getroot().iter("testcase")
    found: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": {}}
    for case in cases:
        wrong = [each for each in case if each.tag in ("failure", "error")]
        if wrong:
            found["failed"][case.get("name")] = (wrong[0].get("message") or "").strip()[-600:]
        else:
            found["skipped" if any(each.tag == "skipped" for each in case) else "passed"] += 1
    return found


def main() -> int:
    tree = Path(os.environ.get("A3PO_TE_TREE", Path(sys.prefix, "transformer-engine")))
    te = next(tree.glob("transformer_engine-*.dist-info")).name.split("-")[1].removesuffix(".dist")
    versions = {name: importlib.metadata.version(name) for name in ("megatron-core", "torch", "transformers")}
    found = {name: cell(name) for name in CELLS}
    evidence = {"python": platform.python_version(), **versions, "transformer-engine": te, "cells": found}
    EVIDENCE.write_text(json.dumps(evidence, indent=1) + "\n")
    print(EVIDENCE.read_text())
    return int(any(each["failed"] for each in found.values()))


if __name__ == "__main__":
    sys.exit(main())
