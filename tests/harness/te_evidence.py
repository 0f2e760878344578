"""Writes docs/evidence/te_harness.json: what tests/harness/te_on_cpu gives for every case of tests/test_te.py, and both
faults of cached copies when they are provoked.

    python -m tests.harness.te_evidence
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
import transformers

from tests.distributed import cases_bringup
from tests.distributed import cases_te as cases
from tests.harness.ranks import ROOT, run_ranks

EVIDENCE = ROOT / "docs/evidence/te_harness.json"


def main() -> None:
    folder, updates = Path(tempfile.mkdtemp(prefix="te-")), {}
    cases.make_models(folder)
    for ranks in (1, 2):
        for name, (found, *_) in run_ranks(ranks, *cases.UPDATES[ranks], folder=folder, te=True).items():
            updates[f"{ranks} rank{'s' * (ranks > 1)}: {name}"] = {
                "gradient_distance_from_float64": float(f"{found['ours']:.3g}"),
                "of_rounding_alone": float(f"{found['plain']:.3g}"),
                "products": found["calls"],
            }
    (found,) = run_ranks(1, cases_bringup.traps_on_stand_in, te=True)["traps_on_stand_in"]
    versions = {"transformer_engine": "2.11.0", "torch": torch.__version__, "transformers": transformers.__version__}
    EVIDENCE.write_text(
        json.dumps({"versions": versions, "updates": updates, "cached_copies": found["numbers"]}, indent=1) + "\n"
    )
    print(EVIDENCE.read_text())


if __name__ == "__main__":
    main()
