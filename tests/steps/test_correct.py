"""TAC: the closed form, the walk along the chain, what is folded into the estimate, and the steps."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from scipy.optimize import minimize_scalar
from torch import Tensor

import small
import tiny
from bitbrush.engine.progress import Silent
from bitbrush.engine.recipe import CORRECTIONS, load_recipe
from bitbrush.errors import InputError, NumericsError
from bitbrush.network import correction, wrap
from bitbrush.network.correction import CorrectionSpec
from bitbrush.steps import STEPS, beside, chain
from bitbrush.steps.correct import TRIED
from chains import BETAS, DDIM, ONE_STEP, SCHEDULERS, STEPS_TAKEN, Chain, coarse, estimate

Fit = Literal["branches", "guided", "state", "even"]
FITS: tuple[Fit, ...] = ("branches", "guided", "state", "even")
LEAST_SQUARES = chain.Rule(l1=0.0, l2=0.0, tau=0.0)
TRAJECTORIES = '[[step]]\ndo = "trajectories"\nsamples = 4\nbatch = 2\n'
CORRECT = '[[step]]\ndo = "correct"\n'
PLAIN = small.HEAD + small.CALIBRATE + small.FIT + small.RANGES + small.PACK
CORRECTED = small.HEAD + small.CALIBRATE + TRAJECTORIES + small.FIT + small.RANGES + small.PACK + CORRECT


# ---- the closed form (invariants 4, 5) ---------------------------------------------------------------------------
def loss(k: float, q: Tensor, e: Tensor, rule: chain.Rule) -> float:
    kept = e.abs() >= rule.tau * e.abs().mean()
    q, e = q[kept].double(), e[kept].double()
    relative = (((k * q - e) / e) ** 2).sum() if rule.relative == "sum" else (((k * q - e) / e) ** 2).mean()
    return float((1 - rule.l1) * ((k * q - e) ** 2).mean() + rule.l1 * relative + rule.l2 * (k - 1) ** 2)


@pytest.mark.parametrize("relative", ["mean", "sum"])
@pytest.mark.parametrize("tau", [0.0, 0.05, 0.5])
def test_the_closed_form_is_the_minimum(relative: Any, tau: float) -> None:
    looked, generator = 0, torch.Generator().manual_seed(1)
    for l1, l2 in ((0.0, 0.0), (0.5, 0.1), (0.8, 2.0), (1.0, 0.0)):
        rule = chain.Rule(l1, l2, tau, relative, clamp=1e6)
        e = torch.randn(4, 2, 8, 8, generator=generator)
        q = 1.1 * e + 0.15 * torch.randn(e.shape, generator=generator)
        found = chain.output_scale(q, e, rule)
        for c in range(2):
            best = minimize_scalar(
                lambda k, c=c, q=q, e=e, rule=rule: loss(k, q[:, c], e[:, c], rule), bracket=(0, 1), tol=1e-10
            ).x
            assert found[c].item() == pytest.approx(best, abs=1e-4)
            looked += 1
    assert looked == 8


def test_without_the_mask_the_relative_term_drives_the_factor_to_zero() -> None:
    e = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    q = 1.1 * e + 0.15 * torch.randn(e.shape, generator=torch.Generator().manual_seed(1))
    bare = chain.output_scale(q, e, chain.Rule(tau=0.0, relative="sum", clamp=1e9)).item()
    assert bare < 0.2, "without a mask, elements near 0 drive K to 0"
    masked = {how: chain.output_scale(q, e, chain.Rule(relative=how)).item() for how in ("sum", "mean")}
    assert all(0.85 < k < 0.93 for k in masked.values())


def test_limits_of_the_closed_form() -> None:
    e = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    q = 0.7 * e + 0.1
    plain = chain.output_scale(q, e, LEAST_SQUARES)
    assert torch.allclose(plain, (q * e).sum((0, 2, 3)) / q.square().sum((0, 2, 3)), atol=1e-6)
    assert torch.allclose(chain.output_scale(q, e, chain.Rule(l2=1e9)), torch.ones(3), atol=1e-6)
    assert torch.equal(chain.output_scale(q[:, :, :2, :2], e[:, :, :2, :2], chain.Rule()), torch.ones(3)), "too few"
    assert torch.equal(chain.output_scale(0.1 * e, e, LEAST_SQUARES), torch.full((3,), 2.0)), "clamped"
    assert torch.equal(chain.output_scale(torch.zeros_like(e), torch.zeros_like(e), chain.Rule(l2=0)), torch.ones(3))
    one = chain.output_scale(q, e, chain.Rule(granularity="scalar"))
    assert one.shape == (3,) and one.unique().numel() == 1


def test_least_squares_never_hurts_the_samples_it_was_fitted_on() -> None:
    looked, generator = 0, torch.Generator().manual_seed(2)
    for _ in range(20):
        e, q = torch.randn(2, 32, 2, 8, 8, generator=generator)
        q = 0.9 * e + 0.3 * q
        k = chain.output_scale(q[:16], e[:16], LEAST_SQUARES).reshape(1, 2, 1, 1)
        before, after = ((s * q - e).square().mean((2, 3)) for s in (1.0, k))
        assert bool((after[:16].mean(0) <= before[:16].mean(0) + 1e-7).all())
        assert bool((after[16:].mean(0) / before[16:].mean(0) <= 1.01).all())
        looked += 4
    assert looked == 80


def test_a_bias_within_its_error_is_left_out() -> None:
    noise = torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    noise -= noise.mean((0, 2, 3), keepdim=True)
    noise[:, 1] += 0.5
    assert torch.allclose(chain.input_bias(noise, chain.Rule()), torch.tensor([0.0, 0.5]), atol=1e-5)
    spread = torch.zeros(4, 1, 8, 8) + torch.tensor([3.0, -2.0, 1.0, -1.0]).reshape(4, 1, 1, 1)
    assert chain.input_bias(spread, chain.Rule()) == 0, "many pixels of few trajectories are few samples"
    assert chain.input_bias(noise[:1], chain.Rule()).abs().sum() == 0, "one trajectory says nothing of the error"


# ---- along the chain (invariants 1, 2, 3, 6) ---------------------------------------------------------------------
@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_equal_network_needs_no_correction(name: str) -> None:
    found = Chain(SCHEDULERS[name]()).walk(estimate, rule=chain.Rule())
    assert found.scale.shape == (STEPS_TAKEN, 3)
    assert torch.allclose(found.scale, torch.ones_like(found.scale), atol=1e-6)
    assert found.shift.abs().max() <= 1e-6 and found.bias.abs().max() <= 1e-4
    assert len(found.error) == STEPS_TAKEN and max(found.error) < 1e-4


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_planted_scale_is_found(name: str) -> None:
    looked, recorded = 0, Chain(SCHEDULERS[name]())
    for a in (0.8, 1.25):
        for l1 in (0.0, 0.5, 1.0):
            for tau, relative in ((0.0, "mean"), (0.5, "sum")):
                rule = chain.Rule(l1=l1, l2=0.0, tau=tau, relative=relative)  # type: ignore[arg-type]
                found = recorded.walk(lambda i, u, a=a: a * estimate(i, u), rule=rule)
                assert torch.allclose(found.scale, torch.full_like(found.scale, 1 / a), atol=1e-4)
                assert max(found.error) < 1e-4 < max(recorded.walk(lambda i, u, a=a: a * estimate(i, u)).error)
                looked += 1
    assert looked == 12


@pytest.mark.parametrize("name", ONE_STEP)
def test_a_planted_input_bias_is_removed(name: str) -> None:
    """A constant added to x once: b is that constant, and afterwards the chains agree."""
    recorded, looked = Chain(SCHEDULERS[name]()), 0
    push = torch.tensor([0.3, -0.2, 0.1]).reshape(1, 3, 1, 1)

    def pushed(i: int, u: Tensor) -> Tensor:
        return estimate(i, u) + push if i == 1 else estimate(i, u)

    keep = chain.Rule(l2=1e9)  # K = 1
    plain, found = recorded.walk(pushed), recorded.walk(pushed, rule=keep)
    a_step = chain._probe(recorded.scheduler, STEPS_TAKEN, 1, 0.0, 1.0)
    planted = push.flatten() * a_step * chain.input_scale(recorded.scheduler, STEPS_TAKEN, 2)
    assert torch.allclose(found.shift[2], planted, rtol=1e-3, atol=1e-5)
    for i in range(STEPS_TAKEN):
        if i > 2:
            assert found.error[i] < 1e-3 * plain.error[i] + 1e-4
            assert found.shift[i].abs().max() < 1e-3
            looked += 1
    assert looked == STEPS_TAKEN - 3 and plain.error[2] == pytest.approx(found.error[2], rel=1e-4)


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm"])
def test_fitting_along_the_chain_beats_fitting_on_uncorrected_chains(name: str) -> None:
    recorded, rule = Chain(SCHEDULERS[name](), n=16), chain.Rule(l1=0.0, l2=0.0, tau=0.0, input_term=False)
    seen: list[Tensor] = []

    def watched(i: int, u: Tensor) -> Tensor:
        seen.append(coarse(i, u))
        return seen[-1]

    plain = recorded.walk(watched)
    apart = chain.Walk(*(torch.zeros(STEPS_TAKEN, 3) for _ in range(3)))
    apart.scale = torch.stack([chain.output_scale(q, recorded.moments(i)[1], rule) for i, q in enumerate(seen)])
    assert len(seen) == STEPS_TAKEN
    along, replayed = recorded.walk(coarse, rule=rule), recorded.walk(coarse, given=apart)
    assert not torch.allclose(along.scale[1:], apart.scale[1:], atol=1e-4)
    assert torch.equal(along.scale[0], apart.scale[0])
    assert along.error[-1] < replayed.error[-1] and along.error[-1] < plain.error[-1]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_held_out_trajectories_come_closer(name: str) -> None:
    make = SCHEDULERS[name]
    tables = Chain(make(), n=16).walk(coarse, rule=chain.Rule())
    other = Chain(make(), n=16, seed=9)
    plain, corrected = other.walk(coarse), other.walk(coarse, given=tables)
    assert corrected.error[-1] < 0.8 * plain.error[-1]


@pytest.mark.parametrize("fit", FITS)
def test_one_factor_for_both_halves_of_a_guided_call(fit: Fit) -> None:
    """Two halves: a planted factor is found from every fit, and the chain takes the guided estimate."""
    def halves(i: int, u: Tensor) -> Tensor:
        return torch.cat([estimate(i, u), estimate(i + 3, 1.2 * u)])

    recorded = Chain(SCHEDULERS["ddim"](), network=lambda i, u: chain.guided(halves(i, u), len(u), 4.0))
    recorded.rows = [(u, halves(i, u)) for i, (u, _) in enumerate(recorded.rows)]
    rule = chain.Rule(l2=0.0, fit=fit)
    found = recorded.walk(lambda i, u: 0.8 * halves(i, u), rule=rule, guidance=4.0)
    assert found.scale.shape == (STEPS_TAKEN, 3)
    assert torch.allclose(found.scale, torch.full_like(found.scale, 1.25), atol=1e-3) and found.error[-1] < 1e-3
    noisy = [recorded.walk(lambda i, u: torch.round(halves(i, u) * 4) / 4, rule=chain.Rule(fit=f), guidance=4.0)
             for f in FITS]
    assert len({tuple(walk.scale.flatten().tolist()) for walk in noisy}) == 4


def test_a_chain_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(NumericsError) as caught:
        Chain(SCHEDULERS["ddim"]()).walk(lambda i, u: u / 0.0, rule=chain.Rule())
    assert small.complete(caught.value)


# ---- folding -----------------------------------------------------------------------------------------------------
def test_what_can_be_folded() -> None:
    looked = 0
    for name, make in SCHEDULERS.items():
        factors, why = chain.folding(make(), STEPS_TAKEN)
        assert (factors is not None) == (name != "dpm") and bool(why) == (factors is None)
        looked += 1
    assert looked == 7
    factors, why = chain.folding(DDIMScheduler(**{**DDIM, "clip_sample": True}), STEPS_TAKEN)
    assert factors is None and "clips" in why
    idle = chain.folding(DDIMScheduler(**{**DDIM, "steps_offset": 0}), STEPS_TAKEN)[0]
    assert idle is not None and idle[-1] == 0 and bool((idle[:-1] > 0).all()), "a step that ignores the estimate"


def test_the_factors_are_those_of_the_papers_formulas() -> None:
    scheduler = SCHEDULERS["ddim"]()
    factors = chain.folding(scheduler, STEPS_TAKEN)[0]
    assert factors is not None
    scheduler.set_timesteps(STEPS_TAKEN)
    bars = scheduler.alphas_cumprod.double()
    for i, t in enumerate(scheduler.timesteps):
        before = int(t) - 1000 // STEPS_TAKEN
        now, then = bars[t], bars[before] if before >= 0 else scheduler.final_alpha_cumprod.double()
        a = (then / now).sqrt()
        c = (1 - then).sqrt() - (then * (1 - now) / now).sqrt()
        assert factors[i].item() == pytest.approx(float(-a / c), rel=1e-3)
    euler = SCHEDULERS["euler"]()
    factors = chain.folding(euler, STEPS_TAKEN)[0]
    assert factors is not None
    euler.set_timesteps(STEPS_TAKEN)
    sigma = euler.sigmas.double()
    expected = -1 / (sigma[1:] - sigma[:-1]) * (sigma[:-1] ** 2 + 1).sqrt()
    assert torch.allclose(factors, expected, rtol=1e-4) and len(factors) == STEPS_TAKEN


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", [*ONE_STEP, "dpm"])
def test_hooks_equal_a_loop_that_corrects_by_hand(name: str, guidance: float) -> None:
    """x - B goes into the network and into the scheduler (network only for DPM-Solver++); pictures agree."""
    pipe, _ = tiny.quantized_pipeline("text", timed=False)
    pipe.scheduler = SCHEDULERS[name]()
    tables, generator = planted(pipe.scheduler, 4), torch.Generator().manual_seed(5)
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    by_hand = loop(pipe, tables, noise, guidance, inside=name in ONE_STEP)
    plain = draw(pipe, noise, guidance)
    correction.install(pipe.unet, spec_of(pipe.scheduler, 4), tables)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="bitbrush")
        hooked = draw(pipe, noise, guidance)
    assert (hooked - by_hand).abs().max() <= 1e-5 * by_hand.abs().max() + 1e-5
    assert (hooked - plain).abs().max() > 1e-2 * plain.abs().max(), "the correction does something"
    correction.remove(pipe.unet)
    assert torch.equal(draw(pipe, noise, guidance), plain)


def planted(scheduler: Any, channels: int) -> dict[str, Tensor]:
    generator, shape = torch.Generator().manual_seed(6), (STEPS_TAKEN, channels)
    shift = 0.1 * torch.randn(shape, generator=generator)
    shift[0] = 0
    factors = chain.folding(scheduler, STEPS_TAKEN)[0]
    bias = torch.zeros(shape) if factors is None else (factors[:, None] * shift).float()
    return {"scale": 1 + 0.1 * torch.randn(shape, generator=generator), "bias": bias, "shift": shift}


def spec_of(scheduler: Any, channels: int) -> CorrectionSpec:
    return CorrectionSpec(scheduler=type(scheduler).__name__, channels=channels,
                          timesteps=tuple(chain.timesteps_of(scheduler, STEPS_TAKEN)))


def draw(pipe: Any, noise: Tensor, guidance: float, steps: int = STEPS_TAKEN) -> Tensor:
    out = pipe(prompt=small.PROMPTS[: len(noise)], latents=noise.clone(), num_inference_steps=steps,
               guidance_scale=guidance, output_type="latent").images
    assert isinstance(out, Tensor)
    return out


@torch.no_grad()
def loop(pipe: Any, tables: dict[str, Tensor], noise: Tensor, guidance: float, *, inside: bool) -> Tensor:
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS_TAKEN)
    text, empty = pipe.encode_prompt(small.PROMPTS[: len(noise)], "cpu", 1, guidance > 1)
    x = noise * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        unit = scheduler.scale_model_input(torch.ones(1, 1, 1, 1), t)
        moved = x - tables["shift"][i].reshape(1, -1, 1, 1) / unit
        u = scheduler.scale_model_input(moved, t)
        if guidance > 1:  # as one batch, as the pipeline does: attention may sum in another order otherwise
            e_u, e_c = pipe.unet(torch.cat([u, u]), t, encoder_hidden_states=torch.cat([empty, text])).sample.chunk(2)
            e = e_u + guidance * (e_c - e_u)
        else:
            e = pipe.unet(u, t, encoder_hidden_states=text).sample
        e = tables["scale"][i].reshape(1, -1, 1, 1) * e
        x = scheduler.step(e, t, moved if inside else x).prev_sample
    out: Tensor = x
    return out


def test_schedulers_that_visit_a_timestep_twice_are_refused() -> None:
    refused = [PNDMScheduler(**BETAS), HeunDiscreteScheduler(**BETAS)]
    for scheduler in refused:
        with pytest.raises(InputError, match="cannot be fitted") as caught:
            chain.timesteps_of(scheduler, 5)
        assert small.complete(caught.value)
    assert len(refused) == 2


# ---- when it applies (invariant 7) -------------------------------------------------------------------------------
def corrected_pipeline(name: str = "ddim") -> Any:
    pipe, _ = tiny.quantized_pipeline("text", timed=False)
    pipe.scheduler = SCHEDULERS[name]()
    correction.install(pipe.unet, spec_of(pipe.scheduler, 4), planted(pipe.scheduler, 4)).watch(pipe)
    return pipe


@pytest.mark.parametrize("steps", [3, 5, 12])
def test_another_number_of_steps_leaves_it_out_and_says_so_once(steps: int) -> None:
    pipe = corrected_pipeline()
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="leaves the stored correction out") as caught:
        other = draw(pipe, noise, 4.0, steps)
    assert len([w for w in caught if "bitbrush" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="bitbrush")
        assert torch.equal(draw(pipe, noise, 4.0, steps), other), "said once"
        right = draw(pipe, noise, 4.0)
    correction.remove(pipe.unet)
    assert torch.equal(draw(pipe, noise, 4.0, steps), other) and not torch.equal(draw(pipe, noise, 4.0), right)


def test_another_scheduler_leaves_it_out() -> None:
    pipe = corrected_pipeline()
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe.scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)
    with pytest.warns(UserWarning, match="DDIMScheduler in 6 steps"):
        other = draw(pipe, noise, 4.0)
    correction.remove(pipe.unet)
    assert torch.equal(draw(pipe, noise, 4.0), other)


def test_the_rule_of_turns() -> None:
    """A trajectory begins at the first row; a repeated call stays in its row; anything else is left out until then."""
    spec = CorrectionSpec(scheduler="X", timesteps=(9.0, 6.0, 3.0, 0.0), channels=1)
    model = corrected_pipeline().unet
    found = correction.install(model, spec.model_copy(update={"channels": 4}), {"shift": torch.ones(4, 4)})
    x, looked = torch.zeros(1, 4, 2, 2), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for times, expected in (
            ((9, 9, 6, 6, 3, 3, 0, 0), "yyyyyyyy"),  # two calls a step, as guidance may make
            ((6, 3, 0), "nnn"),  # begins in the middle
            ((9, 3, 0), "ynn"),  # skips a row
            ((12, 9, 6, 3, 0), "nnnnn"),  # comes from a noisier timestep
            ((9, 7, 6, 3), "ynnn"),  # a timestep of another schedule
            ((9, 6, 9, 6, 3), "yyyyy"),  # aborted, and begun anew
            ((9, 6, 3, 0, 9, 6), "yyyyyy"),
        ):
            found.restart()
            seen = "".join("y" if found.enter(x, float(t)).abs().max() > 0 else "n" for t in times)
            assert seen == expected, times
            looked += len(times)
        found.restart()
        assert found.enter(x.expand(2, -1, -1, -1), torch.tensor([9.0, 6.0])).abs().max() == 0, "mixed times"
    assert looked == 34


def test_copies_and_casts() -> None:
    pipe = corrected_pipeline()
    twin = copy.deepcopy(pipe.unet)
    mine, its = correction.of(pipe.unet), correction.of(twin)
    assert its is not mine and its._owner is None and torch.equal(its.scale, mine.scale)
    its.scale.fill_(1.5)
    first = float(mine.timesteps[0])
    assert not torch.equal(tiny.run(twin, first), tiny.run(pipe.unet, first))
    its.to(torch.float16)
    assert {its.scale.dtype, its.timesteps.dtype, its.state.dtype} == {torch.float32}


def test_a_compiled_graph_corrects() -> None:
    pipe = corrected_pipeline()
    times = [float(t) for t in correction.of(pipe.unet).timesteps]
    eager = [tiny.run(pipe.unet, t) for t in times]
    correction.of(pipe.unet).restart()
    compiled = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    again = [tiny.run(compiled, t) for t in times]
    assert len(again) == STEPS_TAKEN
    for one, other in zip(eager, again, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


# ---- the steps ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("scheduler", "term"), [(DDIMScheduler, "folded"), (EulerDiscreteScheduler, "folded"),
                            (DPMSolverMultistepScheduler, "network")],
)
def test_a_run_fits_a_correction_of_the_packed_network(tmp_path: Path, scheduler: Any, term: str) -> None:
    pipe = tiny.text_pipeline()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    run = small.execute(tmp_path, pipe, CORRECTED)
    facts, found = run.done[-1]["correction"], correction.of(pipe.unet)
    assert facts["input_term"] == term or (facts["input_term"], term) == ("none", "network")
    assert facts["scheduler"] == scheduler.__name__ and facts["samples"] == 4
    assert facts["guidance"] == 4.0 and ("not known" in facts["in_words"]) == (term == "network")
    assert found.scale.shape == (3, 4) and torch.equal(found.shift[0], torch.zeros(4))
    assert not torch.equal(found.scale, torch.ones(3, 4)) and (found.bias.any().item() == (term == "folded"))
    assert all(layer.face == "packed" for layer in wrap.layers(pipe.unet).values())
    assert len(facts["error_with"]) == len(facts["error_without"]) == 3
    assert facts["error_with"][-1] < facts["error_without"][-1], "on the trajectories it was fitted on"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="bitbrush")
        pipe("red apple", num_inference_steps=3, guidance_scale=4.0, output_type="latent")


def test_the_layers_are_those_of_a_run_without_a_correction(tmp_path: Path) -> None:
    states = []
    for i, text in enumerate((PLAIN, CORRECTED)):
        pipe = tiny.text_pipeline()
        (tmp_path / str(i)).mkdir()
        small.execute(tmp_path / str(i), pipe, text)
        correction.remove(pipe.unet)
        states.append(pipe.unet.state_dict())
    assert states[0].keys() == states[1].keys() and len(states[0]) > 100
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_unconditional_pipeline(tmp_path: Path) -> None:
    pipe = tiny.unconditional_pipeline()
    run = small.execute(tmp_path, pipe, CORRECTED)
    facts = run.done[-1]["correction"]
    assert facts["scheduler"] == "DDPMScheduler" and facts["guidance"] is None and facts["input_term"] != "folded"
    assert facts["error_without"][0] == 0 and "clips" in facts["why"]
    assert max(facts["error_without"]) < 0.5, "the chains share their noise"


def test_a_resumed_run_ends_with_the_same_tables(tmp_path: Path) -> None:
    pipe = tiny.text_pipeline()
    run = small.execute(tmp_path, pipe, CORRECTED)
    again = tiny.text_pipeline()
    resumed = small.begin(tmp_path, again, run.recipe, resume=True)
    resumed.execute()
    resumed.journal.release()
    pairs = zip(pipe.unet.state_dict().items(), again.unet.state_dict().items(), strict=True)
    looked = [(a, torch.equal(x, y)) for (a, x), (b, y) in pairs if a == b]
    assert len(looked) == len(pipe.unet.state_dict()) and all(same for _, same in looked)
    assert sum(name.startswith(correction.NAME) for name, _ in looked) == 3


def test_settings(tmp_path: Path) -> None:
    pipe = tiny.text_pipeline()
    settings = {"trajectories.steps": 4, "trajectories.guidance": 1.0, "correct.input_term": False,
                "correct.granularity": "scalar", "correct.samples": 3, "correct.fit": "guided"}
    run = small.execute(tmp_path, pipe, CORRECTED, settings=settings)
    facts, found = run.done[-1]["correction"], correction.of(pipe.unet)
    assert (facts["samples"], facts["guidance"], facts["input_term"]) == (3, 1.0, "none")
    assert found.scale.shape == (4, 4) and not found.shift.any() and not found.bias.any()
    assert all(row.unique().numel() == 1 for row in found.scale)


@pytest.mark.parametrize(("scheduler", "fit"), [(DDIMScheduler, "state"), (DPMSolverMultistepScheduler, "branches")])
def test_a_run_fits_for_the_next_state_where_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: Any, fit: str
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Silent, "say", lambda self, text: said.append(text))
    settings = {f"correct.{key}": value for key, value in CORRECTIONS["tac-state"].items()}
    pipe = tiny.text_pipeline()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    facts = small.execute(tmp_path, pipe, CORRECTED, settings=settings).done[-1]["correction"]
    found = correction.of(pipe.unet)
    assert facts["fit"] == fit and any("not for the next state" in text for text in said) == (fit == "branches")
    assert facts["factors"] == int((found.scale != 1).sum()) and facts["shifts"] == int((found.shift != 0).sum())
    assert bool(((found.scale >= 1 / 1.0501) & (found.scale <= 1.0501)).all())


@pytest.mark.parametrize(("clips", "name"), [(False, "tac-even"), (True, "tac-even"), (True, "tac-mean")])
def test_a_balanced_run_leaves_the_input_alone(tmp_path: Path, clips: bool, name: str) -> None:
    """Also where the scheduler clips: the step is the scheduler's own, and nothing has to be folded."""
    settings = {f"correct.{key}": value for key, value in CORRECTIONS[name].items()}
    pipe = tiny.text_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=clips, clip_sample_range=3.0)
    settings |= {"correct.significance": 0.0}
    facts = small.execute(tmp_path, pipe, CORRECTED, settings=settings).done[-1]["correction"]
    found = correction.of(pipe.unet)
    assert (facts["fit"], facts["input_term"], facts["why"], facts["shifts"]) == ("even", "none", "", 0)
    assert facts["factors"] == int((found.scale != 1).sum()) and (facts["factors"] > 0) == (name == "tac-even")
    assert facts["constants"] == int((found.bias != 0).sum()) > 0 and not found.shift.any()
    assert bool(((found.scale >= 1 / 1.2001) & (found.scale <= 1.2001)).all())


