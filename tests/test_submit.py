"""`a3po submit` up to the cluster: what is refused before anything is made, and what stands in the script."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from a3po_megatron.config import load_config
from a3po_megatron.config.sbatch_options import split
from a3po_megatron.errors import RequestError
from a3po_megatron.files.run_folder import LEAD
from a3po_megatron.launch import slurm
from a3po_megatron.launch.site import gpus_of
from tests.harness.ranks import ROOT


def planned(folder: Path, *overrides: str) -> slurm.Plan:
    options = ["slurm.gpus_per_node=0", "slurm.tasks_per_node=2", *overrides]
    return slurm.plan([slurm.settled(load_config(ROOT / "configs/arithmetic.yaml", options))], folder, sweep=False)


# --- the time limit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("time", "options", "lead"),
    [
        ("6", [], "300 s"),  # 300 + 60 s are needed: this is as much
        ("5:30", [], "300 s"),
        ("0-0:2", ["slurm.lead_seconds=100"], "100 s"),
        ("12:00:00", ["slurm.lead_seconds=86400"], "86400 s"),
    ],
)
def test_a_time_limit_that_leaves_no_time_for_a_step_is_refused_naming_both_options(
    tmp_path: Path, time: str, options: list[str], lead: str
) -> None:
    with pytest.raises(RequestError) as caught:
        planned(tmp_path / "run", f"slurm.time='{time}'", *options)
    for words in ("slurm.time", time, "slurm.lead_seconds", lead, "60 s"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("time", "options"), [("7", []), ("0-1", []), ("UNLIMITED", []), ("2", ["slurm.lead_seconds=30"])]
)
def test_a_time_limit_with_room_for_a_step_is_taken(tmp_path: Path, time: str, options: list[str]) -> None:
    assert f"#SBATCH --time={time}\n" in planned(tmp_path / "run", f"slurm.time='{time}'", *options).script


def test_what_the_run_in_the_folder_measured_decides_what_time_limit_can_work(tmp_path: Path) -> None:
    (tmp_path / LEAD).write_text("3600\n{}\n")
    with pytest.raises(RequestError, match="3600 s before the end"):
        planned(tmp_path, "slurm.time='1:00:00'")
    planned(tmp_path, "slurm.time='1:02:00'")
    rows = [{"step": n, "startup/seconds": seconds} for n, seconds in enumerate((10.0, 900.5))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RequestError, match="a start takes about 901 s"):
        planned(tmp_path, "slurm.time='1:15:00'")
    planned(tmp_path, "slurm.time='1:16:00'")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "startup/sec')  # cut off
    assert slurm.start_up_seconds(tmp_path) == slurm.START_UP_SECONDS


# --- slurm.setup ---------------------------------------------------------------------------------------------------


def ran(folder: Path, *setup: str) -> subprocess.CompletedProcess[str]:
    """What becomes of the script of a run with these lines, up to where the job's program would start."""
    folder.mkdir(exist_ok=True)
    script = planned(folder / "run", f"slurm.setup={json.dumps(setup)}").script
    before, _, rest = script.partition("\nexec ")
    assert rest.count("\n") == 1
    after = (
        'echo "strict: $-"; echo "value ${GREETING-none}"; (false | true) && echo pipes; echo ${UNSET_OF_ALL}; echo no'
    )
    around = {"PATH": os.environ["PATH"]}
    return subprocess.run(["bash", "-c", f"{before}\n{after}"], env=around, cwd=folder, capture_output=True, text=True)


ACTIVATES = [
    # conda's activate.d and modules' init: unset variables, commands that fail on the way, pipes that break.
    'export OLD="$CONDA_BACKUP_CXX"; export LD_LIBRARY_PATH="/opt/x/lib:$LD_LIBRARY_PATH"\nexport GREETING=hello\n',
    'grep -q nothing /dev/null\nfalse\n[ -n "$NOTHING" ] && echo never\nexport GREETING=hello\n',
    "yes | head -1 >/dev/null\nexport GREETING=hello\n",
    'deactivate() { [ -n "$_OLD" ] && export PATH="$_OLD"; }\ndeactivate\nexport GREETING=hello\n',
]


@pytest.mark.parametrize("text", ACTIVATES)
def test_a_script_that_setup_sources_may_read_unset_variables_and_have_failing_commands(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "activate.sh").write_text(text)
    done = ran(tmp_path, "source activate.sh")
    assert "value hello" in done.stdout, done.stderr
    flags = re.findall(r"strict: (\w+)", done.stdout)[0]
    assert {"e", "u"} <= set(flags)  # strict again
    assert "pipes" not in done.stdout
    assert "no\n" not in done.stdout
    assert "UNSET_OF_ALL: unbound variable" in done.stderr


