"""Who may come in: keys, sessions, users apart from each other, the service JWT, names and origins, one server a folder."""

import base64
import hashlib
import hmac
import json
import re
import socket
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager
from urllib.parse import quote, urlsplit

import httpx2
import jwt
import pytest
from conftest import ROOT, status, text
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from test_api import CONTRACT, NOBODY, plain

SEND, THREADS, KEYS = "/api/v1/messages", "/api/v1/threads", "/api/v1/keys"
BODIES = {
    "send_message": {"content": "x"},
    "add_reaction": {"emoji": "👍"},
    "update_thread": {"title": "taken over"},
    "retry_message": {},
    "create_thread": {},
    "fork_thread": {"message_id": NOBODY},
    "create_user": {"name": "by a member"},
    "create_key": {"name": "k"},
    "put_provider": {"kind": "demo"},
}


def operations_of(tag):
    """[(operationId, method, path, operation)] of one server."""
    return [
        (operation["operationId"], method.upper(), path, operation)
        for path, methods in CONTRACT["paths"].items()
        for method, operation in methods.items()
        if tag in operation["tags"]
    ]


EDGE = operations_of("edge")
WITH_ID = [(name, method, path) for name, method, path, _ in EDGE if re.search(r"\{\w+_id\}", path)]
OWNERS = [(n, m, path) for n, m, path, operation in EDGE if {"key": ["owner"]} in operation["security"]]
KEYED = [(n, m, path) for n, m, path, operation in EDGE if operation["security"]]


def path_with(path, ids):
    return path.format_map({**ids, "emoji": quote("👍"), "name": "mine"})


@contextmanager
def member(shared, name=None):
    """(user, key with its secret) of a new member, deleted afterwards."""
    user = status(shared.api("POST", "/api/v1/users", {"name": name or str(uuid.uuid4())}), 201)
    yield user, make_key(shared, user_id=user["id"])
    shared.api("DELETE", f"/api/v1/users/{user['id']}")


def make_key(shared, key=None, **fields):
    return status(shared.api("POST", KEYS, {"name": "k", **fields}, key=key), 201)


def ids_of(shared, key=None):
    """{message_id, thread_id} of a finished exchange."""
    return shared.read(shared.stream({"content": "secret", "model": "openai/say-1-0"}, key=key))[0].data


def refused(shared, key):
    return status(shared.api("GET", THREADS, key=key), 401, "unauthorized")


################ Keys


@pytest.mark.parametrize("name, method, path", KEYED, ids=[one[0] for one in KEYED])
def test_no_key_is_401_everywhere(shared, name, method, path):
    ids = dict.fromkeys(("message_id", "thread_id", "user_id", "key_id"), NOBODY)
    status(shared.api(method, path_with(path, ids), BODIES.get(name), key=""), 401, "unauthorized")


def test_no_key_says_where_to_find_one(shared):
    error = refused(shared, "")
    assert "Authorization: Bearer" in error["message"] and "cli.key" in error["message"]


@pytest.mark.parametrize("key", ["lt_sk_wrong", "x", "lt_sk_" + "A" * 43, "Bearer", "é", "a b"])
def test_wrong_key_is_401(shared, key):
    head = f"GET {THREADS} HTTP/1.1\r\nAuthorization: Bearer {key}".encode()
    status(plain(shared.edge, head), 401, "unauthorized")


@pytest.mark.parametrize("scheme", ["Basic {}", "Token {}", "{}", "Bearer", "Bearer{}", "session={}"])
def test_key_in_the_wrong_scheme_is_401(shared, scheme):
    headers = {"authorization": scheme.format(shared.key)}
    status(shared.api("GET", THREADS, key="", headers=headers), 401, "unauthorized")


def test_key_is_not_taken_from_the_query(shared):
    status(shared.api("GET", f"{THREADS}?key={shared.key}&api_key={shared.key}", key=""), 401, "unauthorized")


def test_key_is_no_cookie(shared):
    status(shared.api("GET", THREADS, key="", headers={"cookie": f"session={shared.key}"}), 401, "unauthorized")


def test_cookie_is_no_key(shared):
    with session(shared, shared.key) as (_, cookie):
        refused(shared, cookie["cookie"].removeprefix("session="))


