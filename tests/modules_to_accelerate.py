"""Modules as in transformers models, and our forwards for them on a CPU."""

import torch
from torch import nn

from paged_core.builtin.forwards import create_module_forward

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
DTYPES = list(TOLERANCE)


class Attention(nn.Module):
    """The three projections of attention in most models."""

    def __init__(self, bias=False, turned=False):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(48, n, bias=bias) for n in (64, 32, 32))

    def forward(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class GatedMLP(nn.Module):
    def __init__(self, bias=False, act=nn.SiLU):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(48, 100, bias=bias), nn.Linear(48, 100, bias=bias)
        self.down_proj, self.act_fn = nn.Linear(100, 48, bias=bias), act()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Conv1D(nn.Module):
    """A linear layer as in GPT-2."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / nx**0.5), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class LlamaNorm(nn.Module):
    def __init__(self, size=48, eps=1e-5):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class GemmaNorm(nn.Module):
    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(size)), eps

    def forward(self, x):
        wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).type_as(x)


def ask(module):
    return create_module_forward(module, CPU)


def accelerate(module):
    """Return forwards by module, asked for as a model adapter does: parents first, children only if the parent was left
    alone."""
    forward = ask(module)
    if forward is not None:
        return {module: forward}
    return {m: f for child in module.children() for m, f in accelerate(child).items()}
