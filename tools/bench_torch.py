"""PyTorch's peers in tools/bench.py: the paper's networks as people write them: eager, compiled, in CUDA graphs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from bench_task import HALVES, TARGET, Made, Task
from torch import nn
from torch.nn import functional


def eager(task: Task, imported: Callable[[], None]) -> Made:
    """PyTorch as it is."""
    imported()
    return _make(task)


def compiled(task: Task, imported: Callable[[], None]) -> Made:
    """The network through torch.compile; it brings half of its imports when it first compiles."""
    imported()
    return _make(task, compiled="default")


def graphs(task: Task, imported: Callable[[], None]) -> Made:
    """torch.compile with CUDA graphs."""
    imported()
    return _make(task, compiled="reduce-overhead")


def _make(task: Task, *, compiled: str = "") -> Made:
    """zero_grad, forward, loss, backward and the optimizer's step, the loss read back.

    Args:
        compiled: a mode of torch.compile; empty for the network as it is.
    """
    torch.set_num_threads(task.threads)
    if task.device == "cuda":
        # As the others: products in all of float32, and convolutions by the fastest kernel that a search finds.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
    net = build(task.network)
    weights = task.weights()
    load(task.network, net, weights)
    net = net.to(task.device, getattr(torch, task.weights_precision))
    make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[task.optimizer]
    optimizer = make(net.parameters(), task.lr)
    feeds = task.feeds()
    x = torch.from_numpy(feeds[task.inputs[0]]).to(task.device)
    y = torch.from_numpy(feeds[TARGET]).to(task.device)
    forward = torch.compile(net, mode=compiled) if compiled else net
    half = task.precision in HALVES
    cast = partial(torch.autocast, task.device, dtype=getattr(torch, task.precision))
    scaler = torch.amp.GradScaler(task.device, enabled=task.precision == "float16")

    def mixed() -> float:
        optimizer.zero_grad()
        with cast():
            loss = functional.cross_entropy(forward(x).flatten(0, -2), y.flatten())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    def step() -> float:
        optimizer.zero_grad()
        loss = functional.cross_entropy(forward(x).flatten(0, -2), y.flatten())
        loss.backward()
        optimizer.step()
        return loss.item()

    convolutional = any(isinstance(module, nn.Conv2d) for module in net.modules())
    if task.gate and (compiled == "default" or (compiled and not convolutional)):
        # Compiled here, where the others are built too: only the search for convolutions' kernels waits its turn, and
        # what is recorded in CUDA graphs must have searched before.
        torch.backends.cudnn.benchmark = False
        with cast() if half else contextlib.nullcontext():
            functional.cross_entropy(forward(x).flatten(0, -2), y.flatten()).backward()
        torch.backends.cudnn.benchmark = task.device == "cuda"
    facts: dict[str, object] = {}
    if task.network == "rnn":
        facts["note"] = "nn.RNN has two biases, each of which is trained"
    numbers = sum(p.numel() for p in net.parameters())
    return Made(mixed if half else step, numbers, {"torch": torch.__version__}, facts)


def load(name: str, net: nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Put the ONNX network's weights into its twin.

    The twins' state lists its tensors in the order in which the ONNX networks use theirs; where PyTorch packs or
    transposes, that is done first.
    """
    given = list(weights.values())
    if name == "rnn":
        w_ih, bias, w_hh, *rest = given
        given = [w_ih, w_hh, bias, np.zeros_like(bias), *rest]
    elif name in ("transformer", "decoder"):
        given = []
        for key, value in weights.items():
            part = key.rsplit(".attention.", 1)
            if len(part) == 2 and part[1].split(".")[0] in ("query", "key", "value"):
                if part[1] == "query.weight":
                    for kind in ("weight", "bias"):
                        packed = [weights[f"{part[0]}.attention.{p}.{kind}"] for p in ("query", "key", "value")]
                        given.append(np.concatenate([p.T for p in packed]))
            else:
                table = key in ("embedding.weight", "positions.weight")
                given.append(value if table else value.T)
    state = {key: value for key, value in net.state_dict(keep_vars=True).items() if value.dtype.is_floating_point}
    own = [tensor for key, tensor in state.items() if key not in ("positions", "mask")]
    if name == "transformer":
        # PyTorch lists both projections before both norms.
        given[5:11] = [given[i] for i in (7, 8, 9, 10, 5, 6)]
    if name == "decoder":
        given[:2] = given[1::-1]  # a module's own parameters come before those of its parts
        for start in range(2, len(given) - 2, 12):  # a block's norms before its projections
            block = given[start : start + 12]
            given[start : start + 12] = block[:2] + block[6:8] + block[2:6] + block[8:]
    with torch.no_grad():
        for tensor, array in zip(own, given, strict=True):
            if tensor.shape != array.shape:
                raise ValueError(f"the twin has a tensor of {tuple(tensor.shape)} for one of {array.shape}")
            tensor.copy_(torch.from_numpy(np.ascontiguousarray(array)))


