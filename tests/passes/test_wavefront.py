"""The wavefront is what remains of the dynamics; leave a rewrite out and more than that remains."""

import pytest

from tests.graphs import SKIP, WEAVE, model
from zilc import pipeline
from zilc.passes import wavefront as module
from zilc.passes.dynamics import ZERO, Difference, Dynamics, Error, Prediction, Pull, Scaled, Sum
from zilc.passes.identities import flow_of, insert_identities
from zilc.passes.levels import find_levels


def dynamics(text=SKIP, output=None, gamma=1.0):
    found = pipeline.structure(model(text), output=output)
    graph = insert_identities(found.graph, found.flow, found.levels)
    flow = flow_of(graph, found.clamped)
    return Dynamics.of(flow, find_levels(flow), gamma=gamma)


def only_pulls(term):
    return isinstance(term, Sum) and all(isinstance(x, Pull) for x in term.terms)


@pytest.mark.parametrize(("text", "output"), [(SKIP, None), (WEAVE, ["h", "y"])])
def test_every_error_is_the_sum_of_one_step(text, output):
    d = dynamics(text, output)
    schedule = module.wavefront(d, d.flow.leaves)
    terms = [(name, step.t, term) for step in schedule.steps for name, term in step.errors]
    assert {name for name, _, _ in terms} == set(d.flow.producer) - set(d.clamped) - {"y"}
    for name, t, term in terms:
        assert only_pulls(term), name
        assert d.level(name) == t + 1
        assert {pull.t for pull in term.terms} == {t}
        assert {d.levels.vertices[pull.edge.consumer] for pull in term.terms} == {t}
    for step in schedule.steps:
        for leaf, term in step.gradients:
            assert d.levels.leaves[leaf] == step.t + 1
            assert only_pulls(term)


@pytest.mark.parametrize("left_out", ["zero_errors", "unchanged_predictions", "arithmetic"])
def test_each_rewrite_is_needed(monkeypatch, left_out):
    replacement = (lambda term: term) if left_out == "arithmetic" else (lambda term, d: term)
    monkeypatch.setattr(module, left_out, replacement)
    d = dynamics()
    schedule = module.wavefront(d, d.flow.leaves)
    assert not all(only_pulls(term) for step in schedule.steps for _, term in step.errors)


def test_the_printed_sign_is_not_ours():
    """dx = gamma (eps - sum): with nothing folded, a vertex on level 1 moves against the pull of the output."""
    d = dynamics()
    assert d.move("h4", 0) == Scaled(1.0, Difference(Error("h4", 0), d.pulls("h4", 0)))
    assert d.error("h4", 1) == Difference(
        Sum((Error("h4", 0), Difference(Prediction("h4", 1), Prediction("h4", 0)))), d.move("h4", 0)
    )


def test_gamma_other_than_one_stays():
    d = dynamics(gamma=0.5)
    term = module.specialise(d.error("h4", 1), d)
    assert term == Difference(ZERO, Scaled(0.5, Difference(ZERO, d.pulls("h4", 0))))


def test_sum_order_is_that_of_the_original_graph():
    """Contributions to x: from `join` on level 2 before `fc1` on level 5, though a chain of three lies between."""
    d = dynamics()
    first, second = d.pulls("x", 5).terms
    assert d.flow.vertices[first.edge.consumer].op == "Identity"
    assert d.flow.names[second.edge.consumer] == "fc1"
