"""Requests drawn at random: values of options, tokenizer files and answers of clusters.

Whatever is drawn is either taken, and then has its effect, or refused with exit 2 in one paragraph. Over 30 % are
drawn so that they must be taken. Draws are by number: an input that fails is drawn again by `draw(number)`.
"""

from __future__ import annotations

import json
import random
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import yaml

from a3po_megatron.config import load_config, load_resolved, resolve
from a3po_megatron.config.fields import known_options
from a3po_megatron.config.sbatch_options import KNOWN, split
from a3po_megatron.data.tokenizer import Tokenizer
from a3po_megatron.errors import RequestError
from a3po_megatron.launch import site, slurm
from a3po_megatron.ranks.backend import CPU
from a3po_megatron.run.folder import save_resolved
from tests.harness.ranks import ROOT
from tests.harness.tiny_models import VOCAB, save_tokenizer

SIGNS = "abcXYZ019 _-./:=@%+,;|&<>(){}[]#'\"\\$`~*?!^äß日本\u2028\t"
ODD = [
    *("", " ", "null", "~", "true", "no", "0", "-1", "1e999", ".nan", "0x10", "010", "1:30", "2026-01-01", "[]", "{}"),
    *("[", "{a: b", "a: b", "- x", "*x", "&x y", "!!python/object:x.y {}", "!!binary xx", "!!set {a}", "@", "%", "`x`"),
    *(
        "[[1]]",
        "[1, a]",
        "{a: 1}",
        "'",
        '"',
        '"\\ud800"',
        '"\\0"',
        "|\n x",
        "#",
        "x #y",
        "?",
        ": :",
        "1" * 5000,
        "[" * 3000,
    ),
    *(
        "$NOWHERE",
        "~nobody-of-this-name",
        "${}",
        "/",
        "builtin:other",
        "200 GB",
        "h200",
        "h200:8:8",
        "1-2-3",
        "\x85",
        "\ufeff",
    ),
    *("<<: 1", "{<<: 1}", "=", "!!int x", "!!float y", "!!bool z", "!!timestamp t", "--- a\n--- b", "9" * 400, "1e400"),
]


class Case(NamedTuple):
    what: str  # to show
    try_it: Callable[[], Any]  # raises RequestError, or returns what came of it
    expected: Any  # what must come of it; ANY: it may be refused as well


ANY = object()


def text(random_: random.Random, most: int = 12) -> str:
    return "".join(random_.choice(SIGNS) for _ in range(random_.randint(1, most)))


def word(random_: random.Random) -> str:
    return "".join(random_.choice("abcXYZ019_-.") for _ in range(random_.randint(1, 8)))


