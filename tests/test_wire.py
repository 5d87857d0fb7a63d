"""What the three programs share: server-sent events, strict JSON, positions, settings, private files, metrics."""

import json
import os
from pathlib import Path

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from liminal import MAX_LINE, Decoder, Metrics, Settings, cut, joined, parse_json, read_env, size, sse, write_private

EXAMPLES = dict(derandomize=True, deadline=None, database=None, max_examples=300)


def decode(*pieces: bytes) -> list[tuple[str, str, str]]:
    decoder = Decoder()
    return [event for piece in pieces for event in decoder.feed(piece)]


def data_of(*pieces: bytes) -> list[str]:
    return [data for _, data, _ in decode(*pieces)]


def single_bytes(stream: bytes) -> list[bytes]:
    return [stream[i : i + 1] for i in range(len(stream))]


################ Decoder: however a stream is cut


VECTORS = ["bom", "crlf_split", "no_final_blank", "null", "utf8", "u2028", "split_utf8"]


@pytest.fixture
def vectors(fixtures_dir):
    return json.loads((fixtures_dir / "sse_vectors_half.json").read_bytes())


def test_all_vectors_are_run(vectors):
    assert set(vectors) == set(VECTORS)


@pytest.mark.parametrize("name", VECTORS)
def test_vector_whole(vectors, name):
    stream, expected = vectors[name]
    assert data_of(bytes.fromhex(stream)) == expected


@pytest.mark.parametrize("name", VECTORS)
def test_vector_byte_by_byte(vectors, name):
    stream, expected = vectors[name]
    assert data_of(*single_bytes(bytes.fromhex(stream))) == expected


@pytest.mark.parametrize("name", VECTORS)
def test_vector_cut_in_two_anywhere(vectors, name):
    stream, expected = bytes.fromhex(vectors[name][0]), vectors[name][1]
    cuts = [data_of(stream[:i], b"", stream[i:]) for i in range(len(stream) + 1)]
    assert cuts == [expected] * len(cuts)


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
@pytest.mark.parametrize("cuts", ["whole", "bytes"])
def test_line_ends_may_be_any_of_three(end, cuts):
    stream = "event: a\ndata: 1\ndata: 2\n\nid: 7\ndata: 3\n\n:\n".replace("\n", end).encode()
    expected = [("a", "1\n2", ""), ("message", "3", "7")]
    assert decode(*([stream] if cuts == "whole" else single_bytes(stream))) == expected


def test_cr_then_lf_in_the_next_piece_is_one_line_end():
    assert data_of(b"data: 1\r", b"\ndata: 2\r", b"\n\r", b"\n") == ["1\n2"]


def test_event_leaves_with_the_cr_of_its_blank_line():
    assert data_of(b"data: 1\r\r") == ["1"]


################ Decoder: the specification's examples and rules

SPECIFICATION = {
    "three lines are one event": (b"data: YHOO\ndata: +2\ndata: 10\n\n", [("message", "YHOO\n+2\n10", "")]),
    "types": (
        b"event: add\ndata: 73857293\n\nevent: remove\ndata: 2153\n\nevent: add\ndata: 113411\n\n",
        [("add", "73857293", ""), ("remove", "2153", ""), ("add", "113411", "")],
    ),
    "four blocks": (
        b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
        [("message", "first event", "1"), ("message", "second event", ""), ("message", " third event", "")],
    ),
    "empty data": (b"data\n\ndata\ndata\n\ndata:", [("message", "", ""), ("message", "\n", "")]),
    "one space is dropped": (b"data:test\n\ndata: test\n\n", [("message", "test", "")] * 2),
    "no data, no event": (b"event: a\n\ndata: x\n\n", [("message", "x", "")]),
    "an id without data stays": (b"id: 3\n\ndata: x\n\n", [("message", "x", "3")]),
    "an id stays until the next": (b"id: 3\ndata: x\n\ndata: y\n\n", [("message", "x", "3"), ("message", "y", "3")]),
    "an id with NUL is none": (b"id: 3\nid: a\0b\ndata: x\n\n", [("message", "x", "3")]),
    "the last type counts": (b"event: a\nevent: b\ndata: x\n\n", [("b", "x", "")]),
    "an empty type is none": (b"event: a\nevent\ndata: x\n\n", [("message", "x", "")]),
    "colons in values": (b"data:a:b: c\n\n", [("message", "a:b: c", "")]),
    "unknown fields": (b"foo: 1\nretry: 10\nDATA: 2\n data: 3\ndata : 4\ndata: x\n\n", [("message", "x", "")]),
    "a second BOM is text": (b"\xef\xbb\xbf\xef\xbb\xbfdata: 1\n\ndata: 2\n\n", [("message", "2", "")]),
    "wrong bytes are U+FFFD": (b"data: a\xffb\n\n", [("message", "a\ufffdb", "")]),
}


