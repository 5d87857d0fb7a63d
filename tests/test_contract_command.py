"""`liminal test contract`: it calls everything, finds no fault in a sound system, and finds one that is put there."""

import contextlib
import http.client
import http.server
import json
import threading
import urllib.parse
import uuid

import pytest

from conftest import ROOT, status
from test_cli import good

CONTRACT = json.loads((ROOT / "contracts.json").read_bytes())
EDGE_OPERATIONS = {
    operation["operationId"]
    for path in CONTRACT["paths"].values()
    for method, operation in path.items()
    if method in ("get", "post", "put", "patch", "delete") and "edge" in operation["tags"]
}


def figures(run, code=0) -> dict:
    """The JSON object of one `test contract --json`."""
    assert run.returncode == code and run.stderr == "", (run.returncode, run.stdout, run.stderr)
    return json.loads(run.stdout)


def left_over(shared) -> tuple:
    """What a test could leave behind: threads, users, keys, providers."""
    paths = ("threads", "users", "keys", "providers")
    answers = [status(shared.api("GET", f"/api/v1/{path}"), 200)[path] for path in paths]
    return tuple({one.get("id") or one["name"] for one in answer} for answer in answers)


@pytest.fixture
def member(shared) -> dict:
    """The environment of a member of their own."""
    user = status(shared.api("POST", "/api/v1/users", {"name": f"member {uuid.uuid4()}"}), 201)
    key = status(shared.api("POST", "/api/v1/keys", {"name": "k", "user_id": user["id"]}), 201)["secret"]
    return {"LIMINAL_API_KEY": key}


@pytest.mark.slow
def test_a_sound_system_has_no_faults_and_nothing_stays(shared):
    before = left_over(shared)
    found = figures(shared.cli("test", "contract", "--json"))
    assert (
        found["faults"] == []
        and found["operations"] == len(EDGE_OPERATIONS)
        and found["calls"] > 2 * len(EDGE_OPERATIONS)
    )
    assert left_over(shared) == before


@pytest.mark.slow
def test_for_people_it_is_a_table_without_wrong(shared):
    out = good(shared.cli("test", "contract"))
    assert f"operations  {len(EDGE_OPERATIONS)}" in out and "WRONG" not in out


@pytest.mark.slow
def test_a_member_finds_no_faults_either(shared, member):
    found = figures(shared.cli("test", "contract", "--json", env=member))
    assert (
        found["faults"] == []
        and status(shared.api("GET", "/api/v1/threads", key=member["LIMINAL_API_KEY"]), 200)["threads"] == []
    )


@pytest.mark.slow
def test_all_runs_the_three_tests(shared):
    run = shared.cli("test", "all", "--json", "--sessions", "3", "-m", "demo/load-100-200", timeout=60)
    found = [json.loads(line) for line in good(run).splitlines()]
    assert [one["test"] for one in found] == ["concurrent", "network", "contract"] and not any(
        one["faults"] for one in found
    )


################ It finds what is wrong


@contextlib.contextmanager
def between(edge: str, alter):
    """A server that forwards to the Edge; ``alter(method, path, status, body)`` gives the (status, body) that it answers
    with. Notes what was asked in `server.asked`."""
    upstream = urllib.parse.urlsplit(edge)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self):
            connection = http.client.HTTPConnection(upstream.hostname, upstream.port, timeout=30)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            connection.request(self.command, self.path, body or None, {**self.headers, "Host": upstream.netloc})
            response = connection.getresponse()
            code, data = alter(self.command, self.path, response.status, response.read())
            self.server.asked.append((self.command, self.path.partition("?")[0], response.status))
            self.send_response(code)
            self.send_header("Content-Type", response.getheader("Content-Type") or "")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            connection.close()

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.daemon_threads = [], True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield {"LIMINAL_URL": f"http://127.0.0.1:{server.server_port}"}, server.asked
        finally:
            server.shutdown()