def test_a_setup_line_that_fails_ends_the_job_and_is_named(tmp_path: Path) -> None:
    done = ran(tmp_path, "true", "source nowhere.sh", "export GREETING=hello")
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: slurm.setup: ended with 1: source nowhere.sh (if that is no failure: … || true)" in done.stderr
    assert "value hello" in ran(tmp_path, "source nowhere.sh || true", "export GREETING=hello").stdout


def test_lines_of_setup_that_are_one_command_together_stay_one(tmp_path: Path) -> None:
    lines = ["# choose", "", 'if [ -n "$NOWHERE" ]', "then", "  false", "else", "  GREETING=he \\", "true", "fi"]
    lines += ["greet() {", '  export GREETING="$(cat <<EOF', "hello", "EOF", ')"; }', "greet"]
    done = ran(tmp_path, *lines)
    assert "value hello" in done.stdout, done.stderr
    with pytest.raises(RequestError, match=r"slurm.setup: bash cannot read 'if true; then': .*syntax error"):
        ran(tmp_path, "true", "if true; then", "echo")


def test_setup_of_one_line_is_taken_as_a_list_of_one_and_what_is_no_list_is_named(tmp_path: Path) -> None:
    lines = planned(tmp_path, "slurm.setup=module load cuda").runs[0].slurm.setup
    assert lines == ("module load cuda",)
    assert planned(tmp_path, "slurm.extra=--exclusive").runs[0].slurm.extra == ("--exclusive",)
    with pytest.raises(RequestError, match="--set slurm.mounts: slurm.mounts: Input should be a list") as caught:
        planned(tmp_path, "slurm.mounts={a: b}")
    assert "tuple" not in str(caught.value)


# --- what stands in the script -------------------------------------------------------------------------------------


def directives(script: str) -> dict[str, str | None]:
    """The options of a script's #SBATCH lines, taken apart as sbatch does."""
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    words = [word for line in lines for word in split(line)]
    return {name: value for name, _, value in (word.removeprefix("--").partition("=") for word in words)}


ANY = ["my run", 'a"b', "it's", "a#b", "lr%j", "100%", "%%", "$HOME`id`", "日本 äö", "a;b&c", "[1]*"]


@pytest.mark.parametrize("name", ANY)
def test_a_run_folder_of_any_name_reaches_sbatch_and_the_jobs_program_as_it_is(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    script = planned(folder).script
    # sbatch puts the job's number in the place of %j and % in that of %%.
    output = re.sub("%(.)", lambda m: {"%": "%", "j": "77"}[m[1]], directives(script)["output"] or "")
    assert output == f"{folder}/logs/slurm-77.out"
    show = script.replace("\nexec ", "\nprintf '%s\\n' ")
    done = subprocess.run(["bash", "-c", show], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == str(folder), done.stderr


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("a\nb", [], "can be printed"),
        ("a\x1bb", [], "can be printed"),
        ("a\udcffb", [], "can be printed"),  # a byte that is no text
        ("a\\b", [], "backslash"),
        ("a:b", ["slurm.container=nvcr.io#nvidia/pytorch"], "separates the mounts"),
        ("a,b", ["slurm.container=nvcr.io#nvidia/pytorch"], "separates the mounts"),
    ],
)
def test_a_run_folder_that_slurm_could_not_have_is_refused(
    tmp_path: Path, name: str, options: list[str], says: str
) -> None:
    with pytest.raises(RequestError, match=f"--run-dir .*{says}"):
        planned(tmp_path / name, *options)


VALUES = {
    "PLAIN": "8",
    "SPACES": " a  b ",
    "QUOTES": 'it\'s "so"',
    "LINES": "a\n#SBATCH --nodes=9\nb",
    "SHELL": "$HOME`id`\\",
}


