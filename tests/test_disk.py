"""Disk full and I/O errors on each database: an honest error, nothing acknowledged is lost, and work goes on with room.

A disk is made to fail in two ways: a limit on the size of files (RLIMIT_FSIZE) is set on the running server, so that
each write is refused by the kernel with EFBIG; and, where file systems may be mounted, a real one of 2 MB holds the
database and a ballast file fills it up.
"""

import resource
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest
from conftest import status, text

SEND = "/api/v1/messages"
STORED = (
    "select (select count(*) from messages), (select count(*) from chunks), (select count(*) from idempotency_keys)"
)


def numbered(n, start=0):
    return "".join(f" t{i}" for i in range(start, n))


def eventually(look, seconds=40):
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)
    return found


def get(liminal, message_id) -> dict:
    return status(liminal.api("GET", f"{SEND}/{message_id}"), 200)


################ Two disks that can be filled


class Limited:
    """No file of a server may grow past its first byte while the disk is `full`."""

    def __init__(self, liminal, name="domain"):
        self.liminal, self.name = liminal, name

    def fill(self):
        self.limit(1)

    def free(self):
        self.limit(resource.RLIM_INFINITY)

    def limit(self, soft):
        pid = self.liminal.servers[self.name].process.pid
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


class Small:
    """A file system of 2 MB on which databases live; `fill` puts a ballast file beside them."""

    def __init__(self, folder):
        self.folder, self.ballast = folder, folder / "ballast"

    def hold(self, liminal, *databases):
        for name in databases:
            (liminal.data / name).symlink_to(self.folder / name)

    def fill(self):
        with open(self.ballast, "ab", buffering=0) as file, suppress(OSError):
            while file.write(b"x" * 4096):
                pass

    def free(self):
        self.ballast.unlink()


@contextmanager
def full(disk):
    disk.fill()
    try:
        yield
    finally:
        disk.free()


@pytest.fixture
def small(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "liminal-test", str(folder)]
    try:
        made = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"there is no mount: {error}")
    if made.returncode:
        pytest.skip(f"no file system may be mounted here: {made.stderr.strip()}")
    yield Small(folder)
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(params=["limit", "small messages.db", "small liminal.db"])
def broken(request, tmp_path):
    """(an installation, a disk under the Domain that can be filled): the limit is on both of its databases."""
    how, _, database = request.param.partition(" ")
    disk = request.getfixturevalue("small") if database else None
    liminal = request.getfixturevalue("make_liminal")()
    if disk:
        disk.hold(liminal, database)
    liminal.start().send("first", model="openai/say-3-0")
    return liminal, disk or Limited(liminal)


@pytest.fixture(params=["limit", "small"])
def messages_disk(request):
    """(an installation, a disk under messages.db that can be filled)."""
    disk = request.getfixturevalue("small") if request.param == "small" else None
    liminal = request.getfixturevalue("make_liminal")()
    if disk:
        disk.hold(liminal, "messages.db")
    return liminal.start(), disk or Limited(liminal)


@pytest.fixture(params=["limit", "small"])
def overflow_disk(request):
    """(an installation with a queue of one bundle, a disk under overflow.db that can be filled)."""
    disk = request.getfixturevalue("small") if request.param == "small" else None
    liminal = request.getfixturevalue("make_liminal")(LIMINAL_QUEUE_SIZE="1")
    if disk:
        disk.hold(liminal, "overflow.db")
    return liminal.start(), disk or Limited(liminal, "edge")


@contextmanager
def at_gate(liminal, model="openai/gate-200-60", **fields):
    """(start's data, the other events) of a reply that stands at its gate."""
    with liminal.stream({"content": "x", "model": model, **fields}) as stream:
        events = iter(stream)
        start = next(events).data
        liminal.provider.wait_gate()
        yield start, events


################ Sending a message


def test_message_on_a_full_disk_is_refused_and_nothing_of_it_is_stored(shared):
    before = shared.sql("messages.db", STORED), shared.sql("liminal.db", "select count(*) from threads")
    with full(Limited(shared)):
        error = status(shared.api("POST", SEND, {"content": "x", "model": "openai/say-3-0"}), 507, "storage_full")
    assert error["retriable"] is True
    assert before == (shared.sql("messages.db", STORED), shared.sql("liminal.db", "select count(*) from threads"))
    assert text(shared.send("x", model="openai/say-3-0")) == numbered(3)


