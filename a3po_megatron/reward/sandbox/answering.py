"""The program that is tested: it defines what it defines, then answers what the tests ask of it (asking.py).

    stdin      JSON list of texts, run one after the other as one module: what comes before the program, the program
    argument   the descriptor of a socket to the tests

Whatever the program does to this process, it can only answer: the tests compare elsewhere.
"""

import builtins
import json
import operator
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from wire import decode, encode, receive, send

BATCH = 64  # elements of an iterator in one answer
OPERATIONS: dict[str, Callable[..., Any]] = {
    **{"iter": iter, "next": next, "len": len, "bool": bool, "str": str, "repr": repr, "hash": hash, "format": format},
    **{"int": int, "float": float, "index": operator.index, "reversed": reversed, "abs": abs},
    **{"item": operator.getitem, "put": operator.setitem, "remove": operator.delitem, "has": operator.contains},
    **{
        "equal": lambda thing, other, /: bool(thing == other),
        "call": lambda thing, /, *values, **named: thing(*values, **named),
    },
    **{"attribute": getattr, "set": setattr},
    **{"isinstance": lambda thing, value, /: isinstance(value, thing)},
    **{"issubclass": lambda thing, value, /: issubclass(value, thing)},
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow")},
    **{name: getattr(operator, name) for name in ("and_", "or_", "xor", "lshift", "rshift", "neg", "pos", "invert")},
    **{name: getattr(operator, name) for name in ("lt", "le", "gt", "ge")},
}


class Answering:
    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names
        self.things: dict[int, Any] = {}  # number → what is not plain; they live as long as the tests
        self.failed: dict[int, BaseException] = {}  # iterators that raised behind elements that they gave

    def coded(self, value: Any) -> Any:
        return encode(value, self.numbered)

    def numbered(self, value: Any) -> list[Any]:
        self.things[id(value)] = value
        if isinstance(value, type) and issubclass(value, BaseException):
            return ["exception", id(value), value.__name__, builtin_names(value)]
        return ["thing", id(value), type(value).__name__]

    def thing(self, tag: str, *rest: Any) -> Any:
        if tag == "thing":
            return self.things[rest[0]]
        if tag == "builtin":
            return getattr(builtins, rest[0])
        raise ValueError(f"no value is called {tag!r}")

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What the tests get: a value, or an error; and the arguments that it changed, which their caller can see."""
        if asked["do"] == "name":
            return {"value": self.coded(self.names[asked["name"]])}
        values = [decode(value, self.thing) for value in asked["values"]]
        named = {name: decode(value, self.thing) for name, value in asked["named"].items()}
        operation = self.take if asked["do"] == "take" else OPERATIONS[asked["do"]]
        try:
            answer: dict[str, Any] = {"value": self.coded(operation(*values, **named))}
        except BaseException as error:
            answer = self.failure(error)
        arguments = [*enumerate(values), *named.items()]
        before = [*asked["values"], *asked["named"].values()]
        mutable = list | dict | set | bytearray
        for (place, value), coded in zip(arguments, before, strict=True):
            if isinstance(value, mutable) and (now := self.coded(value)) != coded:
                answer.setdefault("changed", []).append([place, now])
        return answer

    def take(self, iterator: Iterator[Any], /) -> tuple[list[Any], bool]:
        """The next elements, and whether there may be more."""
        if id(iterator) in self.failed:
            raise self.failed.pop(id(iterator))
        taken: list[Any] = []
        try:
            while len(taken) < BATCH:
                taken.append(next(iterator))
        except StopIteration:
            return taken, False
        except BaseException as error:
            self.failed[id(iterator)] = error
        return taken, True

    def failure(self, error: BaseException) -> dict[str, Any]:
        kind = type(error)
        own = self.numbered(kind) if kind.__module__ != "builtins" else None
        return {"error": [builtin_names(kind), words_of(error), own]}


def builtin_names(kind: type) -> list[str]:
    return [each.__name__ for each in kind.__mro__ if each.__module__ == "builtins"]


def words_of(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:500]
    except BaseException:
        return type(error).__name__


def run() -> None:
    module = types.ModuleType("solution")
    sys.modules["solution"] = module  # where dataclasses look for a class's names
    channel, texts = int(sys.argv[1]), json.loads(sys.stdin.read())
    answering = Answering(module.__dict__)
    try:
        for text in texts:
            exec(compile(text, "program.py", "exec"), module.__dict__)
    except BaseException as error:
        send(channel, answering.failure(error))
        return
    send(channel, {"names": [name for name in module.__dict__ if isinstance(name, str)]})
    while True:
        try:
            asked = receive(channel)
        except EOFError:
            return
        try:
            send(channel, answering.answer(asked))
        except BaseException as error:  # such as a value that contains itself, or is too large
            send(channel, answering.failure(error))


run()
