"""What of zilc's graphs ONNX Runtime's CUDA provider has kernels for: ``python tools/cuda_kernels.py --write``.

No GPU is needed: ONNX Runtime documents the kernels of its providers by operator, version and type, and
``tools/cuda_kernels.json`` holds that document's CUDA section as data.  Every node of the training graphs of the
benchmark's networks, and of the gradient graphs of the rules' test cases, is looked up in it, after ONNX Runtime's
basic optimisation on the CPU.  ``--document FILE --source URL --version X`` makes the data from another edition;
``--only networks`` and ``--only rules`` renew one half of what was written before.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import importlib
import json
import pkgutil
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx.defs
import onnx.helper
import onnx.shape_inference

HERE = Path(__file__).parent
ROOT = HERE.parent
DATA = HERE / "cuda_kernels.json"
JSON, MARKDOWN = ROOT / "docs" / "cuda.json", ROOT / "docs" / "CUDA.md"

CUDA = "CUDAExecutionProvider"
NETWORKS = ("mlp3", "rnn", "alexnet", "resnet18", "transformer", "decoder")
OPTIMIZERS = ("sgd", "adam")
#: Opsets that the networks are also emitted at: the document's edition knows none after the last.
OPSETS = range(18, 24)

#: Operands that the CUDA kernels read in host memory, and results that they leave there: how the kernels are
#: registered in onnxruntime/core/providers/cuda, which the document does not tell.
HOST_INPUTS: dict[str, tuple[int, ...]] = {
    "ConstantOfShape": (0,), "CumSum": (1,), "Dropout": (1, 2), "Expand": (1,), "GRU": (4,), "If": (0,),
    "LSTM": (4,), "Loop": (0, 1), "NonMaxSuppression": (2, 3, 4), "OneHot": (1, 2), "Pad": (1, 2, 3), "RNN": (4,),
    "Range": (0, 1, 2), "Reshape": (1,), "Resize": (1, 2, 3), "Slice": (1, 2, 3, 4), "Split": (1,), "Squeeze": (1,),
    "Tile": (1,), "TopK": (1,), "Trilu": (1,), "Unsqueeze": (1,), "Upsample": (1,),
    **{f"Reduce{kind}": (1,) for kind in (
        "L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"
    )},
}  # fmt: skip
HOST_OUTPUTS = {"Shape": (0,), "Size": (0,), "SequenceLength": (0,)}
#: The largest initializer, in elements, that does not hold a node back from the host.
SMALL = 100
#: The dtype of a tensor that nothing tells the type of: no kernel takes it, so that it cannot hide a lack.
UNKNOWN = "unknown type"
_HALVES = frozenset({"float16", "bfloat16"})

Place = Literal["cuda", "host", "shape", "none"]
#: What each place means, for people.
MEANING: dict[Place, str] = {
    "cuda": "has a CUDA kernel",
    "host": "has a CUDA kernel, and ONNX Runtime prefers the CPU: all it reads comes from a Shape or Size",
    "shape": "has no CUDA kernel and needs none: all it reads comes from a Shape or Size, or is small and constant",
    "none": "has no CUDA kernel",
}


# --- the document -----------------------------------------------------------------------------------------------


def parse(text: str, provider: str = CUDA, domain: str = "ai.onnx") -> dict[str, list[dict[str, Any]]]:
    """Kernels of one provider by operator, from the text of ONNX Runtime's ``docs/OperatorKernels.md``.

    Each kernel has ``since`` and ``until`` (None: the document gives no end), ``types`` by type variable, and ``in``
    and ``out``: [parameter, type variable or type].

    Raises:
        ValueError: the text has no such section, or a row of it is not understood.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    inside, here, name, forms = False, "", "", ""
    seen = False
    for line in text.splitlines():
        if line.startswith("## "):
            inside = line.strip() == f"## Operators implemented by {provider}"
            seen |= inside
            continue
        if not inside or not line.startswith("|"):
            continue
        title = re.match(r"\|\*\*Operator Domain:\*\* \*([\w.]+)\*", line)
        if title:
            here = title[1]
            continue
        if here != domain or not line.strip("| "):
            continue
        # A row of a further version begins with two empty cells, which say "as above".
        row = line.strip()[1:-1].split("|")
        if len(row) != 4:
            raise ValueError(f"a row with {len(row)} cells: {line[:120]}")
        if row[0]:
            name, forms = row[0], row[1]
        since, until = _versions(row[2])
        types = _types(row[3])
        inputs, outputs = _form(forms, types)
        kernel = {"since": since, "until": until, "in": inputs, "out": outputs, "types": types}
        found.setdefault(name, []).append(kernel)
    if not seen:
        raise ValueError(f"no section of {provider}")
    return found