@pytest.mark.slow
def test_message_is_refused_then_taken_when_there_is_room(broken):
    liminal, disk = broken
    body, headers = {"content": "twice", "model": "openai/say-5-0"}, {"idempotency-key": "same"}
    with full(disk):
        for _ in range(2):
            status(liminal.api("POST", SEND, body, headers=headers), 507, "storage_full")
        assert liminal.sql("messages.db", STORED) == [(2, 2, 1)]
    events = liminal.read(liminal.stream(body, headers=headers))
    assert text(events) == numbered(5) and liminal.sql("messages.db", STORED) == [(4, 4, 2)]


@pytest.mark.slow
def test_refused_message_closes_the_call_of_its_provider(messages_disk):
    liminal, disk = messages_disk
    with full(disk):
        status(liminal.api("POST", SEND, {"content": "x", "model": "openai/say-10000-50"}), 507, "storage_full")
        eventually(lambda: len(liminal.provider.requests) == len(liminal.provider.closed))
    assert status(liminal.api("GET", "/api/v1/runs"), 200)["runs"] == []


@pytest.mark.slow
def test_refused_message_leaves_its_thread_free(messages_disk):
    liminal, disk = messages_disk
    thread_id = liminal.send("first", model="openai/say-3-0")[0].data["thread_id"]
    with full(disk):
        body = {"content": "x", "thread_id": thread_id, "model": "openai/say-3-0"}
        status(liminal.api("POST", SEND, body), 507, "storage_full")
    assert text(liminal.send("y", model="openai/say-3-0", thread_id=thread_id)) == numbered(3)


@pytest.mark.slow
def test_full_disk_stops_no_reading(broken):
    liminal, disk = broken
    thread_id = liminal.sql("liminal.db", "select id from threads")[0][0]
    fresh = status(liminal.api("POST", "/api/v1/keys", {"name": "fresh"}), 201)["secret"]
    with full(disk):
        for key in (None, fresh):
            found = status(liminal.api("GET", f"/api/v1/threads/{thread_id}/messages", key=key), 200)["messages"]
            assert [one["content"] for one in found] == ["first", numbered(3)]
        assert liminal.api("GET", "/health")[1]["domain"] == "ok"


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, path, body",
    [
        ("POST", "/api/v1/threads", {"title": "x"}),
        ("POST", "/api/v1/users", {"name": "x"}),
        ("PUT", "/api/v1/providers/x", {"kind": "openai", "base_url": "http://127.0.0.1:9"}),
        ("POST", f"{SEND}/MESSAGE/reactions", {"emoji": "👍"}),
        ("POST", f"{SEND}/MESSAGE/retry", {}),
        ("DELETE", "/api/v1/threads/THREAD", None),
    ],
)
def test_every_change_on_a_full_disk_is_refused_as_such(shared, method, path, body):
    start = shared.send("x", model="openai/say-3-0")[0].data
    path = path.replace("MESSAGE", start["message_id"]).replace("THREAD", start["thread_id"])
    with full(Limited(shared)):
        status(shared.api(method, path, body), 507, "storage_full")
    assert get(shared, start["message_id"])["content"] == numbered(3)
    assert shared.api(method, path, body)[0] < 300


################ Replies that run while the disk fills up


def told(events) -> list[tuple]:
    return [(one.data["status"], (one.data["error"] or {}).get("code")) for one in events if one.type == "done"]


@pytest.mark.slow
def test_reply_on_a_full_disk_is_told_as_such_and_stored_whole_with_its_status_when_there_is_room(messages_disk):
    liminal, disk = messages_disk
    with at_gate(liminal) as (start, events):
        with full(disk):
            liminal.provider.open_gate()
            events = list(events)
            assert text(events) == numbered(200) and told(events) == [("error", "storage_full")]
    message = eventually(lambda: (found := get(liminal, start["message_id"]))["status"] == "complete" and found)
    assert (message["content"], message["error"]) == (numbered(200), None)
    assert told(liminal.attach(start["message_id"])) == [("complete", None)]


@pytest.mark.slow
def test_thread_is_busy_until_its_reply_is_stored_and_free_then(messages_disk):
    liminal, disk = messages_disk
    with at_gate(liminal) as (start, events):
        with full(disk):
            liminal.provider.open_gate()
            list(events)
            body = {"content": "y", "model": "openai/say-3-0", "thread_id": start["thread_id"]}
            assert liminal.api("POST", SEND, body)[0] in (409, 507)
    eventually(lambda: get(liminal, start["message_id"])["status"] == "complete")
    assert text(liminal.send("y", model="openai/say-3-0", thread_id=start["thread_id"])) == numbered(3)


