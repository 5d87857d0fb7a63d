"""The fake provider speaks both wire formats as the real ones do, judged by Anthropic's SDK and by aiohttp."""

import asyncio
import json

import aiohttp
import anthropic
import httpx2
import pytest

from provider import GATE, anthropic_error, anthropic_stream, openai_stream

SAY = {"max_tokens": 99, "messages": [{"role": "user", "content": "one two"}]}
CALLS = {"max_tokens": 99, "messages": [{"role": "user", "content": 'CALL a {"x": "long enough"}\nCALL b'}]}


def sdk_message(provider, model, body=SAY):
    """The message as Anthropic's SDK puts it together."""
    with anthropic.Anthropic(base_url=provider.url, api_key="test", max_retries=1) as client:
        with client.messages.stream(model=model, **body) as stream:
            return stream.get_final_message()


def openai_chunks(provider, model, body=SAY):
    """The chunks of the same question asked twice over one connection, [first, second], without the end marker."""
    body = {"model": model, "stream": True, "stream_options": {"include_usage": True}, **body}

    async def ask(session):
        async with session.post(f"{provider.openai_url}/chat/completions", json=body) as answer:
            *lines, end = (await answer.text()).strip().split("\n\n")
            assert end == "data: [DONE]"
            return [json.loads(line.removeprefix("data: ")) for line in lines]

    async def ask_twice():
        async with aiohttp.ClientSession() as session:
            return [await ask(session), await ask(session)]

    return asyncio.run(ask_twice())


def said(chunks):
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])


def test_anthropic_text_with_usage(provider):
    message = sdk_message(provider, "say-3-0")
    assert message.content[0].text == " t0 t1 t2" and message.stop_reason == "end_turn"
    assert (message.usage.input_tokens, message.usage.output_tokens) == (12, 3)


def test_anthropic_thinking_is_signed(provider):
    thinking, text = sdk_message(provider, "think-4-0").content
    assert (thinking.thinking, thinking.signature, text.text) == (" t0 t1", "signature-0", " t2 t3")


def test_anthropic_tools_in_parallel(provider):
    message = sdk_message(provider, "echo", CALLS)
    assert [(b.name, b.input) for b in message.content] == [("a", {"x": "long enough"}), ("b", {})]
    assert message.stop_reason == "tool_use" and message.content[0].id != message.content[1].id


def test_anthropic_tool_results_are_answered(provider):
    result = [{"type": "tool_result", "tool_use_id": "toolu_0", "content": "42"}]
    body = {"max_tokens": 9, "messages": [{"role": "user", "content": result}]}
    assert sdk_message(provider, "echo", body).content[0].text == "GOT<42>"


def test_openai_text_with_usage_over_one_connection(provider):
    for first, *chunks, finish, usage in openai_chunks(provider, "say-3-0"):
        assert first["choices"][0]["delta"]["role"] == "assistant" and said(chunks) == " t0 t1 t2"
        assert finish["choices"][0]["finish_reason"] == "stop" and usage["choices"] == []
        assert usage["usage"] == {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}


def test_openai_tools_in_parallel(provider):
    [_, *chunks, finish, _], _ = openai_chunks(provider, "echo", CALLS)
    calls = {0: "", 1: ""}
    for call in (chunk["choices"][0]["delta"]["tool_calls"][0] for chunk in chunks):
        calls[call["index"]] += call["function"]["arguments"]
    assert calls == {0: '{"x": "long enough"}', 1: "{}"} and finish["choices"][0]["finish_reason"] == "tool_calls"


def test_openai_tool_results_are_answered(provider):
    messages = [*CALLS["messages"], *({"role": "tool", "tool_call_id": i, "content": i} for i in "12")]
    assert said(openai_chunks(provider, "echo", {"messages": messages})[0]) == "GOT<1>GOT<2>"


def test_echo_keeps_every_space(provider):
    body = {"messages": [{"role": "user", "content": " a  b \n c "}]}
    assert said(openai_chunks(provider, "echo", body)[0]) == " a  b \n c "


def test_reset_surfaces_as_a_transport_error(provider):
    with pytest.raises(httpx2.ReadError):
        sdk_message(provider, "say-9-0-cut@3")
    with pytest.raises(aiohttp.ClientError):
        openai_chunks(provider, "say-9-0-cut@3")
    assert provider.closed == []


def test_clean_end_without_end_marker_raises_nothing(provider):
    message = sdk_message(provider, "say-9-0-end@2")
    assert message.content[0].text == " t0 t1" and message.stop_reason is None


def test_error_in_mid_stream(provider):
    provider.script(*anthropic_stream("Hel", stop=None), anthropic_error())
    for model in ("scripted", "say-9-0-err@2"):
        with pytest.raises(anthropic.APIStatusError) as caught:
            sdk_message(provider, model)
        assert caught.value.status_code == 200 and caught.value.body["error"]["type"] == "overloaded_error"


def test_truncated_tool_call_stops_at_max_tokens(provider):
    message = sdk_message(provider, "say-9-0-truncated@1")
    assert [b.type for b in message.content] == ["text", "tool_use"] and message.stop_reason == "max_tokens"


def test_fails_so_many_times(provider):
    provider.fail_times = 1
    assert sdk_message(provider, "say-1-0-s529@0").content[0].text == " t0"
    assert [r["headers"]["authorization"] for r in provider.requests] == ["Bearer test"] * 2
    provider.fail_times = None
    with pytest.raises(anthropic.RateLimitError):
        sdk_message(provider, "say-1-0-s429@0")


def test_gate_holds_a_stream_and_leaving_is_noticed(provider):
    body = {"model": "gate-4-2", "stream": True, **SAY}
    with httpx2.stream("POST", f"{provider.url}/v1/messages", json=body) as answer:
        lines = answer.iter_lines()
        assert any(" t1" in line for line in lines)
        provider.wait_gate()
    assert provider.wait_closed()[0][0] == "gate-4-2"


def test_script_plays_parts_steps_and_headers(provider):
    provider.script(*anthropic_stream(("redacted", "x"), 0.01, GATE, "one", ("tool", "a", {"k": 1}, "id-1")))
    provider.open_gate()
    redacted, text, tool = sdk_message(provider, "any").content
    assert (redacted.data, text.text, tool.id, tool.input) == ("x", "one", "id-1", {"k": 1})
    provider.script(*openai_stream(("thinking", "hm"), "yes"), headers={"x-request-id": "7"})
    assert httpx2.post(f"{provider.openai_url}/chat/completions", json=SAY).headers["x-request-id"] == "7"


def test_chunked_request_body_and_models(provider):
    sent = json.dumps({"model": "say-1-0", **SAY}).encode()
    answer = httpx2.post(f"{provider.url}/v1/messages", content=iter([sent[:9], sent[9:]]))
    assert " t0" in answer.text and provider.requests[0]["body"]["model"] == "say-1-0"
    assert httpx2.get(f"{provider.openai_url}/models").json()["data"][0]["id"] == "say-20-0"


def test_html_and_unknown_models(provider):
    for model, status, kind in (("say-1-0-html@0", 200, "text/html"), ("gpt-9", 404, "application/json")):
        answer = httpx2.post(f"{provider.url}/v1/messages", json={"model": model, **SAY})
        assert (answer.status_code, answer.headers["content-type"]) == (status, kind)
