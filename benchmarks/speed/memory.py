"""Peak memory of putting an SDXL UNet on the GPU and one eager step; a process for each form, which shares nothing.

Loading is drawing every tensor where it is to stay, as an artifact is loaded tensor by tensor from its file. On a CPU
(smoke runs) the bytes of all tensors stand in for the peak.
"""

from __future__ import annotations

import torch

from speed import networks, ours
from speed.models import Model
from speed.record import Item, Record

FORMS = ("bf16", "w4", "w4a8", "vq3")


def run(record: Record, model: Model, device: str, *, smoke: bool, wanted: list[str]) -> None:
    """The forms that are asked for (``bf16`` is one)."""
    for name in wanted:
        record.measure(name, 0 if smoke else 25, lambda name=name: peak(model, name, device, smoke=smoke))
    record.finish()


@torch.no_grad()
def peak(model: Model, name: str, device: str, *, smoke: bool) -> Item:
    """Bytes: after loading, and the most until one step is done."""
    form, dtype = networks.FORMS.get(name), torch.float32 if smoke else torch.bfloat16
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    net = networks.build(model, form, device, dtype)
    if form is not None:
        ours.choose(net, device, smoke=smoke)
    held = networks.weight_bytes(net)
    net(**model.arguments(device, dtype))
    if device != "cuda":
        return {"weight_bytes": held, "peak_bytes": held, "loaded_bytes": held}
    torch.cuda.synchronize()
    return {"weight_bytes": held, "peak_bytes": torch.cuda.max_memory_allocated() - before,
            "loaded_bytes": torch.cuda.memory_allocated() - before}  # fmt: skip