def test_part_of_a_key_is_no_key(shared):
    for key in (shared.key[:-1], shared.key + "x", shared.key.lower()):
        refused(shared, key)


def test_revoked_key_is_refused_at_once(shared):
    key = make_key(shared)
    status(shared.api("GET", THREADS, key=key["secret"]), 200)  # the Edge remembers it from here
    status(shared.api("DELETE", f"{KEYS}/{key['id']}"), 200)
    refused(shared, key["secret"])


def test_key_may_revoke_itself(shared):
    with member(shared) as (_, key):
        status(shared.api("DELETE", f"{KEYS}/{key['id']}", key=key["secret"]), 200)
        refused(shared, key["secret"])


def test_revoking_closes_the_keys_stream_and_its_run_goes_on(shared):
    with member(shared) as (user, key):
        other = make_key(shared, user_id=user["id"])["secret"]
        with shared.stream({"content": "x", "model": "openai/gate-5-2"}, key=key["secret"]) as stream:
            events = iter(stream)
            message_id = next(events).data["message_id"]
            shared.provider.wait_gate()
            status(shared.api("DELETE", f"{KEYS}/{key['id']}"), 200)
            with pytest.raises(httpx2.HTTPError):
                list(events)
        shared.provider.open_gate()
        stream = shared.stream(None, f"{SEND}/{message_id}/stream", "GET", key=other)
        assert text(shared.read(stream)) == " t0 t1 t2 t3 t4"


def test_deleted_users_key_is_refused_at_once(shared):
    with member(shared) as (user, key):
        status(shared.api("GET", THREADS, key=key["secret"]), 200)
        assert status(shared.api("DELETE", f"/api/v1/users/{user['id']}"), 200) == user
        refused(shared, key["secret"])


def test_key_of_a_user_deleted_by_prefix_is_refused_at_once(shared):
    with member(shared) as (user, key):
        status(shared.api("GET", THREADS, key=key["secret"]), 200)
        assert status(shared.api("DELETE", f"/api/v1/users/{user['id'][:13]}"), 200) == user
        refused(shared, key["secret"])


def test_last_key_of_the_owner_cannot_be_revoked(shared):
    [key] = [one for one in status(shared.api("GET", KEYS), 200)["keys"] if one["name"] == "cli"]
    with member(shared):
        error = status(shared.api("DELETE", f"{KEYS}/{key['id']}"), 409, "conflict")
    assert "another" in error["message"]
    status(shared.api("GET", THREADS), 200)


def test_owner_makes_a_key_for_a_member(shared):
    with member(shared) as (user, key):
        assert key["user_id"] == user["id"] and status(shared.api("GET", THREADS, key=key["secret"]), 200)


def test_member_makes_keys_for_themselves_only(shared):
    owner = next(one for one in status(shared.api("GET", "/api/v1/users"), 200)["users"] if one["role"] == "owner")
    with member(shared) as (user, key):
        assert make_key(shared, key["secret"])["user_id"] == user["id"]
        for other in (owner["id"], NOBODY):
            body = {"name": "k", "user_id": other}
            error = status(shared.api("POST", KEYS, body, key=key["secret"]), 403, "forbidden")
            assert error["field"] == "user_id"


def test_members_see_their_own_keys_and_the_owner_all(shared):
    with member(shared) as (user, key):
        mine = status(shared.api("GET", KEYS, key=key["secret"]), 200)["keys"]
        assert [one["id"] for one in mine] == [key["id"]]
        assert {"cli", "k"} <= {one["name"] for one in status(shared.api("GET", KEYS), 200)["keys"]}


def test_only_hashes_of_secrets_are_on_disk(liminal):
    secret = make_key(liminal)["secret"]
    cookie = liminal.client.send(liminal.request("POST", "/api/v1/session", None, secret, None, None)).cookies[
        "session"
    ]
    data = b"".join(path.read_bytes() for path in liminal.data.iterdir() if path.name != "cli.key")
    assert hashlib.sha256(secret.encode()).hexdigest().encode() in data
    assert not [one for one in (secret, cookie, liminal.key) if one.encode() in data or one[6:].encode() in data]


