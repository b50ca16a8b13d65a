"""The command: trains a language model by evolution strategies, as a recipe says.

    python -m es_lite.train RECIPE [--set table.key=value ...] [--resume [--rebuild]]

`train` is a run from top to bottom, `Training.step` (training.py) the papers' algorithm. The journal gets a step's record
before any weight changes; the weights catch up with the journal, wherever they were left.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from es_lite import data, plan, system
from es_lite import recipe as recipes
from es_lite.algorithm.jit import Threads
from es_lite.data import Corpus
from es_lite.errors import RunError, UserError
from es_lite.recipe import Recipe
from es_lite.runs import origin as origins
from es_lite.runs.console import Console
from es_lite.runs.directory import RunDirectory
from es_lite.runs.journal import Journal
from es_lite.runs.metrics import Metrics
from es_lite.runs.origin import Origin
from es_lite.tokenizer import load_tokenizer
from es_lite.training import Training
from es_lite.weights import store, working
from es_lite.weights.layerfile import LayerFile
from es_lite.workers.guard import Guard
from es_lite.workers.pool import Pool, prepare
from es_lite.workers.worker import Setup


def train(recipe: Recipe, resume: bool = False, rebuild: bool = False) -> None:
    """Runs `recipe` to its last step, or on from where its run directory stands.

    rebuild: layer files that are damaged are made again from θ₀ and the journal, instead of ending the run.

    Raises UserError for what the user must change, RunError where the run cannot go on; after either, the run
    directory resumes.
    """
    # What is to be trained, and whether it fits, before anything is loaded or written.
    origin = Origin.of_recipe(recipe)
    model, layout = origin.skeleton()
    planned = plan.make(recipe, model.config, layout)
    if problem := plan.shortfall(planned):
        raise UserError(f"{problem}\n\n{planned.text()}")

    with RunDirectory(recipe, resume) as run:
        print(f"{layout.size:,} parameters in {len(layout.layers)} layers, run directory {run.path}", flush=True)
        print(planned.text(), flush=True)
        tokenizer, train_set, held_out = read_data(recipe, model, run.path)
        data.draw(len(train_set), recipe.fitness.samples, recipe.run.seed, 0)  # says at once if M is too large

        # θ₀, the journal, and where each layer stands.
        theta_0 = origin.source(model, layout, Threads(1))
        files = origin.files(run.store, layout)
        drawn_from = data.fingerprint(train_set, held_out)
        fresh = not run.journal.exists()
        if not fresh:
            journal = Journal.open(run.journal)
            origins.check(journal, origin, layout, theta_0)
            if journal.header["data"] != drawn_from:
                raise UserError(f"{recipe.data.path}: the text or its tokenizer has changed since {run.path} began; set it back")
            if journal.header["compute"] != planned.compute:
                print(
                    f"warning: the run began in {journal.header['compute']}, this machine goes on in {planned.compute}",
                    file=sys.stderr,
                )
        else:
            if resume:
                print(f"nothing to resume in {run.path}: starting at step 0", flush=True)
            header = {"data": drawn_from, "compute": planned.compute, "versions": system.versions()}
            journal = Journal.create(run.journal, origin.header(layout, theta_0) | header)
        if rebuild:
            remove_damaged(files)
        standing = [store.standing(file) for file in files]
        if max(standing) > len(journal.records):
            raise UserError(
                f"{run.store}: a layer stands at step {max(standing)}, but {run.journal} ends at step "
                f"{len(journal.records)}; restore the journal, or remove {run.store} to make it again from the journal"
            )
        run.keep(recipe)

        descriptor = None if planned.streamed else working.allocate(layout, recipe.memory.weights)
        setup = Setup(
            origin=origin,
            layout=layout,
            store=run.store,
            weights=recipe.memory.weights,
            direct=planned.direct,
            compute=planned.compute,
            device=recipe.workers.device,
            lanes=planned.lanes,
            threads=planned.threads,
            micro_batch=recipe.fitness.micro_batch,
        )
        with (
            Console(recipe.run.iterations, len(journal.records)) as console,
            system.PeakPss(system.family) as pss,
            Guard(recipes.parse_size(recipe.memory.limit), lambda: pss.last_bytes) as guard,
            Pool(setup, descriptor, run.lock, planned.processes, recipe.workers.deadline, console.warn, guard) as pool,
        ):
            training = Training(
                recipe=recipe,
                planned=planned,
                model=model,
                layout=layout,
                files=files,
                standing=min(standing),
                tokenizer=tokenizer,
                train_set=train_set,
                held_out=held_out,
                run=run,
                journal=journal,
                metrics=Metrics(run.metrics, recipe.log.tensorboard),
                console=console,
                pool=pool,
                pss=pss,
            )
            training.prepare(fresh)
            training.catch_up()
            while training.done < recipe.run.iterations and not console.stopping:
                training.step()
            training.checkpoint_if_due(last=True)
            resumable = f"; add --resume to go on from step {training.done}" if training.done < recipe.run.iterations else ""
            console.say(f"{training.done} of {recipe.run.iterations} steps done{resumable}")


def remove_damaged(files: Sequence[LayerFile]) -> None:
    """Removes the layers' files that are not what was written; they are then made again. Says which."""
    for file in files:
        if file.path.exists():
            try:
                store.check(file)
            except UserError as error:
                file.path.unlink()
                print(f"removed, to be made again from θ₀ and the journal: {error}", flush=True)


def read_data(recipe: Recipe, model: PreTrainedModel, run_dir: Path) -> tuple[PreTrainedTokenizerBase, Corpus, Corpus | None]:
    """The tokenizer, the samples to train on, and those held out (None where eval is off)."""
    table, length = recipe.data, recipe.fitness.max_length
    texts = data.read_texts(table.path, table.lines)
    tokenizer = load_tokenizer(table, recipe.model.path, run_dir, texts)
    corpus = data.tokenize(texts, tokenizer, table.samples, length)
    held_out = None
    if recipe.eval.every and recipe.eval.path:
        held_out = data.tokenize(data.read_texts(recipe.eval.path, 0), tokenizer, table.samples, length)
    elif recipe.eval.every:
        corpus, held_out = data.split(corpus, recipe.eval.fraction)
    for part in filter(None, (corpus, held_out)):
        data.check_vocabulary(part, model.config.get_text_config().vocab_size)
    return tokenizer, corpus, held_out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m es_lite.train", description="Train a language model by evolution strategies, as a recipe says."
    )
    parser.add_argument("recipe", type=Path, help="a TOML file; the ones that come with es_lite are in recipes/")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", dest="overrides", help="override a key")
    parser.add_argument("--resume", action="store_true", help="go on from where the run directory stands")
    parser.add_argument(
        "--rebuild", action="store_true", help="with --resume: make damaged layer files again from θ₀ and the journal"
    )
    arguments = parser.parse_args(argv)
    if arguments.rebuild and not arguments.resume:
        parser.error("--rebuild goes with --resume")
    transformers_logging.set_verbosity_error()
    try:
        recipe = recipes.load(arguments.recipe, arguments.overrides)
        prepare()  # workers' imports, meanwhile
        train(recipe, arguments.resume, arguments.rebuild)
    except (UserError, RunError) as error:
        print(f"es_lite: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("es_lite: stopped at once; add --resume to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