def test_what_slurm_environment_holds_reaches_the_job_as_it_is(tmp_path: Path) -> None:
    script = planned(tmp_path, f"slurm.environment={json.dumps(VALUES)}").script
    show = script.replace("\nexec ", "\n" + "".join(f'printf "%s\\0" "${name}"\n' for name in VALUES) + "exit 0\n")
    done = subprocess.run(["bash", "-c", show], capture_output=True, text=True)
    assert done.stdout.split("\0")[:-1] == list(VALUES.values()), done.stderr
    # sbatch reads directives up to the first command only.
    assert script.index("#SBATCH --nodes=9") > script.index("set -euo pipefail")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("slurm.account=0123", "--account=0123"),
        ("slurm.account=1e3", "--account=1e3"),
        ("slurm.qos=on", "--qos=on"),
        ("slurm.partition=2026-01-02", "--partition=2026-01-02"),
        ("slurm.time=4:00:00", "--time=4:00:00"),
        ("slurm.time=240", "--time=240"),
        ("slurm.memory=4096", "--mem=4096"),
        ("slurm.memory=0", "--mem=0"),
        ("slurm.gpus_per_node=h200:2", "--gpus-per-node=h200:2"),
        ("slurm.gpus_per_node=gpu:2", "--gpus-per-node=2"),
        ("slurm.extra=--constraint='a|b'", "--constraint='a|b'"),
        ("name=007", "--job-name=007"),
    ],
)
def test_a_value_stands_in_the_script_as_it_was_written(tmp_path: Path, override: str, line: str) -> None:
    assert f"#SBATCH {line}\n" in planned(tmp_path / "run", override).script


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("slurm.memory=200 GB", "slurm.memory: expected a number of MB"),
        ("slurm.time=4h", "slurm.time: expected minutes"),
        ("slurm.extra=['#SBATCH --exclusive']", "slurm.extra: write '--exclusive'"),
        ("slurm.extra=['--output=x']", "slurm.extra: --output is set by the run folder's logs"),
        ("slurm.environment={RANK: 1}", "slurm.environment: RANK is set for every rank"),
        ("slurm.environment.A=null", "slurm.environment.A: Input should be text"),
        ('slurm.setup=["a\\rb"]', "carriage returns"),
        ("slurm.account='a b'", "slurm.account: expected a name without spaces"),
        ("slurm.partition='a,,b'", "slurm.partition: expected a name"),
        ("slurm.gpus_per_node=h200", "slurm.gpus_per_node: expected a number of GPUs"),
        ("trainer.steps=010", "trainer.steps: YAML reads 010 as 8"),
        ("trainer.seed=1:30", "trainer.seed: YAML reads 1:30 as 90"),
    ],
)
def test_a_value_that_slurm_would_refuse_or_yaml_misread_is_refused_by_name(
    tmp_path: Path, override: str, says: str
) -> None:
    with pytest.raises(RequestError) as caught:
        planned(tmp_path / "run", override)
    assert str(caught.value).startswith(f"--set {override.partition('=')[0]}: ")
    assert says in str(caught.value)


# --- the cluster ---------------------------------------------------------------------------------------------------


@dataclass
class Cluster:
    """Programs of a cluster that print what they are told to, and write down how sbatch was called."""

    folder: Path

    def program(self, name: str, text: str, code: int = 0, said: str = "") -> None:
        path = self.folder / name
        (self.folder / f"{name}.out").write_text(text)
        (self.folder / f"{name}.err").write_text(said)
        called = f'[ {name} = sbatch ] && printf "%s\\n" "$*" >> "$0.called"'
        path.write_text(f'#!/bin/sh\n{called}\ncat "$0.out"; cat "$0.err" >&2; exit {code}\n')
        path.chmod(0o755)

    def calls(self) -> list[str]:
        return (self.folder / "sbatch.called").read_text().splitlines()


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster(tmp_path / "bin")
    made.folder.mkdir()
    monkeypatch.setenv("PATH", f"{made.folder}:{os.environ['PATH']}")
    made.program("sbatch", "4242\n")
    made.program("scontrol", "MaxArraySize            = 1001\n")
    made.program("sinfo", "batch*|4|(null)\nh200|2|gpu:h200:8(S:0-1)\n")
    return made


@pytest.mark.parametrize(
    "printed",
    [
        "4242\n",
        "4242;big3\n",
        "-----\n  Welcome to Big3\n--> Verifying valid jobname... OK\n4242\n",
        "Submitted batch job 4242\n",
        "2026\n17\n4242\n",
        "No. 7 of 2026: be nice\n\nSubmitted batch job 4242 on cluster big3\nHave fun\n",
        "\x1b[1mhello\x1b[0m\r\n4242\r\n",
    ],
)
def test_the_number_of_a_job_is_found_whatever_a_wrapper_says_around_it(cluster: Cluster, printed: str) -> None:
    cluster.program("sbatch", printed)
    assert slurm.sbatch("x") == "4242"