@pytest.mark.parametrize("name", SPECIFICATION)
def test_specification(name):
    stream, expected = SPECIFICATION[name]
    assert decode(stream) == expected and decode(*single_bytes(stream)) == expected


@pytest.mark.parametrize("character", list("\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"))
def test_other_line_separators_are_text(character):
    assert data_of(f"data: a{character}b\n\n".encode()) == [f"a{character}b"]


def test_line_of_the_greatest_length_is_taken():
    value = b"x" * (MAX_LINE - len("data:"))
    assert len(data_of(b"data:" + value[:-1], value[-1:] + b"\n\n")[0]) == len(value)


@pytest.mark.parametrize("pieces", [1, 2, 256])
def test_line_that_is_too_long_is_refused(pieces):
    stream = b"data:" + b"x" * MAX_LINE + b"\n\n"
    step = len(stream) // pieces + 1
    with pytest.raises(ValueError, match=str(MAX_LINE)):
        decode(*(stream[i : i + step] for i in range(0, len(stream), step)))


def test_line_without_an_end_is_refused_when_it_is_too_long():
    with pytest.raises(ValueError, match=str(MAX_LINE)):
        decode(b"data:", b"x" * MAX_LINE)


################ sse: what it writes is read back

TEXT = st.text() | st.text("\r\n\x85\u2028 :\ufeff\0a") | st.text(st.characters(max_codepoint=0x20))
EVENTS = st.lists(TEXT.map(lambda text: {"type": "text", "text": text}), max_size=4)


def encoded(events) -> tuple[bytes, list[tuple]]:
    """The events as a stream, and as any decoder should give them back."""
    places = [sum(map(size, events[: i + 1])) for i in range(len(events))]
    return b"".join(map(sse, events, places)), [("text", e, str(place)) for e, place in zip(events, places)]


@settings(**EXAMPLES)
@given(EVENTS, st.integers(1, 40))
def test_any_text_comes_back(events, step):
    stream, expected = encoded(events)
    seen = decode(*(stream[i : i + step] for i in range(0, len(stream), step)))
    assert [(kind, json.loads(data), place) for kind, data, place in seen] == expected


@settings(**EXAMPLES)
@given(EVENTS)
def test_another_decoder_reads_it_too(events):
    stream, expected = encoded(events)
    headers, request = {"content-type": "text/event-stream"}, httpx2.Request("GET", "http://localhost")
    seen = httpx2.EventSource(httpx2.Response(200, headers=headers, content=stream, request=request))
    assert [(event.event, json.loads(event.data), event.id) for event in seen] == expected


@settings(**EXAMPLES)
@given(st.lists(st.sampled_from([b"data", b"id", b"event", b":", b" ", b"\r", b"\n", b"x", "é".encode(), b"\0"])))
def test_any_stream_is_decoded_as_by_another_decoder(words):
    stream = b"".join(words) + b"\n\n"  # the other one also gives an event that was cut off
    headers, request = {"content-type": "text/event-stream"}, httpx2.Request("GET", "http://localhost")
    others = httpx2.EventSource(httpx2.Response(200, headers=headers, content=stream, request=request))
    expected = [(event.event, event.data, event.id) for event in others if event.data]
    assert [event for event in decode(*single_bytes(stream)) if event[1]] == expected


def test_event_is_three_lines_in_utf8():
    assert (
        sse({"type": "text", "text": "é\n"}, 2)
        == 'event: text\nid: 2\ndata: {"type":"text","text":"é\\n"}\n\n'.encode()
    )


def test_event_without_a_position_has_no_id():
    assert sse({"type": "start"}) == b'event: start\ndata: {"type":"start"}\n\n'


################ parse_json

