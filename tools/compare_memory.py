"""Peak memory of es_lite beside that of training by gradients (EA4LLM, arXiv 2510.10603, figure 3): JSON, a plot, a table.

    python tools/compare_memory.py                                                 all sizes of the paper, by formula
    python tools/compare_memory.py --measure qwen3-0.5b --streamed --out DIR/memory   and one of them measured too

Measured is the peak PSS of all processes of a run of a step or two, sampled from outside, one run at a time: `python -m
es_lite.train` with its workers, and a Hugging Face model under torch.optim.AdamW in fp32 (tools/_adamw.py), on the same
tokens with the same micro-batch. What does not fit this machine is refused before anything starts.

es_lite's formula is its plan (es_lite.plan.make). AdamW's, in bytes, for P parameters of which R = V·H are a matrix of the
vocabulary V, B blocks, hidden size H, intermediate size I, Q and K the widths of the queries and of the keys, q and k their
heads, and n = micro-batch × length tokens, is a process's own memory and the largest of these moments:

    the loss:      12 P + 4 n (3 V + B·A + 3 H)     weights and two moments; log-softmax, its gradient, the logits'; what a
                                                    block keeps, A = 6 H + 4 I + 4 Q + 4 K + 2 + 2 q + k
    the head:      12 P + 4 R + 4 n (V + B·A)       its gradient is made from that of the logits
    the update:    16 P + 8 R                       all gradients; two temporaries of the largest tensor

With checkpointing a block keeps only its input, H for A, and there is a fourth, 12 P + 4 R + 4 n (B·H + A): the head's gradient,
and the last block run again. Where a step has several micro-batches, the sum of the gradients, 4 P, is there at each of them.

The formula counts tensors. Measured is more where the C allocator keeps holes (for AdamW on glibc about a tenth: its gradients
and activations come and go in turn), and less by what of the libraries' pages other programs use too, up to 0.1 GiB a run.
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import tomli_w
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from es_lite import data, plan, system
from es_lite import recipe as recipes
from es_lite.errors import UserError
from es_lite.runs.origin import Origin
from es_lite.train import read_data
from es_lite.weights.layout import Layout
from es_lite.weights.source import SIZES

GIB = 2**30
TORCH_BYTES = 390 * 2**20
"""Memory of a process that has loaded torch and transformers, and trained a small model (measured)."""

MODES = {  # in the plot's order: what it is called, its colour
    "adamw": ("AdamW, fp32", "#d44c47"),
    "adamw-checkpointing": ("AdamW, fp32, gradient checkpointing", "#d9730d"),
    "bf16": ("es_lite, bf16 resident", "#0b6e99"),
    "int8": ("es_lite, int8 resident", "#448361"),
    "streamed": ("es_lite, bf16 streamed", "#9065b0"),
}
SHORT = {mode: name.removeprefix("es_lite, ") for mode, (name, _) in MODES.items()}
OURS = ("bf16", "int8", "streamed")


@dataclass(frozen=True)
class Load:
    """What is trained on, the same for all."""

    samples: int
    """Of a step."""
    length: int
    """Tokens of a sample."""
    micro_batch: int
    population: int
    workers: int
    steps: int
    text: str


@dataclass(frozen=True)
class Model:
    name: str
    given: str
    """model.config of the recipe: a size of the paper, or the path of a config.json."""
    skeleton: PreTrainedModel
    layout: Layout

    @property
    def config(self) -> PretrainedConfig:
        return self.skeleton.config


@dataclass(frozen=True)
class Figure:
    """Peak memory of one model trained in one way."""

    size: str
    parameters: int
    mode: str
    parts: dict[str, int]
    """Bytes at the peak by what they are for, by formula."""
    measured: int | None = None
    """Bytes."""

    @property
    def computed(self) -> int:
        return sum(self.parts.values())

    @property
    def best(self) -> int:
        """Bytes, measured where that was done."""
        return self.measured or self.computed

    def document(self) -> dict[str, object]:
        """As JSON has it: parts, computed and measured in bytes."""
        check = {"computed": self.computed, "formula_over_measured": self.measured and round(self.computed / self.measured, 4)}
        return dataclasses.asdict(self) | check

    @property
    def largest(self) -> str:
        name = max(self.parts, key=lambda part: self.parts[part])
        return f"{name}, {self.parts[name] / self.computed:.0%}"


def load_model(given: str) -> Model:
    """A size of the paper or a config.json. Raises UserError for what is neither, or has another architecture than Qwen3's."""
    path = Path(given).expanduser()
    if given not in SIZES and path.suffix != ".json":
        raise UserError(f"{given}: expected {', '.join(SIZES)} or a config.json")
    name, where = (given, given) if given in SIZES else (path.stem, str(path.absolute()))
    skeleton, layout = Origin("", where, 0, (), False, False).skeleton()
    if skeleton.config.model_type != "qwen3":
        raise UserError(f"{given}: is a {skeleton.config.model_type}; the formula for what a block keeps is that of qwen3 alone")
    return Model(name, where, skeleton, layout)


