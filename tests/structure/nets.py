"""Small nets written by hand, each with a construction that is easy to cut wrongly, and what they take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

NETS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {}


def net(make: Callable[[], tuple[nn.Module, Any]]) -> Callable[[], tuple[nn.Module, Any]]:
    """Add a net to the table under its function's name."""
    NETS[make.__name__.replace("_", " ")] = make
    return make


def image(channels: int = 3, size: int = 12, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def rows(width: int = 10, count: int = 5) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1))


def tokens(width: int = 16, batch: int = 2, length: int = 7) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(1))


@net
def mlp():
    return nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 18), nn.Sigmoid(), nn.Linear(18, 4)), rows()


@net
def residual_convolutions():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(16)
            self.a = nn.Conv2d(16, 16, 3, padding=1)
            self.b = nn.Conv2d(16, 16, 3, padding=1)
            self.head = nn.Linear(16, 5)

        def forward(self, x):
            x = F.relu(self.norm(self.stem(x)))
            x = x + self.b(F.silu(self.a(x)))
            return self.head(x.mean((2, 3)))

    return Net(), image()


@net
def padded_shortcut():
    """He et al.'s option A: channels of the shortcut are padded with zeros."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 8, 3, padding=1)
            self.b = nn.Conv2d(8, 16, 3, padding=1, stride=2)
            self.c = nn.Conv2d(16, 16, 3, padding=1)
            self.head = nn.Linear(16, 5)

        def forward(self, x):
            x = F.relu(self.a(x))
            short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
            x = F.relu(self.c(F.relu(self.b(x))) + short)
            return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))

    return Net(), image()


@net
def dense_connections():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(6 + 8 * i, 8, 3, padding=1) for i in range(3))
            self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 8 * i) for i in range(3))
            self.stem = nn.Conv2d(3, 6, 1)
            self.head = nn.Conv2d(30, 4, 1)

        def forward(self, x):
            x = self.stem(x)
            for norm, layer in zip(self.norms, self.layers, strict=True):
                x = torch.cat([x, layer(F.relu(norm(x)))], 1)
            return self.head(x)

    return Net(), image()


@net
def u_net():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 8, 3, padding=1)
            self.b = nn.Conv2d(8, 16, 3, padding=1)
            self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
            self.c = nn.Conv2d(16, 8, 3, padding=1)
            self.norm = nn.GroupNorm(4, 8)
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x):
            first = F.relu(self.a(x))
            deep = F.relu(self.b(F.max_pool2d(first, 2)))
            joined = torch.cat([first, self.up(deep)], 1)
            return self.head(self.norm(self.c(joined)))

    return Net(), image()


@net
def depthwise_separable():
    return nn.Sequential(
        nn.Conv2d(3, 12, 1),
        nn.Conv2d(12, 12, 3, padding=1, groups=12),
        nn.BatchNorm2d(12),
        nn.Hardswish(),
        nn.Conv2d(12, 24, 3, padding=1, groups=12),
        nn.PReLU(24),
        nn.Conv2d(24, 4, 1),
    ), image()


@net
def grouped_convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 16, 1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.ConvTranspose2d(24, 12, 2, stride=2, groups=4),
        nn.ReLU(),
        nn.Conv2d(12, 3, 1),
    ), image()


@net
def group_norm_after_concat():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 24, 1)
            self.norm = nn.GroupNorm(4, 32)
            self.c = nn.Conv2d(32, 4, 1)

        def forward(self, x):
            return self.c(F.relu(self.norm(torch.cat([self.a(x), self.b(x)], 1))))

    return Net(), image()


@net
def channel_shuffle():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 16, 1)
            self.b = nn.Conv2d(16, 16, 3, padding=1, groups=4)
            self.c = nn.Conv2d(16, 16, 1, groups=4)
            self.head = nn.Conv2d(16, 4, 1)

        def forward(self, x):
            x = self.b(F.relu(self.a(x)))
            n, c, h, w = x.shape
            x = x.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)
            return self.head(F.relu(self.c(x)))

    return Net(), image()


@net
def split_bottlenecks():
    """YOLO's C2f: a chunk in two halves, one of which grows branches, all concatenated."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cv1, self.m1 = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 8, 3, padding=1)
            self.m2, self.cv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(32, 6, 1)

        def forward(self, x):
            y = list(F.silu(self.cv1(x)).chunk(2, 1))
            y.append(F.silu(self.m1(y[-1])))
            y.append(F.silu(self.m2(y[-1])) + y[-1])
            return self.cv2(torch.cat(y, 1))

    return Net(), image()


