"""The certificate: its numbers against PyTorch, its verdict where something is wrong, its files and page."""

from __future__ import annotations

import html.parser
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnx.parser
import onnx_ad
import pytest

import zilc
from tests import twins
from tests.command import SKIP, Command, write
from tests.graphs import WEAVE, model
from zilc import analysis, certificate, independent, models
from zilc.certificate import certify
from zilc.errors import FileError, RuntimeMissing
from zilc.vjp import table

pytestmark = pytest.mark.filterwarnings(
    "ignore:divide by zero:RuntimeWarning", "ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning"
)

LOSS = "cross-entropy"
NETWORKS: dict[str, dict[str, Any]] = {
    "mlp3": {"inputs": 12, "hidden": 7, "classes": 4},
    "residual": {"inputs": 12, "hidden": 7, "classes": 4},
    "rnn": {"steps": 5, "inputs": 4, "hidden": 6, "outputs": 3},
    "transformer": {"vocabulary": 11, "length": 5, "d_model": 12, "heads": 3, "d_ff": 9},
    "alexnet": {"image": 63, "width": 4, "hidden": 16, "classes": 5},
    "resnet18": {"image": 33, "width": 4, "classes": 5, "blocks": (1, 2)},
}


# --- the yardstick itself ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_the_independent_reverse_mode_is_autograd(name: str) -> None:
    """float64, at most 1e-12 from PyTorch: two reverse modes, neither of them ours."""
    proto = models.build(name, dtype="float64", **NETWORKS[name])
    feeds = models.random_feeds(proto, 3, np.random.default_rng(0), loss=LOSS)
    target = feeds.pop("target")
    found = analysis.structure(proto)
    leaves = {n: a for n, a in twins.parameters(proto).items() if not twins.is_statistic(n)}
    (output,) = found.outputs
    mode = independent.Independent(found, leaves, [], feeds)
    made = mode.gradients(feeds, {output: target}, {output: LOSS}, -1)
    truth = twins.torch_gradients(name, proto, feeds, target, LOSS)
    largest = max(float(np.linalg.norm(g)) for g in truth.values())
    assert made.keys() == truth.keys()
    for leaf, g in truth.items():
        scale = float(np.linalg.norm(g))
        assert np.linalg.norm(made[leaf] - g) <= 1e-12 * (scale if scale > 1e-13 * largest else largest), leaf


@pytest.mark.parametrize("loss", ["energy", "mse", "cross-entropy", "bce-with-logits"])
def test_loss_gradients_are_the_slopes_of_the_losses(loss: str) -> None:
    from zilc.verification import numpy_loss

    rng = np.random.default_rng(0)
    mu = rng.standard_normal((4, 5))
    y = rng.integers(0, 5, 4) if loss == "cross-entropy" else rng.uniform(0, 1, (4, 5))
    v = rng.standard_normal(mu.shape)
    h = 1e-6
    slope = (numpy_loss(loss, mu + h * v, y, -1) - numpy_loss(loss, mu - h * v, y, -1)) / (2 * h)
    assert np.sum(independent.loss_gradient(loss, mu, y, -1) * v) == pytest.approx(slope, rel=1e-8)


# --- the document -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def residual() -> zilc.Certificate:
    return certify(models.build("residual", **NETWORKS["residual"]), loss=LOSS, command="zilc verify …")


def test_the_document_fits_its_schema(residual: zilc.Certificate) -> None:
    schema = certificate.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(residual.data, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**residual.data, "model": {}}, schema)


