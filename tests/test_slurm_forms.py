"""Slurm's own forms of values, held against what Slurm's manual says of each."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from a3po_megatron.config.sbatch_options import options_of, split
from a3po_megatron.config.slurm import SlurmOptions
from a3po_megatron.config.slurm_forms import directive, limit_seconds, node_names


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("30", 30 * 60),
        ("90:00", 90 * 60),
        ("90:30", 91 * 60),  # whole minutes, rounded up
        ("00:30", 60),
        ("4:00:00", 4 * 3600),
        ("0:5:1", 6 * 60),
        ("1:90:60", 3600 + 91 * 60),  # sbatch takes more than 59 of them
        ("2-0", 2 * 86400),
        ("1-12", 36 * 3600),
        ("1-2:3", 86400 + 2 * 3600 + 3 * 60),
        ("1-02:03:04", 86400 + 2 * 3600 + 4 * 60),
        ("0-0:10", 600),
        ("UNLIMITED", math.inf),
        ("infinite", math.inf),
        ("0", math.inf),  # sbatch(1): a limit of zero requests that none be imposed
        ("0:00", math.inf),
    ],
)
def test_a_time_limit_is_read_in_every_form_that_sbatch_takes(time: str, seconds: float) -> None:
    assert limit_seconds(time) == seconds


@pytest.mark.parametrize(
    "time", ["", "4h", "1-2:3:4:5", "1:2:3:4", "::", "1:", "-1", "1.5", " 1", "1 ", "٣", "2-", "-"]
)
def test_what_is_no_time_limit_is_refused(time: str) -> None:
    with pytest.raises(ValueError, match="hours:minutes:seconds"):
        limit_seconds(time)


@pytest.mark.parametrize("memory", ["0", "4096", "200G", "200GB", "200gb", "1T", "512m", "64K"])
def test_memory_is_taken_in_every_form_that_sbatch_takes(memory: str) -> None:
    assert SlurmOptions(memory=memory).memory == memory


@pytest.mark.parametrize("memory", ["200 GB", "200GiB", "1P", "0.5G", "-1", "G", "200 ", "٢G", "all"])
def test_memory_that_sbatch_would_not_take_is_refused(memory: str) -> None:
    with pytest.raises(ValueError, match="K, M, G or T directly after it"):
        SlurmOptions(memory=memory)


@pytest.mark.parametrize(
    ("given", "written", "count"),
    [
        ("8", 8, 8),
        (4, 4, 4),
        ("0", 0, 0),
        ("gpu:8", 8, 8),  # as --gres has it
        ("h200:8", "h200:8", 8),
        ("gpu:h200:8", "h200:8", 8),
        ("a100_3g.20gb:2", "a100_3g.20gb:2", 2),
        ("1g.10gb:7", "1g.10gb:7", 7),
        ("a100:2, v100:1", "a100:2,v100:1", 3),
    ],
)
def test_gpus_are_taken_with_and_without_their_type(given: Any, written: Any, count: int) -> None:
    slurm = SlurmOptions(gpus_per_node=given)
    assert (slurm.gpus_per_node, slurm.gpus(), slurm.ranks_per_node()) == (written, count, max(1, count))


@pytest.mark.parametrize(
    "given", ["h200", "8:h200", "h200:", ":8", "h200:8,8", "h200:0", "-1", "h 200:8", "", "h200:8,"]
)
def test_what_is_no_number_of_gpus_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="as h200:8"):
        SlurmOptions(gpus_per_node=given)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"A-B": "1"}, "'A-B' is no name"),
        ({"1A": "1"}, "'1A' is no name"),
        ({"": "1"}, "'' is no name"),
        ({"Ä": "1"}, "'Ä' is no name"),
        ({"A=B": "1"}, "'A=B' is no name"),
        ({"A\nB": "1"}, "is no name"),
        ({"UID": "1"}, "the shell's own"),
        ({"RANK": "0"}, "set for every rank"),
        ({"MASTER_PORT": "1"}, "set for every rank"),
        ({"A3PO_ATTEMPT": "1"}, "set for every rank"),
        ({"SLURM_NTASKS": "1"}, "Slurm's to set"),
        ({"VLLM_BATCH_INVARIANT": "1"}, "rollout.batch_invariant sets it"),
        ({"A": "1\r\n2"}, "carriage returns"),
        ({"A": "\0"}, "null characters"),
        ({"A": "\ud83d"}, "halves of characters"),
    ],
)
def test_a_variable_that_cannot_be_set_or_is_not_the_users_is_refused(variables: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        SlurmOptions(environment=variables)


# --- slurm.extra ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("--exclusive", [("exclusive", None)]),
        ("--exclusive=user", [("exclusive", "user")]),
        ("--exclusive  # the whole node", [("exclusive", None)]),
        ("--reservation=abc --nice=5", [("reservation", "abc"), ("nice", "5")]),
        ("--reservation abc", [("reservation", "abc")]),
        ("--reserv=abc", [("reservation", "abc")]),
        ("-C 'h200&ib'", [("constraint", "h200&ib")]),
        ("-Ch200 -Hx rl1", [("constraint", "h200"), ("hold", None), ("exclude", "rl1")]),
        ("--gres=nvme:1", [("gres", "nvme:1")]),
        ("--mail-user=a@b.org --mail-type END", [("mail-user", "a@b.org"), ("mail-type", "END")]),
        ("--container-image='nvcr.io#x'", [("container-image", "nvcr.io#x")]),  # a plugin's
        (r'--comment="a \"b\" # c"', [("comment", 'a "b" # c')]),
        ("--container-mount-home --nice", [("container-mount-home", None), ("nice", None)]),
    ],
)
def test_an_entry_of_extra_is_read_as_sbatch_reads_it(line: str, options: list[tuple[str, str | None]]) -> None:
    assert options_of(line) == options
    assert SlurmOptions(extra=[line]).extra == (line,)


OWNED = {
    "slurm.nodes": ["--nodes=2", "--nodes 2", "-N2", "-N 2", "-HN2", "--nodes=2-4"],
    "slurm.tasks_per_node": ["--ntasks=4", "-n4", "--ntasks-per-node 8", "--ntasks-per-n=8"],
    "slurm.cpus_per_task": ["-c 4", "--cpus-per-t=4", "--cpus-per-gpu=2"],
    "slurm.gpus_per_node": ["--gres=gpu:8", "--gres nvme:1,gpu:h200:8", "--gres=gpu", "-G8", "--gpus=8"],
    "slurm.partition": ["-p x", "--part=x"],
    "slurm.account": ["--account=x", "-A x"],
    "slurm.qos": ["-q x", "--qos=x"],
    "slurm.memory": ["--mem=1G", "--mem 0", "--mem-per-cpu=1", "--mem-per-g 2"],
    "slurm.time": ["-t 1", "--time=1", "--exclusive --time=1"],
    "slurm.lead_seconds": ["--signal=USR2@60", "--sig B:USR1"],
    "slurm.resume": ["--requeue", "--no-requeue", "--no-req", "-a 1-3"],
    "the run folder's logs": ["--output=x", "-o x", "--out=x", "-e x", "--open-mode=truncate", "'--output=x'"],
    "a3po submit itself": ["--wait", "-W", "--parsable", "--wrap=ls", "--test-only", "-Q"],
    "name": ["-J x", "--job-name 'a b'"],
}


@pytest.mark.parametrize("owner", OWNED)
def test_what_a_run_sets_itself_is_refused_in_extra_in_every_spelling_naming_what_sets_it(owner: str) -> None:
    for line in OWNED[owner]:
        with pytest.raises(ValueError, match=f"is set by {re.escape(owner)}"):
            options_of(line)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("#SBATCH --exclusive", "write '--exclusive': `#SBATCH` is put before it"),
        ("  # SBATCH --exclusive", "write '--exclusive'"),
        ("--exclusive\n--nice", "one line an entry"),
        ("", "no option"),
        ("exclusive", "'exclusive' in 'exclusive' is no option"),
        ("--exclusive hetjob", "'hetjob'"),
        ("--no", "--no-kill or --no-requeue or --nodefile"),
        ("-Z", "-Z is no option"),
        ("--reservation", "needs a value"),
        ("--comment='x", "a quote that does not end"),
        ("--comment=x\\", "a quote that does not end"),
        ("--container-image=nvcr.io#x", "a comment to sbatch"),
        (": --nice", "':'"),
    ],
)
def test_an_entry_of_extra_that_sbatch_would_refuse_or_pass_over_is_refused(line: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        options_of(line)


def test_a_value_in_a_directive_is_quoted_so_that_taken_apart_it_is_itself() -> None:
    for text in ("plain/path-1.out", "my run", 'a"b', "a'b", "a\\b", "a#b", "äö", "a\tb", "%%j", "$x`y"):
        assert split(f"--output={directive(text)} --nice") == [f"--output={text}", "--nice"]
    assert directive("/runs/a_1%%/logs/slurm-%j.out") == "/runs/a_1%%/logs/slurm-%j.out"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("rl0", ["rl0"]),
        ("rl[0-3,7]", ["rl0", "rl1", "rl2", "rl3", "rl7"]),
        ("a1,gpu-[08-10]b,c", ["a1", "gpu-08b", "gpu-09b", "gpu-10b", "c"]),
        ("r[1-2]n[0,3]", ["r1n0", "r1n3", "r2n0", "r2n3"]),
    ],
)
def test_a_list_of_nodes_with_ranges_is_read_as_scontrol_reads_it(text: str, names: list[str]) -> None:
    assert node_names(text) == names


@pytest.mark.parametrize("text", ["", "rl[0-", "rl0]", "rl[a-b]", "rl[]"])
def test_what_is_no_list_of_nodes_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no"):
        node_names(text)
