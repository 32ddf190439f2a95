"""Two replicas on a Ray of their own, with sessions in a Redis, and what may happen to them."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from ray._private.services import GCS_SERVER_EXECUTABLE
from transformers import AutoTokenizer

from launch.server import free_port
from tests.server.chats import (
    BUFFER,
    KEY,
    MODEL,
    QUESTIONS,
    SETTINGS,
    ByHand,
    first,
    limit,
    serving,
)
from tests.server.conftest import NO_TLS, llama, wait_for
from tests.sessions.conftest import RedisServer
from vllm_sink import client
from vllm_sink.client import BEGIN

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LONG = "LONG" in os.environ
SESSIONS, TURNS = (40, 10) if LONG else (16, 4)
STREAMS, WAITING = 8, 16
LONG_ANSWER = 300
"""In tokens."""
SECONDS = 300
"""For what Ray does when a replica is gone."""
HEADERS = {"Authorization": f"Bearer {KEY}"}
LAUNCH = Path(__file__).parents[2] / "launch"
APPLICATION = {"name": "vllm_sink", "route_prefix": "/", "import_path": "launch.app:build"}
names = count()


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    # What it has written outlives its process; to wait for the disk too takes seconds at times.
    server = RedisServer(tmp_path_factory.mktemp("redis"), "--appendfsync", "no")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("model") / "tiny", initializer_range=0.3)


@dataclass
class Single:
    """An engine alone, whose client says what all talks say and keeps their stream by hand."""

    client: ByHand
    answers: list[list[int]] = field(default_factory=list)

    def first_answers(self, turns: int) -> list[list[int]]:
        while (turn := len(self.answers)) < turns:
            self.answers.append(self.client.ask(question(turn), limit(turn), ignore_eos=True))
        return self.answers[:turns]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Single]:
    with serving(model, tmp_path_factory.mktemp("single"), "none") as server:
        yield Single(ByHand(server, AutoTokenizer.from_pretrained(model), BUFFER))


@dataclass
class Cluster:
    url: str
    config: Path
    leader: psutil.Popen
    log: Path
    single: Single

    def processes(self, title: str) -> list[psutil.Process]:
        found = []
        for process in self.leader.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith(title):
                    found.append(process)
        return found

    def folder(self) -> Path:
        """Ray's, of this session."""
        (store,) = self.processes(GCS_SERVER_EXECUTABLE)
        (log_dir,) = (word for word in store.cmdline() if word.startswith("--log_dir="))
        return Path(log_dir.removeprefix("--log_dir=")).parent

    def metrics(self) -> list[Sample]:
        """Of Ray's node, under the names that launch/prometheus.yaml makes."""
        (port,) = (file.read_text() for file in self.folder().glob("metrics_export_port_*"))
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", verify=NO_TLS).text
        lines = [line for line in text.splitlines() if line.startswith("ray_vllm_")]
        return [
            sample._replace(name=relabelled(sample.name))
            for family in text_string_to_metric_families("\n".join([*lines, ""]))
            for sample in family.samples
        ]

    def counted(self, name: str) -> float:
        return sum(each.value for each in self.metrics() if each.name == f"vllm_sink:{name}")

    def change(self, **options: Any) -> None:
        """Of the replicas' deployment."""
        config = yaml.safe_load(self.config.read_text())
        config["applications"][0]["deployments"] = [{"name": f"Server:{MODEL}", **options}]
        self.config.write_text(yaml.safe_dump(config))
        self.leader.send_signal(signal.SIGHUP)

    def answering(self) -> set[str]:
        """Replicas that answer: sessions that do not exist are spread over all."""
        with httpx.Client(base_url=self.url, headers=HEADERS, verify=NO_TLS) as http:
            answers = [http.get(f"/v1/sessions/none{i}", timeout=60) for i in range(40)]
        return {each.headers["x-replica"] for each in answers if each.status_code == 404}

    def wait_for(self, replicas: int) -> None:
        end = time.monotonic() + SECONDS
        while len(answering := self.answering()) != replicas:
            assert time.monotonic() < end, answering
            time.sleep(1)


