"""Hostile tool servers: whatever one does costs its own call; the reply goes on, and other servers notice nothing.

Order: at the start, in a call, over HTTP and in the answers, streams beside it.
"""

import json
import re
import sys
from contextlib import closing
from pathlib import Path

import pytest

from conftest import Liminal, free_ports, status, text, with_provider
from provider import Provider, openai_stream
from tool_servers import call, calling, configure, gone, offered, results, servers, serving_http, stdio

both = pytest.mark.parametrize("kind", ["anthropic", "openai"])
slow = pytest.mark.slow
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
GOOD = stdio("friendly")


@pytest.fixture(scope="module")
def faulty_liminal(tmp_path_factory):
    with closing(Provider()) as provider:
        data = tmp_path_factory.mktemp("faults") / "data"
        with closing(Liminal(data, provider, **with_provider(provider, {}))) as liminal:
            configure(liminal, {"good": GOOD})
            yield liminal.start()


@pytest.fixture
def faulty(faulty_liminal):
    """One good server, which must be the same process at the end; `bad` is added by each test."""
    faulty_liminal.provider.reset()
    configure(faulty_liminal, {"good": GOOD})
    before = call(faulty_liminal, "good__pid")["text"]
    faulty_liminal.provider.reset()
    yield faulty_liminal
    assert call(faulty_liminal, "good__pid")["text"] == before, "another server was touched"
    faulty_liminal.check_logs()


def add(liminal: Liminal, mode: str, *args, **more):
    configure(liminal, {"good": GOOD, "bad": stdio(mode, *args, **more)})


def running(liminal: Liminal) -> bool:
    """Wait until the bad server runs (again)."""
    return any(servers(liminal)["bad"]["state"] == "running" for _ in range(2000))


################ At its start

STARTS = {
    "garbage": (stdio("garbage", connect_timeout=0.5), "did not answer within 0.5 s"),
    "stubborn": (stdio("stubborn", "/dev/null", connect_timeout=0.5), "did not answer within 0.5 s"),
    "ends": (stdio("ends"), "."),
    "missing": ({"command": "no-such-command-here"}, "no such file"),
    "no folder": (stdio("friendly", cwd="/no/such/folder"), "no such file"),
    "no program": ({"command": "/etc/passwd"}, "permission denied"),
    "arguments": ({"command": sys.executable, "args": 5}, "."),
    "no listener": ({"url": f"http://127.0.0.1:{free_ports(1)[0]}/mcp", "connect_timeout": 2}, "."),
    "no url": ({"url": "nonsense"}, "."),
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=slow if case != "missing" else []) for case in STARTS])
def test_a_server_that_does_not_start_is_named_with_why_and_replies_go_on(faulty, case):
    config, why = STARTS[case]
    configure(faulty, {"good": GOOD, "bad": config})
    assert call(faulty, "good__echo", {"text": "a"})["text"] == "a"
    bad = servers(faulty)["bad"]
    assert bad["state"] == "failed" and re.search(why, bad["why"] or ""), bad


@slow
def test_garbage_between_messages_is_passed_over(faulty):
    add(faulty, "noisy")
    assert call(faulty, "bad__echo", {"text": "a"})["text"] == "a"


@slow
def test_a_call_of_a_server_that_does_not_run_is_told_to_the_model(faulty):
    configure(faulty, {"good": GOOD, "bad": {"command": "no-such-command-here"}})
    events = faulty.send("\n".join([calling("bad__echo"), calling("good__echo", {"text": "a"})]), model="openai/echo")
    by_name = {one["name"]: one for one in results(events)}
    assert by_name["bad__echo"]["is_error"] and by_name["good__echo"]["text"] == "a"
    assert events[-1].data["status"] == "complete"


@slow
@linux
def test_a_server_that_hangs_at_its_start_is_ended_with_its_children(faulty, tmp_path):
    add(faulty, "stubborn", tmp_path / "pids", connect_timeout=0.5)
    assert not call(faulty, "good__echo", {"text": "a"})["is_error"]
    pids = list(map(int, (tmp_path / "pids").read_text().split()))[:2]
    assert len(pids) == 2 and all(gone(pid) for pid in pids)


################ In a call


@slow
@both
def test_a_call_that_hangs_ends_at_its_timeout_and_the_server_stays(faulty, kind):
    add(faulty, "friendly", call_timeout=0.5)
    pid = call(faulty, "bad__pid")["text"]
    result = call(faulty, "bad__never", kind=kind)
    assert result["is_error"] and "0.5 s" in result["text"]
    assert call(faulty, "bad__pid")["text"] == pid


def test_a_server_that_dies_in_a_call_costs_that_call_and_is_started_anew(faulty, tmp_path):
    add(faulty, "once", tmp_path / "starts", call_timeout=10)
    said = "\n".join([calling("bad__die"), calling("good__echo", {"text": "a"})])
    events = faulty.send(said, model="openai/echo")
    failed = {one["name"]: one["is_error"] for one in results(events)}
    assert failed == {"bad__die": True, "good__echo": False} and events[-1].data["status"] == "complete"
    assert running(faulty) and len((tmp_path / "starts").read_text().split()) == 2
    assert call(faulty, "bad__echo", {"text": "b"})["text"] == "b"


