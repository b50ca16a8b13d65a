"""The command `train`: trains a language model by evolution strategies, as a recipe says.

    python -m es_lite.train RECIPE [--set table.key=value ...] [--resume [--rebuild]]

`train` is a run from top to bottom; `run.Run.step` is the papers' algorithm.
"""

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

from transformers.utils import logging as transformers_logging

from es_lite import system
from es_lite.algorithm.drift import Drift
from es_lite.algorithm.jit import Threads
from es_lite.engine.base import Engine
from es_lite.engine.local import LocalEngine
from es_lite.errors import DamagedFile, RunError, UserError
from es_lite.fitness.base import Dataset
from es_lite.fitness.diagnosis import least_sigma
from es_lite.fitness.kinds import fitness_of
from es_lite.model.origin import Origin
from es_lite.planning.plan import Plan
from es_lite.planning.rates import step_time
from es_lite.recipe import Recipe
from es_lite.run import Run
from es_lite.runs.console import Console
from es_lite.runs.directory import RunDirectory
from es_lite.runs.journal import Journal
from es_lite.runs.metrics import Metrics
from es_lite.runs.milestones import Milestones
from es_lite.runs.pace import Pace
from es_lite.runs.tuning import Tuning
from es_lite.terminal import accept_any_text
from es_lite.weights.store import Store


def train(recipe: Recipe, resume: bool = False, rebuild: bool = False) -> None:
    """Runs `recipe` to its last step, or continues the run in its directory.

    rebuild: rebuild damaged layer files from θ₀ and the journal instead of ending the run.

    Raises UserError for what the user must change, RunError if the run cannot continue; after either, the run
    directory can be resumed.
    """
    began = time.monotonic()
    if recipe.workers.engine == "ray":
        require_ray()
    # What is to be trained, and whether it fits, before anything is loaded or written.
    origin, fitness = Origin.of_recipe(recipe), fitness_of(recipe.fitness.kind)
    model, layout = origin.skeleton()
    plan = Plan.of(recipe, fitness, model.config, layout)
    plan.rehearse(model, fitness)
    if problem := plan.shortfall():
        raise UserError(f"{problem}\n\n{plan.parts()}")

    with RunDirectory(recipe, resume) as run, contextlib.ExitStack() as opened:
        print(f"run directory {run.path}: reading the data and the model", flush=True)
        # The items, θ₀, the journal, and the step of each layer.
        dataset = fitness.open(recipe, model.config, model.generation_config, run.path)
        opened.callback(dataset.close)
        print(dataset.description(), flush=True)
        journal = Journal.open(run.journal) if run.journal.exists() else None
        if journal:
            origin = origin.continuing(journal.header, journal.path)
        theta_0 = origin.source(model, layout, Threads(1))
        header = {"data": dataset.fingerprint(), "compute": plan.execution.compute, "versions": system.versions()}
        if journal:
            origin.check(journal.header, journal.path, layout, theta_0)
            check_data(journal, header, recipe)
            journal.check_noise(plan.noise)
        else:
            if resume:
                print(f"nothing to resume in {run.path}: starting at step 0", flush=True)
            journal = Journal.create(run.journal, origin.header(layout, theta_0) | header)
        store = Store(run.store, layout, origin.storage, lambda: theta_0)
        if rebuild:
            for error in store.remove_damaged():
                print(f"removed, to be made again from θ₀ and the journal: {error}", flush=True)
        store.check_steps(len(journal.records), journal.path)
        rounded = plan.execution.compute == "bf16"
        tuning = Tuning(
            recipe,
            lambda: least_sigma(layout.tensors, theta_0, plan.noise, recipe.run.seed) if rounded else 0.0,
            [(record.sigma, found) for record, found in zip(journal.records, journal.estimates, strict=True)],
        )
        run.keep(recipe)

        expected = step_time(plan.work, plan.execution, plan.noise, run.path)
        remaining = max(0, recipe.run.iterations - len(journal.records))
        print(f"{plan.summary(expected, remaining)}\n\n{plan.details(expected)}\n", flush=True)
        pace = Pace(expected.score_seconds, expected.update_seconds, recipe.run.minutes, began)
        with (
            Console(recipe.run.iterations, len(journal.records)) as console,
            ray_engine(recipe, plan, journal, run, dataset, console)
            if recipe.workers.engine == "ray"
            else LocalEngine(recipe, origin, layout, store, plan.execution, run.lock, console.warn) as engine,
        ):
            drift = Drift(layout.factor_shares())
            for record in journal.records:
                drift.add(record)
            under_way = Run(
                recipe, fitness, dataset, engine, plan.execution, plan.noise, journal, store, console, pace, tuning, drift
            )
            milestones = Milestones(
                recipe=recipe,
                run=run,
                journal=journal,
                metrics=Metrics(run.metrics, recipe.log.tensorboard),
                console=console,
                model=model,
                layout=layout,
                store=store,
                tokenizer=dataset.tokenizer,
                threads=plan.execution.workers * plan.execution.threads,
                evaluate=under_way.evaluation,
                reference=dataset.reference,
                memory=under_way.memory,
                unit=", ".join(filter(None, (fitness.measures, fitness.unit))),
            )
            under_way.begin()
            milestones.catch_up()
            while under_way.done < recipe.run.iterations and not console.stopping:
                milestones.after_step(under_way.step())
                if engine.shortage and under_way.done < recipe.run.iterations:
                    raise RunError(f"stopped after step {under_way.done}, because {engine.shortage}")
                if pace.exhausted and under_way.done < recipe.run.iterations:
                    console.say(f"the next step would exceed run.minutes = {recipe.run.minutes:g}")
                    console.stopping = True
            milestones.checkpoint_if_due(last=True)
            more = under_way.done < recipe.run.iterations
            resumable = f"; add --resume to continue from step {under_way.done}" if more else ""
            console.say(f"{under_way.done} of {recipe.run.iterations} steps done{resumable}")