def relabelled(name: str) -> str:
    (job,) = yaml.safe_load((LAUNCH / "prometheus.yaml").read_text())["scrape_configs"]
    for rule in job["metric_relabel_configs"]:
        name = re.sub(f"^{rule['regex']}$", rule["replacement"].replace("$1", r"\1"), name)
    return name


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, redis: RedisServer, model: Path, single: Single
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    flags = SETTINGS | {
        "model": str(model),
        "session-store": redis.address,
        "api-key": [KEY],
    }
    env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    args = {"flags": flags, "replicas": 2, "streams": STREAMS, "waiting": WAITING, "cpus": 0.1}
    args |= {"worker": {"CPU": 0.1}, "env": env}
    config, log, port = folder / "serve.yaml", folder / "log", free_port()
    config.write_text(yaml.safe_dump({"applications": [APPLICATION | {"args": args}]}))
    command = [sys.executable, "-m", "launch.local", str(config), f"--port={port}"]
    with log.open("w") as out:
        leader = psutil.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    running = Cluster(f"http://127.0.0.1:{port}", config, leader, log, single)
    try:
        wait_for(lambda: leader.poll() is not None or "Ready at" in log.read_text(), SECONDS)
        assert leader.poll() is None, log.read_text()[-4000:]
        left = running.folder().parent
        yield running
    finally:
        family = leader.children(recursive=True) if leader.is_running() else []
        with suppress(psutil.NoSuchProcess):
            leader.terminate()
        _, alive = psutil.wait_procs([leader, *family], timeout=60)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    assert not alive
    assert leader.wait() == 0
    assert not left.exists()


@dataclass
class Talk:
    """A client that says what all others say, and has each turn whole."""

    session: str
    by_header: bool = False
    replicas: list[str] = field(default_factory=list)
    """Of each turn: who answered it at last."""
    answers: list[list[int]] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    again: int = 0

    def have(self, turns: int, cluster: Cluster) -> None:
        self.go_on(cluster, lambda: len(self.answers) >= turns)

    def go_on(self, cluster: Cluster, until: Callable[[], bool]) -> None:
        served: list[str] = []
        hooks = {"response": [lambda r: served.append(r.headers.get("x-replica", ""))]}
        headers = HEADERS | ({"X-Session-ID": self.session} if self.by_header else {})
        with httpx.Client(
            base_url=cluster.url, headers=headers, timeout=120, event_hooks=hooks, verify=NO_TLS
        ) as http:
            while not until():
                self.turn(http)
                self.replicas.append(served[-1])

    def turn(self, http: httpx.Client) -> None:
        number = len(self.answers)
        said = question(number)
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": said}] if number else first(said),
            "max_tokens": limit(number),
            "temperature": 0.0,
            "ignore_eos": True,
            "return_token_ids": True,
            # What one says is in the prefix cache for itself alone.
            "cache_salt": self.session,
            "stream_options": {"include_usage": True},
        }
        if not self.by_header:
            body["session_id"] = self.session
        tokens: list[int] = []
        usage: dict[str, Any] = {}
        for chunk in client.turn(http, "/v1/chat/completions", body, key=str(number)):
            if chunk is BEGIN:
                self.again += 1
                tokens = []
                continue
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                tokens += choice.get("token_ids") or []
        assert len(tokens) == limit(number)
        self.answers.append(tokens)
        self.cached.append(usage["prompt_tokens_details"]["cached_tokens"])


def question(turn: int) -> str:
    return QUESTIONS[turn % len(QUESTIONS)]


def long_answer(cluster: Cluster) -> httpx.Response:
    body = {"model": MODEL, "prompt": "Light", "max_tokens": LONG_ANSWER, "ignore_eos": True}
    return httpx.post(
        f"{cluster.url}/v1/completions", json=body, headers=HEADERS, timeout=SECONDS, verify=NO_TLS
    )


