"""Fixtures over the real thing: both servers as processes, the commands, a terminal, and a fake provider on a socket.

Nothing internal is mocked, and nothing of the project is imported: what a test sees is what a user's program would see.
`liminal` is a fresh installation for one test, `shared` one for all tests that leave it running, `make_liminal` makes
more. Each fails its test where a server has logged a traceback.

Order: pytest's options, an installation (processes, HTTP, commands), a terminal, fixtures.
"""

import fcntl
import itertools
import json
import os
import pty
import re
import select
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Iterator, NamedTuple

import httpx2
import pytest

from provider import Provider

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 20  # to the ready line, on a busy machine
ERROR_FIELDS = {"code": str, "message": str, "request_id": str, "retriable": bool}

################ Options: `--all` runs what is marked slow


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the slow tests too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes seconds; runs with --all only")
    config.addinivalue_line("markers", "core: runs without --all, though it starts servers of its own")


def pytest_collection_modifyitems(config, items):
    """Without --all: no slow test, of each parametrized one the first case, and none that needs an installation of its own
    but those marked core; a test that is asked for by its name always runs."""
    seen = set()
    for item in () if config.getoption("--all") or any("::" in word for word in config.args) else items:
        name, own = item.parent.nodeid + getattr(item, "originalname", item.name), {"liminal", "make_liminal"} & set(
            item.fixturenames
        )
        if item.get_closest_marker("slow") or own and not item.get_closest_marker("core"):
            item.add_marker(pytest.mark.skip(reason="slow: runs with --all"))
        elif name in seen:
            item.add_marker(pytest.mark.skip(reason="a further case: runs with --all"))
        seen.add(name)


################ An installation: processes with an environment made from nothing


class Event(NamedTuple):
    """One server-sent event; `id` is the last one seen, as a client would send it back, None where none came yet."""

    type: str
    id: str | None
    data: dict


class Stream:
    """One SSE answer, open at once: iterate for each `Event`; `close` it, or leave its `with`, to go away early."""

    def __init__(self, client: httpx2.Client, request: httpx2.Request):
        self.response = client.send(request, stream=True)
        self.status = self.response.status_code

    def __iter__(self) -> Iterator[Event]:
        assert self.status == 200, f"{self.status} {self.body()}"
        for event in httpx2.EventSource(self.response):
            if event.data:
                yield Event(event.event, event.id or None, json.loads(event.data))

    def lines(self) -> Iterator[str]:
        """Every line as it came, comments and pings too."""
        rest = b""
        for piece in self.response.iter_bytes():
            *lines, rest = (rest + piece).split(b"\n")
            yield from (line.decode() for line in lines)

    def body(self):
        """The JSON of an answer that is no stream."""
        return json.loads(self.response.read())

    def close(self):
        self.response.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Server:
    """One server process in its own session; `lines` holds what it wrote to stdout so far, the ready line first."""

    def __init__(self, script: Path, env: dict, log: Path):
        with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as stderr:
            command = [sys.executable, script]
            self.process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )
        self.lines, self.log, self.spoke = [], log, threading.Event()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        with self.process.stdout as stdout:
            for line in stdout:
                self.lines.append(line.decode().rstrip("\n"))
                self.spoke.set()
        self.spoke.set()

    def wait_ready(self, deadline: float) -> str:
        self.spoke.wait(max(0, deadline - time.monotonic()))
        if not self.lines:
            tail = self.log.read_text(errors="replace")[-4000:]
            raise AssertionError(f"not ready, exit code {self.process.poll()}, log:\n{tail}")
        return self.lines[0]

    def end(self, number: int, timeout: float) -> int:
        """Send the signal and return the exit code; an AssertionError, and SIGKILL, where it does not end in time."""
        self.process.send_signal(number)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"still running {timeout} s after signal {number}: {self.log.name}") from None


