"""State that is written over itself: bits, order, and what is left after a failure."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest

import zilc
from zilc import models, runtime
from zilc import signature as signatures
from zilc.errors import DataError
from zilc.in_place import in_place, operands
from zilc.session import TrainingSession, make_session, make_training_session

CPU = ["CPUExecutionProvider"]
OPTIMIZERS = {
    "sgd": {},
    "momentum": {"options": {"nesterov": True, "weight_decay": 0.01}},
    "adam": {"options": {"amsgrad": True}},
    "adamw": {},
}
NETWORKS: dict[str, dict[str, Any]] = {
    "mlp3": {},
    "residual": {},
    "rnn": {},
    "resnet18": {"image": 33, "width": 8, "classes": 10},
    "transformer": {"vocabulary": 50, "length": 6, "d_model": 16, "heads": 2, "d_ff": 32},
    "decoder": {"vocabulary": 50, "length": 6, "d_model": 16, "heads": 2},
}


def _emitted(name: str, dtype: str = "float32", **options: Any) -> tuple[zilc.TrainingStep, dict[str, np.ndarray]]:
    model = models.build(name, dtype=dtype, **NETWORKS[name])
    feeds = models.random_feeds(model, 4, np.random.default_rng(0), loss="cross-entropy")
    return zilc.emit_training(model, loss="cross-entropy", **options), feeds


def _plain(model: onnx.ModelProto, providers: Any, pairs: Any, **rest: Any) -> TrainingSession:
    del rest["cuda_graph"]
    return TrainingSession(make_session(model, providers, **rest))


@pytest.mark.parametrize(
    ("network", "dtype", "options"),
    [
        *((name, "float32", {"optimizer": "adam"}) for name in NETWORKS),
        *(("mlp3", dtype, {"optimizer": k, **v}) for k, v in OPTIMIZERS.items() for dtype in ("float32", "float64")),
        ("resnet18", "float32", {"mode": "train", "optimizer": "momentum"}),
        ("mlp3", "float32", {"outputs": "both"}),
        ("residual", "float32", {"schedule": "literal"}),
    ],
)
def test_the_bits_are_those_of_two_sets(
    monkeypatch: pytest.MonkeyPatch, network: str, dtype: str, options: dict[str, Any]
) -> None:
    step, feeds = _emitted(network, dtype, **options)
    own = zilc.Trainer(step, lr=0.01, providers=CPU)
    # onnxruntime does not say of Max that it may write over an operand.
    names = {name for name, _ in signatures.carried_pairs(step.signature)}
    assert own._opened.over == {name for name in names if not name.endswith("max_exp_avg_sq")}
    monkeypatch.setattr(runtime, "make_training_session", _plain)
    other = zilc.Trainer(step, lr=0.01, providers=CPU)
    assert not other._opened.over
    for _ in range(4):
        assert own.step(feeds) == other.step(feeds)
    before, after = other.state, own.state
    for name, array in before.items():
        assert array.tobytes() == after[name].tobytes(), name


def test_all_readers_run_before_the_writer() -> None:
    step, _ = _emitted("transformer", optimizer="adam")
    pairs = signatures.carried_pairs(step.signature)
    model = onnx.ModelProto()
    model.CopyFrom(step.model)
    # The worst order that is still one: updates as early as they can be.
    ordered = in_place(model, step.model, pairs)
    assert ordered.over == {name for name, _ in pairs}
    onnx.checker.check_model(ordered.model, full_check=True)
    place = {name: i for i, node in enumerate(ordered.model.graph.node) for name in node.output}
    for name, following in pairs:
        readers = [i for i, node in enumerate(ordered.model.graph.node) if name in set(operands(node))]
        assert readers, name
        assert max(readers) <= place[following], name


def test_updates_that_read_each_other_keep_two_buffers() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 18]> swap (float[3] a, float[3] b, float[3] c)
        => (float[3] a2, float[3] b2, float[3] c2) {
            a2 = Sub(a, b)
            b2 = Add(b, a)
            c2 = Mul(c, c)
        }"""
    )
    pairs = [("a", "a2"), ("b", "b2"), ("c", "c2")]
    opened = make_training_session(model, CPU, pairs)
    assert opened.over == {"c"}


