from pathlib import Path

import pytest
from redis import ConnectionError, Redis

from benchmarks.harness import cli, redis


def test_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(cli.BenchmarkError, match=r"run `python -m benchmarks\.harness\.redis`"):
        redis.start(tmp_path, 1)


def test_one_that_answers_until_it_is_not_needed(tmp_path: Path) -> None:
    redis.fetch()
    with redis.running(tmp_path) as address:
        client = Redis.from_url(address)
        assert client.config_get("appendfsync") == {"appendfsync": "always"}
        client.set("a", "b")
    with pytest.raises(ConnectionError):
        client.ping()


def test_one_that_does_not_start(tmp_path: Path) -> None:
    redis.fetch()
    with pytest.raises(cli.BenchmarkError, match="appendfsync"), redis.running(tmp_path, "x"):
        pass