@slow
@both
def test_an_error_result_and_a_protocol_error_are_told_to_the_model(faulty, kind):
    add(faulty, "friendly")
    pid = call(faulty, "bad__pid", kind=kind)["text"]
    for tool, words in (("fails", "it went wrong"), ("refuses", "not like that")):
        assert call(faulty, f"bad__{tool}", kind=kind)["is_error"]
        assert words in json.dumps(faulty.provider.requests[-1]["body"]["messages"][-1])
    assert call(faulty, "bad__pid", kind=kind)["text"] == pid


@slow
def test_an_answer_that_is_malformed_costs_only_its_call(faulty):
    add(faulty, "friendly")
    pid = call(faulty, "bad__pid")["text"]
    assert call(faulty, "bad__odd_answer")["is_error"]
    assert call(faulty, "bad__pid")["text"] == pid


@slow
def test_an_answer_that_is_no_valid_unicode_does_not_hang_the_call(faulty):
    add(faulty, "friendly", call_timeout=5)
    assert "did not answer" not in call(faulty, "bad__surrogate")["text"]


@slow
def test_a_changed_list_of_tools_is_seen_at_the_next_reply(faulty):
    add(faulty, "friendly")
    assert call(faulty, "bad__grow")["text"] == "changed"
    assert call(faulty, "bad__echo", {"text": "a"})["is_error"]
    assert call(faulty, "bad__fresh")["text"] == "fresh at last"
    assert "bad__fresh" in offered(faulty.provider.requests[-1]) and "bad__echo" not in offered(
        faulty.provider.requests[-1]
    )


@slow
def test_a_tool_that_was_taken_away_in_mid_reply_costs_its_call(faulty):
    add(faulty, "friendly", call_timeout=5)
    for name, arguments in (("grow", {}), ("echo", {"text": "a"})):
        faulty.provider.script(*openai_stream(("tool", f"bad__{name}", arguments)))
    events = faulty.send("hello", model="openai/echo")
    assert [one["is_error"] for one in results(events)] == [False, True] and events[-1].data["status"] == "complete"


################ 100 MB


def peak(liminal: Liminal) -> int:
    """MiB that the Domain has ever held."""
    lines = Path(f"/proc/{liminal.servers['domain'].process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", lines)[1]) // 1024


@slow
@linux
def test_an_answer_of_100_mb_fails_its_call_in_bounded_memory_while_other_streams_go_on(faulty):
    add(faulty, "friendly")
    call(faulty, "bad__pid")
    before = peak(faulty)
    with faulty.stream({"content": "x", "model": "openai/say-200-100"}) as other:
        result = call(faulty, "bad__big", {"characters": 100_000_000})
        assert text(list(other)) == "".join(f" t{n}" for n in range(200))
    assert result["is_error"] and len(result["text"]) < 1000
    assert peak(faulty) - before < 100, f"{before} MiB, then {peak(faulty)}"


@slow
@linux
def test_a_line_below_the_limit_is_taken_and_cut(faulty):
    add(faulty, "friendly")
    result = call(faulty, "bad__big", {"characters": 5_000_000})
    assert not result["is_error"] and "cut" in result["text"][-200:] and len(result["text"]) < 60_000


@slow
@linux
@pytest.mark.parametrize("form", ["sse", "json"])
def test_100_mb_over_http_fail_their_call_in_bounded_memory(faulty, form):
    with serving_http(form) as url:
        configure(faulty, {"good": GOOD, "far": {"url": url}})
        call(faulty, "far__double", {"number": 1})
        before = peak(faulty)
        result = call(faulty, "far__big", {"characters": 100_000_000})
        assert peak(faulty) - before < 100, f"{before} MiB, then {peak(faulty)}"
        assert result["is_error"] and len(result["text"]) < 1000


@slow
@linux
def test_start_does_not_wait_for_a_server_that_hangs(faulty, tmp_path):
    add(faulty, "stubborn", tmp_path / "pids", connect_timeout=5)
    with faulty.stream({"content": "hello", "model": "openai/say-1-0"}) as stream:
        next(iter(stream))
        while not (tmp_path / "pids").exists() or not (tmp_path / "pids").read_text().strip():
            pass
        pid = int((tmp_path / "pids").read_text().split()[0])
        assert not gone(pid, 0.01), "start came only after the server was given up"


@slow
def test_a_hanging_start_delays_a_reply_no_longer_than_its_timeout(faulty):
    add(faulty, "stubborn", "/dev/null", connect_timeout=3)
    events = faulty.send("hello", model="openai/say-1-0")
    assert text(events) == " t0" and status(faulty.api("GET", "/api/v1/runs"), 200)["runs"] == []
