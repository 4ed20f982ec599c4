"""The wavefront is what remains of the dynamics; leave a rewrite out and more than that remains."""

import pytest

import zilc
from tests import random_graphs
from tests.graphs import SKIP, WEAVE, model
from zilc import analysis, models, pipeline
from zilc.onnx_io import serialize
from zilc.passes import wavefront as module
from zilc.passes.dynamics import ZERO, Difference, Dynamics, Error, Prediction, Pull, Scaled, Sum
from zilc.passes.identities import flow_of, insert_identities
from zilc.passes.levels import find_levels


def dynamics(text=SKIP, output=None, gamma=1.0):
    found = analysis.structure(model(text), output=output)
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


def test_the_facts_say_no_more_than_the_theorem():
    """At t = l the wave is there: the error is no longer zero, and at t = l + 1 the prediction no longer unchanged."""
    d = dynamics()
    for name in set(d.flow.producer) - set(d.clamped):
        level = d.level(name)
        for t in range(d.levels.depth + 1):
            assert (module.zero_errors(Error(name, t), d) == ZERO) == (t < level)
            assert (module.unchanged_predictions(Prediction(name, t), d) == Prediction(name, 0)) == (t <= level)
    for name in d.clamped:
        assert module.zero_errors(Error(name, 0), d) == Error(name, 0)


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


# --- node for node ----------------------------------------------------------------------------------

PASSES = ("zero_errors", "unchanged_predictions", "arithmetic", "dead_steps")


def literal_description(d):
    """The dynamics as they stand: every error of every step, and each leaf's gradient at its step."""
    moving = [t.name for v in d.flow.vertices for t in v.outputs if t.name in d.flow.readers]
    moving = [name for name in moving if name not in d.clamped]
    return {(name, t): d.error(name, t) for t in range(1, d.levels.depth + 1) for name in moving}


def errors_in(term, d):
    """The errors that a term reads: (tensor, t)."""
    match term:
        case Error(tensor, t):
            return {(tensor, t)}
        case Pull(edge, t):
            return {(out.name, t) for out in d.flow.vertices[edge.consumer].outputs}
        case Sum(terms):
            return set().union(*(errors_in(x, d) for x in terms))
        case Difference(a, b):
            return errors_in(a, d) | errors_in(b, d)
        case Scaled(_, inner):
            return errors_in(inner, d)
    return set()


def pulls_in(term):
    match term:
        case Pull():
            return [term]
        case Sum(terms):
            return [pull for x in terms for pull in pulls_in(x)]
    return []


def specialised(d, leaves, left_out=None):
    """The literal description through the passes one after the other, as a schedule; dead steps found anew here."""
    rewrites = {
        "zero_errors": lambda term: module.zero_errors(term, d),
        "unchanged_predictions": lambda term: module.unchanged_predictions(term, d),
        "arithmetic": module.arithmetic,
    }
    leaves = [leaf for leaf in leaves if d.levels.leaves[leaf] > 0]
    description = literal_description(d)
    gradients = {leaf: d.gradient(leaf) for leaf in leaves}
    for name, rewrite in rewrites.items():
        if name != left_out:
            description = {key: rewrite(term) for key, term in description.items()}
            gradients = {leaf: rewrite(term) for leaf, term in gradients.items()}
    live, waiting = set(), list(gradients.values())
    if left_out == "dead_steps":
        live = set(description)
    while waiting:
        for key in errors_in(waiting.pop(), d) & set(description):
            # What is zero is read by nobody: it is a sum of nothing.
            if key not in live and description[key] != ZERO:
                live.add(key)
                waiting.append(description[key])
    steps = [module.Step(t) for t in range(d.levels.depth)]
    # In a step the later vertex first, as reverse mode would come by; several outputs of one in their order.
    place = {name: (-v, k) for k, (name, v) in enumerate(d.flow.producer.items())}
    for name, t in sorted(live, key=lambda key: (key[1], place[key[0]])):
        steps[t - 1].errors.append((name, description[name, t]))
    for leaf in leaves:
        steps[d.levels.leaves[leaf] - 1].gradients.append((leaf, gradients[leaf]))
    return module.Schedule(d.flow, steps)


