"""How an architecture initialises its parameters, found by listening to its own code while it builds the model.

`transformers` and `torch` fill parameters by functions such as `normal_`. While a skeleton is built these are replaced by ones
that write down what would have been drawn, so that θ₀ can be drawn from the run's seed in slices, with the noise's generator.
"""

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn.init import _calculate_fan_in_and_fan_out, calculate_gain
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel, initialization

from es_lite.algorithm.noise import gaussian, philox
from es_lite.algorithm.noise.place import Place
from es_lite.errors import UserError
from es_lite.model.layout import on_meta

SMALL = 2**20
"""Parameters of up to so many elements may be initialised in ways that need all of them in memory."""

NUMBERS = 65536
"""How many 16 random bits can make."""


@dataclass(frozen=True)
class Drawn:
    """Elements that are drawn: normal with a mean and deviation, cut at low and high, or uniform between low and high."""

    kind: str
    """"normal", "truncated" or "uniform"."""
    mean: float = 0.0
    deviation: float = 1.0
    low: float = -math.inf
    high: float = math.inf

    def values(self, place: Place, start: int, count: int) -> np.ndarray:
        """float32 [count]: elements start … of the tensor at `place`."""
        if self.kind == "normal":
            out = np.empty(count, np.float32)
            gaussian.fill(out, place, self.deviation, start=start)
            return out + np.float32(self.mean) if self.mean else out
        return _table(self)[philox.lanes(place, start, count)]


@functools.cache
def _table(how: Drawn) -> np.ndarray:
    """What each of the 16-bit numbers stands for, float32."""
    shares = (np.arange(NUMBERS) + 0.5) / NUMBERS
    if how.kind == "uniform":
        return (how.low + (how.high - how.low) * shares).astype(np.float32)
    normal = NormalDist(how.mean, how.deviation)
    below, above = normal.cdf(how.low), normal.cdf(how.high)
    values = np.array([normal.inv_cdf(below + (above - below) * share) for share in shares])
    return values.clip(how.low, how.high).astype(np.float32)


@dataclass(frozen=True)
class Filled:
    """Elements with known values: one number for all, or as many numbers as elements."""

    numbers: np.ndarray
    """float32, [1] or [elements]."""

    def values(self, _: Place, start: int, count: int) -> np.ndarray:
        if self.numbers.size == 1:
            return np.full(count, self.numbers[0], np.float32)
        return self.numbers[start : start + count]


@dataclass(frozen=True)
class Stretch:
    """Consecutive elements of a parameter that are initialised in one way, later than those before it in the list."""

    start: int
    count: int
    how: Drawn | Filled

    def times(self, factor: float) -> "Stretch":
        """Multiplied by a number."""
        if isinstance(self.how, Filled):
            return replace(self, how=Filled(self.how.numbers * np.float32(factor)))
        scaled = {key: getattr(self.how, key) * factor for key in ("mean", "deviation", "low", "high")}
        return replace(self, how=Drawn(self.how.kind, **scaled))


UNKNOWN = Filled(np.array([np.nan], np.float32))
"""What was done to elements is not known."""

METHODS = {"normal_": "normal_", "uniform_": "uniform_", "fill_": "constant_", "zero_": "zeros_"}
"""Methods of tensors, and the functions that do the same."""

IN_PLACE = ("__imul__", "__itruediv__", "__iadd__", "__isub__", "__setitem__")

HARMLESS = ("requires_grad_", "detach_", "share_memory_")


class Initialisation:
    """What a model's code does to each parameter."""

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        """model: a `layout.skeleton`, another of which is built. seed: of what the code draws itself, for small parameters."""
        listener = _Listener()
        with torch.random.fork_rng(devices=[]), listener.listening(), listener:
            torch.manual_seed(seed % 2**63)
            fresh = on_meta(lambda: type(model)(model.config), listener.register)
        self._model = type(model).__name__
        self._stretches = {name: listener.heard(parameter) for name, parameter in fresh.named_parameters()}

    def of(self, name: str) -> list[Stretch]:
        """How a parameter is initialised. Raises UserError if that is not known."""
        if not self._stretches[name]:
            raise UserError(
                f"{self._model}: es_lite does not know how {name} is initialised; give model.path instead of model.config"
            )
        return self._stretches[name]


