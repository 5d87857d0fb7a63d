"""Providers: what a request holds, what becomes of an answer, and how each failure ends; in both wire formats.

Order: requests, usage and keys, failures, calls that are repeated, the two formats' oddities, settings, the demo, imports.
"""

import http.server
import json
import os
import signal
import threading
import time
from contextlib import closing

import pytest

from conftest import Liminal, free_ports, status, text, with_provider
from provider import Provider, anthropic_error, anthropic_stream, data_line, openai_error, openai_stream, sse, text_of

SECRETS = {"ANTHROPIC_API_KEY": "sk-ant-SECRET-1", "OPENAI_API_KEY": "sk-SECRET-2", "MINE_KEY": "sk-SECRET-3"}
STREAMS = {"anthropic": anthropic_stream, "openai": openai_stream}
both = pytest.mark.parametrize("kind", STREAMS)


def history(request: dict) -> list[tuple[str, str]]:
    """(role, text) of each message of a request, without the system text."""
    messages = request["body"]["messages"]
    return [(one["role"], text_of(one["content"])) for one in messages if one["role"] != "system"]


def system(request: dict) -> str:
    """The system text of a request in either format."""
    body = request["body"]
    return text_of(body.get("system") or next((m["content"] for m in body["messages"] if m["role"] == "system"), ""))


def reply(liminal: Liminal, kind: str, *parts, **options):
    """What becomes of an answer of these parts: (events, the message as stored)."""
    liminal.provider.script(*STREAMS[kind](*parts, **options))
    return ended(liminal, f"{kind}/say-1-0")


def ended(liminal: Liminal, model: str):
    """The events of a reply, which has exactly one `done` and is on disk when it comes; and the message."""
    events = liminal.send("hello", model=model)
    message = status(liminal.api("GET", f"/api/v1/messages/{events[0].data['message_id']}"), 200)
    done = events[-1].data
    assert [event.type for event in events].count("done") == 1
    assert (message["status"], message["position"], message["error"]) == (
        done["status"],
        done["position"],
        done["error"],
    )
    running = [run["message_id"] for run in status(liminal.api("GET", "/api/v1/runs"), 200)["runs"]]
    assert message["id"] not in running
    return events, message


def first_round(message: dict) -> dict:
    """The message with what the provider's first answer said: up to the first result, of a tool that there is not."""
    parts = message["parts"]
    ends = [place for place, part in enumerate(parts) if part["type"] == "tool_result"]
    assert all(parts[place]["is_error"] and "there is no tool" in parts[place]["text"] for place in ends)
    return {**message, "parts": parts[: ends[0]] if ends else parts}


def in_parts(message: dict) -> list[tuple[str, str]]:
    return [(part["type"], part.get("text", part.get("name"))) for part in message["parts"]]


@pytest.fixture(scope="module")
def own_liminal(tmp_path_factory):
    """An installation whose keys are long enough to be looked for, and a provider of the user's own in each format."""
    with closing(Provider()) as provider:
        settings = {**with_provider(provider, SECRETS), "LOST_KEY": None}
        with closing(Liminal(tmp_path_factory.mktemp("own") / "data", provider, **settings)) as liminal:
            liminal.start()
            prices = {"say-*": [1.0, 0.1, 2.0], "*": [0, 0, 0]}
            for name, kind, url in (("mya", "anthropic", provider.url), ("myo", "openai", provider.openai_url)):
                fields = {"kind": kind, "base_url": url, "key_env": "MINE_KEY", "prices": prices, "models": ["say-3-0"]}
                status(liminal.api("PUT", f"/api/v1/providers/{name}", fields), 200)
            yield liminal


@pytest.fixture
def own(own_liminal):
    own_liminal.provider.reset()
    yield own_liminal
    own_liminal.check_logs()


################ What a request holds


@both
def test_three_turns_reach_the_provider_with_the_whole_history(shared, kind):
    fields = {"model": f"{kind}/echo"}
    for said in ("one", "two", "three"):
        events = shared.send(said, **fields)
        fields["thread_id"] = events[0].data["thread_id"]
    turns = [(role, said) for said in ("one", "two", "three") for role in ("user", "assistant")]
    assert [history(request) for request in shared.provider.requests] == [turns[:1], turns[:3], turns[:5]]


@both
def test_the_threads_own_system_text_reaches_the_provider(shared, kind):
    thread = status(shared.api("POST", "/api/v1/threads", {"system": "be brief", "model": f"{kind}/say-1-0"}), 201)
    for _ in range(2):
        shared.send("hello", thread_id=thread["id"])
    assert [system(request) for request in shared.provider.requests] == ["be brief"] * 2


@both
def test_a_requests_system_text_wins_for_that_request(shared, kind):
    thread = status(shared.api("POST", "/api/v1/threads", {"system": "be brief", "model": f"{kind}/say-1-0"}), 201)
    shared.send("hello", thread_id=thread["id"], system="be long")
    shared.send("hello", thread_id=thread["id"])
    assert [system(request) for request in shared.provider.requests] == ["be long", "be brief"]


@both
def test_the_system_text_of_a_first_message_stays_with_its_thread(shared, kind):
    events = shared.send("hello", model=f"{kind}/say-1-0", system="be brief")
    shared.send("hello", thread_id=events[0].data["thread_id"])
    assert [system(request) for request in shared.provider.requests] == ["be brief"] * 2