@pytest.mark.core
def test_everything_in_the_data_folder_is_private(liminal):
    liminal.send("x", model="openai/say-1-0")
    wrong = {path.name for path in liminal.data.iterdir() if path.stat().st_mode & 0o077}
    assert wrong == set()


################ Sessions


@contextmanager
def session(shared, key):
    """(the answer, {cookie header}) of a new session."""
    answer = shared.client.send(shared.request("POST", "/api/v1/session", None, key, None, None))
    shared.client.cookies.clear()
    yield answer, {"cookie": f"session={answer.cookies['session']}"}


def test_session_cookie_has_its_attributes(shared):
    with session(shared, shared.key) as (answer, _):
        cookie = answer.headers["set-cookie"].lower()
        assert answer.status_code == 201 and answer.json()["role"] == "owner"
        assert "httponly" in cookie and "samesite=strict" in cookie and "path=/;" in cookie + ";"


def test_session_is_used_and_ended(shared):
    with session(shared, shared.key) as (_, cookie):
        status(shared.api("GET", THREADS, key="", headers=cookie), 200)
        status(shared.api("DELETE", "/api/v1/session", key="", headers=cookie), 204)
        status(shared.api("GET", THREADS, key="", headers=cookie), 401, "unauthorized")


def test_session_dies_with_its_key(shared):
    with member(shared) as (_, key), session(shared, key["secret"]) as (_, cookie):
        status(shared.api("GET", THREADS, key="", headers=cookie), 200)
        status(shared.api("DELETE", f"{KEYS}/{key['id']}"), 200)
        status(shared.api("GET", THREADS, key="", headers=cookie), 401, "unauthorized")


def test_session_makes_no_session(shared):
    with session(shared, shared.key) as (_, cookie):
        status(shared.api("POST", "/api/v1/session", key="", headers=cookie), 401, "unauthorized")


def test_session_is_the_keys_user(shared):
    with member(shared) as (_, key), session(shared, key["secret"]) as (_, cookie):
        status(shared.api("GET", "/api/v1/users", key="", headers=cookie), 403, "forbidden")
        thread = status(shared.api("POST", THREADS, {}, key="", headers=cookie), 201)
        status(shared.api("GET", f"{THREADS}/{thread['id']}", key=key["secret"]), 200)


################ Users apart from each other


@pytest.mark.parametrize("name, method, path", WITH_ID, ids=[one[0] for one in WITH_ID])
def test_anothers_thing_answers_as_one_that_does_not_exist(shared, name, method, path):
    theirs = {**ids_of(shared), "user_id": status(shared.api("GET", "/api/v1/users"), 200)["users"][0]["id"]}
    theirs["key_id"] = status(shared.api("GET", KEYS), 200)["keys"][0]["id"]
    answers = []
    with member(shared) as (_, key):
        for ids in (theirs, dict.fromkeys(theirs, NOBODY)):
            number, body = shared.api(method, path_with(path, ids), BODIES.get(name), key=key["secret"])
            error = status((number, body), 403 if (name, method, path) in OWNERS else 404)
            del error["request_id"]
            answers.append(json.dumps([number, error]).replace(str(ids[re.search(r"{(\w+_id)}", path)[1]]), "ID"))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("length", [4, 12])
def test_prefix_of_anothers_thing_is_not_found(shared, length):
    theirs = ids_of(shared)
    with member(shared) as (_, key):
        for path in (f"{THREADS}/{theirs['thread_id'][:length]}", f"{SEND}/{theirs['message_id'][:length]}"):
            status(shared.api("GET", path, key=key["secret"]), 404, "not_found")


def test_anothers_thread_and_message_are_not_found_in_bodies_and_queries(shared):
    theirs = ids_of(shared)
    with member(shared) as (_, key):
        mine = ids_of(shared, key["secret"])
        for thread, parent in ((theirs["thread_id"], None), (mine["thread_id"], theirs["message_id"])):
            body = {"content": "x", "thread_id": thread, **({"parent_id": parent} if parent else {})}
            status(shared.api("POST", SEND, body, key=key["secret"]), 404, "not_found")
        status(shared.api("GET", f"{THREADS}?before={theirs['thread_id']}", key=key["secret"]), 404, "not_found")