class _Listener(TorchFunctionMode):
    """Writes down what is done to parameters, by functions and by methods.

    Large ones are on the meta device; small ones are real, as code may compute on their device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._heard: dict[int, list[Stretch]] = {}
        """By the parameter's storage, which its views have too."""
        self._alive: list[torch.Tensor] = []
        """Parameters, so that no other gets the storage of one."""
        self._filling = False
        """A function is at work, which tells what it does."""

    def register(self, parameter: nn.Parameter) -> nn.Parameter:
        """Hears of a new parameter; returns what takes its place. A tied one is registered more than once."""
        if _storage(parameter) in self._heard:
            return parameter
        if parameter.numel() > SMALL or parameter.is_meta:
            parameter = nn.Parameter(parameter.data.to("meta"), requires_grad=False)
        self._alive.append(parameter)
        self._heard[_storage(parameter)] = []
        if not parameter.is_meta:
            self._add(parameter, Filled(_numbers(parameter)))
        return parameter

    def heard(self, parameter: torch.Tensor) -> list[Stretch]:
        """How the parameter is initialised; nothing if that is not known."""
        stretches = self._heard.get(_storage(parameter), [])
        whole = [i for i, s in enumerate(stretches) if (s.start, s.count) == (0, parameter.numel())]
        stretches = stretches[whole[-1] :] if whole else []
        if any(isinstance(s.how, Filled) and not np.isfinite(s.how.numbers).all() for s in stretches):
            stretches = []
        if not stretches and not parameter.is_meta and parameter.isfinite().all():  # its memory was replaced
            stretches = [Stretch(0, parameter.numel(), Filled(_numbers(parameter)))]
        return stretches

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Replaces the functions that fill parameters. What is not a parameter is filled as ever."""
        functions: dict[str, Callable] = dict(initialization.TORCH_INIT_FUNCTIONS)  # type: ignore[arg-type]
        fills = {name: self._replaced(name, function) for name, function in functions.items()}
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.dict(initialization.TORCH_INIT_FUNCTIONS, fills))
            stack.enter_context(mock.patch.object(initialization, "copy_", self._replaced("copy_", initialization.copy_)))
            for module in initialization.TORCH_MODULES_TO_PATCH:
                for name, fill in fills.items():
                    if hasattr(sys.modules.get(module), name):
                        stack.enter_context(mock.patch.object(sys.modules[module], name, fill))
            stack.enter_context(mock.patch.object(torch, "empty", _empty))
            yield

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(function, "__name__", "")
        changes = (name.endswith("_") and not name.endswith("__")) or name in IN_PLACE
        result = function(*args, **(kwargs or {}))
        if changes and args and isinstance(args[0], torch.Tensor) and name not in HARMLESS and not self._filling:
            self._changed(name, args[0], args[1:], kwargs or {})
        return result

    def _changed(self, name: str, tensor: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> None:
        """A method changes a tensor in place."""
        factor = args[0] if args and isinstance(args[0], int | float) else None
        if name in ("mul_", "__imul__", "div_", "__itruediv__") and factor:
            stretches = self._heard.get(_storage(tensor), [])
            factor = factor if "mul" in name else 1 / factor
            place = int(tensor.storage_offset()), tensor.numel()
            last = stretches[-1] if stretches else None
            if last and (last.start, last.count) == place and (factor > 0 or isinstance(last.how, Filled)):
                stretches[-1] = stretches[-1].times(factor)
                return
        function = METHODS.get(name, "")
        self._add(tensor, self._known(function, tensor, args, kwargs))

    @staticmethod
    def _known(function: str, tensor: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> Drawn | Filled:
        """What a function did to a tensor: how it draws, or the values that are now in it."""
        if (how := _how(function, tensor, args, kwargs)) is not None:
            return how
        return UNKNOWN if tensor.is_meta else Filled(_numbers(tensor))

    def _replaced(self, name: str, function: Callable) -> Callable:
        def fill(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if not tensor.is_meta:
                self._filling = True
                try:
                    function(tensor, *args, **kwargs)
                finally:
                    self._filling = False
            self._add(tensor, self._known(name, tensor, args, kwargs))
            return tensor

        return fill

    def _add(self, tensor: torch.Tensor, how: Drawn | Filled) -> None:
        """tensor: a parameter, or a view of some of its elements."""
        stretches = self._heard.get(_storage(tensor))
        if stretches is None:
            return
        if not tensor.is_contiguous():
            how = UNKNOWN
        stretches.append(Stretch(int(tensor.storage_offset()), tensor.numel(), how))


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


_torch_empty = torch.empty


def _empty(*args: Any, **kwargs: Any) -> torch.Tensor:
    """`torch.empty` in which memory that nobody fills is noticed: it is not a number."""
    values = _torch_empty(*args, **kwargs)
    small = values.numel() <= SMALL and values.is_floating_point() and not values.is_meta
    return values.detach().fill_(math.nan) if small else values


def _numbers(values: torch.Tensor) -> np.ndarray:
    """float32 [1] if all are the same, else [elements]."""
    flat = values.detach().float().cpu().reshape(-1).numpy().copy()
    return flat[:1] if flat.size and (flat == flat[0]).all() else flat


def _how(name: str, tensor: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> Drawn | Filled | None:
    """What a function draws, or the one number that it fills a tensor with; None if it does something else."""
    kwargs = {key: value for key, value in kwargs.items() if key != "generator"}

    def argument(key: str, position: int, default: Any) -> Any:
        return args[position] if len(args) > position else kwargs.get(key, default)

    if name in ("zeros_", "ones_", "constant_"):
        value = {"zeros_": 0.0, "ones_": 1.0}.get(name)
        return Filled(np.array([argument("val", 0, None) if value is None else value], np.float32))
    if name == "normal_":
        return Drawn("normal", float(argument("mean", 0, 0.0)), float(argument("std", 1, 1.0)))
    if name == "uniform_":
        return Drawn("uniform", low=float(argument("a", 0, 0.0)), high=float(argument("b", 1, 1.0)))
    if name == "trunc_normal_":
        mean, deviation = float(argument("mean", 0, 0.0)), float(argument("std", 1, 1.0))
        low, high = float(argument("a", 2, -2.0)), float(argument("b", 3, 2.0))
        if low <= mean - 6 * deviation and high >= mean + 6 * deviation:  # cuts off nothing
            return Drawn("normal", mean, deviation)
        return Drawn("truncated", mean, deviation, low, high)
    if tensor.dim() < 2 or not name.startswith(("xavier", "kaiming")):
        return None
    fan_in, fan_out = _calculate_fan_in_and_fan_out(tensor)
    if name.startswith("xavier"):
        deviation = argument("gain", 0, 1.0) * math.sqrt(2 / (fan_in + fan_out))
    else:
        fan = fan_in if argument("mode", 1, "fan_in") == "fan_in" else fan_out
        deviation = calculate_gain(argument("nonlinearity", 2, "leaky_relu"), argument("a", 0, 0)) / math.sqrt(fan)
    if name.endswith("normal_"):
        return Drawn("normal", 0.0, deviation)
    return Drawn("uniform", low=-math.sqrt(3) * deviation, high=math.sqrt(3) * deviation)
