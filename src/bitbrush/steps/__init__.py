"""What a method may do. A recipe is an ordered list of these."""

from __future__ import annotations

from bitbrush.engine.step import Step
from bitbrush.steps.allocate import Allocate
from bitbrush.steps.calibrate import Calibrate
from bitbrush.steps.codebooks import FitCodebooks
from bitbrush.steps.correct import Correct, Trajectories
from bitbrush.steps.finetune import Finetune
from bitbrush.steps.fit import Fit
from bitbrush.steps.group import Group
from bitbrush.steps.low_rank import LowRank
from bitbrush.steps.pack import Pack
from bitbrush.steps.reconstruct import Reconstruct
from bitbrush.steps.relax import Relax
from bitbrush.steps.smooth import Smooth
from bitbrush.steps.split import Split
from bitbrush.steps.verify import Verify

STEPS: dict[str, type[Step]] = {
    "calibrate": Calibrate,
    "trajectories": Trajectories,
    "split": Split,
    "smooth": Smooth,
    "low_rank": LowRank,
    "fit": Fit,
    "codebooks": FitCodebooks,
    "group": Group,
    "allocate": Allocate,
    "reconstruct": Reconstruct,
    "relax": Relax,
    "finetune": Finetune,
    "pack": Pack,
    "verify": Verify,
    "correct": Correct,
}
"""Step name in TOML to class."""