def require_ray() -> None:
    """Raises UserError if Ray is not installed."""
    try:
        import es_lite.hosts.cluster  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise UserError("workers.engine = \"ray\": Ray is not installed; run: pip install 'es_lite[ray]'") from None


def ray_engine(recipe: Recipe, plan: Plan, journal: Journal, run: RunDirectory, dataset: Dataset, console: Console) -> Engine:
    """The engine of several machines."""
    from es_lite.hosts.engine import RayEngine
    from es_lite.hosts.host import HostSetup

    # Hosts have other working directories, this machine's too.
    model, directory = recipe.model, run.path.resolve()
    files = {name: str(Path(path).resolve()) for name in ("path", "config", "code") if _is_there(path := getattr(model, name))}
    workers = dataclasses.replace(recipe.workers, compute=cast(Literal["bf16", "fp32"], plan.execution.compute))
    of_hosts = dataclasses.replace(
        recipe,
        workers=workers,
        model=dataclasses.replace(model, **files),
        run=dataclasses.replace(recipe.run, dir=str(directory)),
    )
    setup = HostSetup(of_hosts, journal.header, journal.path, run.name(), dataset.shelf)
    return RayEngine(setup, plan.execution.micro_batch, directory, console.warn, console.say)


def _is_there(path: str | dict) -> bool:
    return isinstance(path, str) and bool(path) and Path(path).exists()


def check_data(journal: Journal, header: dict, recipe: Recipe) -> None:
    """Raises UserError if the items are not those that the run began with; warns if the compute type is another."""
    if journal.header["data"] != header["data"]:
        raise UserError(
            f"{recipe.data.path}: the text or prompts, the tokenizer or data.bos have changed since {journal.path.parent} began; "
            'restore them (for a run that began before there was data.bos, set data.bos = "never")'
        )
    if journal.header["compute"] != header["compute"]:
        print(
            f"warning: the run began in {journal.header['compute']}, and goes on in {header['compute']}, this machine's "
            "compute type, which changes the last digits of scores",
            file=sys.stderr,
        )


def main(argv: Sequence[str] | None = None) -> int:
    accept_any_text()
    parser = argparse.ArgumentParser(
        prog="es-lite train", description="Train a language model by evolution strategies, as a recipe says."
    )
    parser.add_argument("recipe", type=Path, help="a TOML file; example recipes are in recipes/")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", dest="overrides", help="override a key")
    parser.add_argument("--resume", action="store_true", help="continue from where the run directory stands")
    parser.add_argument(
        "--rebuild", action="store_true", help="with --resume: make damaged layer files again from θ₀ and the journal"
    )
    arguments = parser.parse_args(argv)
    if arguments.rebuild and not arguments.resume:
        parser.error("--rebuild requires --resume")
    transformers_logging.set_verbosity_error()
    try:
        recipe = Recipe.load(arguments.recipe, arguments.overrides)
        if recipe.workers.engine == "local":
            LocalEngine.prepare()
        train(recipe, arguments.resume, arguments.rebuild)
    except DamagedFile as error:
        print(f"es_lite: {error}; add --resume --rebuild to make it again from θ₀ and the journal", file=sys.stderr)
        return error.exit_code
    except (UserError, RunError) as error:
        print(f"es_lite: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("es_lite: stopped immediately; add --resume to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
