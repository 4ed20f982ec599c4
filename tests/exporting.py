"""Models that PyTorch's two exporters write, with PyTorch itself as their twin.

A twin holds the tensors of the *exported* file: an exporter may write a weight transposed, so each trained tensor is
found among the module's parameters by value, and the module then runs on the exported tensor, transposed back.
"""

from __future__ import annotations

import copy
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnx
import torch
import transformers

from tests.twins import torch_loss

#: ONNX attributes are float32, and so are the exporters' scalars, in float64 models too: a twin takes the same numbers.
EPSILON = float(np.float32(1e-5))
BATCH, LENGTH, WORDS, LABELS = 3, 7, 53, 5


@dataclass(frozen=True)
class Family:
    """A network.

    Attributes:
        make: the module; its forward takes the inputs in order and returns one tensor.
        inputs: arrays by input name, for a seed.
        loss: what it is trained with; classes lie on the last axis.
    """

    make: Callable[[], torch.nn.Module]
    inputs: Callable[[np.random.Generator], dict[str, np.ndarray]]
    loss: str


class Logits(torch.nn.Module):
    """A transformers model with named inputs, reduced to its logits."""

    def __init__(self, model: torch.nn.Module, *names: str) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True)), return_dict=True).logits


def _bert() -> torch.nn.Module:
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=16, num_labels=LABELS, layer_norm_eps=EPSILON,
        pad_token_id=None,  # PyTorch gives a padding word the gradient 0; a file has no padding word
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    return Logits(model, "input_ids", "attention_mask", "token_type_ids")


class Gelu(torch.nn.Module):
    """GPT-2's, by tanh, with its numbers rounded to float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        root, cubic = float(np.float32(math.sqrt(2.0 / math.pi))), float(np.float32(0.044715))
        return 0.5 * x * (1.0 + torch.tanh(root * (x + cubic * torch.pow(x, 3.0))))


def _gpt2() -> torch.nn.Module:
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_embd=32, n_layer=2, n_head=2, n_positions=16, use_cache=False, bos_token_id=0,
        eos_token_id=0, layer_norm_epsilon=EPSILON,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    for block in model.transformer.h:
        block.mlp.act = Gelu()
    # Without a mask, transformers looks for packed sequences, by an operator (diff) that the older exporter lacks.
    return Logits(model, "input_ids", "attention_mask")


def _vit() -> torch.nn.Module:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=4,
        num_labels=LABELS, layer_norm_eps=EPSILON,
    )  # fmt: skip
    return Logits(transformers.ViTForImageClassification(config), "pixel_values")


def _resnet50() -> torch.nn.Module:
    """Its depth, 3 + 4 + 6 + 3 bottlenecks, with narrow layers."""
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 24, 32, 40], depths=[3, 4, 6, 3], layer_type="bottleneck", num_labels=LABELS
    )
    return Logits(transformers.ResNetForImageClassification(config), "pixel_values")


def _words(rng: np.random.Generator, *, masked: bool, kinds: bool) -> dict[str, np.ndarray]:
    mask = np.ones((BATCH, LENGTH), np.int64)
    if masked:
        mask[0, -2:] = 0
    made = {"input_ids": rng.integers(0, WORDS, mask.shape), "attention_mask": mask}
    if kinds:
        made["token_type_ids"] = rng.integers(0, 2, mask.shape)
    return made


def _pixels(rng: np.random.Generator, size: int) -> dict[str, np.ndarray]:
    return {"pixel_values": rng.standard_normal((BATCH, 3, size, size)).astype(np.float32)}


FAMILIES = {
    "bert": Family(_bert, lambda rng: _words(rng, masked=True, kinds=True), "cross-entropy"),
    "gpt2": Family(_gpt2, lambda rng: _words(rng, masked=False, kinds=False), "cross-entropy"),
    "vit": Family(_vit, lambda rng: _pixels(rng, 16), "energy"),
    "resnet50": Family(_resnet50, lambda rng: _pixels(rng, 64), "cross-entropy"),
}


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Every parameter and statistic gets values of its own: exporters merge constants that are equal."""
    rng = torch.Generator().manual_seed(seed)
    for name, owner in module.named_modules():
        scale_names = ("LayerNorm", "BatchNorm2d")
        for key, p in owner.named_parameters(name, recurse=False):
            drawn = torch.randn(p.shape, generator=rng)
            if type(owner).__name__ in scale_names and key.endswith("weight"):
                p.data = 0.7 + 0.2 * drawn.abs()
            elif p.ndim == 4:
                p.data = drawn * (2.0 / p[0].numel()) ** 0.5
            else:
                p.data = 0.2 * drawn
        for key, buffer in owner.named_buffers(name, recurse=False):
            if key.endswith("running_mean"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=rng))
            elif key.endswith("running_var"):
                buffer.copy_(0.8 + 0.4 * torch.rand(buffer.shape, generator=rng))
        if isinstance(owner, torch.nn.BatchNorm2d):
            owner.eps = EPSILON


