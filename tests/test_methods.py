"""Methods by name: what each sets, what goes before it, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from a3po_megatron.config import Config, load_config
from a3po_megatron.config.methods import METHODS
from a3po_megatron.errors import RequestError
from a3po_megatron.files.run_folder import RunFolder
from a3po_megatron.launch.check import settle
from a3po_megatron.ranks.backend import CPU
from tests.harness import interrupted_runs as tools
from tests.harness.tiny_models import make_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    make_checkpoint(folder / "model", max_position_embeddings=4096)
    return folder


def read(folder: Path, *overrides: str, **tree: object) -> Config:
    (folder / "c.yaml").write_text(
        yaml.safe_dump({"model": {"path": "model"}, "data": {"path": "builtin:arithmetic"}} | tree)
    )
    return load_config(folder / "c.yaml", overrides)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_the_options_that_it_sets(folder: Path, name: str) -> None:
    """It is the configuration in which they are written out."""
    tree: dict[str, dict[str, object]] = {}
    for option, value in METHODS[name].items():
        section, _, key = option.partition(".")
        tree.setdefault(section, {})[key] = value
    assert read(folder, method=name) == read(folder, **tree).model_copy(update={"method": name})


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_sets_goes_together(folder: Path, name: str) -> None:
    assert settle(read(folder, method=name), CPU).method == name


@pytest.mark.soak
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(tmp_path: Path, name: str) -> None:
    """On the model of the second demo, which answers now and then."""
    tools.trained_here(tmp_path / "run", *tools.LAYOUTS["tp2"], f"method={name}", "shaping=null", "trainer.steps=2")
    rows = [json.loads(line) for line in RunFolder(tmp_path / "run").metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    assert all(math.isfinite(row["policy/grad_norm"]) and row["policy/grad_norm"] > 0 for row in rows)
    assert all(row["shaping/rho"] == (2.0 - 0.005 * row["step"] if name == "a3po" else 1.0) for row in rows)


def test_the_methods_name_is_nothing_that_its_options_do_not_say() -> None:
    """No two are the same."""
    assert len({tuple(sorted(options.items())) for options in METHODS.values()}) == len(METHODS)
    assert METHODS["a3po"] == {}


def test_what_stands_beside_a_method_goes_before_it(folder: Path) -> None:
    grpo = read(folder, method="grpo")
    assert read(folder, method="grpo", objective={"clip_high": 0.28}).objective == grpo.objective.model_copy(
        update={"clip_high": 0.28}
    )
    assert read(folder, "objective.dual_clip=4.0", method="grpo").objective.dual_clip == 4.0
    assert read(folder, "method=dapo", method="grpo") == read(folder, method="dapo")
    defaults = {"clip_low": None, "normaliser": None, "clip_high": None, "dual_clip": 3.0}
    null = read(folder, method="grpo", objective=defaults)
    assert null.objective == read(folder).objective


def test_of_a_section_that_is_another_one_a_method_says_nothing(folder: Path) -> None:
    other = read(folder, method="grpo", objective={"name": "gspo"}).objective
    assert other == read(folder, objective={"name": "gspo"}).objective  # its own clip, not GRPO's
    assert read(folder, method="psr", advantage={"name": "group"}).advantage == read(folder).advantage


def test_a_base_may_have_another_method(folder: Path) -> None:
    read(folder, method="grpo")
    (folder / "d.yaml").write_text("base: c.yaml\nmethod: dr_grpo\n")
    assert load_config(folder / "d.yaml") == read(folder, method="dr_grpo")


def test_a_method_that_there_is_not_is_refused_with_those_that_there_are(folder: Path) -> None:
    with pytest.raises(RequestError, match=r"c.yaml:\d+: there is no method 'ppo': there are a3po, dapo, grpo"):
        read(folder, method="ppo")
