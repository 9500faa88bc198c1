"""The commands. Each reads its options, calls the public API and shows what came back; heavy imports are inside.

Errors are not caught here: `bitbrush.cli.entry` turns them into a message and an exit code.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from bitbrush.cli import render
from bitbrush.cli.evaluating import evaluate_command
from bitbrush.cli.options import (
    Batch,
    Debug,
    Device,
    Graph,
    Guidance,
    Json,
    Kernel,
    Prompts,
    Seed,
    Steps,
    command_line,
    heavy,
    read_prompt_file,
)
from bitbrush.cli.render import Screen
from bitbrush.cli.sensing import sensitivity
from bitbrush.cli.text import clean
from bitbrush.errors import InputError

app = typer.Typer(
    name="bitbrush",
    help="Low-bit diffusers pipelines: quantize, pack, prove, compare.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or hub id of a diffusers pipeline, or a model folder.")
]
Recipe = Annotated[
    str, typer.Option("--recipe", "-r", help="Name of a recipe (see `bitbrush recipes`) or a .toml file.")
]
Weights = Annotated[int | None, typer.Option("--weights", "-w", help="Bits of the weights, 1 to 8.")]
Activations = Annotated[
    int | None, typer.Option("--activations", "-a", help="Bits of the activations, 1 to 8; 16 = float.")
]
Preset = Annotated[str | None, typer.Option("--preset", help="A preset of the recipe, such as demo.")]

@app.command()
def inspect(
    model: Model,
    recipe: Recipe = "qdiffusion",
    weights: Weights = None,
    activations: Activations = None,
    preset: Preset = None,
    device: Device = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show layers, shares and estimates; nothing slow.

    Every layer with its share of weights and of compute, what stays float and why, and what size, time and memory a
    run will take.
    """
    screen = heavy(as_json, debug)
    import bitbrush

    options: dict[str, Any] = {"recipe": recipe, "weights": weights, "activations": activations}
    options |= {"preset": preset, "device": device}
    report = bitbrush.inspect(model, **options).to_json()
    screen.show(report, *([] if as_json else render.inspection_tables(report)))


