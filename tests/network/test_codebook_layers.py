"""Weights as additive codebooks: sim equals packed bit for bit, through an artifact; bytes as the formula says."""

from __future__ import annotations

import copy
import itertools
import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from safetensors import safe_open
from safetensors.numpy import load_file as numpy_file
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import bitbrush  # noqa: F401  (registers the plug-in)
import tiny
from bitbrush.artifact.save import save
from bitbrush.engine import estimate
from bitbrush.errors import ArtifactError, BitbrushError, InputError, InternalError, NumericsError
from bitbrush.kernels import proof, use
from bitbrush.network import codebook_layers, codebooks, wrap
from bitbrush.network.clock import Clock
from bitbrush.network.codebook_layers import CodebookConv2d, CodebookLayer, CodebookLinear
from bitbrush.network.survey import survey
from bitbrush.numbers.codebook import bits_of, decode, to_groups
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, Plan, WeightSpec
from bitbrush.steps.pack import Pack

GROUP = 4  # divides every layer of the tiny UNet's inside (16 and 28 channels, cat'd ones too)


def _spec(count: int = 2, bits: int = 4, group: int = 8, shared: str = "", **more: Any) -> LayerSpec:
    grid = Grid(kind="codebook", bits=bits)
    return LayerSpec(weight=WeightSpec(grid=grid, codebooks=count, group=group, shared=shared), **more)


