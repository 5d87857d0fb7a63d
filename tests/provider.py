"""A fake LLM provider on a real socket, speaking Anthropic Messages and OpenAI Chat Completions, streamed.

What it answers is a list of *steps*, played one after the other: bytes (sent as a chunk of their own), a number
(seconds to wait), or RESET, CLOSE, HANG, GATE. They come from a script that the test queued, else from what the user
says (lines ``CALL name {json}``, tool results), else from the model's name (see `parts_of`, `Provider.answer_of`).
Token i always reads `` t<i>``, so that loss, repetition and reordering show. HTTP is written by hand: faults need
every byte.

Order: the two wire formats, what a request is answered with, the provider.
"""

import asyncio
import json
import re
import socket
import struct
import threading
import time
from collections import deque
from itertools import chain, count
from typing import Iterable, Iterator, NamedTuple


class Step(str):
    """Something to do in mid-stream, told apart from a text by its class. In a script its plain string will do."""


RESET = Step("reset")  # TCP reset
CLOSE = Step("close")  # the answer ends here, cleanly, whatever is missing
HANG = Step("hang")  # no more bytes until the client goes away
GATE = Step("gate")  # wait until the test opens the gate

################ The two wire formats: parts in, steps out
# A part is a string (one text delta) or a tuple: ("thinking", text), ("redacted", data), ("tool", name, arguments) or
# ("tool", name, arguments, id), the arguments a dict, or a string that is sent as it is. Steps (bytes and numbers too)
# pass through, so a fault, a pause or a gate may stand between two deltas. Neighbours of one kind share a block; each
# tool has its own. `stop` is Anthropic's stop_reason, for both: "auto" says tool_use after a tool, else end_turn; None
# leaves out the whole tail: the block's end, the reason, the end marker. Each part counts as one output token.

FINISH = {"end_turn": "stop", "tool_use": "tool_calls", "max_tokens": "length"}  # Anthropic's reasons in OpenAI's words
CALL_NUMBERS = count()  # a tool call's id comes once, as with real providers


def anthropic_stream(*parts, **options) -> list:
    """The steps of one Anthropic answer, for `Provider.script`; options: stop, model, input_tokens."""
    return list(anthropic_steps(parts, **options))


def openai_stream(*parts, **options) -> list:
    """The steps of one OpenAI answer, for `Provider.script`; options: stop, model, input_tokens, usage, thinking."""
    return list(openai_steps(parts, **options))


def anthropic_error(message="Overloaded", kind="overloaded_error") -> bytes:
    """An error event in mid-stream."""
    return sse("error", {"error": {"type": kind, "message": message}})


def openai_error(message="Overloaded", kind="server_error", code=529) -> bytes:
    """An error chunk in mid-stream."""
    return data_line({"error": {"message": message, "type": kind, "code": code}})


def sse(event: str, data: dict) -> bytes:
    return f"event: {event}\n".encode() + data_line({"type": event, **data})


def data_line(data: dict) -> bytes:
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


def is_step(part) -> bool:
    return isinstance(part, (bytes, int, float, Step))


def unpacked(part: str | tuple) -> tuple:
    return ("text", part) if isinstance(part, str) else part


