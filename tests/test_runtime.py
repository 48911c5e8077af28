from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from helpers.forks import in_a_fork
from helpers.golden import with_golden_weights

from uvit import UNet, UViT
from uvit.common.errors import InputError
from uvit.networks.runtime import MIN_BF16_WIDTH, check_compile, compile_model, resolve_precision, tf32

SMALL = {"img_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "no")])
def test_auto_is_bf16_if_the_processor_supports_it_and_the_model_is_wide(has_bf16, expected, monkeypatch):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    assert resolve_precision("auto", "cpu", MIN_BF16_WIDTH) == expected
    assert resolve_precision("auto", "cpu", MIN_BF16_WIDTH - 2) == "no"
    assert resolve_precision("auto", "mps", 512) == "no"
    assert resolve_precision("no", "cpu", 512) == "no"


def test_what_cannot_run_is_refused(monkeypatch):
    with pytest.raises(InputError, match="'fp16' needs a CUDA device, got 'cpu'"):
        resolve_precision("fp16", "cpu", 512)
    with pytest.raises(InputError, match="compile 'graphs' needs a CUDA device, got 'cpu'"):
        check_compile("graphs", "cpu")
    monkeypatch.setattr("shutil.which", lambda _: None)
    check_compile("no", "cpu")
    with pytest.raises(InputError, match="compile 'blocks' needs a C\\+\\+ compiler"):
        check_compile("blocks", "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["blocks", "model"])
def test_a_compiled_model_is_the_same_model(how):
    model = UViT(**SMALL)
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 900.0]), torch.tensor([0, 2])
    expected = model(*inputs)
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    names = list(model.state_dict())
    compile_model(model, how)
    output = model(*inputs)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(output.square().sum(), list(model.parameters())), gradients, rtol=1e-3, atol=1e-4
    )
    assert list(model.state_dict()) == names


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=8)  # PyTorch's own, which importing timm.optim raises
def test_every_block_is_compiled_however_many_sizes_they_have():
    model = UNet(img_size=8, model_channels=32, channel_mult=(1, 2), attention_sizes=(4,), head_dim=32)
    with_golden_weights(model)
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 900.0])
    with torch.no_grad():
        expected = model(*inputs)
        compile_model(model, "blocks")
        torch._dynamo.utils.counters.clear()
        torch.testing.assert_close(model(*inputs), expected, rtol=1e-4, atol=1e-5)
    frames = torch._dynamo.utils.counters["frames"]
    assert 8 < frames["ok"] == frames["total"] <= len(model.blocks)


@pytest.mark.parametrize("checkpointing", [False, True])
@in_a_fork
def test_nothing_breaks_a_compiled_graph(checkpointing):
    model = UViT(**SMALL, gradient_checkpointing=checkpointing)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=keep, fullgraph=True)
    compiled(torch.randn(2, 3, 8, 8), torch.tensor([10.0, 900.0]), torch.tensor([0, 2])).sum().backward()
    assert len(graphs) == 1 and all(parameter.grad is not None for parameter in model.parameters())


def test_tf32_ends_with_its_block():
    before = torch.get_float32_matmul_precision()
    with tf32():
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


SHARE_OF_FAULTS = """
import resource, torch
from uvit.networks.runtime import set_up_process

set_up_process(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    tensors = [torch.ones(2**24) for _ in range(4)]  # 64 MB each
    del tensors
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(torch.get_num_threads(), faults * resource.getpagesize() / (10 * 4 * 2**26))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such option")
def test_memory_that_was_freed_is_used_again():
    """A page that the system gives anew is a fault; in a new process, whose main thread has glibc's main arena.

    The first of ten rounds needs new pages, a tenth of all; a later one does where small blocks have split a hole.
    """
    printed = subprocess.run([sys.executable, "-c", SHARE_OF_FAULTS], check=True, capture_output=True, text=True).stdout
    num_threads, share = printed.split()
    assert num_threads == "1" and float(share) < 0.5