def block_bytes(config: PretrainedConfig) -> int:
    """What autograd keeps of a block for a token, float32 (the A of the formula, 4 bytes each)."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    queries, keys = heads * config.head_dim, groups * config.head_dim
    wide = 6 * config.hidden_size + 4 * config.intermediate_size + 4 * queries + 4 * keys
    return 4 * (wide + 2 + 2 * heads + groups)


def adamw_parts(model: Model, load: Load, checkpointing: bool) -> dict[str, int]:
    """Bytes at the peak of AdamW in fp32, by the formula above."""
    config, parameters, tokens = model.config, model.layout.size, min(load.micro_batch, load.samples) * load.length
    matrix = 4 * config.vocab_size * config.hidden_size
    block = tokens * block_bytes(config)
    kept = config.num_hidden_layers * (4 * tokens * config.hidden_size if checkpointing else block)
    final, logits = 12 * tokens * config.hidden_size, 4 * tokens * config.vocab_size
    summed = 4 * parameters if load.samples > load.micro_batch else 0
    moments = [
        {"gradients": summed, "activations": kept + final, "logits": 3 * logits},
        {"gradients": summed + matrix, "activations": kept, "logits": logits},
        {"gradients": summed + matrix, "activations": kept + block * checkpointing},
        {"gradients": 4 * parameters, "temporaries": 2 * matrix},
    ]
    held = {"process": TORCH_BYTES, "weights": 4 * parameters, "AdamW's moments": 8 * parameters}
    return held | max(moments, key=lambda parts: sum(parts.values()))


def recipe_for(model: Model, load: Load, mode: str, run: Path) -> Path:
    """The recipe of the run that is planned and measured, written beside the run directory `run`."""
    streamed, int8 = mode == "streamed", mode == "int8"
    tables = {
        "run": {"dir": str(run), "iterations": load.steps},
        "model": {"config": model.given},
        "data": {"path": load.text, "tokenizer": "bpe", "vocab_size": min(8192, model.config.vocab_size)},
        "fitness": {"samples": load.samples, "max_length": load.length, "micro_batch": load.micro_batch},
        "es": {"population": load.population, "antithetic": True},
        "workers": {"count": load.workers, "threads": 1},
        "memory": {"weights": "int8" if int8 else "bf16", "residency": "streamed" if streamed else "resident"},
        "log": {"tensorboard": False},
    }
    run.parent.mkdir(parents=True, exist_ok=True)
    path = run.with_name(f"{run.name}.toml")
    path.write_text(tomli_w.dumps(tables))
    return path


def computed(model: Model, load: Load, mode: str, folder: Path) -> tuple[Figure, str | None]:
    """By formula, and why it cannot be measured here, in numbers; None where it can.

    Raises UserError where the load is none that es_lite takes.
    """
    if mode in OURS:
        recipe = recipes.load(recipe_for(model, load, mode, folder / model.name / mode))
        planned = plan.make(recipe, model.config, model.layout)
        return Figure(model.name, model.layout.size, mode, planned.memory), plan.shortfall(planned)
    figure = Figure(model.name, model.layout.size, mode, adamw_parts(model, load, mode == "adamw-checkpointing"))
    need, limit = figure.computed, system.memory_limit()
    short = f"does not fit: needs {need / GIB:.2f} GiB of memory, there are {limit.bytes / GIB:.2f} ({limit.source})"
    return figure, short if need > limit.bytes else None


def command_for(model: Model, load: Load, mode: str, folder: Path) -> list[str]:
    """The command to be measured, with the files that it takes written to `folder`. Raises UserError for too little text."""
    run = folder / model.name / mode
    path = recipe_for(model, load, mode, run)
    if mode in OURS:
        return [sys.executable, "-m", "es_lite.train", str(path)]
    run.mkdir()
    _, train_set, _ = read_data(recipes.load(path), model.skeleton, run)
    tokens = np.zeros((load.steps, load.samples, load.length), np.int64)
    for step in range(load.steps):
        drawn = data.pack(train_set, data.draw(len(train_set), load.samples, 0, step)).tokens
        tokens[step, :, : drawn.shape[1]] = drawn
    np.save(run / "tokens.npy", tokens)
    model.config.save_pretrained(run)
    words = [str(Path(__file__).with_name("_adamw.py")), str(run), str(run / "tokens.npy"), str(load.micro_batch)]
    return [sys.executable, *words, *["--checkpointing"] * (mode == "adamw-checkpointing")]


def peak_pss(command: Sequence[str], log: Path) -> int:
    """Bytes: the highest PSS of the command and all its descendants, seen from outside. Raises RuntimeError where it fails.

    Sampling takes up to half a core, for the kernel walks every page table; what lasts less than a few of these is missed.
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


