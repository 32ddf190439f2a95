"""What `/metrics` of a real server tells of its streams, and who shows it: dashboard and view."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from vllm_sink.buffer import Buffer

from .conftest import Server, started, wait_for

BUFFER = Buffer(sinks=4, window=60, mark=200)
MODEL = "tiny"
BOUND = 4
"""ceil(4/32) + ceil(59/32) + 1 blocks."""
DASHBOARD = json.loads((Path(__file__).parents[2] / "launch/grafana.json").read_text("utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = DASHBOARD["templating"]["list"]


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = {
        "model": model,
        "served-model-name": MODEL,
        "sink-tokens": BUFFER.sinks,
        "window-tokens": BUFFER.window,
        "compact-tokens": BUFFER.mark,
        "max-model-len": 512,
        "max-num-seqs": 4,
        "block-size": 32,
        "kv-cache-memory-bytes": 2**26,
        "session-store": f"sqlite:{tmp_path_factory.mktemp('store') / 'sessions.sqlite'}",
    }
    command = [sys.executable, "-m", "vllm_sink.serve", "--enforce-eager"]
    command += [f"--{flag}={value}" for flag, value in flags.items()]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_LOG_STATS_INTERVAL", "0.5")
        with started(command, tmp_path_factory.mktemp("log")) as running:
            yield running


class Metrics:
    """All of them at one moment: vLLM tells them between two steps."""

    def __init__(self, server: Server) -> None:
        families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
        self.samples: list[Sample] = [sample for family in families for sample in family.samples]

    def value(self, name: str, **labels: str) -> int:
        """0 of what is not there yet."""
        return sum(
            int(sample.value)
            for sample in self.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def streams(self, *states: str) -> int:
        return sum(self.value("vllm_sink:streams", state=state) for state in states)

    def positions(self) -> dict[float, int]:
        """How many streams are no farther than each bound, in ascending order."""
        return {
            float(sample.labels["le"]): int(sample.value)
            for sample in self.samples
            if sample.name == "vllm_sink:stream_position_bucket"
        }

    def labels(self, prefix: str) -> set[tuple[str, str]]:
        """Names and values on all metrics whose names begin so."""
        samples = [sample for sample in self.samples if sample.name.startswith(prefix)]
        return {label for sample in samples for label in sample.labels.items()}


def served(server: Server, prompt: int, tokens: int) -> None:
    body = {"model": MODEL, "prompt": [1] * prompt, "max_tokens": tokens}
    answer = httpx.post(**server.request(**body)).json()
    assert answer["usage"]["completion_tokens"] == tokens


def compactions(prompt: int, tokens: int) -> int:
    """Of a stream that generates so many: its last token comes too late for one."""
    return BUFFER.compactions(prompt, prompt + tokens - 1)


@pytest.fixture
def before(server: Server) -> Metrics:
    """After one request at least."""
    served(server, prompt=1, tokens=1)
    return Metrics(server)


def named_by_the_dashboard() -> list[str]:
    expressions = [target["expr"] for panel in PANELS for target in panel["targets"]]
    queries = [v["query"]["query"] for v in VARIABLES if v["type"] == "query"]
    queries += [v["definition"] for v in VARIABLES if v["type"] == "query"]
    return sorted(
        {
            found[0]
            for text in expressions + queries
            for found in re.finditer(r"vllm(_sink)?:[a-z_]+", text)
        }
    )


def test_the_dashboard_is_for_any_prometheus_and_any_model() -> None:
    assert [variable["name"] for variable in VARIABLES] == ["datasource", "model_name"]
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in PANELS:
        assert panel["datasource"] == source
        for target in panel["targets"]:
            assert target["datasource"] == source
            names = re.findall(r"vllm(?:_sink)?:", target["expr"])
            assert target["expr"].count('{model_name="$model_name"') == len(names)


def test_panels_are_apart() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    for one, other in combinations((cells(panel["gridPos"]) for panel in DASHBOARD["panels"]), 2):
        assert not one & other


def cells(place: dict[str, int]) -> set[tuple[int, int]]:
    assert place["x"] + place["w"] <= 24
    columns = range(place["x"], place["x"] + place["w"])
    return {(x, y) for x in columns for y in range(place["y"], place["y"] + place["h"])}


@pytest.mark.slow
@pytest.mark.parametrize("name", named_by_the_dashboard())
def test_what_the_dashboard_shows_is_there(before: Metrics, name: str) -> None:
    assert name in {sample.name for sample in before.samples}


@pytest.mark.slow
def test_labels_are_those_of_vllms(before: Metrics) -> None:
    stock = before.labels("vllm:num_requests_running")
    assert stock == {("model_name", MODEL), ("engine", "0")}
    front_end = {("model_name", MODEL)}
    ours = {sample.name for sample in before.samples if sample.name.startswith("vllm_sink:")}
    own = {
        "vllm_sink:streams": {"state"},
        "vllm_sink:stream_position_bucket": {"le"},
        "vllm_sink:session_refusals_total": {"status"},
        "vllm_sink:session_refusals_created": {"status"},
        "vllm_sink:session_commit_seconds_bucket": {"le"},
    }
    for name in ours:
        labels, common = before.labels(name), front_end if "session_" in name else stock
        assert common <= labels
        assert {label for label, _ in labels - common} == own.get(name, set())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        (20, 400),
        (10, BUFFER.mark - 10),
        (10, BUFFER.mark - 10 + 1),
        (250, 1),
        (250, 2),
        (250, 300),
    ],
)
def test_compactions_are_counted(server: Server, before: Metrics, prompt: int, tokens: int) -> None:
    served(server, prompt, tokens)
    assert_counted(before, Metrics(server), compactions(prompt, tokens))


@pytest.mark.slow
def test_streams_at_once_add_up(server: Server, before: Metrics) -> None:
    """More of them than run at once."""
    lengths = [(prompt, 250 + 50 * prompt) for prompt in range(1, 7)]
    with ThreadPoolExecutor(len(lengths)) as clients:
        list(clients.map(lambda stream: served(server, *stream), lengths))
    after = Metrics(server)
    assert_counted(before, after, sum(compactions(*stream) for stream in lengths))
    assert evicted(after) > evicted(before)


def assert_counted(before: Metrics, after: Metrics, compactions: int) -> None:
    counted, read_anew = (
        after.value(name) - before.value(name)
        for name in ("vllm_sink:compactions_total", "vllm_sink:compaction_tokens_total")
    )
    assert counted == compactions
    assert read_anew == compactions * BUFFER.kept


def evicted(metrics: Metrics) -> int:
    return metrics.value("vllm_sink:kv_blocks_evicted_total")


@pytest.mark.slow
def test_a_stream_is_seen_as_it_runs_and_no_longer(server: Server, before: Metrics) -> None:
    """Past two compactions and 300 tokens, where it leaves a bucket."""
    prompt, end = 20, 400
    body: dict[str, Any] = {"prompt": [1] * prompt, "max_tokens": 10**6, "stream": True}
    seen = {True: 0, False: 0}
    with httpx.stream("POST", **server.request(model=MODEL, **body)) as response:
        lines, position = response.iter_lines(), 0
        while position <= end:
            while not next(lines).startswith("data: "):
                pass
            now = Metrics(server)
            generated, earlier = (m.value("vllm:generation_tokens_total") for m in (now, before))
            position = prompt + generated - earlier
            seen[position <= 300] += 1
            assert now.streams("decoding", "reading") == 1
            assert now.streams("waiting", "preempted") == 0
            assert 1 <= now.value("vllm_sink:kv_blocks_held") <= BOUND
            positions = now.positions()
            assert positions[float("inf")] == 1
            assert positions == {bound: int(position <= bound) for bound in positions}
    assert all(seen.values())
    assert evicted(now) > evicted(before)
    wait_for(lambda: is_idle(Metrics(server)), timeout=30)


def is_idle(metrics: Metrics) -> bool:
    held = metrics.value("vllm_sink:kv_blocks_held")
    states = metrics.streams("decoding", "reading", "waiting", "preempted")
    return held == states == 0 and not any(metrics.positions().values())


@pytest.mark.slow
def test_the_log_has_no_word_of_it(server: Server) -> None:
    """vLLM's line of a stream, twice a second, has a part for what our counts travel in."""
    served(server, prompt=20, tokens=400)
    wait_for(lambda: "Avg generation throughput" in server.log.read_text(), timeout=30)
    assert "KV fetch" not in server.log.read_text()


