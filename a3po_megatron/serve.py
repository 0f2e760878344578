"""The loop of a rank that only samples: today that of an evaluation.

`python -m a3po_megatron.serve FOLDER` starts a rank, by way of rank.py: nothing heavy is imported here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import Interrupted

if TYPE_CHECKING:
    from .parts import Serving


def serve(parts: Serving) -> None:
    """Asks every benchmark that is asked for, of the weights that are named. Collective over all ranks."""
    from .evaluate.request import read_request
    from .evaluate.weights import load_weights

    request, rollout = read_request(parts.folder), parts.settings.rollout
    parts.engine.wake()
    weights = load_weights(request.source, parts.ranks, parts.facts, parts.engine, rollout.tensor, rollout.expert)
    for asked in request.asked:
        try:
            parts.evaluation.run(asked, request.source, weights, [str(parts.engine.dtype), rollout.quantization])
        except Interrupted as reason:
            raise Interrupted(
                f"{parts.folder}: interrupted by {reason} while it asked {asked.benchmark}; the same command goes on "
                "from the last finished problem"
            ) from reason
    parts.ranks.end()


def _build(*given: Any, **named: Any) -> Serving:
    from .parts import build_serving

    return build_serving(*given, **named)


if __name__ == "__main__":
    from a3po_megatron.rank import start

    start(Path(sys.argv[1]), serve, _build)