def ratio(figures: dict[str, Figure], mode: str) -> float:
    """AdamW's memory over that of `mode`: both measured where both were, else both computed."""
    pair = figures["adamw"], figures[mode]
    above, below = [f.measured for f in pair] if all(f.measured for f in pair) else [f.computed for f in pair]
    return above / below


def report(sizes: dict[str, dict[str, Figure]]) -> str:
    """Markdown: GiB by size and mode, measured ones in bold, AdamW's over each; and how far the formula is off."""
    titles = [name for name, _ in MODES.values()]
    rows = [["size", "parameters", *titles, *(f"AdamW over {SHORT[mode]}" for mode in OURS)]]
    checks = [["measured", "GiB", "by formula", "formula over measured", "most of it, by formula"]]
    for size, figures in sizes.items():
        cells = [f"**{f.best / GIB:.2f}**" if f.measured else f"{f.best / GIB:.2f}" for f in figures.values()]
        rows.append([size, f"{figures['adamw'].parameters:,}", *cells, *(f"{ratio(figures, mode):.1f} times" for mode in OURS)])
        for f in (f for f in figures.values() if f.measured):
            values = f"{f.best / GIB:.2f}", f"{f.computed / GIB:.2f}", f"{f.computed / f.best:.3f}"
            checks.append([f"{size}, {MODES[f.mode][0]}", *values, f.largest])
    tables = ["\n".join(f"| {' | '.join(row)} |" for row in (t[0], ["---"] * len(t[0]), *t[1:])) for t in (rows, checks)]
    return "\n\n".join(["Peak memory in GiB: measured (PSS) in bold, else by formula.", *tables[: 1 + (len(checks) > 1)]])