def test_lists_hold_only_ones_own(shared):
    ids_of(shared)
    with member(shared) as (_, key), shared.stream({"content": "x", "model": "openai/gate-2-1"}) as stream:
        next(iter(stream))
        mine = ids_of(shared, key["secret"])
        threads = status(shared.api("GET", THREADS, key=key["secret"]), 200)["threads"]
        assert [thread["id"] for thread in threads] == [mine["thread_id"]]
        assert status(shared.api("GET", "/api/v1/runs", key=key["secret"]), 200) == {"runs": []}
        shared.provider.open_gate()


def test_running_reply_of_another_cannot_be_followed_or_cancelled(shared):
    with member(shared) as (_, key), shared.stream({"content": "x", "model": "openai/gate-2-1"}) as stream:
        events = iter(stream)
        message_id = next(events).data["message_id"]
        status(shared.api("GET", f"{SEND}/{message_id}/stream", key=key["secret"]), 404, "not_found")
        status(shared.api("POST", f"{SEND}/{message_id}/cancel", key=key["secret"]), 404, "not_found")
        shared.provider.open_gate()
        assert list(events)[-1].data["status"] == "complete"


@pytest.mark.parametrize("name, method, path", OWNERS, ids=[one[0] for one in OWNERS])
def test_members_are_403_on_the_owners_operations(shared, name, method, path):
    with member(shared) as (user, key):
        path = path_with(path, {"user_id": user["id"]})
        error = status(shared.api(method, path, BODIES.get(name), key=key["secret"]), 403, "forbidden")
    assert "owner" in error["message"]


def test_header_x_user_id_of_a_client_means_nothing(shared):
    theirs = ids_of(shared)
    owner = shared.sql("liminal.db", "select user_id from threads where id = ?", theirs["thread_id"])[0][0]
    with member(shared) as (_, key):
        answer = shared.api("GET", f"{THREADS}/{theirs['thread_id']}", key=key["secret"], headers={"x-user-id": owner})
    status(answer, 404, "not_found")


################ The service JWT


def encoded(value):
    return base64.urlsafe_b64encode(value if isinstance(value, bytes) else json.dumps(value).encode()).rstrip(b"=")


def by_hand(header, claims, sign):
    """A token that no library would make; `sign` gives the signature of what is signed."""
    signed = encoded(header) + b"." + encoded(claims)
    return (signed + b"." + encoded(sign(signed))).decode()


def claims(**changes):
    """The Edge's claims; None takes one out."""
    begun = int(time.time())
    made = {"iss": "liminal-edge", "sub": "edge-service", "aud": "liminal-domain", "iat": begun, "exp": begun + 60}
    made |= {"jti": str(uuid.uuid4()), "scopes": ["read:threads"], **changes}
    return {name: value for name, value in made.items() if value is not None}


def in_seconds(seconds, kind=int):
    """A time that is reckoned when the test runs."""
    return lambda: kind(int(time.time()) + seconds)


def sign(shared, key=None, **changes):
    return jwt.encode(claims(**changes), key or (shared.data / "edge_private_key.pem").read_text(), algorithm="EdDSA")


def ask_domain(shared, token, path="/domain/threads"):
    user = status(shared.api("GET", "/api/v1/users"), 200)["users"][0]["id"]
    headers = {"x-user-id": user, **({"authorization": f"Bearer {token}"} if token else {})}
    return shared.api("GET", f"{shared.domain}{path}", key="", headers=headers)


def test_token_as_designed_is_taken(shared):
    assert "threads" in status(ask_domain(shared, sign(shared)), 200)


