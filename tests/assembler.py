"""What the assembler that comes with Triton says of a kernel, for compute capability 9.0."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple


class Needs(NamedTuple):
    """Of a thread: registers, and bytes spilled; and whether products wait for each other."""

    registers: int
    spilled: int
    serialised: bool


def needs(ptx: str, folder: Path) -> Needs:
    """Assemble a kernel in a folder of its own."""
    import triton

    source = folder / "kernel.ptx"
    source.write_text(ptx)
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    done = subprocess.run([assembler, "-v", "--gpu-name=sm_90a", source, "-o", folder / "kernel.cubin"],
                          capture_output=True, text=True, check=True)
    registers, spilled = (re.search(what, done.stderr) for what in (r"Used (\d+) reg", r"(\d+) bytes spill stores"))
    assert registers and spilled
    return Needs(int(registers[1]), int(spilled[1]), "serializ" in done.stderr)
