"""The fitness "logprob": which samples it draws and holds out, what it compares with, its memory, and its scores."""

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
from architectures import BOTH, COMMON, GPT2, PLUS, Tiny, batch_of, config_of
from corpora import samples_of
from support import write_recipe
from transformers import AutoConfig

from es_lite.data import batch, corpus
from es_lite.data.batch import Batch
from es_lite.errors import UserError
from es_lite.fitness.base import ItemMemory
from es_lite.fitness.logprob import LogProb, Samples
from es_lite.model.configuration import configuration
from es_lite.recipe import Recipe
from es_lite.scoring.perturbation import UNPERTURBED


def opened(folder: Path, *overrides: str) -> Samples:
    """The samples of the tiny recipe: 32 tokens each, 4 of them a step."""
    folder.mkdir(exist_ok=True)
    recipe = Recipe.load(write_recipe(folder), overrides)
    return LogProb().open(recipe, configuration("", recipe.model.config), None, folder / "run")


def same(one: Batch, other: Batch) -> bool:
    return np.array_equal(one.tokens, other.tokens) and np.array_equal(one.lengths, other.lengths)


# Scores


def test_a_member_with_a_score_that_is_no_number_has_no_score(tmp_path):
    """It would else be compared on the other samples alone, which may be the easier ones."""
    graded = opened(tmp_path).grade(np.array([[np.nan, -3.0], [-5.0, -3.0]]), Batch(np.zeros((2, 3), np.int32), np.full(2, 3)), 0)
    assert graded.means().tolist() == [-np.inf, -4.0]


# The items of a step


def test_the_samples_of_a_step_are_the_seeds_and_the_steps_draw(tmp_path):
    samples = opened(tmp_path, "run.seed=9")
    drawn = samples.draw(3)
    assert same(drawn, batch.pack(samples.train, batch.draw(len(samples.train), 4, 9, 3)))
    assert len(drawn) == 4


def test_a_draw_depends_on_nothing_but_the_seed_and_the_step(tmp_path):
    """Not on the draws before it, nor on the run that it is made in."""
    one, other = opened(tmp_path / "one"), opened(tmp_path / "other", "es.sigma=0.5", "es.population=8", "run.iterations=9")
    first = [one.draw(step) for step in range(5)]
    assert all(same(one.draw(step), first[step]) for step in (4, 0, 2))
    assert all(same(other.draw(step), first[step]) for step in (3, 1))
    assert not any(same(first[step], first[step + 1]) for step in range(4))
    assert not same(opened(tmp_path / "seed", "run.seed=1").draw(0), first[0])


def test_a_fitness_and_its_items_can_be_sent_to_a_worker(tmp_path):
    assert pickle.loads(pickle.dumps(LogProb())).name == "logprob"
    drawn = opened(tmp_path).draw(0)
    assert same(pickle.loads(pickle.dumps(drawn)), drawn)


def test_fewer_samples_than_a_step_draws_are_refused_at_once(tmp_path):
    with pytest.raises(UserError, match=r"fitness\.samples = 5000: the corpus has only"):
        opened(tmp_path, "fitness.samples=5000")


@pytest.mark.parametrize("part", ["data.path", "eval.path"])
def test_tokens_that_the_model_does_not_know_are_refused(tmp_path, part):
    """In the training text and in the held-out text: the last byte of "à" is token 255, those of plain text are below 230."""
    (tmp_path / "plain.txt").write_text("plain text, a line of it\n" * 40)
    (tmp_path / "other.txt").write_text("plain text, voilà, a line of it\n" * 40)
    overrides = ["eval.every=1", "model.config.vocab_size=230"]
    plain, other = (f'"{tmp_path}/{name}.txt"' for name in ("plain", "other"))
    opened(tmp_path, *overrides, f"data.path={plain}", f"eval.path={plain}")
    texts = {"data.path": plain, "eval.path": plain} | {part: other}
    with pytest.raises(UserError, match=r"data\.tokenizer: makes the token 255, but the model's vocab_size is 230"):
        opened(tmp_path, *overrides, *(f"{key}={text}" for key, text in texts.items()))


# The items of an evaluation


def test_without_evaluations_nothing_is_held_out(tmp_path):
    samples = opened(tmp_path, "eval.fraction=0.3")
    assert samples.held_out_corpus is None
    evaluated = opened(tmp_path, "eval.every=1", "eval.fraction=0.3")
    assert len(evaluated.train) < len(samples.train)
    assert samples_of(evaluated.train) + samples_of(evaluated.held_out_corpus) == samples_of(samples.train)


