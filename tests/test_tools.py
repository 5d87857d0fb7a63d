"""Tools: configuration, the loop in both wire formats, what is allowed, and what the commands show.

Order: configuration, names, the loop, results, permissions, positions and history, commands.
"""

import json
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from conftest import Liminal, status, text, with_provider
from provider import GATE, Provider, anthropic_stream, openai_stream
from tool_servers import (
    HERE,
    LIES,
    ODD_NAMES,
    TOOLS,
    call,
    calling,
    configure,
    gone,
    offered,
    results,
    servers,
    serving_http,
    stdio,
)

STREAMS = {"anthropic": anthropic_stream, "openai": openai_stream}
slow = pytest.mark.slow
both = pytest.mark.parametrize("kind", ["anthropic", pytest.param("openai", marks=slow)])
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
ROUNDS = 3
TIME = {"command": str(Path(sys.executable).with_name("mcp-server-time")), "args": ["--local-timezone", "UTC"]}
BASE = {"t": stdio("friendly")}


@pytest.fixture(scope="module")
def tooled_liminal(tmp_path_factory):
    """An installation with servers of its own, and few rounds."""
    with closing(Provider()) as provider:
        settings = with_provider(provider, {"LIMINAL_TOOL_ROUNDS": ROUNDS, "MINE_KEY": "sk-SECRET"})
        with closing(Liminal(tmp_path_factory.mktemp("tools") / "data", provider, **settings)) as liminal:
            configure(liminal, BASE)
            yield liminal.start()


@pytest.fixture
def tooled(tooled_liminal):
    tooled_liminal.provider.reset()
    configure(tooled_liminal, BASE)
    yield tooled_liminal
    tooled_liminal.check_logs()


def message_of(liminal: Liminal, events) -> dict:
    return status(liminal.api("GET", f"/api/v1/messages/{events[0].data['message_id']}"), 200)


def added(liminal: Liminal) -> list[dict]:
    """The messages by which the second request is longer than the first."""
    first, second = (request["body"]["messages"] for request in liminal.provider.wait_requests(2)[:2])
    return second[len(first) :]


################ Configuration


@slow
def test_a_public_server_over_stdio_works_unchanged(tooled):
    configure(tooled, {"time": TIME})
    arguments = {"source_timezone": "UTC", "time": "12:00", "target_timezone": "Asia/Tokyo"}
    assert "21:00" in call(tooled, "time__convert_time", arguments)["text"]


@slow
def test_a_public_server_reads_freely_and_writes_only_when_allowed(tooled, tmp_path):
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x", "--allow-empty"],
    ):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    command = str(Path(sys.executable).with_name("mcp-server-git"))
    configure(tooled, {"git": {"command": command, "args": ["--repository", str(tmp_path)]}})
    branch = {"repo_path": str(tmp_path), "branch_name": "new"}
    assert "clean" in call(tooled, "git__git_status", {"repo_path": str(tmp_path)})["text"]
    assert "git__*" in call(tooled, "git__git_create_branch", branch)["text"]
    assert not call(tooled, "git__git_create_branch", branch, allow=["git__*"])["is_error"]
    assert "new" in subprocess.check_output(["git", "-C", tmp_path, "branch"], text=True)


@slow
def test_a_server_over_http_gets_its_headers(tooled):
    with serving_http() as url:
        configure(tooled, {"far": {"url": url, "headers": {"X-Test": "hi"}}})
        assert call(tooled, "far__header")["text"] == "hi"
        assert call(tooled, "far__double", {"number": 21}, kind="anthropic")["text"] == "42"


@slow
def test_a_server_gets_its_environment_and_its_folder(tooled, tmp_path):
    configure(tooled, {"own": stdio("friendly", env={"MINE": "yes"}, cwd=str(tmp_path))})
    assert call(tooled, "own__folder")["text"] == str(tmp_path.resolve())
    assert json.loads(call(tooled, "own__environment")["text"])["MINE"] == "yes"


def test_a_server_gets_no_key_that_is_not_named_for_it(tooled):
    given = call(tooled, "t__environment")["text"]
    assert "sk-SECRET" not in given and not re.search("KEY|TOKEN|LIMINAL", " ".join(json.loads(given)))