@both
def test_without_a_system_text_none_is_sent(shared, kind):
    shared.send("hello", model=f"{kind}/say-1-0")
    request = shared.provider.requests[0]
    assert "system" not in request["body"] and len(request["body"]["messages"]) == 1


@both
def test_a_requests_model_wins_over_its_threads(shared, kind):
    thread = status(shared.api("POST", "/api/v1/threads", {"model": f"{kind}/say-1-0"}), 201)
    shared.send("hello", thread_id=thread["id"], model=f"{kind}/say-2-0")
    events = shared.send("hello", thread_id=thread["id"])
    assert [request["body"]["model"] for request in shared.provider.requests] == ["say-2-0", "say-1-0"]
    assert events[0].data["model"] == f"{kind}/say-1-0"


def test_a_model_may_have_slashes_of_its_own(shared):
    events = shared.send("hello", model="openai/vendor/say-1-0")
    assert (text(events), shared.provider.requests[0]["body"]["model"]) == (" t0", "vendor/say-1-0")


@both
def test_max_tokens_and_a_temperature_of_zero_are_sent(shared, kind):
    shared.send("hello", model=f"{kind}/say-1-0", max_tokens=77, temperature=0)
    body = shared.provider.requests[0]["body"]
    assert (body["max_tokens"], body["temperature"]) == (77, 0)


@both
def test_options_go_to_the_provider_as_they_are(shared, kind):
    options = {"seed": 7, "metadata": {"user_id": "ü"}, "stop": ["\n", None]}
    shared.send("hello", model=f"{kind}/say-1-0", options=options)
    assert options.items() <= shared.provider.requests[0]["body"].items()


@both
def test_nothing_that_was_not_asked_for_is_sent(shared, kind):
    shared.send("hello", model=f"{kind}/say-1-0", tools=False)
    shared.send("hello", model=f"{kind}/say-1-0")
    sent = {"anthropic": {"max_tokens"}, "openai": {"stream_options"}}[kind] | {"model", "messages", "stream"}
    assert [set(request["body"]) for request in shared.provider.requests] == [sent, sent | {"tools"}]


@both
def test_thinking_is_a_part_of_its_own(shared, kind):
    events, message = ended(shared, f"{kind}/think-4-0")
    assert in_parts(message) == [("thinking", " t0 t1"), ("text", " t2 t3")]
    assert (message["content"], text(events), message["position"]) == (" t2 t3", " t2 t3", 12)


@both
def test_thinking_is_not_sent_back_in_later_turns(shared, kind):
    events = shared.send("one", model=f"{kind}/think-4-0")
    shared.send("two", model=f"{kind}/echo", thread_id=events[0].data["thread_id"])
    sent = shared.provider.requests[1]
    assert history(sent) == [("user", "one"), ("assistant", " t2 t3"), ("user", "two")]
    assert "t0" not in json.dumps(sent["body"]) and "signature" not in json.dumps(sent["body"])


def test_anthropic_requests_mark_system_and_last_message_for_the_cache(shared):
    events = shared.send("one", model="anthropic/say-1-0", system="be brief")
    shared.send("two", thread_id=events[0].data["thread_id"])
    body = shared.provider.requests[1]["body"]
    marked = [block.get("cache_control") for m in body["messages"] for block in m["content"]]
    assert body["system"][-1]["cache_control"] == {"type": "ephemeral"}
    assert marked == [None, None, {"type": "ephemeral"}]


################ Usage, cost, timing, keys


@both
def test_usage_is_stored_and_told(shared, kind):
    events, message = ended(shared, f"{kind}/say-3-0")
    usage = {"input_tokens": 12, "cached_tokens": 0, "output_tokens": 3, "cost": None, "estimated": False}
    assert message["usage"] == events[-1].data["usage"] == usage


