"""metrics.jsonl, one JSON object per step, the same in TensorBoard if it is installed, and samples.jsonl, what models wrote."""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from es_lite.errors import RunError


class Metrics:
    """Appends to a run's metrics; a last line that a crash tore is dropped."""

    def __init__(self, path: Path, tensorboard: bool) -> None:
        self._path = path
        self._samples = path.with_name("samples.jsonl")
        for file in (path, self._samples):
            data = file.read_bytes() if file.exists() else b""
            if data and not data.endswith(b"\n"):
                try:
                    os.truncate(file, data.rfind(b"\n") + 1)
                except OSError as error:
                    raise _unwritten(file, error) from None
        self._board = _board(path.parent / "tensorboard") if tensorboard else None

    def write(self, values: dict[str, Any]) -> None:
        """Appends a line. values: includes "step". Raises RunError if the disk is full."""
        try:
            _append(self._path, [values])
            if self._board:
                for name, value in values.items():
                    if name != "step" and value is not None:
                        self._board.add_scalar(name, value, values["step"])
                self._board.flush()
        except OSError as error:
            raise _unwritten(self._path, error) from None

    def keep_samples(self, samples: Sequence[dict[str, Any]]) -> None:
        """Appends to samples.jsonl. Raises RunError if the disk is full."""
        try:
            if samples:
                _append(self._samples, samples)
        except OSError as error:
            raise _unwritten(self._samples, error) from None

    def lines(self) -> list[dict[str, Any]]:
        """What has been written so far, except lines that are not a step's metrics: the file may be damaged."""
        lines = []
        for line in self._path.read_bytes().splitlines() if self._path.exists() else []:
            with contextlib.suppress(ValueError, RecursionError):
                if _is_of_a_step(found := json.loads(line)):
                    lines.append(found)
        return lines

    def evaluations(self) -> dict[int, float]:
        """eval_score by step, as written so far."""
        return {line["step"]: line["eval_score"] for line in self.lines() if line.get("eval_score") is not None}


def _is_of_a_step(line: Any) -> bool:
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return False
    return isinstance(line.get("eval_score"), float | int | None)


def _append(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def _unwritten(path: Path, error: OSError) -> RunError:
    return RunError(f"{path}: cannot be written ({error.strerror}); the journal has the step: free some space, add --resume")


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    try:
        return SummaryWriter(str(folder))
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror})") from None
