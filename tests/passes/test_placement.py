"""Placement ``min``: against exhaustive search, never worse than shared, K kept, the bits of bp."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

import zilc
from tests import random_graphs, simulator
from tests.graphs import SKIP, WEAVE, model
from tests.test_properties import clamped, gradients, run, same_bits, training
from zilc import analysis, models
from zilc.graph import Dataflow
from zilc.onnx_io import serialize
from zilc.passes.levels import Levels, find_levels
from zilc.passes.placement import latest_levels, least_identities, needed

#: a branches; the short branch ends in one number, so one identity of one element does for two of a's size.
FORK = """
<ir_version: 10, opset_import: ["" : 18]>
fork (float[N,8] x) => (float[N,8] y) <float[8,8] w, int64[1] rows> {
  [fc] a = MatMul(x, w)
  [e1] b = Exp(a)
  [e2] c = Tanh(b)
  [e3] d = Exp(c)
  [sum] s = ReduceSum(a, rows)
  [join] y = Mul(d, s)
}
"""


def fork() -> onnx.ModelProto:
    proto = model(FORK)
    proto.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(np.int64([0]), "rows"))
    return proto


def every_placement(flow: Dataflow, lowest: Levels) -> Iterator[Levels]:
    """All levels that the edges allow, K at most; leaves right above their consumers."""
    highest = latest_levels(flow, lowest)
    ranges = [range(a, b + 1) for a, b in zip(lowest.vertices, highest, strict=True)]
    for chosen in itertools.product(*ranges):
        if all(e.source is None or chosen[e.source] > chosen[e.consumer] for e in flow.edges):
            leaves = {n: max((chosen[e.consumer] + 1 for e in flow.readers.get(n, ())), default=0) for n in flow.leaves}
            yield Levels(chosen, leaves, lowest.depth)


def count(flow: Dataflow, levels: Levels) -> int:
    """Identity vertices of shared chains, counted from scratch."""
    return sum(
        max(levels.of(e) - levels.vertices[e.consumer] - 1 for e in edges) for edges in flow.readers.values()
    )


def size(flow: Dataflow, levels: Levels) -> int:
    """Their bytes, symbolic dimensions counting one."""
    total = 0
    for name, edges in flow.readers.items():
        tensor = flow.tensors[name]
        elements = int(np.prod([n for n in tensor.shape if isinstance(n, int)]))
        longest = max(levels.of(e) - levels.vertices[e.consumer] - 1 for e in edges)
        total += longest * elements * np.dtype(tensor.dtype).itemsize
    return total


def test_exhaustive_search_on_small_graphs() -> None:
    """On every seeded graph with slack and at most 20,000 placements: the least count and the least bytes are found."""
    searched = better = 0
    for seed in range(160):
        sample = random_graphs.seeded(seed, max_steps=12)
        found = analysis.structure(sample.model, output=sample.outputs)
        flow, lowest = found.flow, found.levels
        highest = latest_levels(flow, lowest)
        slack = np.prod([b - a + 1 for a, b in zip(lowest.vertices, highest, strict=True)], dtype=float)
        if slack == 1 or slack > 20_000:
            continue
        placements = list(every_placement(flow, lowest))
        assert lowest in placements
        for by, measure in (("count", count), ("bytes", size)):
            least = min(measure(flow, levels) for levels in placements)
            levels = least_identities(flow, by=by)
            assert levels in placements
            assert measure(flow, levels) == needed(flow, levels, by=by) == least <= measure(flow, lowest), (seed, by)
            better += least < measure(flow, lowest)
        searched += 1
    assert searched >= 40
    assert better >= 10


def test_by_hand() -> None:
    """fc 4, e1 3, e2 2, e3 1, join 0; sum may sit on 1, 2 or 3.  On 1 it needs two identities on a, on 3 two on s."""
    proto = fork()
    found = analysis.structure(proto, dims={"N": 5})
    by_name = dict(zip(found.flow.names, found.levels.vertices, strict=True))
    assert by_name == {"fc": 4, "e1": 3, "e2": 2, "e3": 1, "sum": 1, "join": 0}
    levels = least_identities(found.flow, by="bytes")
    assert dict(zip(found.flow.names, levels.vertices, strict=True)) == {**by_name, "sum": 3}
    assert needed(found.flow, found.levels, by="bytes") == 2 * 5 * 8 * 4  # two of [5, 8] float32 …
    assert needed(found.flow, levels, by="bytes") == 2 * 1 * 8 * 4  # … against two of [1, 8]
    assert needed(found.flow, levels) == needed(found.flow, found.levels) == least_count(found.flow) == 2
    assert (levels.depth, levels.leaves) == (found.levels.depth, found.levels.leaves)
    report = zilc.levelize(proto, identities="min-bytes", dims={"N": 5}).report["identities"]
    assert (report["min-bytes"]["bytes"], report["shared"]["bytes"]) == (64, 320)
    # A symbol counts one unless it is said to be more, so nothing is gained by moving.
    assert least_identities(analysis.structure(proto).flow, by="bytes").vertices[4] == 1


def least_count(flow: Dataflow) -> int:
    return needed(flow, least_identities(flow))


def test_what_is_stated_of_a_symbol_counts() -> None:
    """The sum goes up only where N makes its operand the larger one."""
    found = analysis.structure(fork())
    at = found.flow.names.index("sum")
    moved = [least_identities(found.flow, by="bytes", dims={"N": n}).vertices[at] for n in (1, 2, 1000)]
    assert moved == [1, 3, 3]


def test_a_level_graph_is_left_as_it_is() -> None:
    """No slack, no linear program."""
    found = analysis.structure(models.build("mlp3", inputs=9, hidden=5))
    assert least_identities(found.flow) is not None
    assert least_identities(found.flow) == found.levels
    assert zilc.levelize(model(SKIP), identities="min").report["identities"]["min"]["vertices"] == 3


@pytest.mark.parametrize("seed", range(25))
def test_random_graphs_keep_everything(seed: int) -> None:
    """Levelled from scratch by another analysis, K kept, outputs to the bit, no more than shared, twice the same."""
    sample = random_graphs.seeded(seed, max_steps=24)
    net = simulator.network(sample.model, sample.outputs)
    before = run(sample.model, sample.feeds, "reference")
    for identities in ("min", "min-bytes"):
        made = zilc.levelize(sample.model, identities=identities, output=sample.outputs)
        onnx.checker.check_model(made.model, full_check=True)
        assert simulator.check_levelled(made.model, clamped(sample, made.model)) == []
        after = run(made.model, sample.feeds, "reference")
        assert same_bits(before, {name: after[name] for name in before})
        assert made.report["levels"] == net.k
        total = simulator.active_identities(made.model, clamped(sample, made.model))
        counted = made.report["identities"]
        assert counted[identities]["vertices"] == total - simulator.count_identities(net)
        assert counted["min"]["vertices"] <= counted["shared"]["vertices"] <= counted["edge"]["vertices"]
        assert counted["min"]["vertices"] <= counted["min-bytes"]["vertices"]
        assert sum(entry["identities_" + identities.replace("-", "_")] for entry in made.report["per_level"]) == (
            counted[identities]["vertices"]
        )
        again = zilc.levelize(made.model, identities=identities, output=sample.outputs)
        assert serialize(again.model) == serialize(made.model)


@pytest.mark.parametrize("seed", range(25))
def test_gradients_have_the_bits_of_bp(seed: int) -> None:
    """Vertices move, the order of sums does not: it is that of the longest path."""
    sample = random_graphs.seeded(100 + seed, max_steps=24)
    for dtype, executor in ((np.float32, "onnxruntime"), (np.float64, "unoptimized")):
        cast = sample.cast(dtype)
        expected, loss = gradients(cast, training(cast, "bp"), executor)
        for identities in ("min", "min-bytes"):
            step = training(cast, "zil", identities=identities)
            assert step.signature["identities"] == identities
            found, its_loss = gradients(cast, step, executor)
            assert same_bits(found, expected)
            assert loss == its_loss


def test_the_order_of_sums_would_change_with_the_levels() -> None:
    """So the test above can fail: among its graphs are sums that the moved levels would order otherwise."""
    from zilc.passes.identities import flow_of, insert_identities
    from zilc.passes.levels import sum_order

    changed = 0
    for seed in range(25):
        sample = random_graphs.seeded(100 + seed, max_steps=24)
        found = analysis.structure(sample.model, output=sample.outputs)
        levels = least_identities(found.flow)
        flow = flow_of(insert_identities(found.graph, found.flow, levels, placement="min"), found.clamped)
        naive = sum_order(flow, find_levels(flow))
        own = zip(found.levels.vertices, found.flow.names, strict=True)
        own = tuple(level for level, name in own if ".terminal" not in name)
        kept = sum_order(flow, find_levels(flow), own)
        changed += any(
            sorted(edges, key=naive.__getitem__) != sorted(edges, key=kept.__getitem__)
            for edges in flow.readers.values()
        )
    assert changed >= 2


#: Smaller weights where they are large; the graphs are those of the full sizes.
SIZES: dict[str, dict[str, int]] = {
    "resnet18": {"image": 32, "width": 4}, "alexnet": {"image": 63, "width": 4},
    "transformer": {"vocabulary": 20, "d_model": 16, "heads": 2, "d_ff": 8},
}  # fmt: skip


@pytest.mark.parametrize("name", models.names())
def test_no_more_than_shared_on_the_paper_networks(name: str) -> None:
    counted = zilc.levelize(models.build(name, **SIZES.get(name, {})), identities="none").report["identities"]
    assert counted["min"]["vertices"] <= counted["shared"]["vertices"] <= counted["edge"]["vertices"]
    assert counted["min-bytes"]["vertices"] >= counted["min"]["vertices"]


@pytest.mark.parametrize(
    ("vertices", "width"), [(2_000, 12), *(pytest.param(20_000, n, marks=pytest.mark.long) for n in (12, 200, 4000))]
)
def test_large_graphs_in_under_a_minute(vertices: int, width: int) -> None:
    """Random graphs with skips of every length and slack all over: fewer than shared, each program in a minute."""
    from tools.placement import random_flow

    flow = random_flow(vertices, 0, width)
    assert len(flow.vertices) == vertices
    lowest = find_levels(flow)
    begun = time.perf_counter()
    least = least_identities(flow)
    assert time.perf_counter() - begun < 60
    assert needed(flow, least) < needed(flow, lowest)
    begun = time.perf_counter()
    assert needed(flow, least_identities(flow, by="bytes"), by="bytes") < needed(flow, lowest, by="bytes")
    assert time.perf_counter() - begun < 60


def test_signature_and_reports_tell_the_moved_levels() -> None:
    """A leaf's level is one above its highest consumer, wherever that was put."""
    sample = next(
        s for s in (random_graphs.seeded(n, max_steps=24) for n in range(60)) if _moves_a_leaf(s)
    )
    step = training(sample, "zil", identities="min")
    report = zilc.levelize(sample.model, identities="min", output=sample.outputs).report
    told = {entry["name"]: entry["level"] for entry in report["leaves"]}
    shared = training(sample, "zil").signature
    for entry, other in zip(step.signature["parameters"], shared["parameters"], strict=True):
        assert entry["level"] == told[entry["name"]]
        assert entry["level"] >= other["level"]
    assert [e["level"] for e in step.signature["parameters"]] != [e["level"] for e in shared["parameters"]]


