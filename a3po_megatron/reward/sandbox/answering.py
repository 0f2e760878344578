"""The program that is tested: it defines what it defines, then answers what the tests ask of it (asking.py).

The program's text comes on stdin. Whatever it does to this process, it can only answer: the tests compare elsewhere.
"""

import builtins
import sys
import types
from collections.abc import Callable
from typing import Any

from wire import decode, encode, receive, send

OPERATIONS: dict[str, Callable[..., Any]] = {
    **{"iter": iter, "next": next, "len": len, "bool": bool, "str": str, "repr": repr, "hash": hash},
    **{"item": lambda thing, key: thing[key], "has": lambda thing, key: key in thing},
    **{"equal": lambda thing, other: bool(thing == other), "less": lambda thing, other: bool(thing < other)},
    **{"call": lambda thing, *values, **named: thing(*values, **named)},
    **{"attribute": getattr, "set": setattr, "put": lambda thing, key, value: thing.__setitem__(key, value)},
}


class Answering:
    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names
        self.things: dict[int, Any] = {}  # number → what is not plain; they live as long as the tests

    def named(self, value: Any) -> list[Any]:
        self.things[id(value)] = value
        return ["thing", id(value), type(value).__name__]

    def thing(self, tag: str, *rest: Any) -> Any:
        if tag == "thing":
            return self.things[rest[0]]
        if tag == "builtin":
            return getattr(builtins, rest[0])
        raise ValueError(f"no value is called {tag!r}")

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["do"] == "name":
            return {"value": encode(self.names[asked["name"]], self.named)}
        values = [decode(value, self.thing) for value in asked["values"]]
        named = {name: decode(value, self.thing) for name, value in asked["named"].items()}
        result = OPERATIONS[asked["do"]](*values, **named)
        # What a call did to the lists that it was given, its caller can see.
        changed = []
        for place, value in enumerate(values):
            if (
                isinstance(value, list | dict | set | bytearray)
                and (coded := encode(value, self.named)) != asked["values"][place]
            ):
                changed.append([place, coded])
        return {"value": encode(result, self.named), "changed": changed}


def failure(error: BaseException) -> dict[str, Any]:
    kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
    return {"error": [kinds, f"{type(error).__name__}: {error}"[:500]]}


def run() -> None:
    module = types.ModuleType("solution")
    sys.modules["solution"] = module  # where dataclasses look for a class's names
    channel, source = int(sys.argv[1]), sys.stdin.read()
    try:
        exec(compile(source, "program.py", "exec"), module.__dict__)
    except BaseException as error:
        send(channel, failure(error))
        return
    send(channel, {"names": [name for name in module.__dict__ if isinstance(name, str)]})
    answering = Answering(module.__dict__)
    while True:
        try:
            asked = receive(channel)
        except EOFError:
            return
        try:
            answer = answering.answer(asked)
        except BaseException as error:
            answer = failure(error)
        send(channel, answer)


run()