@cache
def network(family: str) -> torch.nn.Module:
    """A module in evaluation mode, with random weights; not to be changed."""
    module = FAMILIES[family].make().eval()
    randomise(module)
    return module


@dataclass(frozen=True)
class Export:
    """One way to write a network.

    Attributes:
        dynamo: the exporter that traces with torch.export; else the older one.
        dynamic: the batch is symbolic.
        double: the module is in float64 already when it is exported.
        options: passed to torch.onnx.export.
    """

    family: str
    dynamo: bool
    opset: int | None = None
    dynamic: bool = False
    double: bool = False
    options: tuple[tuple[str, Any], ...] = field(default=())

    def __str__(self) -> str:
        extras = [f"opset{self.opset}"] * bool(self.opset) + ["dynamic"] * self.dynamic + ["double"] * self.double
        extras += [f"{k}={getattr(v, 'name', v)}" for k, v in self.options]
        return "-".join([self.family, "dynamo" if self.dynamo else "torchscript", *extras])


@cache
def export(case: Export) -> onnx.ModelProto:
    """The file that the exporter writes."""
    module = network(case.family)
    feeds = inputs(case.family)
    if case.double:
        module = copy.deepcopy(module).double()
        feeds = {n: v.astype(np.float64) if v.dtype.kind == "f" else v for n, v in feeds.items()}
    arguments = tuple(torch.from_numpy(v) for v in feeds.values())
    options: dict[str, Any] = dict(case.options, input_names=list(feeds), output_names=["logits"])
    if case.opset:
        options["opset_version"] = case.opset
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            if case.dynamo:
                if case.dynamic:
                    # One entry for *inputs, a tuple of an entry for each.
                    options["dynamic_shapes"] = (tuple({0: torch.export.Dim("batch")} for _ in feeds),)
                program = torch.onnx.export(module, arguments, dynamo=True, verbose=False, **options)
                assert program is not None
                return program.model_proto
            if case.dynamic:
                options["dynamic_axes"] = {n: {0: "batch"} for n in (*feeds, "logits")}
            file = io.BytesIO()
            torch.onnx.export(module, arguments, file, dynamo=False, **options)
        finally:
            logging.disable(level)
    return onnx.load_from_string(file.getvalue())


def inputs(family: str) -> dict[str, np.ndarray]:
    """Feeds by input name."""
    return FAMILIES[family].inputs(np.random.default_rng(7))


def target(family: str) -> np.ndarray:
    """Labels, or values, of the logits' shape."""
    rng = np.random.default_rng(8)
    shape = (BATCH, LENGTH) if family == "gpt2" else (BATCH,)
    if FAMILIES[family].loss == "cross-entropy":
        return rng.integers(0, WORDS if family == "gpt2" else LABELS, shape)
    return rng.standard_normal((*shape, LABELS)).astype(np.float32)


@dataclass(frozen=True)
class Match:
    """Where an exported tensor lies in the module.

    Attributes:
        parameter: its name in the module.
        form: ``whole`` (up to axes of size 1), ``transposed``; its first ``rows`` (positions of a fixed length);
            ``copies``, one for each sample (a batch of fixed size); ``folded`` with a BatchNormalization.
    """

    parameter: str
    form: str = "whole"


