"""Peak memory of es_lite compared with that of training by gradients (EA4LLM, arXiv 2510.10603, figure 3): JSON, a plot, a table.

    python tools/compare_memory.py                                                 all sizes of the paper, by formula
    python tools/compare_memory.py --measure qwen3-0.5b --streamed --out DIR/memory   and one of them measured too

Measured is the peak PSS of all processes of a run of a step or two, sampled from outside, one run at a time: `python -m
es_lite.train` with its workers, and a Hugging Face model under torch.optim.AdamW in fp32 (tools/_adamw.py), on the same
tokens with the same micro-batch. What does not fit this machine is refused before anything starts. The formulas are in
tools/_memory_formula.py.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
from _measuring import commit
from _memory_formula import MODES, OURS, Load, Model, computed, load_model, recipe_for
from _memory_report import draw, ratio, report
from transformers.utils import logging as transformers_logging

from es_lite import system
from es_lite.data.texts import BUILTIN
from es_lite.errors import UserError
from es_lite.fitness.logprob import LogProb
from es_lite.model.configuration import SIZES
from es_lite.recipe import Recipe


def command_for(model: Model, load: Load, mode: str, folder: Path) -> list[str]:
    """The command to be measured; writes the files that it needs to `folder`. Raises UserError if there is too little text."""
    run = folder / model.name / mode
    path = recipe_for(model, load, mode, run)
    if mode in OURS:
        return [sys.executable, "-m", "es_lite.train", str(path)]
    run.mkdir()
    samples = LogProb().open(Recipe.load(path), model.config, None, run)
    tokens = np.zeros((load.steps, load.samples, load.length), np.int64)
    for step in range(load.steps):
        drawn = samples.draw(step).tokens
        tokens[step, :, : drawn.shape[1]] = drawn
    np.save(run / "tokens.npy", tokens)
    model.config.save_pretrained(run)
    words = [str(Path(__file__).with_name("_adamw.py")), str(run), str(run / "tokens.npy"), str(load.micro_batch)]
    return [sys.executable, *words, *["--checkpointing"] * (mode == "adamw-checkpointing")]


def peak_pss(command: Sequence[str], log: Path) -> int:
    """Bytes: the highest PSS of the command and all its descendants, seen from outside. Raises RuntimeError if it fails.

    Sampling takes up to half a core, because the kernel walks every page table; a peak shorter than a few samples is missed.
    """
    peak = 0
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while process.poll() is None:
                began = time.perf_counter()
                peak = max(peak, system.pss_bytes(_family(process.pid)))
                time.sleep(max(0.02, time.perf_counter() - began))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        raise RuntimeError(f"{shlex.join(command)}: ended with {process.returncode}\n{log.read_text()[-2000:]}")
    return peak


def _family(leader: int) -> list[int]:
    with contextlib.suppress(psutil.Error):
        return [leader, *(child.pid for child in psutil.Process(leader).children(recursive=True))]
    return []


def compare(arguments: argparse.Namespace) -> str:
    """Computes, measures and writes the files. Returns the report. Raises UserError for what the user must change."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("the plot needs matplotlib, which is not installed: pip install 'es_lite[plot]'") from None
    json_path, png_path = Path(f"{arguments.out}.json"), Path(f"{arguments.out}.png")
    if not json_path.parent.is_dir() or not os.access(json_path.parent, os.W_OK):
        raise UserError(f"--out {arguments.out}: {json_path.parent} is not a folder that can be written to")
    box = system.box()
    load = Load(**{name: getattr(arguments, name) for name in Load.__dataclass_fields__})
    single = [arguments.config] if arguments.config else []
    measured = arguments.measure.split(",") if arguments.measure else single
    wanted = arguments.sizes.split(",") if arguments.sizes else single or list(SIZES)
    models = {given: load_model(given) for given in dict.fromkeys([*wanted, *measured])}
    if len({model.name for model in models.values()}) < len(models):
        raise UserError(f"{', '.join(models)}: two of them have the same name")
    try:
        scratch = tempfile.TemporaryDirectory(dir=arguments.directory)
    except OSError as error:
        raise UserError(f"--directory {arguments.directory}: cannot be written to ({error.strerror})") from None
    with scratch as name:
        folder = Path(name)
        formulas = {model.name: {mode: computed(model, load, mode, folder) for mode in MODES} for model in models.values()}
        sizes = {name: {mode: figure for mode, (figure, _) in modes.items()} for name, modes in formulas.items()}
        runs = [(models[given], mode) for given in dict.fromkeys(measured) for mode in MODES]
        runs = [(model, mode) for model, mode in runs if mode != "streamed" or arguments.streamed]
        problems = [(model.name, MODES[mode][0], formulas[model.name][mode][1]) for model, mode in runs]
        if any(problem for *_, problem in problems):
            listing = "\n".join(f"  {name}, {title}: {problem}" for name, title, problem in problems if problem)
            raise UserError(f"cannot be measured here, only computed\n{listing}")
        commands = [command_for(model, load, mode, folder) for model, mode in runs]
        for (model, mode), command in zip(runs, commands, strict=True):
            print(f"measuring {model.name}, {MODES[mode][0]}", file=sys.stderr, flush=True)
            peak = peak_pss(command, folder / "log")
            shutil.rmtree(folder / model.name / mode)
            sizes[model.name][mode] = dataclasses.replace(sizes[model.name][mode], measured=peak)

    document = {
        "command": f"python tools/compare_memory.py {arguments.command}",
        "commit": commit(),
        "box": box,
        "load": dataclasses.asdict(load),
        "figures": [figure.document() for figures in sizes.values() for figure in figures.values()],
        "adamw_over": {size: {mode: round(ratio(figures, mode), 3) for mode in OURS} for size, figures in sizes.items()},
    }
    json_path.write_text(json.dumps(document, indent=2) + "\n")
    draw(sizes, float(box["memory_gib"]), load, png_path)
    return f"{report(sizes)}\n\n{json_path}, {png_path}"


def whole(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at least 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", help="sizes of the paper or config.json files, with commas between; default: all sizes")
    parser.add_argument("--measure", help="which of them are measured; default: none")
    parser.add_argument("--config", help="a size or a config.json: short for --sizes IT --measure IT")
    parser.add_argument("--streamed", action="store_true", help="measure es_lite streamed too")
    parser.add_argument("--samples", type=whole, default=4, help="of a step")
    parser.add_argument("--length", type=whole, default=256, help="tokens of a sample")
    parser.add_argument("--micro-batch", type=whole, default=4)
    parser.add_argument("--population", type=whole, default=4, help="es_lite: members of a step, in antithetic pairs")
    parser.add_argument("--workers", type=whole, default=2, help="es_lite: worker processes, or lanes if streamed")
    parser.add_argument("--steps", type=whole, default=2)
    parser.add_argument("--text", default=BUILTIN, help="data.path of the runs")
    parser.add_argument("--directory", help="where runs are kept while they are measured; default: the temporary folder")
    parser.add_argument("--out", default="benchmarks/memory", help="writes OUT.json and OUT.png")
    arguments = parser.parse_args(argv)
    arguments.command = shlex.join(sys.argv[1:] if argv is None else argv)
    transformers_logging.set_verbosity_error()
    try:
        print(compare(arguments))
    except (UserError, RuntimeError) as error:
        print(f"compare_memory: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
