"""The grader of code: verdicts by what a program answers, in every sandbox; nothing else makes a response correct."""

from __future__ import annotations

import ast
import functools
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from a3po_megatron.batch import Answered
from a3po_megatron.errors import RequestError
from a3po_megatron.evaluate import rows
from a3po_megatron.reward import code, grader
from a3po_megatron.reward.code import code_of, same_output
from a3po_megatron.reward.pool import GraderPool
from a3po_megatron.reward.sandbox.choose import AUTO, sandbox_of, why_not
from a3po_megatron.reward.sandbox.program import Chosen, Limits, Program
from tests.harness import interrupted_runs as tools
from tests.harness.programs import programs

LIMITS = Limits(cpu_seconds=2, wall_seconds=5.0)
DATA = os.environ.get("A3PO_TEST_DATA", "")
HOLDING = [kind for kind in AUTO if not why_not(kind)]
# How a program is asked does not depend on what stands around it: one of them always, the others in soak.
LOCAL = [pytest.param(kind, marks=() if kind == HOLDING[0] else pytest.mark.soak) for kind in HOLDING]


class _Fusion(http.server.BaseHTTPRequestHandler):
    """What sandbox-fusion answers, on loopback: it runs the code, with no protection of its own."""

    replies: list[tuple[int, Any]] = []  # noqa: RUF012  # given in this order instead of a run
    seen: list[dict[str, Any]] = []  # noqa: RUF012

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(asked)
        status, answer = self.replies.pop(0) if self.replies else (200, self._run(asked))
        text = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        self.send_response(status if self.path == "/run_code" else 404)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _run(self, asked: dict[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = {"status": "Finished", "execution_time": 0.1}
        try:
            ran = subprocess.run(
                [sys.executable, "-c", asked["code"]],
                input=asked["stdin"].encode(),
                capture_output=True,
                timeout=asked["run_timeout"],
            )
            result |= {"return_code": ran.returncode, "stdout": ran.stdout.decode(), "stderr": ran.stderr.decode()}
        except subprocess.TimeoutExpired:
            result |= {"status": "TimeLimitExceeded", "return_code": None, "stdout": "", "stderr": ""}
        good = result.get("return_code") == 0
        return {"status": "Success" if good else "Failed", "message": "", "run_result": result, "files": {}}

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Fusion) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(params=[*LOCAL, "remote"])
def chosen(request: pytest.FixtureRequest, url: str) -> Chosen:
    _Fusion.replies.clear()
    _Fusion.seen.clear()
    return Chosen(request.param, LIMITS, url=url if request.param == "remote" else "")


def graded(program: str, gold: dict[str, Any], sandbox: Chosen, **options: Any) -> tuple[str, str]:
    verdict = code.grade(f"So:\n```python\n{program}\n```\n", json.dumps(gold), sandbox=sandbox, **options)
    return verdict.outcome, verdict.reason


DOUBLE: dict[str, Any] = {
    "kind": "asserts",
    "tests": ["assert double(2) == 4", "assert double([1]) == [1, 1]", "assert double('a') == 'aa'"],
}
CHECK = {
    "kind": "check",
    "prompt": "from typing import List\n\ndef half(x):\n    return x / 2\n\n"
    "def mean(xs: List[float]) -> float:\n    ''' the mean '''\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 1.5\n    assert mean([1.0]) == half(2)\n",
    "entry_point": "mean",
}
CALLS = {
    "kind": "calls",
    "function": "add",
    "cases": [{"input": "[1, 2]\n3", "output": "[4, 5]"}, {"input": "[]\n1", "output": "[]"}],
}
STDIN = {"kind": "stdin", "cases": [{"input": "3\n1 2 3\n", "output": "6\n"}, {"input": "1\n5\n", "output": "5"}]}


@pytest.mark.parametrize(
    ("program", "gold", "outcome", "why"),
    [
        ("def double(x):\n    return x * 2", DOUBLE, "correct", ""),
        ("def double(x):\n    return x + 2", DOUBLE, "wrong", "TypeError"),
        ("def double(x):\n    return [x]", DOUBLE, "wrong", "assert double(2) == 4: it does not hold"),
        ("def twice(x):\n    return x * 2", DOUBLE, "wrong", "it defines no double"),
        ("double = (lambda x: x * 2", DOUBLE, "wrong", "SyntaxError"),
        ("1 / 0", DOUBLE, "wrong", "ZeroDivisionError"),
        ("def mean(xs: List[float]) -> float:\n    return sum(xs) * half(1) * 2 / len(xs)", CHECK, "correct", ""),
        ("def mean(xs):\n    return 1.0", CHECK, "wrong", "it does not hold"),
        ("class Solution:\n    def add(self, xs, y):\n        return tuple(x + y for x in xs)", CALLS, "correct", ""),
        ("def add(xs, y):\n    return [x + y for x in xs]", CALLS, "correct", ""),
        ("def add(xs, y):\n    return {x + y for x in xs}", CALLS, "wrong", "case 1: {4, 5} instead of [4, 5]"),
        ("input()\nprint(sum(map(int, input().split())))", STDIN, "correct", ""),
        ("import sys\nprint(float(sum(map(int, sys.stdin.read().split()[1:]))))", STDIN, "correct", ""),
        ("print(6)", STDIN, "wrong", "case 2: it writes '6'"),
        ("print(6)\nraise SystemExit(1)", STDIN, "wrong", "case 1: it ended with code 1"),
        ("while True:\n    pass", STDIN, "wrong", "case 1: it "),
    ],
)
def test_a_program_is_judged_by_its_answers(
    program: str, gold: dict[str, Any], outcome: str, why: str, chosen: Chosen
) -> None:
    verdict = graded(program, gold, chosen)
    assert verdict[0] == outcome and why in verdict[1], verdict


FORGED = {name: source for name, (source, _) in programs("forging_programs.txt").items()}
QUICK = Limits(cpu_seconds=1, wall_seconds=2.0)


@pytest.mark.parametrize("name", FORGED)
def test_no_trick_makes_a_program_pass(name: str, chosen: Chosen) -> None:
    """Each would pass where tests run in the program's own process and its exit, its output or its objects are
    believed. Nor is one invalid: that would spare a response its wrong answer."""
    outcome, why = graded(FORGED[name], DOUBLE, replace(chosen, limits=QUICK))
    assert outcome == "wrong" and why


def test_a_builtin_is_the_program_s_own_only_where_its_task_is_called_so(chosen: Chosen) -> None:
    shadow = {"kind": "asserts", "tests": ["assert set(double(2)) == set([4, 4])"]}
    forged = "def set(x):\n    return 1\ndef double(x):\n    return [0]"
    assert graded(forged, shadow, chosen)[0] == "wrong"
    named = {"kind": "asserts", "tests": ["assert sum(10, 15) == 6"]}
    assert graded("def sum(a, b):\n    return 6", named, chosen) == ("correct", "")
    assert graded("x = 1", named, chosen)[0] == "wrong"


def test_tests_use_what_the_program_defines(chosen: Chosen) -> None:
    """Classes, their objects, generators, errors, and lists that a call changes."""
    program = """
class Node:
    def __init__(self, value):
        self.value, self.left = value, None
def depth(node):
    return 0 if node is None else 1 + depth(node.left)
def clear(xs, seen):
    xs.sort()
    seen['n'] = len(xs)
def count(n):
    yield from range(n)
def strict(x):
    if x < 0:
        raise ValueError('negative')
    return {1: (x, {2.5}), 'b': b'x', None: frozenset([3])}
"""
    tests = [
        "root = Node(1)\nroot.left = Node(2)\nassert depth(root) == 2 and root.left.value == 2 and root != Node(1)",
        "xs, seen = [3, 1, 2], {}\nclear(xs, seen)\nassert xs == [1, 2, 3] and seen == {'n': 3}",
        "assert list(count(3)) == [0, 1, 2] and sum(count(4)) == 6",
        "assert strict(2) == {1: (2, {2.5}), 'b': b'x', None: frozenset([3])}",
        "try:\n    strict(-1)\n    assert False\nexcept ValueError as error:\n    assert 'negative' in str(error)",
        "assert isinstance(strict(1), dict) and type(strict(1)[1]) is tuple and list(map(depth, [None])) == [0]",
    ]
    assert graded(program, {"kind": "asserts", "tests": tests}, chosen) == ("correct", "")
    for number, test in enumerate(tests):
        wrong = test.replace("== 2 and", "== 3 and").replace("[1, 2, 3]", "[3, 1, 2]").replace("== 6", "== 7")
        wrong = wrong.replace("{2.5}", "[2.5]").replace("'negative' in", "'positive' in").replace("[0]", "[1]", 1)
        assert wrong != test
        outcome, why = graded(program, {"kind": "asserts", "tests": [wrong]}, chosen)
        assert outcome == "wrong" and "does not hold" in why, (number, why)


HONEST = {
    "its own exception": (
        "class E(ValueError): pass\ndef f(x):\n    raise E('no')",
        "try:\n    f(1)\n    assert False\nexcept E as error:\n    assert 'no' in str(error)",
    ),
    "its own classes": (
        "class A: pass\nclass B(A): pass\ndef f(x): return B()",
        "assert isinstance(f(1), A) and issubclass(B, A) and not isinstance(3, A)",
    ),
    "operators": (
        "class V:\n    def __init__(self, x): self.x = x\n    def __add__(self, o): return V(self.x + o.x)\n"
        "    def __radd__(self, o): return V(o + self.x)\n    def __le__(self, o): return self.x <= o.x\n"
        "    def __neg__(self): return V(-self.x)\n    def __int__(self): return self.x",
        "v = V(1) + V(2)\nassert v.x == 3 and (1 + v).x == 4 and V(1) <= v and int(-v) == -3",
    ),
    "a text that is more": (
        "import enum\nclass C(str, enum.Enum):\n    RED = 'red'\ndef f(x): return [C.RED, True]",
        "assert f(1) == ['red', True]",
    ),
    "named tuples": (
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(x): return P(1, x)",
        "assert f(2).y == 2 and f(2) == (1, 2)",
    ),
    "counters, queues, days": (
        "import collections, datetime\ndef f(x): return collections.Counter(x), collections.deque([1], 3), "
        "datetime.date(2024, 2, 29), datetime.timedelta(1)",
        "import collections, datetime\nc, d, day, one = f('aab')\nassert c.most_common(1) == [('a', 2)] and d == "
        "collections.deque([1]) and day + one == datetime.date(2024, 3, 1)",
    ),
    "names of arguments": ("def f(do, thing, self): return do - thing + self", "assert f(do=3, thing=2, self=1) == 2"),
    "changes by name, and before an error": (
        "def f(xs, ys):\n    xs.append(1)\n    ys.append(2)\n    raise KeyError",
        "a, b = [], []\ntry:\n    f(a, ys=b)\nexcept KeyError:\n    pass\nassert a == [1] and b == [2]",
    ),
    "attributes of any name": (
        "class A:\n    def __init__(self): self._peer, self._number, self._kind = 1, 2, 3\ndef f(x): return A()",
        "a = f(1)\nassert (a._peer, a._number, a._kind) == (1, 2, 3)",
    ),
    "slices of its own": (
        "class S:\n    def __getitem__(self, key): return list(range(10))[key]\ndef f(x): return S()",
        "assert f(1)[2:4] == [2, 3] and f(1)[::-5] == [9, 4]",
    ),
    "a long generator": ("def f(n): yield from range(n)", "assert sum(f(100_000)) == 4999950000"),
    "a generator that breaks": (
        "def f(n):\n    yield 1\n    raise ValueError('broken')",
        "seen = []\ntry:\n    for x in f(1): seen.append(x)\nexcept ValueError:\n    seen.append(2)\n"
        "assert seen == [1, 2]",
    ),
    "a linked list": (
        "def f(n):\n    x = None\n    for i in range(n): x = (i, x)\n    return x",
        "x, n = f(1500), 0\nwhile x: x, n = x[1], n + 1\nassert n == 1500",
    ),
    "the future": ("from __future__ import annotations\ndef f(x: Unknown) -> Other: return x", "assert f(1) == 1"),
    "asyncio": (
        "import asyncio\nasync def g(x):\n    await asyncio.sleep(0)\n    return x\ndef f(x): return asyncio.run(g(x))",
        "assert f(3) == 3",
    ),
    "a module that tests use": ("import math\ndef f(x): return math.sqrt(x)", "assert math.isclose(f(4), 2)"),
}


@pytest.mark.parametrize("kind", LOCAL)
@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_are_tested_as_in_one_process(name: str, kind: str) -> None:
    program, test = HONEST[name]
    assert graded(program, {"kind": "asserts", "tests": [test]}, Chosen(kind)) == ("correct", "")


def test_what_a_problem_takes_for_granted_is_there(chosen: Chosen) -> None:
    program = "class Solution:\n    def add(self, xs: List[int], y: int):\n        return [x + gcd(y, y) for x in xs]"
    assert graded(program, CALLS, chosen) == ("correct", "")
    future = "from __future__ import annotations\ndef mean(xs: Unknown):\n    return sum(xs) * half(1) * 2 / len(xs)"
    assert graded(future, CHECK, chosen) == ("correct", "")
    nested = {
        "kind": "calls",
        "function": "f",
        "cases": [{"input": "1", "output": '{"1": [1, {"a": null}], "b": 1.5}'}],
    }
    assert graded("def f(x): return {1: (1, {'a': None}), 'b': 1.5}", nested, chosen) == ("correct", "")
    assert graded("def f(x): return {1: (1, {'a': 0}), 'b': 1.5}", nested, chosen)[0] == "wrong"


def test_no_program_has_its_tests_fail_by_themselves(chosen: Chosen) -> None:
    """By what they then do with what it returns."""
    program = "class T:\n    def __getattr__(self, name): return T()\n    def __call__(self, *a, **k): return T()\n"
    program += "def f(x): return T()"
    for test in ("r = f(1)\nr.sort(key=lambda x: x)\nassert r == [1]", "class E: pass\nassert E() not in f(1)"):
        assert graded(program, {"kind": "asserts", "tests": [test]}, chosen)[0] == "wrong"


def test_no_program_replaces_what_its_tests_use_besides(chosen: Chosen) -> None:
    sized = {"kind": "asserts", "tests": ["assert size((1, 2)) == sys.getsizeof((1, 2))"]}  # as mbpp/596
    assert graded("class sys: getsizeof = lambda x: 0\ndef size(x): return 0", sized, chosen)[0] == "wrong"
    assert graded("import sys\ndef size(x): return sys.getsizeof(x)", sized, chosen) == ("correct", "")
    own = {
        "kind": "check",
        "prompt": "",
        "test": "def check(candidate):\n    assert candidate(1) == 2",
        "entry_point": "check",
    }
    assert graded("def check(x): return None", own, chosen)[0] == "wrong"
    assert graded("def check(x): return 2", own, chosen) == ("correct", "")


def test_a_long_response_of_fences_is_read_at_once() -> None:
    begin = time.monotonic()
    assert code_of("```python\nx=1\n" * 50_000)[1] == "no ```python block"
    assert time.monotonic() - begin < 20  # a second; what grows with the square would take an hour


def test_a_failure_of_the_tests_is_invalid(chosen: Chosen) -> None:
    broken = [
        {"kind": "asserts", "tests": ["assert double(1) == 2"], "setup": "import nothing_of_that_name"},
        {"kind": "check", "test": "def check(f):\n  assert f(", "entry_point": "f", "prompt": ""},
        {"kind": "asserts", "tests": ["assert double(open) == 2", "class A: pass\nassert double(A()) == 2"]},
    ]
    for gold in broken:
        outcome, why = graded("def double(x):\n    return 2\nf = double", gold, chosen)
        assert outcome == "invalid" and "the tests fail by themselves" in why, why


@pytest.mark.parametrize(
    ("gold", "why"),
    [
        ("print(1)", "is JSON"),
        ('{"kind": "other"}', "not 'other'"),
        ("[1]", "not None"),
        ('{"kind": "asserts", "tests": []}', "no list of asserts"),
        ('{"kind": "asserts", "tests": ["assert ("]}', "no Python"),
        ('{"kind": "check", "test": "x"}', "needs test and entry_point"),
        ('{"kind": "stdin", "cases": []}', "no list of {input, output}"),
        ('{"kind": "stdin", "cases": [{"input": "1"}]}', "no list of {input, output}"),
        ('{"kind": "calls", "function": "a b", "cases": [{"input": "1", "output": "1"}]}', "names none"),
        ('{"kind": "calls", "function": "f", "cases": [{"input": "x", "output": "1"}]}', "no JSON"),
    ],
)
def test_a_gold_answer_that_is_none_is_named(gold: str, why: str) -> None:
    assert why in grader.why_unreadable("code", gold)
    verdict = code.grade("```python\nx\n```", gold, sandbox=Chosen())
    assert verdict.outcome == "invalid" and why in verdict.reason


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("```python\na\n```", "a\n"),
        ("```\na\n```\nor\n```py\nb\n```", "b\n"),
        ("```python\ndef f(): pass\n```\nFor example:\n```python\nprint(g)\n```", "def f(): pass\n"),
        ("```bash\nls\n```\n~~~Python\na\n~~~", "a\n"),
        ("<think>```python\nx\n```</think>```python\na\n```", "a\n"),
        ("  ```python\n  a\n  ```", "  a\n"),
        ("````python\n```\na\n````", "```\na\n"),
        ("```python {.numbered}\na\n```", "a\n"),
        ("```python\nclass Solution:\n  def f(): pass\n```\n```\n6\n```", "class Solution:\n  def f(): pass\n"),
        ("```python\nf = 1\n```\n```python\nassert f(1)\n```", "f = 1\n"),
        ("a", ""),
        ("```python\na", ""),
        ("<think>```python\na\n```", ""),
        ("```java\na\n```", ""),
    ],
)
def test_the_program_of_a_response(response: str, found: str) -> None:
    source, why = code_of(response, ["f"])
    assert source == found and bool(why) == (not found)


