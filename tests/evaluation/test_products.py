"""Which operations count as products, and that watching ends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitbrush.evaluation.products import PRODUCT, ProductWatch


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        *((name, True) for name in (
            "mm", "addmm", "bmm", "baddbmm", "mv", "_int_mm", "_scaled_mm", "linear", "mkldnn_convolution", "matmul",
            "_slow_conv2d_forward", "cudnn_convolution", "gemv_4bit", "int8_linear_matmul", "_weight_int4pack_mm",
            "gemm_4bit", "_sparse_semi_structured_mm", "int4mm_packed_weight_cpu", "qlinear_pointwise",
        )),
        *((name, False) for name in (
            "mul", "add", "sum", "_softmax", "native_group_norm", "dequantize_4bit", "embedding", "silu", "copy_",
            "cumsum", "_convert_weight_to_int4pack", "layer_norm", "dequantize_blockwise", "clamp_min", "resolve_conj",
        )),
    ],
)  # fmt: skip
def test_what_a_product_is_called(name: str, counts: bool) -> None:
    assert bool(PRODUCT.search(name)) is counts


class Inside(nn.Module):
    """A layer that decodes, multiplies, and adds something small."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = torch.ones(256, 256, dtype=torch.int8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.codes.float() * 0.5) + (x[:1, :2] @ self.codes[:2, :1].float())


def test_the_longest_product_is_the_layers() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten(1), Inside(), nn.ReLU())
    layers = {"0": model[0], "2": model[2], "3": model[3]}
    with ProductWatch(model, layers) as watch:
        for _ in range(2):
            model(torch.randn(64, 1, 18, 18))
    assert set(watch.found) == {"0", "2"}, "the activation has no product"
    assert "conv" in watch.found["0"]["operation"] and watch.found["2"] == {"operation": "aten::mm"}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_profiler_ends_with_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RuntimeError), ProductWatch(model, {"0": model[0]}):
        model(torch.ones(1, 3))
    assert not torch._C._autograd._profiler_enabled()
    with ProductWatch(model, {"0": model[0]}) as watch:
        model(torch.ones(1, 2))
    assert watch.found == {"0": {"operation": "aten::addmm"}}
