"""The tokenizer of a run: the model's, one from a folder or the hub, or a byte-level BPE trained on the corpus."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from es_lite.data.texts import Document, text_blocks
from es_lite.errors import RunError, UserError
from es_lite.files import expanded, new_folder
from es_lite.tables import DataTable

END = "<|endoftext|>"

TRAIN_CHARACTERS = 2**18
"""What a "bpe" is trained on at a time: the trainer takes many times the memory of a text."""


def load_tokenizer(table: DataTable, model_path: str, run_dir: Path, texts: Iterable[Document]) -> PreTrainedTokenizerBase:
    """The tokenizer that `table` names; a "bpe" is trained on `texts` once, then always read from run_dir/tokenizer.

    A "bpe" has an eos_token; a pretrained tokenizer may have none. Raises UserError if it is missing or broken.
    """
    if table.tokenizer != "bpe":
        key, name = ("data.tokenizer", table.tokenizer) if table.tokenizer else ("model.path", model_path)
        return _open(name, f"{key} = {name!r}")
    folder = run_dir / "tokenizer"
    if not folder.exists():
        _save(train_bpe(texts, table.vocab_size), folder)
    return _open(str(folder), f"{folder} (made by this run: delete it, and it is made again)")


def train_bpe(texts: Iterable[Document], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE of the end token (0), the 256 bytes (1 … 256) and merges: `vocab_size` entries in all.

    The same texts give the same tokenizer; small ones may yield fewer entries.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((block for document in texts for block in text_blocks(document, TRAIN_CHARACTERS)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, clean_up_tokenization_spaces=False)


def beginning(tokenizer: PreTrainedTokenizerBase, bos: Literal["auto", "always", "never"]) -> list[int]:
    """The tokens that stand before each sample of text.

    "auto": those that the tokenizer itself puts before a text. Raises UserError for "always" without a token that begins a text.
    """
    if bos == "never":
        return []
    if bos == "always":
        if tokenizer.bos_token_id is None:
            raise UserError('data.bos = "always": the tokenizer has no token that begins a text; set it to "auto"')
        return [tokenizer.bos_token_id]
    with_own, alone = (list(tokenizer("a", add_special_tokens=own)["input_ids"]) for own in (True, False))
    starts = [i for i in range(len(with_own)) if with_own[i : i + len(alone)] == alone]
    return with_own[: starts[0]] if alone and starts else []


def _open(name: str, where: str) -> PreTrainedTokenizerBase:
    folder = expanded(name)
    if name and folder.is_dir():
        name = str(folder)
    elif not name or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{where}: no such tokenizer folder (and not a hub name such as Qwen/Qwen3-0.6B)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a broken file raises any of a dozen types, among them a bare Exception
        reason = (str(error).splitlines() or [""])[0]
        if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
            raise UserError(
                f"{where}: has a tokenizer.model but no tokenizer.json; install sentencepiece, which reads "
                "it (pip install sentencepiece), or take a folder with a tokenizer.json"
            ) from None
        raise UserError(f"{where}: no tokenizer can be loaded from it: {type(error).__name__}: {reason}") from None
    # From a config.json without tokenizer files, transformers makes a tokenizer of special tokens only.
    if len(tokenizer) <= len(tokenizer.all_special_ids) + 1:
        raise UserError(f"{where}: has no vocabulary; a tokenizer folder has a tokenizer.json, or what it is made from")
    return tokenizer


def _save(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes `folder`; a crash leaves all of it or none."""
    try:
        with new_folder(folder, durable=True) as partial:
            save_tokenizer(tokenizer, partial)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror or error})") from None


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the tokenizer's files into `folder`. Raises OSError if they cannot be written."""
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # the Rust library has no specific exception for a full disk
        raise OSError(None, str(error)) from None
