"""Products written out in Gluon: which tiles there are, what they compute (their code run on the CPU by
`gluon_threads`; on a GPU: benchmarks/check_int8.py), and what they are compiled to."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_driver
import gluon_threads
from assembler import needs
from bitbrush.kernels import gluon_int8, int8_ops, joined_ops, triton_int8, triton_split, tuning
from bitbrush.kernels.gluon_int8 import PAIR, TURNS, Shape, shape
from bitbrush.kernels.triton_int8 import (
    BY_ROW,
    BY_SAMPLE,
    JOINED,
    ONE_ROW,
    STACKED,
    Config,
    Extra,
    Frame,
    Next,
    Tables,
    fitting,
)
from bitbrush.kernels.tuning import FLOWS, GATED_FLOWS, Problem
from bitbrush.numbers.codec import encode
from interpreter import TRITON

PAIRED = tuning.FLOWS[1]


def test_a_tile_is_shared_by_two_warpgroups_or_each_has_its_own() -> None:
    assert shape(128, 160, PAIR) == Shape(64, 128, 32, 64) and shape(128, 160, TURNS) == Shape(128, 128, 32, 64)
    assert shape(256, 160, PAIR, added=True) == Shape(128, 128, 32, 32)
    assert shape(128, 128, PAIR, gated=True) == Shape(64, 64, 64, 64)
    assert shape(128, 128, TURNS, gated=True) == Shape(128, 64, 64, 32)
    checked = 0
    for cut, gated in [(cut, False) for cut in FLOWS] + [(cut, True) for cut in GATED_FLOWS]:
        how = shape(cut.bm, cut.bn, cut.flow, gated=gated)
        assert how.rows in (64, 128) and how.first + how.others == cut.bn  # rows of one instruction, or of two
        assert all(n & (n - 1) == 0 for n in (how.first, how.others)) and how.rows * cut.bn <= 128 * 192
        assert gluon_int8.fits(cut.flow, cut.bm, cut.bn, 1, gated)
        checked += 1
    assert checked == 9


def test_a_ring_and_what_is_written_have_room_in_shared_memory() -> None:
    for cut in (*FLOWS, *GATED_FLOWS):
        for widths, frame in (((1280,), None), ((320,), Frame(1, 8, 8, (3, 3), 1)), ((96, 32), None)):
            config = fitting(cut, widths, frame)
            how = shape(config.bm, config.bn, config.flow)
            tables, written = 2 * 12 * config.bn, 2 * how.rows * how.chunk * 2
            assert config.stages * (config.bm + config.bn) * config.bk + tables + written < tuning.SHARED
            assert config.flow and config.tma and config.bk == (128 if widths == (1280,) else 64)


def test_several_segments_are_for_tiles_with_room_for_values_beside_sums() -> None:
    several = Problem(2048, 1280, (640, 640), 1, 1)
    assert [(cut.flow, cut.bm, cut.bn) for cut in tuning.flows(several)] == [(PAIR, 128, 128), (PAIR, 128, 160)]
    assert tuning.flows(Problem(2048, 1280, (1280,), 1, 1)) == FLOWS
    assert tuning.flows(Problem(2048, 1280, (1280,), 1, 1, gated=True)) == GATED_FLOWS
    assert not tuning.flows(Problem(2048, 320, (320,), 9, 2))  # gathered by pointers


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU and a Triton that can."""
    monkeypatch.delenv("BITBRUSH_FLOWS", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gluon_int8, "_triton", lambda: (3, 6))
    gluon_int8.able.cache_clear()
    yield
    gluon_int8.able.cache_clear()


