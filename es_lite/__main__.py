"""The console command `es-lite train|plan|replay|evaluate`, the same as `python -m es_lite.train` and so on."""

import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train a model as a recipe says",
    "plan": "say what a recipe needs, and whether it fits",
    "replay": "compute a run's weights from its journal",
    "evaluate": "say what a model or a run writes, and what it is worth",
}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in COMMANDS:
        listing = "\n".join(f"  {name:<8} {what}" for name, what in COMMANDS.items())
        asked_for_help = words[:1] in (["-h"], ["--help"])
        if words and not asked_for_help:
            print(f"es_lite: no such command: {words[0]}\n", file=sys.stderr)
        print(f"usage: es-lite COMMAND ...\n\n{listing}", file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else 2
    # Each command imports only what it needs.
    if words[0] == "train":
        from es_lite.train import main as command
    elif words[0] == "plan":
        from es_lite.plan import main as command
    elif words[0] == "evaluate":
        from es_lite.evaluate import main as command
    else:
        from es_lite.replay import main as command
    return command(words[1:])


if __name__ == "__main__":
    sys.exit(main())