@pytest.mark.slow
def test_the_view_shows_it(server: Server) -> None:
    """Not in a terminal: once. Two turns of a session, and one that is refused."""
    for id in ("talk", "talk", "no id"):
        httpx.post(**server.request(model=MODEL, prompt="Hello", max_tokens=20, session_id=id))
    served(server, prompt=20, tokens=400)
    wait_for(lambda: is_idle(Metrics(server)), timeout=30)
    text, metrics = view(server), Metrics(server)
    assert f"{server.url}  model {MODEL}  engines 1\n" in text
    assert "decoding 0  reading 0  waiting 0  preempted 0" in text
    assert re.search(r"held 0 of [0-9,]{3,}", text)
    assert "generated 0.0/s" in text
    hits, queries = (metrics.value(f"vllm:prefix_cache_{of}_total") for of in ("hits", "queries"))
    assert f"since the start {hits / queries:.1%}" in text
    for name in ("turns", "hits", "misses", "conflicts", "refusals"):
        assert f"{name} {metrics.value(f'vllm_sink:session_{name}_total')}" in text
    assert metrics.value("vllm_sink:session_turns_total") == 2
    assert "refusals 1 (400: 1)" in text


@pytest.mark.slow
def test_the_view_shows_a_stream_as_it_runs(server: Server) -> None:
    body: dict[str, Any] = {"prompt": [1] * 20, "max_tokens": 10**6, "stream": True}
    with httpx.stream("POST", **server.request(model=MODEL, **body)) as response:
        lines = response.iter_lines()  # without it, the client would hang up
        next(lines)
        text = view(server)
    assert "decoding 1 " in text
    assert re.search(r"positions +up to [0-9,]+ +1 +━", text)
    assert float(re.findall(r"generated ([0-9.,]+)/s", text)[0].replace(",", "")) > 0
    assert 1 <= int(re.findall(r"held (\d+) of", text)[0]) <= BOUND
    wait_for(lambda: is_idle(Metrics(server)), timeout=30)


def view(server: Server) -> str:
    command = [sys.executable, "-m", "vllm_sink.top", f"{server.url}/v1"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
