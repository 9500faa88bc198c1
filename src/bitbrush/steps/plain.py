"""Plain rounding of any layer to any bits, ready to be switched on one by one: the recipe ``rtn``, every layer in it.

The network stays as it is until somebody shows the ``sim`` face of a layer. Ranges of activations are fitted once, on
the float network: a layer that is rounded alone is given what the float network gives it. Weights are fitted anew for
each bit width, by the recipe's own step; they need no data.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from bitbrush.engine.disk import Disk
from bitbrush.engine.journal import Journal, generator
from bitbrush.engine.planning import make_plan
from bitbrush.engine.progress import Progress
from bitbrush.engine.recipe import FLOAT_BITS, Recipe, load_recipe
from bitbrush.engine.run import Run
from bitbrush.network import wrap
from bitbrush.network.pipelines import takes_prompt
from bitbrush.steps import STEPS
from bitbrush.steps.fit import Fit, apply_activations, quantizers, tables

RECIPE = "rtn"
TRAJECTORIES, SAMPLES = 8, 64
ANY = 4


def rounding_recipe(
    weights: int, activations: int, *, steps: int, guidance: float, guided: bool, prompts: int = 0
) -> Recipe:
    """``rtn`` for all layers, the ends of the network too, with a small calibration at the settings of the pictures.

    Args:
        weights, activations: Bits; 16 = float.
        steps, guidance: Of the calibration's trajectories.
        guided: Whether a call of the denoiser has two halves.
        prompts: How many there are; trajectories may share them.
    """
    most = TRAJECTORIES * steps * (2 if guided else 1)
    settings = {"calibrate.trajectories": TRAJECTORIES, "calibrate.samples": min(SAMPLES, most),
                "calibrate.steps": steps, "calibrate.guidance": guidance,
                "calibrate.prompts": min(TRAJECTORIES, max(prompts, 1))}
    recipe = load_recipe(RECIPE, STEPS, weights=weights, activations=activations, settings=settings)
    kept = tuple(step for step in recipe.steps if step.do in ("calibrate", "fit"))
    return recipe.model_copy(update={"layers": {"*": recipe.layers["*"]}, "steps": kept})


class PlainRounding:
    """A wrapped denoiser in float face whose layers hold plainly rounded weights. Make it with `plain_rounding`.

    Args:
        run: With the ranges of the activations fitted.
        recipe: Bits of weights to the recipe that rounds them.
    """

    def __init__(self, run: Run, recipes: dict[int, Recipe]) -> None:
        self.run, self.recipes = run, recipes
        self.ranges = tables(quantizers(run, "static"))
        self.bits: int | None = None

    def round(self, bits: int) -> None:
        """Give every layer codes of ``bits`` bits (16: the float weight). Faces stay."""
        if bits == self.bits:
            return
        recipe = self.recipes[bits]
        self.run.change_plan(make_plan(self.run.survey, recipe).plan.layers)
        apply_activations(self.run, self.ranges)
        for step in recipe.steps:
            if isinstance(step, Fit) and step.what == "weights":
                for unit in step.units(self.run):
                    step.apply(self.run, unit, step.run_unit(self.run, unit, generator(0, step.label, unit)))
        self.bits = bits

    def layers(self) -> dict[str, wrap.QuantLayer]:
        """The wrapped layers by name, in the order of execution; others after each `round`."""
        return self.run.layers()


@contextmanager
def plain_rounding(
    model: nn.Module, pipeline: Any, *, weights: tuple[int, ...], activations: int, steps: int, guidance: float,
    prompts: list[str], seed: int, tokens: int, folder: Path, progress: Progress, memory: int = 1 << 30,
) -> Iterator[PlainRounding]:
    """Wrap a denoiser and fit the ranges of its activations; the float network is back when the block ends.

    Args:
        model: The denoiser, float, of ``pipeline``.
        weights: The bit widths that will be asked for.
        activations: Bits of the layers' inputs; 16 = float.
        steps, guidance, prompts, seed: Of the calibration's trajectories; their noise is not that of any picture.
        tokens: Length of the text condition.
        folder: The calibration's own; what is in it is taken up again.
        progress: Where to report.
        memory: Bytes that recordings may take.

    Raises:
        InputError: The network is of a kind that cannot be wrapped.
        ResourceError: Another process works in the folder.
    """
    guided = takes_prompt(pipeline) and guidance > 1
    recipes = {bits: rounding_recipe(bits, activations, steps=steps, guidance=guidance, guided=guided,
                                     prompts=len(prompts)) for bits in {*weights, ANY, FLOAT_BITS}}
    first = recipes[FLOAT_BITS]
    if activations == FLOAT_BITS:  # no ranges to fit; a plan needs something in it
        first = recipes[ANY].model_copy(update={"steps": ()})
    journal = Journal(folder, Disk())
    journal.open({}, {"recipe": first.to_toml(), "seed": str(seed)}, resume=(folder / ".run" / "run.json").exists())
    try:
        with wrap.borrowed(model):
            run = Run(first, model, pipeline, journal, seed, prompts, progress, tokens, memory=memory)
            run.execute()
            wrap.set_face(model, "float")
            yield PlainRounding(run, recipes)
    finally:
        journal.release()
