"""Tests, in a sandbox of their own: they call the program that is tested in another one, and compare here.

    stdin    JSON of what is tested (reward/code.py): asserts, a check, or calls
    argument the descriptor of a socket to the program (answering.py)
    stdout   JSON [outcome, reason], with exit code 0; with code 2 what is wrong with the tests themselves

So no program can pass by ending early, by what it prints, or by what it does to the interpreter. A value that is not
plain is a `Thing`: it stays with the program, and equals no plain value, whatever its own `__eq__` says.
"""

import ast
import builtins
import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from wire import decode, encode, receive, send


class Ended(BaseException):
    """The program has ended, or answers nonsense. No test may take it for an error that it expects."""


class Unsendable(BaseException):
    """A test hands over what cannot be sent: a fault of the tests."""


class Thing:
    """What the program has and the tests cannot hold."""

    def __init__(self, peer: "Peer", number: int, kind: str) -> None:
        self.__dict__.update(_peer=peer, _number=number, _kind=kind)

    def _ask(self, do: str, *values: Any, **named: Any) -> Any:
        return self._peer.ask(do, self, *values, **named)

    def __call__(self, *values: Any, **named: Any) -> Any:
        return self._ask("call", *values, **named)

    def __getattr__(self, name: str) -> Any:
        return self._ask("attribute", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", name, value)

    def __iter__(self) -> Iterator[Any]:
        iterator = self._ask("iter")
        if not isinstance(iterator, Thing):
            raise TypeError(f"{self._kind} is not iterable")
        while True:
            try:
                value = iterator._ask("next")
            except StopIteration:
                return
            yield value

    def __next__(self) -> Any:
        return self._ask("next")

    def __len__(self) -> int:
        return int(self._ask("len"))

    def __bool__(self) -> bool:
        return bool(self._ask("bool"))

    def __str__(self) -> str:
        return str(self._ask("str"))

    def __repr__(self) -> str:
        return str(self._ask("repr"))

    def __hash__(self) -> int:
        return hash((self._number,))

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("put", key, value)

    def __contains__(self, key: Any) -> bool:
        return bool(self._ask("has", key))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Thing) and (self._number == other._number or self._ask("equal", other) is True)

    def __lt__(self, other: Any) -> Any:
        return bool(self._ask("less", other)) if isinstance(other, Thing) else NotImplemented


class Peer:
    def __init__(self, channel: int) -> None:
        self.channel = channel
        said = self._receive()
        if "names" not in said:
            raise Ended(self._words(said))
        self.names = set(said["names"])

    def name(self, name: str) -> Any:
        return self._value({"do": "name", "name": name}, ())

    def ask(self, do: str, *values: Any, **named: Any) -> Any:
        message = {
            "do": do,
            "values": [encode(value, self._number) for value in values],
            "named": {name: encode(value, self._number) for name, value in named.items()},
        }
        return self._value(message, values)

    def _value(self, message: dict[str, Any], values: Iterable[Any]) -> Any:
        try:
            send(self.channel, message)
        except OSError as error:
            raise Ended("the program ended") from error
        answer = self._receive()
        if "error" in answer:
            raise self._error(answer)
        try:
            for place, coded in answer.get("changed", ()):
                change(list(values)[place], decode(coded, self._thing))
            return decode(answer["value"], self._thing)
        except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise Ended(f"the program's answer cannot be read: {error}") from error

    def _receive(self) -> dict[str, Any]:
        try:
            answer = receive(self.channel)
        except (EOFError, OSError) as error:
            raise Ended("the program ended") from error
        except (ValueError, RecursionError) as error:
            raise Ended(f"the program's answer cannot be read: {error}") from error
        if not isinstance(answer, dict):
            raise Ended("the program's answer cannot be read")
        return answer

    def _words(self, answer: dict[str, Any]) -> str:
        error = answer.get("error")
        return (
            str(error[1])[:300]
            if isinstance(error, list) and len(error) == 2
            else "the program's answer cannot be read"
        )

    def _error(self, answer: dict[str, Any]) -> Exception:
        words = self._words(answer)
        for name in answer["error"][0] if isinstance(answer["error"], list) else ():
            kind = getattr(builtins, name, None) if isinstance(name, str) else None
            if isinstance(kind, type) and issubclass(kind, Exception):
                try:
                    return kind(words)
                except TypeError:  # such as UnicodeDecodeError, which takes more
                    continue
        return RuntimeError(words)

    def _number(self, value: Any) -> list[Any]:
        if isinstance(value, Thing):
            return ["thing", value._number]
        name = getattr(value, "__name__", "")
        if isinstance(name, str) and getattr(builtins, name, None) is value:
            return ["builtin", name]
        raise Unsendable(f"a test hands over {type(value).__name__}, which cannot be sent")

    def _thing(self, tag: str, *rest: Any) -> Thing:
        if tag != "thing" or len(rest) != 2 or type(rest[0]) is not int:
            raise ValueError(f"no value is called {tag!r}")
        return Thing(self, rest[0], str(rest[1])[:100])