def build(name: str) -> nn.Module:
    """The PyTorch network of the same sizes as ``zilc.models.build(name)``."""
    if name.startswith("mlp"):
        depth = int(name[3:])
        widths = [784, *[128] * (depth - 1), 10]
        layers: list[nn.Module] = []
        for i in range(depth):
            layers.append(nn.Linear(widths[i], widths[i + 1]))
            if i < depth - 1:
                layers.append(nn.Tanh())
        return nn.Sequential(*layers)
    makers = {
        "alexnet": _alexnet, "resnet18": _ResNet18, "rnn": _Rnn, "transformer": _Transformer, "decoder": _Decoder,
    }  # fmt: skip
    return makers[name]()


def _alexnet() -> nn.Module:
    relu = lambda: nn.ReLU(inplace=True)  # noqa: E731
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), relu(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), relu(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), relu(),
        nn.Conv2d(384, 256, 3, padding=1), relu(),
        nn.Conv2d(256, 256, 3, padding=1), relu(), nn.MaxPool2d(3, 2),
        nn.Flatten(), nn.Linear(9216, 4096), relu(), nn.Linear(4096, 4096), relu(), nn.Linear(4096, 1000),
    )  # fmt: skip


class _Block(nn.Module):
    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.down = (
            nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            if stride != 1 or width != out
            else nn.Identity()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(h)) + self.down(x))


class _ResNet18(nn.Module):
    """BatchNormalization in inference form, as in the exported model."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        plan = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2),
                (512, 512, 1)]  # fmt: skip
        self.blocks = nn.Sequential(*[_Block(*entry) for entry in plan])
        self.fc = nn.Linear(512, 1000)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class _Rnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(128, 128, batch_first=True)
        self.out = nn.Linear(128, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.rnn(x)[0][:, -1])


class _Transformer(nn.Module):
    def __init__(self, vocabulary: int = 28782, d: int = 512, length: int = 35) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, d)
        self.layer = nn.TransformerEncoderLayer(d, 8, 2048, dropout=0.0, batch_first=True)
        self.head = nn.Linear(d, vocabulary)
        place = torch.arange(length)[:, None]
        rate = torch.exp(torch.arange(0, d, 2) * (-math.log(10000.0) / d))
        table = torch.zeros(length, d)
        table[:, 0::2], table[:, 1::2] = torch.sin(place * rate), torch.cos(place * rate)
        self.register_buffer("positions", table)
        self.register_buffer("mask", torch.triu(torch.full((length, length), float("-inf")), 1))
        self.scale = math.sqrt(d)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embed(ids) * self.scale + self.positions, src_mask=self.mask, is_causal=True))


class _Decoder(nn.Module):
    def __init__(self, vocabulary: int = 8192, d: int = 256, length: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(vocabulary, d), nn.Parameter(torch.randn(length, d) * 0.02)
        self.blocks = nn.ModuleList(_DecoderBlock(d) for _ in range(layers))
        self.norm = nn.LayerNorm(d)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids) + self.places
        for block in self.blocks:
            h = block(h)
        return nn.functional.linear(self.norm(h), self.embed.weight)


class _DecoderBlock(nn.Module):
    def __init__(self, d: int, heads: int = 8) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.inner = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(approximate="tanh"), nn.Linear(4 * d, d))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        parts = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(h)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        h = h + self.out(mixed.transpose(1, 2).flatten(2))
        return h + self.inner(self.norm2(h))
