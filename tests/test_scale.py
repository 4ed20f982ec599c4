"""Size: graphs deeper than Python's stack, and weights larger than memory, which compiling never reads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import zilc
from tools import scale

ROOT = Path(__file__).parent.parent
DEPTH = 3000


@pytest.fixture(scope="module")
def chain() -> object:
    return scale.chain(DEPTH)


def test_a_chain_deeper_than_the_stack_is_levelled(chain: object) -> None:
    assert sys.getrecursionlimit() < DEPTH
    found = zilc.levelize(chain)
    assert found.report["levels"] == DEPTH
    assert max(found.levels.values()) == DEPTH
    skips = {entry["identities"] for entry in found.report["skips"]}
    assert skips == {3, 15}
    inserted = len(found.model.graph.node) - len(chain.graph.node)  # type: ignore[attr-defined]
    assert inserted == found.report["identities"]["shared"]["vertices"] > 0


def test_a_chain_deeper_than_the_stack_takes_one_step_as_reverse_mode_does(chain: object) -> None:
    """Bit for bit, on gradients that are numbers and mostly not zero."""
    results = []
    for algorithm in ("zil", "bp"):
        step = zilc.emit_training(chain, algorithm=algorithm, outputs="grad")  # type: ignore[arg-type]
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(step.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        rng = np.random.default_rng(0)
        feeds = {name: step.state[name] for name in (p["name"] for p in step.signature["parameters"])}
        feeds["x"] = np.asarray(rng.uniform(0.5, 1.5, (2, 4)), np.float32)
        feeds["target"] = rng.standard_normal((2, 4)).astype(np.float32)
        names = [p["grad"] for p in step.signature["parameters"]]
        assert len(names) == DEPTH // 40
        results.append(session.run(names, feeds))
    for zil, bp in zip(*results, strict=True):
        assert np.isfinite(zil).all()
        assert np.array_equal(zil, bp)
    assert sum(g.any() for g in results[0]) > len(results[0]) // 2


@pytest.mark.parametrize("compile_model", [zilc.levelize, zilc.emit_training], ids=["levelize", "emit_training"])
def test_work_a_vertex_does_not_grow_with_depth(compile_model: Callable[[onnx.ModelProto], object]) -> None:
    """Work counted in calls, Python's and C's, which no busy machine disturbs; `make scale` measures the time."""

    def calls(vertices: int) -> float:
        model, counted = scale.chain(vertices), 0

        def count(*_: object) -> None:
            nonlocal counted
            counted += 1

        sys.setprofile(count)
        try:
            compile_model(model)
        finally:
            sys.setprofile(None)
        return counted / vertices

    calls(100)
    assert calls(1600) < 1.3 * calls(400)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from /proc")
def test_billions_of_parameters_are_compiled_without_reading_them(tmp_path: Path) -> None:
    """The weights are 4 GiB of holes; a process that compiles stays far below, in memory and in bytes read."""
    path, parameters = scale.sparse_decoder(tmp_path, d_model=4096, layers=5, heads=4, length=64)
    assert parameters > 1_000_000_000
    assert (tmp_path / "weights.bin").stat().st_size > 4 * parameters - 1
    assert (tmp_path / "weights.bin").stat().st_blocks * 512 < 1 << 20, "the file system keeps no holes"
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import zilc; from tools import scale\n"
        "before, base = scale.bytes_read(), scale.peak_mib()\n"
        "zilc.levelize(sys.argv[2]); zilc.emit_training(sys.argv[2])\n"
        "print(json.dumps([scale.bytes_read() - before, scale.peak_mib() - base]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), str(path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    read, grown = json.loads(done.stdout.splitlines()[-1])
    assert read < 64 << 20
    assert grown < 400


def test_the_least_of_levelling_has_all_nodes(chain: onnx.ModelProto) -> None:
    made = scale.write_nodes(chain.graph, 7)
    old = [(n.op_type, n.name, list(n.input), list(n.output)) for n in chain.graph.node]
    assert [(n.op_type, n.name, list(n.input), list(n.output)) for n in made.node][:-7] == old
    assert {n.op_type for n in made.node[-7:]} == {"Identity"}