REFUSED = {
    "NaN": b'{"a": NaN}',
    "Infinity": b"[Infinity]",
    "minus Infinity": b"-Infinity",
    "1e999": b"1e999",
    "-1e999": b'{"a": [-1e999]}',
    "duplicate keys": b'{"a": 1, "a": 1}',
    "duplicate keys within": b'[{"b": {"a": 1, "\\u0061": 2}}]',
    "lone high surrogate": b'"\\ud800"',
    "lone low surrogate": b'["\\udc00x"]',
    "lone surrogate as key": b'{"\\ud83d": 1}',
    "2**63": b"9223372036854775808",
    "-2**63-1": b"-9223372036854775809",
    "5000 digits": b"1" * 5000,
    "5000 digits within": b'{"a": -' + b"9" * 5000 + b"}",
    "deep lists": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "invalid UTF-8": b'"\xff"',
    "a surrogate in UTF-8": b'"\xed\xa0\x80"',
    "an overlong form": b'"\xc0\xaf"',
    "UTF-16": "{}".encode("utf-16"),
    "UTF-16 without BOM": '{"a": 1}'.encode("utf-16-le"),
    "BOM": b"\xef\xbb\xbf{}",
    "nothing": b"",
    "two values": b"{} {}",
    "a trailing comma": b"[1,]",
    "a leading zero": b"01",
    "a raw line break in a text": b'"a\nb"',
    "single quotes": b"{'a': 1}",
}


@pytest.mark.parametrize("name", REFUSED)
def test_json_is_refused(name):
    with pytest.raises(ValueError):
        parse_json(REFUSED[name])