@pytest.mark.slow
def test_disk_that_is_full_in_mid_reply_only_is_not_noticed(messages_disk):
    liminal, disk = messages_disk
    with liminal.stream({"content": "x", "model": "openai/say-500-100"}) as stream:
        events = iter(stream)
        start = next(events).data
        with full(disk):
            seen = [next(events)]
            while len(text(seen)) < len(numbered(300)):  # longer than the Domain waits until it stores by itself
                seen.append(next(events))
        seen += list(events)
    assert text(seen) == numbered(500)
    message = eventually(lambda: (found := get(liminal, start["message_id"]))["status"] == "complete" and found)
    assert message["content"] == numbered(500)
    eventually(lambda: status(liminal.api("GET", "/api/v1/overflow"), 200)["waiting"] == [])


@pytest.mark.slow
def test_cancel_on_a_full_disk_is_answered_and_stored_when_there_is_room(messages_disk):
    liminal, disk = messages_disk
    with at_gate(liminal) as (start, _):
        with full(disk):
            code, body = liminal.api("POST", f"{SEND}/{start['message_id']}/cancel")
            assert code == 507 or code == 200 and body["upstream_closed"]
            liminal.provider.wait_closed()
    message = eventually(lambda: (found := get(liminal, start["message_id"]))["status"] == "cancelled" and found)
    assert message["content"] == numbered(60)


@pytest.mark.slow
def test_domain_killed_over_a_full_disk_gets_the_reply_from_the_edge(messages_disk):
    liminal, disk = messages_disk
    with at_gate(liminal) as (start, events):
        with full(disk):
            liminal.provider.open_gate()
            assert text(list(events)) == numbered(200)
            liminal.kill("domain")
            if isinstance(disk, Limited):
                liminal.start("domain")
    if "domain" not in liminal.servers:
        liminal.start("domain")
    message = eventually(
        lambda: (found := get(liminal, start["message_id"]))["position"] == len(numbered(200)) and found
    )
    assert (message["content"], message["error"]["code"]) == (numbered(200), "interrupted")


################ overflow.db


def fast_replies(liminal, n=8) -> list[str]:
    """Replies that close database bundles faster than a queue of one can bring them; all seen to their end."""
    with ThreadPoolExecutor(n) as pool:
        streams = list(pool.map(lambda i: liminal.send("x", model="openai/say-3000-0"), range(n)))
    assert all(text(events) == numbered(3000) for events in streams)
    return [events[0].data["message_id"] for events in streams]


@pytest.mark.slow
def test_bundles_that_overflow_refuses_are_left_to_the_domain_and_replies_are_whole(overflow_disk):
    liminal, disk = overflow_disk
    with full(disk):
        ids = fast_replies(liminal)
        left = eventually(lambda: status(liminal.api("GET", "/api/v1/overflow"), 200)["left_to_domain"])
        assert all(get(liminal, one)["content"] == numbered(3000) for one in ids) and left > 0
        assert liminal.api("GET", "/health")[0] == 200
    assert all(get(liminal, one)["status"] == "complete" for one in fast_replies(liminal, 2))
    eventually(lambda: status(liminal.api("GET", "/api/v1/overflow"), 200)["waiting"] == [])


@pytest.mark.slow
def test_domain_killed_while_overflow_is_full_is_followed_again(overflow_disk):
    liminal, disk = overflow_disk
    with at_gate(liminal) as (start, events), at_gate(liminal) as _:
        with full(disk):
            liminal.restart("domain", sig=signal.SIGKILL)
            assert told(events) == [("error", "interrupted")]
    assert numbered(60).startswith(get(liminal, start["message_id"])["content"])


@pytest.mark.slow
def test_server_starts_on_a_full_disk_or_says_why_not(small, make_liminal):
    liminal = make_liminal()
    small.hold(liminal, "messages.db", "liminal.db", "overflow.db")
    small.fill()
    with pytest.raises(AssertionError, match="not ready"):
        liminal.start("domain")
    liminal.servers.pop("domain")
    assert "Traceback" not in liminal.log("domain") and len(liminal.log("domain").splitlines()) == 1
    small.free()
    assert text(liminal.start().send("x", model="openai/say-3-0")) == numbered(3)