@slow
def test_a_disabled_server_is_not_started_and_unknown_keys_do_no_harm(tooled, tmp_path):
    configure(
        tooled, {"off": stdio("once", tmp_path / "off", disabled=True), "on": stdio("friendly", type="x", new=[1])}
    )
    assert not call(tooled, "on__echo", {"text": "a"})["is_error"]
    assert "off" not in servers(tooled) and not (tmp_path / "off").exists()


BROKEN = [
    "{",
    "[]",
    '{"mcpServers": []}',
    '{"mcpServers": {"t": {}}}',
    '{"mcpServers": {"t": 5}}',
    '{"permissions": 1}',
]
BROKEN += ['{"mcpServers": {"x": {"command": "x", "connect_timeout": "soon"}}}', '{"mcpServers": {"x": {"url": 5}}}']


@pytest.mark.parametrize("broken", [pytest.param(one, marks=slow if n else []) for n, one in enumerate(BROKEN)])
def test_a_broken_file_is_reported_and_what_ran_before_goes_on(tooled, broken):
    before = call(tooled, "t__pid")["text"]
    (tooled.data / "mcp.json").write_text(broken)
    assert call(tooled, "t__pid")["text"] == before
    shown = tooled.cli("tools")
    assert "mcp.json" in shown.stderr and "t: running" in shown.stdout


@slow
def test_a_file_that_is_not_utf_8_is_reported(tooled):
    before = call(tooled, "t__pid")["text"]
    (tooled.data / "mcp.json").write_bytes(b"\xff\xfe{")
    assert call(tooled, "t__pid")["text"] == before and "mcp.json" in tooled.cli("tools").stderr


@slow
def test_a_changed_file_is_taken_up_at_the_next_reply(tooled, tmp_path):
    before = call(tooled, "t__pid")["text"]
    configure(tooled, {**BASE, "more": stdio("once", tmp_path / "starts")})
    assert not (tmp_path / "starts").exists()
    assert call(tooled, "more__echo", {"text": "a"})["text"] == "a"
    assert call(tooled, "t__pid")["text"] == before, "a server that did not change was started anew"


@slow
@linux
def test_a_server_that_is_taken_out_is_ended(tooled):
    configure(tooled, {**BASE, "more": stdio("friendly")})
    pid = int(call(tooled, "more__pid")["text"])
    configure(tooled, BASE)
    assert call(tooled, "more__pid")["is_error"] and gone(pid)