def test_a_writer_that_reads_its_value_again_and_again_keeps_two_buffers() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 18]> product (float[3, 3] a, float[3, 3] b)
        => (float[3, 3] a2, float[3, 3] b2) {
            a2 = MatMul(a, a)
            t = Transpose(b)
            b2 = Neg(t)
        }"""
    )
    opened = make_training_session(model, CPU, [("a", "a2"), ("b", "b2")])
    # MatMul reads a while it writes; what Neg reads is not b any more.
    assert opened.over == {"b"}


def test_who_reads_a_value_by_another_name_comes_first_too() -> None:
    """Reshape gives its operand's own memory: what it made of a is read before a is written over."""
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 18]> names (float[2, 3] a, float[3, 3] b, float[6] c)
        => (float[2, 3] a2, float[6] c2) <int64[1] flat = {6}> {
            a1 = Reshape(a, flat)
            g = MatMul(a, b)
            a2 = Sub(a, g)
            once = Reshape(g, flat)
            twice = Mul(once, c)
            d = Mul(a1, twice)
            c2 = Sub(c, d)
        }"""
    )
    opened = make_training_session(model, CPU, [("a", "a2"), ("c", "c2")])
    assert opened.over == {"a", "c"}
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 3), (3, 3), (6,)))
    held = {name: ort.OrtValue.ortvalue_from_numpy(value.copy(), "cpu") for name, value in (("a", a), ("c", c))}
    binding = opened.session.io_binding()
    binding.bind_cpu_input("b", b)
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(f"{name}2", value)
    opened.session.run_with_iobinding(binding)
    np.testing.assert_allclose(held["a"].numpy(), a - a @ b, rtol=1e-5)
    np.testing.assert_allclose(held["c"].numpy(), c - a.reshape(6) * ((a @ b).reshape(6) * c), rtol=1e-5)


def test_what_a_value_is_made_over_is_made_over_the_value_before() -> None:
    """p is written over a, and a2 over p: who reads a runs before p is made, who reads p before a2 is."""
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 18]> twice (float[3, 3] a, float[3, 3] b)
        => (float[3, 3] a2, float[3, 3] c) {
            p = Gemm <alpha = -1.0> (b, b, a)
            a2 = Sub(p, b)
            d = MatMul(p, b)
            e = Neg(a)
            c = Add(d, e)
        }"""
    )
    opened = make_training_session(model, CPU, [("a", "a2")])
    assert opened.over == {"a"}
    assert opened.through == {"p": "a"}
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((3, 3)).astype(np.float32) for _ in range(2))
    held = ort.OrtValue.ortvalue_from_numpy(a.copy(), "cpu")
    binding = opened.session.io_binding()
    binding.bind_cpu_input("b", b)
    binding.bind_ortvalue_input("a", held)
    for name in ("a2", "p"):
        binding.bind_ortvalue_output(name, held)
    binding.bind_output("c")
    opened.session.run_with_iobinding(binding)
    np.testing.assert_allclose(held.numpy(), a - b @ b - b, rtol=1e-5)
    # Outputs come in the order in which they are bound.
    np.testing.assert_allclose(binding.get_outputs()[2].numpy(), (a - b @ b) @ b - a, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "over"),
    [
        # p is made over nothing that a2 is made over.
        ("p = Gemm (b, b, row)\n a2 = Sub(p, b)\n row2 = Sub(row, row)", {"a", "row"}),
        # a is read behind p, by what a2 is made of.
        ("p = Gemm (b, b, a)\n d = MatMul(a, p)\n a2 = Sub(p, d)\n row2 = Sub(row, row)", {"a", "row"}),
        # a2 reads a itself.
        ("p = Gemm (b, b, a)\n d = Sub(p, b)\n a2 = Sum(d, a)\n row2 = Sub(row, row)", {"row"}),
        # MatMul reads p over and over while it writes.
        ("p = Gemm (b, b, a)\n a2 = MatMul(p, b)\n row2 = Sub(row, row)", {"a", "row"}),
    ],
)
def test_what_cannot_be_made_over_the_value_gets_memory_of_its_own(body: str, over: set[str]) -> None:
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 18]> apart (float[3, 3] a, float[3] row, float[3, 3] b)
        => (float[3, 3] a2, float[3] row2) {{
            {body}
        }}"""
    )
    opened = make_training_session(model, CPU, [("a", "a2"), ("row", "row2")])
    assert opened.over == over
    assert not opened.through


def test_a_tied_table_is_written_over_twice() -> None:
    step, feeds = _emitted("decoder")
    trainer = zilc.Trainer(step, lr=0.01, providers=CPU)
    assert list(trainer._opened.through.values()) == ["embedding.weight"]
    before = trainer.state["embedding.weight"]
    trainer.step(feeds)
    assert np.abs(trainer.state["embedding.weight"] - before).max() > 1e-4
    assert len(trainer.last) == 1  # predictions, and nothing of what is in between
    assert trainer.last["logits"].shape == (4, 6, 50)


@pytest.mark.parametrize(
    ("body", "over"),
    [
        ("r = Reshape(a, turned)\n a2 = Gemm <alpha = -1.0, transB = 1> (e, r, a)", set()),
        ("r = Flatten(a)\n p = Gemm(b, c, a)\n a2 = MatMul(p, d)", {"a"}),
        ("r = Reshape(a, turned)\n a2 = MatMul(e, s)\n s = Reshape(r, back)", set()),
        ("p = Gemm(e, a, a)\n r = Reshape(p, turned)\n a2 = Gemm <transB = 1> (e, r, p)", {"a"}),
        ("p = Gemm(e, f, a)\n r = Reshape(p, turned)\n a2 = Gemm <transB = 1> (e, r, p)", {"a"}),
        ("r = Reshape(a, back)\n a2 = Sub(r, a)", {"a"}),  # element by element
    ],
)
def test_who_reads_a_value_by_another_name_while_it_writes_keeps_two_buffers(body: str, over: set[str]) -> None:
    """Gemm writes over its addend while it still reads its factors, and Reshape gives its operand's own memory."""
    lines = sorted(body.split("\n"), key=lambda line: "a2 = " in line)
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 18]> alias (float[20, 12] a, float[20, 20] e, float[20, 12] f,
        float[20, 4] b, float[4, 12] c, float[12, 12] d) => (float[20, 12] a2)
        <int64[2] turned = {{12, 20}}, int64[2] back = {{20, 12}}> {{
            {" ".join(lines)}
        }}"""
    )
    opened = make_training_session(model, CPU, [("a", "a2")])
    assert opened.over == over
    assert not opened.through


def test_an_update_that_holds_its_parameter_by_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """w's gradient is a product with a view of w: what is written over w must not be read through that."""
    text = """<ir_version: 10, opset_import: ["": 18]> square (float[N, 64] x) => (float[N, 64] y) <float[64, 96] w> {
        s = Constant <value_ints = [96, 64]> ()
        r = Reshape(w, s)
        k = Gemm(w, r)
        y = MatMul(x, k)
    }"""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(text)
    (info,) = model.graph.value_info
    values = rng.standard_normal((64, 96), dtype=np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, info.name))
    del model.graph.value_info[:]
    step = zilc.emit_training(model, loss="energy")
    feeds = {name: rng.standard_normal((3, 64), dtype=np.float32) for name in ("x", "target")}
    own = zilc.Trainer(step, lr=1e-6, providers=CPU)
    assert not own._opened.through
    monkeypatch.setattr(runtime, "make_training_session", _plain)
    other = zilc.Trainer(step, lr=1e-6, providers=CPU)
    for _ in range(3):
        assert own.step(feeds) == other.step(feeds)
    assert own.state["w"].tobytes() == other.state["w"].tobytes()