def _fill(layer: CodebookLayer, seed: int = 0, books: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes, codebooks and scales, some of them not float16 numbers; they are stored in the layer."""
    g, spec = torch.Generator().manual_seed(seed), layer.weight_spec
    codes = torch.randint(0, spec.grid.levels, layer.code_shape, generator=g, dtype=torch.uint8)
    books = torch.randn(spec.table_shape, generator=g) * 0.5 if books is None else books
    scale = torch.rand(layer.out_channels_, generator=g) * 0.2 + 0.01
    layer.set_codes(codes, books, scale)
    return codes, books, scale


def _layer(kind: str, spec: LayerSpec, channels: int = 16, rows: int = 10) -> CodebookLayer:
    torch.manual_seed(3)
    module: nn.Module = nn.Linear(channels, rows) if kind == "linear" else nn.Conv2d(channels, rows, 3, padding=1)
    model = nn.Sequential(module.requires_grad_(False))
    wrap.wrap(model, Plan(layers={"0": spec}))
    layer = wrap.layers(model)["0"]
    assert isinstance(layer, CodebookLinear if kind == "linear" else CodebookConv2d)
    layer.face = "sim"
    return layer


def _input(kind: str, channels: int = 16) -> Tensor:
    g = torch.Generator().manual_seed(9)
    return torch.randn((2, 5, channels) if kind == "linear" else (2, channels, 6, 7), generator=g)


def _packed(layer: CodebookLayer) -> CodebookLayer:
    other = copy.deepcopy(layer)
    other.pack()
    return other


# ---- one layer -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_packed_equals_sim_equals_the_definition(kind: str) -> None:
    ran = 0
    for (count, bits, group), dtype in itertools.product(
        [(1, 1, 4), (2, 3, 8), (3, 8, 8), (4, 5, 2), (2, 7, 16)], [torch.float32, torch.float16, torch.bfloat16]
    ):
        layer = _layer(kind, _spec(count, bits, group))
        codes, books, scale = _fill(layer)
        matrix = decode(codes, books.half(), scale.half())
        weight = matrix if kind == "linear" else matrix.reshape(10, 3, 3, 16).permute(0, 3, 1, 2).contiguous()
        layer.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        x = _input(kind).to(dtype)
        wide = weight.to(dtype)
        want = F.linear(x, wide, layer.bias) if kind == "linear" else F.conv2d(x, wide, layer.bias, padding=1)
        packed = _packed(layer)
        assert torch.equal(layer(x), want) and torch.equal(packed(x), want)
        assert torch.equal(packed.stored_codes(), codes) and packed.float_weight is None and packed.codes is None
        assert torch.equal(packed.restored_weight(), weight)
        ran += 1
    assert ran == 15


def test_a_group_lies_in_one_kernel_position() -> None:
    """One codeword set to 1: the weights that move are g channels at one place."""
    layer = _layer("conv", _spec(1, 1))
    codes = torch.zeros(layer.code_shape, dtype=torch.uint8)
    codes[4, 2 * 5 + 1] = 1  # of 16 channels: the second group at position (1, 2)
    books = torch.zeros(1, 2, 8)
    books[0, 1] = torch.arange(1.0, 9)
    layer.set_codes(codes, books, torch.ones(10))
    weight = layer.decoded_weight()
    assert torch.equal(weight[4, 8:, 1, 2], torch.arange(1.0, 9)) and int((weight != 0).sum()) == 8
    assert torch.equal(to_groups(weight, 8)[4, 88:96], torch.arange(1.0, 9))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_faces_and_other_parts_of_the_spec(kind: str) -> None:
    """The float face is the teacher; input scales and quantized inputs work as in any layer."""
    activation = ActivationSpec(mode="dynamic", grid=Grid(bits=8))
    layer = _layer(kind, _spec(activation=activation, input_scale=True))
    factors = torch.rand(16, generator=torch.Generator().manual_seed(1)) + 0.5
    layer.set_input_scale(factors)
    _fill(layer)
    layer.set_bias(layer.bias + 1)
    x, packed = _input(kind), _packed(layer)
    assert torch.equal(packed(x), layer(x))
    view = (1, 16, 1, 1) if kind == "conv" else (1, 16)
    assert torch.equal(packed.weight, layer.decoded_weight() * factors.reshape(view))
    layer.face = "float"
    assert not torch.equal(packed(x), layer(x)) and torch.equal(layer.weight, layer.float_weight)
    layer.set_input_scale(factors * 2)
    assert layer.codes is None  # they were those of another weight


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gradients_reach_codebooks_and_scale(kind: str) -> None:
    layer = _layer(kind, _spec())
    codes, books, scale = _fill(layer)
    before, x = layer(_input(kind)), _input(kind)
    layer.book().trial = books.clone().requires_grad_()
    layer.trial_scale = scale.clone().requires_grad_()
    layer(x).square().mean().backward()
    assert layer.book().trial.grad.abs().sum() > 0 and bool((layer.trial_scale.grad != 0).all())
    used = torch.stack([torch.bincount(codes[..., k].flatten().long(), minlength=16) > 0 for k in range(2)])
    assert bool((layer.book().trial.grad.abs().sum(-1)[~used] == 0).all())
    trained = decode(codes, books, scale)
    assert torch.equal(to_groups(layer.weight_in_use(), 8).detach(), trained)  # not rounded while it trains
    layer.book().trial = layer.trial_scale = None
    assert torch.equal(layer(x), before)  # a forward leaves no trace
    layer.trial_weight = torch.zeros(layer.weight_shape)
    assert torch.equal(layer(x), torch.zeros_like(before) + layer.bias.reshape((-1, 1, 1) if kind == "conv" else (-1,)))
    layer.pack()
    assert layer.trial_weight is None and torch.equal(layer(x), before)


def test_casting_and_moving_keeps_the_tables() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        layer = _layer("linear", _spec())
        _fill(layer)
        for face in (layer, _packed(layer)):
            want = face.restored_weight()
            moved = copy.deepcopy(face).to(dtype).to("cpu")
            assert moved.weight_scale.dtype == moved.book().values.dtype == torch.float16
            assert moved.bias.dtype == dtype and torch.equal(moved.restored_weight(), want)
            assert copy.deepcopy(face).to("meta").book().values.is_meta


def test_what_is_refused() -> None:
    layer = _layer("linear", _spec())
    codes, books, scale = (torch.zeros(layer.code_shape), torch.zeros(2, 16, 8), torch.ones(10))
    for action in (layer.pack, layer.stored_codes, layer.decoded_weight, layer.top, layer.scale_tables):
        with pytest.raises(InternalError):
            action()
    bad = [(codes[:, :1], books, scale), (codes, books[:1], scale), (codes, books, scale[:3]),
           (codes + 16, books, scale), (codes - 1, books, scale)]
    for case in bad:
        with pytest.raises(InternalError):
            layer.set_codes(*case)
    for case in ((codes, books + 1e6, scale), (codes, books, scale * torch.nan)):
        with pytest.raises(NumericsError):
            layer.set_codes(*case)
    with pytest.raises(InternalError, match="scale and zero-point"):
        layer.set_weight(codes, scale, scale)
    assert layer.codes is None and len(bad) == 5


def test_specs_that_cannot_be() -> None:
    def weight(**changes: Any) -> LayerSpec:
        given = {"grid": Grid(kind="codebook", bits=4), "codebooks": 2, "group": 8}
        return LayerSpec(weight=WeightSpec(**{**given, **changes}))

    linear, ran = nn.Linear(16, 4), 0
    cases: list[tuple[nn.Module, LayerSpec, str]] = [
        (nn.Linear(20, 4), weight(), "multiple of the group"),
        (nn.Conv2d(16, 16, 3, groups=2), weight(), "groups = 2"),
        (linear, weight(codebooks=0), "number of codebooks is 0"),
        (linear, weight(row_bits=(4, 4, 4, 4)), "share the codebooks"),
        (linear, weight(granularity="tensor"), "a row has its scale"),
        (linear, weight(rounding="offset"), "numbers of codewords"),
        (linear, weight(shared="half"), "cannot be called 'half'"),
        (linear, weight().model_copy(update={"segments": (8, 8)}), "one scale"),
        (linear, weight(grid=Grid(bits=4)), "kind codebook"),
        (linear, LayerSpec(weight=WeightSpec(shared="a")), "kind codebook"),
    ]
    for module, spec, words in cases:
        with pytest.raises(InputError, match=words):
            wrap.wrap(nn.Sequential(module), Plan(layers={"0": spec}))
        ran += 1
    assert ran == 10
    with pytest.raises(ValueError, match="shared"):
        WeightSpec(shared="a.b")


def test_old_plans_keep_their_json() -> None:
    plan = tiny.plan_for(tiny.text_unet())
    assert not any(f'"{key}"' in json.dumps(plan.to_json()) for key in ("codebooks", "group", "shared"))
    layers = {"a": _spec(3, 8), "b": _spec(3, 8, 4, "x"), "c": LayerSpec(activation=ActivationSpec())}
    data = Plan(layers=layers).to_json()
    assert data["specs"][0]["weight"]["codebooks"] == 3 and "group" not in data["specs"][0]["weight"]
    assert data["specs"][1]["weight"]["group"] == 4 and data["specs"][1]["weight"]["shared"] == "x"
    assert Plan.from_json(json.loads(json.dumps(data))).layers == layers


# ---- proof -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_proof_holds_and_finds_faults(kind: str) -> None:
    layer = _layer(kind, _spec(3, 5))
    codes, _, _ = _fill(layer)
    tables, packed, x = layer.weight_tables(), _packed(layer), _input(kind)
    good = proof.prove_layer(codes, packed, x, tables)
    assert good["ok"] and good["codes"]["total"] == codes.numel() and good["bytes"]["total"] == packed.codes5.numel()
    assert good["kernels"]["reference"]["identity"]["ok"] and good["kernels"]["reference"]["max_error_over_bound"] <= 1
    assert good["tables"]["entries"] == 3 * 32 * 8 + 10 and "codewords" in good["kernels"]["cpu-int8"]["skipped"]
    assert "codewords" in use(packed, "cpu-int8")[""]
    found = 0
    for part, key in (("codes5", "codes"), ("weight_scale", "tables"), ("values", "tables")):
        broken = copy.deepcopy(packed)
        tensor = getattr(broken.book() if part == "values" else broken, part)
        tensor.view(-1)[3] = tensor.view(-1)[3] ^ 1 if part == "codes5" else tensor.view(-1)[3] * 1.01
        result = proof.prove_layer(codes, broken, x, tables)
        assert not result["ok"] and not result[key]["ok"]
        found += 1
    assert found == 3


@pytest.mark.parametrize("fault", ["order of columns", "a lost codebook", "no scale"])
def test_the_proof_is_independent_of_decode(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong decode in the layer is caught by outputs and identity, although codes and tables are right."""
    layer = _layer("conv", _spec(2, 4))
    codes, _, _ = _fill(layer)
    tables, packed = layer.weight_tables(), _packed(layer)
    if fault == "order of columns":
        monkeypatch.setattr(codebook_layers, "from_groups", lambda matrix, shape: matrix.reshape(shape))
    elif fault == "a lost codebook":
        monkeypatch.setattr(codebook_layers, "decode", lambda c, b, s: decode(c[..., :1], b[:1], s))
    else:
        monkeypatch.setattr(codebook_layers, "decode", lambda c, b, s: decode(c, b, torch.ones_like(s)))
    result = proof.prove_layer(codes, packed, _input("conv"), tables)
    reference = result["kernels"]["reference"]
    assert result["codes"]["ok"] and result["tables"]["ok"] and not result["ok"]
    assert not reference["identity"]["ok"] and not reference["ok"]


# ---- a model and its artifact ----------------------------------------------------------------------------------------
Made = tuple[Any, Plan, Tensor, Tensor, Path]
SHAPE_A, SHAPE_B = (3, 16, 4), (2, 256, 4)


def _plan(model: nn.Module) -> Plan:
    """Layers on codebooks of their own, on one of two shared sets, and on an affine grid, in turn."""
    layers = {}
    for i, name in enumerate(tiny.plan_for(model, timed=False).layers):
        kinds = [_spec(2, 3, GROUP), _spec(3, 4, GROUP, "a"), _spec(2, 8, GROUP, "b"), LayerSpec(weight=WeightSpec())]
        layers[name] = kinds[i % 4]
    return Plan(layers=layers)


def _additive(model: nn.Module) -> dict[str, CodebookLayer]:
    return {name: layer for name, layer in wrap.layers(model).items() if isinstance(layer, CodebookLayer)}


def _quantized(model: Any) -> Plan:
    """Wrap, and give every layer codes; all layers of a set get the same codebooks."""
    plan, g = _plan(model), torch.Generator().manual_seed(5)
    wrap.wrap(model, plan)
    sets = {"a": torch.randn(SHAPE_A, generator=g) * 0.3, "b": torch.randn(SHAPE_B, generator=g) * 0.3}
    for i, layer in enumerate(wrap.layers(model).values()):
        if isinstance(layer, CodebookLayer):
            _fill(layer, i, sets.get(layer.weight_spec.shared))
        else:
            tiny.fit_weight(layer)
    wrap.set_face(model, "sim")
    return plan


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(packed denoiser, plan, its output, the simulation's output, the artifact's folder); do not change it."""
    model = tiny.text_unet()
    plan = _quantized(model)
    simulated = tiny.run(model)
    for layer in wrap.layers(model).values():
        layer.pack()
    output = tiny.run(model)
    return model, plan, output, simulated, save(model, tmp_path_factory.mktemp("codebooks") / "out", plan)


def test_packed_model_equals_simulated(made: Made) -> None:
    model, _, output, simulated, _ = made
    assert torch.equal(output, simulated) and torch.isfinite(output).all()
    assert len(_additive(model)) > 30 and sum(layer.codebooks is None for layer in _additive(model).values()) > 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_from_pretrained(made: Made, dtype: torch.dtype) -> None:
    model, _, output, _, folder = made
    again = type(model).from_pretrained(folder, torch_dtype=dtype)
    mine, theirs = model.state_dict(), again.state_dict()
    assert sorted(mine) == sorted(theirs)
    if dtype == torch.float32:
        assert torch.equal(tiny.run(again), output)
    tables = [name for name in mine if mine[name].dtype == torch.float16]
    assert len(tables) > 40 and all(theirs[n].dtype == torch.float16 for n in tables)
    assert all(torch.equal(theirs[n], mine[n]) for n in tables)
    compared = 0
    for name, layer in _additive(again).items():
        assert layer.spec == wrap.layers(model)[name].spec and layer.float_weight is None
        assert torch.equal(layer.restored_weight(), wrap.layers(model)[name].restored_weight())
        compared += 1
    assert compared > 30


def test_each_set_is_stored_and_held_once(made: Made) -> None:
    model, _, _, _, folder = made
    sets = {"bitbrush_codebooks.a.values": SHAPE_A, "bitbrush_codebooks.b.values": SHAPE_B}
    with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert {n for n in names if n.startswith(codebooks.NAME)} == set(sets)
    for held in (model, type(model).from_pretrained(folder), copy.deepcopy(model)):
        assert all(tuple(held.state_dict()[name].shape) == shape for name, shape in sets.items())
        users = 0
        for name, layer in _additive(held).items():
            shared = layer.weight_spec.shared
            assert (f"{name}.codebooks.values" in names) is not bool(shared)
            assert layer.book() is (getattr(held, codebooks.NAME).get_submodule(shared) if shared else layer.codebooks)
            users += bool(shared)
        assert users > 15


def test_bytes_are_those_of_the_formula(made: Made) -> None:
    """Tensors of the file, the estimate, and VQDM's bits a weight."""
    model, plan, _, _, folder = made
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    stored: dict[str, int] = {}
    for name, tensor in tensors.items():
        stored[name] = tensor.numel() * tensor.element_size()
    found = survey(tiny.text_unet(), tokens=tiny.TOKENS)
    shapes = {site.name: site.shape for site in found.layers()}
    bits, ran = 0, 0
    for name, layer in _additive(model).items():
        own = {key: size for key, size in stored.items() if key.startswith(f"{name}.") and not key.endswith(".bias")}
        w, shape = layer.weight_spec, shapes[name]
        want = bits_of([shape], w.codebooks, w.grid.bits, w.group)
        assert sum(own.values()) * 8 == want.total - (want.codebooks if w.shared else 0)
        bias = f"{name}.bias" in stored
        assert estimate.layer_bytes(shape, layer.spec, bias) == sum(own.values()) + 4 * shape[0] * bias
        assert estimate.layer_bytes(shape, layer.spec, bias) == layer.packed_bytes()
        bits, ran = bits + 8 * sum(own.values()), ran + 1
    shared = sum(size for name, size in stored.items() if name.startswith(codebooks.NAME))
    weights = sum(torch.Size(shapes[name]).numel() for name in _additive(model))
    assert ran > 30 and shared == estimate.shared_bytes(plan) == 2 * (3 * 16 * 4 + 2 * 256 * 4)
    parts = estimate.codebook_storage(shapes, plan)
    assert sum(part.total for part in parts.values()) == bits + 8 * shared and len(parts) > 2
    assert estimate.codebook_totals(parts)["codebook_bits"] == pytest.approx((bits + 8 * shared) / weights, abs=5e-4)
    assert estimate.model_bytes(found, plan)["packed_bytes"] == sum(stored.values())
    assert estimate.codebook_totals(estimate.codebook_storage(shapes, tiny.plan_for(tiny.text_unet()))) == {}
    assert [estimate.weight_bits(s) for s in (_spec(3, 8), _spec(2, 3, 4), _spec(1, 5))] == [3, 1.5, 0.625]


def _copy(folder: Path, target: Path) -> tuple[Path, dict[str, Tensor], dict[str, str]]:
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (target / name).write_bytes((folder / name).read_bytes())
    path = target / "diffusion_pytorch_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return path, load_file(path), metadata


def test_damaged_and_missing_tensors_are_refused(made: Made, tmp_path: Path) -> None:
    model, _, _, _, folder = made
    path, good, metadata = _copy(folder, tmp_path)
    own = next(name for name, layer in _additive(model).items() if layer.codebooks is not None)
    names = (f"{own}.codebooks.values", f"{own}.weight_scale", f"{own}.codes3", "bitbrush_codebooks.a.values")
    refused = 0
    for name, fault in itertools.product(names, ("missing", "other value", "nan", "shape", "dtype")):
        tensors = {key: tensor.clone() for key, tensor in good.items()}
        tensor = tensors[name]
        if fault == "missing":
            del tensors[name]
        elif fault == "other value":
            tensor.view(-1)[1] += 1
        elif fault == "nan" and tensor.is_floating_point():
            tensor.view(-1)[1] = torch.nan
        elif fault == "shape":
            tensors[name] = tensor[:-1].clone()
        else:
            tensors[name] = tensor.float()
        save_file(tensors, path, metadata)
        with pytest.raises(ArtifactError):
            type(model).from_pretrained(tmp_path)
        refused += 1
    save_file({**good, "bitbrush_codebooks.c.values": torch.zeros(1)}, path, metadata)
    with pytest.raises(ArtifactError, match="unknown"):
        type(model).from_pretrained(tmp_path)
    assert refused == 20


def test_hostile_plans_are_refused(made: Made, tmp_path: Path) -> None:
    model, _, _, _, folder = made
    _copy(folder, tmp_path)
    text = (folder / "config.json").read_text()
    changes = [
        ('"shared": "a"', '"shared": "half"'), ('"shared": "a"', '"shared": "b"'), ('"shared": "a"', '"shared": "a.b"'),
        ('"codebooks": 3', '"codebooks": 4'), ('"codebooks": 3', '"codebooks": 1000000'), ('"group": 4', '"group": 3'),
    ]
    for old, new in changes:
        assert old in text
        (tmp_path / "config.json").write_text(text.replace(old, new))
        with pytest.raises(BitbrushError):
            type(model).from_pretrained(tmp_path)
    assert len(changes) == 6


def test_saving_again_compiling_and_offloading(made: Made, tmp_path: Path) -> None:
    """A loaded model writes the same bytes; shared sets are found by a compiled graph and by offloading hooks."""
    model, _, output, _, folder = made
    again = type(model).from_pretrained(folder)
    again.save_pretrained(tmp_path)
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert torch.equal(tiny.run(torch.compile(again, fullgraph=True, backend="eager")), output)
    cpu_offload(again, execution_device=torch.device("cpu"), offload_buffers=True)
    assert getattr(again, codebooks.NAME).a.values.is_meta
    assert torch.equal(tiny.run(again), output)


def test_the_documented_reading_without_bitbrush(made: Made) -> None:
    """The lines of docs/format.md, for 8 bits."""
    model, _, _, _, folder = made
    tensors, compared = numpy_file(folder / "diffusion_pytorch_model.safetensors"), 0
    for name, layer in _additive(model).items():
        if layer.weight_spec.grid.bits != 8:
            continue
        books, scale = tensors["bitbrush_codebooks.b.values"], tensors[f"{name}.weight_scale"].astype("float32")
        index = tensors[f"{name}.codes8"].reshape(len(books), len(scale), -1)
        parts = [book.astype("float32")[rows] for book, rows in zip(books, index, strict=True)]
        matrix = (sum(parts) * scale[:, None, None]).reshape(len(scale), -1)
        assert (matrix == to_groups(layer.decoded_weight(), GROUP).numpy()).all()
        compared += 1
    assert compared > 10


def test_the_pack_step_packs_and_proves() -> None:
    layer = _layer("conv", _spec(2, 3))
    _fill(layer)
    x, run = _input("conv"), SimpleNamespace(device=torch.device("cpu"), clock=Clock())
    want = layer(x)
    probe = {"x/a": x, "timestep": torch.tensor([1.0])}
    result = Pack(do="pack")._pack(run, layer, "a", probe)  # type: ignore[arg-type]
    assert result["ok"] and layer.face == "packed" and torch.equal(layer(x), want)


def test_dequantizing_takes_the_sets_away(made: Made) -> None:
    model, _, output, _, folder = made
    again = type(model).from_pretrained(folder)
    again.dequantize()
    assert not hasattr(again, codebooks.NAME) and not wrap.layers(again)
    assert sorted(again.state_dict()) == sorted(tiny.text_unet().state_dict())
    assert torch.equal(tiny.run(again), output)


def test_loading_and_running_hold_one_float_weight_at_most(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, output, _, folder = made
    alive: list[weakref.ref[Tensor]] = []
    most, calls = 0, 0
    plain = codebook_layers.from_groups

    def watched(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        nonlocal most, calls
        weight = plain(matrix, shape)
        alive.append(weakref.ref(weight))
        most, calls = max(most, sum(ref() is not None for ref in alive)), calls + 1
        return weight

    monkeypatch.setattr(codebook_layers, "from_groups", watched)
    again = type(model).from_pretrained(folder)
    assert calls == 0
    assert torch.equal(tiny.run(again), output)
    # the weight of the layer before is alive until its name is bound anew, hence 1 here and never more than 2
    assert calls >= len(_additive(again)) and most <= 2
    assert all(ref() is None for ref in alive)


# ---- shared sets -----------------------------------------------------------------------------------------------------
def test_a_shared_set_serves_its_layers_and_is_fixed_once_packed() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)).requires_grad_(False)
    spec = _spec(2, 4, 8, "pair")
    wrap.wrap(model, Plan(layers={"0": spec, "1": spec}))
    one, two = wrap.layers(model).values()
    assert isinstance(one, CodebookLayer) and isinstance(two, CodebookLayer) and one.book() is two.book()
    books = _fill(one)[1]
    _fill(two, 1, books)
    two.set_codes(two.codes, None, two.weight_scale)
    one.face = two.face = "sim"
    one.book().trial = books.clone().requires_grad_()
    two(one(torch.randn(3, 16))).sum().backward()
    assert one.book().trial.grad.abs().sum() > 0
    one.pack()
    assert two.book().trial is None
    assert [name for name in model.state_dict() if "values" in name] == ["bitbrush_codebooks.pair.values"]
    with pytest.raises(InternalError, match="packed"):
        two.set_codes(two.codes, books + 1, two.weight_scale)
    two.set_codes(two.codes, books, two.weight_scale)
    other = LayerSpec(weight=WeightSpec(grid=Grid(kind="codebook", bits=3), codebooks=2, shared="pair"))
    with pytest.raises(InputError, match="another shape"):
        wrap.wrap(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)), Plan(layers={"0": spec, "1": other}))


def test_rewrapping_keeps_codes_and_sets() -> None:
    model = tiny.text_unet()
    plan = _quantized(model)
    clock, want = wrap.wrap(tiny.text_unet(), plan), tiny.run(model)
    names = list(_additive(model))
    before = {name: layer.book() for name, layer in _additive(model).items() if layer.codebooks is None}
    changed = {n: plan.layers[n].model_copy(update={"activation": ActivationSpec(mode="dynamic")}) for n in names[::2]}
    wrap.rewrap(model, plan.with_layers(changed), list(changed), clock)
    assert all(layer.book() is before[name] for name, layer in _additive(model).items() if name in before)
    with wrap.float_activations(model):
        assert torch.equal(tiny.run(model), want)
    assert not torch.equal(tiny.run(model), want)
    plain = {name: LayerSpec(weight=WeightSpec()) for name in names if plan.layers[name].weight.shared == "a"}
    wrap.rewrap(model, plan.with_layers({**changed, **plain}), list(plain), clock)
    assert [name for name, _ in getattr(model, codebooks.NAME).named_children()] == ["b"]
    wrap.wrap(model, tiny.plan_for(tiny.text_unet()))
    assert not hasattr(model, codebooks.NAME)