@net
def squeeze_and_excitation():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.down, self.up = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 6, 1), nn.Conv2d(6, 16, 1)
            self.head = nn.Conv2d(16, 4, 1)

        def forward(self, x):
            x = self.a(x)
            gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
            return self.head(x * gate)

    return Net(), image()


@net
def pixel_shuffle():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.PixelShuffle(2),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.PixelUnshuffle(2),
        nn.Conv2d(24, 3, 1),
    ), image()


@net
def linear_into_feature_maps():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(10, 12 * 4 * 4), nn.Conv2d(12, 8, 3), nn.Linear(8 * 2 * 2, 5)

        def forward(self, x):
            x = F.relu(self.a(x)).view(x.shape[0], -1, 4, 4)
            return self.c(F.relu(self.b(x)).flatten(1))

    return Net(), rows()


@net
def einsum_attention():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Parameter(torch.randn(16, 4, 6) * 0.3) for _ in range(3))
            self.o = nn.Parameter(torch.randn(4, 6, 16) * 0.3)

        def forward(self, x):
            q, k, v = (torch.einsum("btc,chd->bhtd", x, w) for w in (self.q, self.k, self.v))
            weights = torch.einsum("bhtd,bhsd->bhts", q, k).softmax(-1)
            return torch.einsum("bhtd,hdc->btc", torch.einsum("bhts,bhsd->bhtd", weights, v), self.o)

    return Net(), tokens()


@net
def attention_by_attributes():
    """Fused projections, heads counted by attributes, as in many vision transformers."""

    class Attention(nn.Module):
        def __init__(self, width, heads):
            super().__init__()
            self.heads, self.size = heads, width // heads
            self.scale = self.size**-0.5
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = self.qkv(x).view(b, t, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
            x = ((q @ k.transpose(-2, -1)) * self.scale).softmax(-1) @ v
            return self.out(x.transpose(1, 2).reshape(b, t, self.heads * self.size))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Linear(16, 24), nn.Linear(24, 3)
            self.norm, self.attention = nn.LayerNorm(24), Attention(24, 4)
            self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)

        def forward(self, x):
            x = self.embed(x)
            x = x + self.attention(self.norm(x))
            return self.head(x + self.down(F.gelu(self.up(x))))

    return Net(), tokens()


@net
def grouped_queries():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16)
            self.o = nn.Linear(32, 16)

        def forward(self, x):
            b, t, _ = x.shape
            q = self.q(x).view(b, t, -1, 4).transpose(1, 2)
            k, v = (f(x).view(b, t, -1, 4).transpose(1, 2) for f in (self.k, self.v))
            times = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
            x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.o(x.transpose(1, 2).flatten(2))

    return Net(), tokens()