@slow
def test_servers_start_in_parallel(tooled, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    configure(tooled, {"a": stdio("pair", one, two), "b": stdio("pair", two, one)})
    assert call(tooled, "a__echo", {"text": "met"})["text"] == "met"
    assert {server["state"] for server in servers(tooled).values()} == {"running"}


@slow
def test_a_server_starts_only_when_a_reply_needs_it(make_liminal, tmp_path):
    liminal = make_liminal()
    configure(liminal, {"t": stdio("once", tmp_path / "starts")})
    liminal.start()
    liminal.send("hello", model="openai/say-1-0", tools=False)
    assert not (tmp_path / "starts").exists()
    assert call(liminal, "t__echo", {"text": "a"})["text"] == "a"
    assert len((tmp_path / "starts").read_text().split()) == 1


@slow
@linux
@pytest.mark.parametrize("end", ["stop", "kill"])
def test_no_server_outlives_the_domain(make_liminal, tmp_path, end):
    """Nor the child of one that is only a wrapper, as `npx` and `uvx` are."""
    liminal, noted = make_liminal(), tmp_path / "pids"
    wrapped = {"command": "sh", "args": ["-c", f"'{sys.executable}' '{HERE}' once '{noted}'; true"]}
    configure(liminal, {"t": stdio("once", noted), "w": wrapped, "bad": stdio("stubborn", noted, connect_timeout=1)})
    liminal.start()
    status(liminal.api("POST", "/api/v1/messages", {"content": "x", "model": "openai/echo", "background": True}), 202)
    liminal.provider.wait_requests(1, 20)
    getattr(liminal, end)("domain")
    pids = list(map(int, noted.read_text().split()))
    assert len(pids) >= 4 and [pid for pid in pids if not gone(pid)] == []


################ Names


@both
def test_names_that_do_not_fit_are_offered_under_valid_ones_and_called(tooled, kind):
    tooled.send("hello", model=f"{kind}/echo")
    names = list(offered(tooled.provider.requests[0]))
    assert all(re.fullmatch("[A-Za-z0-9_-]{1,64}", name) for name in names) and len(set(names)) == len(names)
    odd = [name for name in names if name.startswith("t__") and name[3:] not in TOOLS]
    assert [call(tooled, name, kind=kind)["text"] for name in odd] == [f"called {name}" for name in ODD_NAMES]


@slow
def test_servers_whose_names_look_alike_are_told_apart(tooled):
    configure(tooled, {"a b": stdio("friendly"), "a.b": stdio("friendly"), "a_b": stdio("friendly")})
    tooled.send("hello", model="openai/echo")
    names = [name for name in offered(tooled.provider.requests[0]) if "pid" in name]
    assert len({call(tooled, name)["text"] for name in names}) == 3


@slow
@both
def test_a_tools_description_and_schema_are_offered(tooled, kind):
    tooled.send("hello", model=f"{kind}/echo")
    tool = next(tool for tool in tooled.provider.requests[0]["body"]["tools"] if "t__add" in json.dumps(tool))
    assert tool.get("type") in ("function", None) and "A tool of the tests." in json.dumps(tool)
    assert set(offered(tooled.provider.requests[0])["t__add"]["properties"]) == {"a", "b"}


@slow
@both
def test_only_what_matches_the_patterns_is_offered(tooled, kind):
    tooled.send("hello", model=f"{kind}/echo", tools=["t__e*", "liminal__file_*"])
    files = {f"liminal__file_{name}" for name in ("read", "list", "search")}
    assert set(offered(tooled.provider.requests[0])) == {"t__echo", "t__environment"} | files


@slow
@pytest.mark.parametrize("tools", [False, [], ["nothing__*"]])
def test_a_request_may_offer_no_tools(tooled, tools):
    tooled.send("hello", model="openai/echo", tools=tools)
    assert "tools" not in tooled.provider.requests[0]["body"]


################ The loop


def test_anthropics_next_request_holds_its_blocks_unchanged_and_the_results_by_id(tooled):
    calls = [("tool", "t__echo", {"text": "one"}, "id-1"), ("tool", "t__fails", {}, "id-2")]
    tooled.provider.script(*anthropic_stream(("thinking", "hm"), ("redacted", "BLOB"), "let me", *calls))
    events = tooled.send("hello", model="anthropic/echo")
    said, told = added(tooled)
    assert said == {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": "signature-0"},
            {"type": "redacted_thinking", "data": "BLOB"},
            {"type": "text", "text": "let me"},
            {"type": "tool_use", "id": "id-1", "name": "t__echo", "input": {"text": "one"}},
            {"type": "tool_use", "id": "id-2", "name": "t__fails", "input": {}},
        ],
    }
    told["content"][-1].pop("cache_control")
    one = {"type": "tool_result", "tool_use_id": "id-1", "content": "one", "is_error": False}
    two = {"type": "tool_result", "tool_use_id": "id-2", "content": "it went wrong", "is_error": True}
    assert told == {"role": "user", "content": [one, two]} and text(events) == "let meGOT<one>GOT<it went wrong>"


def test_openais_next_request_holds_the_calls_and_a_message_by_id_for_each_result(tooled):
    calls = [("tool", "t__echo", {"text": "one"}, "id-1"), ("tool", "t__fails", {}, "id-2")]
    tooled.provider.script(*openai_stream("let me", *calls))
    tooled.send("hello", model="openai/echo")
    said, *told = added(tooled)
    given = [(call["id"], call["type"], call["function"]) for call in said.pop("tool_calls")]
    assert said == {"role": "assistant", "content": "let me"}
    assert [(i, kind, one["name"], json.loads(one["arguments"])) for i, kind, one in given] == [
        ("id-1", "function", "t__echo", {"text": "one"}),
        ("id-2", "function", "t__fails", {}),
    ]
    assert told == [
        {"role": "tool", "tool_call_id": "id-1", "content": "one"},
        {"role": "tool", "tool_call_id": "id-2", "content": "it went wrong"},
    ]


@slow
@both
def test_the_next_request_is_the_first_one_with_more_messages(tooled, kind):
    tooled.send(calling("t__echo", {"text": "a"}), model=f"{kind}/echo", system="brief", temperature=0.5, max_tokens=99)
    first, second = (dict(request["body"]) for request in tooled.provider.requests)
    kept = [
        [re.sub(r', "cache_control": {[^}]*}', "", json.dumps(one)) for one in body.pop("messages")]
        for body in (first, second)
    ]
    assert first == second and kept[1][: len(kept[0])] == kept[0]