def draw(sizes: dict[str, dict[str, Figure]], memory_gib: float, load: Load, out: Path) -> None:
    """Writes the PNG. Raises OSError where that cannot be."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    grey, width = "#6b6b6b", 0.17
    style = {"font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    with plt.rc_context(style | {"figure.constrained_layout.use": True, "hatch.linewidth": 0.8}):
        figure, axes = plt.subplots(figsize=(max(9.0, 2.6 * len(sizes)), 8), dpi=100)
        top = max(f.best for figures in sizes.values() for f in figures.values()) / GIB
        for place, figures in enumerate(sizes.values()):
            for number, (mode, (_, colour)) in enumerate(MODES.items()):
                x, f = place + (number - 2) * width, figures[mode]
                solid = {"color": colour} if f.measured else {"facecolor": "white", "edgecolor": colour, "hatch": "////"}
                axes.bar(x, f.best / GIB, 0.9 * width, linewidth=1, **solid)
                axes.text(x, f.best / GIB * 1.04, f"{f.best / GIB:.3g}", ha="center", va="bottom", color=colour, fontsize=9)
            words = "\n".join(f"{ratio(figures, mode):.1f} × {SHORT[mode]}" for mode in OURS)
            axes.text(place, top * 1.6, f"AdamW is\n{words}", ha="center", va="bottom", fontsize=9.5, color=grey)
        axes.axhline(memory_gib, color=grey, linestyle=":", linewidth=1.3)
        axes.text(-0.48, memory_gib * 1.03, f"memory of this machine, {memory_gib:g} GiB", color=grey, va="bottom", fontsize=9)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set(ylabel="peak memory, all processes (GiB)", ylim=(None, top * 5), xlim=(-0.55, len(sizes) - 0.45))
        names = [f"{size}\n{figures['adamw'].parameters / 1e9:.3g} G parameters" for size, figures in sizes.items()]
        axes.set_xticks(range(len(sizes)), names)
        axes.set_title(
            f"Training memory: {load.micro_batch} × {load.length} tokens a micro-batch, es_lite with {load.workers} workers",
            loc="left", fontweight="bold", fontsize=12.5,
        )  # fmt: skip
        legend = [Patch(color=colour, label=name) for name, colour in MODES.values()]
        legend += [Patch(facecolor=grey, label="measured (PSS)")]
        legend += [Patch(facecolor="white", edgecolor=grey, hatch="////", label="by formula")]
        figure.legend(handles=legend, loc="outside lower center", ncols=4, fontsize=9.5)
        figure.savefig(out, format="png")
        plt.close(figure)


def compare(arguments: argparse.Namespace) -> str:
    """Computes, measures, writes the files; the report. Raises UserError for what the user must change."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("the plot needs matplotlib, which is not installed: pip install 'es_lite[plot]'") from None
    json_path, png_path = Path(f"{arguments.out}.json"), Path(f"{arguments.out}.png")
    if not json_path.parent.is_dir() or not os.access(json_path.parent, os.W_OK):
        raise UserError(f"--out {arguments.out}: {json_path.parent} is not a folder that can be written to")
    box = system.box()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
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
        "commit": commit.stdout.strip(),
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
    parser.add_argument("--measure", help="those of them that are measured; default: none")
    parser.add_argument("--config", help="a size or a config.json: short for --sizes IT --measure IT")
    parser.add_argument("--streamed", action="store_true", help="measure es_lite streamed too")
    parser.add_argument("--samples", type=whole, default=4, help="of a step")
    parser.add_argument("--length", type=whole, default=256, help="tokens of a sample")
    parser.add_argument("--micro-batch", type=whole, default=4)
    parser.add_argument("--population", type=whole, default=4, help="es_lite: members of a step, in antithetic pairs")
    parser.add_argument("--workers", type=whole, default=2, help="es_lite: worker processes, or lanes where streamed")
    parser.add_argument("--steps", type=whole, default=2)
    parser.add_argument("--text", default=data.BUILTIN, help="data.path of the runs")
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