class Requests:
    """Draws of a configuration's values."""

    def __init__(self, folder: Path) -> None:
        (folder / "m").mkdir()
        model = json.loads((ROOT / "configs/models/tiny-arithmetic/config.json").read_text())
        (folder / "m/config.json").write_text(json.dumps(model | {"max_position_embeddings": 4096}))
        (folder / "rows.jsonl").write_text("")
        self.folder = folder

    def config(self, options: dict[str, Any], *overrides: str) -> Any:
        tree: dict[str, Any] = {"model": {"path": "m"}, "data": {"path": "rows.jsonl"}}
        tree["slurm"] = {"gpus_per_node": 0, "tasks_per_node": 1}
        for option, value in options.items():
            section, _, name = option.partition(".")
            tree.setdefault(section, {})[name] = value
        (self.folder / "c.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
        return load_config(self.folder / "c.yaml", overrides)

    def given(self, random_: random.Random, option: str, value: Any) -> Callable[[], Any]:
        """Sets an option in a file or after --set; returns what the configuration has then."""
        section, _, name = option.partition(".")
        if random_.random() < 0.5:
            return lambda: getattr(getattr(self.config({option: value}), section), name)
        return lambda: getattr(getattr(self.config({}, f"{option}={json.dumps(value)}"), section), name)

    def script(self, options: dict[str, Any], folder: Path | None = None) -> str:
        return slurm.plan([slurm.settled(self.config(options))], folder or self.folder / "run", sweep=False).script

    def directive(self, options: dict[str, Any], name: str, folder: Path | None = None) -> str | None:
        """A directive's value in the script, as sbatch reads it."""
        for line in self.script(options, folder).splitlines():
            for given in split(line.removeprefix("#SBATCH")) if line.startswith("#SBATCH") else []:
                if given.partition("=")[0] == f"--{name}":
                    return given.partition("=")[2]
        return None

    def draw(self, random_: random.Random) -> Case:
        kinds = [
            self.number,
            self.text,
            self.time,
            self.line,
            self.variable,
            self.further,
            self.named,
            self.odd,
            self.odd,
        ]
        return random_.choice(kinds)(random_)

    def number(self, random_: random.Random) -> Case:
        option = random_.choice(["trainer.steps", "trainer.seed", "rollout.max_tokens", "optimizer.lr", "shaping.rho"])
        whole = option not in ("optimizer.lr", "shaping.rho")
        value = random_.randint(1, 10**9) if whole else random_.choice([1.5, 2e3, 1e-6 + 1, 7.0])
        return Case(f"{option}={value}", self.given(random_, option, value), value)

    def text(self, random_: random.Random) -> Case:
        value = text(random_)
        set_to = self.given(random_, "data.id_field", value)

        def saved() -> str:
            """Also as the run's ranks read it."""
            settings = resolve(self.config({"data.id_field": set_to()}), SimpleNamespace(layers=2), CPU)
            save_resolved(settings, self.folder / "config.yaml")
            return load_resolved(self.folder / "config.yaml").data.id_field

        return Case(f"data.id_field={value!r}", saved, value)

    def time(self, random_: random.Random) -> Case:
        days, hours, minutes, seconds = (random_.randint(1, n) for n in (9, 99, 99, 99))
        form = random_.choice(
            ["{d}-{h}", "{d}-{h}:{m}", "{d}-{h}:{m}:{s}", "{h}:{m}:{s}", "1{m}", "1{m}:{s}", "UNLIMITED"]
        )
        value = form.format(d=days, h=hours, m=minutes, s=seconds)
        return Case(f"slurm.time={value}", lambda: self.directive({"slurm.time": value}, "time"), value)

    def line(self, random_: random.Random) -> Case:
        said = text(random_)
        value = f"echo {shlex.quote(said)}" if random_.random() < 0.7 else said

        def ran() -> str:
            script = self.script({"slurm.setup": [value]}).partition("\nexport ")[0]
            if value == said:  # of what is no command nobody knows what it would do
                return script
            return subprocess.run(["bash", "-c", script], capture_output=True, encoding="utf-8").stdout

        return Case(f"slurm.setup={value!r}", ran, f"{said}\n" if value != said else ANY)

    def variable(self, random_: random.Random) -> Case:
        name, value = f"V{word(random_).translate({45: 95, 46: 95})}", text(random_)

        def set_to() -> str:
            script = self.script({"slurm.environment": {name: value}})
            return shlex.split(re.findall(rf"^export {name}=(.*)$", script, re.MULTILINE)[-1])[0]

        return Case(f"slurm.environment.{name}={value!r}", set_to, value)

    def further(self, random_: random.Random) -> Case:
        """An option of sbatch: taken where nothing of ours sets it."""
        name = random_.choice(sorted(KNOWN))
        known = KNOWN[name]
        value = word(random_)
        entry = f"--{name}" + (f"={value}" if known.value == "=" else "")
        mine = bool(known.owner)

        def stands() -> bool:
            return f"#SBATCH {entry}\n" in self.script({"slurm.extra": [entry]})

        return Case(f"slurm.extra={entry}", stands, ANY if mine else True)

    def named(self, random_: random.Random) -> Case:
        name = text(random_).replace("/", "").strip() or "x"
        folder = self.folder / name
        sane = name.isprintable() and "\\" not in name and name not in (".", "..")

        def output() -> str:
            pattern = self.directive({}, "output", folder) or ""
            return re.sub("%(.)", lambda match: {"%": "%", "j": "7"}[match[1]], pattern)

        return Case(f"--run-dir {name!r}", output, f"{folder}/logs/slurm-7.out" if sane else ANY)

    def odd(self, random_: random.Random) -> Case:
        option, value = random_.choice(known_options()), random_.choice([random_.choice(ODD), text(random_, 30)])
        if random_.random() < 0.3:
            option = "".join(random_.sample(option, len(option)))
        if random_.random() < 0.5:
            return Case(f"--set {option}={value!r:.80}", lambda: self.config({}, f"{option}={value}") and None, ANY)

        def in_file() -> None:
            section, _, name = option.partition(".")
            (self.folder / "odd.yaml").write_text(f"{section}:\n  {name}: {value}\n", errors="replace")
            load_config(self.folder / "odd.yaml", ["model.path=m", "data.path=builtin:arithmetic"])

        return Case(f"in a file: {option}: {value!r:.80}", in_file, ANY)


ASKS = "{{ messages[0].content }}{% if add_generation_prompt %}+{% endif %}"  # 1+2 → 1+2+


class Tokenizers:
    """Draws of tokenizer files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_tokenizer(folder / "whole", VOCAB)
        self.files = {
            name: (folder / "whole" / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json")
        }
        self.expected = Tokenizer(folder / "whole", VOCAB, (1,), "raw").encode("1+2")

    def draw(self, random_: random.Random) -> Case:
        name = random_.choice(list(self.files))
        tree, what = json.loads(self.files[name]), "whole"
        kind = random_.choice(["whole", "template", "raises", "value", "value", "cut"])
        if kind in ("template", "raises"):
            name, tree = "tokenizer_config.json", json.loads(self.files["tokenizer_config.json"])
            bad = [
                "{{ raise_exception('no') }}",
                "{% x",
                "{{ a.b.c }}",
                "{{ messages[3] }}",
                "{{ 1/0 }}",
                "{{ range(9**9) }}",
            ]
            tree["chat_template"] = random_.choice(bad) if kind == "raises" else ASKS
            what = f"chat_template: {tree['chat_template']}"
        elif kind == "value":
            what = f"{name}: {self._spoil(random_, tree)}"
        content = json.dumps(tree)
        if kind == "cut":
            at = random_.randrange(len(content))
            content, what = content[:at], f"{name} cut at {at}"
        chat = kind in ("template", "raises")

        def encode() -> Any:
            folder = self.folder / "drawn"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self.folder / "whole", folder)
            (folder / name).write_text(content)
            return Tokenizer(folder, VOCAB, (1,), "chat" if chat else "raw").encode("1+2")

        expected = {"whole": self.expected, "template": (*self.expected, self.expected[1])}
        return Case(what, encode, expected.get(kind, ANY))

    @staticmethod
    def _spoil(random_: random.Random, tree: Any) -> str:
        """Replaces or removes one value somewhere in the tree."""
        path = []
        while True:
            keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
            key = random_.choice(keys)
            path.append(str(key))
            if isinstance(tree[key], dict | list) and tree[key] and random_.random() < 0.7:
                tree = tree[key]
                continue
            if random_.random() < 0.3:
                del tree[key]
            else:
                tree[key] = random_.choice([None, -1, 10**12, "", "x", [], {}, [1], {"type": "Future"}, True, 1.5])
            return ".".join(path)


class Clusters:
    """Draws of what a cluster's programs answer."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.requests, self.patch = Requests(folder), patch

    def draw(self, random_: random.Random) -> Case:
        names = [word(random_) + str(n) for n in range(random_.randint(1, 4))]
        nodes = {name: random_.randint(1, 30) for name in names}
        gpus = {name: random_.choice([0, 1, 4, 8]) for name in names}
        kinds = {name: random_.choice(["", "h200", "1g.10gb", "a100_3g"]) for name in names}
        rows = [f"{name}|{nodes[name]}|{self._gres(random_, gpus[name], kinds[name])}" for name in names]
        noise = [text(random_, 30).replace("|", "") for _ in range(random_.randint(0, 2))]
        mine = random_.sample(names, random_.randint(1, len(names)))
        wanted, count = random_.choice([0, 1, 4, 8]), random_.randint(1, 30)
        fits = any(gpus[name] >= wanted and nodes[name] >= count for name in mine)
        broken = random_.random() < 0.3
        number = str(random_.randint(1, 10**7))
        greeting = "\n".join(
            ["Welcome!", *noise, random_.choice([number, f"{number};x", f"Submitted batch job {number}"])]
        )
        answers = {
            "sinfo": text(random_, 200)
            if broken
            else "\n".join(random_.sample([*rows, *noise], len(rows) + len(noise))),
            "scontrol": text(random_, 200) if broken else "MaxArraySize = 1001\n",
            "sbatch": greeting if not broken else text(random_, 60),
        }
        options = {"slurm.partition": ",".join(mine), "slurm.nodes": count, "slurm.gpus_per_node": wanted}
        options |= {"parallel.data": count, "slurm.tasks_per_node": 1}

        def submitted() -> str:
            self.patch.setattr(site.shutil, "which", lambda name: name)
            codes = {"sbatch": random_.choice([0, 1]) if broken else 0}
            self.patch.setattr(
                site.subprocess,
                "run",
                lambda words, **_: subprocess.CompletedProcess(
                    words, codes.get(words[0], 0), answers[words[0]], "said"
                ),
            )
            plan = slurm.plan([slurm.settled(self.requests.config(options))], self.requests.folder / "run", sweep=False)
            slurm.check_cluster(plan, None)
            return slurm.sbatch("x")

        return Case(f"{options} of {answers}", submitted, number if fits and not broken else ANY)

    @staticmethod
    def _gres(random_: random.Random, gpus: int, kind: str) -> str:
        if gpus == 0:
            return random_.choice(["(null)", "", "nvme:2", "gpumem:80", "mps:800"])
        count = f"gpu:{kind}:{gpus}" if kind else f"gpu:{gpus}"
        return random_.choice(["", "nvme:1,", "mps:800(S:0,1),"]) + count + random_.choice(["", "(S:0-1)", "(S:0,2)"])


def outcome(case: Case) -> Any:
    """What came of it; the message of a refusal, which must be one paragraph and exit 2."""
    try:
        return case.try_it()
    except RequestError as error:
        refusal = error
    message = str(refusal)
    assert refusal.exit_code == 2
    assert message and "\n" not in message and len(message) < 7000, (case.what, message)
    assert "Traceback" not in message
    return refusal


def check_drawn(numbers: range, folder: Path, patch: pytest.MonkeyPatch) -> None:
    for part in ("requests", "tokenizers", "clusters"):
        (folder / part).mkdir()
    requests, tokenizers = Requests(folder / "requests"), Tokenizers(folder / "tokenizers")
    clusters = Clusters(folder / "clusters", patch)
    sound = 0
    for number in numbers:
        random_ = random.Random(f"request {number}")
        source = random_.choice([requests, requests, requests, tokenizers, clusters])
        with patch.context() as within:
            clusters.patch = within
            case = source.draw(random_)
            try:
                found = outcome(case)
            except Exception as error:
                raise AssertionError(f"draw({number}): {case.what}: {error!r}") from error
        if case.expected is not ANY:
            sound += 1
            assert found == case.expected, f"draw({number}): {case.what}: {found!r} is not {case.expected!r}"
    assert sound >= 0.3 * len(numbers), f"{sound} of {len(numbers)} had to be taken"


def test_a_request_drawn_at_random_is_taken_and_has_its_effect_or_is_refused_in_one_paragraph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_drawn(range(200), tmp_path, monkeypatch)


@pytest.mark.soak
def test_two_thousand_requests_drawn_at_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_drawn(range(1000, 3000), tmp_path, monkeypatch)
