"""The benchmark: what it counts as the same work, how it judges its targets, and one run of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))
import bench  # type: ignore[import-not-found]  # noqa: E402
import bench_cuda  # type: ignore[import-not-found]  # noqa: E402
import bench_page  # noqa: E402
import bench_workers  # type: ignore[import-not-found]  # noqa: E402
from bench_targets import TARGETS, Target, judge  # noqa: E402
from bench_work import step_operations  # type: ignore[import-not-found]  # noqa: E402


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


def test_twins_are_built_first_and_last_and_count_as_the_mean_of_both() -> None:
    assert bench.lineup(("zilc", "zilc-bp", "torch"), twice=True) == ["zilc", "zilc-bp", "torch", "zilc-bp", "zilc"]
    assert bench.lineup(("zilc", "torch"), twice=False) == ["zilc", "torch"]
    assert bench.together([{0: 2.0, 1: 8.0}, {1: 2.0, 2: 1.0}]) == {1: 4.0}
    assert bench.together([{0: 3.0}]) == {0: 3.0}


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


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([6.9084, 6.9071], None),
        ([6.9100, 6.9087], None),  # the same change from what rounding makes of the first loss
        ([6.9084, 6.9084], "after one update is"),
        ([6.9071, 6.9071], "after one update is"),
        ([6.9084, 6.9058], "after one update is"),  # twice the rate
        ([6.9084, 6.90775], "after one update is"),  # half of it
        ([6.9084, 6.9097], "after one update is"),
        ([7.0000, 6.9987], "first loss is"),
        ([6.9084, float("nan")], "after one update is"),
    ],
)
def test_in_half_precision_the_change_is_held(precision: str, losses: list[float], words: str | None) -> None:
    facts = {"parameters": 10, "losses": losses}
    found = bench.fault("torch", "alexnet", facts, loss=6.9084, after=6.9071, parameters=10, precision=precision)
    assert found is None if words is None else found is not None and words in found


def test_in_half_precision_the_change_is_that_of_float32_where_it_was_measured() -> None:
    case = bench.Case("mlp3", 20, "bfloat16", "sgd", ("zilc",), 1)
    known = {"network": "mlp3", "batch": 20, "optimizer": "sgd", "precision": "float32"}
    measured = {**known, "peers": {"zilc": {"losses": [2.0, 1.5]}}}
    other = {**known, "batch": 64, "peers": {"zilc": {"losses": [2.0, 1.0]}}}
    failed = {**known, "peers": {"zilc": {"failed": "reason"}}}
    assert bench.expected_after(case, 2.0, None, []) is None
    assert bench.expected_after(case, 2.0, [2.1, 2.0], [other, failed]) == pytest.approx(1.9)
    assert bench.expected_after(case, 2.0, [2.1, 2.0], [other, measured]) == 1.5
    assert bench.expected_after(case, 2.0, None, [measured]) == 1.5


def test_updates_that_a_loss_scale_skips_are_passed_over() -> None:
    given = iter([2.0, 2.0, 2.0, 1.5, 1.0])
    assert bench_workers.first_losses(lambda: next(given), "float16") == [2.0, 1.5]
    given = iter([2.0, 2.0, 1.5])
    assert bench_workers.first_losses(lambda: next(given), "bfloat16") == [2.0, 2.0]
    assert bench_workers.first_losses(lambda: 2.0, "float16") == [2.0, 2.0]  # nothing is ever updated


def test_batches_by_network() -> None:
    asked = bench.parse(["--batch", "resnet18=20,resnet18=128, alexnet=256,64"]).batch
    assert bench.batches("resnet18", asked) == [20, 128]
    assert bench.batches("alexnet", asked) == [256]
    assert bench.batches("decoder", asked) == [64]
    assert bench.batches("decoder", bench.parse(["--batch", "alexnet=256"]).batch) == [4]
    assert bench.batches("mlp3", bench.parse([]).batch) == [20]
    for wrong in ("alexnet=", "lenet=4", "0", "alexnet=4,"):
        with pytest.raises(SystemExit):
            bench.parse(["--batch", wrong])


def test_what_is_planned_on_a_gpu() -> None:
    words = ["--device", "cuda", "--threads", "16", "--networks", "mlp3,rnn"]
    options = bench.parse([*words, "--precision", "float32,float16", "--batch", "mlp3=20,mlp3=64"])
    assert (options.builds, options.alive, options.round_ms) == (12, 40, 150.0)
    cases = bench.plan(options)
    assert [str(case) for case in cases] == [
        "mlp3, batch 20, float32, sgd", "mlp3, batch 20, float32, adam", "mlp3, batch 20, float16, sgd",
        "mlp3, batch 64, float32, sgd", "mlp3, batch 64, float16, sgd", "rnn, batch 20, float32, sgd",
        "rnn, batch 20, float32, adam", "rnn, batch 20, float16, sgd",
    ]  # fmt: skip
    everything = ("zilc", "zilc-bp", "zilc-plain", "torch", "torch-compile", "torch-graphs", "jax")
    assert [case.peers for case in cases[:3]] == [everything, ("zilc", "torch"), everything]
    assert cases[1].rounds == bench.LEAST_ROUNDS
    assert [len(wave) for wave in bench.waves(cases, 12, 16)] == [3, 2, 3]
    assert [len(wave) for wave in bench.waves(cases, 12, 1)] == [1] * 8
    assert [len(wave) for wave in bench.waves(cases, 1, 40)] == [1] * 8


def test_what_has_no_half_precision_is_left_out() -> None:
    options = bench.parse(["--peers", "onnx-ad,torch,zilc"])
    assert bench.chosen(options, "mlp3", "float32") == ["zilc", "onnx-ad", "torch"]
    assert bench.chosen(options, "mlp3", "float16") == ["zilc", "torch"]
    usual = bench.chosen(bench.parse([]), "mlp3", "float32")
    assert not set(usual) & set(bench.CUDA_ALONE)
    with pytest.raises(SystemExit):
        bench.parse(["--peers", "torch-graphs"])


GRAPH = """<ir_version: 8, opset_import: ["": 18]>
g (float[2, 3, 8, 8] x, float[4, 10] a) => (float[2, 4] y, float[2, 3, 8, 8] b)
<float[4, 3, 3, 3] w, float[4, 1, 1, 5] d, float[4, 3, 3, 3] u>
{
    c = Conv(x, w)
    e = Conv <group = 4> (c, d)
    f = ConvTranspose(c, u)
    b = Identity(f)
    s = ReduceMean <keepdims = 0> (e, axes)
    m = Gemm <transA = 1> (a, a)
    k = MatMul(s, a)
    y = MatMul(k, p)
}"""


def test_operations_follow_from_shapes() -> None:
    model = onnx.parser.parse_model(GRAPH)
    axes = onnx.numpy_helper.from_array(np.asarray([2, 3], np.int64), "axes")
    p = onnx.numpy_helper.from_array(np.zeros((10, 4), np.float32), "p")
    model.graph.initializer.extend([axes, p])
    convolutions = 2 * (2 * 4 * 6 * 6) * 27 + 2 * (2 * 4 * 6 * 2) * 5 + 2 * (2 * 4 * 6 * 6) * 27
    products = 2 * (10 * 10) * 4 + 2 * (2 * 10) * 4 + 2 * (2 * 4) * 10
    assert step_operations(model) == convolutions + products


def test_a_gpus_share_of_its_best_rate() -> None:
    results = [gpu_result("mlp3", 20, "float16", torch={"ms": 2.0})]
    bench_cuda.add_shares(results, {"float16": 4000.0})
    assert results[0]["peers"]["torch"]["peak_share"] == 3.0 / 2e-3 / 4000.0
    bench_cuda.add_shares(results, {})  # not measured: it stays


def gpu_result(network: str, batch: int, precision: str, **peers: Any) -> dict[str, Any]:
    return {
        "network": network, "batch": batch, "precision": precision, "optimizer": "sgd", "gflop": 3.0, "peers": peers,
    }  # fmt: skip


def gpu_entry(ms: float, **more: Any) -> dict[str, Any]:
    return {"ms": ms, "min": ms, "max": ms, "rounds": 9, "peak_mib": 900.0, "versions": {"Python": "3.12.0"}, **more}


def test_a_gpus_page_from_runs_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"date": "2026-01-01", "machine": "one", "device": "cuda", "GPU": "NVIDIA H100", "driver": "580.1"}
    first = [gpu_result("mlp3", 20, "float32", zilc=gpu_entry(1.0), torch={"failed": "once"})]
    again = [
        gpu_result(
            "mlp3", 20, "float32", zilc=gpu_entry(1.0, peak_share=0.125),
            torch=gpu_entry(2.0, zilc_ratio=[0.5, 0.4, 0.6], device_mib=512.0, note="two biases"),
        ),
        gpu_result("rnn", 64, "float16", zilc=gpu_entry(1.0), jax={"failed": "out of | memory"}),
    ]  # fmt: skip
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    one = {**facts, "precision": "float32", "peak_gflops": {"float32": 50000.0}}
    two = {**facts, "precision": "float16, float32", "peak_gflops": {"float16": 700000.0}}
    files[0].write_text(json.dumps({"facts": one, "results": first}))
    files[1].write_text(json.dumps({"facts": two, "results": again}))
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--from-json", ",".join(map(str, files)), "--write"])
    bench.main()
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {"BENCHMARKS_CUDA.md", "benchmarks_cuda.json"}
    page = (tmp_path / "docs" / "BENCHMARKS_CUDA.md").read_text()
    assert "GPU NVIDIA H100, driver 580.1, precision float32, float16." in page
    assert "50.0 TFLOP/s in float32, 700.0 TFLOP/s in float16." in page
    assert "| mlp3 | 20 | float32 | zilc | 1 | 1 to 1 | 9 |  |  | 3 | 12.50% |  |" in page
    assert "| mlp3 | 20 | float32 | torch | 2 | 2 to 2 | 9 | 0.500 | 0.400 to 0.600 | 3 |  | 512 |" in page
    assert "| rnn | 64 | float16 | jax | out of \\| memory |" in page
    assert "| float32 | torch | 1 | 0.500 | 0.500, mlp3 (20) | 0.500, mlp3 (20) |" in page
    assert "mlp3: two biases (torch)." in page
    data = json.loads((tmp_path / "docs" / "benchmarks_cuda.json").read_text())
    assert bench_cuda.markdown(data["results"], data["facts"]) == page
    assert "targets" not in data


def test_runs_on_different_machines_are_not_joined(tmp_path: Path) -> None:
    facts = {"device": "cuda", "machine": "one", "precision": "float32"}
    runs = [{"facts": {**facts, "GPU": gpu}, "results": []} for gpu in ("A", "B")]
    assert bench_page.by_machine(runs) == runs
    with pytest.raises(ValueError, match="A in one, B in one"):
        bench_page.write(runs, tmp_path)
    assert not list(tmp_path.iterdir())


def cpu_run(machine: str, day: str, **times: float) -> dict[str, Any]:
    """zilc and PyTorch on networks, and PyTorch's milliseconds of them."""
    results = [
        {"network": name, "batch": 20, "precision": "float32", "optimizer": "sgd",
         "peers": {"zilc": gpu_entry(1.0, growth_mib=1.0, stepping_mib=1.0),
                   "torch": gpu_entry(ms, growth_mib=1.0, stepping_mib=1.0, zilc_ratio=[1 / ms] * 3)}}
        for name, ms in times.items()
    ]  # fmt: skip
    return bench_page.document(results, {"date": day, "machine": machine, "device": "cpu", "precision": "float32"})