def _moves_a_leaf(sample: random_graphs.Sample) -> bool:
    found = analysis.structure(sample.model, output=sample.outputs)
    levels = least_identities(found.flow)
    parameters = [n for n in sample.leaves if n not in sample.inputs]
    return any(levels.leaves[n] != found.levels.leaves[n] for n in parameters)


def test_several_outputs_stay_on_level_0() -> None:
    made = zilc.levelize(model(WEAVE), identities="min", output=["h", "y"])
    assert made.levels["last"] == 0
    assert made.report["identities"]["min"]["vertices"] <= made.report["identities"]["shared"]["vertices"]


#: The image networks that ship with onnx; those with large weights are chains, which need no identities.
ZOO = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
CHAINS = [pytest.param(name, marks=pytest.mark.long) for name in ("bvlc_alexnet", "zfnet512", "vgg19")]


@pytest.mark.parametrize(
    "name", ["shufflenet", "squeezenet", "inception_v1", "inception_v2", "densenet121", "resnet50", *CHAINS]
)
def test_no_more_than_shared_on_the_model_zoo(name: str) -> None:
    counted = zilc.levelize(ZOO / f"light_{name}.onnx", identities="none").report["identities"]
    assert counted["min"]["vertices"] <= counted["shared"]["vertices"] <= counted["edge"]["vertices"]
    assert counted["min-bytes"]["bytes"] <= counted["shared"]["bytes"] <= counted["edge"]["bytes"]
    assert counted["min"]["vertices"] <= counted["min-bytes"]["vertices"]