def drifting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed network, as it is fitted, answers with a constant too much."""
    network = beside.Recorded.network
    monkeypatch.setattr(beside.Recorded, "network", lambda self, step, x: network(self, step, x) + 0.1)


def test_the_form_is_found_on_trajectories_that_no_fit_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drifting(monkeypatch)
    said: list[str] = []
    bars: list[tuple[str, int]] = []
    monkeypatch.setattr(Silent, "say", lambda self, text: said.append(text))
    moved: list[int] = []
    monkeypatch.setattr(Silent, "start", lambda self, label, total: (bars.append((label, total)), moved.append(0)))
    monkeypatch.setattr(Silent, "advance", lambda self, n=1, note="": moved.append(moved.pop() + n))
    pipe = tiny.text_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    settings = {f"correct.{key}": value for key, value in CORRECTIONS["tac-auto"].items()} | {"trajectories.samples": 8}
    facts = small.execute(tmp_path, pipe, CORRECTED, settings=settings).done[-1]["correction"]
    gains = {name: found["gain_db"] for name, found in facts["tried"].items()}
    assert set(gains) == set(TRIED) == {"tac-mean", "tac-state", "tac-even"} and max(gains.values()) > 0.5
    best = max(gains, key=lambda name: gains[name])
    assert facts["fit"] == CORRECTIONS[best]["fit"] and facts["samples"] == 8
    assert facts["error_with"][-1] < 0.95 * facts["error_without"][-1]
    assert any(f"{best} is taken" in text and "tac-state" in text for text in said)
    steps = 9 * len(facts["timesteps"])
    assert bars[-1] == ("walks", steps) and moved[-1] == steps + 1, "and the unit in the bar around it"


def test_no_form_is_taken_where_none_is_known_to_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One trajectory to judge on says nothing of chance."""
    drifting(monkeypatch)
    said: list[str] = []
    monkeypatch.setattr(Silent, "say", lambda self, text: said.append(text))
    pipe = tiny.text_pipeline()
    settings: dict[str, Any] = {"correct.fit": "auto", "trajectories.samples": 2}
    facts = small.execute(tmp_path, pipe, CORRECTED, settings=settings).done[-1]["correction"]
    found = correction.of(pipe.unet)
    assert (facts["fit"], facts["factors"], facts["shifts"], facts["constants"]) == ("none", 0, 0, 0)
    assert bool((found.scale == 1).all()) and not found.bias.any() and not found.shift.any()
    assert any("no form of the correction helps" in text for text in said) and len(facts["tried"]) == 3
    assert facts["in_words"].startswith("none") and all(found["error_db"] is None for found in facts["tried"].values())


