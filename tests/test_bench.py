"""The benchmark: what it counts as the same work, how it judges its targets, and one run of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))
import bench  # type: ignore[import-not-found]  # noqa: E402
from bench_targets import TARGETS, Target, judge  # noqa: E402


def entry(share: float | None = None, peak: float = 100.0, growth: float = 50.0) -> dict[str, Any]:
    made: dict[str, Any] = {"peak_mib": peak, "growth_mib": growth}
    return made if share is None else {**made, "zilc_ratio": [share, share, share]}


def result(network: str, optimizer: str = "sgd", **peers: Any) -> dict[str, Any]:
    return {"network": network, "optimizer": optimizer, "peers": peers}


def test_a_target_is_met_missed_or_left_open() -> None:
    both = Target("both", "torch", ("alexnet", "resnet18"), 1.0)
    one = Target("one", "torch", ("alexnet", "resnet18"), 1.0, needed=1)
    fast, slow = result("alexnet", torch=entry(1.0)), result("resnet18", torch=entry(1.01))
    failed = result("resnet18", torch={"failed": "reason"})

    def met(*results: Any) -> list[bool | None]:
        return [verdict.met for verdict in judge(results, (both, one))]

    assert met() == [None, None]
    assert met(fast, slow) == [False, True]
    assert met(fast, failed) == [None, True]
    assert met(slow) == [False, None]
    assert judge([fast], (both,))[0].measured == {"alexnet": 1.0, "resnet18": None}


def test_memory_is_judged_by_the_optimizer_it_was_measured_with() -> None:
    target = Target("memory", "torch", ("mlp3",), 1.0, "growth_mib", "adam")
    sgd = result("mlp3", zilc=entry(growth=10), torch=entry(growth=20))
    adam = result("mlp3", "adam", zilc=entry(growth=30), torch=entry(growth=20))
    assert judge([sgd], (target,))[0].met is None
    (verdict,) = judge([sgd, adam], (target,))
    assert verdict.measured == {"mlp3": 1.5}
    assert verdict.row() == ["memory", "≤ 1", "mlp3 1.500", "missed"]


def test_targets_name_peers_and_networks_that_there_are() -> None:
    for target in TARGETS:
        assert target.peer in bench.PEERS
        assert set(target.networks) <= set(bench.ALL)


def test_ratios_are_of_the_rounds_that_both_had() -> None:
    middle, low, high = bench.ratio({0: 1.0, 1: 4.0, 2: 9.0}, {1: 2.0, 2: 4.5}, np.random.default_rng(0))
    assert middle == low == high == 2.0


@pytest.mark.parametrize(
    ("peer", "facts", "words"),
    [
        ("jax", {}, None),
        ("jax", {"parameters": 11}, "trains 11 numbers, expected 10"),
        ("jax", {"losses": [2.001, 1.5]}, "first loss is 2.001"),
        ("jax", {"losses": [2.0, 2.0]}, "after one update is 2,"),
        ("torch", {"parameters": 138, "losses": [2.0, 1.4]}, None),  # two biases in an RNN
    ],
)
def test_who_does_other_work_is_found_out(peer: str, facts: dict[str, Any], words: str | None) -> None:
    given = {"parameters": 10, "losses": [2.0, 1.5], **facts}
    found = bench.fault(peer, "rnn", given, loss=2.0, after=1.5, parameters=10, precision="float32")
    assert found is None if words is None else found is not None and words in found


def test_a_missing_environment_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    peer = bench.Peer("jax", bench.Task(tmp_path, "mlp3", 1, (), (), "", 0.1, "sgd", "float32", "cpu", 1), 1.0)
    assert peer.facts == {"failed": "not set up (make bench does it)"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOLS / "bench.py"), *arguments], capture_output=True, text=True)


def test_one_run(tmp_path: Path) -> None:
    """Losses and parameters agree between zilc's three forms and PyTorch, or the entry would say "failed"."""
    made = tmp_path / "made.json"
    peers = "zilc,zilc-bp,zilc-literal,torch"
    done = run("--networks", "mlp2", "--peers", peers, "--rounds", "1", "--json", str(made))
    assert done.returncode == 0, done.stderr
    data = json.loads(made.read_text())
    sgd, adam = data["results"]
    assert list(sgd["peers"]) == peers.split(",")
    assert list(adam["peers"]) == ["zilc", "torch"]
    for name, peer in [*sgd["peers"].items(), *adam["peers"].items()]:
        assert "failed" not in peer, (name, peer)
        assert peer["ms"] > 0
        assert 0 < peer["growth_mib"] < peer["peak_mib"]
    assert len(sgd["peers"]["torch"]["zilc_ratio"]) == 3
    page = bench.markdown(data["results"], data["facts"])
    assert "| mlp2 | 20 | zilc-literal |" in page
    assert "| mlp2, adam | 20 | torch |" in page


def test_unknown_names_are_refused() -> None:
    done = run("--networks", "lenet")
    assert done.returncode == 2
    assert "no lenet; known are mlp3" in done.stderr