@contextmanager
def talking(cluster: Cluster, talks: list[Talk]) -> Iterator[None]:
    """Over and over, until the end."""
    over = threading.Event()
    with ThreadPoolExecutor(len(talks)) as pool:
        under_way = [pool.submit(talk.go_on, cluster, over.is_set) for talk in talks]
        try:
            yield
        finally:
            over.set()
        for each in under_way:
            each.result()


def talks_of(sessions: int) -> list[Talk]:
    return [Talk(f"s{next(names)}", by_header=bool(i % 2)) for i in range(sessions)]


def replicas_of(talks: list[Talk]) -> dict[str, str]:
    """By their sessions: who answered last."""
    return {talk.session: talk.replicas[-1] for talk in talks}


def wait_for_turns(talks: list[Talk], more: int) -> None:
    """Until each had so many more."""
    there = {talk.session: len(talk.answers) for talk in talks}
    end = time.monotonic() + SECONDS
    while not all(len(talk.answers) >= there[talk.session] + more for talk in talks):
        assert time.monotonic() < end, talks
        time.sleep(0.1)


def check(cluster: Cluster, talks: list[Talk]) -> None:
    """No turn is lost or there twice: answers are those of a single engine, and the store has as
    many as the clients saw."""
    for talk in talks:
        assert talk.answers == cluster.single.first_answers(len(talk.answers)), talk.session
        url = f"{cluster.url}/v1/sessions/{talk.session}"
        shown = httpx.get(url, headers=HEADERS, verify=NO_TLS).json()
        assert shown["turns"] == len(talk.answers)


def test_a_session_stays_with_its_replica(cluster: Cluster) -> None:
    talks = talks_of(SESSIONS)
    # No more at once than one replica takes: none is to move.
    with ThreadPoolExecutor(STREAMS) as pool:
        for turn in range(TURNS):
            for _ in pool.map(partial(Talk.have, turns=turn + 1, cluster=cluster), talks):
                pass
    check(cluster, talks)
    assert not any(talk.again for talk in talks)
    assert all(len(set(talk.replicas)) == 1 for talk in talks)
    assert len({talk.replicas[0] for talk in talks}) == 2
    assert all(talk.cached[0] == 0 and all(talk.cached[1:]) for talk in talks)


def test_ray_exports_what_was_done(cluster: Cluster) -> None:
    """No replica is gone yet, whose counts would be."""
    for talk in talks_of(4):
        talk.have(2, cluster)
    url = f"{cluster.url}/v1/sessions"
    shown = httpx.get(url, headers=HEADERS, verify=NO_TLS).json()["data"]
    turns = sum(session["turns"] for session in shown)
    wait_for(lambda: cluster.counted("session_turns_total") == turns, 60)
    assert cluster.counted("session_commit_seconds_count") == turns
    assert cluster.counted("session_misses_total") == 0
    assert cluster.counted("session_hits_total") == turns - len(shown)  # all but first turns


def test_the_dashboard_shows_many_replicas(cluster: Cluster) -> None:
    names = {sample.name for sample in cluster.metrics() if "model_name" in sample.labels}
    shown = {*re.findall(r"(vllm\w*:\w+)", (LAUNCH / "grafana.json").read_text())}
    # Which Ray has once it was counted.
    assert shown - names <= {"vllm:num_preemptions_total"}


