"""Recorded streams of real providers, played in one piece, byte by byte and with CRLF, each giving the same message."""

import json

import pytest

from conftest import status, text
from provider import anthropic_stream, openai_stream

WAYS = {
    "whole": lambda data: [data],
    "byte by byte": lambda data: [data[i : i + 1] for i in range(len(data))],
    "CRLF": lambda data: [data.replace(b"\n", b"\r\n")],
    "CRLF byte by byte": lambda data: [bytes([byte]) for byte in data.replace(b"\n", b"\r\n")],
}
STREAMS = {
    "anthropic_text_ping.sse": "end_turn",
    "anthropic_parallel_tools_turn1.sse": "tool_use",
    "anthropic_parallel_tools_turn2.sse": "end_turn",
    "anthropic_thinking_signature_tool.sse": "tool_use",
    "openai_parallel_tool_calls_usage.sse": "tool_use",
    "ollama_reasoning.sse": "end_turn",
}
AGAIN = {"anthropic": anthropic_stream, "openai": openai_stream}  # what follows where tools are called
BROKEN = {
    "anthropic_overloaded_midstream.CONSTRUCTED.sse": ("provider_overloaded", "Overloaded"),
    "openrouter_comments_midstream_error.sse": None,
}


def frames(data: bytes) -> list[dict]:
    """The JSON of each data line; every recorded frame has exactly one."""
    lines = [line[6:].strip() for line in data.decode().split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def anthropic_expected(frames: list[dict]) -> tuple[list, dict]:
    """(parts, usage) by the shortest way: join each block's deltas."""
    blocks, usage = {}, {}
    for frame in frames:
        usage |= frame.get("message", frame).get("usage") or {}
        if frame["type"] == "content_block_start":
            blocks[frame["index"]] = [frame["content_block"], ""]
        elif frame["type"] == "content_block_delta" and frame["delta"]["type"] != "signature_delta":
            blocks[frame["index"]][1] += list(frame["delta"].values())[1]
    parts = [anthropic_part(block, said) for block, said in blocks.values()]
    return parts, {"input_tokens": usage["input_tokens"], "output_tokens": usage["output_tokens"]}


def anthropic_part(block: dict, said: str) -> dict:
    if block["type"] == "tool_use":
        call = {"tool_call_id": block["id"], "name": block["name"], "arguments": json.loads(said)}
        return {"type": "tool_call", **call}
    return {"type": block["type"], "text": said}


def openai_expected(frames: list[dict]) -> tuple[list, dict]:
    """(parts, usage): reasoning, then text, then calls, which is the order in all recordings."""
    thinking = said = ""
    calls, usage = {}, {}
    for frame in frames:
        usage = frame.get("usage") or usage
        for delta in [choice["delta"] for choice in frame["choices"]]:
            thinking, said = thinking + (delta.get("reasoning") or ""), said + (delta.get("content") or "")
            for piece in delta.get("tool_calls") or ():
                known = calls.setdefault(piece["index"], {"id": piece.get("id"), "name": "", "arguments": ""})
                for name in ("name", "arguments"):
                    known[name] += piece["function"].get(name) or ""
    parts = [{"type": kind, "text": words} for kind, words in (("thinking", thinking), ("text", said)) if words]
    for call in calls.values():
        named = {"tool_call_id": call["id"], "name": call["name"], "arguments": json.loads(call["arguments"])}
        parts.append({"type": "tool_call", **named})
    return parts, {"input_tokens": usage.get("prompt_tokens"), "output_tokens": usage.get("completion_tokens")}


def play(shared, fixtures_dir, name: str, way: str) -> tuple[list[dict], list, dict]:
    """(the frames played, the events of the reply, the message as stored)"""
    data = (fixtures_dir / name).read_bytes()
    data += b"\n\n" if name == "anthropic_text_ping.sse" else b""  # recorded without its last blank line
    shared.provider.script(*WAYS[way](data))
    kind = "anthropic" if name.startswith("anthropic") else "openai"
    if STREAMS.get(name) == "tool_use":
        shared.provider.script(*AGAIN[kind]("over", stop="max_tokens", input_tokens=0))
    events = shared.send("hello", model=f"{kind}/recorded")
    return frames(data), events, status(shared.api("GET", f"/api/v1/messages/{events[0].data['message_id']}"), 200)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", STREAMS)
def test_a_recorded_stream_gives_its_parts_its_reason_and_its_usage(shared, fixtures_dir, name, way):
    played, events, message = play(shared, fixtures_dir, name, way)
    parts, usage = (anthropic_expected if name.startswith("anthropic") else openai_expected)(played)
    assert (message["status"], message["error"]) == ("complete", None)
    if STREAMS[name] == "tool_use":
        calls = [part for part in parts if part["type"] == "tool_call"]
        *found, last = message["parts"]
        results, message["parts"] = found[len(parts) :], found[: len(parts)]
        assert [one["tool_call_id"] for one in results] == [one["tool_call_id"] for one in calls] and last[
            "text"
        ] == "over"
        usage["output_tokens"] += 1
    assert message["parts"] == parts and message["stop_reason"] == events[-1].data["stop_reason"]
    assert message["stop_reason"] == ("max_tokens" if STREAMS[name] == "tool_use" else STREAMS[name])
    if usage["input_tokens"] is None:
        assert message["usage"]["estimated"]
    else:
        assert {**message["usage"], **usage, "estimated": False} == message["usage"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BROKEN)
def test_a_recorded_error_in_mid_stream_keeps_what_came(shared, fixtures_dir, name, way):
    played, events, message = play(shared, fixtures_dir, name, way)
    errors = [frame["error"] for frame in played if frame.get("error")]
    expected = "provider_overloaded" if name.startswith("anthropic") else "provider_error"
    assert (message["status"], message["error"]["code"]) == ("error", expected)
    assert errors[0]["message"] in message["error"]["message"]
    assert message["content"] == text(events) == said_before(played)


def said_before(played: list[dict]) -> str:
    """The text of all frames before the error, in either format."""
    deltas = [frame.get("delta") or (frame.get("choices") or [{}])[0].get("delta") or {} for frame in played]
    return "".join(delta.get("text") or delta.get("content") or "" for delta in deltas)