def test_a_response_that_was_cut_off_is_wrong() -> None:
    assert graded("def double(x):\n    return x * 2", DOUBLE, Chosen(), finished=False)[0] == "wrong"


@pytest.mark.parametrize(
    ("written", "wanted", "same"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        (" 1 2 \n\n", "1 2", True),
        ("1.0 2", "1 2.00", True),
        ("0.1", "0.10000000000000001", False),
        ("1\n2", "1 2", False),
        ("YES", "yes", False),
        ("", "", True),
        ("", "1", False),
        ("a  b", "a b", False),
        ("1e400", "1e400", True),
        ("nan", "nan", True),
        ("nan", "NaN", False),
        ("sNaN", "6", False),
        ("sNaN", "nan", False),
    ],
)
def test_outputs_are_compared_line_by_line(written: str, wanted: str, same: bool) -> None:
    assert same_output(written, wanted) is same


def test_a_server_that_fails_is_asked_again_and_then_invalid(url: str) -> None:
    chosen = Chosen("remote", LIMITS, url=url + "/", retries=1)
    busy = [(503, "busy"), (429, "slow down")]
    _Fusion.replies[:] = busy[:1]
    assert graded("print(6)", STDIN, chosen)[0] == "wrong"
    for replies in (
        busy,
        [(200, "no JSON"), (200, [1])],
        [(400, "bad")],
        [(200, {"status": "SandboxError", "message": "no pods", "run_result": None})],
    ):
        _Fusion.replies[:] = replies
        outcome, why = graded("print(6)", STDIN, chosen)
        assert outcome == "invalid" and "the sandbox at" in why and not _Fusion.replies
    nobody = Chosen("remote", LIMITS, url="http://127.0.0.1:9", retries=0)
    assert graded("print(6)", STDIN, nobody)[0] == "invalid"