def test_recorded_parallel_calls_of_anthropic_are_answered_by_id(tooled, fixtures_dir):
    for turn in "12":
        tooled.provider.script((fixtures_dir / f"anthropic_parallel_tools_turn{turn}.sse").read_bytes())
    events = tooled.send("hello", model="anthropic/recorded")
    said, told = added(tooled)
    used = [block for block in said["content"] if block["type"] == "tool_use"]
    calls = [event.data for event in events if event.type == "tool_call"]
    assert [(one["id"], one["name"], one["input"]) for one in used] == [
        (one["tool_call_id"], one["name"], one["arguments"]) for one in calls
    ]
    assert [one["tool_use_id"] for one in told["content"]] == [one["id"] for one in used] and len(used) == 2
    assert events[-1].data["stop_reason"] == "end_turn" and "The results are" in text(events)


def test_recorded_thinking_goes_back_with_its_signature(tooled, fixtures_dir):
    recorded = (fixtures_dir / "anthropic_thinking_signature_tool.sse").read_text()
    tooled.provider.script(recorded.encode())
    tooled.send("hello", model="anthropic/echo")
    deltas = [json.loads(line[6:]).get("delta", {}) for line in recorded.split("\n") if line.startswith("data: ")]
    thought, signature = ("".join(delta.get(name, "") for delta in deltas) for name in ("thinking", "signature"))
    block = {"type": "thinking", "thinking": thought, "signature": signature}
    assert signature and added(tooled)[0]["content"][0] == block


def test_recorded_parallel_calls_of_openai_are_answered_by_id(tooled, fixtures_dir):
    tooled.provider.script((fixtures_dir / "openai_parallel_tool_calls_usage.sse").read_bytes())
    events = tooled.send("hello", model="openai/echo")
    said, *told = added(tooled)
    ids = [event.data["tool_call_id"] for event in events if event.type == "tool_call"]
    assert [one["id"] for one in said["tool_calls"]] == [one["tool_call_id"] for one in told] == ids and len(ids) == 2
    assert {one["role"] for one in told} == {"tool"}
    assert [json.loads(one["function"]["arguments"]) for one in said["tool_calls"]] == [{"a": 2, "b": 3}] * 2


@both
def test_calls_of_one_round_run_in_parallel(tooled, kind, tmp_path):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    said = "\n".join(calling("t__wait_for", {"mine": a, "other": b}) for a, b in ((one, two), (two, one)))
    assert [result["text"] for result in results(tooled.send(said, model=f"{kind}/echo"))] == ["met", "met"]


@slow
def test_replies_do_not_wait_for_each_others_calls(tooled, tmp_path):
    path = tmp_path / "called"
    with tooled.stream({"content": calling("t__never", {"path": str(path)}), "model": "openai/echo"}) as stream:
        events = iter(stream)
        start = next(events).data
        assert next(events).type == "tool_call"
        assert call(tooled, "t__echo", {"text": "a"})["text"] == "a"
        status(tooled.api("POST", f"/api/v1/messages/{start['message_id']}/cancel"), 200)


@both
def test_rounds_are_limited_and_the_end_says_so(tooled, kind):
    for _ in range(ROUNDS + 2):
        tooled.provider.script(*STREAMS[kind](("tool", "t__echo", {"text": "again"})))
    events = tooled.send("hello", model=f"{kind}/echo")
    assert len(results(events)) == ROUNDS and len(tooled.provider.requests) == ROUNDS + 1
    assert (events[-1].data["status"], events[-1].data["stop_reason"]) == ("complete", "tool_rounds")