@both
def test_cached_tokens_are_part_of_the_input_and_cost_less(own, kind):
    usage = {"input_tokens": 100, "cache_read_input_tokens": 900, "output_tokens": 50}
    frame = sse("message_delta", {"delta": {"stop_reason": "end_turn"}, "usage": usage}) + sse("message_stop", {})
    if kind == "openai":
        usage = {"prompt_tokens": 1000, "completion_tokens": 50, "prompt_tokens_details": {"cached_tokens": 900}}
        frame = data_line({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": usage}) + b"data: [DONE]\n\n"
    own.provider.script(*STREAMS[kind]("hi", stop=None), frame)
    counts = {"input_tokens": 1000, "cached_tokens": 900, "output_tokens": 50, "cost": 0.00029, "estimated": False}
    assert ended(own, f"my{kind[0]}/say-3-0")[1]["usage"] == counts


@both
def test_cost_comes_from_the_first_price_that_matches(own, kind):
    events, message = ended(own, f"my{kind[0]}/say-3-0")
    assert message["usage"]["cost"] == events[-1].data["usage"]["cost"] == pytest.approx((12 * 1 + 3 * 2) / 1e6)
    assert ended(own, f"my{kind[0]}/echo")[1]["usage"]["cost"] == 0


@both
def test_a_reply_without_usage_is_estimated(shared, kind):
    events, message = ended(shared, f"{kind}/say-5-0-end@4")
    assert message["usage"]["estimated"] and message["usage"]["output_tokens"] == 4
    assert message["usage"]["input_tokens"] > 0


@both
def test_timing_is_stored_and_told(shared, kind):
    events, message = ended(shared, f"{kind}/say-20-200")
    told, stored = events[-1].data["timing"], message["timing"]
    assert {**told, "edge_ttft_ms": 0} == {**stored, "edge_ttft_ms": 0}
    assert 0 < told["provider_ttft_ms"] <= told["domain_ttft_ms"] <= told["edge_ttft_ms"] < told["total_ms"] + 1000
    assert told["total_ms"] >= 19 / 200 * 1000 - 10 and told["tokens_per_s"] > 0


@both
def test_the_key_is_sent_in_the_formats_own_header(own, kind):
    """Anthropic's is the one that its SDK takes, which depends on the release; never both."""
    ended(own, f"my{kind[0]}/say-1-0")
    sent = {name: own.provider.requests[0]["headers"].get(name) for name in ("x-api-key", "authorization")}
    bearer = {"x-api-key": None, "authorization": f"Bearer {SECRETS['MINE_KEY']}"}
    assert sent == bearer or kind == "anthropic" and sent == {"x-api-key": SECRETS["MINE_KEY"], "authorization": None}


@both
@pytest.mark.parametrize("code", [401, 429, 500])
def test_an_echoed_key_is_in_no_error_message(own, kind, code):
    key, own.provider.retry_after = SECRETS["MINE_KEY"], "0.01"
    body = json.dumps({"error": {"message": f"bad key {key}", "type": "x"}}).encode()
    for _ in range(4):
        own.provider.script(
            body, status=code, content_type="application/json", headers={"retry-after": "0.01", "x": key}
        )
    events, message = ended(own, f"my{kind[0]}/say-1-0")
    assert message["error"] and "bad key" in message["error"]["message"]
    assert "SECRET" not in json.dumps([event.data for event in events]) + json.dumps(message)


@both
def test_a_key_echoed_in_mid_stream_is_in_no_error_message(own, kind):
    words = f"bad key {SECRETS['MINE_KEY']}"
    error = anthropic_error(words) if kind == "anthropic" else openai_error(words)
    own.provider.script(*STREAMS[kind]("hi", stop=None), error)
    events, message = ended(own, f"my{kind[0]}/say-1-0")
    assert "bad key" in message["error"]["message"] and "SECRET" not in json.dumps(message)


@both
def test_a_key_echoed_in_a_page_or_a_frame_is_in_no_error_message(own, kind):
    own.provider.script(f"<p>{SECRETS['MINE_KEY']}</p>".encode(), content_type="text/html")
    own.provider.script(*STREAMS[kind](stop=None), f"data: {{{SECRETS['MINE_KEY']}\n\n".encode())
    for _ in range(2):
        assert "SECRET" not in json.dumps(ended(own, f"my{kind[0]}/say-1-0")[1])


def test_keys_are_in_no_file_of_the_data_folder(own):
    """Stands behind all tests that make a provider echo them."""
    for name in ("anthropic", "openai", "mya", "myo"):
        ended(own, f"{name}/say-1-0")
        ended(own, f"{name}/say-1-0-s401@0")
    found = [path.name for path in own.data.rglob("*") if path.is_file() and b"SECRET-" in path.read_bytes()]
    assert found == [] and len(own.provider.requests) == 8


@both
def test_a_redirect_is_not_followed(own, kind):
    for code in (301, 302, 307, 308):
        own.provider.requests.clear()
        own.provider.script(status=code, headers={"location": f"{own.provider.url}/elsewhere"})
        events, message = ended(own, f"my{kind[0]}/say-1-0")
        assert message["error"]["code"] == "provider_error" and len(own.provider.requests) == 1


################ Failures: each has its code, keeps what came, and ends

FAILURES = {
    "s401@0": ("provider_auth", 0),
    "s403@0": ("provider_auth", 0),
    "s404@0": ("unknown_model", 0),
    "s429@0": ("rate_limited", 0),
    "s529@0": ("provider_overloaded", 0),
    "s500@0": ("provider_error", 0),
    "html@0": ("provider_error", 0),
    "cut@3": ("provider_error", 3),
    "end@0": ("provider_incomplete", 0),
    "end@3": ("provider_incomplete", 3),
    "err@3": ("provider_overloaded", 3),
    "garbage@3": ("provider_error", 3),
}


@both
@pytest.mark.parametrize("fault", FAILURES)
def test_a_failure_has_its_code_and_keeps_what_came(shared, kind, fault):
    (code, tokens), shared.provider.retry_after = FAILURES[fault], "0.01"
    events, message = ended(shared, f"{kind}/say-9-0-{fault}")
    assert (message["status"], message["error"]["code"]) == ("error", code), message["error"]
    assert text(events) == message["content"] == "".join(f" t{n}" for n in range(tokens))
    assert message["stop_reason"] is None and message["completed_at"]


@both
def test_a_provider_that_is_not_there_is_named(shared, kind):
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    fields = {"kind": kind, "base_url": address, "key_env": "ANTHROPIC_API_KEY"}
    status(shared.api("PUT", f"/api/v1/providers/gone-{kind}", fields), 200)
    events, message = ended(shared, f"gone-{kind}/any")
    assert message["error"]["code"] == "provider_error" and message["error"]["retriable"]
    assert address in message["error"]["message"]
    status(shared.api("DELETE", f"/api/v1/providers/gone-{kind}"), 204)


@both
def test_a_providers_own_words_reach_the_person(shared, kind):
    assert "fake s500" in ended(shared, f"{kind}/say-1-0-s500@0")[1]["error"]["message"]


@both
def test_a_tool_call_cut_off_by_a_limit_is_no_call(shared, kind):
    """`truncated` needs a tool to name; it takes "none" where the request has none."""
    events, message = ended(shared, f"{kind}/say-9-0-truncated@1")
    assert (message["status"], message["stop_reason"]) == ("complete", "max_tokens"), message["error"]
    assert in_parts(message) == [("text", " t0")]


@both
def test_a_limit_that_cuts_a_text_is_told(shared, kind):
    assert reply(shared, kind, "a", stop="max_tokens")[1]["stop_reason"] == "max_tokens"


def test_a_silent_provider_times_out(make_liminal):
    liminal = make_liminal(LIMINAL_PROVIDER_TIMEOUTS="9,1").start()
    begun = [liminal.stream({"content": "hello", "model": f"{kind}/say-9-0-hang@3"}) for kind in STREAMS]
    for done in [liminal.read(stream)[-1].data for stream in begun]:
        assert (done["status"], done["error"]["code"], done["position"]) == ("error", "provider_timeout", 9)
    assert len(liminal.provider.wait_closed(2)) == 2


@pytest.mark.slow
def test_a_provider_that_never_answers_times_out(make_liminal):
    liminal = make_liminal(LIMINAL_PROVIDER_TIMEOUTS="4,100").start()
    ended(liminal, "anthropic/say-1-0")  # so that the import is over
    for kind in STREAMS:
        liminal.provider.script("hang")
        assert ended(liminal, f"{kind}/any")[1]["error"]["code"] == "provider_timeout"


@pytest.mark.slow
def test_a_stopped_domain_finds_its_waiting_data_in_time(make_liminal):
    """Stopped for longer than the provider may be silent, while its tokens arrive."""
    liminal = make_liminal(LIMINAL_PROVIDER_TIMEOUTS="2,2").start()
    with liminal.stream({"content": "hello", "model": "openai/gate-9-3"}) as stream:
        liminal.provider.wait_gate()
        domain = liminal.servers["domain"].process
        domain.send_signal(signal.SIGSTOP)
        liminal.provider.open_gate()
        threading.Event().wait(3)
        domain.send_signal(signal.SIGCONT)
        assert list(stream)[-1].data["status"] == "complete"


def test_after_a_failure_the_thread_is_free(shared):
    events = shared.send("one", model="openai/say-9-0-cut@3")
    assert text(shared.send("two", model="openai/say-1-0", thread_id=events[0].data["thread_id"])) == " t0"


################ Calls that are repeated


@both
@pytest.mark.parametrize("fault", ["s429", "s529"])
def test_an_overloaded_provider_is_called_again(shared, kind, fault):
    shared.provider.fail_times, shared.provider.retry_after = 2, "0.01"
    before = shared.log("domain")
    assert ended(shared, f"{kind}/say-2-0-{fault}@0")[1]["content"] == " t0 t1"
    log = shared.log("domain")[len(before) :]
    assert len(shared.provider.requests) == 3 and log.count(f"fake {fault}; call") == 2 and "call 3 follows" in log


def test_a_repeated_call_waits_as_long_as_the_provider_asks(shared):
    shared.provider.fail_times, shared.provider.retry_after = 1, "1.5"
    assert ended(shared, "openai/say-1-0-s529@0")[1]["timing"]["total_ms"] >= 1500


@both
@pytest.mark.parametrize("wait", ["3600", "Fri, 31 Dec 2100 23:59:59 GMT"])
def test_a_provider_that_asks_for_an_hour_is_not_called_again(shared, kind, wait):
    """Neither sooner than it asked for, nor after keeping the person waiting."""
    shared.provider.retry_after = wait
    assert ended(shared, f"{kind}/say-1-0-s429@0")[1]["error"]["code"] == "rate_limited"
    assert len(shared.provider.requests) == 1


@both
@pytest.mark.parametrize("fault", ["s401", "s404", "s500", "cut", "end", "html"])
def test_other_failures_are_not_repeated(shared, kind, fault):
    ended(shared, f"{kind}/say-1-0-{fault}@0")
    assert len(shared.provider.requests) == 1


@both
def test_nothing_is_repeated_after_the_first_token(shared, kind):
    ended(shared, f"{kind}/say-3-0-err@1")
    assert len(shared.provider.requests) == 1


@both
def test_a_reply_that_waits_for_its_second_call_can_be_cancelled(shared, kind):
    shared.provider.retry_after = "20"
    with shared.stream({"content": "hello", "model": f"{kind}/say-1-0-s529@0"}) as stream:
        message_id = next(iter(stream)).data["message_id"]
        shared.provider.wait_requests()
        receipt = status(shared.api("POST", f"/api/v1/messages/{message_id}/cancel"), 200)
    assert receipt["status"] == "cancelled" and len(shared.provider.requests) == 1


################ Unicode: halves of surrogate pairs

HALVES = {
    "joined": (["a\ud83d", "\ude00b"], [("text", "a😀b")]),
    "high": (["a\ud83d", "b"], [("text", "a\ufffdb")]),
    "low": (["a", "\ude00b"], [("text", "a\ufffdb")]),
    "twice": (["\ud83d", "\ud83d", "\ude00"], [("text", "\ufffd😀")]),
    "only": (["\ud83d"], [("text", "\ufffd")]),
    "end": (["a\ud83d"], [("text", "a\ufffd")]),
    "type": ([("thinking", "a\ud83d"), "\ude00b"], [("thinking", "a\ufffd"), ("text", "\ufffdb")]),
    "tool": (["a\ud83d", ("tool", "x", {})], [("text", "a\ufffd"), ("tool_call", "x")]),
    "thinking": ([("thinking", "\ud83d"), ("thinking", "\ude00")], [("thinking", "😀")]),
}


@both
@pytest.mark.parametrize("case", HALVES)
def test_surrogate_halves_become_valid_text(shared, kind, case):
    said, expected = HALVES[case]
    shared.provider.script(*STREAMS[kind](*said))
    shared.provider.script(*STREAMS[kind]())  # where a tool was called
    events, message = ended(shared, f"{kind}/say-1-0")
    assert in_parts(first_round(message)) == expected and message["position"] == events[-1].data["position"]
    assert message["status"] == "complete" and text(events) == message["content"]


@both
def test_a_half_before_a_failure_is_kept_as_a_replacement(shared, kind):
    message = reply(shared, kind, "a\ud83d", stop=None)[1]
    assert (message["content"], message["error"]["code"]) == ("a\ufffd", "provider_incomplete")


@both
def test_surrogate_halves_in_tool_arguments_become_valid_text(shared, kind):
    call = reply(shared, kind, ("tool", "x", '{"a": "\\ud83d", "\\ud83d\\ude00": 1}', "id-1"))[1]["parts"][0]
    assert call["arguments"] == {"a": "\ufffd", "😀": 1}


@both
@pytest.mark.parametrize("code", [400, 200])
def test_a_surrogate_half_in_an_error_ends_the_reply(shared, kind, code):
    error = anthropic_error("a\ud83db", "x") if kind == "anthropic" else openai_error("a\ud83db", "x", 400)
    body = [*STREAMS[kind](stop=None), error] if code == 200 else [error.split(b"data: ")[1]]
    shared.provider.script(*body, status=code, content_type="text/event-stream" if code == 200 else "application/json")
    assert "a\ufffdb" in ended(shared, f"{kind}/any")[1]["error"]["message"]


################ What OpenAI-compatible servers differ in


def chunk(delta: dict, reason=None, **more) -> bytes:
    return data_line({"choices": [{"index": 0, "delta": delta, "finish_reason": reason}], **more})


def calls(*pieces: dict) -> bytes:
    return chunk({"tool_calls": list(pieces)})


STOP, DONE = chunk({}, "stop"), b"data: [DONE]\n\n"
USAGE = {"prompt_tokens": 7, "completion_tokens": 2}
NAMED = {"index": 0, "id": "id-1", "type": "function", "function": {"name": "f", "arguments": '{"a'}}
ODDITIES = {
    "empty choices first": ([data_line({"choices": []}), chunk({"content": "hi"}), STOP, DONE], [("text", "hi")]),
    "no choices at all": ([data_line({"object": "x"}), chunk({"content": "hi"}), STOP, DONE], [("text", "hi")]),
    "null delta": ([chunk(None), chunk({"content": "hi"}), STOP, DONE], [("text", "hi")]),
    "null content": ([chunk({"content": None}), chunk({"content": "hi"}), STOP, DONE], [("text", "hi")]),
    "reasoning": ([chunk({"reasoning": "hm"}), STOP, DONE], [("thinking", "hm")]),
    "reasoning_content": ([chunk({"reasoning_content": "hm"}), STOP, DONE], [("thinking", "hm")]),
    "reasoning twice": ([chunk({"reasoning": "hm", "reasoning_content": "hm"}), STOP, DONE], [("thinking", "hm")]),
    "both in one": ([chunk({"reasoning": "hm", "content": "hi"}), STOP], [("thinking", "hm"), ("text", "hi")]),
    "comments": ([b": PROCESSING\n\n", chunk({"content": "hi"}), b":\n\n", STOP, DONE], [("text", "hi")]),
    "no [DONE]": ([chunk({"content": "hi"}), STOP], [("text", "hi")]),
    "text after the reason": ([chunk({"content": "hi"}, "stop"), chunk({"content": ""}), DONE], [("text", "hi")]),
    "timings": ([chunk({"content": "hi"}, timings={"predicted_n": 1}), STOP, DONE], [("text", "hi")]),
    "byte order mark": ([b"\xef\xbb\xbf" + chunk({"content": "hi"}), STOP, DONE], [("text", "hi")]),
    "no space behind the colon": ([b'data:{"choices":[{"delta":{"content":"hi"}}]}\n\n', STOP], [("text", "hi")]),
}


@pytest.mark.parametrize("case", ODDITIES)
def test_oddities_of_openai_servers_are_taken_as_they_come(shared, case):
    steps, expected = ODDITIES[case]
    shared.provider.script(*steps)
    message = ended(shared, "openai/any")[1]
    assert (message["status"], in_parts(message)) == ("complete", expected), message["error"]


@pytest.mark.parametrize(
    "steps",
    [
        [chunk({"content": "hi"}, usage={"prompt_tokens": 7, "completion_tokens": 1}), chunk({}, "stop", usage=USAGE)],
        [chunk({"content": "hi"}), STOP, data_line({"choices": [], "usage": USAGE})],
        [chunk({"content": "hi"}), STOP, chunk({}, usage=USAGE)],
        [chunk({"content": "hi"}, usage=None), chunk({}, "stop", usage=USAGE), data_line({"usage": USAGE})],
    ],
    ids=["twice", "after the reason", "after the reason with a choice", "twice and null"],
)
def test_the_last_usage_counts_wherever_it_comes(shared, steps):
    shared.provider.script(*steps, DONE)
    usage = ended(shared, "openai/any")[1]["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["estimated"]) == (7, 2, False)


@pytest.mark.parametrize("error", [{"message": "no room", "code": 529}, "no room"])
def test_an_error_event_ends_the_reply(shared, error):
    frame = b"event: error\n" + data_line({"error": error})
    shared.provider.script(chunk({"content": "hi"}), frame)
    message = ended(shared, "openai/any")[1]
    assert message["status"] == "error" and "no room" in message["error"]["message"] and message["content"] == "hi"


def called(shared) -> dict:
    """The message of an answer that calls tools: its results go back, and a second answer ends it."""
    shared.provider.script(*openai_stream("over"))
    message = ended(shared, "openai/any")[1]
    told = [one["role"] for one in shared.provider.requests[1]["body"]["messages"]]
    calls = sum(part["type"] == "tool_call" for part in message["parts"])
    assert told == ["user", "assistant", *["tool"] * calls] and message["parts"][-1]["text"] == "over"
    return message


@pytest.mark.parametrize("later", [{"id": ""}, {"id": None}, {}], ids=["empty", "null", "none"])
def test_later_pieces_of_a_call_may_lack_its_id(shared, later):
    piece = {"index": 0, **later, "function": {"name": None, "arguments": '": 1}'}}
    shared.provider.script(calls(NAMED), calls(piece), chunk({}, "tool_calls"), DONE)
    message = first_round(called(shared))
    assert message["parts"] == [{"type": "tool_call", "tool_call_id": "id-1", "name": "f", "arguments": {"a": 1}}]


def test_pieces_of_two_calls_may_be_mixed(shared):
    second = {"index": 1, "id": "id-2", "function": {"name": "g", "arguments": ""}}
    ends = [{"index": 1, "function": {"arguments": "{}"}}, {"index": 0, "function": {"arguments": '": 1}'}}]
    shared.provider.script(calls(NAMED, second), calls(*ends), chunk({}, "tool_calls"), DONE)
    parts = first_round(called(shared))["parts"]
    assert [(part["name"], part["arguments"]) for part in parts] == [("f", {"a": 1}), ("g", {})]


def test_whole_calls_without_an_index_are_told_apart_by_their_ids(shared):
    """Gemini's compatible endpoint sends each parallel call whole, all without an index."""
    given = [{"id": i, "type": "function", "function": {"name": i, "arguments": "{}"}} for i in ("f", "g")]
    shared.provider.script(*(calls(call) for call in given), chunk({}, "tool_calls"), DONE)
    message = called(shared)
    assert [part["name"] for part in first_round(message)["parts"]] == ["f", "g"], message["error"]


def test_a_call_without_arguments_has_none(shared):
    shared.provider.script(calls({"index": 0, "id": "x", "function": {"name": "f"}}), chunk({}, "tool_calls"), DONE)
    assert ended(shared, "openai/any")[1]["parts"][0]["arguments"] == {}


def test_a_call_that_ends_with_stop_is_a_call_all_the_same(shared):
    shared.provider.script(calls({"index": 0, "id": "x", "function": {"name": "f", "arguments": "{}"}}), STOP, DONE)
    assert in_parts(first_round(called(shared))) == [("tool_call", "f")]


ODD_FRAMES = {
    "anthropic": {
        "unopened block": sse("content_block_delta", {"index": 7, "delta": {"type": "text_delta", "text": "x"}}),
        "no delta": sse("content_block_delta", {"index": 0}),
        "text that is none": sse("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": 5}}),
        "call given whole": sse(
            "content_block_start",
            {"index": 1, "content_block": {"type": "tool_use", "id": "i", "name": "f", "input": {"a": "\ud83d"}}},
        )
        + sse("content_block_stop", {"index": 1}),
        "odd reason": sse("message_delta", {"delta": {"stop_reason": 5}}),
        "odd usage": sse("message_delta", {"delta": {}, "usage": {"output_tokens": -5, "input_tokens": True}}),
        "unknown event": sse("something_new", {}),
    },
    "openai": {
        "choices that are none": data_line({"choices": {"a": 1}}),
        "null choice": data_line({"choices": [None]}),
        "text that is none": chunk({"content": 5}),
        "thought that is none": chunk({"reasoning": ["x"]}),
        "call that is none": chunk({"tool_calls": ["x"]}),
        "odd reason": chunk({}, 5),
        "reason with half": chunk({}, "a\ud83d"),
        "usage in words": chunk({}, usage={"prompt_tokens": "12", "completion_tokens": "1"}),
        "odd usage": chunk({}, usage={"prompt_tokens": 1.5, "completion_tokens": -1}),
        "usage that is none": chunk({}, usage="much"),
        "not a number": calls({"index": 0, "id": "x", "function": {"name": "f", "arguments": '{"a": NaN}'}}),
        "odd index": calls({"index": "0", "id": "x", "function": {"name": "f"}}, {"index": 1, "id": "y"}),
        "odd name": calls({"index": 0, "id": "x", "function": {"name": 5, "arguments": "{}"}}),
        "deep": b"data: " + b"[" * 100_000 + b"\n\n",
    },
}


@pytest.mark.parametrize("kind, case", [(kind, case) for kind, frames in ODD_FRAMES.items() for case in frames])
def test_an_odd_frame_never_leaves_a_reply_streaming(shared, kind, case):
    shared.expect_traceback = True  # a malformed frame may be logged with its place
    whole = STREAMS[kind](" t0")
    said = 3 if kind == "anthropic" else 2  # steps until " t0" is said
    shared.provider.script(*whole[:said], ODD_FRAMES[kind][case], *whole[said:])
    message = ended(shared, f"{kind}/any")[1]
    assert message["content"] == " t0" and message["status"] in ("complete", "error")
    assert message["error"] is None or message["error"]["code"] == "provider_error", message["error"]


LAST_FRAMES = {
    "usage in words": chunk({}, "stop", usage={"prompt_tokens": "12", "completion_tokens": "1"}),
    "usage below zero": chunk({}, "stop", usage={"prompt_tokens": 1.5, "completion_tokens": -1}),
    "reason that is none": chunk({}, 5),
    "reason with a half": chunk({}, "a\ud83d"),
}


@pytest.mark.parametrize("case", LAST_FRAMES)
def test_an_odd_last_frame_never_leaves_a_reply_streaming(shared, case):
    shared.provider.script(chunk({"content": "hi"}), LAST_FRAMES[case], DONE)
    message = ended(shared, "openai/any")[1]
    assert message["content"] == "hi" and message["usage"]["output_tokens"] >= 0


################ Which model, and what is said where there is none


@pytest.mark.parametrize("model", ["nobody/x", "nothing", "demo/nothing", "openai/", "openai", "/x"])
def test_an_unknown_model_is_refused_and_nothing_stored(shared, model):
    before = shared.sql("messages.db", "select count(*) from messages"), shared.sql(
        "liminal.db", "select id from threads"
    )
    error = status(shared.api("POST", "/api/v1/messages", {"content": "hello", "model": model}), 400, "unknown_model")
    assert error["field"] == "model" and repr(model) in error["message"]
    assert "named" in error["message"] or "liminal models" in error["message"] or "demo has" in error["message"]
    after = shared.sql("messages.db", "select count(*) from messages"), shared.sql(
        "liminal.db", "select id from threads"
    )
    assert before == after


@both
def test_a_provider_without_its_key_is_refused_with_what_to_do(own, kind):
    fields = {"kind": kind, "base_url": own.provider.url, "key_env": "LOST_KEY"}
    status(own.api("PUT", "/api/v1/providers/keyless", fields), 200)
    code, body = own.api("POST", "/api/v1/messages", {"content": "hello", "model": "keyless/say-1-0"})
    assert 400 <= code < 500 and body["error"]["code"] == "provider_auth" and own.provider.requests == []
    assert "LOST_KEY" in body["error"]["message"] and "providers key keyless" in body["error"]["message"]


def test_an_anthropic_provider_without_a_key_variable_is_told_what_it_lacks(shared):
    fields = {"kind": "anthropic", "base_url": shared.provider.url}
    code, body = shared.api("PUT", "/api/v1/providers/nokey", fields)
    if code == 200:
        _, body = shared.api("POST", "/api/v1/messages", {"content": "hello", "model": "nokey/say-1-0"})
        status(shared.api("DELETE", "/api/v1/providers/nokey"), 204)
    assert "key_env" in body["error"]["message"] and "None" not in body["error"]["message"]


def test_the_default_model_is_looked_for_at_each_message_in_the_promised_order(make_liminal):
    """One installation without keys: the default model is looked for anew at each message, in the promised order."""
    none = dict.fromkeys(("ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL", "OPENAI_API_KEY", "OPENAI_BASE_URL"))
    liminal = make_liminal(**none).start()
    url = liminal.provider.url
    steps = [
        ("", "demo/guide"),
        (f"OLLAMA_HOST={url}", "demo/guide"),  # the environment wins
        (f"OPENAI_BASE_URL={url}/v1", "openai/say-20-0"),
        (f"ANTHROPIC_BASE_URL={url}\nANTHROPIC_API_KEY=k", "anthropic/"),
        (f"ANTHROPIC_API_KEY=k\nANTHROPIC_BASE_URL={url}\nLIMINAL_MODEL=demo/load-3-0", "demo/load-3-0"),
        ("", "demo/guide"),
    ]
    for lines, expected in steps:
        write_env(liminal, lines)
        with liminal.stream({"content": "hello"}) as stream:
            assert next(iter(stream)).data["model"].startswith(expected), lines


def test_ollamas_first_model_is_the_default_where_it_answers(make_liminal, provider):
    none = dict.fromkeys(("ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL", "OPENAI_API_KEY", "OPENAI_BASE_URL"))
    liminal = make_liminal(**none, OLLAMA_HOST=provider.url.removeprefix("http://")).start()
    events, message = ended_default(liminal)
    assert message["model"] == "ollama/say-20-0" and "authorization" not in provider.requests[0]["headers"]
    write_env(liminal, "OPENAI_API_KEY=k\nOPENAI_BASE_URL=" + provider.openai_url)
    assert ended_default(liminal)[1]["model"] == "openai/say-20-0"
    models = status(liminal.api("GET", "/api/v1/models"), 200)["models"]
    assert [model["id"] for model in models if model["default"]] == ["openai/say-20-0"]


def ended_default(liminal: Liminal):
    events = liminal.send("hello")
    return events, status(liminal.api("GET", f"/api/v1/messages/{events[0].data['message_id']}"), 200)


def write_env(liminal: Liminal, lines: str):
    """Write data/env aside and rename it, as the commands do."""
    aside = liminal.data / "env.new"
    aside.write_text(lines + "\n")
    os.replace(aside, liminal.data / "env")


def test_a_key_written_while_the_servers_run_counts_at_the_next_message(own):
    fields = {"kind": "openai", "base_url": own.provider.openai_url, "key_env": "LATER_KEY"}
    status(own.api("PUT", "/api/v1/providers/later", fields), 200)
    assert own.api("POST", "/api/v1/messages", {"content": "hello", "model": "later/say-1-0"})[0] >= 400
    for key in ("sk-later-1", "sk-later-2"):
        write_env(own, f"# keys\nexport LATER_KEY='{key}'")
        assert text(own.send("hello", model="later/say-1-0")) == " t0"
        assert own.provider.requests[-1]["headers"]["authorization"] == f"Bearer {key}"


@pytest.mark.parametrize("lines", ["LIMINAL_CONTEXT=much", "LIMINAL_PROVIDER_TIMEOUTS=soon"])
def test_a_senseless_line_in_the_env_file_does_not_end_the_domain(liminal, lines):
    write_env(liminal, lines)
    liminal.api("POST", "/api/v1/messages", {"content": "hello", "model": "demo/load-1-0"})
    write_env(liminal, "")
    assert text(liminal.send("hello", model="demo/load-1-0")) == " t0"
    assert liminal.servers["domain"].process.poll() is None


def models_of(liminal: Liminal, provider: str) -> list[tuple]:
    models = status(liminal.api("GET", "/api/v1/models"), 200)["models"]
    return [(model["id"], model["available"], model["why"]) for model in models if model["provider"] == provider]


def test_list_models_asks_a_reachable_provider_for_its_list(shared):
    assert ("openai/echo", True, None) in models_of(shared, "openai")
    assert ("anthropic/echo", True, None) in models_of(shared, "anthropic")


def test_list_models_says_why_a_provider_cannot_be_used(own):
    fields = {"kind": "openai", "base_url": own.provider.openai_url, "key_env": "LOST_KEY", "models": ["m"]}
    status(own.api("PUT", "/api/v1/providers/lost", fields), 200)
    ((name, available, why),) = models_of(own, "lost")
    assert (name, available) == ("lost/m", False) and "LOST_KEY" in why and "providers key lost" in why
    ((_, available, why),) = models_of(own, "ollama")
    assert not available and "cannot reach http://127.0.0.1:" in why


def test_list_models_finds_a_provider_that_has_started_since(shared):
    """An unreachable one is not believed to be gone for a minute: the person has just started it."""
    (port,) = free_ports(1)
    fields = {"kind": "openai", "base_url": f"http://127.0.0.1:{port}"}
    status(shared.api("PUT", "/api/v1/providers/tardy", fields), 200)
    assert not models_of(shared, "tardy")[0][1]
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), ModelsHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        deadline = time.monotonic() + 20  # what could not be reached is believed for ten times as long as asking took
        while (found := models_of(shared, "tardy")) != [("tardy/late", True, None)] and time.monotonic() < deadline:
            pass
        server.shutdown()
    status(shared.api("DELETE", "/api/v1/providers/tardy"), 204)
    assert found == [("tardy/late", True, None)]


