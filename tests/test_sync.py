"""Acknowledged means on disk: seen from the kernel.

How it is checked: strace is attached to all threads of the running Domain and notes, in their order, what it writes to
the -wal files (pwrite64), each fdatasync or fsync of them, and what it sends. A fact stands where there is a write that
holds the data, then a sync of the same file that begins after this write, and only after the end of that sync the bytes
that tell of it. That the kernel and the disk keep what was synced is believed.
"""

import re
import shutil
import signal
import subprocess
import time
from contextlib import closing
from typing import NamedTuple

import pytest
from conftest import Liminal, status, text, with_provider

from provider import Provider

pytestmark = pytest.mark.slow
CALLS = "pwrite64,fdatasync,fsync,sendto,sendmsg,write,writev"
SENDS = ("sendto", "sendmsg", "write", "writev")


class Step(NamedTuple):
    """What the Domain did: "write", "sync begins", "sync", or "send"; `where` names the database written to."""

    what: str
    where: str
    data: str


class Trace:
    """strace on all threads of a process, from its construction to `steps`."""

    def __init__(self, pid: int, path):
        self.path = path
        command = ["strace", "-f", "-y", "-s", "8000", "-e", f"trace={CALLS}", "-o", str(path), "-p", str(pid)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        if "attached" not in (line := self.process.stderr.readline()):
            self.process.wait()
            pytest.skip(f"strace may not attach here: {line.strip()}")

    def steps(self) -> list[Step]:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(20)
        self.process.stderr.close()
        running, found = {}, []
        for line in self.path.read_text(errors="replace").splitlines():
            pid, _, rest = line.partition(" ")
            if re.match(r"\s*<\.\.\. \w+ resumed>", rest):
                found += ended(running.pop(pid, ""), rest)
            elif call := re.match(r"\s*(\w+)\(", rest):
                found += begun(call[1], rest)
                running[pid] = rest
                if not rest.endswith("<unfinished ...>"):
                    found += ended(running.pop(pid), rest)
        return found


def database(line: str) -> str | None:
    """The database whose -wal file a call is about: the first argument, as `-y` shows it."""
    found = re.match(r"\s*\w+\(\d+<[^>]*/(\w+)\.db-wal>", line)
    return found and found[1]


def begun(call: str, line: str) -> list[Step]:
    if call == "pwrite64" and database(line):
        return [Step("write", database(line), line)]
    if call in SENDS and "socket:[" in line.partition(",")[0] or "TCP:" in line.partition(",")[0]:
        return [Step("send", "", line.replace('\\"', '"'))]
    return [Step("sync begins", database(line), "")] if call.endswith("sync") and database(line) else []


def ended(line: str, end: str) -> list[Step]:
    is_sync = re.match(r"\s*f(data)?sync\(", line) and database(line) and re.search(r"= 0$", end)
    return [Step("sync", database(line), "")] if is_sync else []


def assert_synced(steps: list[Step], where: str, held: str, told: str):
    """`held` was first written to a database, then synced, and only then was `told` sent."""
    sent = next((i for i, step in enumerate(steps) if step.what == "send" and told in step.data), None)
    assert sent is not None, f"never sent: {told}"
    wrote = next((i for i, step in enumerate(steps) if step[:2] == ("write", where) and held in step.data), None)
    assert wrote is not None and wrote < sent, f"not written before it was told: {held}"
    between = [step.what for step in steps[wrote:sent] if step.where == where]
    assert "sync begins" in between and "sync" in between[between.index("sync begins") :], between


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """(steps, message id) of one whole reply in two halves, and of one that was cancelled, in a fresh installation."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    folder = tmp_path_factory.mktemp("traced")
    with closing(Provider()) as provider:
        with closing(Liminal(folder / "data", provider, **with_provider(provider, {}))) as liminal:
            trace = Trace(liminal.start().servers["domain"].process.pid, folder / "trace")
            message_id = reply_in_two_halves(liminal)
            cancel(liminal)
            yield trace.steps(), message_id
            liminal.check_logs()


def reply_in_two_halves(liminal) -> str:
    with liminal.stream({"content": "keep-me-safe", "model": "openai/gate-20-10"}) as stream:
        message_id = next(iter(stream)).data["message_id"]
        end = time.monotonic() + 20
        while liminal.sql("messages.db", "select position from messages where id = ?", message_id) != [(30,)]:
            assert time.monotonic() < end
            time.sleep(0.02)
        liminal.provider.open_gate()
        liminal.attach(message_id)
    liminal.provider.close_gate()
    return message_id


def cancel(liminal):
    with liminal.stream({"content": "x", "model": "openai/gate-20-10"}) as stream:
        events = iter(stream)
        start = next(events).data
        while len(text([next(events)])) == 0:
            pass
        status(liminal.api("POST", f"/api/v1/messages/{start['message_id']}/cancel"), 200)


def test_message_is_synced_before_start_is_sent(traced):
    steps, message_id = traced
    assert_synced(steps, "messages", "keep-me-safe", f'{{"type":"start","message_id":"{message_id}"')


def test_thread_is_synced_before_its_messages_are_written(traced):
    steps, _ = traced
    wrote, thread = [
        next(i for i, step in enumerate(steps) if step[:2] == ("write", where) and "keep-me-safe" in step.data)
        for where in ("messages", "liminal")
    ]
    assert thread < wrote and Step("sync", "liminal", "") in steps[thread:wrote]


def test_bundle_is_synced_before_it_is_answered(traced):
    steps, message_id = traced
    assert_synced(steps, "messages", " t0", f'{{"messages":{{"{message_id}":')


def test_final_status_is_synced_before_done_is_sent(traced):
    steps, _ = traced
    assert_synced(steps, "messages", "total_ms", '{"type":"done","status":"complete"')


def test_cancel_is_synced_before_its_receipt_is_sent(traced):
    steps, _ = traced
    assert_synced(steps, "messages", 'estimated\\":true', '"status":"cancelled","position":')
