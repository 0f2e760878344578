"""Tests, in a sandbox of their own: they call the program that is tested in another one, and compare here.

    stdin      JSON of what is tested (reward/code.py): asserts, a check, or calls
    argument   the descriptor of a socket to the program (answering.py)
    stdout     JSON [outcome, reason], with exit code 0; with code 2 what is wrong with the tests themselves

So no program can pass by ending early, by what it prints, or by what it does to the interpreter: it is correct where
all tests have run to their ends, and nowhere else. A value that is not plain is a `Thing`: it stays with the program,
and equals no plain value, whatever its own `__eq__` says.
"""

import ast
import builtins
import functools
import importlib
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

    def __init__(self, peer: "Peer", number: int, kind: str, direct: bool) -> None:
        self.__dict__.update(_Thing__peer=peer, _Thing__number=number, _Thing__kind=kind, _Thing__direct=direct)

    def __ask(self, do: str, /, *values: Any, **named: Any) -> Any:
        return self.__peer.ask(do, (self, *values), named, self.__direct)

    def __call__(self, /, *values: Any, **named: Any) -> Any:
        try:
            return self.__ask("call", *values, **named)
        except StopIteration as error:  # which would end a loop of the tests
            raise RuntimeError(f"StopIteration {error}") from error

    def __getattr__(self, name: str) -> Any:
        return self.__ask("attribute", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__ask("set", name, value)

    def __iter__(self) -> Iterator[Any]:
        iterator, more = self.__ask("iter"), True
        if not isinstance(iterator, Thing):
            raise TypeError(f"{self.__kind} is not iterable")
        while more:
            taken, more = iterator.__ask("take")
            yield from taken

    def __reversed__(self) -> Iterator[Any]:
        return iter(self.__ask("reversed"))

    def __len__(self) -> int:
        return int(self.__ask("len"))

    def __bool__(self) -> bool:
        return bool(self.__ask("bool"))

    def __str__(self) -> str:
        return str(self.__ask("str"))

    def __repr__(self) -> str:
        return str(self.__ask("repr"))

    def __format__(self, form: str) -> str:
        return str(self.__ask("format", form))

    def __hash__(self) -> int:
        return hash((self.__number,))

    def __contains__(self, key: Any) -> bool:
        return bool(self.__ask("has", key))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Thing) and (self.__number == other.__number or self.__ask("equal", other) is True)

    def __instancecheck__(self, value: Any) -> bool:
        return bool(self.__ask("isinstance", value))

    def __subclasscheck__(self, value: Any) -> bool:
        return bool(self.__ask("issubclass", value))

    def __enter__(self) -> Any:
        return self.__ask("attribute", "__enter__")()

    def __exit__(self, *_: Any) -> None:
        self.__ask("attribute", "__exit__")(None, None, None)

    @staticmethod
    def number_of(thing: "Thing") -> int:
        return int(thing.__number)

    @classmethod
    def forward(cls, name: str, do: str, turned: bool = False) -> None:
        """Has the program do what an operator does; `turned`: with the thing on its right side."""

        def method(self: "Thing", /, *values: Any) -> Any:
            return self.__peer.ask(do, (*values, self) if turned else (self, *values), {}, self.__direct)

        setattr(cls, name, method)


for name in ("next", "int", "float", "index", "abs", "neg", "pos", "invert", "lt", "le", "gt", "ge"):
    Thing.forward(f"__{name}__", name)
for name, do in (("getitem", "item"), ("setitem", "put"), ("delitem", "remove")):
    Thing.forward(f"__{name}__", do)
for name in (
    "add",
    "sub",
    "mul",
    "matmul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and_",
    "or_",
    "xor",
    "lshift",
    "rshift",
):
    Thing.forward(f"__{name.rstrip('_')}__", name)
    Thing.forward(f"__r{name.rstrip('_')}__", name, turned=True)


class Peer:
    def __init__(self, channel: int) -> None:
        self.channel = channel
        self.exceptions: dict[int, type[Exception]] = {}  # the program's own, as the tests can catch them
        said = self._receive()
        if not isinstance(said.get("names"), list):
            raise Ended(self._words(said))
        self.names = set(said["names"])

    def name(self, name: str) -> Any:
        return self._value({"do": "name", "name": name}, {}, True)

    def ask(self, do: str, values: tuple[Any, ...], named: dict[str, Any], direct: bool) -> Any:
        """`direct`: of what the tests asked for by name. What they hand over to anything else the program may have made
        them hand over."""
        try:
            coded = [encode(value, self._number) for value in values]
            coded_by_name = {name: encode(value, self._number) for name, value in named.items()}
        except Unsendable as error:
            if direct:
                raise
            raise TypeError(str(error)) from error
        arguments: dict[Any, Any] = dict([*enumerate(values), *named.items()])
        return self._value({"do": do, "values": coded, "named": coded_by_name}, arguments, False)

    def _value(self, message: dict[str, Any], arguments: dict[Any, Any], direct: bool) -> Any:
        try:
            send(self.channel, message)
        except OSError as error:
            raise Ended("the program ended") from error
        answer = self._receive()
        thing = functools.partial(self._thing, direct)
        try:
            for place, coded in answer.get("changed", ()):
                change(arguments[place], decode(coded, thing))
            if "error" not in answer:
                return decode(answer["value"], thing)
            raised = self._error(answer["error"])
        except Exception as error:
            raise Ended(f"the program's answer cannot be read: {error}") from error
        raise raised

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
        return str(error[1])[:300] if isinstance(error, list) and len(error) == 3 else "the program's answer is none"

    def _error(self, told: list[Any]) -> Exception:
        kinds, words, own = told
        if own is not None:
            return self._exception(*own[1:])(str(words)[:300])
        return builtin_error(kinds)(str(words)[:300])

    def _exception(self, number: int, name: str, kinds: list[str]) -> type[Exception]:
        if number not in self.exceptions:
            self.exceptions[number] = type(str(name), (builtin_error(kinds),), {"__init__": Exception.__init__})
        return self.exceptions[number]

    def _number(self, value: Any) -> list[Any]:
        if isinstance(value, Thing):
            return ["thing", Thing.number_of(value)]
        for number, exception in self.exceptions.items():
            if value is exception:
                return ["thing", number]
        name = getattr(value, "__name__", "")
        if isinstance(name, str) and getattr(builtins, name, None) is value:
            return ["builtin", name]
        raise Unsendable(f"a test hands over {type(value).__name__}, which cannot be sent")

    def _thing(self, direct: bool, tag: str, *rest: Any) -> Any:
        if tag == "exception":
            return self._exception(*rest)
        if tag != "thing" or len(rest) != 2 or type(rest[0]) is not int:
            raise ValueError(f"no value is called {tag!r}")
        return Thing(self, rest[0], str(rest[1])[:100], direct)