class ModelsHandler(http.server.BaseHTTPRequestHandler):
    """Knows one model."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "late"}]}')

    def log_message(self, *args):
        pass


################ The demo


def test_the_demo_says_what_it_is_and_how_to_set_a_key(shared):
    said = text(shared.send("hello", model="demo/guide"))
    assert "demo" in said and "not a language model" in said and "./run.sh providers key" in said


@pytest.mark.parametrize("model, count", [("load-300-0", 300), ("load-40-400", 40), ("load-0-0", 0)])
def test_the_demo_gives_exactly_the_tokens_that_were_asked_for(shared, model, count):
    events, message = ended(shared, f"demo/{model}")
    assert text(events) == message["content"] == "".join(f" t{n}" for n in range(count))
    assert message["usage"]["output_tokens"] == count and message["status"] == "complete"


def test_the_demo_keeps_to_its_rate(shared):
    assert ended(shared, "demo/load-41-100")[1]["timing"]["total_ms"] >= 390


################ Imports


def imported(liminal: Liminal) -> bool:
    """Whether the Domain has loaded what the SDK alone needs, by its shared library."""
    pid = liminal.servers["domain"].process.pid
    with open(f"/proc/{pid}/maps") as maps:
        return "jiter" in maps.read()


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux's /proc")
def test_the_sdk_is_imported_at_the_first_anthropic_message_and_does_not_stall_the_loop(liminal):
    liminal.send("hello", model="openai/say-1-0")
    liminal.api("GET", "/api/v1/models")
    assert not imported(liminal)
    with liminal.stream({"content": "hello", "model": "anthropic/say-1-0"}) as stream:
        answered = 0
        while not liminal.provider.requests[1:]:
            status(liminal.api("GET", f"{liminal.domain}/health"), 200)
            answered += imported(liminal) and not liminal.provider.requests[1:]
        assert text(list(stream)) == " t0"
    assert imported(liminal) and answered >= 5, "the loop stood still during the import"


def test_messages_that_come_while_the_sdk_is_imported_wait_for_it(liminal):
    streams = [liminal.stream({"content": "hello", "model": "anthropic/say-1-0"}) for _ in range(3)]
    replies = [liminal.read(stream) for stream in streams]
    assert [text(events) for events in replies] == [" t0"] * 3, [events[-1].data["error"] for events in replies]