@pytest.mark.parametrize("other", ["cpu", "asked", "rocm", "ampere", "blackwell", "none", "newer"])
def test_other_gpus_and_versions_of_triton_take_its_own_products(
    other: str, hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda", 0)
    assert gluon_int8.able(gpu)
    gluon_int8.able.cache_clear()
    if other == "asked":
        monkeypatch.setenv("BITBRUSH_FLOWS", "0")
    elif other == "rocm":
        monkeypatch.setattr(torch.version, "cuda", None)
    elif other in ("ampere", "blackwell"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8 if other == "ampere" else 10, 0))
    elif other in ("none", "newer"):
        monkeypatch.setattr(gluon_int8, "_triton", lambda: () if other == "none" else (3, 99))
    assert not gluon_int8.able(torch.device("cpu") if other == "cpu" else gpu)


@TRITON
def test_the_installed_triton_is_one_they_were_written_in() -> None:
    assert gluon_int8._triton() in gluon_int8.VERSIONS


def test_both_kinds_are_tried() -> None:
    for problem in (Problem(2048, 1280, (1280,), 1, 1), Problem(8192, 320, (320,), 9, 1), Problem(64, 64, (32,), 1, 1),
                    Problem(2048, 20480, (1280,), 1, 1, gated=True), Problem(2048, 1280, (96, 32), 1, 1)):
        found = tuning.cuts(problem, 132, written_out=True)
        assert found[0].flow and not found[-1].flow
        assert tuning.cuts(problem, 132) == [cut for cut in found if not cut.flow]
    few = tuning.cuts(Problem(2048, 1280, (1280,), 1, 1), 132, written_out=True)
    assert (few[0].bm, few[0].bn, few[0].flow) == (128, 160, PAIR)  # 128 tiles of 132 processors
    assert not any(cut.flow for cut in tuning.cuts(Problem(2048, 320, (320,), 9, 2), 132, written_out=True))


def test_what_was_timed_is_not_taken_where_it_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hopper: None
) -> None:
    file = tmp_path / "a.json"
    tuning._keep(file, {"1x1": PAIRED, "2x2": Config()})
    assert tuning._known("cuda:0", file) == {"1x1": PAIRED, "2x2": Config()}
    tuning.forget()
    monkeypatch.setenv("BITBRUSH_FLOWS", "0")
    gluon_int8.able.cache_clear()
    assert tuning._known("cuda:0", file) == {"2x2": Config()}
    tuning.forget()