def change(value: Any, into: Any) -> None:
    """Makes a list, set or dict of the tests what the program made of it."""
    if isinstance(value, list | bytearray):
        value[:] = into
    elif isinstance(value, dict | set):
        value.clear()
        value.update(into)


def free_names(trees: Iterable[ast.AST]) -> set[str]:
    """Names that code reads and never binds."""
    read: set[str] = set()
    bound: set[str] = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
            elif isinstance(node, ast.arg):
                bound.add(node.arg)
            elif isinstance(node, ast.alias):
                bound.add((node.asname or node.name).partition(".")[0])
            elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler):
                bound.add(str(node.name))
    return read - bound


def wanted_names(free: set[str], defined: set[str]) -> set[str]:
    """Of free names those that are the program's. What Python has itself is so only where nothing else is asked for:
    no program may replace `set` in a test of its own function; one whose task is called `sum` is to define it."""
    own = {name for name in free if not hasattr(builtins, name)}
    return own or free & defined


class Tests:
    """What is tested, made ready before the program is heard: what fails here is a fault of the tests."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.told = told
        self.space: dict[str, Any] = {"__name__": "tests"}
        if told["kind"] == "asserts":
            exec(compile(told["setup"], "set-up", "exec"), self.space)
            self.pieces = [told["setup_after"], *told["tests"]]
            self.codes = [compile(piece, "test", "exec") for piece in self.pieces]
            self.free = free_names([ast.parse(text) for text in (told["setup"], *self.pieces)])
        elif told["kind"] == "check":
            exec(compile(told["prompt"], "prompt", "exec"), self.space)
            exec(compile(told["test"], "test", "exec"), self.space)

    def run(self, peer: Peer) -> str:
        """Says why the program fails; empty: it does not."""
        return str(getattr(self, self.told["kind"])(peer))

    def asserts(self, peer: Peer) -> str:
        for name in sorted(wanted_names(self.free, peer.names)):
            if name not in peer.names:
                return f"it defines no {name}"
            self.space[name] = peer.name(name)
        for text, code in zip(self.pieces, self.codes, strict=True):
            why, _ = tried(functools.partial(exec, code, self.space))
            if why:
                return f"{text.strip()[:200]}: {why}"
        return ""

    def check(self, peer: Peer) -> str:
        name = self.told["entry_point"]
        if name not in peer.names:
            return f"it defines no {name}"
        self.space[name] = peer.name(name)  # which the prompt began, and some tests call by its name
        return tried(functools.partial(self.space["check"], self.space[name]))[0]

    def calls(self, peer: Peer) -> str:
        name = self.told["function"]
        if "Solution" in peer.names:
            function = getattr(peer.name("Solution")(), name)
        elif name in peer.names:
            function = peer.name(name)
        else:
            return f"it defines no {name}"
        for number, case in enumerate(self.told["cases"], 1):
            why, result = tried(functools.partial(function, *case["values"]))
            if why:
                return f"case {number}: {why}"
            if not same(result, case["result"]):
                return f"case {number}: {result!r:.100} instead of {case['result']!r:.100}"
        return ""


def tried(test: Callable[[], Any]) -> tuple[str, Any]:
    """Says why a test fails, and what it returns where it does not."""
    try:
        return "", test()
    except AssertionError as error:
        return f"it does not hold {error}".strip(), None
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300], None


def same(result: Any, wanted: Any) -> bool:
    """JSON has no tuples: a tuple is as good as a list."""
    if isinstance(result, list | tuple):
        return isinstance(wanted, list) and len(result) == len(wanted) and all(map(same, result, wanted))
    return type(result) not in (set, frozenset) and not isinstance(result, Thing) and bool(result == wanted)


def main() -> None:
    out = os.dup(1)  # what tests print is no verdict
    os.dup2(2, 1)
    try:
        tests = Tests(json.loads(sys.stdin.read()))
    except BaseException as error:
        say(out, "invalid", f"{type(error).__name__}: {error}", 2)
    try:
        why = tests.run(Peer(int(sys.argv[1])))
    except Unsendable as error:
        say(out, "invalid", str(error), 2)
    except BaseException as error:
        why = str(error) if isinstance(error, Ended) else f"{type(error).__name__}: {error}"
    say(out, "wrong" if why else "correct", why, 0)


def say(out: int, outcome: str, reason: str, code: int) -> NoReturn:
    os.write(out, json.dumps([outcome, reason[:400]]).encode())
    os._exit(code)


main()
