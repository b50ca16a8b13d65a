"""Attention of one new token to all earlier ones, in bfloat16: what `generate` spends most time on, after matrix products.

torch's kernel is made for many queries; this one reads each key and value once for all query heads that share it. Keys are stored
by element, [width, slots], so that slots lie side by side and their scores are computed together; sums are float32.

Shapes: R rows (sequences), K heads of keys, Q query heads of each, D the width of a head, S slots of the cache.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from es_lite.algorithm.formats import round_bf16, wide
from es_lite.algorithm.jit import Threads, jit
from es_lite.scoring.arrays import as_array
from es_lite.scoring.logsumexp import buffers, exponentials, halve_max, halve_sum

_f32, _u32 = np.float32, np.uint32

LANES = 16
"""Elements of a vector."""

LINE = 64
"""Bytes of a cache line."""

OURS = "sdpa"
"""Transformers' name of the attention that is replaced: models compare it with their own, so it keeps its name."""


@register_jitable
def room(slots: int) -> int:
    """Slots of memory for the keys of so many."""
    return -(-slots // LANES) * LANES


def keys_of(rows: int, heads: int, slots: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """Memory for keys, [rows, heads, slots, width], in the order that this kernel reads, if it can read these at all."""
    if like.dtype != torch.bfloat16 or like.device.type != "cpu" or width % LANES:
        return like.new_empty(rows, heads, slots, width)
    return like.new_empty(rows, heads, width, room(slots)).transpose(2, 3)[:, :, :slots]


def _weighted_sums(queries: int) -> Callable:
    """A compiled function: for `queries` rows of factors, sums of the same LANES columns of bfloat16 rows, in registers.

    Takes the addresses of the factors, float32 [queries, ...], the bits, uint16, and the sums, float32 [queries, ...]; the number
    of rows; and the distances in bytes between two queries' factors, two rows of bits, and two queries' sums.
    """
    byte, count = ir.IntType(8), ir.IntType(64)
    value, values = ir.FloatType(), ir.VectorType(ir.FloatType(), LANES)
    short, words = ir.VectorType(ir.IntType(16), LANES), ir.VectorType(ir.IntType(32), LANES)

    def generate(_: Any, builder: ir.IRBuilder, __: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        factors, bits, sums, rows, factor_step, bit_step, sum_step = arguments

        def load(address: ir.Value, kind: ir.Type, align: int) -> ir.Value:
            return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)

        def at(address: ir.Value, index: ir.Value, step: ir.Value | int) -> ir.Value:
            return builder.add(address, builder.mul(index, step if isinstance(step, ir.Value) else count(step)))

        kind = ir.FunctionType(values, [values] * 3)
        multiply_add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
        totals = [cgutils.alloca_once_value(builder, values([0.0] * LANES)) for _ in range(queries)]
        with cgutils.for_range(builder, rows) as loop:
            row = builder.zext(load(at(bits, loop.index, bit_step), short, 2), words)
            row = builder.bitcast(builder.shl(row, words([16] * LANES)), values)
            for query, total in enumerate(totals):
                factor = load(at(at(factors, count(query), factor_step), loop.index, 4), value, 4)
                spread = builder.insert_element(values(ir.Undefined), factor, ir.IntType(32)(0))
                spread = builder.shuffle_vector(spread, values(ir.Undefined), words([0] * LANES))
                builder.store(builder.call(multiply_add, [spread, row, builder.load(total)]), total)
        for query, total in enumerate(totals):
            place = builder.inttoptr(at(sums, count(query), sum_step), values.as_pointer())
            builder.store(builder.load(total), place, align=4)
        return cgutils.get_null_value(byte.as_pointer())

    @intrinsic
    def sums(_, factors, bits, sums, rows, factor_step, bit_step, sum_step):
        return types.void(*(types.int64,) * 7), generate

    return sums


_sums_1, _sums_2, _sums_3, _sums_4 = (_weighted_sums(queries) for queries in (1, 2, 3, 4))


@jit
def _sums(queries, factors, bits, sums, rows, width, factor_step, bit_step, sum_step):
    """Weighted sums of `width` columns, a multiple of LANES, for any number of queries. See _weighted_sums."""
    for first in range(0, queries, 4):
        some = min(4, queries - first)
        factor, total = factors + first * factor_step, sums + first * sum_step
        for low in range(0, width, LANES):
            column, out = bits + 2 * low, total + 4 * low
            if some == 1:
                _sums_1(factor, column, out, rows, factor_step, bit_step, sum_step)
            elif some == 2:
                _sums_2(factor, column, out, rows, factor_step, bit_step, sum_step)
            elif some == 3:
                _sums_3(factor, column, out, rows, factor_step, bit_step, sum_step)
            else:
                _sums_4(factor, column, out, rows, factor_step, bit_step, sum_step)


@intrinsic
def _prefetch(_, address):
    """Asks for the bytes at an address, which are used soon."""

    def generate(_: Any, builder: ir.IRBuilder, __: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        builder.call(function, [builder.inttoptr(arguments[0], pointer), number(0), number(2), number(1)])  # read, second level
        return cgutils.get_null_value(pointer)

    return types.void(types.int64), generate


@jit
def _prefetch_rows(first, rows, step, size):
    """Asks for the first `size` bytes of so many rows, `step` bytes apart."""
    for row in range(rows):
        for low in range(0, size, LINE):
            _prefetch(first + row * step + low)


@jit
def _range(seen):
    """The first slot that is seen, and the one after the last."""
    low, high = 0, seen.size
    while low < high and not seen[low]:
        low += 1
    while high > low and not seen[high - 1]:
        high -= 1
    return low, high


@jit
def _attend(out, query, keys, key_steps, values, value_steps, seen, scale):
    """Fills out, bfloat16 bits [R, K, Q, D].

    query: bits [R, K, Q, D]. keys, values: addresses of bits. Steps, in bytes: from a row to the next, from a head to the next,
    and from an element of all keys, or a slot of all values, to the next. seen: bool [R, S].
    """
    rows, heads, group, width = query.shape
    slots = room(seen.shape[1])
    queries, totals = np.empty((group, width), _f32), np.empty((group, width), _f32)
    total_bits = totals.view(_u32)
    scores = np.empty((group, slots), _f32)
    some, power = buffers(slots)
    power_bits = power.view(_u32)
    for r in range(rows):
        low, high = _range(seen[r])
        low = low // LANES * LANES  # so that the last columns are within the memory of the keys
        for h in range(heads):
            for g in range(group):
                for j in range(width):
                    queries[g, j] = wide(query[r, h, g, j]) * scale
            first = keys + r * key_steps[0] + h * key_steps[1] + 2 * low
            _prefetch_rows(first + key_steps[1], width, key_steps[2], 2 * (high - low))  # the next head's
            columns = room(high - low)
            _sums(group, queries.ctypes.data, first, scores.ctypes.data, width, columns, 4 * width, key_steps[2], 4 * slots)
            for g in range(group):
                some[: high - low] = scores[g, : high - low]
                some[high - low :] = _f32(-np.inf)
                for i in range(high - low):
                    some[i] = some[i] if seen[r, low + i] else _f32(-np.inf)
                exponentials(some, halve_max(some, power), power, power_bits)
                power[:] = some
                factor = _f32(1) / halve_sum(power)
                for i in range(high - low):
                    scores[g, i] = some[i] * factor if seen[r, low + i] else _f32(0)
            first = values + r * value_steps[0] + h * value_steps[1] + low * value_steps[2]
            _prefetch_rows(first + value_steps[1], high - low, value_steps[2], 2 * width)
            _sums(group, scores.ctypes.data, first, totals.ctypes.data, high - low, width, 4 * slots, value_steps[2], 4 * width)
            for g in range(group):
                round_bf16(out[r, h, g], total_bits[g])


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor, scale: float, threads: Threads
) -> torch.Tensor:
    """softmax(scale · query · keysᵀ) · values, bfloat16 [R, K, Q, D].

    query: bfloat16 [R, K, Q, D]; keys: [R, K, S, D], in the memory of `keys_of`; values: [R, K, S, D]; seen: bool [R, S], at
    least one slot of each row. +∞ or NaN among the scores of a row makes its output NaN.
    """
    out = torch.empty(query.shape, dtype=query.dtype)
    key_steps = tuple(2 * keys.stride(axis) for axis in (0, 1, 3))
    value_steps = tuple(2 * step for step in values.stride()[:3])
    query_bits, out_bits, mask = as_array(query.contiguous()), as_array(out), seen.contiguous().numpy()

    def part(low: int, high: int) -> None:
        some = slice(low, high)
        own_keys, own_values = keys.data_ptr() + low * key_steps[0], values.data_ptr() + low * value_steps[0]
        _attend(out_bits[some], query_bits[some], own_keys, key_steps, own_values, value_steps, mask[some], _f32(scale))

    threads.each(query.shape[0], part, least=8)
    return out


def _readable(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether they are one token's, the same mask for all heads, and keys and values as `KeyValueCache` has them."""
    one = query.shape[2] == 1 and mask.dtype == torch.bool and mask.shape[1:] == (1, 1, keys.shape[2])
    mine = keys.stride(2) == 1 and keys.stride(3) % LANES == 0 and values.shape == keys.shape and values.stride(3) == 1
    return one and mine and query.dtype == keys.dtype == values.dtype == torch.bfloat16 and query.device.type == "cpu"


@contextlib.contextmanager
def one_query_attention(threads: Threads) -> Iterator[None]:
    """Within it, models attend with this kernel where it can be used, and with torch's elsewhere."""

    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        position_bias: torch.Tensor | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        usual = position_bias is None and not others.get("softcap")
        if attention_mask is None or not (usual and _readable(query, key, value, attention_mask)):
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, position_bias=position_bias, **others
            )
        rows, heads, _, width = query.shape
        seen = attention_mask[:, 0, 0].expand(rows, -1)
        grouped = query.view(rows, key.shape[1], heads // key.shape[1], width)
        out = attend(grouped, key, value, seen, width**-0.5 if scaling is None else scaling, threads)
        return out.view(rows, 1, heads, width), None

    AttentionInterface.register(OURS, forward)
    try:
        yield
    finally:
        AttentionInterface.register(OURS, sdpa_attention_forward)
