"""The runs behind the bars and ablation tables that the time-aware, grouped and codebook methods have, as data; and a
runner that works through them, several side by side on one or more GPUs.

    python benchmarks/arms.py list [NAME ...] [--missing]         # their commands, the most telling first
    python benchmarks/arms.py run [NAME ...] --zoo ZOO [--gpus 0 1] [--slots 3] [--budget SECONDS] [--work FOLDER]
    python benchmarks/arms.py run --smoke                         # two tiny runs on the CPU

NAME keeps the runs whose name contains it (``tdq``, ``tiny-dgq``, ``emoji-sd-pcr-w8a6-random``). Runs that have the
same first steps share them through a cache: the artifact of the one named ``after`` is waited for, and where that one
failed, nothing is begun that would only repeat its work. ``run`` leaves out what has its results already, in
--out; it starts nothing new once the budget is spent, and waits for what is running. A run that fails is told with the
end of its log, and the others go on; called again, it goes on from its last finished unit. Each slot is one process
that does its runs one after another, since loading the libraries takes as long as a short run.

Several processes on one GPU gain about half under NVIDIA's MPS (start ``nvidia-cuda-mps-control -d`` before). There,
never kill one: the death of a client ends all others of the card. ``kill -STOP`` gives its share to the others.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "quality"
NEAREST = "--set weights.iterations=0"
"""Weights rounded to nearest: what the arms differ in is elsewhere, and each is a minute shorter."""
VQDM = (
    ("full", "small", 1500, ""), ("unshared", "small-unshared", 1500, ""), ("no-tuning", "small", 0, ""),
    ("beam1", "small", 1500, "--set codebooks.beam=1"), ("one-pass", "small", 1500, "--set codebooks.epochs=1"),
    ("float-inputs", "small", 1500, "--set codebooks.inputs=float"),
    ("paper-search", "small", 1500, "--set codebooks.feedback=0.0 --set codebooks.damping=0.0"),
)  # fmt: skip
"""Arm, preset, iterations of tuning, more."""
SECONDS = 1.0
"""Between two looks for a run that may begin."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One call of ``quality.py``.

    Attributes:
        model, recipe, bits, arm: As there.
        flags: Further ones.
        after: Name of the run that makes the steps both begin with.
        seeds: Sampling seeds; of an ablation one, which is its quantization seed, too.
        ablation: Whether it is one.
    """

    model: str
    recipe: str
    bits: str
    arm: str
    flags: str = ""
    after: str = ""
    seeds: tuple[int, ...] = (0, 1, 2)
    ablation: bool = False

    @property
    def name(self) -> str:
        """Unique; begins as its result files do."""
        return f"{self.model}-{self.recipe}-{self.bits}-{self.arm}" + (f"-q{self.seeds[0]}" if self.ablation else "")

    def done(self, results: Path) -> bool:
        """Whether every result file lies in that folder."""
        stem = f"{self.model}-{self.recipe}-{self.bits}-{self.arm}"
        return all((results / f"{stem}-s{seed}.json").exists() for seed in self.seeds)

    @property
    def facts(self) -> str:
        """Where ``quality.py`` says, below its work folder, that the artifact is there."""
        return f"{self.model}/{self.recipe}-{self.bits}-{self.arm}-q{self.seeds[0] if self.ablation else 0}.facts.json"

    def words(self) -> list[str]:
        """Arguments of ``quality.py``."""
        seeds = [str(seed) for seed in self.seeds]
        own = ["--quantization-seed", seeds[0]] if self.ablation else []
        return [self.model, self.recipe, self.bits, "--arm", self.arm, "--seeds", *seeds, *own, *self.flags.split(),
                "--no-baselines"]  # fmt: skip


def bars() -> list[Run]:
    """Runs that bars compare, sampling seeds 0, 1, 2."""
    quest = "--set attention.iterations=1200"
    quest_cifar = "--set time.evaluate_rows=512 --set attention.evaluate_rows=512 --set attention.iterations=1500"
    found = [Run("cifar10-ddpm", "tdq", "w8a4", arm, preset(arm)) for arm in ("bar", "static", "table")]
    first = Run("cifar10-ddpm", "adpdm", "w4a6", "bar")
    found += [first] + [Run("cifar10-ddpm", "adpdm", bits, arm, preset(arm), after=first.name)
                        for bits, arm in (("w4a4", "bar"), ("w4a6", "static"), ("w4a4", "static"))]  # fmt: skip
    found += [Run("cifar10-ddpm", "adpdm", "w6a6", "bar"),
              Run("cifar10-ddpm", "adpdm", "w6a6", "nearest", preset("nearest")),
              Run("cifar10-ddpm", "adpdm", "w6a6", "conv-in-8", f"{preset('conv-in-8')} {NEAREST}")]  # fmt: skip
    found += [Run("emoji-sd", "pcr", "w8a6", arm, preset(arm)) for arm in ("bar", "no-relax", "random")]
    for model, recipe, bits, flags in (
        ("emoji-sd", "qdiffusion", "w4a8", ""), ("cifar10-ddpm", "qdiffusion", "w4a8", ""),
        ("emoji-sd", "quest", "w4a4", quest), ("cifar10-ddpm", "quest", "w4a4", quest_cifar),
    ):  # fmt: skip
        plain = Run(model, recipe, bits, "plain", flags)
        found += [plain] + [Run(model, recipe, bits, arm, f"{flags} --correct {arm}".strip(), after=plain.name)
                            for arm in ("tac", "tac-state", "tac-even", "tac-mean", "tac-auto")]  # fmt: skip
    grouped = Run("emoji-sd", "dgq", "w4a8", "bar")
    softmax = [f"{kind}-softmax-{bits}" for bits in (4, 6, 8) for kind in ("log", "uniform")]
    softmax.remove("log-softmax-8")  # is the recipe's own
    found += [grouped] + [Run("emoji-sd", "dgq", "w4a8", arm, preset(arm), after=grouped.name)
                          for arm in ("float-activations", *softmax)]  # fmt: skip
    found += [Run("emoji-sd", "dgq", "w4a6", arm, preset(arm), after=grouped.name)
              for arm in ("bar", "mse", "tensor-mse", "tensor")]  # fmt: skip
    found += [Run(model, recipe, bits, "bar") for model, bits in (
        ("cifar10-ddpm", "w8a4"), ("cifar10-ddpm", "w4a6"), ("emoji-sd", "w8a6"), ("emoji-sd", "w4a6"),
        ("cifar10-ddpm", "w6a6")) for recipe in ("rtn", "rtn-dynamic", "qdiffusion")]  # fmt: skip
    found += [Run("cifar10-ddpm", "dgq", "w4a6", "bar"),
              Run("cifar10-ddpm", "vqdm", "w3a16", "bar", "--set tune.iterations=1500")]  # fmt: skip
    found += [tuned := Run("emoji-sd", "vqdm", "w3a16", "bar", "--set tune.iterations=1500")]
    found += [Run("emoji-sd", "vqdm", "w3a16", arm, flags, after=tuned.name) for arm, flags in (
        ("no-tuning", "--set tune.iterations=0"), ("guided", "--preset guided --set tune.iterations=1500"),
        ("replay", "--preset replay --set tune.iterations=1500"))]  # fmt: skip
    longer = "--set codebooks.epochs=16 --set codebooks.tolerance=0.001 --set codebooks.feedback_epochs=16"
    found += [Run("emoji-sd", "vqdm", bits, "thorough", f"{how} --set tune.iterations=1500")
              for bits, how in (("w3a16", "--preset thorough"), ("w2a16", f"--preset two {longer}"))]  # fmt: skip
    return found


def ablations() -> list[Run]:
    """Runs on the bundled model, three seeds each, the first seed of every table before the others."""
    fast = "--set weights.iterations=400 --set activations.iterations=100"
    tables: list[tuple[str, str, dict[str, str]]] = [
        ("adpdm", "w4a4", {"full": NEAREST} | {arm: f"{preset(arm)} {NEAREST}" for arm in (
            "static", "groups-2", "groups-4", "groups-16", "table", "clusters", "uniform", "random", "channels")}),
        ("pcr", "w8a6", {"full": ""} | {arm: preset(arm) for arm in (
            "no-relax", "start", "end", "random", "float-trajectories")}),
        ("qdiffusion", "w4a8", {"none": fast, "tac": f"--correct tac {fast}",
                                "tac-no-input": f"--correct tac {fast} --set correct.input_term=false",
                                "tac-absolute": f"--correct tac {fast} --set correct.l1=0.0",
                                "tac-state": f"--correct tac-state {fast}",
                                "tac-even": f"--correct tac-even {fast}",
                                "tac-mean": f"--correct tac-mean {fast}",
                                "tac-auto": f"--correct tac-auto {fast}"}),
        ("dgq", "w4a6", {"full": ""} | {arm: preset(arm) for arm in (
            "groups-2", "groups-16", "faithful", "pixel", "channel", "batch", "tensor", "tensor-mse", "token",
            "groups-64")}),
        ("vqdm", "w3a16", {arm: f"--preset {size} --set tune.iterations={tune} {more}".strip()
                           for arm, size, tune, more in VQDM}),
    ]  # fmt: skip
    return [Run("emoji-sd-tiny", recipe, bits, arm, flags, seeds=(seed,), ablation=True)
            for seed in (0, 1, 2) for recipe, bits, arms in tables for arm, flags in arms.items()]  # fmt: skip


def preset(arm: str) -> str:
    """Of arms that are named after one."""
    return "" if arm == "bar" else f"--preset {arm}"


# ---- the runner ------------------------------------------------------------------------------------------------------
class Runner:
    """Works through runs with some slots a GPU; a slot is a thread that waits for a process."""

    def __init__(self, runs: list[Run], args: argparse.Namespace) -> None:
        self.waiting, self.args, self.end = list(runs), args, time.monotonic() + args.budget
        self.named = {run.name: run for run in runs}
        self.failed, self.lock = list[str](), threading.Lock()
        self.workers: dict[int, subprocess.Popen[str]] = {}

    def take(self) -> Run | None:
        """The first run that may begin."""
        with self.lock:
            for run in [run for run in self.waiting if run.after in self.failed]:
                self.waiting.remove(run)
                self.failed.append(run.name)
                print(f"left out: {run.name}, for {run.after} failed", flush=True)
            for run in self.waiting:
                if run.after not in self.named or (self.args.work / self.named[run.after].facts).exists():
                    self.waiting.remove(run)
                    return run
        return None

    def work(self, gpu: str) -> None:
        """One slot."""
        while self.waiting and time.monotonic() < self.end:
            run = self.take()
            if run is None:
                time.sleep(SECONDS)
                continue
            start, code = time.monotonic(), self.call(run, gpu)
            with self.lock:
                self.failed += [run.name] if code else []
            print(f"{'failed' if code else 'done'}: {run.name}, {time.monotonic() - start:.0f} s", flush=True)
            if code:
                print(*self.log(run).read_text(errors="replace").splitlines()[-8:], sep="\n", flush=True)

    def call(self, run: Run, gpu: str) -> int:
        """0, or 1 where a run failed or its process ended; the next one then gets another."""
        words = [*run.words(), "--work", str(self.args.work), "--cache", str(self.args.work / "cache")]
        zoo = self.args.zoo
        words += ["--zoo", str(zoo), "--evaluators", str(zoo / "evaluators")] if zoo is not None else []
        words += ["--out", str(self.args.out)] if self.args.out is not None else []
        words += ["--smoke"] if self.args.smoke else []
        self.log(run).parent.mkdir(parents=True, exist_ok=True)
        worker, answer = self.worker(gpu, self.log(run)), ""
        if worker.stdin is not None and worker.stdout is not None:
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.write(json.dumps({"words": words, "log": str(self.log(run))}) + "\n")
                worker.stdin.flush()
                answer = worker.stdout.readline()
        if not answer:  # it is about to end, if it has not ended
            self.workers.pop(threading.get_ident()).wait()
        return int(answer or 1)

    def worker(self, gpu: str, log: Path) -> subprocess.Popen[str]:
        """The process of this thread's slot; what it says outside of a run goes to the log of the first."""
        mine = self.workers.get(threading.get_ident())
        if mine is None:
            with log.open("a") as errors:
                mine = subprocess.Popen([sys.executable, str(HERE / "serving.py")], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=errors, text=True,
                                        env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu})  # fmt: skip
            self.workers[threading.get_ident()] = mine
        return mine

    def log(self, run: Run) -> Path:
        """What a run prints."""
        return Path(self.args.work) / "logs" / f"{run.name}.log"

    def run(self) -> int:
        """All of it; the number of runs that failed."""
        slots = [gpu for _ in range(self.args.slots) for gpu in self.args.gpus]
        threads = [threading.Thread(target=self.work, args=(gpu,)) for gpu in slots]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for worker in self.workers.values():
            worker.communicate()  # ends when nothing more comes in
        if self.waiting:
            print("not begun:", *(run.name for run in self.waiting))
        return len(self.failed)