def test_zil_is_exact_and_the_ablations_are_not(residual: zilc.Certificate) -> None:
    data = residual.data
    assert residual.passed
    assert [check["passed"] for check in data["checks"]] == [True] * 6
    assert data["structure"]["levels"] == 12
    assert {kind: cost["vertices"] for kind, cost in data["structure"]["identities"].items()} == {
        "edge": 6, "shared": 6, "min": 6, "min-bytes": 6
    }  # fmt: skip
    whole = {v["name"]: v["divergence"] for v in data["variants"]}
    assert list(whole) == [
        "zil", "literal", "unlevelled", "gamma", "init-noise", "update-at-end", "il", "il-fixed-predictions"
    ]  # fmt: skip
    for name, found in whole.items():
        for precision in ("float32", "float64"):
            exact = name in ("zil", "literal", "il-fixed-predictions")
            assert (found[precision]["bp"] == 0.0) == exact, name
            assert (found[precision]["independent"] < 1e-6) == exact, name
    for row in data["parameters"]:
        zil = row["variants"]["zil"]
        assert zil["float32"]["bits_equal"]
        assert zil["float64"]["bits_equal"]
        assert zil["float64"]["independent"]["relative"] <= 1e-12
        assert zil["float64"]["independent"]["ulp"] < 64
        assert row["differences"] <= 1e-5
        assert row["update_step"] == row["level"] - 1
        # gamma = 1/2 leaves 2^-(l-1) of the gradient of a leaf of level l.
        found = row["variants"]["gamma"]["float64"]["bp"]["relative"]
        assert found == pytest.approx(1 - 0.5 ** (row["level"] - 1), abs=1e-12)
        assert (row["variants"]["update-at-end"]["float64"]["bp"]["relative"] == 0.0) == (row["level"] == 12)


def test_a_level_graph_needs_no_levelling() -> None:
    found = certify(models.build("mlp3", **NETWORKS["mlp3"]))
    variant = next(v for v in found.data["variants"] if v["name"] == "unlevelled")
    assert len(variant["exact"]) == len(found.data["parameters"])
    assert variant["divergence"]["float64"]["bp"] == 0.0
    assert found.passed


@pytest.mark.parametrize("name", ["transformer", "alexnet"])
def test_other_networks(name: str) -> None:
    """Key biases, whose gradient is zero; convolutions, which run in onnx's evaluator in float64."""
    found = certify(models.build(name, **NETWORKS[name]), loss=LOSS, directions=1, identities="min")
    assert found.passed, found.data["checks"]
    jsonschema.validate(found.data, certificate.schema())
    zero = {row["name"] for row in found.data["parameters"] if row["zero_gradient"]}
    assert zero == ({"layer1.attention.key.bias"} if name == "transformer" else set())


def test_float32_noise_of_a_zero_gradient_is_no_divergence() -> None:
    """The loop may round otherwise than the wavefront; of a key bias's gradient nothing but that is left."""
    proto = models.build("transformer", vocabulary=40, length=8, d_model=16, heads=2, d_ff=24)
    found = certify(proto, loss=LOSS, directions=1)
    assert found.passed, found.data["checks"]
    row = next(row for row in found.data["parameters"] if row["zero_gradient"])
    assert row["name"] == "layer1.attention.key.bias"
    literal = row["variants"]["literal"]["float32"]["bp"]
    assert literal["relative"] < 1e-7
    # Where it does not belong it is as large as the others, and told.
    assert row["variants"]["update-at-end"]["float64"]["bp"]["relative"] is None or (
        row["variants"]["update-at-end"]["float64"]["bp"]["relative"] > 1
    )


def test_several_outputs_and_an_inputs_gradient() -> None:
    found = certify(model(WEAVE), output=["h", "y"], wrt=["*", "x"], ablations=False)
    assert found.passed, found.data["checks"]
    assert found.data["settings"]["outputs"] == ["h", "y"]
    assert "x" in {row["name"] for row in found.data["parameters"]}
    assert found.data["independent"]["float64"]["covered"]
    assert [c["passed"] for c in found.data["checks"] if c["name"] == "ablations"] == [None]


