"""One pass of the network over calibration samples, for hooks that look at what goes by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from bitbrush.engine.run import Run


def observe(
    run: Run, title: str, samples: int, handles: Sequence[RemovableHandle],
    before: Callable[[dict[str, Tensor]], None] | None = None, rows: list[int] | None = None,
) -> None:
    """Run the network, in the face that it shows, without gradients; the hooks are removed afterwards.

    Args:
        run: Model, tape and progress.
        title: Of the progress bar.
        samples: How many, spread over the tape; all where there are fewer.
        handles: Of the hooks that look.
        before: Told of each batch before its forward.
        rows: Numbers of the samples (ascending), where not ``samples`` of them spread over the tape.
    """
    limit = min(samples, len(run.tape)) if rows is None else len(rows)
    run.progress.start(title, limit)
    try:
        with torch.no_grad():
            for batch in run.tape.select(run.tape.spread(limit) if rows is None else rows):
                if before is not None:
                    before(batch)
                args, kwargs = run.tape.inputs(batch)
                run.model(*args, **kwargs)
                run.progress.advance(len(batch["timestep"]))
    finally:
        run.progress.finish()
        for handle in handles:
            handle.remove()