@both
def test_usage_is_summed_over_the_rounds(tooled, kind):
    tooled.provider.script(*STREAMS[kind](("tool", "t__echo", {"text": "a"}), input_tokens=100))
    tooled.provider.script(*STREAMS[kind]("a", "b", input_tokens=200))
    usage = tooled.send("hello", model=f"{kind}/echo")[-1].data["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["estimated"]) == (300, 3, False)


@both
def test_a_call_that_was_cut_off_is_not_run(tooled, kind, tmp_path):
    whole = ("tool", "t__never", {"path": str(tmp_path / "called")})
    tooled.provider.script(*STREAMS[kind]("a", whole, stop="max_tokens"))
    events = tooled.send("hello", model=f"{kind}/echo")
    assert (text(events), events[-1].data["stop_reason"]) == ("a", "max_tokens")
    assert not results(events) and len(tooled.provider.requests) == 1 and not (tmp_path / "called").exists()


@pytest.mark.parametrize("arguments", [{}, {"a": 1}, {"a": 1, "b": "2"}, {"a": 1, "b": None}])
def test_arguments_that_do_not_fit_are_told_to_the_model_and_not_sent(tooled, arguments):
    result = call(tooled, "t__add", arguments)
    assert result["is_error"] and re.search("'[ab]'|b:", result["text"]) and "arguments" in result["text"]


@slow
@both
def test_an_unknown_tool_is_told_to_the_model(tooled, kind):
    result = call(tooled, "t__no_such", kind=kind)
    assert result["is_error"] and "t__no_such" in result["text"] and "t__echo" in result["text"]


@slow
def test_a_tool_that_was_not_offered_is_not_called(tooled):
    assert call(tooled, "t__echo", {"text": "a"}, tools=["t__add"])["is_error"]


################ Results

RESULTS = {
    "nothing": r"^$",
    "image": r"image/png.* 4 bytes",
    "sound": r"audio/wav.* 4 bytes",
    "file": r"test://thing.*\ninside$",
    "blob": r"test://thing.* 4 bytes",
    "link": r"test://far",
    "structured": r'^{"answer":\s?\[42\]}$',
}


@pytest.mark.parametrize("tool", RESULTS)
def test_what_is_no_text_becomes_an_honest_text(tooled, tool):
    result = call(tooled, f"t__{tool}")
    assert not result["is_error"] and re.search(RESULTS[tool], result["text"]), result["text"]


@slow
@both
def test_an_empty_result_is_valid_in_both_formats(tooled, kind):
    call(tooled, "t__nothing", kind=kind)
    told = added(tooled)[-1]
    assert (told["content"] if kind == "openai" else told["content"][0]["content"]) == "(empty)"


@slow
def test_a_long_result_is_cut_and_says_how_much(tooled):
    result = call(tooled, "t__big", {"characters": 60_000})["text"]
    kept = len(re.match("x*", result)[0])
    assert kept < 60_000 and str(60_000 - kept) in result[kept:] and "cut" in result[kept:]


################ Permissions


def test_a_read_only_tool_is_allowed_and_another_is_refused_with_what_to_add(tooled):
    result = call(tooled, "t__write_file")
    assert result["is_error"] and "--allow 't__write_file'" in result["text"] and str(tooled.data) in result["text"]
    line = json.loads(re.search(r"{.*}", result["text"])[0])
    configure(tooled, BASE, **line["permissions"])
    assert call(tooled, "t__write_file")["text"] == "written"


@slow
@pytest.mark.parametrize("pattern", ["t__write_file", "t__*", "*", "?__write_*"])
def test_patterns_allow(tooled, pattern):
    configure(tooled, BASE, allow=[pattern])
    assert call(tooled, "t__write_file")["text"] == "written"


@slow
@pytest.mark.parametrize("pattern", ["t_*_x", "T__WRITE_FILE", "write_file", ""])
def test_a_pattern_must_match_the_whole_name(tooled, pattern):
    configure(tooled, BASE, allow=[pattern])
    assert call(tooled, "t__write_file")["is_error"]


def test_deny_beats_allow_and_a_requests_allow_and_reading(tooled):
    configure(tooled, BASE, allow=["*"], deny=["*__delete_*"])
    assert call(tooled, "t__delete_file", allow=["*", "t__delete_file"])["is_error"]
    assert call(tooled, "t__delete_view")["is_error"] and not call(tooled, "t__write_file")["is_error"]


def test_a_requests_allow_holds_for_its_run_only(tooled):
    events = tooled.send(calling("t__write_file"), model="openai/echo", allow=["t__write_*"])
    assert results(events)[0]["text"] == "written"
    assert call(tooled, "t__write_file", thread_id=events[0].data["thread_id"])["is_error"]


@both
def test_what_a_tool_says_cannot_widen_what_is_allowed(tooled, kind):
    for name in ("lies", "write_file"):
        tooled.provider.script(*STREAMS[kind](("tool", f"t__{name}", {})))
    events = tooled.send("hello", model=f"{kind}/echo")
    assert [(one["text"] == LIES, one["is_error"]) for one in results(events)] == [(True, False), (False, True)]
    assert call(tooled, "t__write_file", kind=kind)["is_error"]


@slow
@pytest.mark.parametrize("allow", ["*", [5], {"a": 1}])
def test_an_allow_that_is_no_list_of_patterns_is_refused(tooled, allow):
    body = {"content": "hello", "model": "openai/echo", "allow": allow}
    assert status(tooled.api("POST", "/api/v1/messages", body), 400, "invalid_request")["field"].startswith("allow")


################ Positions and history


def flat(events) -> list:
    """A reply position by position: a code point or a tool event each."""
    found = []
    for kind, data in [(event.type, event.data) for event in events]:
        if kind in ("text", "thinking"):
            found += [(kind, letter) for letter in data["text"]]
        elif kind in ("tool_call", "tool_result"):
            found.append((kind, data["tool_call_id"], data.get("text")))
    return found


def script_two_rounds(liminal: Liminal, kind: str):
    """ "hm" thought, "a😀" said, two calls and their results, then "b", the gate, "c": 10 positions."""
    calls = [("tool", "t__echo", {"text": word}, word) for word in ("one", "two")]
    liminal.provider.script(*STREAMS[kind](("thinking", "hm"), "a😀", *calls))
    liminal.provider.script(*STREAMS[kind]("b", GATE, "c"))


@both
def test_a_stored_reply_with_tools_resumes_from_every_position(tooled, kind):
    script_two_rounds(tooled, kind)
    tooled.provider.open_gate()
    events = tooled.send("hello", model=f"{kind}/echo")
    whole = flat(events)
    assert len(whole) == events[-1].data["position"] == 10 and [one[0] for one in whole].count("tool_result") == 2
    rest = [flat(tooled.attach(events[0].data["message_id"], position)) for position in range(11)]
    assert rest == [whole[position:] for position in range(11)]


@both
def test_a_running_reply_with_tools_resumes_from_every_position(tooled, kind):
    script_two_rounds(tooled, kind)
    with tooled.stream({"content": "hello", "model": f"{kind}/echo"}) as stream:
        path = f"/api/v1/messages/{next(iter(stream)).data['message_id']}/stream"
        tooled.provider.wait_gate()
        late = [tooled.stream(None, f"{path}?after={position}", "GET") for position in range(10)]
        tooled.provider.open_gate()
        whole, *rest = [flat(tooled.read(one)) for one in late]
    assert rest == [whole[position:] for position in range(1, 10)] and len(whole) == 10


@slow
@both
def test_ids_count_one_for_each_call_and_each_result(tooled, kind):
    tooled.provider.script(*STREAMS[kind]("ab", ("tool", "t__echo", {"text": "long"}, "one")))
    tooled.provider.script(*STREAMS[kind]("c"))
    events = tooled.send("hello", model=f"{kind}/echo")
    told = [(event.type, event.id) for event in events if event.type in ("text", "tool_call", "tool_result")]
    assert [place for kind, place in told] == ["2", "3", "4", "5"]


def test_calls_and_results_are_parts_of_the_stored_message(tooled):
    tooled.provider.script(*openai_stream("a", ("tool", "t__echo", {"text": "b"}, "one")))
    message = message_of(tooled, tooled.send("hello", model="openai/echo"))
    named = {"tool_call_id": "one", "name": "t__echo"}
    assert message["parts"] == [
        {"type": "text", "text": "a"},
        {"type": "tool_call", **named, "arguments": {"text": "b"}},
        {"type": "tool_result", **named, "text": "b", "is_error": False},
        {"type": "text", "text": "GOT<b>"},
    ]


@pytest.mark.parametrize("later", ["openai", "anthropic"])
@both
def test_later_turns_send_calls_and_results_in_their_own_providers_form(tooled, kind, later):
    tooled.provider.script(*STREAMS[kind](("thinking", "hm"), "a", ("tool", "t__echo", {"text": "b"}, "one")))
    events = tooled.send("hello", model=f"{kind}/echo")
    tooled.send("again", model=f"{later}/echo", thread_id=events[0].data["thread_id"])
    first, said, told, then, last = tooled.provider.requests[-1]["body"]["messages"]
    assert [one["role"] for one in (first, said, then, last)] == ["user", "assistant", "assistant", "user"]
    assert "hm" not in json.dumps(said) and "signature" not in json.dumps(said)
    if later == "openai":
        assert told == {"role": "tool", "tool_call_id": "one", "content": "b"} and said["content"] == "a"
        assert [one["id"] for one in said["tool_calls"]] == ["one"] and then["content"] == "GOT<b>"
    else:
        use = {"type": "tool_use", "id": "one", "name": "t__echo", "input": {"text": "b"}}
        assert said["content"] == [{"type": "text", "text": "a"}, use]
        result = {"type": "tool_result", "tool_use_id": "one", "content": "b", "is_error": False}
        assert told == {"role": "user", "content": [result]}


@both
def test_cancel_abandons_a_tool_that_does_not_listen(tooled, kind, tmp_path):
    with tooled.stream({"content": calling("t__never"), "model": f"{kind}/echo"}) as stream:
        events = iter(stream)
        start = next(events).data
        assert next(events).type == "tool_call"
        receipt = status(tooled.api("POST", f"/api/v1/messages/{start['message_id']}/cancel"), 200)
        assert (receipt["status"], receipt["position"]) == ("cancelled", 1)
        assert [event.type for event in events] == ["done"]
    assert call(tooled, "t__echo", {"text": "a"}, kind=kind, thread_id=start["thread_id"])["text"] == "a"
    before = [request["body"]["messages"] for request in tooled.provider.requests][-2]
    assert "cancelled" in json.dumps(before), "a call without a result is told as cancelled"


################ The demo and the commands


def test_the_demo_reads_a_file_when_told_to(tooled):
    events = tooled.send("please read README.md", model="demo/guide")
    assert [event.data["name"] for event in events if event.type == "tool_call"] == ["liminal__file_read"]
    assert results(events)[0]["text"][:20] in text(events) and not results(events)[0]["is_error"]


def test_a_line_for_each_call_stands_on_standard_error(tooled):
    shown = tooled.cli("-m", "openai/echo", calling("t__echo", {"text": "a" * 300}))
    (line,) = [line for line in shown.stderr.split("\n") if "t__echo" in line]
    assert re.search(r'{"text".*\.\.\..*\d s.*300', line) and len(line) < 160
    assert shown.stdout.startswith("GOT<aaa") and shown.returncode == 0


@slow
def test_a_refused_call_is_shown_with_what_to_add(tooled):
    shown = tooled.cli("-m", "openai/echo", calling("t__write_file"))
    assert "failed" in shown.stderr and "--allow 't__write_file'" in shown.stderr and shown.returncode == 0


@slow
def test_allow_allows_for_one_command(tooled):
    shown = tooled.cli("-m", "openai/echo", "--allow", "t__write_*", calling("t__write_file"))
    assert shown.stdout.strip() == "GOT<written>" and call(tooled, "t__write_file")["is_error"]


@slow
def test_no_tools_and_patterns_reach_the_provider(tooled):
    tooled.cli("-m", "openai/echo", "--no-tools", "hello")
    tooled.cli("-m", "openai/echo", "-T", "t__echo", "-T", "liminal__file_re*", "hello")
    first, second = tooled.provider.requests
    assert not offered(first) and set(offered(second)) == {"t__echo", "liminal__file_read"}


@slow
def test_json_shows_the_calls_and_the_results_as_events(tooled):
    shown = tooled.cli("-m", "openai/echo", "--json", calling("t__echo", {"text": "a"}))
    kinds = [json.loads(line)["type"] for line in shown.stdout.splitlines()]
    assert kinds[:3] == ["start", "tool_call", "tool_result"] and kinds[-1] == "done"


@slow
def test_tools_lists_servers_tools_and_why_not(tooled):
    configure(tooled, {**BASE, "none": {"command": "no-such-command-here"}}, deny=["t__echo"])
    shown = tooled.cli("tools")
    assert re.search(r"t: running", shown.stdout) and re.search(r"none: failed .*no such file", shown.stdout)
    assert re.search(r"t__add +allowed +A tool of the tests\.", shown.stdout) and "Second line" not in shown.stdout
    assert re.search(r"t__echo +refused", shown.stdout) and re.search(r"t__write_file +refused", shown.stdout)