def test_machines_stand_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new run replaces that of its machine alone; targets have a column for each machine."""
    place = tmp_path / "docs" / "benchmarks.json"
    bench_page.write([cpu_run("Xeon", "2026-01-01", mlp3=2.0, rnn=1.0)], tmp_path / "docs")
    bench_page.write([cpu_run("EPYC", "2026-01-02", mlp3=5.0)], tmp_path / "docs")
    assert [run["facts"]["machine"] for run in bench_page.read(place)] == ["EPYC", "Xeon"]
    page = (tmp_path / "docs" / "BENCHMARKS.md").read_text()
    assert "| PyTorch eager, MLP | ≤ 0.25 | mlp3 0.200: met | mlp3 0.500: missed |" in page
    assert page.index("## EPYC") < page.index("## Xeon")

    again = tmp_path / "again.json"
    again.write_text(json.dumps(cpu_run("Xeon", "2026-01-03", mlp3=4.0)))
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--from-json", f"{place},{again}", "--write"])
    bench.main()
    assert [run["facts"]["machine"] for run in bench_page.read(place)] == ["Xeon", "EPYC"]
    page = (tmp_path / "docs" / "BENCHMARKS.md").read_text()
    assert "| PyTorch eager, MLP | ≤ 0.25 | mlp3 0.250: met | mlp3 0.200: met |" in page
    assert "| PyTorch eager, RNN | ≤ 0.5 | rnn 1.000: missed | rnn not measured |" in page


def test_pages_are_those_of_their_data() -> None:
    docs = TOOLS.parent / "docs"
    assert bench_page.markdown(bench_page.read(docs / "benchmarks.json")) == (docs / "BENCHMARKS.md").read_text()
    data = json.loads((docs / "benchmarks_cuda.json").read_text())
    assert bench_cuda.markdown(data["results"], data["facts"]) == (docs / "BENCHMARKS_CUDA.md").read_text()


def test_a_process_that_dies_is_said_to_have_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bench_workers.py").write_text(
        'import json; print(json.dumps({"ready": {"losses": [1, 1], "parameters": 1, "imported_mib": 1}}), flush=True)'
    )
    monkeypatch.setattr(bench, "HERE", tmp_path)
    peer = bench.Peer("torch", bench.Task(tmp_path, "mlp3", 1, (), (), "", 0.1, "sgd", "float32", "cpu", 1), 60.0)
    assert peer.facts["losses"] == [1, 1]
    assert peer.end() is None
    assert "the process ended" in peer.facts["failed"]


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
    assert {name for name, peer in sgd["peers"].items() if len(peer.get("each_ms", ())) == 2} == {"zilc", "zilc-bp"}
    page = bench_page.markdown([data])
    assert "| mlp2 | 20 | zilc-literal |" in page
    assert "| mlp2, adam | 20 | torch |" in page


def test_peers_built_at_the_same_time(tmp_path: Path) -> None:
    """Two precisions, in waves: as many workers are alive as were asked for."""
    made = tmp_path / "made.json"
    words = ["--networks", "mlp2", "--peers", "zilc,torch", "--rounds", "1", "--no-adam", "--round-ms", "20"]
    wide = ["--builds", "2", "--alive", "2", "--precision", "float32,float16", "--batch", "8"]
    done = run(*words, *wide, "--json", str(made))
    assert done.returncode == 0, done.stderr
    data = json.loads(made.read_text())
    found = [(result["batch"], result["precision"]) for result in data["results"]]
    assert found == [(8, "float32"), (8, "float16")]
    for result in data["results"]:
        for name, peer in result["peers"].items():
            assert "failed" not in peer, (name, peer)
    assert data["facts"]["precision"] == "float32, float16"
    assert "| mlp2, float16 | 8 | torch |" in bench_page.markdown([data])
    assert not list(tmp_path.glob("*.part"))


def test_unknown_names_are_refused() -> None:
    done = run("--networks", "lenet")
    assert done.returncode == 2
    assert "no lenet; known are mlp3" in done.stderr


def test_onnx_ads_two_sets_of_weights_lie_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value on the CPU lies in the array that it is made from; an update must not write over what it reads."""
    import bench_onnx_ad  # type: ignore[import-not-found]
    import onnxruntime

    arrays: list[np.ndarray] = []
    make = onnxruntime.OrtValue.ortvalue_from_numpy

    def kept(array: np.ndarray, *where: Any) -> Any:
        arrays.append(array)
        return make(array, *where)

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", staticmethod(kept))
    options = bench.parse(["--threads", "1"])
    case = bench.Case("mlp2", 2, "float32", "sgd", ("onnx-ad",), 3)
    task = bench.prepare(tmp_path, case, options).task
    made = bench_onnx_ad.step(task, lambda: None)
    assert made.step() > made.step()
    weights = [a for a in arrays if a.shape in {w.shape for w in task.weights().values()}]
    assert len(weights) == 2 * len(task.parameters)
    assert not any(np.shares_memory(a, b) for k, a in enumerate(weights) for b in weights[:k])