def test_sbatch_that_gives_no_number_or_fails_is_one_message(cluster: Cluster) -> None:
    cluster.program("sbatch", "Welcome to Big3\n")
    with pytest.raises(RequestError, match="gave no job number.*Welcome to Big3; squeue"):
        slurm.sbatch("x")
    cluster.program("sbatch", "", 1, "sbatch: error: Invalid qos\nsbatch: error: sorry\n")
    with pytest.raises(RequestError, match="^sbatch: sbatch: error: Invalid qos sbatch: error: sorry$"):
        slurm.sbatch("x")


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", {}),
        ("", {}),
        ("gpu:8", {"": 8}),
        ("gpu:h200:8(S:0-1)", {"h200": 8}),
        ("gpu:h200:8(S:0,2),nvme:1", {"h200": 8}),
        ("gpu:a100:2,gpu:v100:1(S:1)", {"a100": 2, "v100": 1}),
        ("gpu:1g.10gb:7(S:0),gpu:1g.10gb:7(S:1)", {"1g.10gb": 14}),
        ("gpu:a100_3g.20gb:2", {"a100_3g.20gb": 2}),
        ("gpu", {"": 1}),
        ("gpu:h200", {"h200": 1}),
        ("gpumem:80000,mps:800,gpu:2", {"": 2}),
        ("gpu:h200:8(S:0", {"h200": 8}),  # a column that is cut off
    ],
)
def test_the_gpus_of_a_node_are_read_in_every_form_of_sinfo(gres: str, gpus: dict[str, int]) -> None:
    assert gpus_of(gres) == gpus


H200 = """h200|2|gpu:h200:8(S:0-1)
h200-low|4|gpu:h200:8
mixed|1|gpu:a100:8
mixed|2|gpu:h100:4,gpu:a100:4
batch*|4|(null)
"""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["partition=h200", "gpus_per_node=8", "nodes=2"], None),
        (["partition=h200", "gpus_per_node=8", "nodes=3"], "slurm.nodes + slurm.spares = 3"),
        (["partition=h200,h200-low", "gpus_per_node=8", "nodes=3"], None),  # all of them in one of the two
        (["partition=h200,h200-low", "gpus_per_node=8", "nodes=5"], "h200 has 2 such nodes, h200-low has 4 such nodes"),
        (["partition=h200,nope", "gpus_per_node=8"], "slurm.partition = nope: this cluster has batch, h200"),
        (["partition=mixed", "gpus_per_node=a100:4", "nodes=3"], None),
        (["partition=mixed", "gpus_per_node=8", "nodes=3"], None),
        (["partition=mixed", "gpus_per_node=h100:8"], "(its GPUs: a100, h100)"),
        (["partition=mixed", "gpus_per_node=h100:4,a100:4", "nodes=2"], None),
        (["gpus_per_node=1", "tasks_per_node=1", "nodes=2"], "partition batch has 0 such nodes"),
        (["gpus_per_node=0", "nodes=4"], None),
    ],
)
def test_what_a_partition_has_is_held_against_what_is_asked_for(
    tmp_path: Path, cluster: Cluster, options: list[str], says: str | None
) -> None:
    cluster.program("sinfo", H200)
    words = [f"slurm.{option}" for option in options]
    if says is None:
        assert slurm.check_cluster(planned(tmp_path / "run", *words), None) == []
        return
    with pytest.raises(RequestError) as caught:
        slurm.check_cluster(planned(tmp_path / "run", *words), None)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("printed", "says"),
    [
        ("", "sinfo shows no partition"),
        ("\n\n", "sinfo shows no partition"),
        ("slurm_load_partitions: Zero Bytes were transmitted\n", "sinfo shows no partition"),
        ("|||\n", "sinfo shows no partition"),
        ("batch|many|gpu:8\n", "sinfo shows no partition"),
        ("Welcome!\nbatch*|1K|(null)\n|\n", None),
        ("batch|2|(null)\n", None),  # no default: sbatch says what it wants
        ("batch*|2|(null)|more|columns\n", None),
        ("batch*|2", None),
    ],
)
def test_odd_answers_of_sinfo_are_one_message_or_left_to_sbatch(
    tmp_path: Path, cluster: Cluster, printed: str, says: str | None
) -> None:
    cluster.program("sinfo", printed)
    if says is None:
        assert slurm.check_cluster(planned(tmp_path / "run"), None) == []
        return
    with pytest.raises(RequestError, match=says):
        slurm.check_cluster(planned(tmp_path / "run"), None)