# ---- what they compute -----------------------------------------------------------------------------------------------
@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels in Gluon run on the CPU, on a GPU of three processors."""
    from bitbrush.kernels import (
        gluon_gated_kernels,
        gluon_int8_kernels,
        gluon_ring_kernels,
        triton_int8_kernels,
        triton_split_kernels,
    )

    monkeypatch.setattr(gluon_int8, "Launch", gluon_threads.Launch)
    monkeypatch.setattr(triton_split, "Launch", gluon_threads.Launch)
    monkeypatch.setattr(gluon_int8, "Described", gluon_threads.Described)
    monkeypatch.setattr(triton_int8, "processors", lambda device: 3)
    for known in ("_PRODUCTS", "_GATED"):
        monkeypatch.setattr(triton_int8, known, {})
    modules = (gluon_ring_kernels, gluon_int8_kernels, gluon_gated_kernels, triton_int8_kernels, triton_split_kernels)
    with gluon_threads.plain(*modules, _geglu=_geglu, centred=_centred, zero_and_top=_zero_and_top):
        yield


def _geglu(hidden: Tensor, gate: Tensor, kind: Any) -> Tensor:
    assert str(kind) == "fp32"
    return hidden * torch.nn.functional.gelu(gate)


def _centred(x: Tensor, inverse: Tensor, zero: Tensor, top: Tensor) -> Tensor:
    return (encode(x, inverse, zero, int(top)) - 128).to(torch.int8)


def _zero_and_top(zero: Any, entry: Any, top: Any) -> tuple[Any, Any]:
    return gluon_threads.LANGUAGE.load(zero + entry).float(), top


class Layer:
    """Random operands of a product, and what it gives by the definition."""

    def __init__(self, seed: int, segments: tuple[int, ...], n: int, rows: int = 0, frame: Frame | None = None,
                 kind: int = ONE_ROW, parts: int = 1, samples: int = 2) -> None:
        g = self.g = torch.Generator().manual_seed(seed)
        self.widths, self.frame, self.kind, self.parts = segments, frame, kind, parts
        self.rows = rows if frame is None else frame.batch * frame.out[0] * frame.out[1]
        taps = 1 if frame is None else frame.kernel[0] * frame.kernel[1]
        count, k = len(segments), sum(segments)
        self.a = self.int8(parts * rows if frame is None else frame.rows, k)
        self.w = self.int8(parts * n, taps * k)
        scale_w, self.n = torch.rand((parts * n, count), generator=g) * 0.01, n
        starts = torch.tensor([0, *segments]).cumsum(0).tolist()
        total = torch.stack([self.w[:, taps * b : taps * e].sum(1, dtype=torch.int32)
                             for b, e in itertools.pairwise(starts)])  # fmt: skip
        height = self.rows if kind == BY_ROW else 4
        tables = [(torch.rand((height, count), generator=g) * 0.01 + 0.001,
                   torch.randint(90, 166, (height, count), generator=g).to(torch.uint8),
                   torch.randint(0, 4, (samples if kind == BY_SAMPLE else 1,), generator=g)) for _ in range(parts)]
        self.tables = Tables(*tables[0], kind, scale_w, total, tuple(tables[1:]))
        self.per_sample = max(1, self.rows // samples) if frame is None else 1
        self.bias = torch.randn(parts * n, generator=g)
        self.shared, self.residual = (torch.randn(m, n, generator=g) for m in (samples, self.rows))

    def int8(self, *size: int) -> Tensor:
        return torch.randint(-128, 128, size, dtype=torch.int8, generator=self.g)

    def compared(self, cut: Config, dtype: torch.dtype, added: bool = False, gate: bool = False) -> int:
        """Outputs, all of which are those of the definition, bit for bit, as are the sums."""
        extra = Extra(self.bias, *((t.to(dtype) for t in (self.shared, self.residual)) if added else ()))
        extra = extra._replace(gate=gate)
        sums = torch.full((len(self.widths), self.rows, self.n), -7, dtype=torch.int32)
        got = triton_int8.product(self.a, self.w, self.tables, self.widths, dtype, frame=self.frame, extra=extra,
                                  per_sample=self.per_sample, config=cut, sums=sums if self.parts == 1 else None)
        want, given = [], zip(self.a.chunk(self.parts), self.w.chunk(self.parts), strict=True)
        for part, (a, w) in enumerate(given):
            rows = slice(part * self.n, (part + 1) * self.n)
            table = (self.tables[:3], *self.tables.others)[part]
            one = Tables(*table, ONE_ROW if self.parts > 1 else self.kind, self.tables.weight_scale[rows],
                         self.tables.weight_sum[:, rows])
            want.append(int8_ops._product_plain(
                a, w, *one[:6], list(self.widths), int8_ops.numbers_of(self.frame), self.per_sample,
                None if extra.bias is None else extra.bias[rows], extra.shared, extra.residual, dtype,
                gate))
            if self.parts == 1:
                assert torch.equal(sums, torch.stack(int8_ops.plain_sums(a, w, one, list(self.widths), self.frame,
                                                                         self.per_sample)))
        assert torch.equal(got, torch.stack(want) if self.parts > 1 else want[0]) and len(got.unique()) > 100
        return got.numel()


@TRITON
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("cut", range(len(FLOWS)))
def test_every_cut_gives_the_products_of_the_definition(cut: int) -> None:
    """More tiles than programs, ragged at each end, more steps than slots."""
    assert Layer(cut, (1184,), 336, rows=300).compared(FLOWS[cut], torch.bfloat16) > 100_000
    for gate in (False, True):
        assert Layer(cut, (96,), 200, rows=70).compared(FLOWS[cut], torch.float16, added=True, gate=gate) == 14_000


@TRITON
@pytest.mark.usefixtures("threads")
def test_tables_of_every_kind_and_layers_side_by_side() -> None:
    for kind in (BY_SAMPLE, BY_ROW):
        assert Layer(kind, (160,), 176, rows=150, kind=kind).compared(FLOWS[1], torch.float32) == 150 * 176
    for cut in (FLOWS[0], FLOWS[4]):
        layer = Layer(7, (160,), 176, rows=150, kind=JOINED, parts=3)
        assert layer.compared(cut, torch.bfloat16) == 3 * 150 * 176
        each = (layer.tables[:3], *layer.tables.others)
        scale, zero = (torch.stack([table[i].reshape(-1) for table in each]) for i in range(2))
        given = (scale, zero, each[0][2], *layer.tables[4:6])
        got = triton_int8.product(layer.a, layer.w, Tables(*given[:3], STACKED, *given[3:]), (160,), torch.float32,
                                  config=cut, extra=Extra(layer.bias))
        want = joined_ops._stacked_plain(layer.a, layer.w, *given, 160, layer.bias, torch.float32)
        assert torch.equal(got, want) and len(got.unique()) > 1000


@TRITON
@pytest.mark.usefixtures("threads")
def test_convolutions_read_shifted_rows_and_store_no_border() -> None:
    done = 0
    for cut, kernel, widths, kind in ((FLOWS[1], (3, 3), (160,), ONE_ROW), (FLOWS[4], (3, 3), (64,), ONE_ROW),
                                      (FLOWS[0], (3, 3), (160, 96), ONE_ROW), (FLOWS[2], (1, 1), (96,), ONE_ROW),
                                      (FLOWS[1], (3, 3), (32,), BY_SAMPLE)):
        frame = Frame(2, 9, 11, kernel, 1 if kernel == (3, 3) else 0, shared=kind == ONE_ROW)
        done += Layer(3, widths, 176, frame=frame, kind=kind).compared(cut, torch.bfloat16, added=len(widths) == 1)
    assert done == 5 * 2 * 9 * 11 * 176


@TRITON
@pytest.mark.usefixtures("threads")
def test_parts_of_a_sum_are_merged_to_the_product_of_the_definition() -> None:
    """Linear layers and convolutions, tiles of two widths, parts that are as long and one that is shorter."""
    for cut, split_k in ((FLOWS[0], 2), (FLOWS[1], 3), (FLOWS[2], 5)):
        how = replace(cut, split_k=split_k)
        for gate in (False, True):
            layer = Layer(split_k, (1184,), 200, rows=150)
            assert layer.compared(how, torch.bfloat16, added=True, gate=gate) == 150 * 200
        frame = Frame(2, 9, 11, (3, 3), 1)
        assert Layer(split_k, (160,), 176, frame=frame).compared(how, torch.float16) == 2 * 9 * 11 * 176
    layer = Layer(1, (1184,), 200, rows=150, kind=BY_ROW)  # rows with scales of their own are not split
    assert layer.compared(replace(FLOWS[0], split_k=2), torch.float32) == 150 * 200


@TRITON
@pytest.mark.usefixtures("threads")
def test_a_part_that_is_left_out_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    merge = triton_split.merge

    def fewer(outputs: Any, options: dict[str, Any], launched: Any) -> Any:
        found = merge(outputs, {**options, "SPLIT_K": options["SPLIT_K"] - 1}, launched)
        options.update(dict.fromkeys(triton_split.FINISH, False))
        return found

    monkeypatch.setattr(triton_split, "merge", fewer)
    with pytest.raises(AssertionError):
        Layer(4, (1184,), 200, rows=150).compared(replace(FLOWS[0], split_k=3), torch.bfloat16)


@TRITON
@pytest.mark.usefixtures("threads")
def test_segments_are_added_one_after_the_other() -> None:
    """Slots that end with one, that hold the ends of two, or nothing but a part of one; a segment without columns."""
    for widths in ((96, 32, 160), (128, 128), (32,) * 8, (160,) * 5, (0, 224, 352, 0, 64), (64, 32)):
        for cut in FLOWS[:2]:
            assert Layer(9, widths, 176, rows=200).compared(cut, torch.bfloat16, added=True) == 200 * 176
    layer = Layer(8, (160, 96, 32), 176, rows=150, kind=JOINED, parts=3)
    assert layer.compared(FLOWS[1], torch.bfloat16) == 3 * 150 * 176


def test_slots_are_as_wide_as_fetches_least() -> None:
    for widths, columns in (((160,) * 8, 64), ((96, 96), 128), ((64, 32), 64), ((32,) * 4, 32), ((640, 32), 128)):
        assert fitting(FLOWS[0], widths, None).bk == columns


@TRITON
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("cut", range(len(GATED_FLOWS)))
@pytest.mark.parametrize("scaled", [False, True])
def test_gated_products_give_the_codes_of_the_definition(cut: int, scaled: bool) -> None:
    n, layer = 168, Layer(cut, (160,), 2 * 168, rows=150)
    then = Next(1 / torch.tensor([[0.5], [0.011]]), torch.tensor([[3], [101]]).byte(), torch.tensor([1]), 255,
                torch.rand(n, generator=layer.g) + 0.5 if scaled else None)
    got = triton_int8.gated(layer.a, layer.w, layer.tables, 160, torch.float32, then, bias=layer.bias,
                            config=GATED_FLOWS[cut])
    want = joined_ops._gated_plain(layer.a, layer.w, *layer.tables[:3], *layer.tables[4:6], 160, layer.bias,
                                   *then[:4], then.factor, torch.float32)
    apart = (got.int() - want.int()).abs()
    assert got.shape == (150, 192) and len(got.unique()) > 50
    assert apart.max() <= 1 and apart.count_nonzero() <= 3  # torch's gelu of a block and of a row: in the last bit


@TRITON
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("fault", ["early", "turn", "tap", "columns", "rest", "kept"])
def test_a_planted_fault_shows(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot given back a step early, a turn that never comes, a tap read a row off, tables of other columns, what is
    left of a segment read where it begins, a slot of it never given back."""
    from bitbrush.kernels import gluon_int8_kernels, gluon_ring_kernels

    monkeypatch.setattr(gluon_threads, "PATIENCE", 0.5)
    gluon_threads.replanted((gluon_ring_kernels, gluon_int8_kernels), *{
        "early": ("pred=step > 0)", "pred=True)"), "turn": ("turn.index(1 - PART)", "turn.index(PART)"),
        "tap": ("tap % KW", "(tap + 1) % KW"), "columns": ("n0 + BN1, 0, end", "n0, 0, end"),
        "rest": ("left.slice(FROM,", "left.slice(0,"), "kept": ("pred=whole > 0", "pred=whole > 1"),
    }[fault])  # fmt: skip
    widths = (224, 224) if fault in ("rest", "kept") else (160,)
    layer = Layer(3, widths, 176, frame=Frame(2, 9, 11, (3, 3), 1))
    with pytest.raises(AssertionError):
        layer.compared(FLOWS[4] if fault == "turn" else FLOWS[0] if len(widths) > 1 else FLOWS[1], torch.bfloat16)