def test_one_buffer_serves_both_sets() -> None:
    step, feeds = _emitted("mlp3", optimizer="adam")
    trainer = zilc.Trainer(step, lr=0.01, providers=CPU)
    pointers = [{n: b.value.data_ptr() for n, b in side.items()} for side in trainer._sides]
    assert pointers[0] == pointers[1]
    before = trainer.state
    trainer.step(feeds)
    assert {n: b.value.data_ptr() for n, b in trainer._sides[trainer._side].items()} == pointers[0]
    assert all(not np.array_equal(before[n], a) for n, a in trainer.state.items())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_label_out_of_range_changes_nothing(optimizer: str) -> None:
    step, feeds = _emitted("mlp3", optimizer=optimizer)
    trainer = zilc.Trainer(step, lr=0.01, providers=CPU)
    trainer.step(feeds)
    before = trainer.state
    wrong = {**feeds, "target": np.full_like(feeds["target"], 10**6)}
    with pytest.raises(DataError, match="out of range"):
        trainer.step(wrong)
    for name, array in trainer.state.items():
        assert array.tobytes() == before[name].tobytes(), name
    assert trainer.updates == 1
    trainer.step(feeds)
    assert trainer.updates == 2


class _Session:
    """A session that runs and then raises."""

    def __init__(self, session: Any, error: BaseException) -> None:
        self._session, self._error = session, error

    def run_with_iobinding(self, binding: Any) -> None:
        self._session.run_with_iobinding(binding)
        raise self._error