@net
def reshapes_between_heads():
    """(4, 6) heads become (8, 3) heads on the way: only what both have in common can go."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.mix, self.b = nn.Linear(16, 24), nn.Parameter(torch.randn(8, 8)), nn.Linear(24, 5)

        def forward(self, x):
            b, t, _ = x.shape
            x = self.a(x).view(b, t, 4, -1)
            x = torch.tanh(x).reshape(b, t, 8, -1)
            x = torch.einsum("bthd,hg->btgd", x, self.mix)
            return self.b(x.flatten(2))

    return Net(), tokens()


class Recurrent(nn.Module):
    """A recurrent net between two linear layers."""

    def __init__(self, kind, **options):
        super().__init__()
        self.a = nn.Linear(16, 12)
        self.rnn = kind(12, 20, batch_first=True, **options)
        self.b = nn.Linear(20 * (2 if options.get("bidirectional") else 1), 4)

    def forward(self, x):
        return self.b(self.rnn(self.a(x))[0])


@net
def lstm():
    return Recurrent(nn.LSTM, num_layers=2), tokens()


@net
def bidirectional_gru():
    return Recurrent(nn.GRU, num_layers=2, bidirectional=True), tokens()


@net
def multihead_attention():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.attention = nn.Linear(10, 24), nn.MultiheadAttention(24, 4, batch_first=True)
            self.up, self.down, self.b = nn.Linear(24, 32), nn.Linear(32, 24), nn.Linear(24, 3)

        def forward(self, x):
            x = self.a(x)
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return self.b(x + self.down(F.gelu(self.up(x))))

    return Net(), tokens(10)


@net
def transformer_encoder():
    layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True)
    return nn.Sequential(nn.Linear(10, 24), nn.TransformerEncoder(layer, 2), nn.Linear(24, 3)), tokens(10)


@net
def shared_module():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.same, self.b = nn.Linear(10, 16), nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            x = F.relu(self.a(x))
            for _ in range(3):
                x = F.relu(self.same(x)) + x
            return self.b(x)

    return Net(), rows()


@net
def tied_weights():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.up, self.down = nn.Embedding(30, 12), nn.Linear(12, 20), nn.Linear(20, 12)

        def forward(self, ids):
            x = self.table(ids)
            x = x + self.down(F.relu(self.up(x)))
            return x @ self.table.weight.t()

    return Net(), torch.arange(14).view(2, 7)


@net
def weight_normalization():
    return nn.Sequential(
        weight_norm(nn.Linear(10, 20)), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 3)
    ), rows()


@net
def spectral_like_parametrization():
    class Symmetric(nn.Module):
        def forward(self, x):
            return x.triu() + x.triu(1).t()

    net = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    torch.nn.utils.parametrize.register_parametrization(net[2], "weight", Symmetric())
    return net, rows()


@net
def low_rank_adapter():
    """x W + s (x A) B, as PEFT's LoRA layers compute it; the rank is a coupling of its own."""

    class Adapted(nn.Module):
        def __init__(self, width, out):
            super().__init__()
            self.base_layer = nn.Linear(width, out)
            self.lora_A, self.lora_B = nn.Linear(width, 4, bias=False), nn.Linear(4, out, bias=False)

        def forward(self, x):
            return self.base_layer(x) + 2.0 * self.lora_B(self.lora_A(x))

    return nn.Sequential(Adapted(10, 20), nn.ReLU(), Adapted(20, 16), nn.ReLU(), nn.Linear(16, 3)), rows()


@net
def masked_by_torch():
    net = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 3))
    prune.random_unstructured(net[0], "weight", 0.5)
    return net, rows()


@net
def forward_hook():
    """A hook scales the output by a buffer of the same width."""
    net = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 3))
    net[0].register_buffer("gain", torch.rand(20) + 0.5)
    net[0].register_forward_hook(lambda module, args, output: output * module.gain)
    return net, rows()


@net
def bilinear_form():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.form = nn.Linear(10, 8), nn.Linear(10, 6), nn.Bilinear(8, 6, 5)
            self.c = nn.Linear(5, 3)

        def forward(self, x):
            return self.c(F.relu(self.form(torch.tanh(self.a(x)), torch.tanh(self.b(x)))))

    return Net(), rows()


@net
def gated_halves():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(10, 32), nn.Linear(16, 3)

        def forward(self, x):
            a, b = self.up(x).chunk(2, -1)
            return self.down(F.silu(a) * b)

    return Net(), rows()


@net
def rms_norm():
    class Norm(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))

        def forward(self, x):
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)

    return nn.Sequential(nn.Linear(10, 16), Norm(16), nn.Linear(16, 12), nn.RMSNorm(12), nn.Linear(12, 3)), rows()


