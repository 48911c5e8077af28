from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from helpers.forks import in_a_fork
from torch._subclasses.fake_tensor import FakeTensorMode

from uvit.common.errors import InputError
from uvit.networks.attention import _ask_xformers, attention, resolve_backend, xformers_obstacle

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


def pretend_a_gpu(monkeypatch, has_kernels=True):
    """Makes xformers take a machine without a GPU for one with a Hopper; tensors must be fake."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr("xformers.ops.fmha.common._built_with_cuda", has_kernels)


@needs_xformers
def test_xformers_is_given_queries_keys_and_values_as_it_takes_them(monkeypatch):
    """Its own layout is (B, L, H, D)."""
    monkeypatch.setattr("uvit.networks.attention.resolve_backend", lambda *_: "xformers")
    monkeypatch.setattr("xformers.ops.memory_efficient_attention", reference)
    q, k, v = torch.randn(3, 2, 5, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(attention(q, k, v, "xformers"), reference(q, k, v), rtol=0, atol=0)


@needs_xformers
@in_a_fork
def test_auto_on_cuda_takes_xformers_where_it_runs(monkeypatch):
    pretend_a_gpu(monkeypatch)
    with FakeTensorMode():
        assert resolve_backend("auto", "cuda", 72, 257, torch.bfloat16) == "xformers"
        assert resolve_backend("auto", "cuda", 72, 257, torch.float32) == "sdpa"
        assert resolve_backend("xformers", "cuda", 72, 257, torch.bfloat16) == "xformers"
        with pytest.raises(InputError, match="attention 'xformers' has no kernel for these tensors"):
            resolve_backend("xformers", "cuda", 72, 257, torch.float32)


@in_a_fork
def test_auto_on_cuda_takes_sdpa_where_xformers_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert resolve_backend("auto", "cuda", 72, 257, torch.bfloat16) == "sdpa"
    with pytest.raises(InputError, match="attention 'xformers' is not installed: use 'sdpa' or 'auto'"):
        resolve_backend("xformers", "cuda", 72)


@needs_xformers
@in_a_fork
def test_the_obstacle_says_why_xformers_cannot_run(monkeypatch):
    pretend_a_gpu(monkeypatch)
    assert xformers_obstacle() == ""  # before a dtype is known nothing is imported
    with FakeTensorMode():
        assert xformers_obstacle(64, torch.float16) == xformers_obstacle(72, torch.bfloat16) == ""
        for dtype in (torch.float32, torch.float64):  # Dynamo cannot trace its kernel for fp32
            obstacle = xformers_obstacle(64, dtype)
            assert obstacle.startswith(f"has no kernel for these tensors (dtype={dtype} (supported: ")
        obstacle = xformers_obstacle(36, torch.bfloat16)
        assert obstacle.startswith("has no kernel for these tensors (query.shape[-1] % 8 != 0")
        for way in ("FwOp", "BwOp"):  # training needs both
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(f"xformers.ops.fmha.flash.{way}.not_supported_reasons", lambda inputs: ["too old"])
                assert xformers_obstacle(48, torch.bfloat16) == "has no kernel for these tensors (too old)"
            _ask_xformers.cache_clear()
        pretend_a_gpu(monkeypatch, has_kernels=False)
        assert "CUDA support)" in xformers_obstacle(64, torch.bfloat16)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    assert xformers_obstacle(80, torch.bfloat16).startswith("cannot be imported (")
    assert xformers_obstacle() == ""


@needs_xformers
@pytest.mark.parametrize("backend", ["xformers", "sdpa"])
@in_a_fork
def test_dynamo_traces_attention_on_cuda_in_one_graph(backend, monkeypatch):
    """On tensors without values, which need no device."""
    pretend_a_gpu(monkeypatch, has_kernels=backend == "xformers")
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    with FakeTensorMode():
        assert resolve_backend("auto", "cuda", 8, 17, torch.bfloat16) == backend  # Dynamo gets the same answer
        q, k, v = torch.empty(3, 2, 17, 4, 8, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        output = torch.compile(attention, backend=keep, fullgraph=True)(q, k, v)
    assert output.shape == (2, 17, 4, 8)
    assert ("scaled_dot_product_attention" in graphs[0]) == (backend == "sdpa")


def test_the_backend_is_chosen_by_the_tensors(monkeypatch):
    seen = []
    monkeypatch.setattr("uvit.networks.attention.resolve_backend", lambda *given: seen.append(given) or "math")
    q, k = torch.randn(2, 5, 3, 8, dtype=torch.float64), torch.randn(2, 7, 3, 8, dtype=torch.float64)
    attention(q, k, k, "auto")
    assert seen == [("auto", "cpu", 8, 5, torch.float64)]


def test_explicit_backends_that_cannot_run():
    q = torch.randn(1, 2, 1, 8)
    with pytest.raises(InputError, match=r"'xformers' needs a CUDA device, got 'cpu': use 'sdpa'"):
        attention(q, q, q, "xformers")
    with pytest.raises(InputError, match=r"must be one of .*got 'flash'"):
        attention(q, q, q, "flash")


def test_auto_takes_math_only_for_short_bf16_sequences_on_a_cpu():
    assert resolve_backend("auto", "cpu", 64, 257, torch.bfloat16) == "math"
    assert [resolve_backend("auto", "cpu", 64, length, torch.bfloat16) for length in (512, 513)] == ["math", "sdpa"]
    assert resolve_backend("auto", "mps", 64, 257, torch.bfloat16) == "sdpa"
    assert resolve_backend("auto", "cpu", 64, 4096, torch.bfloat16) == "sdpa"
    assert resolve_backend("auto", "cpu", 64, 257, torch.float32) == "sdpa"
    assert resolve_backend("sdpa", "cpu", 64, 257, torch.bfloat16) == "sdpa"