def test_a_fraction_of_the_corpus_is_held_out(tmp_path):
    samples = opened(tmp_path, "eval.every=2", "eval.fraction=0.5", "eval.samples=3")
    held_out = samples.held_out_corpus
    assert len(held_out) > 3
    assert same(samples.held_out(), batch.pack(held_out, batch.spread(held_out, 3)))
    assert len(samples.held_out()) == 3


def test_a_text_of_its_own_is_held_out(tmp_path):
    (tmp_path / "other.txt").write_text("Something else to be evaluated on. " * 20)
    samples = opened(tmp_path, "eval.every=1", f"eval.path={tmp_path}/other.txt")
    assert samples_of(samples.train) == samples_of(opened(tmp_path).train)
    assert samples.tokenizer.decode(samples.held_out_corpus.sample(0)).startswith("Something else to be")
    assert len(samples.held_out()) == len(samples.held_out_corpus)  # all, if they are fewer than eval.samples


def test_the_reference_is_what_token_frequencies_score(tmp_path):
    samples = opened(tmp_path, "eval.every=1", "eval.fraction=0.3", "model.config.vocab_size=300")
    expected = corpus.unigram_score(samples.train, samples.held_out_corpus, 300)
    assert samples.reference() == {"vocab_size": 300, "unigram_score": expected}
    assert -np.log(300) < expected < -1


@pytest.mark.parametrize("every", [0, 1])
def test_the_fingerprint_is_of_all_samples(tmp_path, every):
    evaluations = f"eval.every={every}"
    samples = opened(tmp_path, evaluations)
    assert samples.fingerprint() == corpus.fingerprint(samples.train, samples.held_out_corpus)
    assert opened(tmp_path, evaluations, "run.seed=5").fingerprint() == samples.fingerprint()
    assert opened(tmp_path, evaluations, "fitness.max_length=31").fingerprint() != samples.fingerprint()


# Memory


@pytest.mark.parametrize("itemsize", [2, 4])
def test_memory_by_hand(tmp_path, itemsize):
    """32 tokens a sample, 2 samples a micro-batch; hidden size 64, intermediate size 96."""
    recipe = Recipe.load(write_recipe(tmp_path))
    text = AutoConfig.for_model("qwen3", **COMMON)
    block = 2 * 32 * (3 * 96 * itemsize + 8 * 64 * 4)
    logits = 2 * 32 * 2 * 2048 * itemsize
    expected = ItemMemory(tokens=32, hidden=3 * 32 * 64 * itemsize, activations=block + logits)
    assert LogProb().memory(recipe, text, itemsize) == expected


def test_without_an_intermediate_size_it_is_four_times_the_hidden_size(tmp_path):
    recipe = Recipe.load(write_recipe(tmp_path))
    gpt2 = AutoConfig.for_model("gpt2", **GPT2)
    assert not getattr(gpt2, "intermediate_size", None)
    qwen3 = AutoConfig.for_model("qwen3", **COMMON | {"intermediate_size": 256})
    assert LogProb().memory(recipe, gpt2, 2) == LogProb().memory(recipe, qwen3, 2)


def test_memory_grows_with_what_is_computed_at_once(tmp_path):
    recipe, text = Recipe.load(write_recipe(tmp_path)), AutoConfig.for_model("qwen3", **COMMON)
    base = LogProb().memory(recipe, text, 2)
    longer = dataclasses.replace(recipe, fitness=dataclasses.replace(recipe.fitness, max_length=64))
    assert LogProb().memory(longer, text, 2) == ItemMemory(64, 2 * base.hidden, 2 * base.activations)
    wider = dataclasses.replace(recipe, fitness=dataclasses.replace(recipe.fitness, micro_batch=4))
    assert LogProb().memory(wider, text, 2) == ItemMemory(32, base.hidden, 2 * base.activations)


# Scores


def test_scores_are_the_models_log_probabilities():
    tiny, items = Tiny(config_of("qwen3")), batch_of()
    perturbations = [BOTH, UNPERTURBED, PLUS]
    found = LogProb().score(tiny.model(), perturbations, items, 3)
    assert found.shape == (4, 6) and found.dtype == np.float64
    assert found.tobytes() == tiny.model().log_probabilities(perturbations, items, 3).tobytes()