def in_pieces(arguments: dict | str, size=7) -> list[str]:
    """Tool arguments as providers stream them: an empty piece, then a few letters at a time."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return ["", *(text[i : i + size] for i in range(0, len(text), size))]


def anthropic_steps(parts: Iterable, stop="auto", model="scripted", input_tokens=12) -> Iterator:
    """Thinking is signed ``signature-<index of its block>``."""
    usage = {"input_tokens": input_tokens, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
    head = {"id": "msg_fake", "type": "message", "role": "assistant", "model": model, "content": []}
    head |= {"stop_reason": None, "stop_sequence": None, "usage": usage | {"output_tokens": 1}}
    yield sse("message_start", {"message": head}) + sse("ping", {})
    index, block, tokens, reason = -1, None, 0, "end_turn"
    for part in parts:
        if is_step(part):
            yield part
            continue
        kind, *values = unpacked(part)
        if kind != block or kind in ("tool", "redacted"):
            yield from anthropic_close(index, block)
            index, block = index + 1, kind
            yield sse("content_block_start", {"index": index, "content_block": anthropic_block(kind, *values)})
        for delta in anthropic_deltas(kind, *values):
            yield sse("content_block_delta", {"index": index, "delta": delta})
        tokens, reason = tokens + 1, "tool_use" if kind == "tool" else reason
    if stop:
        yield from anthropic_close(index, block)
        delta = {"stop_reason": reason if stop == "auto" else stop, "stop_sequence": None}
        yield sse("message_delta", {"delta": delta, "usage": {"output_tokens": tokens}}) + sse("message_stop", {})


def anthropic_block(kind: str, value: str, arguments=None, tool_id=None) -> dict:
    return {
        "text": {"type": "text", "text": ""},
        "thinking": {"type": "thinking", "thinking": "", "signature": ""},
        "redacted": {"type": "redacted_thinking", "data": value},
        "tool": {"type": "tool_use", "id": tool_id or f"toolu_{next(CALL_NUMBERS)}", "name": value, "input": {}},
    }[kind]


def anthropic_deltas(kind: str, value: str, arguments=None, tool_id=None) -> list[dict]:
    if kind == "tool":
        return [{"type": "input_json_delta", "partial_json": piece} for piece in in_pieces(arguments)]
    return [] if kind == "redacted" else [{"type": f"{kind}_delta", kind: value}]


def anthropic_close(index: int, block: str | None) -> Iterator[bytes]:
    if block == "thinking":
        delta = {"type": "signature_delta", "signature": f"signature-{index}"}
        yield sse("content_block_delta", {"index": index, "delta": delta})
    if block:
        yield sse("content_block_stop", {"index": index})


def openai_steps(
    parts: Iterable, stop="auto", model="scripted", input_tokens=12, usage=True, thinking="reasoning_content"
) -> Iterator:
    """`usage`: as if stream_options.include_usage were set; `thinking`: the delta's field, on which servers differ."""
    head = {"id": "chatcmpl-fake", "object": "chat.completion.chunk", "created": 1700000000, "model": model}
    head |= {"usage": None} if usage else {}

    def chunk(delta, reason=None):
        return data_line(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})

    yield chunk({"role": "assistant", "content": ""})
    tokens = tools = 0
    for part in parts:
        if is_step(part):
            yield part
            continue
        kind, *values = unpacked(part)
        if kind == "tool":
            for call in openai_calls(tools, *values):
                yield chunk({"tool_calls": [call]})
        elif kind != "redacted":  # which this format does not have
            yield chunk({"content" if kind == "text" else thinking: values[0]})
        tokens, tools = tokens + 1, tools + (kind == "tool")
    if stop:
        yield chunk({}, ("tool_calls" if tools else "stop") if stop == "auto" else FINISH.get(stop, stop))
        total = {"prompt_tokens": input_tokens, "completion_tokens": tokens, "total_tokens": input_tokens + tokens}
        yield (data_line(head | {"choices": [], "usage": total}) if usage else b"") + b"data: [DONE]\n\n"


def openai_calls(index: int, name: str, arguments: dict | str, tool_id=None) -> Iterator[dict]:
    start, *pieces = in_pieces(arguments)
    named = {
        "id": tool_id or f"call_{next(CALL_NUMBERS)}",
        "type": "function",
        "function": {"name": name, "arguments": start},
    }
    yield {"index": index, **named}
    for piece in pieces:
        yield {"index": index, "function": {"arguments": piece}}


################ What a request is answered with
# Parts and steps are made while they are played, so a rate keeps to its own start and does not drift.


class Answer(NamedTuple):
    """One HTTP answer, its body in steps."""

    steps: Iterable
    status: int = 200
    headers: dict = {}
    content_type: str = "text/event-stream"


