"""pack: the stored codes become packed bytes, layer by layer, and every layer proves that nothing changed.

First a probe: what each layer is given in the sim face on a few samples (cropped, so it stays small), and what the
network answers. Then, block by block, a layer is packed, its float weight is freed, and it is compared with what the
simulation computed: codes and integer accumulators by equality, outputs within the computed bound.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from bitbrush.engine.run import Run
from bitbrush.engine.step import Step, UnitResult
from bitbrush.errors import NumericsError
from bitbrush.kernels.proof import prove_layer
from bitbrush.network import norms, wrap
from bitbrush.network.layers import QuantLayer
from bitbrush.network.survey import example_inputs

PROBE = "probe"


class Pack(Step):
    """Pack every layer.

    Args:
        samples: Samples of the probe.
        crop: Height, width (or tokens / crop) of the layer inputs kept for the proof; of a layer with groups of pixels
            one sample is kept whole.
    """

    samples: int = Field(default=2, ge=1)
    crop: int = Field(default=12, ge=1)

    @property
    def needs(self) -> tuple[str, ...]:
        """Ranges of everything that is quantized."""
        return ("fit weights", "codebooks", "fit activations")

    @property
    def not_after(self) -> tuple[str, ...]:
        """Packing is done once."""
        return ("pack",)

    def units(self, run: Run) -> list[str]:
        """The probe, then the blocks that hold something quantized."""
        layers = run.plan.layers.keys()
        return [PROBE, *(name for name, members in run.survey.blocks.items() if not layers.isdisjoint(members))]

    def run_unit(self, run: Run, unit: str, generator: torch.Generator) -> UnitResult:
        """Probe, or pack one block and prove it."""
        if unit == PROBE:
            return self._probe(run, generator)
        found = run.journal.find(self.label, PROBE)
        probe = found.tensors if found is not None else {}
        proofs: dict[str, Any] = {}
        layers = run.layers()
        for name in run.survey.blocks[unit]:
            if name in layers:
                proofs[name] = self._pack(run, layers[name], name, probe)
        return UnitResult(notes={"proof": proofs})

    def apply(self, run: Run, unit: str, result: UnitResult) -> None:
        """Pack the block's layers if this process has not yet done so."""
        if unit == PROBE:
            wrap.set_face(run.model, "sim")
        layers = run.layers()
        for name in run.survey.blocks.get(unit, ()):
            if name in layers and layers[name].face != "packed":
                layers[name].pack()
        if unit == self.units(run)[-1]:
            norms.fold(run.model)
            wrap.set_face(run.model, "packed")

    def _probe(self, run: Run, generator: torch.Generator) -> UnitResult:
        args, kwargs = probe_inputs(run, self.samples, generator)
        tensors: dict[str, Tensor] = {"timestep": args[1].float().cpu()}
        handles = []
        for name, layer in run.layers().items():
            handles.append(layer.register_forward_pre_hook(self._catcher(name, layer, tensors)))
        with torch.no_grad(), wrap.show(run.model, "sim"):
            try:
                tensors["output"] = run.model(*args, **kwargs).sample.cpu()
            finally:
                for handle in handles:
                    handle.remove()
            with wrap.show(run.model, "float"):
                reference = run.model(*args, **kwargs).sample.cpu()
        return UnitResult(tensors, notes={"sqnr_db": sqnr(reference, tensors["output"])})

    def _catcher(self, name: str, layer: QuantLayer, tensors: dict[str, Tensor]) -> Any:
        def catch(_module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            if _of_pixels(layer):  # its scales are those of all pixels: few samples instead of a few pixels
                x = x[:1]
            elif isinstance(layer, nn.Conv2d):
                x = x[:, :, : self.crop, : self.crop]
            elif x.ndim > 2:
                x = x[:, : self.crop * self.crop]
            tensors[f"x/{name}"] = x.to("cpu", copy=True).contiguous().clone()

        return catch

    def _pack(self, run: Run, layer: QuantLayer, name: str, probe: dict[str, Tensor]) -> dict[str, Any]:
        codes = None if layer.spec.weight is None else layer.stored_codes().clone()
        tables = None if codes is None else layer.weight_tables()
        branch = None if layer.low_rank is None else layer.low_rank()  # set anew, never changed in place
        layer.pack()
        if codes is None:
            return {"ok": True, "note": "weight kept in float"}
        x = probe[f"x/{name}"].to(run.device)
        times = probe["timestep"].to(run.device)
        with torch.no_grad(), run.clock.at(times[:1] if _of_pixels(layer) else times):
            proof = prove_layer(codes, layer, x, tables, branch)
        if not proof["ok"]:
            raise NumericsError("packed execution differs from the simulation", where=name, why=str(proof)[:400],
                                try_="report this; `bitbrush resume` repeats the step")
        return proof


def _of_pixels(layer: QuantLayer) -> bool:
    """Whether the input's scales belong to pixels, so that it cannot be cropped."""
    return layer.spec.activation is not None and layer.spec.activation.pixels > 0


def probe_inputs(run: Run, samples: int, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of the denoiser for a probe: from the tape, or random where a recipe has no data."""
    if len(run.tape):
        total = len(run.tape)
        chosen = sorted({(2 * i + 1) * total // (2 * samples) for i in range(samples)})
        batches = list(run.tape.select(chosen, size=samples))
        joined = {k: torch.cat([b[k] for b in batches]) for k in batches[0]}
        return run.tape.inputs(joined)
    return example_inputs(run.model, batch=samples, tokens=run.tokens, device=run.device, generator=generator,
                          dtype=run.tape.dtype)


def sqnr(reference: Tensor, value: Tensor) -> float:
    """Signal to quantization noise ratio in dB, 200 when equal."""
    noise = (reference.double() - value.double()).square().sum()
    if noise == 0:
        return 200.0
    return round(float(10 * torch.log10(reference.double().square().sum() / noise)), 3)
