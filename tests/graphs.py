"""Small graphs in ONNX's text syntax, with weights filled in, shared by tests."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser

#: A skip edge: the smallest graph that needs identity vertices.
SKIP = """
<ir_version: 10, opset_import: ["" : 18]>
skip (float[N,4] x) => (float[N,3] y) <float[4,4] w1, float[4] b1, float[4,3] w2> {
  [fc1] h0 = MatMul(x, w1)
  [bias] h1 = Add(h0, b1)
  [act] h2 = Tanh(h1)
  [join] h3 = Add(h2, x)
  [relu] h4 = Relu(h3)
  [out] y = MatMul(h4, w2)
}
"""

#: A chain: level as it is.
CHAIN = """
<ir_version: 10, opset_import: ["" : 18]>
chain (float[N,4] x) => (float[N,2] y) <float[4,3] w1, float[3] b1, float[3,2] w2> {
  [fc1] h1 = Gemm(x, w1, b1)
  [act] h2 = Tanh(h1)
  [fc2] y = MatMul(h2, w2)
}
"""

#: A shared leaf on two levels, an operand used twice, two outputs of which one is consumed.
WEAVE = """
<ir_version: 10, opset_import: ["" : 18]>
weave (float[N,4] x) => (float[N,4] h, float[N,4] y) <float[4,4] w, float[1,4] b> {
  [first] a = MatMul(x, w)
  [square] s = Mul(a, a)
  [shift] h = Add(s, b)
  [second] c = MatMul(h, w)
  [soft] p = Softmax(c)
  [last] y = Add(p, b)
}
"""


def model(text: str, *, seed: int = 0, dtype: str = "float32") -> onnx.ModelProto:
    """Parse, and give every declared initializer random values."""
    if dtype == "float64":
        text = text.replace("float[", "double[")
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(seed)
    declared = list(proto.graph.initializer) or []
    names = [(t.name, tuple(t.dims)) for t in declared]
    if not names:  # the parser lists <...> declarations without values among value_info
        names = [
            (v.name, tuple(d.dim_value for d in v.type.tensor_type.shape.dim)) for v in proto.graph.value_info
        ]
        del proto.graph.value_info[:]
    del proto.graph.initializer[:]
    for name, shape in names:
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array((0.5 * rng.standard_normal(shape)).astype(dtype), name)
        )
    onnx.checker.check_model(proto)
    return proto


def initial(step, feeds: dict, *, lr: float = 0.1) -> dict:
    """Feeds of a training graph: the given ones, the initial state, and the learning rate."""
    given = {**feeds, **{name: np.asarray(step.state[name]) for name in step.state}}
    if step.signature["lr"]:
        kind = next(i for i in step.model.graph.input if i.name == step.signature["lr"]).type.tensor_type.elem_type
        given[step.signature["lr"]] = np.asarray(lr, onnx.helper.tensor_dtype_to_np_dtype(kind))
    return given
