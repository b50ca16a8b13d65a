"""Talks to a model: a conversation, continued greedily."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from es_lite import system
from es_lite.data.chat import decode
from es_lite.data.lines import check_characters
from es_lite.data.prompt_batch import Prompts
from es_lite.data.prompts import Row
from es_lite.errors import UserError
from es_lite.evaluation.settings import encoded, room_for_prompts
from es_lite.evaluation.subject import Subject
from es_lite.evaluation.weights import Opened, opened
from es_lite.fitness.reward import Reward, check_vocabulary, end_tokens
from es_lite.recipe import Recipe

LONGEST = 1024
"""Tokens of a conversation, unless the command says otherwise or the model takes fewer."""


@dataclass
class Conversation:
    """Messages, if the tokenizer has a chat template; else each text is continued by itself."""

    subject: Subject
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    room: int
    """Tokens of the longest prompt."""
    messages: list[dict[str, str]] = field(default_factory=list)

    def prompt(self, text: str) -> np.ndarray:
        """The tokens to continue after `text`, int32 [length]. Raises UserError if they are more than there is room for."""
        check_characters(text, "--chat", "text")
        asked = [*(self.messages or self._system()), {"role": "user", "content": text}]
        row = Row(asked if self.tokenizer.chat_template else text, {}, "--chat")
        tokens = encoded([row], self.tokenizer, self.room)
        check_vocabulary(tokens, self.subject.config)
        return tokens[0]

    def answer(self, model: Opened, text: str, prompt: np.ndarray) -> str:
        """What the model writes after `prompt`, which `text` has become; the conversation goes on from there."""
        generation = self.subject.skeleton[0].generation_config
        ends = end_tokens(self.subject.config, generation, self.tokenizer)
        (ids,) = model.score(
            Prompts.pack(np.zeros(1, np.int64), [prompt], ends, self.recipe.generation.max_new_tokens), "writing"
        )
        if ids is None:
            raise UserError(f"{self.subject.name}: the model's logits are not numbers (NaN): it is broken")
        written = decode(self.tokenizer, ids)
        turn = [{"role": "user", "content": text}, {"role": "assistant", "content": written}]
        self.messages = [*(self.messages or self._system()), *turn]
        return written

    def _system(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.recipe.data.system}] if self.recipe.data.system else []


def chat(subject: Subject, recipe: Recipe, text: str, longest: int | None) -> None:
    """Prints the answer to `text`; "": answers lines of standard input until it ends.

    longest: tokens of the longest prompt; None: what the model takes, at most LONGEST. Raises UserError.
    """
    room = room_for_prompts(recipe, subject.context, longest or LONGEST)
    talk = Conversation(subject, subject.tokenizer(recipe.data), recipe, room)
    first = talk.prompt(text) if text else None
    length = room if first is None else first.size
    threads = system.cores() if recipe.workers.threads == "auto" else recipe.workers.threads
    recipe = replace(
        recipe,
        fitness=replace(recipe.fitness, samples=1, micro_batch=1, max_length=max(2, min(length, room))),
        eval=replace(recipe.eval, every=0),
        workers=replace(recipe.workers, count=1, threads=threads),
    )
    with opened(subject, recipe, Reward()) as model:
        if first is not None:
            print(talk.answer(model, text, first), flush=True)
            return
        for line in _lines():
            try:
                prompt = talk.prompt(line)
            except UserError as error:
                print(f"es_lite: {error}; the conversation begins anew", file=sys.stderr)
                talk.messages = []
                continue
            print(talk.answer(model, line, prompt), flush=True)


def _lines() -> Iterator[str]:
    """The lines of standard input that are not blank; on a terminal, each is asked for."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