def test_a_pool_waits_longer_than_a_server_may_be_silent(tmp_path: Path) -> None:
    """What takes longer than the pool allows is wrong, and a server's silence is no program's fault."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"problem": "double", "answer": json.dumps(DOUBLE)}) + "\n")
    asked = [f"data.path={tmp_path}/rows.jsonl", "data.grader=code", "grader_pool.timeout_seconds=60"]
    asked += ["sandbox.name=remote", "sandbox.url=http://127.0.0.1:9"]
    ended = tools.launched_here(tmp_path / "run", *tools.LAYOUTS["dp2"], *asked)
    assert ended.code == 2 and "a program may run for 151.5 s (sandbox.wall_seconds, the way" in ended.err, ended.all


def test_what_a_server_is_asked(url: str) -> None:
    _Fusion.replies.clear()
    _Fusion.seen.clear()
    sandbox_of(Chosen("remote", LIMITS, url=url)).run(Program("print(input())", b"in"))
    assert _Fusion.seen == [{"code": "print(input())", "language": "python", "stdin": "in", "run_timeout": 5.0}]


@pytest.mark.skipif(all(map(why_not, AUTO)), reason="no sandbox holds here")
def test_a_pool_goes_on_after_hostile_programs() -> None:
    """By the same process: none of them was killed with its sandbox."""
    grade = functools.partial(grader.grade, grader="code", sandbox=Chosen(limits=Limits(1, 2.0)))
    hostile = ["import os\nos.kill(os.getppid(), 9)", "import os\nos.kill(-1, 9)", "while True:\n    pass"]
    hostile += ["x = [bytearray(1 << 28) for _ in range(99)]", "import time\ntime.sleep(99)"]
    items = [Answered(f"```python\n{program}\n```", json.dumps(DOUBLE)) for program in hostile]
    good = Answered("```python\ndef double(x):\n    return x * 2\n```", json.dumps(DOUBLE))
    with GraderPool(grade, 1, 30.0, 2 << 30) as pool:
        assert pool.grade_all([good])[0].outcome == "correct"
        pids = [worker.process.pid for worker in pool._workers]
        assert [verdict.outcome for verdict in pool.grade_all([*items, good])] == ["wrong"] * 5 + ["correct"]
        assert [worker.process.pid for worker in pool._workers] == pids


@pytest.mark.parametrize("kind", LOCAL)
def test_a_grader_that_is_killed_leaves_nothing_behind(kind: str) -> None:
    """Its time is over before the program's."""
    grade = functools.partial(grader.grade, grader="code", sandbox=Chosen(kind, Limits(60, 60.0)))
    program = "import time\nopen('left', 'w').write('x' * 100)\ntime.sleep(50)"
    with GraderPool(grade, 1, 2.0, 2 << 30) as pool:
        pool.start()
        folder = Path(pool._workers[0].folder)
        verdict = pool.grade_all([Answered(f"```python\n{program}\n```", json.dumps(DOUBLE))])[0]
        assert verdict.outcome == "wrong" and "to grade" in verdict.reason
        assert not folder.exists()


