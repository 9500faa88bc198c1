"""The variants of the Gluon spike build for compute capability 9.0, spill nothing, and their warps come to an end: each
product of codes is computed once and each part of the output stored once, in whatever order things happen."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from ptx_warps import Deadlock, Kernel, Program

M, N, K = 400, 420, 1200
NAMES = ("c2_128x128", "c2_128x256", "c2_128x160", "c2_128x192", "c2_256x128", "c2_256x160", "c2_256x192", "pp_128x128",
         "pp_128x160", "pp_128x192", "pp_64x256", "c1_128x128_x2", "c1_64x128_x2", "c1_64x256")  # fmt: skip


@pytest.fixture
def spike(script: Callable[[str], ModuleType]) -> ModuleType:
    """The module with the kernel, where the Triton that is installed has what it needs."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    import triton

    try:
        return script("spike_gluon_kernel")
    except (ImportError, AttributeError) as error:
        pytest.skip(f"the Gluon of Triton {triton.__version__} lacks something: {error}")


def _ran(variant: Any, ptx: str, programs: int = 2) -> tuple[dict, dict]:
    """The products and stores of all programs."""
    constants, kernel, products, stores = variant.constants(), Kernel(ptx), {}, {}
    boxes = [variant.bmc * 128, variant.bn1 * 128, variant.bn2 * 128, variant.bmc * constants["CH1"] * 2,
             variant.bmc * constants["CH2"] * 2]  # fmt: skip
    for at in range(programs):
        program = Program(kernel, [M, N, K, 2], at, programs, boxes, seed=at)
        program.run()
        for place, count in program.products.items():
            products[place] = products.get(place, 0) + count
        for place, count in program.stores.items():
            stores[place] = stores.get(place, 0) + count
    return products, stores


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_builds_and_its_warps_end(spike: ModuleType, name: str) -> None:
    assert tuple(variant.name for variant in spike.VARIANTS) == NAMES
    variant = next(variant for variant in spike.VARIANTS if variant.name == name)
    found = spike.evidence(variant)
    assert (found["spilled"], found["serialised"]) == (0, False)
    assert found["shared"] * variant.together <= 227 * 1024
    products, stores = _ran(variant, found["ptx"])
    rows, steps = range(0, -(-M // variant.bm) * variant.bm, 64), range(0, -(-K // 128) * 128, 32)
    columns = [(n0 + first, min(width, 128)) for n0 in range(0, N, variant.bn)
               for start, width in ((0, variant.bn1), (variant.bn1, variant.bn2))
               for first in range(start, start + width, 128)]  # fmt: skip
    assert products == {(m, n, width, k): 1 for m in rows for n, width in columns for k in steps}
    one, two = (variant.constants()[name] for name in ("CH1", "CH2"))
    chunks = [*range(0, variant.bn1, one), *range(variant.bn1, variant.bn, two)]
    parts = [(n0 + n, m) for n0 in range(0, N, variant.bn) for n in chunks for m in rows[:: variant.bmc // 64]]
    assert stores == dict.fromkeys(parts, 1)


def test_a_slot_that_is_never_free_is_found(spike: ModuleType) -> None:
    """What tells that warps end would tell if they did not: barriers that wait for one arrival too many."""
    variant = spike.VARIANTS[0]
    ptx, count = re.subn(r"(mbarrier\.init\S+ \[%r\d+\], )2;", r"\g<1>3;", spike.build(variant).asm["ptx"])
    assert count == variant.stages
    with pytest.raises(Deadlock):
        _ran(variant, ptx)