@pytest.mark.parametrize(
    "changes",
    [
        {"aud": "other"},
        {"aud": None},
        {"iss": "other"},
        {"iss": None},
        {"sub": "other"},
        {"sub": None},
        {"jti": None},
        {"iat": None},
        {"exp": None},
        {"scopes": None},
        {"scopes": "read:threads"},
        {"exp": in_seconds(-30), "iat": in_seconds(-90)},
        {"exp": in_seconds(300)},
        {"exp": in_seconds(3600), "iat": in_seconds(3550)},
        {"exp": in_seconds(10 * 365 * 86400)},
        {"exp": "never"},
        {"exp": in_seconds(50, str)},
        {"exp": in_seconds(50, str), "iat": in_seconds(0, str)},
        {"nbf": in_seconds(3600)},
    ],
    ids=lambda changes: "-".join(name if callable(one) else f"{name}={one}" for name, one in changes.items()),
)
def test_token_with_a_wrong_claim_is_401(shared, changes):
    changes = {name: one() if callable(one) else one for name, one in changes.items()}
    token = by_hand({"alg": "EdDSA", "typ": "JWT"}, claims(**changes), private_key(shared).sign)
    status(ask_domain(shared, token), 401, "unauthorized")


def private_key(shared):
    return load_pem_private_key((shared.data / "edge_private_key.pem").read_bytes(), None)


def test_token_61_seconds_long_is_401(shared):
    begun = int(time.time())
    status(ask_domain(shared, sign(shared, iat=begun, exp=begun + 61)), 401, "unauthorized")


@pytest.mark.parametrize("token", ["", "x", "a.b.c", "lt_sk_x", "é"])
def test_no_token_is_401(shared, token):
    head = b"GET /domain/threads HTTP/1.1\r\nx-user-id: " + NOBODY.encode() + b"\r\nAuthorization: Bearer "
    status(plain(shared.domain, head + token.encode()), 401, "unauthorized")
    status(ask_domain(shared, None), 401, "unauthorized")


def test_api_key_is_no_token(shared):
    status(ask_domain(shared, shared.key), 401, "unauthorized")


def test_token_signed_by_another_key_is_401(shared):
    status(ask_domain(shared, sign(shared, Ed25519PrivateKey.generate())), 401, "unauthorized")


def test_token_changed_after_signing_is_401(shared):
    head, body, signature = sign(shared).split(".")
    other = encoded(claims(scopes=["write:threads", "read:threads"])).decode()
    status(ask_domain(shared, f"{head}.{other}.{signature}"), 401, "unauthorized")


@pytest.mark.parametrize("alg", ["none", "None", "NONE"])
def test_token_without_a_signature_is_401(shared, alg):
    token = by_hand({"alg": alg, "typ": "JWT"}, claims(), lambda signed: b"")
    status(ask_domain(shared, token), 401, "unauthorized")


def test_token_signed_with_the_public_key_as_secret_is_401(shared):
    public = (shared.data / "edge_public_key.pem").read_bytes()
    token = by_hand({"alg": "HS256", "typ": "JWT"}, claims(), lambda signed: hmac.digest(public, signed, "sha256"))
    status(ask_domain(shared, token), 401, "unauthorized")


def test_token_without_the_operations_scope_is_403_and_names_it(shared):
    for scopes in ([], ["write:threads"], ["read"], ["read:messages"]):
        error = status(ask_domain(shared, sign(shared, scopes=scopes)), 403, "forbidden")
        assert "read:threads" in error["message"]


@pytest.mark.parametrize("name, method, path, operation", operations_of("domain"), ids=lambda one: str(one)[:40])
def test_every_operation_of_the_domain_but_health_and_metrics_needs_its_scope(shared, name, method, path, operation):
    ids = {**dict.fromkeys(re.findall(r"{(\w+)}", path), NOBODY)}
    number, body = shared.api(method, shared.domain + path.format_map(ids), key=sign(shared, scopes=["other"]))
    assert number == (200 if name in ("health", "metrics") else 403), body


################ The servers without each other


@pytest.mark.parametrize("order", [("edge", "domain"), ("domain", "edge")], ids="-".join)
def test_either_server_may_start_first(make_liminal, order):
    liminal = make_liminal().start(order[0])
    if order[0] == "edge":
        status(liminal.api("GET", THREADS, key="lt_sk_x"), 503, "domain_unavailable")
    liminal.start(order[1])
    assert text(liminal.send("x", model="openai/say-2-0")) == " t0 t1"


