"""Noise, batches, hooks: what a fair comparison stands on."""

from __future__ import annotations

import pytest
import torch

from bitbrush.errors import InputError, NumericsError
from bitbrush.evaluation import draw, draw_with_trajectory, noise_generator, trajectory, with_ddim

PROMPTS = ["red apple", "pizza", "superhero"]


def test_noise_depends_on_seed_and_index_alone() -> None:
    seen = {float(torch.randn(1, generator=noise_generator(seed, i))) for seed in range(8) for i in range(8)}
    assert len(seen) == 64
    assert torch.equal(torch.randn(9, generator=noise_generator(1, 2)), torch.randn(9, generator=noise_generator(1, 2)))
    # frozen: published results hang on this stream's seed
    assert noise_generator(0, 0).initial_seed() == 6956993988634818902


def test_a_picture_does_not_depend_on_the_batch(emoji) -> None:
    one = draw(emoji, prompts=PROMPTS, n=3, seed=5, steps=2, batch=1)
    all_ = draw(emoji, prompts=PROMPTS, n=3, seed=5, steps=2, batch=3)
    last = draw(emoji, prompts=PROMPTS, indices=[2], seed=5, steps=2)
    assert one.shape == (3, 3, 128, 128) and one.dtype == torch.float32
    assert float(one.min()) >= -1 and float(one.max()) <= 1
    assert torch.allclose(one, all_, atol=1e-3)
    assert torch.allclose(one[2:], last, atol=1e-3)
    assert not torch.allclose(one[0], draw(emoji, prompts=PROMPTS, n=1, seed=6, steps=2)[0], atol=1e-2)


def test_trajectory_starts_at_the_noise_and_keeps_the_conditional_half(emoji) -> None:
    seen = []
    handle = emoji.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0].clone()), with_kwargs=True
    )
    times, latents = trajectory(emoji, prompts=PROMPTS, n=2, seed=3, steps=2, batch=2)
    handle.remove()
    assert latents.shape == (2, 2, 4, 32, 32)
    for i in range(2):
        noise = torch.randn(1, 4, 32, 32, generator=noise_generator(3, i))[0]
        assert torch.equal(latents[0, i], noise)
    assert seen[1].shape[0] == 4 and torch.equal(latents[1], seen[1][2:])
    emoji.scheduler.set_timesteps(2)
    assert times.tolist() == emoji.scheduler.timesteps.tolist()


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_unconditional_pipelines(kind: str, request: pytest.FixtureRequest) -> None:
    pipeline = request.getfixturevalue(kind)
    one = draw(pipeline, prompts=None, n=3, steps=3, batch=1)
    pictures, times, latents = draw_with_trajectory(pipeline, prompts=None, n=3, tracked=2, steps=3, batch=2)
    assert one.shape == (3, 3, 16, 16) and torch.allclose(one, pictures, atol=1e-4)
    assert latents.shape == (3, 2, 3, 16, 16) and len(times) == 3
    assert torch.equal(latents[0, 1], torch.randn(1, 3, 16, 16, generator=noise_generator(0, 1))[0])
    assert not pipeline.unet._forward_pre_hooks


def test_nothing_is_tracked_when_nothing_is_asked(ddim) -> None:
    pictures, times, latents = draw_with_trajectory(ddim, prompts=None, n=2, tracked=0, steps=2)
    assert len(pictures) == 2 and times.numel() == latents.numel() == 0


def test_ddim_follows_the_protocol(ddpm, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = with_ddim(ddpm)
    assert pipeline.unet is ddpm.unet and type(ddpm.scheduler).__name__ == "DDPMScheduler"
    assert pipeline.scheduler.config.clip_sample is True
    calls = []
    step = pipeline.scheduler.step
    monkeypatch.setattr(pipeline.scheduler, "step", lambda *a, **k: (calls.append(k), step(*a, **k))[1])
    draw(pipeline, prompts=None, n=1, steps=2)
    assert [c["eta"] for c in calls] == [0.0, 0.0] and all(c["use_clipped_model_output"] for c in calls)


def test_ddim_is_refused_for_text_to_image(emoji) -> None:
    with pytest.raises(InputError, match="unconditional"):
        with_ddim(emoji)


@pytest.mark.parametrize("before", [None, {"desc": "mine", "disable": False}])
def test_progress_bar_is_left_as_it_was(ddim, before, capfd: pytest.CaptureFixture[str]) -> None:
    if before is not None:
        ddim.set_progress_bar_config(**before)
    had = getattr(ddim, "_progress_bar_config", None)
    capfd.readouterr()
    draw(ddim, prompts=None, n=1, steps=2)
    assert capfd.readouterr() == ("", "")
    assert getattr(ddim, "_progress_bar_config", None) == had


def test_hooks_and_bar_go_back_when_a_forward_fails(ddim, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("stop")

    monkeypatch.setattr(ddim.unet, "forward", fail)
    with pytest.raises(RuntimeError, match="stop"):
        trajectory(ddim, prompts=None, n=1, steps=2)
    assert not ddim.unet._forward_pre_hooks and not hasattr(ddim, "_progress_bar_config")


def test_nan_is_named(ddim) -> None:
    with torch.no_grad():
        ddim.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(NumericsError, match=r"picture 4 \(seed 7\)"):
        draw(ddim, prompts=None, indices=[4, 5], seed=7, steps=2)


def test_progress_is_told(ddim, counter) -> None:
    draw(ddim, prompts=None, n=5, batch=2, steps=1, progress=counter)
    assert counter.done == 5


@pytest.mark.parametrize(
    ("prompts", "n", "indices"), [(PROMPTS, 4, None), (None, 1, None), (PROMPTS, None, [3]), (PROMPTS, 2, [0])]
)
def test_text_to_image_refuses(emoji, prompts, n, indices) -> None:
    with pytest.raises(InputError):
        draw(emoji, prompts=prompts, n=n, indices=indices, steps=1)


@pytest.mark.parametrize(("prompts", "n"), [(PROMPTS, 1), (None, 0), (None, None)])
def test_unconditional_refuses(ddim, prompts, n) -> None:
    with pytest.raises(InputError):
        draw(ddim, prompts=prompts, n=n, steps=1)