def _versions(cell: str) -> tuple[int, int | None]:
    """``14+``, ``13`` or ``[7, 12]``."""
    if match := re.fullmatch(r"(\d+)\+", cell.strip()):
        return int(match[1]), None
    if match := re.fullmatch(r"(\d+)", cell.strip()):
        return int(match[1]), int(match[1])
    if match := re.fullmatch(r"\[(\d+), (\d+)\]", cell.strip()):
        return int(match[1]), int(match[2])
    raise ValueError(f"not a range of versions: {cell}")


def _types(cell: str) -> dict[str, list[str]]:
    """Type variables with their types, without the ``tensor()`` around them."""
    found = {}
    for part in re.split(r"<br\s*/?>", cell):
        if match := re.match(r"\s*\*\*(.+?)\*\* = (.+)", part):
            found[match[1]] = [_bare(kind) for kind in re.split(r", (?=\w+\()", match[2].strip())]
        elif part.strip():
            raise ValueError(f"not a list of types: {part}")
    return found


def _bare(kind: str) -> str:
    return kind[len("tensor(") : -1] if kind.startswith("tensor(") else kind


def _form(cell: str, types: Mapping[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
    """Parameters of the form that suits a kernel's type variables: an operator changed its form over versions.

    The document lists forms without their versions, so of several that suit, the one with the most operands is
    taken: operands that came later were optional, and an earlier node lacks them.
    """
    forms = []
    for text in re.split(r"<br\s*/?><br\s*/?>or<br\s*/?><br\s*/?>", cell):
        found = re.findall(r"\*(in|out)\* (\w+):\*\*(.+?)\*\*", text)
        inputs = [[parameter, _bare(kind)] for side, parameter, kind in found if side == "in"]
        outputs = [[parameter, _bare(kind)] for side, parameter, kind in found if side == "out"]
        variables = {kind for _, _, kind in found if "(" not in kind}
        forms.append(((set(types) <= variables, len(inputs), -len(variables - set(types))), (inputs, outputs)))
    return max(forms, key=lambda form: form[0])[1]


# --- looking a node up ------------------------------------------------------------------------------------------


class Kernels:
    """The kernels of a data file."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.source, self.version = data["source"], data["onnxruntime"]
        self._kernels: dict[str, list[dict[str, Any]]] = data["kernels"]

    @classmethod
    def load(cls, path: Path = DATA) -> Kernels:
        """The file beside this tool."""
        return cls(json.loads(path.read_text()))

    def why_none(
        self, op: str, opset: int, inputs: Sequence[str | None], outputs: Sequence[str | None], domain: str = ""
    ) -> str:
        """Why no kernel takes a node; empty if one does.

        A kernel without an end takes the version that it begins with alone, as ONNX Runtime's own search does:
        whether it could do what a later version of the operator means is not known when it is built.

        Args:
            inputs, outputs: dtypes as the document names them; None where a parameter is absent.
        """
        if domain not in ("", "ai.onnx"):
            return f"domain {domain}"
        rows = self._kernels.get(op)
        if not rows:
            return "no kernel of any version or type"
        since = onnx.defs.get_schema(op, opset).since_version
        rows = [row for row in rows if row["since"] == since or row["since"] <= since <= (row["until"] or 0)]
        if not rows:
            return f"no kernel of version {since}"
        reasons = [self._misfit(row, inputs, outputs) for row in rows]
        return "" if "" in reasons else reasons[0]

    def lost(self) -> dict[int, list[str]]:
        """Operators with a kernel at the first of :data:`OPSETS`, by the later opset at which they have none."""
        found: dict[int, list[str]] = {}
        for op in sorted(self._kernels):
            if not onnx.defs.has(op, OPSETS[0], ""):
                continue  # a later operator, or one of ONNX Runtime's own
            without = [opset for opset in OPSETS if self.why_none(op, opset, [], [])]
            if without and without[0] != OPSETS[0]:
                found.setdefault(without[0], []).append(op)
        return dict(sorted(found.items()))

    @staticmethod
    def _misfit(row: Mapping[str, Any], inputs: Sequence[str | None], outputs: Sequence[str | None]) -> str:
        for side, kinds in (("in", inputs), ("out", outputs)):
            parameters = row[side]
            for place, kind in enumerate(kinds):
                if kind is None or not parameters:
                    continue
                # What comes after the last parameter is more of it: only a variadic one has more.
                name, variable = parameters[min(place, len(parameters) - 1)]
                allowed = row["types"].get(variable)
                if allowed is not None and kind not in allowed:
                    return f"no kernel with {name} of {kind}"
        return ""


@dataclasses.dataclass(frozen=True)
class Found:
    """A node and where it would run.

    Attributes:
        role: of ``zilc.role``; ``forward`` for the user's own.
        reason: why there is no kernel.
    """

    op: str
    name: str
    role: str
    place: Place
    reason: str = ""

    @property
    def emitted(self) -> bool:
        """Whether zilc made the node."""
        return self.role != "forward"


def places(model: onnx.ModelProto, kernels: Kernels, roles: Mapping[str, str] | None = None) -> list[Found]:
    """Each node of a model, subgraphs included.

    Args:
        roles: by node name or output name, where the model's metadata do not tell.
    """
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    with contextlib.suppress(Exception):  # operators of ONNX Runtime's own: it has written their types itself
        model = onnx.shape_inference.infer_shapes(model, data_prop=False)
    return list(_places(model.graph, opset, kernels, roles or {}, {}, {}))


def _places(
    graph: onnx.GraphProto,
    opset: int,
    kernels: Kernels,
    roles: Mapping[str, str],
    outer: Mapping[str, str],
    sizes: Mapping[str, int],
) -> Iterator[Found]:
    kinds = {**outer, **_kinds(graph)}
    sizes = {**sizes, **{t.name: int(np.prod(t.dims)) for t in graph.initializer}}
    given = {i.name for i in graph.input} - set(sizes)
    host: set[str] = set()  # tensors in host memory, as far as ONNX Runtime tells before it places nodes
    for node in graph.node:
        if node.op_type == "Constant":
            sizes[node.output[0]] = 1
            continue  # it becomes an initializer
        role = _role(node, roles)
        inputs = [kinds.get(x, UNKNOWN) if x else None for x in node.input]
        outputs = [kinds.get(y, UNKNOWN) if y else None for y in node.output]
        reason = kernels.why_none(node.op_type, opset, inputs, outputs, node.domain)
        read = [x for x in node.input if x]
        small = [sizes.get(x, SMALL + 1) <= SMALL for x in read]
        place: Place = "none" if reason else "cuda"
        if any(x in host for x in read):
            if reason:
                if all(x in host or fits for x, fits in zip(read, small, strict=True)):
                    place = "shape"
                host.update(node.output)
            elif all(
                kinds.get(x) not in _HALVES
                and (fits or x in given or (x in host and index not in HOST_INPUTS.get(node.op_type, ())))
                for (index, x), fits in zip(((k, x) for k, x in enumerate(node.input) if x), small, strict=True)
            ):
                place = "host"
                host.update(node.output)
        if place == "cuda":
            host.update(node.output[k] for k in HOST_OUTPUTS.get(node.op_type, ()))
        yield Found(node.op_type, node.name, role, place, reason)
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else attribute.graphs):
                yield from _places(inner, opset, kernels, roles, kinds, sizes)


def _role(node: onnx.NodeProto, roles: Mapping[str, str]) -> str:
    for entry in node.metadata_props:
        if entry.key == "zilc.role":
            return entry.value
    for name in (node.name, *node.output):
        if name and name in roles:
            return roles[name]
    return "unknown"


def _kinds(graph: onnx.GraphProto) -> dict[str, str]:
    """The dtype of each tensor whose type is written down."""
    found = {t.name: _label(t.data_type) for t in graph.initializer}
    for info in (*graph.input, *graph.value_info, *graph.output):
        if info.type.HasField("tensor_type") and info.type.tensor_type.elem_type:
            found[info.name] = _label(info.type.tensor_type.elem_type)
    return found


def _label(kind: int) -> str:
    return str(onnx.TensorProto.DataType.Name(kind)).lower()


# --- the graphs -------------------------------------------------------------------------------------------------


def roles_of(model: onnx.ModelProto) -> dict[str, str]:
    """``zilc.role`` by node name and by output name."""
    found: dict[str, str] = {}

    def walk(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            role = next((e.value for e in node.metadata_props if e.key == "zilc.role"), "")
            if role:
                found.update({name: role for name in (node.name, *node.output) if name})
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    walk(attribute.g)

    walk(model.graph)
    return found


def optimised(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model after ONNX Runtime's basic optimisation, which is the same for all providers."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        options.log_severity_level = 4
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


def training(name: str, optimizer: str, *, opset: int = 18, **how: Any) -> onnx.ModelProto:
    """The training graph of one of the benchmark's networks."""
    import zilc
    from zilc import models

    return zilc.emit_training(
        models.build(name, opset=opset), loss="cross-entropy", optimizer=optimizer, target="cuda", **how
    ).model


def variants() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Network, optimizer and options of every training graph that the document is held against."""
    for name in NETWORKS:
        for optimizer in OPTIMIZERS:
            yield name, optimizer, {}
            yield name, optimizer, {"precision": "float16"}
        yield name, "sgd", {"precision": "bfloat16"}
    yield "resnet18", "sgd", {"mode": "train"}
    for opset in OPSETS[1:]:
        for name in ("mlp3", "rnn", "resnet18", "transformer", "decoder"):
            yield name, "sgd", {"opset": opset}


def examine(model: onnx.ModelProto, kernels: Kernels) -> list[Found]:
    """Where the nodes of a training graph would run.

    A graph with 16 bit floats is looked up as it is: for the CPU, the optimisation would first turn what the CPU
    has no kernels for into float32.
    """
    low = any(kind in _HALVES for kind in _kinds(model.graph).values())
    return places(model if low else optimised(model), kernels, roles_of(model))


def rule_cases() -> Iterator[tuple[Any, bool]]:
    """A case and whether its dimensions are symbolic, from the tables of the rules' tests."""
    import tests.vjp

    for module in sorted(m.name for m in pkgutil.iter_modules(tests.vjp.__path__) if m.name.startswith("test_")):
        if module == "test_table":
            continue  # it gathers the tables of the others
        print(module, file=sys.stderr, flush=True)
        for case in getattr(importlib.import_module(f"tests.vjp.{module}"), "CASES", []):
            for symbolic in (False, True) if case.symbolic else (False,):
                yield case, symbolic


def rule_model(case: Any, symbolic: bool, target: str = "cuda") -> onnx.ModelProto:
    """The operator and the cotangents of its operands, in float32."""
    from zilc.testing import op_model, vjp_model

    inputs = case.inputs
    if not any(isinstance(value, onnx.GraphProto) for value in case.attrs.values()):  # a subgraph states its dtypes
        inputs = [x if x is None or x.dtype.kind != "f" else np.asarray(x, np.float32) for x in inputs]
    made = op_model(
        case.op, inputs, case.attrs, opset=case.opset, outputs=case.outputs, constant=case.constant, symbolic=symbolic,
        executor=case.executor,
    )  # fmt: skip
    return vjp_model(made, operands=case.operands, target=target)


def examine_rule(model: onnx.ModelProto, kernels: Kernels) -> list[Found]:
    """Where the nodes of a rule's case would run; the operator itself is the forward node.

    As the graph stands first, for that is fast; optimised only where something has no kernel then.
    """
    results = [o.name for o in model.graph.output if o.name.startswith("y")]
    roles = dict.fromkeys(["node", *results], "forward")
    found = places(model, kernels, roles)
    if any(f.place == "none" and f.emitted for f in found):
        try:
            after = optimised(model)
        except Exception:  # onnxruntime does not load it: what the graph holds is what there is
            return found
        own = next(node.op_type for node in model.graph.node if node.name == "node")
        # What ONNX Runtime puts in place of an operator that is a function is the operator still.
        inlined = [y for node in after.graph.node for y in node.output if y.startswith(f"_inlfunc_{own}_")]
        found = places(after, kernels, {**roles, **dict.fromkeys(inlined, "forward")})
    return found


# --- what is written --------------------------------------------------------------------------------------------


def tally(found: Iterable[Found]) -> dict[str, Any]:
    """Counts of a graph's nodes by place, and which have no kernel: zilc's, and the user's own."""
    found = list(found)
    lacking = {
        key: _counted(f"{f.op}: {f.reason}" for f in found if f.place == "none" and f.emitted == emitted)
        for key, emitted in (("emitted", True), ("own", False))
    }
    shapes = _counted(f.op for f in found if f.place in ("host", "shape"))
    return {**{place: sum(f.place == place for f in found) for place in MEANING}, **lacking, "shapes": shapes}


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(collections.Counter(names).items()))


def network_results(kernels: Kernels) -> list[dict[str, Any]]:
    """One entry a training graph."""
    rows = []
    for name, optimizer, how in variants():
        print(f"{name} {optimizer} {how}", file=sys.stderr, flush=True)
        model = training(name, optimizer, **how)
        rows.append({"network": name, "optimizer": optimizer, "options": how, **tally(examine(model, kernels))})
    return rows


def rule_results(kernels: Kernels) -> dict[str, Any]:
    """Emitted nodes without a kernel by the operator whose rule emits them, and operators without one themselves."""
    emitted: dict[str, collections.Counter[str]] = {}
    own: set[str] = set()
    cases = later = 0
    for case, symbolic in rule_cases():
        if case.opset > OPSETS[0]:
            later += 1
            continue
        cases += 1
        found = examine_rule(rule_model(case, symbolic), kernels)
        for f in found:
            if f.place == "none" and f.emitted:
                emitted.setdefault(case.op, collections.Counter())[f"{f.op}: {f.reason}"] += 1
            elif f.place == "none":
                own.add(case.op if f.op == case.op else f"{case.op} ({f.op})")
    return {
        "cases": cases,
        "later opset": later,
        "emitted": {op: dict(sorted(lacking.items())) for op, lacking in sorted(emitted.items())},
        "own": sorted(own),
    }


def markdown(results: Mapping[str, Any]) -> str:
    """docs/CUDA.md."""
    lines = [
        "# CUDA kernels", "",
        "Made by `make cuda-kernels`, by a document and without a GPU; what was run on one is in "
        "[CUDA_NETWORKS.md](CUDA_NETWORKS.md) and [CUDA_CHECK.md](CUDA_CHECK.md). ONNX Runtime documents which kernels "
        f"its CUDA provider has; every node of zilc's graphs was looked up in [the edition of {results['onnxruntime']}]"
        f"({results['source']}) by operator, version and types, after ONNX Runtime's basic optimisation (float16: as "
        "emitted). A kernel whose range of versions is open takes the version it begins with alone, as in ONNX "
        "Runtime's own search. The document says nothing of attributes, nor which types of several variables go "
        "together, so that a kernel may still turn a node down.", "",
        *(f"- **{place}**: {what}." for place, what in MEANING.items()), "",
        "## Training graphs", "",
        "Wavefront schedule, cross-entropy. *zilc's* are emitted nodes without a kernel, *own* those of the model "
        "itself (`zilc.role` is `forward`).", "",
        "| network | optimizer | options | cuda | host | shape | zilc's | own |", "|---|---|---|--:|--:|--:|---|---|",
    ]  # fmt: skip
    for row in results["networks"]:
        options = ", ".join(f"{key} {value}" for key, value in row["options"].items())
        cells = [row["network"], row["optimizer"], options, *(str(row[place]) for place in ("cuda", "host", "shape"))]
        lines.append("| " + " | ".join([*cells, _listed(row["emitted"]), _listed(row["own"])]) + " |")
    rules = results["rules"]
    lines += [
        "", "## Opsets", "",
        f"zilc keeps the model's opset. Operators that have a kernel at opset {OPSETS[0]} and none for the version of "
        f"a later one, so that `--opset {OPSETS[0]}` is the one for CUDA:", "",
        "| from opset | operators |", "|--:|---|",
        *(f"| {opset} | {', '.join(ops)} |" for opset, ops in results["lost"].items()),
        "", "## Rules", "",
        f"Gradient graphs of {rules['cases']} cases of the rules' tests, static and symbolic, at opset {OPSETS[0]} "
        f"({rules['later opset']} at later opsets are left out). Emitted nodes without a kernel:", "",
        "| rule of | emitted |", "|---|---|",
        *(f"| {op} | {_listed(lacking)} |" for op, lacking in rules["emitted"].items()), "",
        "Operators of the cases that have none themselves, which are a model's own nodes, not zilc's (ONNX Runtime "
        "writes out those that are functions):", "", ", ".join(rules["own"]) + ".", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _listed(lacking: Mapping[str, int]) -> str:
    return ", ".join(f"{count} × {name}" for name, count in lacking.items()) or "0"


def dump(document: str, source: str, version: str) -> str:
    """The data file: one line a kernel."""
    kernels = parse(document)
    lines = []
    for op, rows in kernels.items():
        inner = ",\n".join("   " + json.dumps(row, separators=(",", ":")) for row in rows)
        lines.append(f"  {json.dumps(op)}: [\n{inner}\n  ]")
    head = f' "source": {json.dumps(source)},\n "onnxruntime": {json.dumps(version)},\n "kernels": {{\n'
    return "{\n" + head + ",\n".join(lines) + "\n }\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document", help="OperatorKernels.md, to make the data from")
    parser.add_argument("--source", default="", help="where the document lies")
    parser.add_argument("--version", default="", help="the ONNX Runtime that it is of")
    parser.add_argument("--only", choices=("networks", "rules"))
    parser.add_argument("--write", action="store_true", help="docs/CUDA.md and docs/cuda.json, instead of printing")
    options = parser.parse_args()
    if options.document:
        text = Path(options.document).read_text(encoding="utf-8")
        DATA.write_text(dump(text, options.source, options.version), encoding="utf-8")
        return
    sys.path.insert(0, str(ROOT))  # the rules' cases lie among the tests
    kernels = Kernels.load()
    results: dict[str, Any] = json.loads(JSON.read_text()) if options.only and JSON.exists() else {}
    lost = {str(opset): ops for opset, ops in kernels.lost().items()}
    results.update({"source": kernels.source, "onnxruntime": kernels.version, "lost": lost})
    if options.only != "rules":
        results["networks"] = network_results(kernels)
    if options.only != "networks":
        results["rules"] = rule_results(kernels)
    results.setdefault("networks", [])
    results.setdefault("rules", {"cases": 0, "later opset": 0, "emitted": {}, "own": []})
    if options.write:
        JSON.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        MARKDOWN.write_text(markdown(results), encoding="utf-8")
    else:
        print(markdown(results))


if __name__ == "__main__":
    main()