def test_the_order_of_steps(tmp_path: Path) -> None:
    wrong = [
        small.HEAD + small.FIT + TRAJECTORIES + small.RANGES + small.PACK + CORRECT,  # no calibrate
        small.HEAD + small.CALIBRATE + small.FIT + small.RANGES + small.PACK + CORRECT,  # no trajectories
        small.HEAD + small.CALIBRATE + small.FIT + small.RANGES + small.PACK + TRAJECTORIES + CORRECT,  # float is gone
        small.HEAD + small.CALIBRATE + TRAJECTORIES + small.FIT + small.RANGES + CORRECT + small.PACK,  # not packed
        CORRECTED.replace('[[step]]\ndo = "verify"\n', "") + '[[step]]\ndo = "verify"\n',  # the proof is of the layers
        CORRECTED + CORRECT.replace('"correct"', '"correct"\nid = "again"'),
    ]
    for text in wrong:
        with pytest.raises(InputError, match=r"needs a step|must come before") as caught:
            small.recipe(tmp_path, text)
        assert small.complete(caught.value)
    assert len(wrong) == 6


def test_a_correction_joins_every_recipe_that_has_data() -> None:
    from bitbrush.engine.recipe import bundled

    joined, refused = [], []
    for name in bundled():
        try:
            recipe = load_recipe(name, STEPS, correct="tac", settings={"correct.l1": 0.25, "trajectories.samples": 8})
        except InputError as error:
            assert small.complete(error) and "calibrate" in error.what
            refused.append(name)
            continue
        joined.append(name)
        kinds = [item.do for item in recipe.steps]
        assert kinds[-1] == "correct" and kinds.count("trajectories") == 1 and recipe.prompts_needed() >= 8
        assert recipe.steps[-1].model_dump()["l1"] == 0.25
    assert "rtn-dynamic" in refused and {"rtn", "qdiffusion", "quest"} <= set(joined)
    with pytest.raises(InputError, match="method"):
        load_recipe("rtn", STEPS, correct="ptqd")


def test_the_names_of_corrections() -> None:
    """``tac`` is the published form, ``tac-state`` sets what differs, and settings come on top of both."""
    tac, state, even, mean, without = (
        load_recipe("rtn", STEPS, correct=name, settings=settings).steps[-1].model_dump()
        for name, settings in (
            ("tac", {}), ("tac-state", {}), ("tac-even", {}), ("tac-mean", {}),
            ("tac-state", {"correct.input_term": False}))
    )
    published = {"l1": 0.5, "l2": 0.1, "tau": 0.5, "fit": "branches", "significance": 0.0, "clamp": 2.0}
    ours = {"l1": 0.0, "l2": 0.0, "tau": 0.0, "fit": "state", "significance": 2.0, "clamp": 1.05}
    assert {key: tac[key] for key in published} == published
    assert even == {**tac, "fit": "even", "significance": 2.0, "clamp": 1.2} and mean == {**even, "clamp": 1.0}
    assert state == {**tac, **ours} and without == {**state, "input_term": False}
