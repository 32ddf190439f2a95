import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peers
from benchmarks.harness import venvs
from benchmarks.harness.cli import BenchmarkError


def test_differences_part_at_the_first_eviction() -> None:
    assert peers.difference([1.0, 2.0, 3.0, 4.0], [1.0, 2.5, 3.0, 3.0], past=2) == {
        "before_eviction": 0.5,
        "past_eviction": 1.0,
        "at_token": 4,
    }


def test_perplexity_is_of_the_tokens_past_the_first_eviction() -> None:
    plan = peers.Plan("opticks", tokens=8, sinks=1, window=2, baselines=False)
    nll = [9.0, 9.0, 9.0, 0.0, 0.0, 0.0, 0.0]
    arms = peers.figures(plan, {peers.ORACLE: nll, "other": nll})
    assert arms["other"]["perplexity"] == 1
    assert arms["other"]["over_oracle"]["ratio"] == 1


def test_a_peer_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "dies.py"
    script.write_text("import sys; sys.stdin.read(); print(0.5); sys.exit(3)")
    monkeypatch.setattr(venvs, "python", lambda name: sys.executable)
    peer = peers.Peer("dying", str(script), "none", "none", Path("model"), {})
    with pytest.raises(BenchmarkError, match=r"dies\.py failed"):
        peer.read([1, 2, 3])


@pytest.mark.slow
def test_quick_agrees_with_the_oracle_at_every_token(
    quick: Callable[[str], Any], tmp_path: Path
) -> None:
    arms = quick("peers")["arms"]
    ours = arms[peers.OURS]["difference"]
    assert max(ours["before_eviction"], ours["past_eviction"]) <= 1e-3
    # The same tokens evicted, but the model in quantised arithmetic.
    assert arms["llama.cpp-one"]["over_oracle"]["ratio"] == pytest.approx(1, abs=0.1)
    raw = {
        path.stem: json.loads(path.read_text("utf-8")) for path in (tmp_path / "peers").iterdir()
    }
    assert raw.keys() == arms.keys()
    assert {len(record["nll"]) for record in raw.values()} == {peers.QUICK.tokens - 1}