def parts_of(model: str, said: str) -> Iterator:
    """What a model's name (without its fault) stands for; ValueError where it stands for nothing.

    say-N-RATE       N tokens, RATE a second; 0: as fast as the client takes them
    think-N-RATE     the same, the first half of them as thinking
    gate-N-K         K tokens, the gate, the others up to N
    echo             what the user said last, a token for each word
    """
    match model.split("-"):
        case ["echo"]:
            return (token for token in re.split("(?= )", said) if token)
        case ["say", n, rate]:
            return paced(tokens(int(n)), float(rate))
        case ["think", n, rate]:
            half = [("thinking", token) for token in tokens(int(n) // 2)]
            return paced(chain(half, tokens(int(n), len(half))), float(rate))
        case ["gate", n, k]:
            return chain(tokens(int(k)), [GATE], tokens(int(n), int(k)))
    raise ValueError(f"model: {model}")


def tokens(stop: int, start=0) -> Iterator[str]:
    return (f" t{i}" for i in range(start, stop))


def paced(parts: Iterable, rate: float) -> Iterator:
    started = time.monotonic()
    for i, part in enumerate(parts, 1):
        if rate:
            yield max(0.0, started + i / rate - time.monotonic())
        yield part


def first(n: int, parts: Iterator) -> Iterator:
    """The parts up to the n-th token, leaving the others in `parts`."""
    while n > 0 and (part := next(parts, None)) is not None:
        yield part
        n -= not is_step(part)


def text_of(content) -> str:
    """The plain text of a message's content, in either format."""
    if isinstance(content, str):
        return content
    return "".join(text_of(block.get("text") or block.get("content")) for block in content or [])


def results_of(messages: list[dict]) -> list[str]:
    """The texts of the tool results that came last, in either format."""
    blocks = messages[-1]["content"] if messages else None
    if isinstance(blocks, list) and any(block["type"] == "tool_result" for block in blocks):
        return [text_of(block.get("content")) for block in blocks if block["type"] == "tool_result"]
    others = max((i for i, message in enumerate(messages, 1) if message["role"] != "tool"), default=0)
    return [text_of(message["content"]) for message in messages[others:]]


def calls_of(said: str) -> list[tuple]:
    """The tools that the user's lines ``CALL name {json}`` ask for."""
    return [("tool", name, arguments or "{}") for name, arguments in re.findall(r"(?m)^CALL (\S+) ?(.*)$", said)]


def failure(status: int, message: str, **headers: str) -> Answer:
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 529: "overloaded_error"}
    error = {"type": kinds.get(status, "api_error"), "message": message, "code": None}
    return json_answer({"type": "error", "error": error}, status, headers)


def json_answer(body: dict, status=200, headers={}) -> Answer:
    return Answer([json.dumps(body).encode()], status, headers, "application/json")


################ The provider: Connection, read_request, Provider
# One asyncio loop in a thread of the tests' process. What the test reads is written under one Condition.


class Connection(asyncio.StreamReaderProtocol):
    """A connection that knows when its client is gone; half-closed counts as gone."""

    def __init__(self, serve):
        super().__init__(asyncio.StreamReader(), lambda reader, writer: serve(self, reader, writer))
        self.gone = asyncio.Event()

    def eof_received(self):
        super().eof_received()
        return False

    def connection_lost(self, error):
        super().connection_lost(error)
        self.gone.set()


async def read_request(reader: asyncio.StreamReader) -> tuple[str, dict, dict | None]:
    """(path, headers, body) of the next request, the body None for a GET; IncompleteReadError at the end."""
    request, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
    method, path, _ = request.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    if "chunked" in headers.get("transfer-encoding", ""):
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    return path, headers, json.loads(body) if method == "POST" else None


def reset(writer: asyncio.StreamWriter):
    """Close with a TCP reset, where a plain close would end the connection in good order."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Provider:
    """The fake provider, running from its construction to `close`.

    url          base for the Anthropic SDK, http://127.0.0.1:PORT
    openai_url   base for OpenAI-compatible clients, url + "/v1"
    requests     every POST in order of arrival: {path, headers (lower-case), body (parsed)}
    closed       (model, time.monotonic()) of every answer whose client went away before its end
    models       the ids that GET .../models lists
    fail_times   how many of the next faults sNNN really fail; None: all
    retry_after  the header that a 429 or 529 carries
    """

    def __init__(self):
        self.models = ["say-20-0", "echo"]
        self.changed, started = threading.Condition(), threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.run(started)), daemon=True)
        self.thread.start()
        started.wait()
        self.reset()

    async def run(self, started: threading.Event):
        self.loop, self.stopped, self.gate = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        server = await self.loop.create_server(lambda: Connection(self.serve), "127.0.0.1", 0, backlog=1024)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self.openai_url = f"{self.url}/v1"
        started.set()
        await self.stopped.wait()
        server.close()

    def close(self):
        self.loop.call_soon_threadsafe(self.stopped.set)
        self.thread.join()

    def reset(self):
        """Forget all requests, scripts and failures, and shut the gate: a fresh provider at the same address."""
        self.requests, self.closed, self.scripts = [], [], deque()
        self.fail_times, self.retry_after, self.at_gate = None, "0", 0
        self.close_gate()

    def script(self, *steps, status=200, headers={}, content_type="text/event-stream"):
        """Answer one POST with these steps, whatever it asks; the next one that no earlier script is for."""
        wrong = [step for step in steps if not is_step(step) and step not in (RESET, CLOSE, HANG, GATE)]
        assert not wrong, f"a step is bytes, seconds, reset, close, hang or gate, not {wrong[0]!r}"
        self.scripts.append(Answer(steps, status, headers, content_type))

    def open_gate(self):
        """Let every answer go on that stands at a gate, or comes to one before `close_gate`."""
        self.loop.call_soon_threadsafe(self.gate.set)

    def close_gate(self):
        self.loop.call_soon_threadsafe(self.gate.clear)

    def wait_gate(self, n=1, timeout=20):
        """Wait until answers have come to a gate n times."""
        self.wait(lambda: self.at_gate >= n, timeout, f"{n} at the gate")

    def wait_requests(self, n=1, timeout=20) -> list[dict]:
        self.wait(lambda: len(self.requests) >= n, timeout, f"{n} requests")
        return self.requests

    def wait_closed(self, n=1, timeout=20) -> list[tuple]:
        self.wait(lambda: len(self.closed) >= n, timeout, f"{n} answers left by their clients")
        return self.closed

    def wait(self, condition, timeout: float, what: str):
        with self.changed:
            if not self.changed.wait_for(condition, timeout):
                so_far = f"{len(self.requests)} requests, {self.at_gate} at the gate, closed {self.closed}"
                raise AssertionError(f"waited {timeout} s for {what}: {so_far}")

    async def serve(self, connection: Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        """Answer the requests of one connection, each until it is done or its client has gone."""
        gone = asyncio.ensure_future(connection.gone.wait())
        try:
            while True:
                path, headers, body = await read_request(reader)
                closed, playing = self.closed, asyncio.ensure_future(
                    self.play(self.answer(path, headers, body), writer)
                )
                await asyncio.wait([playing, gone], return_when=asyncio.FIRST_COMPLETED)
                if not playing.done() or isinstance(playing.exception(), ConnectionError):
                    playing.cancel()
                    return self.note(lambda: closed.append(((body or {}).get("model"), time.monotonic())))
                if not playing.result():
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            gone.cancel()
            writer.close()

    def note(self, change):
        with self.changed:
            change()
            self.changed.notify_all()

    def answer(self, path: str, headers: dict, body: dict | None) -> Answer:
        if body is None:
            models = [{"id": name, "object": "model", "type": "model", "display_name": name} for name in self.models]
            return json_answer({"object": "list", "data": models, "has_more": False})
        self.note(lambda: self.requests.append({"path": path, "headers": headers, "body": body}))
        if self.scripts:
            return self.scripts.popleft()
        try:
            return self.answer_of(body, anthropic=path.partition("?")[0].endswith("/messages"))
        except ValueError as error:
            return failure(404, str(error))
        except KeyError as field:
            return failure(400, f"{field}: Field required")

    def answer_of(self, body: dict, anthropic: bool) -> Answer:
        """What a request asks for, with the fault in which its model's name may end: ``-FAULT@K``, before token K.

        cut (TCP reset), end (clean end without end marker), hang, err (an error event, then the end), garbage (a
        malformed frame, then it goes on), truncated (a tool call cut off by max_tokens); whatever K is: html (a page
        with status 200), sNNN (HTTP status NNN)
        """
        model, fault, at = re.fullmatch(r"(.*?)(?:-(\w+)@(\d+))?", body["model"].rpartition("/")[2]).groups()
        if fault == "html":
            return Answer([b"<!doctype html><title>Sign in</title>"], content_type="text/html")
        if re.fullmatch(r"s\d+", fault or "") and self.fails():
            waits = {"retry-after": self.retry_after} if fault in ("s429", "s529") else {}
            return failure(int(fault[1:]), f"fake {fault}", **waits)
        said = next((text_of(m["content"]) for m in reversed(body["messages"]) if m["role"] == "user"), "")
        results = [f"GOT<{text}>" for text in results_of(body["messages"])]
        parts = iter(results or calls_of(said) or parts_of(model, said))
        name = body["tools"][0].get("name") or body["tools"][0]["function"]["name"] if body.get("tools") else "none"
        faults = {
            "cut": [RESET],
            "end": [CLOSE],
            "hang": [HANG],
            "err": [anthropic_error() if anthropic else openai_error(), CLOSE],
            "garbage": [b'event: content_block_delta\ndata: {"type":\n\n' if anthropic else b"data: {oops\n\n"],
            "truncated": [("tool", name, '{"path": "READ')],
        }
        if fault in faults:
            parts = chain(first(int(at), parts), faults[fault], parts if fault == "garbage" else ())
        options = {"stop": "max_tokens" if fault == "truncated" else "auto", "model": body["model"]}
        if anthropic:
            return Answer(anthropic_steps(parts, **options))
        return Answer(openai_steps(parts, usage=body.get("stream_options", {}).get("include_usage", False), **options))

    def fails(self) -> bool:
        if self.fail_times is None:
            return True
        self.fail_times -= 1
        return self.fail_times >= 0

    async def play(self, answer: Answer, writer: asyncio.StreamWriter) -> bool:
        """Send an answer, a chunk for each step of bytes; true if the connection may be used again."""
        headers = {"content-type": answer.content_type, "transfer-encoding": "chunked", **answer.headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"HTTP/1.1 {answer.status} Fake\r\n{lines}\r\n".encode())
        for step in answer.steps:
            match step:
                case "reset":
                    return reset(writer)
                case "close":
                    break
                case "hang":
                    await asyncio.Event().wait()
                case "gate":
                    self.note(lambda: setattr(self, "at_gate", self.at_gate + 1))
                    await self.gate.wait()
                case b"":
                    pass  # an empty chunk would be the end
                case bytes():
                    writer.write(b"%x\r\n%b\r\n" % (len(step), step))
                    await writer.drain()
                    await asyncio.sleep(0)
                case seconds:
                    await asyncio.sleep(seconds)
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True