def test_a_tied_weight_is_one_leaf() -> None:
    proto = onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 18]>
        tied (float[2, 3] x) => (float[2, 3] y)
        <float[3, 3] a = {0.5, -0.3, 0.2, 0.1, 0.7, -0.4, -0.6, 0.25, 0.9},
         float[3, 3] b = {0.5, 0.1, -0.6, -0.3, 0.7, 0.25, 0.2, -0.4, 0.9}>
        { h = MatMul (x, a)  r = Tanh (h)  y = MatMul (r, b) }
        """
    )
    found = certify(proto, tie=[("a", "b")], ablations=False)
    assert [row["name"] for row in found.data["parameters"]] == ["a"]
    assert found.passed, found.data["checks"]


# --- what it does not pass --------------------------------------------------------------------------


def test_a_wrong_rule_fails_though_zil_and_bp_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both emitted graphs come from one table of rules: only what is independent of it can see that it is wrong."""
    right = table.vjp

    def wrong(op: Any, node: Any, operand: int, arriving: Any) -> Any:
        made = right(op, node, operand, arriving)
        return op.Mul(made, 1.001) if node.op == "Tanh" else made

    monkeypatch.setattr("zilc.passes.reverse.vjp", wrong)
    monkeypatch.setattr(table, "vjp", wrong)
    found = certify(model_of_skip(), ablations=False)
    checks = {check["name"]: check["passed"] for check in found.data["checks"]}
    assert checks == {
        "bits-float32": True, "bits-float64": True, "independent-float64": False, "independent-float32": False,
        "differences": False, "ablations": None,
    }  # fmt: skip
    assert not found.passed
    assert "At least one check FAILED" in found.html()


def test_a_wrong_claim_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were gamma said to leave every parameter exact, the certificate would not pass."""
    gamma = next(v for v in certificate.VARIANTS if v.name == "gamma")
    claim = certificate.Variant(gamma.name, gamma.title, gamma.options, "all")
    monkeypatch.setattr(certificate, "VARIANTS", (claim,))
    found = certify(model_of_skip())
    (check,) = (c for c in found.data["checks"] if c["name"] == "ablations")
    assert not found.passed
    assert check["passed"] is False
    assert check["measured"] == sum(row["level"] > 1 for row in found.data["parameters"])


def test_a_model_that_the_independent_mode_does_not_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so with the reason, and which checks were not made; central differences remain."""

    def refuse(*_: Any, **__: Any) -> None:
        raise onnx_ad.UnsupportedOperator("no reverse rule for Warp")

    monkeypatch.setattr(onnx_ad, "reverse", refuse)
    found = certify(model_of_skip(), ablations=False)
    for precision in ("float32", "float64"):
        entry = found.data["independent"][precision]
        assert entry == {"covered": False, "executor": None, "reason": "UnsupportedOperator: no reverse rule for Warp"}
    checks = {check["name"]: check["passed"] for check in found.data["checks"]}
    assert [n for n, passed in checks.items() if passed is None] == [
        "independent-float64", "independent-float32", "ablations"
    ]  # fmt: skip
    assert checks["differences"] is True
    jsonschema.validate(found.data, certificate.schema())
    page = found.html()
    assert "3 of 6 not made" in page
    assert "does not cover this model" in page


def model_of_skip() -> onnx.ModelProto:
    return onnx.parser.parse_model(SKIP)


# --- page and files ---------------------------------------------------------------------------------


class Reader(html.parser.HTMLParser):
    """Tags that open and close in order, words, and whatever would reach for another file."""

    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.reaches: list[str] = []
        self.rows = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe") or any(key in ("src", "href") for key, _ in attrs):
            self.reaches.append(tag)
        self.rows += tag == "tr"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_whole_by_itself(residual: zilc.Certificate) -> None:
    page = residual.html()
    reader = Reader()
    reader.feed(page)
    reader.close()
    text = " ".join("".join(reader.words).split())
    assert reader.open == []
    assert reader.reaches == []
    assert "url(" not in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    assert residual.data["model"]["sha256"] in text
    assert "onnx-ad" in text
    assert "No check failed" in text
    for row in residual.data["parameters"]:
        assert row["name"] in text
    # Heads: 1 of checks, 2, 2 and 1; then checks, parameters, variants, parameters.
    assert reader.rows == 6 + len(residual.data["checks"]) + 2 * len(residual.data["parameters"]) + 8