def test_a_cluster_that_does_not_answer_is_one_message(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.program("sinfo", "", 1, "slurm_load_partitions: Unable to contact slurm controller\n")
    with pytest.raises(RequestError, match="^sinfo: slurm_load_partitions: Unable to contact slurm controller$"):
        slurm.check_cluster(planned(tmp_path / "run"), None)
    (cluster.folder / "sinfo").write_text("no program")
    monkeypatch.setenv("PATH", str(cluster.folder))
    with pytest.raises(RequestError, match="^sinfo cannot be run: "):
        slurm.check_cluster(planned(tmp_path / "run"), None)


@pytest.mark.parametrize(
    ("attempts", "answer", "says"),
    [
        (1000, "MaxArraySize            = 1001\n", None),
        (1001, "MaxArraySize            = 1001\n", "slurm.attempts: the last index of the array would be 1001"),
        (5000, "nothing of that name\n", None),
    ],
)
def test_an_array_beyond_the_clusters_largest_index_is_refused(
    tmp_path: Path, cluster: Cluster, attempts: int, answer: str, says: str | None
) -> None:
    cluster.program("scontrol", answer)
    plan = planned(tmp_path / "run", "slurm.resume=array", f"slurm.attempts={attempts}")
    if says is None:
        slurm.check_cluster(plan, None)
        return
    with pytest.raises(RequestError, match=says):
        slurm.check_cluster(plan, None)


def test_a_sweep_beyond_the_clusters_largest_index_is_refused(tmp_path: Path, cluster: Cluster) -> None:
    cluster.program("scontrol", "MaxArraySize            = 2\n")
    configs = planned(tmp_path).runs
    slurm.check_cluster(slurm.plan(configs * 2, tmp_path / "run", sweep=True), None)
    with pytest.raises(RequestError, match="--sweep: the last index of the array would be 2"):
        slurm.check_cluster(slurm.plan(configs * 3, tmp_path / "run", sweep=True), None)


def test_what_sbatch_says_of_the_very_script_is_the_message_unless_nodes_are_only_out_for_now(
    tmp_path: Path, cluster: Cluster
) -> None:
    refuses = 'grep -q "^#SBATCH --qos=nope$" "$2" && { echo "allocation failure: Invalid qos" >&2; exit 1; }'
    (cluster.folder / "sbatch").write_text(f"#!/bin/sh\n{refuses}\nexit 0\n")
    slurm.check_cluster(planned(tmp_path / "run"), None)
    with pytest.raises(RequestError, match=r"\(sbatch --test-only\): allocation failure: Invalid qos"):
        slurm.check_cluster(planned(tmp_path / "run", "slurm.qos=nope"), None)
    # Of nodes that are drained now and of nodes that there never were, sbatch says the same.
    cluster.program("sbatch", "", 1, "allocation failure: Requested node configuration is not available\n")
    out = 'case "$*" in *drained*) {} ;; *) echo "batch*|4|(null)" ;; esac'
    (cluster.folder / "sinfo").write_text("#!/bin/sh\n" + out.format('echo "batch*|3|(null)"'))
    (remark,) = slurm.check_cluster(planned(tmp_path / "run"), None)
    assert remark.startswith("3 nodes are down or drained now, so the job may have to wait")
    (cluster.folder / "sinfo").write_text("#!/bin/sh\n" + out.format("true"))
    with pytest.raises(RequestError, match="configuration is not available"):
        slurm.check_cluster(planned(tmp_path / "run"), None)
    assert not (tmp_path / "run").exists()


def test_every_job_of_a_run_has_its_account_qos_and_reservation(tmp_path: Path, cluster: Cluster) -> None:
    folder = tmp_path / "lr%j"
    plan = planned(
        folder,
        *("slurm.partition=batch", "slurm.account=0123", "slurm.qos=high"),
        "slurm.extra=['--reservation=maint -C \"a|b\"', '--exclusive', '--wckey x']",
    )
    slurm.check_cluster(plan, tmp_path / "hf", "math500,mine.jsonl")
    slurm.write(plan, [[]])
    assert slurm.submit(plan, tmp_path / "hf", "math500,mine.jsonl") == ["4242", "4242", "4242"]
    _, tried, also_tried, _, exported, evaluated = cluster.calls()
    for call, name in ((tried, "export"), (exported, "export"), (also_tried, "eval"), (evaluated, "eval")):
        for words in ("--partition=batch", "--account=0123", "--qos=high", "--reservation=maint", "--constraint=a|b"):
            assert f" {words} " in call, call
        assert " --wckey=x " in call
        assert "--exclusive" not in call
        assert f" --output={tmp_path}/lr%%j/logs/{name}-%j.out " in call
    assert tried.startswith("--test-only ") and also_tried.startswith("--test-only ")
    for call in (exported, evaluated):
        assert call.startswith("--parsable --dependency=afterok:4242 ")
    settings = plan.runs[0].slurm
    cores = settings.cpus_per_task * settings.ranks_per_node()
    assert f" --nodes=1 --cpus-per-task={cores} --time={settings.time} " in evaluated
    assert evaluated.strip().endswith(f"-m a3po_megatron eval {folder} --benchmark math500,mine.jsonl")