@net
def convolution_over_time():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.conv, self.b = nn.Linear(16, 12), nn.Conv1d(12, 12, 4, groups=12, padding=3), nn.Linear(12, 5)

        def forward(self, x):
            x = self.conv(self.a(x).transpose(1, 2))[..., : x.shape[1]]
            return self.b(F.silu(x).transpose(1, 2))

    return Net(), tokens()


@net
def in_place_writes():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(10, 16), nn.Linear(16, 3)

        def forward(self, x):
            x = self.a(x)
            x[:, :4] = 0.5
            x[:, 4:].mul_(2)
            return self.b(x.relu_())

    return Net(), rows()


@net
def fixed_view():
    """A size that is written into the code: cannot follow, must be refused."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.up, self.down = nn.Linear(10, 16), nn.Linear(16, 3), nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = self.a(x).view(-1, 4, 4).sum(1, keepdim=True).expand(-1, 4, 4).reshape(-1, 16)
            return self.down(F.relu(self.up(self.b(x))))

    return Net(), rows()


@net
def softmax_over_channels():
    return nn.Sequential(nn.Linear(10, 16), nn.Softmax(-1), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)), rows()


@net
def spectral_norm():
    from torch.nn.utils.parametrizations import spectral_norm as normalized

    return nn.Sequential(
        nn.Linear(10, 16), nn.ReLU(), normalized(nn.Linear(16, 12)), nn.ReLU(), nn.Linear(12, 3)
    ), rows()


@net
def tokens_mixed_by_a_pointwise_convolution():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.mix, self.b = nn.Linear(16, 12), nn.Conv1d(7, 7, 1), nn.Linear(12, 5)

        def forward(self, x):
            x = F.gelu(self.a(x))
            return self.b(x * self.mix(x))

    return Net(), tokens()


@net
def fourier_mixing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 12), nn.Linear(12, 5)

        def forward(self, x):
            return self.b(torch.fft.irfft(torch.fft.rfft(self.a(x), dim=1), n=x.shape[1], dim=1))

    return Net(), tokens()


@net
def bag_of_embeddings():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.a = nn.EmbeddingBag(20, 12, mode="mean"), nn.Linear(12, 5)

        def forward(self, ids):
            return self.a(torch.tanh(self.table(ids)))

    return Net(), torch.randint(20, (4, 6), generator=torch.Generator().manual_seed(1))


@net
def sampled_by_a_grid():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.where, self.b = nn.Conv2d(3, 12, 3), nn.Linear(12, 6), nn.Conv2d(12, 4, 1)

        def forward(self, x):
            x = F.relu(self.a(x))
            grid = F.affine_grid(self.where(x.mean((2, 3))).view(-1, 2, 3), [len(x), 12, 6, 6], align_corners=False)
            return self.b(F.grid_sample(x, grid, align_corners=False))

    return Net(), image()


@net
def distances_to_centers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.centers, self.b = nn.Linear(10, 12), nn.Parameter(torch.randn(6, 12)), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(torch.cdist(self.a(x), self.centers))

    return Net(), rows()


@net
def channel_shuffle_of_torch():
    return (
        nn.Sequential(
            nn.Conv2d(3, 12, 1), nn.ReLU(), nn.ChannelShuffle(3), nn.Conv2d(12, 12, 3, groups=3), nn.Conv2d(12, 4, 1)
        ),
        image(),
    )


@net
def recurrent_with_a_state():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.start, self.gru, self.out = nn.Linear(16, 12), nn.GRU(16, 12, batch_first=True), nn.Linear(12, 5)

        def forward(self, x):
            return self.out(self.gru(x, torch.tanh(self.start(x[:, 0]))[None])[0])

    return Net(), tokens()


@net
def packed_sequences():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.lstm, self.out = nn.Linear(16, 10), nn.LSTM(10, 12, batch_first=True), nn.Linear(12, 5)

        def forward(self, x):
            pack, unpack = nn.utils.rnn.pack_padded_sequence, nn.utils.rnn.pad_packed_sequence
            packed = pack(self.a(x), torch.tensor([7, 4]), batch_first=True)
            return self.out(unpack(self.lstm(packed)[0], batch_first=True)[0])

    return Net(), tokens()


@net
def head_size_from_the_width():
    """As small GPTs are written: the size of a head is not kept, the code divides the width by the number of heads."""

    class Block(nn.Module):
        def __init__(self, width, heads):
            super().__init__()
            self.heads, self.width = heads, width
            self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
            self.together, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

        def forward(self, x):
            batch, length, width = x.shape
            parts = self.together(self.before(x)).split(self.width, dim=2)
            q, k, v = (t.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for t in parts)
            scores = q @ k.transpose(-2, -1) / k.size(-1) ** 0.5
            mixed = (scores.softmax(-1) @ v).transpose(1, 2).contiguous().view(batch, length, width)
            x = x + self.out(mixed)
            return x + self.down(F.gelu(self.up(self.after(x))))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.places = nn.Embedding(20, 24), nn.Embedding(12, 24)
            self.blocks = nn.ModuleList([Block(24, 4) for _ in range(2)])
            self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 20, bias=False)

        def forward(self, ids):
            x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    return Net(), torch.arange(14).reshape(2, 7)


@net
def windows_of_two_widths():
    """Attention in windows with a bias of places, in two stages whose widths and heads go together, stage by stage."""

    class Window(nn.Module):
        def __init__(self, width, heads):
            super().__init__()
            self.heads, self.scale = heads, (width // heads) ** -0.5
            self.bias = nn.Parameter(torch.randn(9, heads) * 0.1)
            self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
            places = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
            apart = (places[:, :, None] - places[:, None]).permute(1, 2, 0) + 1
            self.register_buffer("index", apart[..., 0] * 3 + apart[..., 1])

        def forward(self, x):
            batch, height, _, width = x.shape
            y = self.norm(x).view(batch, height // 2, 2, height // 2, 2, width).transpose(2, 3).reshape(-1, 4, width)
            parts = self.qkv(y).reshape(len(y), 4, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
            bias = self.bias[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)
            scores = (parts[0] * self.scale) @ parts[1].transpose(-2, -1) + bias
            y = self.out((scores.softmax(-1) @ parts[2]).transpose(1, 2).reshape(-1, 4, width))
            y = y.view(batch, height // 2, height // 2, 2, 2, width).transpose(2, 3)
            return x + y.reshape(batch, height, height, width)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 18, 2, 2)
            self.first, self.second = Window(18, 3), Window(36, 6)
            self.merge, self.head = nn.Linear(72, 36, bias=False), nn.Linear(36, 5)

        def forward(self, x):
            x = self.first(self.patches(x).permute(0, 2, 3, 1))
            x = torch.cat([x[:, ::2, ::2], x[:, 1::2, ::2], x[:, ::2, 1::2], x[:, 1::2, 1::2]], -1)
            return self.head(self.second(self.merge(x)).mean((1, 2)))

    return Net(), image(size=16)


@net
def view_that_counts_in_fours():
    """As generators are written: the first feature map has four times as many channels as an attribute says."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = 8
            self.start, self.norm = nn.Linear(10, 4 * self.base * 9), nn.BatchNorm2d(4 * self.base)
            self.a = nn.ConvTranspose2d(4 * self.base, 2 * self.base, 4, 2, 1)
            self.b = nn.ConvTranspose2d(2 * self.base, 3, 4, 2, 1)

        def forward(self, x):
            x = F.relu(self.norm(self.start(x).view(-1, self.base * 4, 3, 3)))
            return torch.tanh(self.b(F.relu(self.a(x))))

    return Net(), rows()


