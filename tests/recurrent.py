"""Models of one recurrent operator, with any of its operands and attributes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.shape_inference

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


@dataclass(frozen=True)
class Recurrent:
    """One operator on random operands.

    Attributes:
        lengths: sequence_lens.
        initial: initial states of each kind are operands.
        outputs: how many of Y, Y_h, Y_c.
    """

    kind: str
    attrs: dict[str, Any] = field(default_factory=dict)
    steps: int = 4
    batch: int = 3
    inputs: int = 2
    hidden: int = 3
    bias: bool = True
    lengths: tuple[int, ...] | None = None
    initial: bool = True
    peepholes: bool = False
    outputs: int | None = None

    def __str__(self) -> str:
        words = [f"{k}={'+'.join(map(str, v)) if isinstance(v, list) else v}" for k, v in self.attrs.items()]
        words += [w for w, on in (("nobias", not self.bias), ("zero", not self.initial), ("P", self.peepholes)) if on]
        words += [f"lens{self.lengths}"] if self.lengths else []
        words += [f"T{self.steps}"] if self.steps != 4 else []
        return " ".join([self.kind, *words])

    @property
    def states(self) -> int:
        return 2 if self.kind == "LSTM" else 1

    def operands(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Float64 values that float32 holds exactly, by name; absent operands are left out."""
        rng = np.random.default_rng(seed)
        rows = GATES[self.kind] * self.hidden
        directions = 2 if self.attrs.get("direction") == "bidirectional" else 1
        batch_first = self.attrs.get("layout")
        state = (self.batch, directions, self.hidden) if batch_first else (directions, self.batch, self.hidden)
        x = (self.batch, self.steps, self.inputs) if batch_first else (self.steps, self.batch, self.inputs)
        shapes = {"X": x, "W": (directions, rows, self.inputs), "R": (directions, rows, self.hidden)}
        if self.bias:
            shapes["B"] = (directions, 2 * rows)
        if self.initial:
            shapes |= dict.fromkeys(("initial_h", "initial_c")[: self.states], state)
        if self.peepholes:
            shapes["P"] = (directions, 3 * self.hidden)
        made = {name: rng.standard_normal(shape).astype("f").astype("d") for name, shape in shapes.items()}
        made["R"] *= 0.5
        if self.lengths is not None:
            made["sequence_lens"] = np.asarray(self.lengths, np.int32)
        return made

    def model(
        self, dtype: Any = np.float64, *, constant: Sequence[str] = (), symbolic: Sequence[str] = (), opset: int = 18
    ) -> onnx.ModelProto:
        """The operator alone; operands are graph inputs.

        Args:
            constant: operands that are initializers instead.
            symbolic: which of "T" and "N" are symbolic.
        """
        given = self.operands()
        order = ["X", "W", "R", "B", "sequence_lens", "initial_h", *(["initial_c", "P"] if self.kind == "LSTM" else [])]
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        infos, initializers = [], []
        for name in order:
            if name not in given:
                continue
            if name in constant:
                value = given[name] if name == "sequence_lens" else given[name].astype(dtype)
                initializers.append(onnx.numpy_helper.from_array(value, name))
                continue
            shape: list[int | str] = list(given[name].shape)
            time, batch = (1, 0) if self.attrs.get("layout") else (0, 1)
            if name == "X" and "T" in symbolic:
                shape[time] = "T"
            if "N" in symbolic and name in ("X", "initial_h", "initial_c"):
                shape[batch] = "N"
            if "N" in symbolic and name == "sequence_lens":
                shape[0] = "N"
            element = onnx.TensorProto.INT32 if name == "sequence_lens" else kind
            infos.append(onnx.helper.make_tensor_value_info(name, element, shape))
        outputs = ["Y", "Y_h", "Y_c"][: self.outputs or 1 + self.states]
        node = onnx.helper.make_node(
            self.kind, [n if n in given else "" for n in order], outputs, name="cell", hidden_size=self.hidden,
            **self.attrs,
        )  # fmt: skip
        results = [onnx.helper.make_empty_tensor_value_info(name) for name in outputs]
        graph = onnx.helper.make_graph([node], "recurrent", infos, results, initializers)
        made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
        return onnx.shape_inference.infer_shapes(made, check_type=True, strict_mode=True)


BOTH = {"direction": "bidirectional"}
#: Every attribute and operand of each operator.
CASES = [
    *(
        case
        for kind in GATES
        for case in (
            Recurrent(kind),
            Recurrent(kind, {"direction": "reverse"}),
            Recurrent(kind, BOTH),
            Recurrent(kind, {**BOTH, "layout": 1}),
            Recurrent(kind, {"layout": 1}, bias=False, initial=False),
            Recurrent(kind, {"clip": 0.5}),
            Recurrent(kind, lengths=(4, 0, 2)),
            Recurrent(kind, {**BOTH, "layout": 1}, lengths=(1, 4, 3), initial=False),
            Recurrent(kind, lengths=(4, 4, 4)),
            Recurrent(kind, BOTH, steps=1),
            Recurrent(kind, steps=1, initial=False),
            Recurrent(kind, BOTH, batch=1, hidden=1, inputs=1),
        )
    ),
    *(Recurrent("GRU", {"linear_before_reset": 1, **way}, bias=bias, initial=initial)
      for way in ({}, BOTH) for bias in (True, False) for initial in (True, False)),
    Recurrent("GRU", {"linear_before_reset": 1, "clip": 0.4}, lengths=(2, 4, 1)),
    Recurrent("GRU", BOTH, bias=False, initial=False),
    *(Recurrent("LSTM", {"input_forget": coupled, **way}, peepholes=peep, initial=initial)
      for coupled in (0, 1) for peep in (True, False) for initial in (True, False) for way in ({"clip": 0.7}, BOTH)),
    *(Recurrent("RNN", {"activations": [name], "activation_alpha": [0.3], "activation_beta": [0.2]})
      for name in ("Affine", "LeakyRelu", "ThresholdedRelu", "ScaledTanh", "HardSigmoid", "Elu", "Softsign",
                   "Softplus", "Relu", "Sigmoid", "Tanh")),
    *(Recurrent("LSTM", {"activations": ["Sigmoid", name, "Tanh"]}) for name in ("LeakyRelu", "HardSigmoid", "Elu")),
    Recurrent("LSTM", {**BOTH, "activations": ["Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid", "ScaledTanh", "Elu"],
                       "activation_alpha": [0.3, 0.25, 0.4, 0.6], "activation_beta": [0.45, 0.9]}),
    Recurrent("GRU", {**BOTH, "activations": ["HardSigmoid", "Softsign", "Sigmoid", "Affine"],
                      "activation_alpha": [0.3, 0.5], "activation_beta": [0.4, 0.1]}),
]  # fmt: skip
