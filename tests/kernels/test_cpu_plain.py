"""Plain layers on the CPU: equal to the general way bit for bit, and what is kept of them follows their tensors."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from bitbrush.kernels import cpu, cpu_onednn, cpu_plain, reference

pytestmark = pytest.mark.skipif(cpu_onednn.engine() == "absent", reason="torch has no onednn::qlinear_pointwise here")

PLAIN = [
    {**kind, "mode": mode, **width}
    for kind in ({"kind": "linear"}, {"kind": "conv", "kernel": (1, 1)}, {"kind": "conv", "padding": (2, 1)},
                 {"kind": "conv", "stride": (2, 1), "padding": (1, 1), "layout": "channels_last"})
    for mode in ("static", "timed", "timed_batch")
    for width in ({"weight_bits": 8, "weight_signed": True}, {"weight_bits": 4}, {"weight_bits": 3}, {"bias": False},
                  {"weight_bits": 4, "dtype": torch.bfloat16, "rows": 33})
]  # fmt: skip


def test_plain_layers_give_what_the_general_way_gives(
    builder: ModuleType, processor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = 0
    for i, case in enumerate(PLAIN):
        _, packed, _ = builder.build({**builder.ALWAYS, **case}, i)
        x = builder.make_input({**builder.ALWAYS, **case}, i)
        for time in (1.0, 999.0):
            with packed.input._clock[0].at(builder.timestep(case) if case["mode"] == "timed_batch" else time):
                got, found = cpu.run(packed, x), cpu_plain.run(packed, x)
                direct += found is not None
                with monkeypatch.context() as patch:
                    patch.setattr(cpu_plain, "run", lambda layer, x: None)
                    want = cpu.run(packed, x)
            assert torch.equal(got, want) and got.stride() == want.stride(), case
    assert direct == 80  # of 120: samples at different times go the general way


def test_what_a_plain_layer_keeps_follows_its_tensors(builder: ModuleType) -> None:
    _, packed, _ = builder.build({**builder.ALWAYS, "weight_bits": 8, "weight_signed": True, "kind": "linear"})
    x = builder.make_input({"kind": "linear"})

    def answers() -> tuple[Tensor, Tensor]:
        return cpu.run(packed, x), reference.run(packed, x)

    seen = []
    for change in (
        lambda: None,
        lambda: packed.input.set_scale(packed.input.scale * 2, packed.input.zero_point),
        lambda: (packed.input.scale.mul_(0.5), packed.input.inverse_scale.mul_(2)),
        lambda: packed.codes8.copy_(packed.codes8.flip(0)),
        lambda: packed.weight_scale.mul_(3),
        lambda: packed.load_state_dict({name: t.clone() for name, t in packed.state_dict().items()}),
        lambda: (packed.bias.data.copy_(packed.bias.flip(0)), packed._apply(lambda t: t.clone())),
    ):
        change()
        got, want = answers()
        assert torch.allclose(got, want, atol=1e-4 * float(want.abs().max()))
        seen.append(got)
    assert len(seen) == 7 and len({tuple(y.flatten().tolist()) for y in seen}) == 5  # two change nothing in the end


def test_what_is_kept_beside_the_packed_weight_is_small(builder: ModuleType) -> None:
    _, packed, _ = builder.build({**builder.ALWAYS, "kind": "linear", "rows": 33})
    assert cpu_plain.kept_bytes(packed) == 0
    cpu.run(packed, builder.make_input({"kind": "linear"}))
    assert cpu_plain.kept_bytes(packed) == 8 * 33  # sums of rows, and both scales' products
