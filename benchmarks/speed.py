"""How fast packed networks are: ours beside bf16 and beside other libraries, in one run on one GPU.

    python benchmarks/speed.py [PART ...] [--out FOLDER] [--budget SECONDS] [--forms FORM ...] [--site FOLDER]
    python benchmarks/speed.py peers --together 6 --way 300 --budget 420 --site FOLDER   # on a card of 140 GB
    python benchmarks/speed.py --smoke        # every part tiny, on a CPU, under three minutes; nothing to be believed

    python benchmarks/speed.py steps-dit steps-flux --warm 120     # compile side by side before each is timed

Parts, each with a JSON of its own in --out that is written after every item:

    ceilings      copy, bf16 product, torch._int_mm (and fp8) of 8192 x 8192 x 8192
    conv, gemm    SDXL's costliest convolutions, SDXL's and FLUX's products, beside cuDNN, cuBLAS and torch._int_mm
    encode        encodes, alone and fused with a norm, as a share of the copy's bytes a second
    layers        one layer in every form, time tables, segments and codebooks among them
    steps-MODEL   a step of sdxl, sd15, dit, flux, emoji, emoji-tiny: eager, compiled, in CUDA graphs; bf16 and packed
    memory        peak of putting SDXL on the GPU and one step
    peer-NAME     SDXL's step by another library; one process each

The run ends within its budget whatever happens: every part has a process of its own, which is stopped when the time is
up, and called again where it ended early. A further call goes on where this one stopped, but measures its baselines
again: a number stands beside what was measured in the same process. What failed stays failed until --fresh. Weights and
codes are random; shapes alone decide how long a step takes. ``python benchmarks/speed_page.py`` writes
docs/performance.md and summary.json from the files.

A peer needs its library: in this environment, or below --site in a folder of the library's name (``pip install --target
SITE/torchao torchao``, ...; bitsandbytes, quanto, sdnq). One that cannot be imported is left out by name. A peer is
timed eager first, then compiled by blocks, then as a whole, and kept after each: a way that does not end within --way
seconds, or within the budget, is named as missing, and so are those after it. With --together peers compile side by
side; while one is timed, the others' processes are stopped (those stops count for --way, too).
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from speed.program import main  # the folder speed/, which goes before this file

    sys.exit(main(__doc__))