@pytest.mark.slow
def test_without_the_domain_known_and_unknown_keys_are_503_and_the_edge_is_well(make_liminal):
    liminal = make_liminal().start()
    status(liminal.api("GET", THREADS), 200)
    liminal.stop("domain")
    for key in (liminal.key, "lt_sk_unknown"):
        error = status(liminal.api("GET", THREADS, key=key), 503, "domain_unavailable")
        assert error["retriable"] is True and "liminal up" in error["message"]
    status(liminal.api("POST", SEND, {"content": "x"}), 503, "domain_unavailable")
    health = status(liminal.api("GET", "/health", key=""), 200)
    assert (health["status"], health["domain"]) == ("ok", "unavailable")
    liminal.start("domain")
    status(liminal.api("GET", THREADS), 200)
    assert status(liminal.api("GET", "/health", key=""), 200)["domain"] == "ok"


def test_public_key_made_anew_is_read_again(make_liminal):
    liminal = make_liminal().start()
    status(liminal.api("GET", THREADS), 200)
    liminal.stop("edge")
    (liminal.data / "edge_private_key.pem").unlink()
    liminal.start("edge")
    status(liminal.api("GET", THREADS), 200)


################ Names and origins


def with_headers(shared, server, host, *lines):
    """(status, JSON) of GET /health under this Host, with more header lines."""
    url = getattr(shared, server)
    port = str(urlsplit(url).port)
    headers = [tuple(line.replace("PORT", port).split(": ", 1)) for line in (f"host: {host}", *lines)]
    answer = shared.client.get(f"{url}/health", headers=headers)
    return answer.status_code, answer.json()


SERVERS = pytest.mark.parametrize("server", ["edge", "domain"])


@SERVERS
@pytest.mark.parametrize("host", ["127.0.0.1:PORT", "localhost:PORT", "LOCALHOST:PORT", "[::1]:PORT", "localhost"])
def test_own_names_are_accepted(shared, server, host):
    status(with_headers(shared, server, host), 200)


@SERVERS
@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:PORT", "localhost.evil.example:PORT", "127.0.0.1.evil.example", "", "[::1", "[::2]"],
)
def test_foreign_host_is_refused(shared, server, host):
    status(with_headers(shared, server, host), 403, "forbidden")


@SERVERS
@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "http://localhost:1",
        "null",
        "http://127.0.0.1",
        "http://[",
        "http://127.0.0.1:PORT.evil.example",
    ],
)
def test_foreign_origin_is_refused(shared, server, origin):
    status(with_headers(shared, server, "127.0.0.1:PORT", f"origin: {origin}"), 403, "forbidden")


@SERVERS
@pytest.mark.parametrize("host", ["127.0.0.1:PORT", "localhost:PORT", "[::1]:PORT"])
def test_own_origin_is_accepted(shared, server, host):
    status(with_headers(shared, server, host, f"origin: http://{host}"), 200)


@SERVERS
def test_request_without_a_host_is_refused(shared, server):
    place = urlsplit(getattr(shared, server))
    with socket.create_connection((place.hostname, place.port), 20) as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.split()[1] in (b"400", b"403")


################ One server a folder and port


def run_server(name, env):
    """(exit code, stdout, lines of stderr) of a server that is to end at once."""
    command = [sys.executable, ROOT / f"liminal_{name}.py"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout, done.stderr.splitlines()


@SERVERS
def test_second_server_of_a_data_folder_ends_with_one_line(shared, server):
    code, out, lines = run_server(server, {**shared.env, f"LIMINAL_{server.upper()}_PORT": "1"})
    assert (code, out, len(lines)) == (1, "", 1)
    assert lines[0].startswith("liminal: ") and str(shared.servers[server].process.pid) in lines[0]
    assert str(shared.data) in lines[0] and status(shared.api("GET", "/health", key=""), 200)


@SERVERS
def test_taken_port_ends_with_one_line(shared, server, tmp_path):
    code, out, lines = run_server(server, {**shared.env, "LIMINAL_DATA": str(tmp_path)})
    assert (code, out, len(lines)) == (1, "", 1)
    port = str(urlsplit(getattr(shared, server)).port)
    assert lines[0].startswith("liminal: ") and port in lines[0] and f"LIMINAL_{server.upper()}_PORT" in lines[0]