def builtin_error(names: list[str]) -> type[Exception]:
    """The first of Python's own exceptions that takes a text, by the names of an exception's ancestors."""
    for name in names:
        kind = getattr(builtins, name, None) if isinstance(name, str) else None
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                kind("")
            except TypeError:  # such as UnicodeDecodeError, which takes more
                continue
            return kind
    return RuntimeError


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


def first_called(trees: Iterable[ast.AST], names: set[str]) -> set[str]:
    """The first of these names that code calls, as people read it."""
    calls = [
        (number, node.lineno, node.col_offset, node.func.id)
        for number, tree in enumerate(trees)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    ]
    return {min(calls)[-1]} if calls else set()


class Tests:
    """What is tested, made ready before the program is heard: what fails here is a fault of the tests."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.told = told
        self.space: dict[str, Any] = {"__name__": "tests"}
        if told["kind"] == "asserts":
            exec(compile(told["setup"], "set-up", "exec"), self.space)
            self.pieces = [told["setup_after"], *told["tests"]]
            self.codes = [compile(piece, "test", "exec") for piece in self.pieces]
            self.trees = [ast.parse(text) for text in (told["setup"], *self.pieces)]
        elif told["kind"] == "check":
            exec(compile(told["prompt"], "prompt", "exec"), self.space)
            exec(compile(told["test"], "test", "exec"), self.space)

    def run(self, peer: Peer) -> str:
        """Says why the program fails; empty: it does not."""
        return str(getattr(self, self.told["kind"])(peer))

    def wanted(self, defined: set[str]) -> set[str]:
        """The names that are the program's, of those that the tests use and do not define. Python's modules and what it
        has itself are not: no program may replace `set` or `math` in a test of its own function. But one whose task is
        called `sum` is to define it."""
        free = free_names(self.trees)
        names = {name for name in free if not hasattr(builtins, name)}
        modules = names & sys.stdlib_module_names
        if names - modules:
            self.space |= {name: importlib.import_module(name) for name in modules}
            return names - modules
        return names or first_called(self.trees[1:], free & defined)

    def asserts(self, peer: Peer) -> str:
        for name in sorted(self.wanted(peer.names)):
            if name not in peer.names:
                return f"it defines no {name}"
            self.space[name] = peer.name(name)
        for text, code in zip(self.pieces, self.codes, strict=True):
            why, _ = tried(functools.partial(exec, code, self.space))
            if why:
                return f"{text.strip()[:200]}: {why}"
        return ""

    def check(self, peer: Peer) -> str:
        name, check = self.told["entry_point"], self.space["check"]
        if name not in peer.names:
            return f"it defines no {name}"
        program = peer.name(name)
        if name != "check":
            self.space[name] = program  # which the prompt began, and some tests call by its name
        return tried(functools.partial(check, program))[0]

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
    """As JSON has values: a tuple is as good as a list, a number as a key as its text."""
    if isinstance(result, list | tuple):
        return isinstance(wanted, list) and len(result) == len(wanted) and all(map(same, result, wanted))
    if isinstance(result, dict):
        named = {key if isinstance(key, str) else json.dumps(key): value for key, value in result.items()}
        return (
            isinstance(wanted, dict) and named.keys() == wanted.keys() and all(same(named[k], wanted[k]) for k in named)
        )
    if isinstance(result, float) and result != result:
        return isinstance(wanted, float) and wanted != wanted
    return type(result) in (bool, int, float, str, type(None)) and bool(result == wanted)


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
    except Ended as error:
        say(out, "wrong", str(error) or "the program's answer is none", 0)
    except BaseException as error:
        say(out, "wrong", f"{type(error).__name__}: {error}", 0)
    say(out, "wrong" if why else "correct", why, 0)


def say(out: int, outcome: str, reason: str, code: int) -> NoReturn:
    os.write(out, json.dumps([outcome, reason[:400]]).encode())
    os._exit(code)


main()
