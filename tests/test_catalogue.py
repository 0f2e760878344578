"""Every metric and every phase is named once: what is written, drawn and announced comes from the catalogue."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from a3po_megatron.files.writer import AtOnce
from a3po_megatron.report.charts import CHARTS, chart_of
from a3po_megatron.telemetry.catalogue import CATALOGUE, METRICS, STARTUP, STEP, Phase
from a3po_megatron.telemetry.clock import Clock
from a3po_megatron.telemetry.metrics import MetricsWriter
from tests.harness.ranks import ROOT


def test_every_metric_says_what_it_is_and_what_draws_it() -> None:
    assert len(set(METRICS)) == len(METRICS)
    titles = {chart.title for chart in CHARTS}
    for metric in CATALOGUE:
        assert metric.unit, metric
        assert metric.meaning, metric
        assert (metric.chart in titles) == bool(metric.line), metric
    assert {metric.chart for metric in CATALOGUE} - {""} == titles  # no chart without a metric
    plain = chart_of("refit/witness")
    assert (plain.title, plain.unit, plain.lines) == ("refit/witness", "nats", (("refit/witness", "refit/witness"),))
    assert chart_of("of/another_version").lines == (("of/another_version",) * 2,)


def test_a_metric_that_is_not_in_the_catalogue_is_refused(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, False, AtOnce())
    with pytest.raises(KeyError, match="policy/kl_olt"):
        writer.write(0, {"policy/kl_olt": 0.0})
    assert list(writer.write(0, {})) == ["step", *METRICS]


def test_a_mistyped_phase_cannot_be_announced() -> None:
    clock = Clock()
    with pytest.raises(ValueError, match="uptade"), clock.phase("uptade"):
        pass
    with clock.phase(Phase.UPDATE):
        assert clock.current is Phase.UPDATE


def test_phases_have_their_names_in_the_catalogue_alone() -> None:
    """No list of phases stands a second time: no tuple or list of a file names two of them."""
    names = {str(phase) for phase in (*STEP, *STARTUP)}
    for path in (ROOT / "a3po_megatron").rglob("*.py"):
        if path.name == "catalogue.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Tuple | ast.List):
                strings = [each.value for each in node.elts if isinstance(each, ast.Constant)]
                assert len(names.intersection(map(str, strings))) < 4, (path, node.lineno, strings)