def test_ray_listens_at_the_loopback_address(cluster: Cluster) -> None:
    """All of it but replicas and their engines, whose ports Ray Serve and vLLM have everywhere."""
    everywhere = {*cluster.processes("ray::ServeReplica"), *cluster.processes("VLLM::")}
    listening = [
        connection.laddr.ip.removeprefix("::ffff:")
        for process in {cluster.leader, *cluster.processes("")} - everywhere
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {*listening} == {"127.0.0.1"}


def test_a_replica_is_killed(cluster: Cluster) -> None:
    """No turn of the other one is disturbed."""
    talks = talks_of(8)
    with talking(cluster, talks):
        wait_for_turns(talks, 2)
        before = replicas_of(talks)
        cluster.processes("ray::ServeReplica:vllm_sink:Server")[0].kill()
        wait_for_turns(talks, 3)
        cluster.wait_for(2)
        wait_for_turns(talks, 1)
    check(cluster, talks)
    assert len({before[talk.session] for talk in talks if talk.again}) == 1


def test_an_engine_core_is_killed(cluster: Cluster) -> None:
    """Ray notices, and puts another replica in its place."""
    talks = talks_of(8)
    with talking(cluster, talks):
        wait_for_turns(talks, 2)
        before = replicas_of(talks)
        cores = cluster.processes("VLLM::EngineCore")
        assert len(cores) == 2
        cores[0].kill()
        wait_for_turns(talks, 3)
        cluster.wait_for(2)
        wait_for_turns(talks, 1)
    check(cluster, talks)
    assert len({before[talk.session] for talk in talks if talk.again}) == 1


def test_the_store_is_killed(cluster: Cluster, redis: RedisServer) -> None:
    talks = talks_of(8)
    with talking(cluster, talks):
        wait_for_turns(talks, 2)
        redis.kill()
        time.sleep(3)
        redis.start()
        wait_for_turns(talks, 2)
    check(cluster, talks)


def test_what_is_too_much_waits_and_what_is_more_is_refused(cluster: Cluster) -> None:
    offered = 2 * STREAMS + WAITING + 10
    with ThreadPoolExecutor(offered) as pool:
        answers = [*pool.map(lambda _: long_answer(cluster), range(offered))]
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses.keys() == {200, 429}
    assert statuses[200] >= 2 * STREAMS
    for answer in answers:
        if answer.status_code == 429:
            assert answer.headers["Retry-After"] == "1"
            assert answer.json()["error"]["code"] == 429
        else:
            assert answer.json()["usage"]["completion_tokens"] == LONG_ANSWER


def test_a_change_that_cannot_work_is_not_taken_up(cluster: Cluster) -> None:
    """One replica is lost to it until what was before is back."""
    before = cluster.config.read_text()
    cluster.config.write_text(before.replace("max-model-len: 512", "max-model-len: 64"))
    cluster.leader.send_signal(signal.SIGHUP)
    wait_for(lambda: "error: sink.compact_tokens=400: " in cluster.log.read_text(), SECONDS)
    cluster.config.write_text(before)
    cluster.wait_for(2)


def test_replicas_come_and_go(cluster: Cluster) -> None:
    """Those that go finish what they have."""
    talks = talks_of(6)
    with talking(cluster, talks):
        wait_for_turns(talks, 2)
        cluster.change(num_replicas=3)
        cluster.wait_for(3)
        wait_for_turns(talks, 2)
        broken = [talk.again for talk in talks]
        with ThreadPoolExecutor(6) as pool:
            under_way = [pool.submit(long_answer, cluster) for _ in range(6)]
            time.sleep(1)
            cluster.change(num_replicas=1)
            assert all(each.result().status_code == 200 for each in under_way)
        cluster.wait_for(1)
        wait_for_turns(talks, 2)
    assert [talk.again for talk in talks] == broken
    check(cluster, talks)


def test_there_are_as_many_replicas_as_streams_held_ask_for(cluster: Cluster) -> None:
    soon = {"upscale_delay_s": 1, "downscale_delay_s": 3, "look_back_period_s": 3}
    cluster.change(
        autoscaling_config=soon
        | {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1}
    )
    over = threading.Event()

    def hold() -> None:
        while not over.is_set():
            assert long_answer(cluster).status_code == 200

    # Fewer than a replica runs at once: who asks which replicas there are is to be answered too.
    with ThreadPoolExecutor(STREAMS // 2) as pool:
        held = [pool.submit(hold) for _ in range(STREAMS // 2)]
        try:
            cluster.wait_for(2)
        finally:
            over.set()
        for each in held:
            each.result()
    cluster.wait_for(1)
