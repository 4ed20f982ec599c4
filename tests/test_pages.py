"""The pages in a real browser without a network; figures and the data that both are drawn from."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from playwright.sync_api import Browser

import zilc
from tests import browser as browsers
from tests import random_graphs, zoo
from tests.command import ROOT, SKIP, Command, write
from zilc import figures, models, page, pipeline
from zilc.errors import FileError

#: name -> what makes the model; depths from 4 to 668.
NETWORKS: dict[str, Callable[[], onnx.ModelProto]] = {
    "skip": lambda: models.build("skip"),
    "digits": lambda: models.build("digits"),
    "resnet18": lambda: models.build("resnet18", image=32, width=4, classes=5),
    "densenet121": lambda: onnx.load(zoo.FOLDER / "light_densenet121.onnx"),
    "gpt2": lambda: _gpt2(),
}


def _gpt2() -> onnx.ModelProto:
    """12 layers, random weights, narrow."""
    import torch
    import transformers

    from tests.exporting import Gelu, Logits

    config = transformers.GPT2Config(
        vocab_size=53, n_embd=32, n_layer=12, n_head=4, n_positions=32, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    for block in model.transformer.h:
        block.mlp.act = Gelu()
    words = torch.zeros((2, 8), dtype=torch.int64)
    made = torch.onnx.export(
        Logits(model, "input_ids", "attention_mask"), (words, torch.ones_like(words)),
        input_names=["input_ids", "attention_mask"], output_names=["logits"], dynamo=True, verbose=False,
    )  # fmt: skip
    return made.model_proto


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browsers.started() as made:
        yield made


@pytest.fixture(scope="module")
def levelled() -> Callable[[str], pipeline.Levelized]:
    made: dict[str, pipeline.Levelized] = {}

    def get(name: str) -> pipeline.Levelized:
        if name not in made:
            made[name] = zilc.levelize(NETWORKS[name]())
        return made[name]

    return get


def put(folder: Path, text: str) -> Path:
    path = folder / "page.html"
    path.write_text(text, "utf-8")
    return path


# --- every network ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_page_opens_alone_and_tells_what_the_report_tells(
    name: str, levelled: Callable[[str], pipeline.Levelized], chromium: Browser, tmp_path: Path
) -> None:
    made = levelled(name)
    report, path = made.report, put(tmp_path, made.html())
    assert path.stat().st_size < 3_000_000
    with browsers.opened(chromium, path) as seen:
        assert seen.requests == [path.absolute().as_uri()]
        assert seen.complaints == []
        assert seen.milliseconds < 3_000
        identities = report["identities"]["shared"]["vertices"]
        assert seen.fact("identity vertices") == identities
        assert seen.fact("levels") == report["levels"]
        assert seen.fact("vertices") == report["vertices"]
        assert seen.fact("delayed edges" if len(report["skips"]) != 1 else "delayed edge") == len(report["skips"])
        # Closed or open, every identity vertex is somewhere; opened, each is a green dot.
        if len(made.picture["blocks"]) > 1:
            seen.page.click("#open-all")
        assert seen.count("g.node.identity") == identities
        assert seen.count("g.node.block") == 0
        trained = [leaf for leaf in report["leaves"] if leaf["trained"]]
        assert seen.count("g.node.parameter:not(.untrained)") == len(trained)
        assert seen.count("#learning li") == len(trained)
        assert seen.count("#delayed li") == min(len(report["skips"]), 400) + (len(report["skips"]) > 400)
        assert seen.complaints == []


@pytest.mark.parametrize("name", ["densenet121", "gpt2"])
def test_a_deep_network_begins_closed_and_legible(
    name: str, levelled: Callable[[str], pipeline.Levelized], chromium: Browser, tmp_path: Path
) -> None:
    made = levelled(name)
    with browsers.opened(chromium, put(tmp_path, made.html())) as seen:
        blocks = seen.page.locator("g.node.block")
        assert 6 <= blocks.count() <= 24
        assert seen.count("#picture g.node") < 250
        # The names of blocks, as they stand on the screen.
        sizes = seen.page.eval_on_selector_all(
            "g.node.block text:first-of-type", "all => all.map(t => t.getBoundingClientRect().height)"
        )
        assert min(sizes) >= 8
        # In view, and no box on another.
        boxes = sorted((b["x"], b["width"]) for b in (blocks.nth(k).bounding_box() for k in range(blocks.count())) if b)
        assert all(a + w <= b + 0.5 for (a, w), (b, _) in itertools.pairwise(boxes))
        assert boxes[0][0] >= 0
        assert boxes[-1][0] + boxes[-1][1] <= 1440


def test_names_of_modules_name_the_blocks(levelled: Callable[[str], pipeline.Levelized]) -> None:
    labels = [block["label"] for block in levelled("gpt2").picture["blocks"]]
    assert [label for label in labels if re.fullmatch(r"h\.\d+|\d+", label)] == labels
    assert len(set(labels)) == 12
    assert [b["label"] for b in levelled("resnet18").picture["blocks"]] == ["layer4", "layer3", "layer2", "layer1"]


# --- what a person does -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def residual(levelled: Callable[[str], pipeline.Levelized], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put(tmp_path_factory.mktemp("page"), levelled("resnet18").html())


def test_blocks_open_and_close(
    residual: Path, levelled: Callable[[str], pipeline.Levelized], chromium: Browser
) -> None:
    blocks = len(levelled("resnet18").picture["blocks"])
    with browsers.opened(chromium, residual) as seen:
        assert seen.count("g.node.block") == blocks
        seen.page.locator("g.node.block").nth(1).click()
        assert seen.count("g.node.block") == blocks - 1
        assert seen.count("g.node.identity") > 0
        seen.page.locator(".frame-name").first.click(force=True)
        assert seen.count("g.node.block") == blocks
        seen.page.locator("g.node.block").first.press("Enter")
        assert seen.count("g.node.block") == blocks - 1
        seen.page.click("#open-all")
        assert (seen.count("g.node.block"), seen.count(".frame")) == (0, blocks)
        seen.page.click("#close-all")
        assert (seen.count("g.node.block"), seen.count("g.node.identity")) == (blocks, 0)


def test_search_by_keyboard_finds_a_vertex_in_a_closed_block(residual: Path, chromium: Browser) -> None:
    with browsers.opened(chromium, residual) as seen:
        seen.page.keyboard.press("/")
        seen.page.keyboard.type("layer3.1 conv2/conv")
        hits = seen.page.locator("#hits li")
        assert hits.count() >= 1
        assert hits.first.get_attribute("aria-selected") == "true"
        seen.page.keyboard.press("Enter")
        assert seen.page.get_attribute("#picture", "data-focus") == "layer3.1.conv2/Conv"
        box = seen.page.locator("g.node.focus").bounding_box()
        frame = seen.page.locator("#picture").bounding_box()
        assert box is not None
        assert frame is not None
        for axis, length in (("x", "width"), ("y", "height")):
            middle = frame[axis] + frame[length] / 2
            assert box[axis] <= middle <= box[axis] + box[length]


def test_hover_tells_shape_bytes_and_what_waits(chromium: Browser, tmp_path: Path) -> None:
    made = zilc.levelize(onnx.parser.parse_model(SKIP), dims={"N": 2})
    with browsers.opened(chromium, put(tmp_path, made.html())) as seen:
        def tip(name: str) -> str:
            seen.page.hover(f'g.node[data-name="{name}"]')
            return seen.page.inner_text("#tip")

        assert "float32[2,3], 24 bytes" in tip("second")
        identity = tip("a1.id2")
        assert "delays bend for join (1 step)" in identity
        assert "identity vertex, level 2" in identity
        # The chain, what it delays and what waits for it are lit together, the rest is not.
        lit = set(seen.page.eval_on_selector_all("g.node.lit", "all => all.map(n => n.dataset.name)"))
        assert lit == {"a1.id2", "bend", "join"}
        assert "waits for bend" in tip("join")
        assert "learns at t = 4, from the errors of level 4" in tip("w1")


def test_symbolic_bytes_are_a_product(chromium: Browser, tmp_path: Path) -> None:
    made = zilc.levelize(onnx.parser.parse_model(SKIP))
    with browsers.opened(chromium, put(tmp_path, made.html())) as seen:
        seen.page.hover('g.node[data-name="second"]')
        assert "float32[N,3], 12 × N bytes" in seen.page.inner_text("#tip")


def test_the_wave_can_be_stepped_through(residual: Path, chromium: Browser) -> None:
    with browsers.opened(chromium, residual) as seen:
        seen.page.click("#open-all")
        seen.page.locator("#step").fill("0")
        assert "t = 0: the errors of level 0 arrive, 2 parameters learn" in seen.page.inner_text("#step-name")
        learning = seen.page.eval_on_selector_all("g.node.learns", "all => all.map(n => n.dataset.name)")
        assert sorted(learning) == ["fc.bias", "fc.weight"]
        assert seen.count("rect.now") == 1


def test_a_delayed_edge_is_found_from_the_list(residual: Path, chromium: Browser) -> None:
    with browsers.opened(chromium, residual) as seen:
        seen.page.locator("#delayed li").first.click()
        assert seen.page.get_attribute("#picture", "data-focus") == "layer1.0/Add"
        assert seen.count("path.edge.delayed.lit") >= 2


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_ground(dark: bool, residual: Path, chromium: Browser) -> None:
    """Contrast of at least 4.5 to 1 for the words on vertices, parameters and blocks (WCAG 2, AA)."""
    with browsers.opened(chromium, residual, dark=dark) as seen:
        seen.page.locator("g.node.block").first.click()
        pairs = seen.page.evaluate(
            """() => [...document.querySelectorAll("g.node")].flatMap(g => {
                 const ground = getComputedStyle(g.querySelector("rect, circle")).fill;
                 return [...g.querySelectorAll("text")].map(t => [getComputedStyle(t).fill, ground]);
               })"""
        )
        assert len(pairs) > 40
        assert min(_contrast(*pair) for pair in pairs) >= 4.5


def _contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = np.array([float(n) / 255 for n in re.findall(r"[\d.]+", colour)[:3]])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_words_stay_in_their_boxes(
    name: str, levelled: Callable[[str], pipeline.Levelized], chromium: Browser, tmp_path: Path
) -> None:
    out = """() => [...document.querySelectorAll("g.node")].flatMap(g => {
        const box = g.querySelector("rect, circle").getBoundingClientRect();
        return [...g.querySelectorAll("text")].filter(t => getComputedStyle(t).display !== "none").filter(t => {
          const b = t.getBoundingClientRect();
          return b.left < box.left - .5 || b.right > box.right + .5 || b.top < box.top - 2 || b.bottom > box.bottom + 2;
        }).map(t => t.textContent);
      })"""
    with browsers.opened(chromium, put(tmp_path, levelled(name).html())) as seen:
        seen_at = []
        assert seen.page.evaluate(out) == []  # closed
        seen.page.locator("g.node.block").nth(1).click()
        seen_at.append(seen.page.get_attribute("#picture", "data-zoom"))
        assert seen.page.evaluate(out) == []
        seen.page.locator("#learning li").first.click()
        seen_at.append(seen.page.get_attribute("#picture", "data-zoom"))
        assert seen.page.evaluate(out) == []
        assert seen_at[1] == "near"


def test_a_closed_block_tells_what_waits_in_it_from_what_passes_by(
    levelled: Callable[[str], pipeline.Levelized], chromium: Browser, tmp_path: Path
) -> None:
    made = levelled("gpt2")
    block = made.picture["nodes"]["block"]
    runs, waited = set(), set()
    for number, chain in enumerate(made.picture["chains"]):
        home = block[chain["origin"]]
        if all(block[w] == home for w, _ in chain["waiting"]):
            continue  # inside one block
        runs |= {(number, block[i]) for i in chain["identities"]}
        waited |= {(number, block[w]) for w, n in chain["waiting"] if block[chain["identities"][n - 1]] == block[w]}
    assert 0 < len(waited) < len(runs)
    with browsers.opened(chromium, put(tmp_path, made.html())) as seen:
        assert seen.count("g.node.run") == len(runs)
        assert seen.count("g.node.run.waited") == len(waited)


def test_names_cannot_break_out(chromium: Browser, tmp_path: Path) -> None:
    evil = '</script><script>console.log("out")</script><!--zilc:script-->&"\'\u2028'
    model = onnx.parser.parse_model(SKIP)
    model.graph.node[1].name = evil
    model.graph.name = evil
    text = zilc.levelize(model).html()
    assert text.count("</script>") == 3
    with browsers.opened(chromium, put(tmp_path, text)) as seen:
        assert seen.complaints == []
        assert evil in seen.page.eval_on_selector_all("g.node", "all => all.map(n => n.dataset.name)")
        seen.page.locator("g.node.vertex").nth(1).hover()
        assert evil.replace("\u2028", "")[:9] in seen.page.inner_text("#tip")


# --- traces -----------------------------------------------------------------------------------------------------


def test_the_map_has_a_cell_for_each_level_and_step(
    levelled: Callable[[str], pipeline.Levelized], chromium: Browser, tmp_path: Path
) -> None:
    model = NETWORKS["digits"]()
    traces = [zilc.trace(model), zilc.trace(model, algorithm="il", steps=9)]
    depth = traces[0].depth
    with browsers.opened(chromium, put(tmp_path, levelled("digits").html(traces))) as seen:
        assert seen.complaints == []
        shape = "c => [c.dataset.levels, c.dataset.steps, c.width, c.height].map(Number)"
        zil = seen.page.eval_on_selector("[data-algorithm=zil] canvas", shape)
        assert zil == [depth, depth, depth, depth]
        assert seen.page.eval_on_selector("[data-algorithm=il] canvas", shape) == [depth, 10, 10, depth]
        # Before the wave every cell is the colour of zero; on the front none is.
        pixels = np.array(seen.page.eval_on_selector(
            "[data-algorithm=zil] canvas",
            "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]",
        )).reshape(depth, depth, 4)[::-1, :, :3]  # fmt: skip
        level, t = np.indices((depth, depth))
        waiting = {tuple(p) for p in pixels[t < level].tolist()}
        front = {tuple(p) for p in pixels[t == level].tolist()}
        assert len(waiting) == 1
        assert not waiting & front
        # A dot for each step at which parameters learn, on the front.
        steps = {t for _, t in traces[0].parameters.values()}
        assert seen.count("[data-algorithm=zil] circle.learn") == len(steps)
        assert seen.count("[data-algorithm=il] line.learn-at") == 1
        box = seen.page.locator("[data-algorithm=zil] canvas").bounding_box()
        assert box is not None
        seen.page.mouse.move(box["x"] + box["width"] * 5.5 / depth, box["y"] + box["height"] * (depth - 5.5) / depth)
        said = seen.page.inner_text("#tip")
        assert "level 5, step 5" in said
        shown = float(re.search(r"energy ([\d.e+-]+)", said).group(1))  # type: ignore[union-attr]
        assert shown == pytest.approx(traces[0].by_level()[5, 5], rel=1e-3)
        assert "learn here: conv4.weight, conv4.bias" in said
        seen.page.select_option("#quantity", "movement")
        assert seen.complaints == []


def test_inference_learning_that_diverges_leaves_the_front_its_colours(
    levelled: Callable[[str], pipeline.Levelized], chromium: Browser, tmp_path: Path
) -> None:
    model = NETWORKS["digits"]()
    traces = [zilc.trace(model), zilc.trace(model, algorithm="il", steps=40, gamma=1.9)]
    depth, front = traces[0].depth, traces[0].by_level("energy").diagonal()
    assert traces[1].by_level("energy").max() > 1e6 * front.max()
    with browsers.opened(chromium, put(tmp_path, levelled("digits").html(traces))) as seen:
        pixels = np.array(seen.page.eval_on_selector(
            "[data-algorithm=zil] canvas",
            "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]",
        )).reshape(depth, depth, 4)[::-1, :, :3]  # fmt: skip
        assert len({tuple(p) for p in pixels[range(depth), range(depth)].tolist()}) > depth // 2
        assert "≥" in seen.page.inner_text("#scale")
    low, high, extend = figures._span(traces, [t.by_level("energy").T for t in traces])
    assert low <= front.min() <= front.max() <= high <= 10 * front.max()
    assert extend in ("max", "both")


def test_what_overflows_has_a_colour_of_its_own(chromium: Browser, tmp_path: Path) -> None:
    layers = "".join(f"h{k} = MatMul (h{k - 1}, w)\n" for k in range(1, 12))
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[2, 2] h0) => (float[2, 2] h11)\n'
        "<float[2, 2] w = {30.0, 2.0, -3.0, 25.0}> {" + layers + "}"
    )
    with browsers.opened(chromium, put(tmp_path, zilc.levelize(model).html([zilc.trace(model)]))) as seen:
        assert seen.complaints == []
        assert "overflowed" in seen.page.inner_text("#scale")


# --- the data, and figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_no_two_nodes_share_a_place(seed: int) -> None:
    sample = random_graphs.seeded(5000 + seed)
    made = zilc.levelize(sample.model, output=sample.outputs, wrt=sample.leaves)
    nodes = made.picture["nodes"]
    places = Counter(zip(nodes["column"], nodes["lane"], strict=True))
    assert max(places.values()) == 1
    assert nodes["kind"].count(1) == made.report["identities"]["shared"]["vertices"]
    for a, b in np.asarray(made.picture["edges"]).reshape(-1, 2):
        assert nodes["level"][a] == nodes["level"][b] + 1  # levelled
    for chain in made.picture["chains"]:
        assert len({nodes["lane"][i] for i in chain["identities"]}) == 1  # one straight line


@pytest.mark.parametrize("placement", ["edge", "min", "none"])
def test_other_placements_can_be_drawn(placement: Any, chromium: Browser, tmp_path: Path) -> None:
    made = zilc.levelize(onnx.parser.parse_model(SKIP), identities=placement)
    with browsers.opened(chromium, put(tmp_path, made.html())) as seen:
        assert seen.complaints == []
        expected = 0 if placement == "none" else made.report["identities"][placement]["vertices"]
        assert seen.count("g.node.identity") == expected == seen.fact("identity vertices")
        assert seen.count("path.edge.delayed") == (1 if placement == "none" else 2)


def test_figures_are_the_same_bytes_again_and_hold_every_vertex(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(SKIP)
    made = zilc.levelize(model)
    text = made.figure("svg")
    assert text == zilc.levelize(model).figure("svg")
    root = ElementTree.fromstring(text)
    words = [t for e in root.iter("{http://www.w3.org/2000/svg}text") for t in e.itertext()]
    assert {"Gemm", "Tanh", "Add", "t = 4", "t = 0"} <= {w.strip() for w in words}
    assert made.figure("png").startswith(b"\x89PNG")
    assert made.figure("png") == made.figure("png")


def test_commands_write_pages_and_figures_whole_or_not_at_all(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command, path = Command(capfd), write(tmp_path / "skip.onnx", SKIP)
    names = [tmp_path / f"levels.{kind}" for kind in ("html", "svg", "png")]
    made = command("levelize", path, "--html", names[0], "--svg", names[1], "--png", names[2])
    assert (made.status, made.err) == (0, "")
    assert all(name.stat().st_size > 1000 for name in names)
    again = [tmp_path / f"again.{kind}" for kind in ("html", "svg", "png")]
    assert command("levelize", path, "--html", again[0], "--svg", again[1], "--png", again[2]).status == 0
    assert [a.read_bytes() for a in names] == [a.read_bytes() for a in again]
    wave = [tmp_path / f"wave.{kind}" for kind in ("html", "svg", "png")]
    made = command("trace", path, "--html", wave[0], "--svg", wave[1], "--png", wave[2], "--json")
    assert made.status == 0
    assert made.json["written"] == [str(p) for p in wave]
    assert "Inference learning" in wave[1].read_text()
    assert command("trace", path, "--svg", wave[1], "--alone").status == 0
    assert "Inference learning" not in wave[1].read_text()
    failed = command("levelize", path, "-o", tmp_path / "x.onnx", "--html", tmp_path / "absent" / "x.html")
    assert (failed.status, failed.out) == (1, "")
    assert not (tmp_path / "x.onnx").exists()
    with pytest.raises(FileError, match="cannot be written"):
        zilc.trace(path).save(tmp_path / "absent" / "x.npz")


def test_bytes_do_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "skip.onnx", SKIP)
    code = f"import sys, zilc; m = zilc.levelize({path!r}); sys.stdout.write(m.html([zilc.trace({path!r})]))"
    made = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT,
                       env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin"}).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert made[0] == made[1]


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path) -> None:
    path = write(tmp_path / "skip.onnx", SKIP)
    code = (
        "import sys; sys.modules['matplotlib'] = None\nfrom zilc.__main__ import main\n"
        f"sys.exit(main(['levelize', {path!r}, '--svg', {str(tmp_path / 'a.svg')!r}]))"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert made.returncode == 1
    assert "--svg, --png: matplotlib is not installed" in made.stderr
    assert "pip install 'zilc[plot]'" in made.stderr
    assert not (tmp_path / "a.svg").exists()


def test_the_drawing_library_is_the_pinned_one() -> None:
    made = subprocess.run([sys.executable, "tools/vendor_web.py", "--check"], capture_output=True, text=True, cwd=ROOT)
    assert (made.returncode, made.stderr) == (0, "")
    pin = json.loads(page.read("vendor.json"))
    assert pin["version"] in page.read("d3.min.js")[:80]
    assert page.read("d3.LICENSE").startswith("Copyright")
