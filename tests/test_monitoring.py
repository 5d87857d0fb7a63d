"""What is counted, and where it can be read: /metrics of both servers, the figures for people, and who may see what."""

import json
import math
import re
import time
import uuid
from contextlib import contextmanager

import pytest
from prometheus_client.parser import text_string_to_metric_families

from conftest import status, text
from provider import GATE, openai_stream
from test_streams import SEND, cancel, eventually, get, numbered, running

COUNTERS = {
    "edge": ["bundles", "replayed", "left_to_domain", "follows", "resumes", "errors"],
    "domain": [
        "tokens",
        "runs",
        "cancellations",
        "run_errors",
        "provider_retries",
        "tool_calls",
        "stored_bundles",
        "stored_by_domain",
        "errors",
    ],
}
HISTOGRAMS = {
    "edge": ["edge_ttft_seconds", "client_bundle_tokens", "database_bundle_tokens", "queue_wait_seconds"],
    "domain": ["provider_ttft_seconds", "domain_ttft_seconds", "tokens_per_second"],
}
GAUGES = {"edge": ["clients", "replies", "queue_bundles", "overflow_bundles"], "domain": ["running_replies"]}
BOTH = pytest.mark.parametrize("server", ["edge", "domain"])


def families(liminal, server) -> list:
    """The metrics as an independent parser reads them, their names without the prefix liminal_."""
    answer = liminal.client.get(f"{getattr(liminal, server)}/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    found = list(text_string_to_metric_families(answer.text.replace("liminal_", "")))
    assert found and answer.text.count("# HELP liminal_") == answer.text.count("# TYPE liminal_") == len(found)
    return found


def samples(liminal) -> dict:
    """{(server, sample, labels): value} of both servers."""
    return {
        (server, one.name, *sorted(one.labels.items())): one.value
        for server in liminal.servers
        for family in families(liminal, server)
        for one in family.samples
    }


def settled(liminal) -> dict:
    """The samples once every bundle has been brought."""
    eventually(lambda: not status(liminal.api("GET", "/api/v1/overflow"), 200)["waiting"])
    return samples(liminal)


class Grown:
    """How far samples grew while the `with` was open: grown("edge", "bundles_total", cause="size"), labels summed over."""

    def __init__(self, liminal):
        self.liminal = liminal

    def __enter__(self):
        self.before = settled(self.liminal)
        return self

    def __exit__(self, *_):
        self.after = settled(self.liminal)

    def __call__(self, server, name, **labels) -> float:
        keys = [key for key in self.after if key[:2] == (server, name) and labels.items() <= dict(key[2:]).items()]
        return sum(self.after[key] - self.before.get(key, 0) for key in keys)


################ /metrics


@BOTH
def test_every_figure_that_is_promised_is_there(shared, server):
    found = families(shared, server)
    promised = {("counter", name) for name in COUNTERS[server]} | {("gauge", name) for name in GAUGES[server]}
    promised |= {("histogram", name) for name in HISTOGRAMS[server]}
    assert promised <= {(family.type, family.name) for family in found} and all(one.documentation for one in found)


@BOTH
def test_no_two_metrics_go_by_one_name(shared, server):
    """A counter's name is without its _total to whoever reads OpenMetrics."""
    names = [family.name for family in families(shared, server)]
    assert sorted(names) == sorted(set(names))


@BOTH
def test_histograms_are_cumulative_and_end_in_their_count(shared, server):
    shared.send("x", model="openai/say-60-0")
    for name in HISTOGRAMS[server]:
        [found] = [family.samples for family in families(shared, server) if family.name == name]
        buckets = [(float(one.labels["le"]), one.value) for one in found if one.name.endswith("_bucket")]
        [count] = [one.value for one in found if one.name.endswith("_count")]
        assert buckets == sorted(buckets) and [n for _, n in buckets] == sorted(n for _, n in buckets)
        assert buckets[-1] == (math.inf, count) and count > 0
        assert [one.value for one in found if one.name.endswith("_sum")][0] > 0


@BOTH
def test_no_sample_stands_twice(shared, server):
    found = [(one.name, *sorted(one.labels.items())) for f in families(shared, server) for one in f.samples]
    assert len(found) == len(set(found))


################ What they count


def test_tokens_replies_and_bundles_are_counted_once(shared):
    with Grown(shared) as grown:
        shared.send("x", model="openai/say-120-0")
        shared.send("x", model="anthropic/think-60-0")
    assert grown("domain", "tokens_total") == 180 and grown("domain", "runs_total", status="complete") == 2
    for who in ("client", "database"):
        assert grown("edge", f"{who}_bundle_tokens_sum") == 180
        bundles = grown("edge", f"{who}_bundle_tokens_count")
        assert bundles == grown("edge", "bundles_total", consumer=who) > 2
    assert grown("edge", "bundles_total", consumer="client", cause="first") == 2
    assert grown("edge", "queue_wait_seconds_count") == grown("domain", "stored_bundles_total") == bundles
    counts = [("domain", "provider_ttft_seconds"), ("domain", "domain_ttft_seconds"), ("edge", "edge_ttft_seconds")]
    assert [grown(server, f"{name}_count") for server, name in counts] == [2, 2, 2]


def test_bundles_are_counted_by_their_cause(shared):
    with Grown(shared) as grown:
        shared.provider.script(*openai_stream(" t0", " t1", " t2", GATE, *(f" t{n}" for n in range(3, 110))))
        with running(shared, "openai/scripted", len(numbered(3))) as (_, events):
            shared.provider.open_gate()
            list(events)
    by_cause = {
        cause: grown("edge", "bundles_total", consumer="client", cause=cause)
        for cause in ("first", "time", "size", "end")
    }
    assert by_cause["first"] == 1 and by_cause["time"] >= 1 and by_cause["size"] >= 6 and sum(by_cause.values()) < 15
    assert grown("edge", "bundles_total", consumer="database", cause="size") == 2


def test_a_repeat_of_a_finished_reply_counts_no_new_token(shared):
    key = {"Idempotency-Key": str(uuid.uuid4())}
    body = {"content": "x", "model": "openai/say-60-0"}
    shared.read(shared.stream(body, headers=key))
    with Grown(shared) as grown:
        assert text(shared.read(shared.stream(body, headers=key))) == numbered(60)
    assert grown("domain", "tokens_total") == grown("domain", "runs_total") == 0
    assert grown("domain", "provider_ttft_seconds_count") == 0


def test_resumes_are_counted_and_fresh_streams_are_not(shared):
    message_id = shared.send("x", model="openai/say-9-0")[0].data["message_id"]
    with Grown(shared) as grown:
        shared.attach(message_id)
        shared.attach(message_id, 3)
        shared.attach(message_id, 6)
    assert grown("edge", "resumes_total") == 2


def test_a_cancelled_reply_is_counted_once(shared):
    with Grown(shared) as grown, running(shared) as (start, _):
        cancel(shared, start["message_id"])
        cancel(shared, start["message_id"])
    assert grown("domain", "runs_total", status="cancelled") == 1
    assert grown("domain", "cancellations_total") == 1


def test_a_cancel_of_a_finished_reply_is_not_counted(shared):
    message_id = shared.send("x", model="openai/say-3-0")[0].data["message_id"]
    with Grown(shared) as grown:
        assert cancel(shared, message_id)["status"] == "complete"
    assert grown("domain", "cancellations_total") == 0


def test_failed_replies_are_counted_by_their_code(shared):
    with Grown(shared) as grown:
        for fault in ("end@2", "s401@0", "end@3"):
            shared.send("x", model=f"openai/say-9-0-{fault}")
    assert grown("domain", "run_errors_total", code="provider_incomplete") == 2
    assert grown("domain", "run_errors_total", code="provider_auth") == 1
    assert grown("domain", "run_errors_total") == grown("domain", "runs_total", status="error") == 3


@pytest.mark.slow
def test_retries_of_an_overloaded_provider_are_counted(shared):
    shared.provider.fail_times = 2
    with Grown(shared) as grown:
        assert shared.send("x", model="openai/say-3-0-s529@0")[-1].data["status"] == "complete"
    assert grown("domain", "provider_retries_total") == 2 and grown("domain", "run_errors_total") == 0


def test_refused_requests_are_counted_by_their_code(shared):
    with Grown(shared) as grown:
        status(shared.api("GET", f"{SEND}/00000000"), 404)
        status(shared.api("POST", SEND, {}), 400)
        status(shared.api("GET", "/api/v1/threads", key="lt_sk_nobody"), 401)
    assert [grown("edge", "errors_total", code=code) for code in ("not_found", "invalid_request", "unauthorized")] == [
        1,
        1,
        1,
    ]
    assert grown("edge", "errors_total") == 3 and grown("domain", "errors_total") == 2


def test_tool_calls_are_counted(shared):
    with Grown(shared) as grown:
        shared.send("CALL liminal__file_list {}", model="openai/say-3-0")
    assert grown("domain", "tool_calls_total") == 1


def test_gauges_show_what_is_now(shared):
    eventually(lambda: samples(shared)["edge", "clients"] == 0)
    before = samples(shared)
    with running(shared) as (start, events):
        now = samples(shared)
        grown = [
            now[key] - before[key] for key in (("edge", "clients"), ("edge", "replies"), ("domain", "running_replies"))
        ]
        shared.provider.open_gate()
        list(events)
    assert grown == [1, 1, 1]
    eventually(lambda: samples(shared)["edge", "clients"] == before["edge", "clients"])


@pytest.mark.slow
def kill_with_rows(liminal):
    """Kill the Domain in mid-reply so that a bundle is left waiting: (the reply's start, how many rows). Where the Edge had
    just brought everything nothing waits, and it is done again."""
    for _ in range(10):
        with running(liminal, "openai/gate-200-120", len(numbered(120))) as (start, _):
            liminal.kill("domain")
            end = time.monotonic() + 3
            while not (rows := samples(liminal)["edge", "overflow_bundles"]) and time.monotonic() < end:
                time.sleep(0.02)
            if rows:
                return start, rows
            liminal.start("domain")
    raise AssertionError("nothing ever waited")


def test_what_waits_and_is_replayed_is_counted(liminal):
    start, rows = kill_with_rows(liminal)
    assert samples(liminal)["edge", "replayed_total"] == 0
    liminal.start("domain")
    after = settled(liminal)
    told = status(liminal.api("GET", "/api/v1/stats"), 200)["queue"]["replayed"]
    assert after["edge", "replayed_total"] == rows == told
    assert after["edge", "overflow_bundles"] == after["edge", "left_to_domain_total"] == 0
    assert after["edge", "follows_total"] > 0 and get(liminal, start["message_id"])["content"] == numbered(120)


################ Figures for people


def stats(liminal, key=None) -> dict:
    return status(liminal.api("GET", "/api/v1/stats", key=key), 200)


def test_stats_are_the_same_figures(shared):
    shared.send("x", model="openai/say-90-0")
    found, now = settled(shared), stats(shared)
    assert now["tokens"] == found["domain", "tokens_total"] and now["resumes"] == found.get(
        ("edge", "resumes_total"), 0
    )
    assert now["cancellations"] == found.get(("domain", "cancellations_total"), 0)
    for who in ("client", "database"):
        names = {dict(key[2:])["cause"]: n for key, n in found.items() if ("consumer", who) in key}
        assert {cause: n for cause, n in now["bundles"][who].items() if n} == names
    queue = {"waiting": "queue_bundles", "overflow": "overflow_bundles"}
    queue |= {"replayed": "replayed_total", "left_to_domain": "left_to_domain_total"}
    assert {name: now["queue"][name] for name in queue} == {name: found["edge", key] for name, key in queue.items()}


def test_stats_name_the_bucket_that_holds_a_quantile(shared):
    shared.send("x", model="openai/say-90-0")
    found, now = settled(shared), stats(shared)
    for server, hop in (("domain", "provider"), ("domain", "domain"), ("edge", "edge")):
        name = f"{hop}_ttft_seconds"
        buckets = sorted(
            (float(dict(key[2:])["le"]), n) for key, n in found.items() if key[:2] == (server, f"{name}_bucket")
        )
        limits = [next(le for le, n in buckets if n >= q * buckets[-1][1]) for q in (0.5, 0.95, 0.99)]
        assert list(now["ttft_ms"][hop].values()) == [pytest.approx(1000 * min(limit, 30)) for limit in limits]


@contextmanager
def member(shared):
    """A member's key."""
    user = status(shared.api("POST", "/api/v1/users", {"name": str(uuid.uuid4())}), 201)
    yield status(shared.api("POST", "/api/v1/keys", {"name": "k", "user_id": user["id"]}), 201)["secret"]
    status(shared.api("DELETE", f"/api/v1/users/{user['id']}"), 200)


def test_a_member_sees_the_models_of_their_own_replies_only(shared):
    shared.send("x", model="openai/say-5-0")
    with member(shared) as key:
        assert stats(shared, key)["models"] == []
        before = stats(shared)["models"]
        shared.read(shared.stream({"content": "x", "model": "anthropic/say-7-0"}, key=key))
        [model] = stats(shared, key)["models"]
        assert stats(shared)["models"] == before
    wanted = {"model": "anthropic/say-7-0", "runs": 1, "errors": 0, "output_tokens": 7, "cost": None}
    assert {name: model[name] for name in wanted} == wanted and model["input_tokens"] > 0


def test_models_sum_up_replies_errors_and_tokens(shared):
    with member(shared) as key:
        for model in ("openai/say-5-0", "openai/say-5-0", "openai/say-9-0-s401@0"):
            shared.read(shared.stream({"content": "x", "model": model}, key=key))
        found = {one["model"]: one for one in stats(shared, key)["models"]}
    assert [found["openai/say-5-0"][name] for name in ("runs", "errors", "output_tokens")] == [2, 0, 10]
    assert [found["openai/say-9-0-s401@0"][name] for name in ("runs", "errors", "output_tokens")] == [1, 1, 0]


def test_models_sum_up_their_cost(shared):
    body = {"kind": "openai", "base_url": shared.provider.openai_url, "prices": {"say-*": [1, 0.1, 1000]}}
    status(shared.api("PUT", "/api/v1/providers/priced", body), 200)
    with member(shared) as key:
        for _ in range(2):
            done = shared.read(shared.stream({"content": "x", "model": "priced/say-5-0"}, key=key))[-1].data
        [model] = stats(shared, key)["models"]
    assert model["cost"] == pytest.approx(2 * done["usage"]["cost"]) and done["usage"]["cost"] >= 0.005
    status(shared.api("DELETE", "/api/v1/providers/priced"), 204)


def test_what_waits_is_for_owners_only(shared):
    with member(shared) as key:
        status(shared.api("GET", "/api/v1/overflow", key=key), 403, "forbidden")


################ Health


@BOTH
def test_health_and_metrics_need_no_key(shared, server):
    for path in ("health", "metrics"):
        assert shared.api("GET", f"{getattr(shared, server)}/{path}", key="")[0] == 200


def test_both_are_well_of_one_version_and_one_folder(shared):
    edge, domain = (status(shared.api("GET", f"{url}/health", key=""), 200) for url in (shared.edge, shared.domain))
    assert (edge["status"], edge["server"], edge["domain"]) == ("ok", "edge", "ok")
    assert (domain["status"], domain["server"]) == ("ok", "domain")
    assert edge["version"] == domain["version"] and edge["instance"] == domain["instance"]
    assert re.fullmatch(r"[0-9a-f]+", edge["version"]) and str(shared.data) not in json.dumps(edge)


@pytest.mark.slow
def test_the_edge_is_well_without_the_domain_and_says_so(liminal):
    liminal.kill("domain")
    found = status(liminal.api("GET", "/health", key=""), 200)
    assert (found["status"], found["domain"]) == ("ok", "unavailable")
    assert samples(liminal)["edge", "clients"] == 0
    liminal.start("domain")
    assert status(liminal.api("GET", "/health", key=""), 200)["domain"] == "ok"


@pytest.mark.slow
def test_the_domain_is_well_without_the_edge(liminal):
    liminal.kill("edge")
    assert status(liminal.api("GET", f"{liminal.domain}/health", key=""), 200)["status"] == "ok"
    assert samples(liminal)["domain", "tokens_total"] == 0