def match(family: str, arrays: Mapping[str, np.ndarray]) -> dict[str, Match]:
    """Exported tensors, found among the module's parameters by value.  A tied weight is several parameters."""
    module = network(family)
    values = {k: p.detach().numpy() for k, p in module.named_parameters(remove_duplicate=False)}
    folded = {k: v.detach().numpy() for k, v in _folded(module)}
    found: dict[str, Match] = {}
    taken: set[str] = set()
    for name, array in arrays.items():
        forms = [(k, form) for k, v in values.items() if k not in taken and (form := _form(v, array))]
        forms += [
            (k, "folded") for k, v in folded.items()
            if k not in taken and v.shape == array.shape and np.allclose(v, array, rtol=1e-4, atol=1e-6)
        ]  # fmt: skip
        if forms:
            found[name] = Match(*forms[0])
            taken.add(forms[0][0])
    return found


def _form(value: np.ndarray, array: np.ndarray) -> str:
    """How ``array`` was made of a parameter's value; empty if it was not."""
    bare, other = value.squeeze(), array.squeeze()
    if bare.shape == other.shape and np.array_equal(bare, other):
        return "whole"
    if value.ndim == array.ndim == 2 and np.array_equal(value.T, array):
        return "transposed"
    if value.ndim == other.ndim == 2 and len(other) < len(value) and np.array_equal(value[: len(other)], other):
        return "rows"
    one = value.ndim == array.ndim and value.shape == (1, *array.shape[1:])
    return "copies" if one and (value == array).all() else ""


def _convolutions(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, owner in module.named_modules():
        if hasattr(owner, "convolution") and isinstance(getattr(owner, "normalization", None), torch.nn.BatchNorm2d):
            yield name, owner


def _folded(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Weight and bias of a Conv that has taken in the BatchNormalization after it, under the names of its parts."""
    for name, owner in _convolutions(module):
        norm = owner.normalization
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        yield f"{name}.convolution.weight", owner.convolution.weight * scale[:, None, None, None]
        yield f"{name}.normalization.bias", norm.bias - norm.running_mean * scale


def gradients(
    family: str,
    arrays: Mapping[str, np.ndarray],
    found: Mapping[str, Match],
    dtype: torch.dtype,
    tied: Mapping[str, str] | None = None,
) -> dict[str, np.ndarray]:
    """The gradient with respect to each exported tensor, by PyTorch.

    Args:
        arrays: exported tensors by name, all of whom have a match.
        tied: {B: A}, exported tensors B that are no leaves but A, or its transpose.
    """
    module = copy.deepcopy(network(family)).to(dtype)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    leaves = {n: torch.from_numpy(np.array(a)).to(dtype).requires_grad_() for n, a in arrays.items()}
    held: dict[str, torch.Tensor] = {}
    for name, leaf in leaves.items():
        held[found[name].parameter] = _inserted(leaf, parameters[found[name].parameter], found[name].form)
    for b, a in (tied or {}).items():
        held[found[b].parameter] = held[found[a].parameter]
    for key, p in parameters.items():
        # A tied weight that the file has once is one leaf.
        ties = [other for other, q in parameters.items() if q is p and other in held]
        if key not in held and ties:
            held[key] = held[ties[0]]
    folded = {m.parameter for m in found.values() if m.form == "folded"}
    for name, owner in _convolutions(module):
        if f"{name}.convolution.weight" in folded:
            # What is left of the normalization is its bias.
            owner.normalization.eps = 0.0
            one = torch.ones_like(owner.normalization.running_var)
            part = f"{name}.normalization"
            held.update({f"{part}.weight": one, f"{part}.running_mean": 0 * one, f"{part}.running_var": one})
    given = tuple(torch.from_numpy(v) for v in inputs(family).values())
    given = tuple(v.to(dtype) if v.is_floating_point() else v for v in given)
    y = torch.from_numpy(target(family))
    output = torch.func.functional_call(module, held, given, tie_weights=False)
    value = torch_loss(output, y.to(dtype) if y.is_floating_point() else y, FAMILIES[family].loss)
    made = torch.autograd.grad(value, list(leaves.values()))
    return {n: g.numpy() for n, g in zip(leaves, made, strict=True)}


def _inserted(leaf: torch.Tensor, parameter: torch.Tensor, form: str) -> torch.Tensor:
    """The module's parameter as a function of the exported leaf."""
    if form == "transposed":
        return leaf.T
    if form == "rows":
        rows = leaf.reshape(-1, parameter.shape[1])
        return torch.cat([rows, parameter.detach()[len(rows) :]])
    return leaf if form == "copies" else leaf.reshape(parameter.shape)