# ---- builds ----------------------------------------------------------------------------------------------------------
class Heard:
    """PTX of every build."""

    def __init__(self) -> None:
        self.ptx: list[str] = []

    def __call__(self, *, metadata_group: dict[str, str], **_rest: Any) -> None:
        self.ptx += [Path(path).read_text() for name, path in metadata_group.items() if name.endswith(".ptx")]


@pytest.fixture
def heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Heard]:
    """Builds for a Hopper GPU; nothing is launched."""
    from triton import knobs

    before, found = knobs.compilation.listener, Heard()
    knobs.compilation.listener = found
    monkeypatch.setattr(triton_int8, "processors", lambda device: 132)
    with cuda_driver.hopper(tmp_path / "triton", monkeypatch):
        yield found
    knobs.compilation.listener = before


def _tables(n: int, segments: int = 1, kind: int = ONE_ROW, parts: int = 1) -> Tables:
    scale, zero, times = torch.zeros(4, segments), torch.zeros(4, segments, dtype=torch.uint8), torch.zeros(1).long()
    others = ((scale, zero, times),) * (parts - 1)
    return Tables(scale, zero, times, kind, torch.zeros(n, segments), torch.zeros(segments, n, dtype=torch.int32),
                  others)  # fmt: skip


def _codes(*size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int8)