def emitted(monkeypatch, proto, schedule, **options):
    """The training graph that is made when the pipeline takes its schedule from ``schedule``."""
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "wavefront", schedule)
        return serialize(zilc.emit_training(proto, **options).model)


CASES = {
    "skip": (lambda: model(SKIP), {}),
    "weave": (lambda: model(WEAVE), {"output": ["h", "y"]}),
    "edge": (lambda: model(SKIP), {"identities": "edge"}),
    "mlp3": (lambda: models.build("mlp3", inputs=9, hidden=5), {"loss": "cross-entropy"}),
    # What is frozen is not worked for: errors beyond the middle layer are dead steps.
    "middle": (lambda: models.build("mlp3", inputs=9, hidden=5), {"wrt": "layer2.*"}),
    "residual": (lambda: models.build("residual", inputs=9, hidden=5), {"identities": "min"}),
    "rnn": (lambda: models.build("rnn", steps=4, inputs=3, hidden=4, outputs=2), {"loss": "mse"}),
    "resnet18": (lambda: models.build("resnet18", image=16, width=3, classes=5, blocks=(1, 2)), {}),
    "transformer": (
        lambda: models.build("transformer", vocabulary=11, length=5, d_model=12, heads=3, d_ff=9),
        {"loss": "cross-entropy"},
    ),
}


#: By default the learning rate scales the clamped errors and sums of products are joined; gradients keep both apart.
SHIPPED = {"updates": {}, "gradients": {"outputs": "grad"}, "adam": {"optimizer": "adam", "outputs": "both"}}


@pytest.mark.parametrize("shipped_as", SHIPPED)
@pytest.mark.parametrize("name", CASES)
def test_the_literal_description_specialised_is_the_wavefront_node_for_node(monkeypatch, name, shipped_as):
    build, options = CASES[name]
    proto, options = build(), {**options, **SHIPPED[shipped_as]}
    shipped = serialize(zilc.emit_training(proto, **options).model)
    assert emitted(monkeypatch, proto, specialised, **options) == shipped


def test_so_it_is_on_random_graphs():
    for seed in range(12):
        sample = random_graphs.seeded(seed)
        found = analysis.structure(sample.model, output=sample.outputs)
        graph = insert_identities(found.graph, found.flow, found.levels)
        flow = flow_of(graph, found.clamped)
        d = Dynamics.of(flow, find_levels(flow))
        for leaves in (sample.leaves, sample.leaves[:1]):  # one leaf alone: what others need is dead
            assert specialised(d, leaves).steps == module.wavefront(d, leaves).steps


@pytest.mark.parametrize("shipped_as", SHIPPED)
@pytest.mark.parametrize("left_out", PASSES)
@pytest.mark.parametrize("name", CASES)
def test_with_one_pass_left_out_it_is_not(monkeypatch, name, left_out, shipped_as):
    """What is left over has no place in a wavefront: an error where it is to be emitted."""
    build, options = CASES[name]
    with pytest.raises(TypeError, match="a wavefront schedule has no"):
        emitted(
            monkeypatch, build(), lambda d, leaves: specialised(d, leaves, left_out), **options, **SHIPPED[shipped_as]
        )


@pytest.mark.parametrize("name", CASES)
def test_operands_have_not_moved_where_they_are_read(name):
    """Every pull that is left reads value nodes that still hold the forward pass: their level lies above its step."""
    build, options = CASES[name]
    found = analysis.structure(build(), output=options.get("output"))
    graph = insert_identities(found.graph, found.flow, found.levels)
    flow = flow_of(graph, found.clamped)
    d = Dynamics.of(flow, find_levels(flow))
    read = [pull for step in specialised(d, flow.leaves).steps for _, term in (*step.errors, *step.gradients)
            for pull in pulls_in(term)]  # fmt: skip
    assert read
    for pull in read:
        assert d.levels.vertices[pull.edge.consumer] == pull.t
        assert all(d.levels.of(edge) > pull.t for edge in flow.operands[pull.edge.consumer])
