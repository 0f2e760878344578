"""Requests that are refused by what Megatron and vLLM say, where both are imported already (tests/test_requests.py)."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from unittest import mock

from a3po_megatron import cli
from a3po_megatron.launch import local
from tests.harness.ranks import CaseRanks

REQUEST = "A3PO_TEST_REQUEST"  # a configuration's path, the folder to be in, and overrides, as JSON


def refused(ranks: CaseRanks) -> list[list[object]]:
    """Exit code and errors of `a3po train` with each override by itself."""
    config, folder, *overrides = json.loads(os.environ[REQUEST])
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]  # it is no rank's business
    found: list[list[object]] = []
    for override in overrides:
        words, said = ["a3po", "train", config, "--set", override], io.StringIO()
        started = mock.patch.object(local, "run_local", side_effect=SystemExit("started"))
        with mock.patch.object(sys, "argv", words), started, contextlib.chdir(folder), contextlib.redirect_stderr(said):
            try:
                cli.main()
            except SystemExit as end:
                found.append([end.code, said.getvalue()])
    return found
