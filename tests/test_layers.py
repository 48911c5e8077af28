from __future__ import annotations

import dataclasses

import torch

from uvit import UViT
from uvit.networks.layers import Block, HeadNorm, timestep_embedding


def test_queries_are_normed_in_their_own_precision():
    norm, x = HeadNorm(8, eps=1e-6), 1e-3 * torch.randn(2, 8)
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_adaln_equals_the_formula_of_the_paper(tiny):
    model = UViT(tiny, time_conditioning="adaln")
    norm, time, h = model.in_blocks[0].norm1, torch.randn(2, 32), torch.randn(2, 5, 32)
    scale, shift = norm.proj(time).chunk(2, dim=-1)
    expected = scale[:, None] * torch.nn.functional.layer_norm(h, (32,)) + shift[:, None]
    torch.testing.assert_close(norm(h, time), expected)


def test_time_embedding_is_cosines_then_sines_at_full_precision():
    embedding = timestep_embedding(torch.tensor([500.0]), 8)
    frequencies = 10_000 ** (-torch.arange(4) / 4)
    expected = torch.cat([(500 * frequencies).cos(), (500 * frequencies).sin()])
    torch.testing.assert_close(embedding[0], expected)
    # Derivatives of double precision need an embedding of it.
    double = timestep_embedding(torch.tensor([500.0], dtype=torch.float64), 8)
    torch.testing.assert_close(double[0], expected.double(), rtol=0, atol=1e-4)
    assert timestep_embedding(torch.tensor([500]), 8).dtype == torch.float32
    assert timestep_embedding(torch.tensor([500.0], dtype=torch.bfloat16), 8).dtype == torch.float32
    assert timestep_embedding(torch.empty(2, device="meta"), 8).is_meta
    torch.set_default_dtype(torch.float64)
    try:
        assert timestep_embedding(torch.tensor([500.0], dtype=torch.float32), 8).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_block_without_a_skip_passes_its_input_on(tiny):
    x, skip = torch.randn(2, 1, 5, 32)
    assert Block(dataclasses.replace(tiny, skip="none"), deep=True).merge(x, skip) is x
    assert Block(dataclasses.replace(tiny, skip="add")).merge(x, skip) is x, "a shallow one"
