"""contracts.json is valid, is what both servers serve, and is checked by a checker that agrees with the standard."""

import ast
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, ValidationError, validators
from openapi_spec_validator import validate

import liminal as wire
from conftest import Server, free_ports, status

ROOT = Path(__file__).resolve().parent.parent
CONTRACT = json.loads((ROOT / "contracts.json").read_bytes())
SCHEMAS = CONTRACT["components"]["schemas"]
FILES = ("liminal.py", "liminal_domain.py", "liminal_edge.py", "contracts.json", "schema.sql")
OPERATIONS = {
    operation["operationId"]: {"method": method.upper(), "path": path, **operation}
    for path, methods in CONTRACT["paths"].items()
    for method, operation in methods.items()
}
ROUTES = dict(  # the design's table, as far as it names a route; programs outside rely on it
    send_message="POST /api/v1/messages",
    get_message="GET /api/v1/messages/{message_id}",
    stream_message="GET /api/v1/messages/{message_id}/stream",
    cancel_message="POST /api/v1/messages/{message_id}/cancel",
    retry_message="POST /api/v1/messages/{message_id}/retry",
    add_reaction="POST /api/v1/messages/{message_id}/reactions",
    remove_reaction="DELETE /api/v1/messages/{message_id}/reactions/{emoji}",
    create_thread="POST /api/v1/threads",
    list_threads="GET /api/v1/threads",
    get_thread="GET /api/v1/threads/{thread_id}",
    update_thread="PATCH /api/v1/threads/{thread_id}",
    delete_thread="DELETE /api/v1/threads/{thread_id}",
    fork_thread="POST /api/v1/threads/{thread_id}/fork",
    list_messages="GET /api/v1/threads/{thread_id}/messages",
    search_messages="GET /api/v1/search",
    list_runs="GET /api/v1/runs",
    list_overflow="GET /api/v1/overflow",
    list_models="GET /api/v1/models",
    list_tools="GET /api/v1/tools",
    list_providers="GET /api/v1/providers",
    put_provider="PUT /api/v1/providers/{name}",
    delete_provider="DELETE /api/v1/providers/{name}",
    create_user="POST /api/v1/users",
    list_users="GET /api/v1/users",
    delete_user="DELETE /api/v1/users/{user_id}",
    create_key="POST /api/v1/keys",
    list_keys="GET /api/v1/keys",
    revoke_key="DELETE /api/v1/keys/{key_id}",
    create_session="POST /api/v1/session",
    delete_session="DELETE /api/v1/session",
    get_stats="GET /api/v1/stats",
    health="GET /health",
    metrics="GET /metrics",
    contract="GET /contracts.json",
)
LATER = {"fork_thread", "search_messages", "list_overflow", "list_tools", "get_stats"}  # issues of their own
CODES = """invalid_request unauthorized forbidden not_found conflict thread_busy too_large rate_limited unknown_model
    provider_auth provider_overloaded provider_incomplete provider_timeout provider_error domain_unavailable
    interrupted storage_full internal""".split()


def tagged(tag):
    return {name: operation for name, operation in OPERATIONS.items() if tag in operation["tags"]}


