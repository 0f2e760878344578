"""YAML, with what was written kept beside what YAML makes of it.

An option that takes text gets the text that stands in the file: `account: 0123` is 0123 and not 83, `time: 4:00:00` is
no number of sixties. An option that takes numbers gets YAML's, unless YAML reads something else than a person would.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml


@dataclass(frozen=True)
class Written:
    """A plain scalar that YAML takes for something else than text."""

    value: Any  # a number or a truth value
    text: str


class _Loader(yaml.SafeLoader):
    def written(self, node: yaml.ScalarNode) -> Any:
        kind = node.tag.rpartition(":")[2]
        try:
            value = {
                "int": self.construct_yaml_int,
                "float": self.construct_yaml_float,
                "bool": self.construct_yaml_bool,
            }[kind](node)
        except (ValueError, KeyError):  # a date, and a number with more digits than Python reads
            return node.value
        return Written(value, node.value)


for _kind in ("int", "float", "bool", "timestamp"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.written)


def read_yaml(text: str) -> tuple[yaml.Node | None, Any]:
    """The nodes of a document, and its tree with `Written` scalars. Raises ValueError, in one line, for what
    is none."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("nested too deeply, or an alias refers to what it stands in") from error


def as_text(tree: Any) -> Any:
    """The tree with what was written."""
    if isinstance(tree, Written):
        return tree.text
    if isinstance(tree, list):
        return [as_text(value) for value in tree]
    if isinstance(tree, dict):
        return {as_text(key): as_text(value) for key, value in tree.items()}
    return tree


def as_values(tree: Any) -> Any:
    """The tree with what YAML reads."""
    if isinstance(tree, Written):
        return tree.value
    if isinstance(tree, list):
        return [as_values(value) for value in tree]
    if isinstance(tree, dict):
        return {as_values(key): as_values(value) for key, value in tree.items()}
    return tree


def as_numbers(tree: Any) -> Any:
    """`as_values`. Raises ValueError for a number that YAML reads otherwise than a person: 010 is 8, 1:30 is 90."""
    if isinstance(tree, Written) and re.fullmatch(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-9.]+)+)", tree.text):
        raise ValueError(f"YAML reads {tree.text} as {tree.value}: write the number that you mean")
    if isinstance(tree, list):
        return [as_numbers(value) for value in tree]
    return as_values(tree)
