from __future__ import annotations

import importlib.util

import pytest
import torch

from uvit.attention import attention, resolve_backend
from uvit.errors import InputError

needs_xformers = pytest.mark.skipif(importlib.util.find_spec("xformers") is None, reason="xformers is not installed")


def reference(q, k, v):
    """One head, one query at a time."""
    output = torch.zeros_like(v)
    for batch in range(q.shape[0]):
        for head in range(q.shape[2]):
            for query in range(q.shape[1]):
                scores = torch.stack([q[batch, query, head] @ key for key in k[batch, :, head]]) / q.shape[-1] ** 0.5
                output[batch, query, head] = scores.exp() / scores.exp().sum() @ v[batch, :, head]
    return output


@pytest.mark.parametrize("backend", ["auto", "sdpa", "math"])
def test_backends_compute_attention(backend):
    q, k, v = torch.randn(3, 2, 5, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(attention(q, k, v, backend), reference(q, k, v))


def test_auto_follows_the_device():
    assert resolve_backend("auto", "cpu", 64) == "sdpa"
    assert resolve_backend("auto", "mps", 64) == "sdpa"


@needs_xformers
def test_auto_takes_xformers_on_cuda_where_it_can_run():
    assert resolve_backend("auto", "cuda", 72) == "xformers"
    assert resolve_backend("auto", "cuda", 36) == "sdpa"
    with pytest.raises(InputError, match="divisible by 8, got 36"):
        resolve_backend("xformers", "cuda", 36)


def test_explicit_backends_that_cannot_run():
    q = torch.randn(1, 2, 1, 8)
    with pytest.raises(InputError, match=r"'xformers' needs a CUDA device, got 'cpu': use 'sdpa'"):
        attention(q, q, q, "xformers")
    with pytest.raises(InputError, match=r"must be one of .*got 'flash'"):
        attention(q, q, q, "flash")


@pytest.mark.gpu
@needs_xformers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xformers_equals_math_on_cuda(dtype):
    q, k, v = torch.randn(3, 2, 257, 8, 64, device="cuda", dtype=dtype, requires_grad=True)
    expected = attention(q.double(), k.double(), v.double(), "math")
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(attention(q, k, v, "xformers").double(), expected, rtol=tolerance, atol=tolerance)


def test_auto_takes_the_formula_for_short_sequences_in_bf16_on_a_cpu_alone():
    assert resolve_backend("auto", "cpu", 64, 257, torch.bfloat16) == "math"
    assert resolve_backend("auto", "cpu", 64, 4096, torch.bfloat16) == "sdpa"
    assert resolve_backend("auto", "cpu", 64, 257, torch.float32) == "sdpa"
    assert resolve_backend("sdpa", "cpu", 64, 257, torch.bfloat16) == "sdpa"
