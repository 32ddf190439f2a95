"""`make ray-demo`: conversations on two replicas that Ray runs, one of which is killed.

Each of some clients talks in a session of its own; shown is which replica serves it. In the middle
a replica is killed. Its sessions go on where they stood, and no turn is lost or done twice.
"""

import argparse
import asyncio
import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import psutil
from rich.console import Console
from rich.live import Live
from rich.table import Table

from launch import group
from launch.conversation import shortened
from launch.server import REFRESH_SECONDS, Server, ServerLostError, free_port
from vllm_sink import client
from vllm_sink.client import BEGIN, BrokenTurnError

CONFIG = Path(__file__).parent / "serve.cpu.yaml"
REPLICA = "ray::ServeReplica:vllm_sink:Server"
"""How the processes of replicas are called."""
CHAT = "/v1/chat/completions"
QUESTIONS = (
    "Tell me one thing about the sea.",
    "Tell me one thing about mountains.",
    "Tell me one thing about trees.",
)
ANSWER_TOKENS = 24
STOP_SECONDS = 30
"""That Ray gets to end its processes."""

console = Console()


@dataclass
class Talk:
    """One client's, in a session of its own."""

    name: str
    url: str
    replica: str = ""
    moves: int = 0
    turns: int = 0
    again: int = 0
    words: str = ""

    def go_on(self, turns: int) -> None:
        """Until it had so many.

        Raises:
            BrokenTurnError: a turn did not come to its end.
        """
        hooks = {"response": [self.served]}
        with httpx.Client(base_url=self.url, timeout=60, event_hooks=hooks) as http:
            while self.turns < turns:
                self.turn(http, QUESTIONS[self.turns % len(QUESTIONS)])
                self.turns += 1

    def turn(self, http: httpx.Client, question: str) -> None:
        body = {
            "messages": [{"role": "user", "content": question}],
            "session_id": self.name,
            "max_completion_tokens": ANSWER_TOKENS,
            "temperature": 0,
        }
        self.words = ""
        for chunk in client.turn(http, CHAT, body, key=str(self.turns)):
            if chunk is BEGIN:
                self.again += 1
                self.words = ""
            else:
                self.words += chunk["choices"][0]["delta"].get("content") or ""

    def served(self, response: httpx.Response) -> None:
        replica = response.headers.get("x-replica", "")
        self.moves += bool(self.replica and replica and replica != self.replica)
        self.replica = replica or self.replica


def table(talks: list[Talk]) -> Table:
    shown = Table("session", "replica", "moves", "turns", "asked again", "last words")
    for talk in talks:
        counts = (str(count) for count in (talk.moves, talk.turns, talk.again))
        shown.add_row(talk.name, talk.replica, *counts, shortened(talk.words))
    return shown


def talk_all(talks: list[Talk], turns: int, server: Server) -> None:
    """Raises `ServerLostError` if one of them breaks off."""
    with ThreadPoolExecutor(len(talks)) as pool:
        under_way = [pool.submit(talk.go_on, turns) for talk in talks]
        with Live(console=console) as live:
            while not all(map(Future.done, under_way)):
                live.update(table(talks))
                time.sleep(REFRESH_SECONDS)
            live.update(table(talks))
    try:
        for each in under_way:
            each.result()
    except (BrokenTurnError, httpx.HTTPError) as error:
        raise server.lost(error) from error


def replicas(server: Server) -> list[psutil.Process]:
    family = psutil.Process(server.group.leader.pid).children(recursive=True)
    found = []
    for process in family:
        with suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).startswith(REPLICA):
                found.append(process)
    return found


def show(server: Server, clients: int, turns: int) -> None:
    console.print("Ray starts, and two replicas of the server on it: this takes a minute or two.")
    asyncio.run(server.ready())
    talks = [Talk(f"client-{i}", server.url) for i in range(clients)]
    talk_all(talks, turns, server)
    killed = random.choice(replicas(server))
    console.print(f"One replica is killed (process {killed.pid}) while all sessions go on.")
    threading.Timer(1, killed.kill).start()
    talk_all(talks, 2 * turns, server)
    for talk in talks:
        stored = httpx.get(f"{server.url}/v1/sessions/{talk.name}").json()["turns"]
        if stored != talk.turns:
            raise ServerLostError(f"{talk.name} has {stored} turns, its client {talk.turns}.")
    moved = sum(talk.moves > 0 for talk in talks)
    console.print(
        f"{moved} of {clients} sessions moved; each has the {2 * turns} turns that its client saw."
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="launch.ray_demo", description=__doc__)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--turns", type=int, default=4, help="of each, before and after the kill")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    port = free_port()
    command = [sys.executable, "-m", "launch.local", str(CONFIG), f"--port={port}"]
    try:
        with TemporaryDirectory(prefix="vllm-sink-demo-") as state:
            log = Path(state) / "ray.log"
            environment = os.environ | {"XDG_STATE_HOME": state}
            with group.logged(log, command, environment, STOP_SECONDS) as started:
                show(Server(started, f"http://127.0.0.1:{port}"), options.clients, options.turns)
    except ServerLostError as error:
        console.print(str(error), markup=False, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