def deref(schema):
    return SCHEMAS[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


################ The document


def test_contract_is_valid_openapi():
    assert CONTRACT["openapi"].startswith("3.1")
    validate(CONTRACT)


def test_operation_ids_are_unique():
    assert len(OPERATIONS) == sum(map(len, CONTRACT["paths"].values()))


def test_routes_are_those_of_the_design():
    added = {"get_status"}  # what `liminal status` asks for; the design's table is silent on it
    built = {name: f"{one['method']} {one['path']}" for name, one in tagged("edge").items() if name not in added}
    assert built == {name: route for name, route in ROUTES.items() if name in built}


def test_every_route_of_this_stage_is_built():
    assert set(ROUTES) - set(tagged("edge")) <= LATER


def test_domain_routes_stand_apart():
    own = {name: one for name, one in OPERATIONS.items() if one["tags"] == ["domain"]}
    assert all(name.startswith("domain_") and one["path"].startswith("/domain/") for name, one in own.items())
    assert set(tagged("domain")) == {*own, "health", "metrics"}


def test_every_domain_operation_names_a_scope():
    own = [one for one in OPERATIONS.values() if one["tags"] == ["domain"]]
    assert own and all(one["security"][0]["edge"] for one in own)


def test_error_codes_are_those_of_the_design():
    assert set(CODES) <= set(CONTRACT["x-errors"])


def test_error_codes_and_their_schema_agree():
    assert set(CONTRACT["x-errors"]) == set(SCHEMAS["ErrorDetail"]["properties"]["code"]["enum"])


@pytest.mark.parametrize("script", FILES[:3])
def test_code_raises_only_known_errors(script):
    calls = [node for node in ast.walk(ast.parse((ROOT / script).read_text())) if isinstance(node, ast.Call)]
    named = [call.args[0] for call in calls if isinstance(call.func, ast.Name) and call.func.id == "Problem"]
    codes = {node.value for arg in named if not isinstance(arg, ast.Subscript) for node in strings(arg)}
    assert codes and codes <= set(CONTRACT["x-errors"])


def strings(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


################ Both servers serve it, and nothing else


def test_edge_serves_each_operation(shared):
    paths = {name: (one["method"], one["path"].format_map(Ids())) for name, one in tagged("edge").items()}
    answers = {name: shared.api(method, path, key="")[0] for name, (method, path) in paths.items()}
    assert answers == {name: 401 if OPERATIONS[name]["security"] else 200 for name in paths}


def test_domain_serves_each_operation(shared):
    paths = {name: (one["method"], one["path"].format_map(Ids())) for name, one in tagged("domain").items()}
    answers = {name: shared.api(method, shared.domain + path)[0] for name, (method, path) in paths.items()}
    assert answers == {name: 401 if OPERATIONS[name]["security"] else 200 for name in paths}


class Ids(dict):
    def __missing__(self, name):
        return "abcd"


def test_edge_serves_no_domain_routes(shared):
    status(shared.api("GET", "/domain/threads"), 404, "not_found")


def test_domain_serves_no_client_routes(shared):
    status(shared.api("GET", shared.domain + "/api/v1/threads"), 404, "not_found")


def test_unknown_path_has_the_one_error_shape(shared):
    status(shared.api("GET", "/api/v1/nothing"), 404, "not_found")


def test_wrong_method_has_the_one_error_shape(shared):
    status(shared.api("PUT", "/api/v1/messages"), 405, "method_not_allowed")


def test_contract_is_served_as_it_is(shared):
    assert status(shared.api("GET", "/contracts.json", key=""), 200) == CONTRACT


################ Drift stops the start


def start(folder, server, change):
    """(exit code, stdout's first line, stderr) of a server beside a changed contract; one that does start is ended."""
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    document = json.loads(json.dumps(CONTRACT))
    document = change(document) or document
    (folder / "contracts.json").write_text(document if isinstance(document, str) else json.dumps(document))
    domain, edge = map(str, free_ports(2))
    env = {"PATH": os.environ["PATH"], "LIMINAL_DATA": str(folder / "data")}
    env |= {"LIMINAL_DOMAIN_PORT": domain, "LIMINAL_EDGE_PORT": edge}
    command, pipe = [sys.executable, folder / f"liminal_{server}.py"], subprocess.PIPE
    with subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True) as process:
        ready = process.stdout.readline()
        if ready:
            process.terminate()
        errors = process.stderr.read()
    return process.returncode, ready, errors


def refuses(folder, server, change, *named):
    """Assert that a server does not start beside such a contract, and says why in one line."""
    code, ready, errors = start(folder, server, change)
    assert not ready, f"it started: {ready}"
    assert code == 1 and errors.startswith("liminal: ") and errors.count("\n") == 1, errors
    assert all(name in errors for name in named), errors


def remove_operation(document, tag):
    del document["paths"]["/domain/runs" if tag == "domain" else "/api/v1/runs"]


def add_operation(document, tag):
    source = document["paths"]["/domain/runs" if tag == "domain" else "/api/v1/runs"]["get"]
    document["paths"]["/nothing"] = {"get": {**source, "operationId": f"{tag}_list_nothing"}}


def rename_operation(document, tag):
    document["paths"]["/domain/runs" if tag == "domain" else "/api/v1/runs"]["get"]["operationId"] = f"{tag}_nothing"


def test_unchanged_copy_starts(tmp_path):
    code, ready, errors = start(tmp_path, "edge", lambda document: None)
    assert ready.startswith("liminal edge ready on http://127.0.0.1:") and code == 0, errors


@pytest.mark.parametrize("server", ["domain", "edge"])
def test_handler_without_an_operation_stops_the_start(tmp_path, server):
    name = "domain_list_runs" if server == "domain" else "list_runs"
    refuses(tmp_path, server, lambda document: remove_operation(document, server), name)


@pytest.mark.parametrize("server", ["domain", "edge"])
def test_operation_without_a_handler_stops_the_start(tmp_path, server):
    refuses(tmp_path, server, lambda document: add_operation(document, server), f"{server}_list_nothing")


def test_renamed_operation_stops_the_start(tmp_path):
    refuses(tmp_path, "edge", lambda document: rename_operation(document, "edge"), "list_runs", "edge_nothing")


def test_operation_that_stands_twice_stops_the_start(tmp_path):
    def change(document):
        document["paths"]["/api/v1/again"] = document["paths"]["/api/v1/runs"]

    refuses(tmp_path, "edge", change, "list_runs")


def put(*way):
    """A change of the contract: the last of `way` is put where the others lead."""
    *steps, name, value = way

    def change(document):
        for step in steps:
            document = document[step]
        document[name] = value

    return change


SEND = "paths", "/api/v1/messages", "post"
STREAM = "paths", "/api/v1/messages/{message_id}/stream", "get"
PLACES = {  # every place in which the contract has a schema, or refers to something
    "component": ("components", "schemas", "Thread", "properties", "title"),
    "nested": ("components", "schemas", "SendMessage", "properties", "tools", "anyOf", 1, "items"),
    "parameter": (*STREAM, "parameters", 1, "schema"),
    "body": (*SEND, "requestBody", "content", "application/json", "schema"),
    "reply": (*SEND, "responses", "202", "content", "application/json", "schema"),
    "event stream": (*SEND, "responses", "200", "content", "text/event-stream", "schema"),
    "error": ("components", "responses", "Error", "content", "application/json", "schema"),
}
OFTEN = {"component", "event stream"}  # a process each: the others are for the long run
SOME_PLACES = [place if place in OFTEN else pytest.param(place, marks=pytest.mark.slow) for place in PLACES]


@pytest.mark.parametrize("place", SOME_PLACES)
def test_unknown_keyword_stops_the_start(tmp_path, place):
    refuses(tmp_path, "edge", put(*PLACES[place], {"type": "array", "prefixItems": []}), "prefixItems")


@pytest.mark.parametrize("place", SOME_PLACES)
def test_reference_to_nothing_stops_the_start(tmp_path, place):
    refuses(tmp_path, "edge", put(*PLACES[place], {"$ref": "#/components/schemas/Nothing"}), "Nothing")


def test_reference_of_a_reply_to_nothing_stops_the_start(tmp_path):
    change = put(*SEND, "responses", "default", {"$ref": "#/components/responses/Nothing"})
    refuses(tmp_path, "edge", change, "Nothing")


def test_reference_of_a_parameter_to_nothing_stops_the_domain(tmp_path):
    change = put("paths", "/domain/runs", "get", "parameters", [{"$ref": "#/components/parameters/Nothing"}])
    refuses(tmp_path, "domain", change, "Nothing")


WRONG = [{"type": "strng"}, {"pattern": "("}, {"properties": []}, {"$ref": "#Thread"}, {"anyOf": {}}, 5]


@pytest.mark.slow
@pytest.mark.parametrize("schema", WRONG, ids=str)
def test_schema_that_is_none_stops_the_start(tmp_path, schema):
    refuses(tmp_path, "edge", put(*PLACES["component"], schema))


def test_contract_that_is_no_json_stops_the_start(tmp_path):
    refuses(tmp_path, "edge", lambda document: "{", "contracts.json")


################ A wrong event fails loudly at each hop


def with_wrong_text_event(liminal, folder, hop):
    """Run one server beside a contract in which the events that really come are wrong."""
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    document = json.loads(json.dumps(CONTRACT))
    document["components"]["schemas"]["TextEvent"]["required"].append("nonsense")
    (folder / "contracts.json").write_text(json.dumps(document))
    liminal.start("edge" if hop == "domain" else "domain")
    liminal.servers[hop] = Server(folder / f"liminal_{hop}.py", liminal.env, liminal.log_path(hop))
    assert liminal.servers[hop].spoke.wait(20) and liminal.servers[hop].lines, liminal.log(hop)


@pytest.mark.parametrize("hop", ["domain", "edge"])
def test_wrong_event_fails_loudly(make_liminal, tmp_path, hop):
    liminal = make_liminal()
    liminal.expect_traceback = True
    with_wrong_text_event(liminal, tmp_path, hop)
    with liminal.stream({"content": "hi", "model": "openai/gate-3-0"}) as stream:
        events = iter(stream)
        assert next(events).type == "start"
        liminal.provider.open_gate()
        *texts, done = events
    error = done.data["error"]
    assert (done.data["status"], error["code"], texts) == ("error", "internal", [])
    assert "nonsense" in error["message"] and "nonsense" in liminal.log(hop)


################ The checker against the standard's own tests

SUITE = """additionalProperties allOf anyOf boolean_schema const default defs enum exclusiveMaximum exclusiveMinimum
    format infinite-loop-detection items maxItems maxLength maxProperties maximum minItems minLength minProperties
    minimum not oneOf pattern properties ref required type uniqueItems vocabulary""".split()


@pytest.fixture(scope="session")
def suite_groups():
    return {}


def load_groups(fixtures_dir, suite_groups):
    if not suite_groups:
        for group in json.loads((fixtures_dir / "jsonschema_half_draft2020-12.json").read_bytes()):
            suite_groups.setdefault(group["file"], []).append(group)
    return suite_groups


def test_whole_suite_is_run(fixtures_dir, suite_groups):
    assert set(load_groups(fixtures_dir, suite_groups)) <= set(SUITE)


@pytest.mark.parametrize("file", SUITE)
def test_checker_agrees_with_the_suite(fixtures_dir, suite_groups, file):
    wrong = []
    for group in load_groups(fixtures_dir, suite_groups).get(file, ()):
        for test in group["tests"]:
            if (not wire.faults(group["schema"], test["data"], group["schema"])) != test["valid"]:
                wrong.append((group["description"], test["description"]))
    assert wrong == []


################ The checker against jsonschema, on generated schemas and values
# Small alphabets, so that values meet what the schemas name; 1, 1.0, true, 0, 0.0 and false stand side by side.

EXAMPLES = dict(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
NAMES = st.sampled_from(["a", "b", "c"])
SCALARS = st.sampled_from([None, True, False, 0, 1, 2, -1, 0.0, 1.0, 1.5, 2**53, "", "a", "ab", "1", "👍🏽", "é"])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=8
)
NUMBERS, COUNTS = st.sampled_from([-1, 0, 0.5, 1, 1.0, 1.5, 2]), st.integers(0, 3)
KINDS = st.sampled_from(["null", "boolean", "integer", "number", "string", "array", "object"])
PATTERNS = st.sampled_from(["a", "^a", "b$", "^$", "[0-9]", "^(?:a|1)+$", "^.$", "é"])
ASSERTIONS = {
    "type": KINDS | st.lists(KINDS, min_size=1, max_size=3, unique=True),
    "const": VALUES,
    "enum": st.lists(VALUES, min_size=1, max_size=4),
    "required": st.lists(NAMES, max_size=2, unique=True),
    "uniqueItems": st.booleans(),
    "pattern": PATTERNS,
    **dict.fromkeys(["minLength", "maxLength", "minItems", "maxItems"], COUNTS),
    **dict.fromkeys(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"], NUMBERS),
}


@functools.cache
def schemas(depth, here, below):
    """Schemas of one to three keywords. `here` are the references that one may make itself, `below` those of what it
    applies to items and properties: so a schema may hold itself, and never is itself."""
    words = ASSERTIONS | ({"$ref": st.sampled_from(here)} if here else {})
    if depth:
        inner, item = schemas(depth - 1, here, below), schemas(depth - 1, below, below)
        words |= dict.fromkeys(["oneOf", "anyOf", "allOf"], st.lists(inner, min_size=1, max_size=3)) | {"not": inner}
        words |= {"properties": st.dictionaries(NAMES, item, min_size=1, max_size=2)}
        words |= {"additionalProperties": item, "items": item}
    choices = [st.tuples(st.just(word), values) for word, values in words.items()]
    deeper = choices[len(ASSERTIONS) :]
    some = st.lists(st.one_of(choices + deeper + deeper), min_size=1, max_size=3).map(dict)
    return st.one_of([some] * 9 + [st.booleans()])


EVERY = "#", "#/$defs/x", "#/$defs/y"


@st.composite
def documents(draw):
    """A schema with two definitions; x refers to all of them from its items and properties, y to x everywhere."""
    x, y, schema = draw(schemas(2, (), EVERY)), draw(schemas(2, EVERY[1:2], EVERY)), draw(schemas(3, EVERY[1:], EVERY))
    return {"$defs": {"x": x, "y": y}, **(schema if isinstance(schema, dict) else {"not": not schema})}


def as_json(value):
    """A value's one form: 1 is 1.0, and neither is true."""
    if isinstance(value, list):
        return "list", tuple(map(as_json, value))
    if isinstance(value, dict):
        return "dict", frozenset((name, as_json(inner)) for name, inner in value.items())
    return isinstance(value, bool), value


def unique_items(validator, wanted, value, schema):
    """jsonschema compares only neighbours after sorting, and misses [[1], [true], [1]]."""
    if wanted and isinstance(value, list) and len(set(map(as_json, value))) < len(value):
        yield ValidationError("not unique")


@given(VALUES, VALUES)
@settings(max_examples=200, **EXAMPLES)
def test_equality_is_that_of_json(a, b):
    """const, enum and uniqueItems, each by itself: 1 is 1.0 at any depth, true is not 1."""
    equal = as_json(a) == as_json(b)
    assert (not wire.faults({"const": a}, b), not wire.faults({"enum": [[], a]}, b)) == (equal, equal or b == [])
    assert bool(wire.faults({"uniqueItems": True}, [a, "other", b])) == (equal or "other" in (a, b))


Reference = validators.extend(Draft202012Validator, {"uniqueItems": unique_items})


def agree(schema, values):
    reference = Reference(schema)
    expected = [reference.is_valid(value) for value in values]
    assert [not wire.faults(schema, value, schema) for value in values] == expected


GENERATED = documents(), st.lists(VALUES, min_size=5, max_size=8)
test_checker_agrees_with_jsonschema = settings(max_examples=150, **EXAMPLES)(given(*GENERATED)(agree))
test_checker_agrees_with_jsonschema_at_length = pytest.mark.slow(
    settings(max_examples=3000, **EXAMPLES)(given(*GENERATED)(agree))
)


def test_pattern_ends_at_the_very_end():
    assert wire.faults({"pattern": "^a$"}, "a\n") and not wire.faults({"pattern": "[$]"}, "$")


def test_length_counts_code_points():
    assert not wire.faults({"minLength": 2, "maxLength": 2}, "👍🏽") and wire.faults({"maxLength": 1}, "e\u0301")


def test_fault_names_its_place_and_why():
    schema = {"properties": {"a": {"items": {"properties": {"b": {"type": "integer"}}}}}}
    assert wire.faults(schema, {"a": [{}, {"b": True}]}) == [("a.1.b", "must be integer, not true")]


@pytest.mark.parametrize("schema", [{"prefixItems": []}, {"type": "strng"}, {"pattern": "("}, {"$ref": "#/x"}], ids=str)
def test_checker_says_which_schemas_it_cannot_check(schema):
    with pytest.raises(ValueError):
        wire.faults(schema, "value")


@pytest.mark.parametrize("pointer", ["#nothing", "other.json#/x", "#/$defs/x/y", "#/$defs/list/-1"])
def test_reference_that_leads_nowhere_is_refused(pointer):
    with pytest.raises(ValueError):
        wire.faults({"$defs": {"x": {}, "list": {"anyOf": [{}]}}, "$ref": pointer}, "value")


################ Every request is checked: what is wrong gives 400, naming the field

CANDIDATES = [{}, [], 0.5, True, "", None, "\x00", {"x": 5}, "x" * 300, [5], -1]
BODIES = {name: one for name, one in tagged("edge").items() if "requestBody" in one}


def body_schema(name):
    return deref(BODIES[name]["requestBody"]["content"]["application/json"]["schema"])


def valid_body(name):
    """What the operation requires and no more, with values that pass."""
    values = {"content": "hi", "emoji": "👍", "kind": "demo", "name": "x", "message_id": "00000000"}
    return {field: values[field] for field in body_schema(name)["required"]}


def ask(shared, name, body):
    one = OPERATIONS[name]
    return shared.api(one["method"], one["path"].format_map(Ids()), body)


def fields(keep=lambda name, field: True):
    found = [(name, field) for name in BODIES for field in body_schema(name)["properties"] if keep(name, field)]
    return pytest.mark.parametrize("name, field", found)


@pytest.mark.parametrize("name", BODIES)
def test_unknown_field_is_refused(shared, name):
    error = status(ask(shared, name, {**valid_body(name), "nonsense": 1}), 400, "invalid_request")
    assert error["field"] == "nonsense" and "nonsense" in error["message"]


@fields(lambda name, field: field in body_schema(name)["required"])
def test_missing_field_is_named(shared, name, field):
    body = {other: value for other, value in valid_body(name).items() if other != field}
    assert status(ask(shared, name, body), 400, "invalid_request")["field"] == field


@fields()
def test_wrong_value_is_refused_and_named(shared, name, field):
    root = {**body_schema(name)["properties"][field], "components": CONTRACT["components"]}
    wrong = [value for value in CANDIDATES if not Draft202012Validator(root).is_valid(value)]
    answers = [ask(shared, name, {**valid_body(name), field: value}) for value in wrong]
    named = [status(answer, 400, "invalid_request")["field"] for answer in answers]
    assert named and {one.split(".")[0] for one in named} == {field}


@fields(lambda name, field: "maxLength" in body_schema(name)["properties"][field])
def test_text_over_its_limit_is_refused(shared, name, field):
    limit = body_schema(name)["properties"][field]["maxLength"]
    answer = ask(shared, name, {**valid_body(name), field: "x" * (limit + 1)})
    assert status(answer, 400, "invalid_request")["field"] == field


@pytest.mark.parametrize("name", [name for name in BODIES if BODIES[name]["requestBody"]["required"]])
def test_body_that_is_no_object_is_refused(shared, name):
    status(ask(shared, name, [1]), 400, "invalid_request")


@pytest.mark.parametrize("raw", [b"", b"{", b'{"content": NaN}', b'{"content": "a", "content": "b"}', b"\xff"])
def test_body_that_is_no_json_is_refused(shared, raw):
    status(shared.api("POST", "/api/v1/messages", raw=raw), 400, "invalid_request")


PARAMETERS = [("limit", value) for value in ("0", "1001", "x", "1.5", "1_0", "-1", "", "٣", "%2B5")]
PARAMETERS += [("before", ""), ("before", "x" * 65)]


@pytest.mark.parametrize("field, value", PARAMETERS)
def test_wrong_parameter_is_refused_and_named(shared, field, value):
    error = status(shared.api("GET", f"/api/v1/threads?{field}={value}"), 400, "invalid_request")
    assert error["field"] == field


@pytest.mark.parametrize("value", ["-1", "x", "1.5", "1_0", "99999999999999999999"])
def test_wrong_last_event_id_is_refused(shared, value):
    answer = shared.api("GET", "/api/v1/messages/abcd/stream", headers={"last-event-id": value})
    assert status(answer, 400, "invalid_request")["field"] == "Last-Event-ID"


@pytest.mark.parametrize("key", ["", "x" * 201, "a b"])
def test_wrong_idempotency_key_is_refused(shared, key):
    answer = shared.api("POST", "/api/v1/messages", {"content": "hi"}, headers={"idempotency-key": key})
    assert status(answer, 400, "invalid_request")["field"] == "Idempotency-Key"


def test_body_over_the_limit_is_too_large(shared):
    body = b'{"content": "%s"}' % (b"x" * CONTRACT["x-limits"]["body_bytes"])
    status(shared.api("POST", "/api/v1/messages", raw=body), 413, "too_large")


def nested(depth):
    """The options of a message, nested so deep with their own braces and the body's."""
    return b'{"content": "hi", "model": "openai/say-1-0", "options": %s1%s}' % (
        b'{"a":' * (depth - 1),
        b"}" * (depth - 1),
    )


def test_header_within_the_limit_is_taken(shared):
    headers = {"x-other": "x" * (CONTRACT["x-limits"]["header_bytes"] - 2000)}
    assert shared.api("GET", "/api/v1/threads", headers=headers)[0] == 200


def test_header_over_the_limit_has_the_one_error_shape(shared):
    headers = {"x-other": "x" * (CONTRACT["x-limits"]["header_bytes"] + 1)}
    status(shared.api("GET", "/api/v1/threads", headers=headers), 400, "invalid_request")