@app.command()
def quantize(
    model: Model,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the result; new or empty.")] = None,
    recipe: Recipe = "qdiffusion",
    weights: Weights = None,
    activations: Activations = None,
    preset: Preset = None,
    prompts: Prompts = None,
    seed: Seed = 0,
    device: Device = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="step.key=value; may be repeated.")] = None,
    correct: Annotated[
        str | None,
        typer.Option("--correct", help="tac: also fit constants a timestep that correct the estimate, as published; "
                                       "tac-state: for the next state's error, without what is within its errors; "
                                       "tac-even: the same, and noise in the estimate does not count; "
                                       "tac-mean: that without the factor; "
                                       "tac-auto: the best of these three on trajectories that no fit saw, or none.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Folder of results that runs which begin alike share.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the recipe and the estimates, and stop.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize MODEL and save the packed result.

    A recipe says how; a run that is stopped goes on with `bitbrush resume OUT`.
    """
    screen = Screen(as_json, debug)
    if output is None and not dry_run:
        raise InputError(
            "no output folder was given",
            where="bitbrush quantize",
            why="the result has to be saved somewhere",
            try_="add -o OUT, or --dry-run to see what would be done",
        )
    options: dict[str, Any] = {
        "recipe": recipe,
        "weights": weights,
        "activations": activations,
        "preset": preset,
        "prompts": read_prompt_file(screen, prompts),
        "seed": seed,
        "device": device,
        "settings": parse_settings(settings or []),
        "output": output,
    }
    options |= {} if correct is None else {"correct": correct}
    options |= {} if cache is None else {"cache": cache}
    screen = heavy(as_json, debug)
    import bitbrush

    if dry_run:
        report = bitbrush.dry_run(model, **options)
        screen.show(report, *([] if as_json else render.dry_run_tables(report)))
        return
    with screen.progress() as progress:
        result = bitbrush.quantize(model, **options, progress=progress)
    _show_result(screen, result)


@app.command()
def resume(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of an interrupted run.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Go on with an interrupted run.

    It starts from the last finished unit and ends with the same bytes as a run that was not interrupted.
    """
    screen = heavy(as_json, debug)
    import bitbrush

    with screen.progress() as progress:
        result = bitbrush.resume(output, progress=progress)
    _show_result(screen, result)


@app.command()
def sample(
    model: Annotated[str, typer.Argument(metavar="OUT", help="A quantized folder, or any diffusers pipeline.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="What to draw; may be repeated.")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The picture; numbered where there are several.")
    ] = Path("picture.png"),
    n: Annotated[int | None, typer.Option("-n", min=1, help="How many pictures; one a prompt by default.")] = None,
    steps: Steps = 25,
    guidance: Guidance = 4.0,
    seed: Seed = 0,
    batch: Batch = 4,
    device: Device = None,
    kernel: Kernel = "reference",
    graph: Graph = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw pictures with a result or a pipeline.

    Text-to-image pipelines need --prompt, unconditional ones take none.
    """
    screen = heavy(as_json, debug)
    from bitbrush.cli import pictures

    with screen.progress() as progress:
        paths = pictures.sample(
            model,
            output,
            prompts=prompt or None,
            n=n,
            steps=steps,
            guidance=guidance,
            seed=seed,
            batch=batch,
            device=device,
            kernel=kernel,
            graph=graph,
            progress=progress,
        )
    names = [str(path) for path in paths]
    screen.show({"pictures": names}, Text(clean("\n".join(names))))


@app.command()
def compare(
    outputs: Annotated[list[str], typer.Argument(metavar="OUT1 OUT2 ...", help="Quantized folders.")],
    reference: Annotated[str, typer.Option("--reference", help="The full-precision pipeline.")],
    prompts: Prompts = None,
    n: Annotated[int, typer.Option("-n", min=1, help="How many pictures of each.")] = 64,
    seed: Seed = 0,
    steps: Steps = 25,
    guidance: Guidance = 4.0,
    batch: Batch = 4,
    device: Device = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML page.")] = Path("report.html"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare results and write a report.

    Every pipeline draws the same prompts from the same noise; the page shows the pictures, what each result cost, and
    what is inside: bits, losses, ranges.
    """
    screen = Screen(as_json, debug)
    texts = read_prompt_file(screen, prompts)
    screen = heavy(as_json, debug)
    from bitbrush.cli import pictures

    options: dict[str, object] = {"--reference": reference, "--prompts": prompts, "-n": n, "--seed": seed}
    options |= {"--steps": steps, "--guidance": guidance, "--batch": batch, "--device": device, "-o": output}
    command = command_line("compare", outputs, options)
    with screen.progress() as progress:
        comparison = pictures.compare(
            outputs,
            reference,
            output,
            prompts=texts,
            n=n,
            seed=seed,
            steps=steps,
            guidance=guidance,
            batch=batch,
            device=device,
            command=command,
            progress=progress,
        )
    screen.show(
        {"report": str(output), **comparison}, *([] if as_json else render.comparison_tables(comparison, output))
    )


app.command()(sensitivity)
app.command("eval")(evaluate_command)


@app.command()
def recipes(
    action: Annotated[str | None, typer.Argument(metavar="[show]", help="`show` prints one recipe in full.")] = None,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Name of a recipe or a .toml file.")] = None,
    weights: Weights = None,
    activations: Activations = None,
    preset: Preset = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the recipes, or show one.

    `bitbrush recipes show qdiffusion` prints one in full, every default written out.
    """
    if action not in (None, "show") or (action == "show" and name is None):
        raise InputError(
            f"`recipes {action}` is not a command" if action != "show" else "the name of a recipe is missing",
            where="bitbrush recipes",
            why="expected `recipes` or `recipes show NAME`",
            try_="bitbrush recipes",
        )
    screen = Screen(as_json, debug)
    from bitbrush.cli import catalogue

    if name is None:
        rows = catalogue.listing()
        screen.show({"recipes": rows}, render.recipe_table(rows))
        return
    text = catalogue.expanded(name, weights, activations, preset)
    screen.show({"recipe": tomllib.loads(text), "toml": text}, Text(clean(text)))


@app.command()
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Show what this machine can run.

    Versions, devices, the kernels that would run and why not others, free disk and memory.
    """
    screen = heavy(as_json, debug)
    from bitbrush.cli.doctor import examine

    report = examine()
    screen.show(report, *([] if as_json else render.doctor_tables(report)))


@app.command()
def demo(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A new folder; ./bitbrush-demo by default.")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The whole path on the bundled model.

    Quantizes it to W4A8 with Q-Diffusion, compares it with plain rounding, and writes a report; about five minutes on
    two CPU cores.
    """
    screen = heavy(as_json, debug)
    from bitbrush.cli.demo import run_demo

    command = command_line("demo", [], {"--output": output, "--seed": seed or None})
    with screen.progress() as progress:
        outcome = run_demo(output, seed=seed, command=command, progress=progress)
    screen.show(outcome, *([] if as_json else render.demo_tables(outcome)))


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """``["weights.iterations=100"]`` as ``{"weights.iterations": 100}``; values are TOML, or else plain text.

    Raises:
        InputError: A pair has no ``=`` or no ``step.key`` before it, or a key comes twice.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        key = key.strip()
        if not sign or not all(key.partition(".")):
            raise InputError(
                "a setting could not be read",
                where=f"--set {pair}",
                why="expected step.key=value",
                try_="--set weights.iterations=100",
            )
        if key in settings:
            raise InputError(
                "a setting was given twice", where=f"--set {pair}", why=f"{key} is set already", try_="drop one of them"
            )
        settings[key] = _toml_value(value.strip())
    return settings


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _show_result(screen: Screen, result: Any) -> None:
    summary = {
        "output": str(result.output),
        "recipe": result.history.get("recipe"),
        "weight_bits": result.history.get("weight_bits"),
        "activation_bits": result.history.get("activation_bits"),
        "average_bits": result.history.get("average_bits"),
        "parameters": result.history.get("parameters"),
        "packed_bytes": result.history.get("bytes"),
        "seconds": result.seconds,
        "peak_memory": result.peak_memory,
        "correction": result.history.get("correction", {}).get("in_words"),
        "proof": result.proof,
    }
    screen.show(summary, *([] if screen.as_json else render.result_tables(summary)))