def chosen(args: argparse.Namespace) -> list[Run]:
    """What is asked for."""
    if args.smoke:
        full = Run("emoji-sd-tiny", "rtn", "w4a8", "bar", seeds=(0,))
        return [full, Run("emoji-sd-tiny", "rtn", "w8a8", "bar", seeds=(0,), after=full.name)]
    runs = [run for run in bars() + ablations() if not args.names or any(name in run.name for name in args.names)]
    if not args.missing and args.do == "list":
        return runs
    missing = [run for run in runs if not run.done(args.out or RESULTS)]
    wanted = {run.after for run in missing}  # results of another day are of another rounding
    return [run for run in runs if run in missing or run.name in wanted]


def main() -> int:
    """Parse the arguments, list or run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["list", "run"])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--missing", action="store_true", help="list: those without results")
    parser.add_argument("--zoo", type=Path, help="folder of the reference models")
    parser.add_argument("--gpus", nargs="+", default=["0"], help="numbers, as CUDA_VISIBLE_DEVICES takes them")
    parser.add_argument("--slots", type=int, default=1, help="runs side by side on each GPU")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which nothing is begun")
    parser.add_argument("--work", type=Path, default=Path("work-quality"), help="artifacts, pictures, cache, logs")
    parser.add_argument("--out", type=Path, help="results (default: where quality.py puts them)")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    runs = chosen(args)
    if args.do == "run":
        return 1 if Runner(runs, args).run() else 0
    for run in runs:
        print(" ".join(["python benchmarks/quality.py", *run.words()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