def _products() -> Iterator[Any]:
    """Calls of every kind of product."""
    bias, type_ = torch.zeros(320), torch.bfloat16
    frame = Frame(2, 16, 16, (3, 3), 1)
    picture, pixels = _codes(frame.rows, 320), 2 * 16 * 16
    line = _codes(512, 640)
    for cut in FLOWS[1::4]:
        yield lambda cut=cut: triton_int8.product(line, _codes(320, 640), _tables(320), (640,), type_, config=cut,
                                                  extra=Extra(bias))
    yield lambda: triton_int8.product(
        picture, _codes(320, 9 * 320), _tables(320), (320,), type_, frame=frame, config=FLOWS[2],
        extra=Extra(bias, torch.zeros(2, 320, dtype=type_), torch.zeros(pixels, 320, dtype=type_)))
    yield lambda: triton_int8.product(_codes(1536, 640), _codes(960, 640), _tables(960, 1, JOINED, 3), (640,), type_,
                                      config=FLOWS[1])
    yield lambda: triton_int8.product(picture, _codes(320, 9 * 320), _tables(320), (320,), type_, frame=frame,
                                      config=replace(FLOWS[1], split_k=4), extra=Extra(bias))
    yield lambda: triton_int8.product(
        picture, _codes(320, 9 * 320), _tables(320, 2), (192, 128), torch.float16, frame=frame, config=FLOWS[0],
        extra=Extra(bias))
    yield lambda: triton_int8.product(_codes(1536, 1280), _codes(960, 1280), _tables(960, 8, JOINED, 3), (160,) * 8,
                                      type_, config=FLOWS[0])
    then = Next(torch.zeros(4, 1), torch.zeros(4, 1, dtype=torch.uint8), torch.zeros(1).long(), 255)
    yield lambda: triton_int8.gated(line, _codes(640, 640), _tables(640), 640, type_, then, bias=torch.zeros(640),
                                    config=GATED_FLOWS[1])


