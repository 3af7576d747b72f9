"""Norms the way real models write them: each takes (x, weight, bias) and normalises the last dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F

EPS = 1e-5


def rms_functional(x, weight, bias):
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def rms_default_eps(x, weight, bias):
    return F.rms_norm(x, x.shape[-1:], weight)


def rms_no_weight(x, weight, bias):
    return F.rms_norm(x, x.shape[-1:], None, EPS)


def rms_llama(x, weight, bias):
    dtype = x.dtype
    h = x.to(torch.promote_types(dtype, torch.float32))
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * h.to(dtype)


def rms_weight_before_cast(x, weight, bias):
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS) * weight).to(x.dtype)


def rms_gemma(x, weight, bias):
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return (h * (1.0 + weight.to(h.dtype))).type_as(x)


def rms_square_times_itself(x, weight, bias):
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    return (h * torch.rsqrt(EPS + (h * h).mean(-1, keepdim=True))).to(x.dtype) * weight


def rms_divided_by_root(x, weight, bias):
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    return (h / torch.sqrt(h.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight


def rms_power(x, weight, bias):
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    return (h * torch.pow(h.pow(2).mean(-1, keepdim=True) + EPS, -0.5)).to(x.dtype) * weight


def rms_sum_over_size(x, weight, bias):
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    return (h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) / x.shape[-1] + EPS)).to(x.dtype) * weight


def rms_einsum(x, weight, bias):
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    squares = torch.einsum("...h,...h->...", h, h)[..., None]
    return (h * torch.rsqrt(squares / x.shape[-1] + EPS)).to(x.dtype) * weight


def rms_regained_dimension(x, weight, bias):
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    return (h * torch.rsqrt(h.pow(2).mean(-1) + EPS)[..., None]).to(x.dtype) * weight


def rms_vector_norm(x, weight, bias):
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    length = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    return (h / torch.sqrt(length**2 / x.shape[-1] + EPS)).to(x.dtype) * weight


def rms_weight_times_value(x, weight, bias):
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    return (weight * h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def rms_weight_times_root(x, weight, bias):
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (1.0 + weight) * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return (h * scale).to(x.dtype)


def rms_with_bias(x, weight, bias):
    return rms_llama(x, weight, bias) + bias


def layer_functional(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def layer_no_bias(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, None, EPS)


def layer_no_affine(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], None, None, EPS)


def layer_written_out(x, weight, bias):
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = h - h.mean(-1, keepdim=True)
    h = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS)
    return (weight.to(h.dtype) * h).to(x.dtype)


def layer_centred_twice(x, weight, bias):
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    return (weight.to(h.dtype) * ((h - mean) * torch.rsqrt(variance + EPS))).to(x.dtype)


def layer_with_variance(x, weight, bias):
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    h = (h - h.mean(-1, keepdim=True)) * torch.rsqrt(h.var(-1, keepdim=True, unbiased=False) + EPS)
    return (h * weight + bias).to(x.dtype)


def layer_weight_before_root(x, weight, bias):
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    variance = h.var(-1, keepdim=True, unbiased=False)
    return (weight * (h - h.mean(-1, keepdim=True)) / torch.sqrt(variance + EPS) + bias).to(x.dtype)


def layer_einsum(x, weight, bias):
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    h = h - torch.einsum("...h->...", h)[..., None] / x.shape[-1]
    squares = torch.einsum("...h,...h->...", h, h)[..., None]
    return (h / torch.sqrt(squares / x.shape[-1] + EPS) * weight + bias).to(x.dtype)


def layer_regained_dimension(x, weight, bias):
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    h = (h - h.mean(-1)[..., None]) / torch.sqrt(h.var(-1, unbiased=False) + EPS).unsqueeze(-1)
    return (h * weight + bias).to(x.dtype)


RMS = [fn for name, fn in list(globals().items()) if name.startswith("rms_")]
LAYER = [fn for name, fn in list(globals().items()) if name.startswith("layer_")]
ALL = RMS + LAYER