@net
def repeated_keys_by_the_width():
    """Grouped queries in one module for all layers, the size of a head again divided out of the width."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads, self.groups = 4, 2
            self.enter, self.head = nn.Linear(16, 24), nn.Linear(24, 5)
            for name, width in {"q": 24, "k": 12, "v": 12, "o": 24}.items():
                setattr(self, name, nn.ModuleList([nn.Linear(24, width) for _ in range(2)]))

        def forward(self, x):
            x = self.enter(x)
            batch, length, width = x.shape
            for q, k, v, o in zip(self.q, self.k, self.v, self.o, strict=True):
                size = width // self.heads
                asked = q(x).view(batch, length, self.heads, size).transpose(1, 2)
                pairs = [m(x).view(batch, length, self.groups, size).transpose(1, 2) for m in (k, v)]
                keys, values = (t.repeat_interleave(self.heads // self.groups, 1) for t in pairs)
                mixed = F.scaled_dot_product_attention(asked, keys, values, is_causal=True)
                x = x + o(mixed.transpose(1, 2).reshape(batch, length, width))
            return self.head(x)

    return Net(), tokens()


@dataclass
class Sizes:
    """What the nets of some repositories take."""

    heads: int = 4
    size: int = 5


@net
def sizes_in_records():
    """A namespace, a dataclass and a dictionary of settings, which belong to the caller."""

    class Attention(nn.Module):
        def __init__(self, settings):
            super().__init__()
            self.settings = settings
            self.enter, self.out = nn.Linear(16, 60), nn.Linear(20, 16)

        def forward(self, x):
            read = self.settings.__getitem__ if isinstance(self.settings, dict) else partial(getattr, self.settings)
            q, k, v = self.enter(x).view(*x.shape[:2], 3, read("heads"), read("size")).permute(2, 0, 3, 1, 4)
            mixed = (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v
            return x + self.out(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))

    records = [SimpleNamespace(heads=4, size=5), Sizes(), {"heads": 4, "size": 5}]
    return nn.Sequential(nn.Linear(16, 16), *map(Attention, records), nn.Linear(16, 4)), tokens()


@net
def sizes_that_are_only_compared():
    class Checked(nn.Module):
        def __init__(self, width, inner):
            super().__init__()
            self.width, self.inner = width, inner
            self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

        def forward(self, x):
            assert x.shape[-1] == self.width, "wrong width"
            y = F.gelu(self.up(x))
            if y.shape[-1] != self.inner:
                raise ValueError("wrong inner width")
            return x + self.down(y)

    return nn.Sequential(nn.Linear(10, 12), Checked(12, 18), Checked(12, 20), nn.Linear(12, 3)), rows()


@net
def encoder_and_decoder():
    """torch's own: it compares widths with one that it was made with."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(30, 16)
            self.both = nn.Transformer(16, 4, 1, 1, 24, batch_first=True)
            self.head = nn.Linear(16, 5)

        def forward(self, source, target):
            return self.head(self.both(self.tokens(source), self.tokens(target)))

    return Net(), (torch.arange(10).reshape(2, 5), torch.arange(12).reshape(2, 6))