class Liminal:
    """One installation in a data folder, on two free ports. `settings` are environment variables; None leaves one out.

    data, home     its folders; `home` is the working directory of commands too, and empty
    env            the whole environment of its processes
    edge, domain   the servers' addresses
    servers        {"domain": Server, "edge": Server}, those that run
    provider       the fake provider its settings name, or None
    """

    def __init__(self, data: Path, provider: Provider | None = None, **settings: str | None):
        self.data, self.home, self.provider = data, data.with_name(f"{data.name}-home"), provider
        self.servers, self.terminals, self.checked, self.expect_traceback = {}, [], {}, False
        for folder in (data, self.home):
            folder.mkdir(0o700, parents=True, exist_ok=True)
        domain, edge = free_ports(2)
        self.domain, self.edge = f"http://127.0.0.1:{domain}", f"http://127.0.0.1:{edge}"
        env = {
            "PATH": os.environ["PATH"],
            "HOME": self.home,
            "PYTHONUNBUFFERED": "1",
            "LIMINAL_DATA": data,
            "LIMINAL_DOMAIN_PORT": domain,
            "LIMINAL_EDGE_PORT": edge,
            "LIMINAL_DOMAIN_URL": self.domain,
            "LIMINAL_URL": self.edge,
            "LIMINAL_CHECK_EVENTS": "1",
            **settings,
        }
        self.env = {name: str(value) for name, value in env.items() if value is not None}
        limits = httpx2.Limits(
            max_keepalive_connections=0
        )  # a connection each, so that a restarted server is no surprise
        self.client = httpx2.Client(base_url=self.edge, timeout=30, trust_env=False, limits=limits)

    # processes

    def start(self, *names: str) -> "Liminal":
        """Start the servers (both, if none is named) at once, and wait for their ready lines."""
        names = names or ("domain", "edge")
        for name in names:
            assert name not in self.servers, f"the {name} runs already"
            self.servers[name] = Server(ROOT / f"liminal_{name}.py", self.env, self.log_path(name))
        deadline = time.monotonic() + START_SECONDS
        for name in names:
            self.servers[name].wait_ready(deadline)
        return self

    def start_domain(self) -> "Liminal":
        return self.start("domain")

    def start_edge(self) -> "Liminal":
        return self.start("edge")

    def stop(self, name: str, sig=signal.SIGTERM, timeout=15.0) -> int:
        """The exit code; negative: the signal it died of."""
        return self.servers.pop(name).end(sig, timeout)

    def kill(self, name: str) -> int:
        return self.stop(name, signal.SIGKILL)

    def restart(self, *names: str, sig=signal.SIGTERM) -> "Liminal":
        """Stop and start the servers named, or both, the Edge first."""
        names = names or ("edge", "domain")
        for name in names:
            self.stop(name, sig)
        return self.start(*names)

    def close(self):
        """End all that was started here, and what `liminal up` started."""
        self.client.close()
        for terminal in self.terminals:
            terminal.close()
        try:
            for name in [name for name in ("edge", "domain") if name in self.servers]:
                self.stop(name)
        finally:
            for name in list(self.servers):
                self.kill(name)
        if any(answers(url) for url in (self.edge, self.domain)):
            self.cli("down")

    # files

    @property
    def key(self) -> str:
        """The owner's key."""
        return (self.data / "cli.key").read_text().strip()

    def log_path(self, name: str) -> Path:
        return self.data / f"{name}.stderr"

    def log(self, name: str) -> str:
        """All that the server's processes wrote to stderr."""
        return self.log_path(name).read_text(errors="replace") if self.log_path(name).exists() else ""

    def check_logs(self):
        """Fail where a server has logged a traceback since the last call."""
        for name in ("domain", "edge"):
            log = self.log(name)
            new, self.checked[name] = log[self.checked.get(name, 0) :], len(log)
            if "Traceback (most recent call last)" in new and not self.expect_traceback:
                pytest.fail(f"the {name} logged a traceback:\n{new[-6000:]}", pytrace=False)

    def sql(self, database: str, statement: str, *params) -> list[tuple]:
        """Rows of a database by its file name, messages.db say, read beside the running server."""
        with closing(sqlite3.connect(f"file:{self.data / database}?mode=ro", uri=True)) as connection:
            return connection.execute(statement, params).fetchall()

    # HTTP

    def request(self, method, path, body, key, headers, raw) -> httpx2.Request:
        """`key` None: the owner's; "": none. `raw` bytes go as they are, said to be JSON, in place of `body`."""
        key = self.key if key is None else key
        given = {"authorization": f"Bearer {key}"} if key else {}
        given |= {"content-type": "application/json"} if raw is not None else {}
        sent = {"json": body} if raw is None and body is not None else {"content": raw}
        return self.client.build_request(method, path, headers={**given, **(headers or {})}, **sent)

    def api(self, method, path, body=None, key=None, headers=None, raw=None) -> tuple[int, dict | list | None]:
        """(status, JSON) of the Edge's answer; None for JSON where the body is none. `path` may be a whole URL."""
        response = self.client.send(self.request(method, path, body, key, headers, raw))
        with suppress(ValueError):
            return response.status_code, response.json()
        return response.status_code, None

    def stream(self, body=None, path="/api/v1/messages", method="POST", headers=None, key=None) -> Stream:
        """Open a stream: ``with liminal.stream({"content": "hi"}) as stream: for event in stream: ...``"""
        return Stream(self.client, self.request(method, path, body, key, headers, None))

    def attach(self, message_id: str, after: int | str | None = None) -> list[Event]:
        """The events of a reply after a position, to `done`."""
        headers = {} if after is None else {"last-event-id": str(after)}
        return self.read(self.stream(None, f"/api/v1/messages/{message_id}/stream", "GET", headers))

    def stream_lines(self, *args, **fields) -> Iterator[str]:
        """The raw lines of a stream, opened as by `stream`."""
        with self.stream(*args, **fields) as stream:
            yield from stream.lines()

    def send(self, content: str, **fields) -> list[Event]:
        """Send a message and read its reply to `done`; an AssertionError where the stream ends without one."""
        return self.read(self.stream({"content": content, **fields}))

    def read(self, stream: Stream) -> list[Event]:
        with stream:
            events = []
            for event in stream:
                events.append(event)
                if event.type == "done":
                    return events
        raise AssertionError(f"the stream was cut after {events}")

    # commands

    def cli(self, *args: str, input: str | None = None, env: dict = {}, timeout=30.0) -> subprocess.CompletedProcess:
        """Run a command in an empty folder, with no input unless given: `returncode`, `stdout`, `stderr` (text)."""
        command, env = [sys.executable, ROOT / "liminal.py", *args], {**self.env, **env}
        return subprocess.run(
            command, input=input or "", env=env, cwd=self.home, capture_output=True, text=True, timeout=timeout
        )

    def terminal(self, *args: str, env: dict = {}, size=(24, 80)) -> "Terminal":
        """Run a command in a pseudo-terminal of (rows, columns); it ends with the installation."""
        command = [sys.executable, str(ROOT / "liminal.py"), *args]
        self.terminals.append(Terminal(command, {**self.env, "TERM": "xterm", **env}, self.home, size))
        return self.terminals[-1]