def mutated(source: str) -> Iterator[str]:
    """The program with something else in whatever its functions return, if they do."""
    tree = ast.parse(source)
    returns = [node for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value is not None]
    for node in returns:
        node.value = ast.Tuple([node.value, ast.Constant("mutated")], ast.Load())
    if returns:
        yield ast.unparse(ast.fix_missing_locations(tree))


@pytest.mark.skipif(not DATA, reason="A3PO_TEST_DATA is not set")
@pytest.mark.parametrize("kind", LOCAL)
def test_solutions_pass_and_mutated_ones_do_not(kind: str) -> None:
    """Every 60th problem of HumanEval and MBPP; all of them in soak."""
    passed, caught = solutions_and_mutants(kind, 60)
    assert passed == 12 and caught > 8


@pytest.mark.soak
@pytest.mark.skipif(not DATA, reason="A3PO_TEST_DATA is not set")
def test_all_solutions_pass_and_mutated_ones_do_not(chosen: Chosen) -> None:
    passed, caught = solutions_and_mutants(chosen, 1)
    assert passed == 164 + 500 and caught > 600


def solutions_and_mutants(sandbox: Chosen | str, every: int) -> tuple[int, int]:
    """Returns how many solutions passed and how many mutants did not. Fails where it is otherwise."""
    chosen = Chosen(sandbox) if isinstance(sandbox, str) else replace(sandbox, limits=Limits())  # mbpp/123 takes 5 s
    passed, caught, problems = 0, 0, list(benchmarks())[::every]
    for name, source, gold in problems:
        verdict = code.grade(f"```python\n{source}\n```", gold, sandbox=chosen)
        assert verdict.outcome == "correct", (name, verdict)
        passed += 1
        for mutant in mutated(source):
            verdict = code.grade(f"```python\n{mutant}\n```", gold, sandbox=chosen)
            assert verdict.outcome == "wrong", (name, mutant, verdict)
            caught += 1
    assert passed == len(problems)
    return passed, caught


def benchmarks() -> Iterator[tuple[str, str, str]]:
    """(name, canonical solution, gold answer) of each problem."""
    for line in Path(DATA, "humaneval.jsonl").read_text().splitlines():
        row = json.loads(line)
        item = rows.check_function(row, ("prompt", "test", "entry_point"), rows.About(row["task_id"], 0, ""))
        yield row["task_id"], row["prompt"] + row["canonical_solution"], str(item.gold)
    for line in Path(DATA, "mbpp.jsonl").read_text().splitlines():
        row = json.loads(line)
        item = rows.asserts(row, ("prompt", "tests"), rows.About(row["id"], 0, ""))
        if item is not None:  # of its test split
            yield row["id"], row["reference_code"], str(item.gold)


def test_code_without_a_sandbox_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from a3po_megatron.reward.sandbox import choose

    monkeypatch.setattr(choose, "why_not", lambda kind: "not here")
    sandbox_of.cache_clear()
    outcome, why = graded("print(6)", STDIN, Chosen())
    assert outcome == "invalid" and "no sandbox holds here" in why
    with pytest.raises(RequestError, match="sandbox.name = landlock"):
        choose.check_sandbox(Chosen("landlock"))
    sandbox_of.cache_clear()