@net
def attention_by_maxima():
    """CBAM: channels are weighed by their maxima over space, places by the maximum and mean over channels."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.next = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
            self.squeeze, self.excite = nn.Linear(16, 6), nn.Linear(6, 16)
            self.places, self.head = nn.Conv2d(2, 1, 3, padding=1), nn.Linear(12, 4)

        def forward(self, x):
            x = F.relu(self.stem(x))
            pooled = self.excite(F.relu(self.squeeze(x.amax((2, 3))))) + self.excite(
                F.relu(self.squeeze(x.mean((2, 3))))
            )
            x = x * pooled.sigmoid()[:, :, None, None]
            both = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
            return self.head(F.relu(self.next(x * self.places(both).sigmoid())).mean((2, 3)))

    return Net(), image()


@net
def channel_that_is_largest():
    """Where the place of a maximum is read, the channels have to stay."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.table, self.head = nn.Linear(10, 12), nn.Embedding(12, 6), nn.Linear(6, 3)

        def forward(self, x):
            size, place = self.a(x).max(1)
            return self.head(self.table(place) * size[:, None])

    return Net(), rows()


@net
def table_of_places():
    """Longer than the inputs: its last rows are not used on these, and have to stay for others."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.places, self.row = nn.Parameter(torch.randn(1, 20, 12)), nn.Parameter(torch.randn(15, 12))
            self.enter, self.leave = nn.Linear(16, 12), nn.Linear(12, 4)

        def forward(self, x):
            length = x.shape[1]
            x = self.enter(x) + self.places[:, :length].to(x.dtype)
            return self.leave(x * torch.split(self.row.clone(), [length, 15 - length])[0])

    return Net(), tokens()


@net
def scale_of_the_queries():
    """All three in one matrix; the scale is read off the size of a head, so that only whole heads may go."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads, self.together, self.out = 4, nn.Linear(16, 60), nn.Linear(20, 3)

        def forward(self, x):
            q, k, v = self.together(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
            return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    return Net(), tokens()


@net
def biases_put_together():
    """As BEiT: keys have no bias, and the three parts are concatenated in forward."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads, self.scale = 4, 0.5
            self.weight, self.out = nn.Linear(16, 60, bias=False), nn.Linear(20, 3)
            self.q_bias, self.v_bias = nn.Parameter(torch.randn(20)), nn.Parameter(torch.randn(20))

        def forward(self, x):
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias))
            parts = F.linear(x, self.weight.weight, bias).reshape(*x.shape[:2], 3, self.heads, -1)
            q, k, v = parts.permute(2, 0, 3, 1, 4)
            scores = (q * self.scale) @ k.transpose(-1, -2)
            return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(*x.shape[:2], -1))

    return Net(), tokens()


@net
def heads_that_norms_run_over():
    """A GroupNorm whose groups are the heads: whole ones may go."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads, self.norm = 3, nn.GroupNorm(3, 15)
            self.read, self.write, self.out = nn.Linear(16, 15), nn.Linear(16, 15), nn.Linear(15, 4)

        def forward(self, x):
            batch, length, _ = x.shape
            r, w = (m(x).view(batch, length, self.heads, -1) for m in (self.read, self.write))
            mixed = (r * w.cumsum(1)).reshape(batch * length, -1)
            return self.out(self.norm(mixed).view(batch, length, -1))

    return Net(), tokens()


@net
def attention_with_tokens_of_its_own():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.leave = nn.Linear(16, 12), nn.Linear(12, 4)
            self.attention = nn.MultiheadAttention(12, 4, batch_first=True, add_bias_kv=True, add_zero_attn=True)

        def forward(self, x):
            x = self.enter(x)
            return self.leave(x + self.attention(x, x, x)[0])

    return Net(), tokens()


@net
def sampled_by_heads():
    """Deformable attention: heads are among the batch where they are sampled."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = 4
            self.shift, self.weigh, self.value = nn.Linear(16, 16), nn.Linear(16, 8), nn.Conv2d(3, 12, 1)
            self.out = nn.Linear(12, 5)

        def forward(self, x, image):
            batch, length, _ = x.shape
            value = self.value(image).reshape(batch * self.heads, -1, *image.shape[2:])
            places = self.shift(x).tanh().view(batch, length, self.heads, 2, 2).transpose(1, 2).flatten(0, 1)
            seen = F.grid_sample(value, places, align_corners=False)  # [batch heads, size, length, 2]
            weights = self.weigh(x).view(batch, length, self.heads, 2).transpose(1, 2).flatten(0, 1)
            mixed = (seen * weights.softmax(-1)[:, None]).sum(-1)
            return self.out(mixed.view(batch, self.heads, -1, length).flatten(1, 2).transpose(1, 2))

    return Net(), (tokens(), image())


@net
def heads_in_halves():
    """The first half of the heads does something else, and which these are is counted by half of an attribute."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = 8
            self.enter, self.leave = nn.Linear(16, 32), nn.Linear(32, 6)

        def forward(self, x):
            x = self.enter(x).view(*x.shape[:2], self.heads, -1)
            half = self.heads // 2
            return self.leave(torch.cat([x[:, :, :half].tanh(), x[:, :, half:].square()], 2).flatten(2))

    return Net(), tokens()