def free_ports(n: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def answers(url: str) -> bool:
    """Whether anything listens there."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 1):
        return True
    return False


def text(events: list[Event]) -> str:
    """The text of a reply: its `text` events, joined."""
    return "".join(event.data["text"] for event in events if event.type == "text")


def status(answer: tuple, expected: int, code: str | None = None) -> dict:
    """Assert an `api` answer's status and, for an error, its code and its one shape; return the JSON, or the error.

    status(liminal.api("GET", "/api/v1/threads/nope"), 404, "not_found")
    """
    got, body = answer
    assert got == expected, f"{got}, not {expected}: {body}"
    if expected < 400:
        return body
    assert set(body) == {"error"}, body
    error = body["error"]
    assert code in (None, error["code"]), error
    assert all(type(error.get(field)) is kind for field, kind in ERROR_FIELDS.items()), error
    assert set(error) <= {*ERROR_FIELDS, "field", "message_ids"}, error
    return error


################ A terminal


class Terminal:
    """A command in a real pseudo-terminal, controlling it. Output is read while a test waits for it, and not before."""

    def __init__(self, command: list[str], env: dict, cwd: Path, size: tuple[int, int]):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            try:
                os.chdir(cwd)
                os.execvpe(command[0], command, env)
            finally:
                os._exit(127)
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        self.output, self.ended, self.seen, self.code = b"", False, 0, None
        self.reaper = threading.Thread(target=self.reap, daemon=True)
        self.reaper.start()

    @property
    def screen(self) -> str:
        """All output so far, escape sequences too."""
        while self.read(0):
            pass
        return self.output.decode(errors="replace")

    def read(self, timeout: float) -> bool:
        """Whether something came in time."""
        if self.ended or not select.select([self.fd], [], [], max(0, timeout))[0]:
            return False
        piece = b""
        with suppress(OSError):  # Linux tells the end by EIO
            piece = os.read(self.fd, 65536)
        self.output, self.ended = self.output + piece, not piece
        return bool(piece)

    def expect(self, wanted: str | re.Pattern, timeout=10.0) -> re.Match:
        """Wait for a text or a compiled pattern behind what the last call found."""
        pattern = re.compile(re.escape(wanted)) if isinstance(wanted, str) else wanted
        deadline = time.monotonic() + timeout
        while not (found := pattern.search(self.screen, self.seen)):
            if not self.read(deadline - time.monotonic()) and (self.ended or time.monotonic() >= deadline):
                raise AssertionError(f"not seen: {pattern.pattern!r} in {self.screen[self.seen:]!r}")
        self.seen = found.end()
        return found

    def send(self, text: str):
        r"""Type; "\r" is the Enter key, "\x03" Ctrl-C, "\x04" Ctrl-D."""
        os.write(self.fd, text.encode())

    def wait(self, timeout=10.0) -> int:
        """The exit code, once the command has ended; negative: the signal it died of."""
        deadline = time.monotonic() + timeout
        while self.read(deadline - time.monotonic()):
            pass
        self.reaper.join(max(0, deadline - time.monotonic()))
        assert self.code is not None, f"still running after {timeout} s: {self.screen[-2000:]!r}"
        return self.code

    def reap(self):
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def hang_up(self):
        """Close the terminal, as its window's button would."""
        if self.fd is not None:
            os.close(self.fd)
        self.fd, self.ended = None, True

    def close(self):
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.reaper.join()
        self.hang_up()


################ Fixtures


@pytest.fixture
def provider():
    """A fake provider, see provider.py."""
    with closing(Provider()) as provider:
        yield provider


def with_provider(provider: Provider, settings: dict) -> dict:
    """Settings that send Anthropic and OpenAI to the fake provider, and Ollama to a closed port."""
    keys = {"ANTHROPIC_BASE_URL": provider.url, "ANTHROPIC_API_KEY": "test"}
    keys |= {"OPENAI_BASE_URL": provider.openai_url, "OPENAI_API_KEY": "test"}
    return {**keys, "OLLAMA_HOST": f"http://127.0.0.1:{free_ports(1)[0]}", **settings}


@pytest.fixture
def make_liminal(tmp_path, provider):
    """make_liminal(**settings): an installation, not started yet, its keys those of `provider`."""
    numbers = itertools.count()
    with ExitStack() as made:

        def make(**settings) -> Liminal:
            liminal = Liminal(tmp_path / f"data{next(numbers)}", provider, **with_provider(provider, settings))
            made.callback(liminal.check_logs)
            made.callback(liminal.close)
            return liminal

        yield make


@pytest.fixture
def liminal(make_liminal):
    """A fresh installation, both servers running."""
    return make_liminal().start()


@pytest.fixture(scope="session")
def shared_liminal(tmp_path_factory):
    with closing(Provider()) as provider:
        data = tmp_path_factory.mktemp("shared") / "data"
        with closing(Liminal(data, provider, **with_provider(provider, {}))) as liminal:
            yield liminal.start()


@pytest.fixture
def shared(shared_liminal):
    """One installation for all tests that restart nothing, `shared.provider` its own and as good as new."""
    shared_liminal.provider.reset()
    shared_liminal.expect_traceback = False
    yield shared_liminal
    shared_liminal.check_logs()


@pytest.fixture
def fixtures_dir() -> Path:
    """Recorded streams and test vectors, where they stand beside the checkout."""
    folder = ROOT.parent / "shared" / "fixtures"
    if not folder.is_dir():
        pytest.skip(f"no recorded data in {folder}")
    return folder
