"""The report: what is read from run folders, what is refused, and that the page holds the right data, inertly.

The run folders are synthetic: `make_run` invents plausible curves and rollouts and writes them in the run folder's
format. Nothing here was measured.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from a3po_megatron.errors import RequestError
from a3po_megatron.files.run_folder import rollout_files
from a3po_megatron.report import page
from a3po_megatron.report.charts import CHARTS, chart_of, moving_mean
from a3po_megatron.report.page import write_report
from a3po_megatron.report.read import read_rollouts, read_run
from a3po_megatron.report.timeline import VALUES
from a3po_megatron.telemetry.timeline import timeline_row

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> <!-- &amp; {{ 7 * 7 }} \u2028 \"' \ud800"


def make_run(
    folder: Path,
    *,
    name: str = "a3po",
    steps: int = 6,
    rho: float = 2.0,
    seed: int = 0,
    groups: int = 2,
    text: str = "",
) -> Path:
    """Writes a synthetic run folder. `text`, if given, is put wherever a model or a user may have put text."""
    draw = random.Random(f"{name} {seed}")
    folder.mkdir(parents=True)
    config = {
        "name": name,
        "model": {"path": f"models/tiny{text}", "dtype": "float32"},
        "trainer": {"steps": 40, "seed": seed, "prompts_per_step": 8},
        "shaping": {"rho": rho, "fraction": 0.2},
        "rollout": {"max_tokens": 48, "engine_args": {}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "provenance.json").write_text(json.dumps({"versions": {"torch": "2.13.0"}, "command": f"a3po {text}"}))
    (folder / "rollouts").mkdir()
    rows = []
    for step in range(steps):
        rho_now = max(rho - 0.005 * step, 1.0)
        rate = 0.15 + (0.62 if rho > 1 else 0.5) * (1 - math.exp(-step / 14)) + draw.gauss(0, 0.04)
        rows.append(metrics_row(step, min(max(rate, 0.0), 1.0), rho_now, draw))
        records = [
            rollout(step, prompt, sample, rate, rho_now, draw, text) for prompt in range(groups) for sample in range(4)
        ]
        write_rollouts(folder / f"rollouts/step-{step:05d}.rank-0.parquet", records)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def metrics_row(step: int, rate: float, rho: float, draw: random.Random) -> dict[str, float | None]:
    noise = draw.uniform(0.85, 1.15)
    shaped = rho > 1
    row: dict[str, float | None] = {
        "step": step,
        "reward/mean": rate,
        "reward/correct_rate": rate,
        "reward/invalid_rate": 0.0,
        "rollout/length_mean": 14 + 6 * rate * noise,
        "rollout/truncated_rate": 0.12 * math.exp(-step / 10) * noise,
        "rollout/kept_groups": 8 - (step % 3),
        "rollout/carried_groups": step % 2,
        "rollout/sampled_groups": 32 + step % 2,
        "policy/entropy": 0.9 * math.exp(-step / (60 if shaped else 25)) * noise,
        "policy/kl_old": 2e-3 * noise,
        "policy/clip_low_rate": 4e-3 * noise,
        "policy/clip_high_rate": 7e-3 * noise,
        "policy/grad_norm": 0.8 * noise,
        "policy/ratio_first_max": 3e-6 * noise,
        "policy/old_logprob_mean": -0.6 * math.exp(-step / 30) * noise,
        "learner/lr": 1e-4,
        "learner/loss": -0.01 * noise,
        "shaping/rho": rho,
        "mismatch/logprob_abs_mean": None if step == 3 else 2e-5 * noise,  # a gap
        "mismatch/kl_k3": 1e-9 * noise,
        "refit/seconds": 0.3 * noise,
        "refit/bytes": 12_000_000,
        "startup/seconds": 31.5,
        "memory/peak_bytes": 1.6e9,
        "memory/predicted_update": 1.5e9,
        "memory/measured_update": None,  # as on a CPU
        "perf/tokens_per_second": 900 * noise,
        "perf/engine_idle_share": 0.2 * noise,
        "perf/learner_idle_share": 0.5 * noise,
    }
    for side in ("positive", "negative"):
        row[f"shaping/shaped_rate_{side}"] = 0.18 if shaped else 0.0
        row[f"shaping/inert_rate_{side}"] = (0.55 if side == "negative" else 0.02) * noise if shaped else 0.0
        row[f"shaping/gradient_share_{side}"] = (0.01 if side == "negative" else 0.7) * noise if shaped else 0.0
    seconds = {"rollout": 4.0, "reward": 0.4, "score": 0.8, "update": 3.0, "publish": 0.3, "checkpoint": step % 10 // 9}
    return row | {f"perf/seconds_{phase}": value * noise for phase, value in seconds.items()}


WORDS = ["<think>", "\n", "12", " +", " 30", " =", " 42", ".", " so", " the", " answer", " is", " \\boxed{", "42", "}"]


def rollout(step: int, prompt: int, sample: int, rate: float, rho: float, draw: random.Random, text: str) -> dict:
    correct = draw.random() < rate
    length = draw.randrange(18, 34)
    old = [math.log(1 - 0.9 * draw.random() ** 6) if i % 4 else -3e-6 for i in range(length)]
    shaped = sorted(range(length), key=lambda i: (old[i] if correct else -old[i], i))[: length // 5]
    pieces = [WORDS[i % len(WORDS)] for i in range(length - 1)] + ["<|im_end|>"]
    pieces[1] += text
    return {
        "step": step,
        "prompt_id": f"add-{step}-{prompt}{text}",
        "prompt_index": 8 * step + prompt,
        "sample": sample,
        "seed": 2**63 + sample,
        "outcome": "correct" if correct else "wrong",
        "reason": ("equal" if correct else "41 is not 42") + text,
        "reward": float(correct),
        "advantage": 0.866 if correct else -0.866,
        "accepted": True,
        "carried": prompt == 1,
        "finish": "stop",
        "segments": [[length, step, True]],
        "tokens": [1000 + i % len(WORDS) for i in range(length)],
        "logprobs": [value + draw.gauss(0, 2e-5) for value in old],
        "old_logprobs": old,
        "entropy": [-value * 1.3 for value in old],
        "weights": [rho if i in shaped else 1.0 for i in range(length)],
        "prompt": f"What is 12 + 30?\nThink first.{text}",
        "answer": f"42{text}",
        "text": "".join(pieces),
        "pieces": pieces,
    }


def write_rollouts(path: Path, records: list[dict]) -> None:
    """A file as pyarrow makes it of plain objects, whatever column types it finds in them."""
    rows = []
    for record in records:
        segments = [dict(zip(("length", "weight_version", "trained"), s, strict=True)) for s in record["segments"]]
        answer = record.get("answer")
        row = record | {"segments": segments, "answer": [answer] if isinstance(answer, str) else answer}
        rows.append(json.loads(json.dumps(row).replace("\\ud800", "\\\\ud800")))  # which UTF-8 does not have
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    columns["seed"] = pa.array(columns["seed"], pa.uint64())
    pq.write_table(pa.table(columns), path, compression="zstd")


class Scripts(HTMLParser):
    """The page as a browser splits it: script elements by type, other tags, text outside of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.scripts: list[tuple[str | None, str]] = []
        self.tags: list[str] = []
        self.text = ""
        self._inside: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag
        if tag == "script":
            self.scripts.append((dict(attrs).get("type"), ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self._inside != "style":
            self.text += data


def page_data(path: Path) -> dict:
    scripts = Scripts(path.read_text("utf-8")).scripts
    assert [kind for kind, _ in scripts] == ["application/json", None]
    return json.loads(scripts[0][1])


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_a_run_folder_is_read_with_steps_metrics_and_gaps(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run"))
    assert (run.name, run.steps, run.notes) == ("a3po", list(range(6)), [])
    assert run.option("trainer.seed") == 0
    assert run.option("trainer.nothing") is None
    assert run.metrics["mismatch/logprob_abs_mean"][3] is None
    assert len(run.values("mismatch/logprob_abs_mean")) == 5
    assert list(rollout_files(run.folder)) == list(range(6))


def test_a_torn_last_line_is_left_out_with_a_note(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    whole = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(whole[:-40])
    run = read_run(folder)
    assert run.steps == list(range(5))
    assert "line 6" in run.notes[0]
    assert "incomplete" in run.notes[0]
    assert "line 6" in Scripts(write_report([folder]).read_text("utf-8")).text


def test_a_broken_line_in_the_middle_is_refused_with_file_and_line(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[2] = lines[2][:50]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(RequestError, match=re.escape(f"{folder / 'metrics.jsonl'}, line 3")) as caught:
        read_run(folder)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("line", ['{"reward/mean": 1}', '{"step": "2"}', "[1]", '{"step": 9, "reward/mean": "high"}'])
def test_a_row_that_is_no_row_of_metrics_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RequestError, match=r"metrics\.jsonl, line 7"):
        read_run(folder)


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nowhere: no such run folder"):
        write_report([tmp_path / "nowhere"])
    with pytest.raises(RequestError, match=r"metrics\.jsonl: missing"):
        write_report([tmp_path])
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(RequestError, match="no step has been recorded"):
        write_report([tmp_path])
    with pytest.raises(RequestError, match="No run folder"):
        write_report([])


def test_damaged_settings_are_refused_with_their_line(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "config.yaml").write_text("name: run\nmodel: [\n")
    with pytest.raises(RequestError, match=r"config\.yaml, line \d"):
        read_run(folder)


def test_damaged_rollouts_are_refused_with_file_and_row(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    path = rollout_files(folder)[0][0]
    records = [rollout(0, 0, sample, 0.5, 2.0, random.Random(sample), "") for sample in range(3)]
    records[1]["weights"].pop()
    write_rollouts(path, records)
    with pytest.raises(RequestError, match=re.escape(f"{path}, row 2: `weights` must have one entry a token")):
        write_report([folder])
    for record in records:
        del record["finish"]
    write_rollouts(path, records)
    with pytest.raises(RequestError, match=re.escape(f"{path}: its rollouts lack finish")):
        write_report([folder])
    write_rollouts(path, [rollout(0, 0, 0, 0.5, 2.0, random.Random(0), "")])
    whole = path.read_bytes()
    for damaged in (b"no Parquet at all", whole[:-30], whole[:40] + bytes(200) + whole[240:]):
        path.write_bytes(damaged)
        with pytest.raises(RequestError, match=re.escape(f"{path}: not a readable Parquet file")):
            write_report([folder])


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_compares_both_runs_and_loads_nothing(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "one"), make_run(tmp_path / "two", name="dapo", rho=1.0, seed=1)]
    path = write_report(folders)
    assert path == folders[0] / "report.html"
    data, html = page_data(path), path.read_text("utf-8")
    for folder, run in zip(folders, data["runs"], strict=True):
        truth = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert run["steps"] == list(range(6))
        for name in ("reward/correct_rate", "mismatch/kl_k3", "shaping/inert_rate_negative", "perf/seconds_update"):
            assert run["metrics"][name] == pytest.approx([row[name] for row in truth], rel=1e-5)
        assert run["metrics"]["mismatch/logprob_abs_mean"][3] is None
        assert [step["step"] for step in run["rollouts"]] == list(range(6))
    assert [run["label"] for run in data["runs"]] == ["a3po", "dapo"]
    charts = {chart.title for chart in CHARTS} - {"Ways of answering"}  # this task names none
    assert {chart["title"] for chart in data["charts"]} == charts | {
        "refit/bytes",
        "startup/seconds",
    }
    assert all(chart["lines"] for chart in data["charts"])  # without them the page draws none
    assert data["phases"] == ["rollout", "reward", "score", "update", "publish", "checkpoint"]
    text = Scripts(html).text
    assert "6 of 40" in text
    assert "shaping.rho" in text  # the runs differ in it …
    assert "shaping.fraction" not in text.split("Where it comes from")[0]  # … but not in this
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", html)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "one"), make_run(tmp_path / "two"), make_run(tmp_path / "three", name="dapo")]
    labels = [run["label"] for run in page_data(write_report(folders, tmp_path / "sub" / "r.html"))["runs"]]
    assert labels == ["a3po (one)", "a3po (two)", "dapo"]
    assert len(set(page.run_labels([read_run(folders[0])] * 2))) == 2


def test_hostile_texts_are_inert_and_survive_unchanged(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", text=HOSTILE, groups=1)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, HOSTILE: 1.0}) + "\n")
    html = write_report([folder]).read_text("utf-8", "replace")
    assert "<img" not in html
    assert "alert(1)</script>" not in html
    plain = make_run(tmp_path / "plain", groups=1)
    assert Scripts(html).tags == Scripts(write_report([plain]).read_text("utf-8")).tags
    group = page_data(folder / "report.html")["runs"][0]["rollouts"][0]["groups"][0]
    assert group["prompt"].endswith(HOSTILE.replace("\ud800", "\\ud800"))
    assert group["samples"][0]["pieces"][1].endswith(HOSTILE.replace("\ud800", "\\ud800"))


def test_the_script_puts_texts_into_the_page_only_as_text() -> None:
    template = (Path(page.__file__).parent / "template.html.j2").read_text("utf-8")
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "DOMParser"):
        assert way not in template


def test_the_viewer_holds_the_shaped_tokens_and_both_engines(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=1)
    truth = list(read_rollouts(rollout_files(folder)[0][0]))
    groups = page_data(write_report([folder]))["runs"][0]["rollouts"][0]["groups"]
    samples = [sample for group in groups for sample in group["samples"]]
    assert len(samples) == len(truth) == 8
    for sample, record in zip(samples, truth, strict=True):
        shaped = [i for i, weight in enumerate(record["weights"]) if weight != 1]
        assert shaped
        assert [i for i, weight in enumerate(sample["weights"]) if weight != 1] == shaped
        assert sample["pieces"] == record["pieces"]
        assert sample["ids"] == record["tokens"]
        assert sample["old"] == pytest.approx(record["old_logprobs"], rel=1e-3)
        gaps = [old - new for old, new in zip(record["old_logprobs"], record["logprobs"], strict=True)]
        assert sample["gap"] == pytest.approx(gaps, rel=0.06)
        assert sample["seed"] == str(record["seed"])  # exact, although it is no exact JavaScript number
        assert (sample["outcome"], sample["advantage"]) == (record["outcome"], record["advantage"])


def test_the_viewer_opens_on_a_correct_rollout_of_the_rarer_way_that_shaping_weights(tmp_path: Path) -> None:
    """Rare where the run begins, whatever became of it; not for a task that names no ways."""
    folder = make_run(tmp_path / "a3po", seed=3, steps=30)
    plain = make_run(tmp_path / "dapo", name="dapo", rho=1.0, seed=4, steps=30)
    assert page_data(write_report([plain, folder]))["open"] is None
    for run in (plain, folder):
        for number, path in enumerate(sorted((run / "rollouts").iterdir())):
            records = list(read_rollouts(path))
            for record in records:  # one in 16 at first, nearly all at the end
                steps = record["prompt_index"] % 4 == 0 and record["sample"] == 0 if number < 6 else record["sample"]
                record["way"] = "stepwise" if steps else "at_once"
            write_rollouts(path, records)
    data = page_data(write_report([plain, folder]))
    run, step, prompt, sample = (data["open"][key] for key in ("run", "step", "prompt", "sample"))
    assert run == 1  # no token of the other has a weight
    (group,) = [
        g for s in data["runs"][run]["rollouts"] if s["step"] == step for g in s["groups"] if g["key"] == prompt
    ]
    (chosen,) = [s for s in group["samples"] if s["n"] == sample]
    assert (chosen["way"], chosen["outcome"]) == ("stepwise", "correct")
    assert max(chosen["weights"]) > 1
    earlier = [
        s
        for each in data["runs"][run]["rollouts"]
        if each["step"] < step
        for g in each["groups"]
        for s in g["samples"]
        if s["way"] == "stepwise" and s["outcome"] == "correct" and max(s["weights"]) > 1
    ]
    assert not earlier


def test_the_ways_of_answering_are_the_first_chart_and_left_out_where_a_task_names_none(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=4)
    assert page_data(write_report([folder]))["charts"][0]["title"] == "Correct rate"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row | {"task/stepwise_rate": 0.25, "task/at_once_rate": 0.75} for row in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [chart["title"] for chart in page_data(write_report([folder]))["charts"]][:2] == [
        "Ways of answering",
        "Correct rate",
    ]


def test_a_rollout_that_was_not_trained_on_shows_the_sampling_logprobs(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=1)
    record = rollout(0, 0, 0, 1.0, 2.0, random.Random(0), "")
    record |= {"old_logprobs": None, "entropy": None, "weights": None, "advantage": None, "accepted": False}
    write_rollouts(rollout_files(folder)[0][0], [record])
    [sample] = page_data(write_report([folder]))["runs"][0]["rollouts"][0]["groups"][0]["samples"]
    assert sample["sampled"] == pytest.approx(record["logprobs"], rel=1e-3)
    assert [sample[key] for key in ("old", "gap", "entropy", "weights", "advantage")] == [None] * 5


def test_of_a_rollout_that_a_tool_wrote_a_part_of_the_viewer_tells_which_tokens_were_not_trained_on(
    tmp_path: Path,
) -> None:
    folder = make_run(tmp_path / "run", steps=1)
    record = rollout(0, 0, 0, 1.0, 2.0, random.Random(0), "")
    length = len(record["tokens"])
    record["segments"] = [[4, 2, True], [5, 3, False], [length - 9, 3, True]]
    for key in ("old_logprobs", "entropy", "weights"):
        record[key][4:9] = [None] * 5
    write_rollouts(rollout_files(folder)[0][0], [record])
    [sample] = page_data(write_report([folder]))["runs"][0]["rollouts"][0]["groups"][0]["samples"]
    assert (sample["versions"], sample["untrained"]) == ([2, 3], 5)
    for key in ("old", "gap", "entropy", "weights"):
        assert [value is None for value in sample[key]] == [4 <= i < 9 for i in range(length)], key


def test_rollouts_without_pieces_are_left_out_and_a_run_without_any_says_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=1)
    record = rollout(0, 0, 0, 1.0, 2.0, random.Random(0), "")
    for key in ("prompt", "answer", "text", "pieces"):
        del record[key]
    write_rollouts(rollout_files(folder)[0][0], [record])
    path = write_report([folder])
    assert page_data(path)["runs"][0]["rollouts"] == []
    assert "telemetry.texts_per_step" in Scripts(path.read_text("utf-8")).text


def test_the_page_stays_small_thins_steps_evenly_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "run", steps=33, groups=3)
    path = write_report([folder])
    whole = path.stat().st_size
    assert len(page_data(path)["runs"][0]["rollouts"]) == 33
    assert "evenly spaced" not in path.read_text("utf-8")
    monkeypatch.setattr(page, "ROLLOUT_BYTES", 200_000)
    path = write_report([folder])
    assert path.stat().st_size < whole - 200_000
    steps = [step["step"] for step in page_data(path)["runs"][0]["rollouts"]]
    assert {b - a for a, b in itertools.pairwise(steps)} == {4}
    assert (steps[0], steps[-1]) == (0, 32)
    assert f"{len(steps)} of 33 steps with saved rollouts, evenly spaced" in Scripts(path.read_text("utf-8")).text
    monkeypatch.setattr(page, "METRIC_VALUES", 700)
    assert page_data(write_report([folder]))["runs"][0]["steps"] == list(range(0, 33, 2))


def test_long_responses_of_large_groups_do_not_burst_the_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=9)
    for step, (path, *_) in rollout_files(folder).items():
        records = [rollout(step, 0, sample, 0.5, 2.0, random.Random(sample), "") for sample in range(6)]
        for i, record in enumerate(records):
            record["outcome"] = "correct" if i == 5 else "wrong"
            for key in ("tokens", "logprobs", "old_logprobs", "entropy", "weights", "pieces"):
                record[key] = (record[key] * 250)[:4500]
        write_rollouts(path, records)
    report = write_report([folder])
    assert report.stat().st_size < 10_000_000
    text = Scripts(report.read_text("utf-8")).text
    assert page.LEFT_OUT in text
    assert page.CUT in text
    for step in page_data(report)["runs"][0]["rollouts"]:
        samples = step["groups"][0]["samples"]
        assert {sample["outcome"] for sample in samples} == {"correct", "wrong"}  # both sides, though most are cut
        assert all(len(sample["ids"]) == page.SHOWN_TOKENS < sample["length"] for sample in samples)


# ---- curves ----------------------------------------------------------------------------------------------------------


def test_smoothing_keeps_gaps_and_averages_only_what_is_defined() -> None:
    assert moving_mean([1.0, None, 3.0, 5.0], 5) == [1.0, None, 4.0, 5.0]
    assert moving_mean([float(i) for i in range(9)], 5) == pytest.approx(list(range(9)))  # a straight line stays one
    assert moving_mean([None, 0.5, None], 5) == [None, 0.5, None]


def test_the_report_needs_no_torch() -> None:
    code = "import sys, a3po_megatron.report.page; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_what_a_run_evaluates_has_a_chart_of_its_own_whose_few_points_are_joined() -> None:
    average, length = chart_of("eval/math_500_avg"), chart_of("eval/math_500_length")
    assert (average.section, average.unit, average.scale, average.sparse) == ("On benchmarks", "%", 100.0, True)
    assert "math_500" in average.says and average.lines == (("eval/math_500_avg", "eval/math_500_avg"),)
    assert (length.unit, length.scale, length.sparse) == ("tokens", 1.0, True)
    assert not chart_of("reward/mean").sparse


def add_timeline(folder: Path, steps: int, world: int = 2) -> list[dict]:
    """Writes a synthetic timeline: rank r samples r % 7 + 1 seconds of 9, waits for the rest of them, and learns 3."""
    rows = []
    for step in range(steps):
        sampling = [float(rank % 7 + 1 + step) for rank in range(world)]
        spent = [
            {"rollout": 9.0 + step, "idle": 9.0 + step - s, "update": 3.0, "elapsed": 12.5 + step} for s in sampling
        ]
        rows.append(timeline_row(step, spent))
    (folder / "timeline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_the_page_has_each_ranks_seconds_of_every_step_and_their_mean(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "one", steps=4), make_run(tmp_path / "before", name="begun-before")]
    rows = add_timeline(folders[0], 4)
    runs = page_data(write_report(folders))["runs"]
    assert runs[1]["timeline"] is None, "a run that was begun before there was a timeline"
    drawn = runs[0]["timeline"]
    assert drawn["parts"] == ["rollout", "waiting", "update", "rest"], "parts that no rank ever had are left out"
    assert [step["step"] for step in drawn["steps"]] == [0, 1, 2, 3]
    for row, step in zip(rows, drawn["steps"], strict=True):
        assert step["ranks"] == [0, 1] and (step["slowest"], step["fastest"]) == (1, 0)
        assert [sum(values) for values in step["values"]] == pytest.approx([row["seconds"]] * 2, rel=2e-3)
    assert drawn["mean"]["ranks"] == [0, 1]
    mean = (0 + 1 + 2 + 3) / 4
    assert drawn["mean"]["values"] == [[1 + mean, 8, 3, 0.5], [2 + mean, 7, 3, 0.5]]


def test_a_long_timeline_of_many_ranks_keeps_the_page_small_and_says_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", groups=1)
    add_timeline(folder, 300, world=1024)
    report = write_report([folder])
    drawn = page_data(report)["runs"][0]["timeline"]
    stride = {b["step"] - a["step"] for a, b in itertools.pairwise(drawn["steps"])}
    assert len(stride) == 1 and min(stride) > 1
    assert len(json.dumps(drawn)) < 8 * VALUES
    spread = drawn["mean"]["ranks"]
    assert len(spread) >= 62 and {0, 1023} < set(spread)
    text = Scripts(report.read_text("utf-8")).text
    assert f"The timeline shows every {stride.pop()}th of 300 steps" in text and "of 1024 ranks" in text


def test_a_timeline_that_is_cut_off_is_read_up_to_there_and_a_damaged_one_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", groups=1)
    rows = add_timeline(folder, 3)
    path = folder / "timeline.jsonl"
    path.write_text(path.read_text()[:-30])
    run = read_run(folder)
    assert list(run.timeline) == [0, 1] and "timeline.jsonl, line 3" in run.notes[0]
    for damaged in (rows[1] | {"update": [1.0]}, rows[1] | {"ranks": None}, {"step": 1}):
        path.write_text("".join(json.dumps(row) + "\n" for row in (rows[0], damaged, rows[2])))
        with pytest.raises(RequestError, match=re.escape(f"{path}, line 2: not a row of a timeline")):
            read_run(folder)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="skipped: there is no chromium")
def test_a_browser_draws_every_chart_and_an_evaluations_few_points_as_one_line(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=12)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    values = {step: 0.1 + 0.05 * step for step in (0, 4, 8)}
    for row in rows:
        row["eval/sums_avg"] = values.get(row["step"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    add_timeline(folder, 12)
    report = write_report([folder], None)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom"]
    around = os.environ | {"HOME": str(tmp_path)}
    drawn = subprocess.run([*command, report.as_uri()], capture_output=True, text=True, timeout=60, env=around).stdout
    assert drawn.count('class="line') >= len(page_data(report)["charts"]) > 5, "lines are missing"
    chart = drawn.partition("eval/sums_avg</h")[2].partition("</svg>")[0]
    line = re.findall(r'd="(M[^"]+)"', chart)[-1]
    assert (line.count("M"), line.count("L")) == (1, len(values) - 1)
    timeline = drawn.partition('id="t-runs"')[2].partition("</section>")[0]
    assert timeline.count('class="rank"') == 2 and timeline.count("<rect") == 2 * 4, "a bar a rank, of four parts"