@TRITON
def test_every_kind_of_product_is_built_with_copies_and_products_in_flight(heard: Heard, tmp_path: Path) -> None:
    calls = list(_products())
    for call in calls:
        call()
    merged = [ptx for ptx in heard.ptx if ".globl\tmerge" in ptx]
    assert len(heard.ptx) == len(calls) + len(merged) == 8 + 1
    for ptx in (ptx for ptx in heard.ptx if ptx not in merged):
        assert "cp.async.bulk.tensor" in ptx and "setmaxnreg" in ptx and "mbarrier.try_wait" in ptx
        products = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k32\.s32\.s8\.s8", ptx)
        assert products and "wgmma.wait_group.sync.aligned 0" in ptx
        assert re.search(r"wgmma\.wait_group\.sync\.aligned \s*[1-9]", ptx)  # a step's products outlive the next wait
        stored = {"v2.b32"} if ".globl\tsplit_product" in ptx else {"v4.b32"}  # sums as they lie: 32 bytes a row
        assert set(re.findall(r"st\.global\.(\S+?)\s", ptx)) == stored
        _, spilled, serialised = needs(ptx, tmp_path)
        assert spilled <= 128 and not serialised


@TRITON
def test_layers_of_one_kind_share_a_build(heard: Heard) -> None:
    for rows, columns, width in ((512, 320, 640), (2048, 1280, 5120), (154, 640, 768)):
        triton_int8.product(_codes(rows, width), _codes(columns, width), _tables(columns), (width,), torch.bfloat16,
                            config=PAIRED)
    assert len(heard.ptx) == 1