def test_a_failure_within_the_update_is_told_until_a_state_is_loaded(tmp_path: Any) -> None:
    step, feeds = _emitted("mlp3")
    trainer = zilc.Trainer(step, lr=0.01, providers=CPU)
    before, session = trainer.state, trainer._session
    trainer._session = _Session(session, RuntimeError("no memory"))
    with pytest.raises(DataError, match="no memory"):
        trainer.step(feeds)
    trainer._session = session
    for call in (
        lambda: trainer.step(feeds),
        lambda: trainer.evaluate(feeds),
        lambda: trainer.state,
        lambda: trainer.export(tmp_path / "never.onnx"),
    ):
        with pytest.raises(DataError, match="Load a state"):
            call()
    assert not list(tmp_path.iterdir())
    trainer.load_state(before)
    fresh = zilc.Trainer(step, lr=0.01, providers=CPU)
    assert trainer.step(feeds) == fresh.step(feeds)


def test_an_interrupt_leaves_a_whole_state() -> None:
    step, feeds = _emitted("mlp3", optimizer="adam")
    trainer = zilc.Trainer(step, lr=0.01, providers=CPU)
    session = trainer._session
    trainer._session = _Session(session, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.step(feeds)
    assert trainer.updates == int(trainer.state["step"]) == 1
    trainer._session = session
    fresh = zilc.Trainer(step, lr=0.01, providers=CPU)
    fresh.step(feeds)
    assert trainer.step(feeds) == fresh.step(feeds)


def test_unnamed_nodes_get_names_of_their_own() -> None:
    """onnxruntime names a Cast that it adds as the output of the node before, which may have no name itself."""
    model = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 18]>
        g (float16[N, 4] x) => (float16[N, 3] y) <float16[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3}> {
          h = Tanh(x)
          y = MatMul(h, w)
        }""")
    trainer = zilc.Trainer(zilc.emit_training(model), lr=0.01, providers=CPU)
    feeds = {"x": np.ones((2, 4), np.float16), "target": np.ones((2, 3), np.float16)}
    assert trainer.step(feeds) > trainer.step(feeds)