def test_names_are_escaped() -> None:
    proto = model_of_skip()
    for tensor in proto.graph.initializer:
        tensor.name = tensor.name.replace("w1", "<b>w1")
    for node in proto.graph.node:
        node.input[:] = [name.replace("w1", "<b>w1") for name in node.input]
    assert "&lt;b&gt;w1" in certify(proto, ablations=False).html()


@pytest.mark.parametrize("given", ["c", "c.html", "c.json"])
def test_both_files_whatever_the_suffix(residual: zilc.Certificate, tmp_path: Path, given: str) -> None:
    assert residual.save(tmp_path / given) == (tmp_path / "c.html", tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text()) == residual.data
    assert (tmp_path / "c.html").read_text() == residual.html()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.html", "c.json"]


def test_both_files_or_none(residual: zilc.Certificate, tmp_path: Path) -> None:
    (tmp_path / "c.json").mkdir()
    with pytest.raises(FileError, match=r"c\.json"):
        residual.save(tmp_path / "c")
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]


def test_the_same_input_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    once, again = (certify(model_of_skip(), ablations=False) for _ in range(2))
    assert once.data == again.data
    assert once.html() == again.html()
    assert once.data["created"] == "2023-11-14T22:13:20+00:00"


# --- from the command line --------------------------------------------------------------------------


@pytest.fixture
def zilc_(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


def test_command(zilc_: Command, tmp_path: Path) -> None:
    path = write(tmp_path / "skip.onnx", SKIP)
    made = zilc_("verify", path, "--certificate", tmp_path / "skip", "--seed", "3")
    assert (made.status, made.err) == (0, "")
    assert "verdict: passed" in made.out
    assert str(tmp_path / "skip.html") in made.out
    data = json.loads((tmp_path / "skip.json").read_text())
    assert data["model"]["name"] == "skip.onnx"
    assert data["model"]["bytes"] == Path(path).stat().st_size
    assert data["settings"]["seed"] == 3
    assert data["command"] == f"zilc verify {path} --certificate {tmp_path / 'skip'} --seed 3"
    told = zilc_("verify", path, "--certificate", tmp_path / "skip", "--no-ablations", "--json").json
    jsonschema.validate(told, certificate.schema())
    assert [v["name"] for v in told["variants"]] == ["zil"]


@pytest.mark.parametrize(
    "options", [["--algorithm", "il"], ["--precision", "float64"], ["--gamma", "0.5"], ["--identities", "none"]]
)
def test_what_a_certificate_measures_anyway_cannot_be_chosen(
    zilc_: Command, tmp_path: Path, options: list[str]
) -> None:
    path = write(tmp_path / "skip.onnx", SKIP)
    made = zilc_("verify", path, "--certificate", tmp_path / "skip", *options)
    assert made.status == 2
    assert "--certificate measures" in made.err
    assert not (tmp_path / "skip.html").exists()


def test_without_the_library(zilc_: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops before anything is measured: a certificate with less in it is none."""
    real = metadata.version

    def version(name: str) -> str:
        if name == "onnx-ad":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    path = write(tmp_path / "skip.onnx", SKIP)
    made = zilc_("verify", path, "--certificate", tmp_path / "skip")
    assert made.status == 1
    assert made.err.strip() == (
        "zilc: error: --certificate: onnx-ad, the independent reverse mode, is not installed. "
        "pip install 'zilc[certificate]'"
    )
    assert not (tmp_path / "skip.html").exists()
    with pytest.raises(RuntimeMissing):
        certify(model_of_skip())