ACCEPTED = {
    "2**63-1": (b"9223372036854775807", 2**63 - 1),
    "-2**63": (b"-9223372036854775808", -(2**63)),
    "a large float": (b"1e308", 1e308),
    "a float that is an integer": (b"1.0", 1.0),
    "many decimals": (b"0." + b"1" * 5000, 1 / 9),
    "a surrogate pair": (b'"\\ud83d\\ude00"', "😀"),
    "NUL": (b'"\\u0000"', "\0"),
    "text that looks like a number": (b'"NaN"', "NaN"),
    "the same key in two objects": (b'[{"a": 1}, {"a": 2}]', [{"a": 1}, {"a": 2}]),
    "some depth": (b"[" * 90 + b"]" * 90, json.loads("[" * 90 + "]" * 90)),
    "white space": (b" \r\n\t{} \n", {}),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_json_is_taken(name):
    data, expected = ACCEPTED[name]
    assert parse_json(data) == expected and type(parse_json(data)) is type(expected)


################ Positions: size, joined, cut
# `atoms` spells a reply out, one item a position: what all three functions must keep.

GRAPHEMES = ["a", " ", "\n", "\0", "é", "e\u0301", "日本", "👍🏽", "👨\u200d👩\u200d👧", "🇩🇪", "\u0301", "\u202e"]
SOME_TEXT = st.lists(st.sampled_from(GRAPHEMES), max_size=5).map("".join)
PARTS = st.lists(
    st.one_of(
        st.builds(lambda kind, text: {"type": kind, "text": text}, st.sampled_from(["text", "thinking"]), SOME_TEXT),
        st.builds(
            lambda n: {"type": "tool_call", "tool_call_id": n, "name": "x", "arguments": {}}, st.text(max_size=2)
        ),
        st.builds(
            lambda n: {"type": "tool_result", "tool_call_id": n, "name": "x", "text": n * 9}, st.text(max_size=2)
        ),
    ),
    max_size=8,
)


def atoms(events) -> list:
    found = []
    for event in events:
        kind = event["type"]
        found += [(kind, one) for one in event["text"]] if kind in ("text", "thinking") else [(kind, str(event))]
    return found


@settings(**EXAMPLES)
@given(PARTS)
def test_sizes_add_up(events):
    assert sum(map(size, events)) == len(atoms(events)) == sum(map(size, joined(events)))


@settings(**EXAMPLES)
@given(PARTS)
def test_joining_keeps_the_content(events):
    assert atoms(joined(events)) == atoms(events)


@settings(**EXAMPLES)
@given(PARTS)
def test_joining_leaves_no_texts_of_one_type_side_by_side(events):
    kinds = [event["type"] for event in joined(events)]
    assert not any(a == b and a in ("text", "thinking") for a, b in zip(kinds, kinds[1:]))
    assert joined(joined(events)) == joined(events)


@settings(**EXAMPLES)
@given(PARTS, st.integers(0, 60))
def test_cutting_takes_so_many_positions(events, count):
    before = json.dumps(events)
    assert atoms(cut(events, count)) == atoms(events)[count:] == atoms(cut(joined(events), count))
    assert json.dumps(events) == before


@settings(**EXAMPLES)
@given(PARTS, st.integers(0, 20), st.integers(0, 20))
def test_cutting_twice_is_cutting_once(events, first, second):
    assert atoms(cut(cut(events, first), second)) == atoms(cut(events, first + second))


def test_position_counts_code_points():
    assert [size({"type": "text", "text": text}) for text in ("é", "e\u0301", "日本", "👍🏽", "👨\u200d👩\u200d👧")] == [
        1,
        2,
        2,
        2,
        5,
    ]


@pytest.mark.parametrize("kind", ["start", "done"])
def test_ends_of_a_stream_have_no_size(kind):
    assert size({"type": kind, "text": "x"}) == 0


def test_cut_in_a_text_keeps_what_follows():
    call = {"type": "tool_call", "tool_call_id": "1", "name": "x", "arguments": {}}
    assert cut([{"type": "text", "text": "abc"}, call], 2) == [{"type": "text", "text": "c"}, call]


def test_done_is_left_after_the_whole_is_cut():
    assert cut([{"type": "text", "text": "abc"}, {"type": "done"}], 3) == [{"type": "done"}]


################ Settings


@pytest.fixture
def load(tmp_path, monkeypatch):
    """load(env_file, **environment): the settings of a process that has only these."""
    for name in [
        name for name in os.environ if name.startswith(("LIMINAL_", "EDGE_", "ANTHROPIC_", "OPENAI_", "OLLAMA_"))
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LIMINAL_DATA", str(tmp_path))

    def load(env_file: str | bytes = "", **environment):
        (tmp_path / "env").write_bytes(env_file if isinstance(env_file, bytes) else env_file.encode())
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return Settings.load()

    return load


def test_defaults(load, tmp_path):
    found = load()
    assert (found.data, found.mcp, found.context) == (tmp_path, tmp_path / "mcp.json", 100_000)
    assert (found.domain_url, found.url) == ("http://127.0.0.1:8766", "http://127.0.0.1:8765")


def test_data_env_is_read(load):
    assert load("LIMINAL_MODEL=demo/guide\nLIMINAL_EDGE_PORT=9000\n").url == "http://127.0.0.1:9000"


def test_environment_wins(load):
    found = load("LIMINAL_MODEL=file/model\nLIMINAL_EDGE_PORT=9000\n", LIMINAL_MODEL="environment/model")
    assert (found.model, found.edge_port) == ("environment/model", 9000)


def test_other_variables_stand_in_values(load):
    found = load("GROQ_API_KEY=from-file\nMISTRAL_API_KEY=from-file", MISTRAL_API_KEY="from-environment")
    assert (found.values["GROQ_API_KEY"], found.values["MISTRAL_API_KEY"]) == ("from-file", "from-environment")


def test_secrets_are_not_printed(load):
    assert "sk-other-secret" not in repr(load("OTHER_API_KEY=sk-other-secret"))


@pytest.mark.parametrize("name", ["ANTHROPIC_API_KEY", "OPENAI_API_KEY", "LIMINAL_API_KEY", "EDGE_PRIVATE_KEY"])
def test_keys_are_not_printed(load, name):
    assert "the-secret" not in repr(load(f"{name}=the-secret"))


BAD = [("LIMINAL_EDGE_PORT", value) for value in ("abc", "0", "-1", "65536", "1.5", "8765 8766")]
BAD += [("LIMINAL_CONTEXT", "many"), ("LIMINAL_CONTEXT", "9" * 30), ("LIMINAL_QUEUE_SIZE", "0")]
BAD += [("LIMINAL_PROVIDER_TIMEOUTS", value) for value in ("600", "a,b", "1,2,3", "-1,5", "nan,5", "0,0")]


@pytest.mark.parametrize("name, value", BAD)
def test_bad_number_ends_in_one_line(load, name, value):
    with pytest.raises(SystemExit) as ended:
        load(**{name: value})
    assert name in str(ended.value) and value in str(ended.value) and "\n" not in str(ended.value)


@pytest.mark.parametrize("env_file", [b"LIMINAL_CONTEXT=many\n", b"\xff\xfeA\0=\0", b"A=\xe9\n"], ids=repr)
def test_bad_data_env_ends_in_one_line(load, env_file):
    with pytest.raises(SystemExit) as ended:
        load(env_file)
    assert "\n" not in str(ended.value)


BAD_URLS = ["http://127.0.0.1:99999", "http://127.0.0.1:x", "127.0.0.1:8765", "localhost", "http://", "http://[::1"]


@pytest.mark.parametrize("url", BAD_URLS)
def test_bad_url_ends_in_one_line(shared, url):
    done = shared.cli("threads", env={"LIMINAL_URL": url})
    assert (
        done.returncode in (1, 3) and done.stderr.startswith("liminal: ") and done.stderr.count("\n") == 1
    ), done.stderr


@pytest.mark.parametrize("command", ["threads", "up", "status", "down"])
def test_bad_number_is_one_line_of_the_command(shared, command):
    done = shared.cli(command, env={"LIMINAL_CONTEXT": "many"})
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("liminal: LIMINAL_CONTEXT='many' ")


ENV_FORMS = {
    "A=1": {"A": "1"},
    "export A=1": {"A": "1"},
    " A = 1 ": {"A": "1"},
    "A='a b'": {"A": "a b"},
    'A="a b"': {"A": "a b"},
    "A=a=b==": {"A": "a=b=="},
    "A=": {"A": ""},
    "# A=1": {},
    "  # A=1": {},
    "A": {},
    "\n\nA=1\n\n": {"A": "1"},
    "A=1\r\nB=2\r\n": {"A": "1", "B": "2"},
    "A=1\nA=2": {"A": "2"},
    "A=é": {"A": "é"},
    "A=it's": {"A": "it's"},
    "A=x#y": {"A": "x#y"},
    "A=a\u2028b": {"A": "a\u2028b"},
}


@pytest.mark.parametrize("text", ENV_FORMS, ids=ascii)
def test_form_of_env_line(tmp_path, text):
    (tmp_path / "env").write_bytes(text.encode())
    assert read_env(tmp_path / "env") == ENV_FORMS[text]


def test_no_env_file_is_an_empty_one(tmp_path):
    assert read_env(tmp_path / "env") == {}


def test_fresh_notices_a_changed_file(load):
    old = load("LIMINAL_MODEL=one/model")
    assert load("LIMINAL_MODEL=another/model") and old.fresh().model == "another/model"


def test_fresh_notices_a_file_of_the_same_length_and_time(load, tmp_path):
    old, seen = load("LIMINAL_MODEL=one/model"), (tmp_path / "env").stat()
    write_private(tmp_path / "env", "LIMINAL_MODEL=two/model")
    os.utime(tmp_path / "env", ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert old.fresh().model == "two/model"


def test_fresh_notices_a_file_that_comes_and_goes(load, tmp_path):
    (tmp_path / "env").unlink() if (tmp_path / "env").exists() else None
    none = Settings.load()
    some = load("LIMINAL_MODEL=one/model") and none.fresh()
    (tmp_path / "env").unlink()
    assert (none.model, some.model, some.fresh().model) == ("", "one/model", "")


def test_fresh_is_the_same_without_a_change(load):
    found = load("LIMINAL_MODEL=one/model")
    assert found.fresh() is found


def test_running_servers_survive_a_bad_data_env(liminal):
    write_private(liminal.data / "env", "LIMINAL_CONTEXT=many\n")
    liminal.api("GET", "/api/v1/models")
    write_private(liminal.data / "env", "")
    assert liminal.api("GET", "/health")[1]["domain"] == "ok"
    assert liminal.api("GET", "/api/v1/models")[0] == 200


################ Private files


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.fixture
def open_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def test_private_file_is_its_owners_alone(tmp_path, open_umask):
    write_private(tmp_path / "x", "é")
    assert mode(tmp_path / "x") == 0o600 and (tmp_path / "x").read_bytes() == "é".encode()


def test_private_file_replaces_an_open_one(tmp_path, open_umask):
    (tmp_path / "x").write_text("old")
    (tmp_path / "x").chmod(0o644)
    write_private(tmp_path / "x", "new")
    assert mode(tmp_path / "x") == 0o600 and (tmp_path / "x").read_text() == "new"


def test_private_file_is_written_whole_or_not_at_all(tmp_path):
    write_private(tmp_path / "x", "old")
    with pytest.raises(ValueError):
        write_private(tmp_path / "x", "new \ud800")
    assert (tmp_path / "x").read_text() == "old" and os.listdir(tmp_path) == ["x"]


################ Metrics, judged by Prometheus' own parser


def samples(text: str) -> dict:
    """{family: (type, help, {(name, labels): value})}, with no series twice."""
    found = {}
    for family in text_string_to_metric_families(text):
        series = [((one.name, tuple(sorted(one.labels.items()))), one.value) for one in family.samples]
        assert len(dict(series)) == len(series), f"a series stands twice: {series}"
        found[family.name] = family.type, family.documentation, dict(series)
    return found


@pytest.fixture
def numbers():
    return Metrics({"c_total": ("a counter", None), "g": ("a gauge", None), "h": ("a histogram", (0.1, 1, 10))})


def test_counter_that_never_counted_is_zero(numbers):
    assert samples(numbers.text())["c"] == ("counter", "a counter", {("c_total", ()): 0})


def test_counter_counts(numbers):
    numbers.count("c_total"), numbers.count("c_total", 2.5)
    assert samples(numbers.text())["c"][2] == {("c_total", ()): 3.5} and numbers.value("c_total") == 3.5


def test_counter_with_labels(numbers):
    for code in ("x", "y", "x"):
        numbers.count("c_total", code=code, kind="k")
    expected = {("c_total", (("code", code), ("kind", "k"))): n for code, n in {"x": 2, "y": 1}.items()}
    assert samples(numbers.text())["c"][2] == expected


def test_order_of_labels_makes_no_other_series(numbers):
    numbers.count("c_total", a="1", b="2"), numbers.count("c_total", b="2", a="1")
    assert samples(numbers.text())["c"][2] == {("c_total", (("a", "1"), ("b", "2"))): 2}


@pytest.mark.parametrize("value", ['say "x"', "back\\slash", "two\nlines", "é 👍", "a,b={}", ""])
def test_label_may_hold_any_text(numbers, value):
    numbers.count("c_total", code=value)
    assert samples(numbers.text())["c"][2] == {("c_total", (("code", value),)): 1}


def test_gauge_is_read_when_asked(numbers):
    held = []
    numbers.gauges["g"] = lambda: len(held)
    held.append(1)
    assert samples(numbers.text())["g"] == ("gauge", "a gauge", {("g", ()): 1})


def test_histogram_is_cumulative(numbers):
    for value in (0.05, 0.1, 0.5, 10, 11):
        numbers.observe("h", value)
    kind, _, series = samples(numbers.text())["h"]
    buckets = {labels[0][1]: n for (name, labels), n in series.items() if name == "h_bucket"}
    assert kind == "histogram" and buckets == {"0.1": 2, "1": 3, "10": 4, "+Inf": 5}
    assert (series["h_count", ()], series["h_sum", ()]) == (5, pytest.approx(21.65))


def test_histogram_that_saw_nothing_is_complete(numbers):
    assert samples(numbers.text())["h"][2]["h_count", ()] == 0 and numbers.quantile("h", 0.5) is None


def test_quantile_is_the_upper_limit_of_its_bucket(numbers):
    for value in (0.05, 0.05, 0.5, 99):
        numbers.observe("h", value)
    assert [numbers.quantile("h", q) for q in (0.5, 0.75, 1)] == [0.1, 1, 10]


@pytest.mark.parametrize("server", ["domain", "edge"])
def test_metrics_of_a_server_are_read_by_prometheus(shared, server):
    shared.send("hi", model="openai/say-20-0")
    response = shared.client.get(getattr(shared, server) + "/metrics")
    found = samples(response.text)
    assert response.headers["content-type"].startswith("text/plain") and len(found) > 5
    assert found[f"liminal_{server}_ttft_seconds"][2][f"liminal_{server}_ttft_seconds_count", ()] >= 1
