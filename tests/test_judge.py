"""The grader that asks a model, against an endpoint on this machine that answers as it is told."""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from a3po_megatron.batch import Answered, Verdict
from a3po_megatron.config import RewardOptions
from a3po_megatron.reward.grader import GRADERS, grade
from a3po_megatron.reward.pool import GraderPool
from tests.harness import interrupted_runs as tools


class Endpoint:
    """Answers each question with the next of `script`: a text, a status, or seconds to wait; the last one stays."""

    def __init__(self) -> None:
        self.script: list[str | int | float] = ["Verdict: correct"]
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.under_way = self.most = 0
        self._lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint._lock:
                    endpoint.asked.append(body | {"path": self.path})
                    endpoint.keys.append(self.headers.get("Authorization"))
                    told = endpoint.script.pop(0) if len(endpoint.script) > 1 else endpoint.script[0]
                    endpoint.under_way += 1
                    endpoint.most = max(endpoint.most, endpoint.under_way)
                if isinstance(told, float):
                    time.sleep(told)
                status = told if isinstance(told, int) else 200
                reply = {
                    "choices": [{"message": {"role": "assistant", "content": told if isinstance(told, str) else ""}}]
                }
                content = b"{}" if told == "no completion" else json.dumps(reply).encode()
                with endpoint._lock:
                    endpoint.under_way -= 1
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:  # who asked has gone
                    pass

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        often = 0.02  # seconds after which it looks for its end again
        threading.Thread(target=self.server.serve_forever, args=(often,), daemon=True).start()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("a3po_megatron.reward.endpoint.BACKOFF_SECONDS", 0.01)
    made = Endpoint()
    yield made
    made.server.shutdown()
    made.server.server_close()


def options(endpoint: Endpoint, **changes: Any) -> dict[str, Any]:
    whole = RewardOptions(judge_url=endpoint.url, judge_model="m", judge_retries=2, judge_timeout_seconds=0.5)
    return {name: getattr(whole, name) for name in GRADERS["judge"].options} | changes


def asks(endpoint: Endpoint, response: str = "a dog", finished: bool = True, **changes: Any) -> Verdict:
    named = options(endpoint, **changes)
    return grade(response, "a hound", grader="judge", problem="What barks?", finished=finished, **named)


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        ("It is the same.\nVerdict: correct", "correct"),
        ("**Verdict: Correct**", "correct"),
        ("VERDICT - WRONG", "wrong"),
        ("Verdict: incorrect", "wrong"),
        ("Verdict: correct\nNo: it is a cat.\nVerdict: wrong", "wrong"),
        ("The answer says `Verdict: correct`, and that is no reference.\nVerdict: wrong", "wrong"),
    ],
)
def test_the_last_verdict_of_the_reply_counts(reply: str, outcome: str, endpoint: Endpoint) -> None:
    endpoint.script = [reply]
    assert asks(endpoint).outcome == outcome
    (asked,) = endpoint.asked
    assert asked["path"] == "/v1/chat/completions"
    assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("m", 0.0, 512)
    question = asked["messages"][-1]["content"]
    assert all(text in question for text in ("What barks?", "a hound", "a dog"))
    assert endpoint.keys == [None]


@pytest.mark.parametrize(
    ("script", "verdict", "questions"),
    [
        ([503, 429, "Verdict: correct"], "correct", 3),
        ([0.9, "Verdict: correct"], "correct", 2),  # later than judge_timeout_seconds
        (["I cannot say.", "Verdict: wrong"], "wrong", 2),
        (["I cannot say."], "wrong", 3),  # stays unreadable
        (["no completion"], "invalid", 3),
        ([500], "invalid", 3),
        ([0.9], "invalid", 3),
        ([401], "invalid", 1),  # asking again would not help
        ([500, "I cannot say.", "I cannot say."], "wrong", 3),
    ],
)
def test_it_is_asked_again_so_often_and_what_no_response_can_cause_is_invalid(
    script: list[str | int | float], verdict: str, questions: int, endpoint: Endpoint
) -> None:
    endpoint.script = script
    found = asks(endpoint)
    assert (found.outcome, len(endpoint.asked)) == (verdict, questions), found
    assert bool(found.reason) is (verdict != "correct")


def test_nobody_at_the_endpoint_is_invalid_and_a_response_that_was_cut_off_is_not_asked_about(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = asks(endpoint, judge_url="http://127.0.0.1:9/v1", judge_retries=1)
    assert found.outcome == "invalid" and "did not answer" in found.reason
    assert asks(endpoint, finished=False) == Verdict("wrong", "the response was cut off")
    assert endpoint.asked == []
    monkeypatch.setenv("JUDGE_KEY", "secret")
    assert asks(endpoint, "a {dog}", judge_key_variable="JUDGE_KEY").outcome == "correct"
    assert "a {dog}" in endpoint.asked[0]["messages"][0]["content"]
    assert endpoint.keys == ["Bearer secret"]


def test_a_pool_has_as_many_questions_under_way_as_it_has_workers(endpoint: Endpoint) -> None:
    endpoint.script = [0.2, "Verdict: correct"]  # the first one is slow and empty, and asked again
    own = functools.partial(grade, **options(endpoint, judge_timeout_seconds=5.0))
    items = [Answered(f"dog {n}", "hound", grader="judge", problem="What barks?") for n in range(12)]
    with GraderPool(own, 2, 30.0, 2 << 30) as pool:
        assert pool.grade_all([*items, Answered(r"\\boxed{1}", "1")]) == [Verdict("correct")] * 13
    assert len(endpoint.asked) == 12 + 1
    assert endpoint.most <= 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["data.grader=judge"], "needs reward.judge_url and judge_model"),
        (["reward.judge_url={url}"], "has no effect: no row has the grader `judge`"),
        (["reward.judge_model=m"], "reward.judge_url is empty"),
        (["data.grader=judge", "reward.judge_url={url}", "reward.judge_model=m"], "but a judge may take 181.5 s"),
        (
            ["data.grader=judge", "reward.judge_url={url}", "reward.judge_model=m", "reward.judge_key_variable=NO_KEY"],
            "the variable NO_KEY is not set",
        ),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused_before_the_run_starts(
    changes: list[str], says: str, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    asked = [f"data.path={tmp_path}/rows.jsonl", *(each.format(url="http://127.0.0.1:9/v1") for each in changes)]
    ended = tools.launched_here(tmp_path / "run", *tools.LAYOUTS["dp2"], *asked)
    assert ended.code == 2 and says in ended.err, ended.all
