"""metrics.jsonl, one JSON object per step, and the same in TensorBoard if it is installed."""

import contextlib
import json
from pathlib import Path
from typing import Any

from es_lite.errors import RunError


class Metrics:
    """Appends to a run's metrics; a last line that a crash tore is dropped."""

    def __init__(self, path: Path, tensorboard: bool) -> None:
        self._path = path
        if path.exists():
            data = path.read_bytes()
            if not data.endswith(b"\n"):
                path.write_bytes(data[: data.rfind(b"\n") + 1])
        self._board = _board(path.parent / "tensorboard") if tensorboard else None

    def write(self, values: dict[str, Any]) -> None:
        """Appends a line. values: includes "step". Raises RunError if the disk is full."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
            if self._board:
                for name, value in values.items():
                    if name != "step" and value is not None:
                        self._board.add_scalar(name, value, values["step"])
                self._board.flush()
        except OSError as error:
            raise RunError(
                f"{self._path}: cannot be written ({error.strerror}); the journal has the step: free some space, add --resume"
            ) from None

    def lines(self) -> list[dict[str, Any]]:
        """What has been written so far, except lines that are not JSON."""
        lines = []
        for line in self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []:
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        return lines

    def evaluations(self) -> dict[int, float]:
        """eval_score by step, as written so far."""
        return {line["step"]: line["eval_score"] for line in self.lines() if line.get("eval_score") is not None}


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    try:
        return SummaryWriter(str(folder))
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror})") from None