def without(*fields: str):
    """What takes these fields out of a JSON body."""
    return lambda data: json.dumps(
        {name: value for name, value in json.loads(data).items() if name not in fields}
    ).encode()


def when(asked: tuple, change):
    """Alter the answers to one method, end of path, and status only."""

    def alter(method, path, code, data):
        return (code, change(data)) if (method, code) == asked[::2] and path.endswith(asked[1]) else (code, data)

    return alter


@pytest.mark.parametrize(
    "asked, change, operation",
    [
        (("GET", "/api/v1/runs", 200), without("runs"), "list_runs"),
        (("POST", "/api/v1/keys", 201), lambda data: data.replace(b'"prefix"', b'"postfix"'), "create_key"),
        (
            ("POST", "/api/v1/messages", 200),
            lambda data: data.replace(b"event: done", b"event: text").replace(
                b'"type":"done"', b'"type":"text","text":""'
            ),
            "send_message",
        ),
        (("POST", "/cancel", 200), without("upstream_closed"), "cancel_message"),
        (("GET", "/api/v1/threads", 401), lambda data: data.replace(b'"retriable"', b'"retryable"'), "list_threads"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.slow
def test_an_altered_answer_is_found(shared, asked, change, operation):
    with between(shared.edge, when(asked, change)) as (env, _):
        run = shared.cli("test", "contract", env=env, timeout=60)
    assert run.returncode == 1 and f"WRONG: {operation}: " in run.stdout, (run.stdout, run.stderr)


def test_a_missing_field_is_found_and_named(shared):
    with between(shared.edge, when(("GET", "/api/v1/tools", 200), without("servers"))) as (env, _):
        run = shared.cli("test", "contract", env=env, timeout=60)
    wrong = [line for line in run.stdout.splitlines() if line.startswith("WRONG: ")]
    assert run.returncode == 1 and run.stderr == "" and len(wrong) == 1, run.stdout
    assert wrong[0].startswith("WRONG: list_tools: ") and "servers" in wrong[0]


@pytest.mark.slow
def test_a_wrong_status_is_found(shared):
    def alter(method, path, code, data):
        return (200 if code == 401 and path == "/api/v1/models" else code), data

    with between(shared.edge, alter) as (env, _):
        run = shared.cli("test", "contract", env=env, timeout=60)
    assert run.returncode == 1 and "WRONG: list_models: status 200 instead of 401" in run.stdout


@pytest.mark.slow
def test_an_answer_that_is_not_json_is_a_fault_and_no_traceback(shared):
    with between(shared.edge, when(("GET", "/api/v1/models", 200), lambda data: data[:-1])) as (env, _):
        run = shared.cli("test", "contract", env=env, timeout=60)
    assert run.returncode == 1 and "Traceback" not in run.stderr and "list_models" in run.stdout, run.stderr


@pytest.mark.slow
def test_every_operation_is_asked_well_and_badly(shared):
    with between(shared.edge, lambda method, path, code, data: (code, data)) as (env, asked):
        assert figures(shared.cli("test", "contract", "--json", env=env, timeout=60))["faults"] == []
    good_, bad = (
        {(method, shape(path)) for method, path, code in asked if (code < 400) == fine} for fine in (True, False)
    )
    known = {
        (method.upper(), shape(path))
        for path, one in CONTRACT["paths"].items()
        for method in one
        if is_edge(one, method)
    }
    open_ = {("GET", path) for path in ("/health", "/metrics", "/contracts.json")}
    assert known <= good_ | {("DELETE", "/api/v1/session")} and known - open_ <= bad


def is_edge(path: dict, method: str) -> bool:
    return method != "parameters" and "edge" in path[method]["tags"]


def shape(path: str) -> str:
    """A path without what fills its places, so that the contract's and a real one compare equal."""
    parts = path.strip("/").split("/")
    for number, part in enumerate(parts):
        if number == 3 or number == 5:
            parts[number] = "-"
    return "/" + "/".join(parts)
