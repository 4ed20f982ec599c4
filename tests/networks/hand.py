"""Networks written by hand in torch.nn: what transformers does not have."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tests.networks.common import BATCH, LABELS, WORDS, Inputs, Network, floats, pixels


class Model(nn.Module):
    """A forward function over named layers: Model(forward, layer=nn.Linear(2, 3)) is called as forward(m, *inputs)."""

    def __init__(self, function: Callable[..., torch.Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(self, *inputs)


def conv(i: int, o: int, k: int = 3, **options: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, **options), nn.BatchNorm2d(o), nn.ReLU())


def sequential(kind: str, make: Callable[[], list[nn.Module]], inputs: Inputs, loss: str = "energy") -> Network:
    return Network(kind, lambda: nn.Sequential(*make()), inputs, loss)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, act: type[nn.Module] = nn.Hardsigmoid) -> None:
        super().__init__()
        self.down, self.up, self.act = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1), act()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.act(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Inverted(nn.Module):
    """MobileNetV3's block: expand, depthwise, squeeze and excite, project, skip."""

    def __init__(self, width: int, act: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        wide = 2 * width
        self.body = nn.Sequential(
            nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), act(),
            nn.Conv2d(wide, wide, 5, padding=2, groups=wide, bias=False), nn.BatchNorm2d(wide), act(),
            SqueezeExcite(wide, gate), nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class UNet(nn.Module):
    def __init__(self, up: str) -> None:
        super().__init__()
        self.one, self.two, self.three = conv(3, 8), conv(8, 16), conv(16 + 8, 8)
        self.head = nn.Conv2d(8, 2, 1)
        self.up: nn.Module = {
            "transposed": lambda: nn.ConvTranspose2d(16, 16, 2, stride=2),
            "nearest": lambda: nn.Upsample(scale_factor=2, mode="nearest"),
            "bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            "bilinear-corners": lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            "bicubic": lambda: nn.Upsample(scale_factor=2, mode="bicubic"),
            "shuffle": lambda: nn.Sequential(nn.Conv2d(16, 64, 1), nn.PixelShuffle(2)),
        }[up]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.one(x)
        b = self.two(F.max_pool2d(a, 2))
        return self.head(self.three(torch.cat([self.up(b), a], 1)))


class Coupling(nn.Module):
    """An affine coupling of a normalizing flow (RealNVP)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width // 2, 8), nn.Tanh(), nn.Linear(8, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        s, t = self.net(a).chunk(2, -1)
        return torch.cat([b * torch.exp(torch.tanh(s)) + t, a], -1)


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 8), nn.GELU(), nn.Linear(8, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.tokens(self.a(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.b(x))


class KAN(nn.Module):
    """A Kolmogorov-Arnold layer with Gaussian bumps."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.coefficients, self.register = nn.Parameter(torch.randn(o, i, 5)), nn.Linear(i, o)
        self.register_buffer("centers", torch.linspace(-2, 2, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bumps = torch.exp(-((x.unsqueeze(-1) - self.centers) ** 2))
        return torch.einsum("bik,oik->bo", bumps, self.coefficients) + F.silu(self.register(x))


class Memory(nn.Module):
    """Rows written into a table by index, and read again (index_put, gather, scatter_add)."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Parameter(torch.randn(6, 4)), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        table = self.table.clone()
        table[index] = self.layer(x)
        summed = torch.zeros(6, 4, dtype=x.dtype).scatter_add(0, index.unsqueeze(-1).expand(-1, 4), x * table[index])
        return summed + torch.gather(table, 1, torch.zeros(6, 4, dtype=torch.int64))


class GraphConvolution(nn.Module):
    """Message passing over an edge list, by index_select and index_add."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, LABELS)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        for layer in (self.one, self.two):
            h = layer(x)
            ones = torch.ones(edges.shape[1], dtype=x.dtype)
            degree = torch.zeros(x.shape[0], dtype=x.dtype).index_add(0, edges[1], ones)
            summed = torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])
            x = torch.tanh(summed / degree.clamp(min=1).unsqueeze(-1) + h)
        return x


class GraphAttention(nn.Module):
    """Dense attention over neighbours, masked by an adjacency."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.left, self.right = nn.Linear(4, 8), nn.Linear(8, 1, bias=False), nn.Linear(8, 1, bias=False)

    def forward(self, x: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
        h = self.layer(x)
        scores = F.leaky_relu(self.left(h) + self.right(h).transpose(-1, -2), 0.2)
        scores = scores.masked_fill(adjacency == 0, float("-inf"))
        return F.elu(torch.softmax(scores, -1) @ h)


class Conditional(nn.Module):
    """torch.cond: one of two layers by the sign of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.end = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = torch.cond(x.sum() > 0, lambda x: torch.tanh(self.a(x)), lambda x: torch.sigmoid(self.b(x)), (x,))
        return self.end(made)


def _attend(m: Model, x: torch.Tensor) -> torch.Tensor:
    return m.attend(x, x, x, need_weights=False)[0]


def _translate(m: Model, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    mask = nn.Transformer.generate_square_subsequent_mask(y.shape[1], dtype=y.dtype)
    return m.head(m.body(x, y, tgt_mask=mask))


def _nerf(m: Model, x: torch.Tensor) -> torch.Tensor:
    parts = [x] + [f(x * 2.0**k) for k in range(3) for f in (torch.sin, torch.cos)]
    return m.net(torch.cat(parts, -1))


def _vae(m: Model, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    mean, spread = m.encoder(x).chunk(2, -1)
    return m.decoder(mean + torch.exp(0.5 * spread) * noise)


def _dlrm(m: Model, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    parts = torch.stack([m.dense(x), *(m.get_submodule(f"table{k}")(ids[:, k]) for k in range(3))], 1)
    products = torch.bmm(parts, parts.transpose(1, 2))
    i, j = torch.tril_indices(4, 4, -1)
    return m.top(torch.cat([parts[:, 0], products[:, i, j]], 1))


def _yolo(m: Model, x: torch.Tensor) -> torch.Tensor:
    a = m.one(x)
    b = m.two(a)
    b = torch.cat([b, *(F.max_pool2d(b, k, 1, k // 2) for k in (3, 5))], 1)  # spatial pyramid pooling
    up = F.interpolate(m.lateral(b), scale_factor=2.0, mode="nearest")
    outputs = []
    for h, head in ((torch.cat([up, a], 1), m.fine), (b, m.coarse)):
        y = head(h)
        n, _, height, width = y.shape
        y = y.view(n, 2, 6, height, width).permute(0, 1, 3, 4, 2)
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        grid = torch.stack((columns, rows), -1).to(y.dtype)
        center = (torch.sigmoid(y[..., :2]) * 2 - 0.5 + grid) / width
        size = (torch.sigmoid(y[..., 2:4]) * 2) ** 2
        outputs.append(torch.cat((center, size, torch.sigmoid(y[..., 4:])), -1).reshape(n, -1, 6))
    return torch.cat(outputs, 1)


def _spatial_transformer(m: Model, x: torch.Tensor) -> torch.Tensor:
    theta = m.locate(x.flatten(1)).view(-1, 2, 3)
    grid = F.affine_grid(theta, [x.shape[0], 1, 6, 6], align_corners=False)
    return m.head(F.grid_sample(x, grid, align_corners=False).flatten(1))


def _linear_attention(m: Model, x: torch.Tensor) -> torch.Tensor:
    q, k, v = m.qkv(x).chunk(3, -1)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    memory = torch.cumsum(torch.einsum("bti,btj->btij", k, v), 1)
    return torch.einsum("bti,btij->btj", q, memory) / torch.einsum("bti,bti->bt", q, k.cumsum(1)).unsqueeze(-1)


def _experts(m: Model, x: torch.Tensor) -> torch.Tensor:
    weights, chosen = torch.topk(torch.softmax(m.router(x), -1), 2)
    everything = torch.stack([m.get_submodule(f"expert{k}")(x) for k in range(3)], 1)
    picked = torch.gather(everything, 1, chosen.unsqueeze(-1).expand(-1, -1, everything.shape[-1]))
    return (weights.unsqueeze(-1) * picked).sum(1)


def _siamese(m: Model, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(m.net(a), m.net(b), dim=-1).unsqueeze(-1)


def _spectral(m: Model, x: torch.Tensor) -> torch.Tensor:
    n = torch.arange(8, dtype=x.dtype)
    angle = 2 * math.pi / 8 * n[:, None] * n[None]
    h = m.one(x)
    return m.two(torch.log1p((h @ torch.cos(angle)) ** 2 + (h @ torch.sin(angle)) ** 2))


def _polynomial(m: Model, x: torch.Tensor) -> torch.Tensor:
    h = m.a(x)
    product = torch.prod(m.b(x), -1, keepdim=True)
    return m.c(torch.stack([h, h**2, product * h, torch.sign(h) * h.abs().sqrt()], -1)).sum(-1)


def _norms(m: Model, x: torch.Tensor) -> torch.Tensor:
    h = F.normalize(m.a(x), dim=1)
    h = m.b(F.local_response_norm(h, 3))
    return m.c(h.norm(dim=(2, 3))) + torch.linalg.vector_norm(h, 1, dim=(2, 3)) + h.std((2, 3)) + h.amax((2, 3))


def _window(m: Model, x: torch.Tensor) -> torch.Tensor:
    h = F.unfold(m.a(x), 3, padding=1).view(x.shape[0], 4, 9, -1)
    return m.b(torch.roll((h * torch.softmax(h, 2)).sum(2), 2, -1))


def _fold(m: Model, x: torch.Tensor) -> torch.Tensor:
    return F.fold(m.a(F.unfold(x, 2, stride=2).transpose(1, 2)).transpose(1, 2), (8, 8), 2, stride=2)


def _losses(m: Model, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A loss inside of the graph, as for on-device training."""
    h = m.a(x)
    return F.cross_entropy(h, y, label_smoothing=float(np.float32(0.1))) + F.huber_loss(h, torch.zeros_like(h))


def images(channels: int = 3, size: int = 16) -> Inputs:
    return pixels(size, channels, "x")


def _mobile(act: type[nn.Module], gate: type[nn.Module]) -> list[nn.Module]:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, LABELS)]
    blocks = [Inverted(8, act, gate), Inverted(8, act, gate)]
    return [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), act(), *blocks, *head]


def _normed(norm: Callable[[int], nn.Module], act: nn.Module) -> list[nn.Module]:
    head = [nn.Flatten(), nn.Linear(8 * 144, LABELS)]
    return [nn.Conv2d(3, 8, 3), norm(8), act, nn.Conv2d(8, 8, 3), norm(8), act, *head]


ACTIVATIONS = (
    nn.CELU(0.7), nn.ELU(), nn.GELU(), nn.GELU("tanh"), nn.GLU(), nn.Hardsigmoid(), nn.Hardswish(), nn.Hardtanh(),
    nn.LeakyReLU(), nn.LogSigmoid(), nn.Mish(), nn.PReLU(8), nn.ReLU6(), nn.SELU(), nn.SiLU(), nn.Softmax(-1),
    nn.Softmin(-1), nn.Softplus(), nn.Softshrink(), nn.Softsign(), nn.Tanhshrink(), nn.Hardshrink(), nn.LogSoftmax(-1),
)  # fmt: skip


def _activation_layers() -> list[nn.Module]:
    return [layer for act in ACTIVATIONS for layer in (nn.Linear(8, 16 if isinstance(act, nn.GLU) else 8), act)]


CNN, ATTENTION, GENERATIVE, MISC = "convolutional, by hand", "attention, by hand", "generative", "by hand"

NETWORKS: dict[str, Network] = {
    "mobilenet-v3": sequential(CNN, lambda: _mobile(nn.Hardswish, nn.Hardsigmoid), images()),
    "mobile-silu": sequential(CNN, lambda: _mobile(nn.SiLU, nn.Sigmoid), images()),
    "vgg": sequential(CNN, lambda: [conv(3, 8), nn.MaxPool2d(2), conv(8, 8), nn.MaxPool2d(3, 2, 1, ceil_mode=True),
                                    nn.AdaptiveAvgPool2d((2, 2)), nn.Flatten(), nn.Linear(32, LABELS)], images()),
    "adaptive-pool": sequential(CNN, lambda: [conv(3, 8), nn.AdaptiveAvgPool2d((4, 2)), nn.Conv2d(8, 4, 1),
                                              nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(16, LABELS)], images()),
    "average-pool": sequential(CNN, lambda: [conv(3, 8), nn.AvgPool2d(3, 2, 1, count_include_pad=False),
                                             nn.AvgPool2d(3, 2, 1), nn.LPPool2d(2, 2), nn.Flatten(),
                                             nn.Linear(32, LABELS)], images()),
    "group-norm": sequential(CNN, lambda: _normed(lambda n: nn.GroupNorm(2, n), nn.SiLU()), images()),
    "instance-norm": sequential(CNN, lambda: _normed(lambda n: nn.InstanceNorm2d(n, affine=True), nn.Mish()), images()),
    "batch-norm-alone": sequential(CNN, lambda: [nn.BatchNorm2d(3), nn.ReLU(), *_normed(nn.BatchNorm2d, nn.ReLU())],
                                   images()),
    "norms": Network(CNN, lambda: Model(_norms, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 4, 3), c=nn.Linear(4, 4)),
                     images()),
    "padding-modes": sequential(CNN, lambda: [nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Tanh(),
                                              nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate"), nn.Tanh(),
                                              nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.Tanh(),
                                              nn.ZeroPad2d(1), nn.Conv2d(4, 2, 3)], images(size=8)),
    "shuffle-channels": sequential(CNN, lambda: [nn.Conv2d(3, 8, 3, groups=1), nn.ChannelShuffle(2),
                                                 nn.Conv2d(8, 8, 3, groups=2), nn.PixelUnshuffle(2),
                                                 nn.Conv2d(32, 4, 1)], images()),
    "conv3d": sequential(CNN, lambda: [nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2),
                                       nn.ConvTranspose3d(4, 2, 2, 2), nn.AvgPool3d(2), nn.Flatten(),
                                       nn.Linear(16, LABELS)], floats(x=(BATCH, 2, 4, 4, 4))),
    "unfold": Network(CNN, lambda: Model(_window, a=nn.Conv2d(3, 4, 1), b=nn.Linear(64, 4)), images(size=8)),
    "fold": Network(CNN, lambda: Model(_fold, a=nn.Linear(12, 12)), images(size=8)),
    "yolo": Network("detection", lambda: Model(_yolo, one=conv(3, 8, stride=2), two=conv(8, 8, stride=2),
                                               lateral=nn.Conv2d(24, 4, 1), fine=nn.Conv2d(12, 12, 1),
                                               coarse=nn.Conv2d(24, 12, 1)), images()),
    "spatial-transformer": Network(CNN, lambda: Model(_spatial_transformer, locate=nn.Linear(64, 6),
                                                      head=nn.Linear(36, LABELS)), images(1, 8)),
    **{f"unet-{up}": Network("segmentation", partial(UNet, up), images())
       for up in ("transposed", "nearest", "bilinear", "bilinear-corners", "bicubic", "shuffle")},
    "gan": sequential(GENERATIVE, lambda: [nn.ConvTranspose2d(4, 8, 4), nn.BatchNorm2d(8), nn.ReLU(),
                                           nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=2), nn.BatchNorm2d(8),
                                           nn.LeakyReLU(0.2),
                                           nn.ConvTranspose2d(8, 3, 3, 2, 1, output_padding=1), nn.Tanh()],
                      floats(x=(BATCH, 4, 1, 1))),
    "vae": Network(GENERATIVE, lambda: Model(_vae, encoder=nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8)),
                                             decoder=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 12))),
                   floats(x=(BATCH, 12), noise=(BATCH, 4))),
    "autoencoder": sequential(GENERATIVE, lambda: [nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1),
                                                   nn.ReLU(), nn.ConvTranspose2d(8, 4, 3, 2, 1, 1), nn.ReLU(),
                                                   nn.ConvTranspose2d(4, 1, 3, 2, 1, 1), nn.Sigmoid()], images(1, 8)),
    "flow": sequential(GENERATIVE, lambda: [Coupling(6), Coupling(6), Coupling(6)], floats(x=(BATCH, 6))),
    "nerf": Network(GENERATIVE, lambda: Model(_nerf, net=nn.Sequential(nn.Linear(21, 16), nn.ReLU(), nn.Linear(16, 4))),
                    floats(x=(8, 3))),
    "transformer-encoder": Network(ATTENTION, lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2, enable_nested_tensor=False),
        floats(x=(BATCH, 6, 16)), sequence=("x",)),
    "transformer-encoder-prenorm": Network(ATTENTION, lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=True, activation="gelu"), 2,
        enable_nested_tensor=False), floats(x=(BATCH, 6, 16))),
    "transformer": Network(ATTENTION, lambda: Model(
        _translate, body=nn.Transformer(16, 2, 1, 1, 24, batch_first=True), head=nn.Linear(16, LABELS)),
        floats(x=(BATCH, 6, 16), y=(BATCH, 4, 16))),
    "multihead": Network(ATTENTION, lambda: Model(_attend, attend=nn.MultiheadAttention(
        8, 2, batch_first=True, add_bias_kv=True)), floats(x=(BATCH, 5, 8))),
    "linear-attention": Network(ATTENTION, lambda: Model(_linear_attention, qkv=nn.Linear(8, 12)),
                                floats(x=(BATCH, 5, 8))),
    "experts": Network("mixture of experts", lambda: Model(_experts, router=nn.Linear(6, 3), **{
        f"expert{k}": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)) for k in range(3)}),
        floats(x=(4, 6))),
    "mlp-mixer": sequential(MISC, lambda: [MixerBlock(5, 8), MixerBlock(5, 8)], floats(x=(BATCH, 5, 8))),
    "kan": sequential(MISC, lambda: [KAN(4, 6), KAN(6, 3)], floats(x=(4, 4))),
    "activations": sequential(MISC, _activation_layers, floats(x=(4, 8))),
    "dlrm": Network(MISC, lambda: Model(_dlrm, dense=nn.Linear(5, 4), top=nn.Linear(10, 1), **{
        f"table{k}": nn.EmbeddingBag(7, 4, mode="sum") for k in range(3)}),
        lambda rng: {**floats(x=(4, 5))(rng), "ids": rng.integers(0, 7, (4, 3, 2))}),
    "embedding-bag": sequential(MISC, lambda: [nn.EmbeddingBag(7, 4, mode="mean"), nn.Linear(4, 3)],
                                lambda rng: {"ids": rng.integers(0, 7, (4, 3))}),
    "memory": Network(MISC, Memory, lambda rng: {**floats(x=(4, 4))(rng), "index": np.array([1, 3, 0, 5])}),
    "graph-convolution": Network("graph", GraphConvolution, lambda rng: {
        **floats(x=(6, 4))(rng).copy(), "edges": rng.integers(0, 6, (2, 12))}),
    "graph-attention": Network("graph", GraphAttention, lambda rng: {
        **floats(x=(5, 4))(rng), "adjacency": (np.eye(5) + (rng.random((5, 5)) > 0.5) > 0).astype(np.int64)}),
    "cond": Network(MISC, Conditional, floats(x=(BATCH, 4))),
    "siamese": Network(MISC, lambda: Model(_siamese, net=nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))),
                       floats(a=(4, 6), b=(4, 6))),
    "bilinear": Network(MISC, lambda: Model(lambda m, a, b: m.mix(a, b), mix=nn.Bilinear(4, 5, 3)),
                        floats(a=(4, 4), b=(4, 5))),
    "spectral": Network(MISC, lambda: Model(_spectral, one=nn.Linear(6, 8), two=nn.Linear(8, 3)), floats(x=(4, 6))),
    "polynomial": Network(MISC, lambda: Model(_polynomial, a=nn.Linear(4, 4), b=nn.Linear(4, 3), c=nn.Linear(4, 2)),
                          floats(x=(4, 4))),
    "loss-inside": Network(MISC, lambda: Model(_losses, a=nn.Linear(6, LABELS)),
                           lambda rng: {**floats(x=(4, 6))(rng), "y": rng.integers(0, LABELS, 4)}, "none"),
    "embedding-mlp": sequential(MISC, lambda: [nn.Embedding(WORDS, 4), nn.Flatten(), nn.Linear(12, 8), nn.Softplus(),
                                               nn.Linear(8, 2)], lambda rng: {"ids": rng.integers(0, WORDS, (4, 3))}),
}  # fmt: skip
