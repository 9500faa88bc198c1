"""What a method may do. A recipe is an ordered list of these."""

from __future__ import annotations

from bitbrush.engine.step import Step
from bitbrush.steps.calibrate import Calibrate
from bitbrush.steps.fit import Fit
from bitbrush.steps.pack import Pack
from bitbrush.steps.reconstruct import Reconstruct
from bitbrush.steps.split import Split
from bitbrush.steps.verify import Verify

STEPS: dict[str, type[Step]] = {
    "calibrate": Calibrate,
    "split": Split,
    "fit": Fit,
    "reconstruct": Reconstruct,
    "pack": Pack,
    "verify": Verify,
}
"""Step name in TOML to class."""
