from __future__ import annotations

import pytest

from uvit import UViTConfig
from uvit.common.errors import InputError

BAD_MODELS = [
    ({"depth": 3}, "depth must be even and at least 2, got 3"),
    ({"depth": 0}, "depth must be even and at least 2, got 0"),
    ({"num_heads": 5}, "embed_dim 512 must be divisible by num_heads 5"),
    ({"img_size": 33}, "img_size must be divisible by patch_size 2, got 33"),
    ({"img_size": (32, 33)}, r"img_size must be divisible by patch_size 2, got \(32, 33\)"),
    ({"img_size": 0}, "img_size must be at least 1, got 0"),
    ({"attention": "flash"}, "attention must be one of 'auto', 'xformers', 'sdpa', 'math', got 'flash'"),
    ({"attention": "xformer"}, "got 'xformer', did you mean 'xformers'?"),
    ({"skip": "cat"}, "skip must be one of"),
    ({"embed_dim": 0}, "embed_dim must be at least 1, got 0"),
    ({"embed_dim": "512"}, "embed_dim must be int, got '512'"),
    ({"embed_dim": 511, "num_heads": 7}, "embed_dim must be even"),
    ({"qk_norm": 1}, "qk_norm must be bool, got 1"),
    ({"mlp_ratio": 0.001}, "mlp_ratio must be at least 1 / embed_dim, got 0.001"),
    ({"mlp_ratio": float("nan")}, "mlp_ratio must be float, got nan"),
    ({"num_classes": -1}, "num_classes must be at least 0, got -1"),
    ({"null_class": True}, "null_class must be False where num_classes is 0"),
    ({"context_dim": 768}, "context_dim and num_context_tokens must both be"),
    ({"pos_embed": "sincos2d", "embed_dim": 6, "num_heads": 1}, "divisible by 4"),
    ({"patch_embed": "conv", "patch_size": 3, "img_size": 9}, "a power of 2"),
    ({"patch_bottleneck": -1}, "patch_bottleneck must be at least 0, got -1"),
    ({"patch_bottleneck": 8, "patch_embed": "conv"}, "patch_bottleneck must be 0 with patch_embed 'conv', got 8"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_MODELS)
def test_errors_name_the_given_and_the_expected_value(fields, message):
    with pytest.raises(InputError, match=message):
        UViTConfig(**fields)


def test_counts_of_tokens_and_labels():
    config = UViTConfig(num_classes=10, null_class=True, context_dim=8, num_context_tokens=77)
    assert config.num_extra_tokens == 1 + 1 + 77
    assert config.null_label == 10
    assert UViTConfig(num_classes=10).null_label is None
    assert UViTConfig(time_conditioning="adaln").num_extra_tokens == 0
