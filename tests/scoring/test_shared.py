"""Products that members share: linear maps corrected for each member, and modules that own vectors, once for all or in turns."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import BOTH, of_kind
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.pytorch_utils import Conv1D

from es_lite.algorithm.jit import Threads
from es_lite.algorithm.noise import gaussian
from es_lite.algorithm.noise.lowrank import LowRank
from es_lite.model.layout import Tensor
from es_lite.scoring.factors import LowRankFactors, MemberRows, factors_of
from es_lite.scoring.scratch import Scratch
from es_lite.scoring.shared import RowsMixed, Shared, VectorsShared
from es_lite.weights.parts import Part

INPUTS, OUTPUTS, LENGTH, SAMPLES = 40, 56, 5, 3
LINEAR = pytest.mark.parametrize("kind", [nn.Linear, Conv1D], ids=["Linear", "Conv1D"])
BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
TILES = pytest.mark.parametrize(
    ("signs", "perturbations"), [((1, -1), 1), ((1, -1), 3), ((1,), 1), ((-1,), 1), ((1,), 4), ((-1,), 4)]
)
UNEVEN = pytest.mark.parametrize(
    ("signs", "counts"),
    [((1, -1), (3, 1)), ((1, -1), (2, 2, 0, 3)), ((1,), (1, 4, 2)), ((-1,), (0, 6)), ((1, -1), (1, 0, 0, 0))],
)
"""Signs of each perturbation's members, and rows of each member."""
ALONE = Threads(1)
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""The largest relative error of a rounding."""


def module_of(kind: type, bias: bool = True, inputs: int = INPUTS, outputs: int = OUTPUTS) -> nn.Module:
    """A linear map without memory, as in a skeleton."""
    with torch.device("meta"):
        if kind is nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias)
        module = Conv1D(outputs, inputs)
    if not bias:
        module.bias = None
    return module


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    named = enumerate(module.named_parameters(), start=3)
    return {name: Tensor(name, tuple(parameter.shape), number, 0.5, 1.0, 1.0) for number, (name, parameter) in named}


def operands(
    shared: Shared,
    members: Sequence[dict[str, torch.Tensor]],
    signs: Sequence[int] = (1, -1),
    counts: Sequence[int] = (),
    **fields,
) -> None:
    """A tile with SAMPLES samples (or `counts`) of LENGTH tokens for each of the members, with their vectors."""
    belong = MemberRows(signs, counts or (SAMPLES,) * len(members))
    fields = {"rows": sum(belong.counts), "length": LENGTH, "members": belong, "made": members, **fields}
    for name, value in fields.items():
        setattr(shared.operands, name, value)


def whole_numbers(*shape: int) -> torch.Tensor:
    """So small that sums of their products have no rounding errors, in any order."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    return torch.randint(-3, 4, shape, generator=generator).float()


# Linear maps


@LINEAR
@BIAS
@TILES
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("shape", [(LENGTH, INPUTS), (LENGTH, 2, INPUTS), None], ids=["states", "heads", "tokens"])
def test_each_member_has_its_own_correction_and_bias(kind, bias, signs, perturbations, rank, shape):
    """Exactly, with numbers that are not rounded, for rows of any shape, or all tokens in one dimension."""
    module = module_of(kind, bias)
    shared, members = Shared(module, tensors_of(module), ALONE), len(signs) * perturbations
    base, left = whole_numbers(OUTPUTS, INPUTS), whole_numbers(perturbations, OUTPUTS, rank)
    right, biases = whole_numbers(perturbations, INPUTS, rank), whole_numbers(members, OUTPUTS)
    factors = LowRankFactors(right, left.transpose(1, 2))
    if kind is Conv1D:  # whose matrix is [in, out], and so are its factors
        base, factors = base.T, LowRankFactors(left, right.transpose(1, 2))
    made = [{"bias": own} if bias else {} for own in biases]
    operands(shared, made, signs, base={"weight": base}, factors={"weight": factors})
    x = whole_numbers(members, SAMPLES, *(shape or (LENGTH, INPUTS)))

    expected = []
    for member in range(members):
        p, sign = divmod(member, len(signs))
        matrix = whole_numbers(OUTPUTS, INPUTS) + signs[sign] * left[p] @ right[p].T
        expected.append(x[member] @ matrix.T + (biases[member] if bias else 0))
    given = x.flatten(0, 1) if shape else x.reshape(-1, INPUTS)
    found = shared((given,), {})
    assert found.shape == (*given.shape[:-1], OUTPUTS)
    assert torch.equal(found.reshape(members, -1, OUTPUTS), torch.stack(expected).reshape(members, -1, OUTPUTS))
    assert torch.equal(x, whole_numbers(*x.shape)), "the argument is as it was"


@LINEAR
@TILES
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_shared_and_perturbed_in_scratch_a_linear_map_is_what_the_noise_defines(kind, signs, perturbations, rank, compute):
    """Both are near x(W ± σABᵀ/√r)ᵀ + b in float64: by at most the number of terms times 2^-24 of the sum of their magnitudes, as
    sums are in float32, and by the roundings to bfloat16. Those are, of the shared product: A·σ/√r and B, which the reference
    therefore has rounded, xB, and the sum without the correction, with it, and with the bias. In scratch: the matrix and the sum.
    """
    module, scratch = module_of(kind), Scratch(compute, Threads(1))
    tensors, random = tensors_of(module), np.random.default_rng(rank)
    parts = {name: Part.empty(tensor, 0, tensor.size, "bf16") for name, tensor in tensors.items()}
    for name, part in parts.items():
        part.put((0.15 if name == "weight" else 1) * random.standard_normal(part.data.size, np.float32), Threads(1))
    matrix, vector = {"weight": parts["weight"]}, {"bias": parts["bias"]}
    group = [replace(of_kind(BOTH, LowRank(rank)), sigma=0.2, pair=pair, signs=signs) for pair in range(perturbations)]
    made = [each for perturbation in group for each in scratch.kept(perturbation, vector)]
    shared, factors = Shared(module, tensors, ALONE), {"weight": scratch.factors(group, tensors["weight"])}
    operands(shared, made, signs, base=scratch.base(matrix), factors=factors)
    x = torch.from_numpy(random.standard_normal((len(made), SAMPLES * LENGTH, INPUTS), np.float32)).to(compute)
    found = shared((x.view(-1, LENGTH, INPUTS),), {}).view(*x.shape[:2], OUTPUTS).double()

    unit, sums = UNIT[compute] if compute == torch.bfloat16 else 0, (INPUTS + rank + 4) * UNIT[torch.float32]
    (height, width), scale = tensors["weight"].shape, np.float32(0.2 * 0.5 / math.sqrt(rank))  # 0.5 is the tensor's factor of σ
    base = torch.from_numpy(parts["weight"].float32()).double().view(height, width)
    for member, values in enumerate(x.double()):
        perturbation, sign, bias = group[member // len(signs)], signs[member % len(signs)], made[member]["bias"].double()
        drawn = torch.from_numpy(gaussian.epsilon(perturbation.place_of(tensors["weight"]), (), 0, (height + width) * rank))
        left, right = drawn.view(-1, rank).split([height, width])
        exact = base + sign * float(scale) * left.double() @ right.double().T
        left, right = (left * scale).to(compute).double(), right.to(compute).double()
        plain, left, right = (base.T, right, left) if kind is Conv1D else (base, left, right)
        product, projected = values @ plain.T, sign * values @ right
        correction = projected @ left.T
        tolerance = sums * (values.abs() @ (plain.abs() + left.abs() @ right.abs().T).T + bias.abs())
        tolerance += unit * (product.abs() + 2 * (product + correction).abs() + 2 * bias.abs() + projected.abs() @ left.abs().T)
        assert ((found[member] - (product + correction + bias)).abs() <= 1.02 * tolerance).all()
        assert correction.abs().mean() > 5 * tolerance.mean(), "otherwise this would prove nothing"

        exact = exact.T if kind is Conv1D else exact
        (own,) = scratch.tensors(replace(perturbation, signs=(sign,)), matrix)
        own = own["weight"].T if kind is Conv1D else own["weight"]
        in_scratch, expected = functional.linear(x[member], own, made[member]["bias"]), values @ exact.T + bias
        tolerance = (sums + unit) * (values.abs() @ exact.abs().T + bias.abs()) + unit * expected.abs()
        assert ((in_scratch - expected).abs() <= 1.02 * tolerance).all()


@LINEAR
@BIAS
@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_without_factors_a_linear_map_is_the_plain_product_bit_for_bit(kind, bias, members, compute):
    """Of the rows of all members; the bias is added by the product itself if there is one member."""
    module, random = module_of(kind, bias), torch.Generator().manual_seed(1)
    base = torch.randn(*module.weight.shape, generator=random).to(compute)
    made = [{"bias": torch.randn(OUTPUTS, generator=random).to(compute)} if bias else {} for _ in range(members)]
    x = torch.randn(members * SAMPLES, LENGTH, INPUTS, generator=random).to(compute)
    shared = Shared(module, tensors_of(module), ALONE)
    operands(shared, made, (1,), base={"weight": base})
    matrix = base.T if kind is Conv1D else base
    expected = functional.linear(x.view(-1, INPUTS), matrix, made[0]["bias"] if bias and members == 1 else None)
    if bias and members > 1:
        expected = expected + torch.cat([own["bias"].expand(SAMPLES * LENGTH, -1) for own in made])
    assert torch.equal(shared((x,), {}).view(-1, OUTPUTS), expected)


def test_a_slice_of_wider_states_is_an_input_like_any_other():
    """Its rows are not beside each other in memory."""
    module = module_of(nn.Linear, bias=False)
    shared, wide = Shared(module, tensors_of(module), ALONE), whole_numbers(2 * SAMPLES, LENGTH, 2 * INPUTS)
    factors = LowRankFactors(whole_numbers(1, INPUTS, 2), whole_numbers(1, 2, OUTPUTS))
    operands(shared, [{}, {}], base={"weight": whole_numbers(OUTPUTS, INPUTS)}, factors={"weight": factors})
    part = wide[..., 7 : 7 + INPUTS]
    assert torch.equal(shared((part,), {}), shared((part.contiguous(),), {}))


@LINEAR
@BIAS
@UNEVEN
def test_members_may_have_different_numbers_of_rows(kind, bias, signs, counts):
    """As those of sequences do, some of which have ended: each row has its own member's correction and bias."""
    module, members = module_of(kind, bias), len(counts)
    shared, pairs = Shared(module, tensors_of(module), ALONE), members // len(signs)
    base, left, right = whole_numbers(OUTPUTS, INPUTS), whole_numbers(pairs, OUTPUTS, 2), whole_numbers(pairs, INPUTS, 2)
    biases, x = whole_numbers(members, OUTPUTS), whole_numbers(sum(counts), LENGTH, INPUTS)
    factors = LowRankFactors(right, left.transpose(1, 2))
    if kind is Conv1D:
        base, factors = base.T, LowRankFactors(left, right.transpose(1, 2))
    made = [{"bias": own} if bias else {} for own in biases]
    operands(shared, made, signs, counts, base={"weight": base}, factors={"weight": factors})

    expected = []
    for member, rows in enumerate(x.split(counts)):
        p, sign = divmod(member, len(signs))
        matrix = whole_numbers(OUTPUTS, INPUTS) + signs[sign] * left[p] @ right[p].T
        expected.append(rows @ matrix.T + (biases[member] if bias else 0))
    assert torch.equal(shared((x,), {}), torch.cat(expected))
    tokens = shared((x.view(-1, INPUTS),), {})
    assert torch.equal(tokens.view(sum(counts), LENGTH, OUTPUTS), torch.cat(expected))


# MemberRows


def test_places_of_rows_if_each_member_is_given_as_many_as_the_one_with_most():
    rows = MemberRows((1,), (2, 0, 3))
    assert rows.uneven
    places, size = rows.places(5, torch.device("cpu"))
    assert (places.tolist(), size) == ([0, 1, 6, 7, 8], 9)
    places, size = rows.places(10, torch.device("cpu"))  # two tokens a row
    assert (places.tolist(), size) == ([0, 1, 2, 3, 12, 13, 14, 15, 16, 17], 18)
    assert places.dtype == torch.int64


@pytest.mark.parametrize(("counts", "uneven"), [((), False), ((3,), False), ((3, 3), False), ((3, 2), True), ((0, 3), True)])
def test_rows_are_uneven_if_members_have_different_numbers_of_them(counts, uneven):
    assert MemberRows((1, -1), counts).uneven == uneven


@pytest.mark.parametrize(
    ("counts", "rows", "expected"),
    [
        ((), 6, [0, 0, 1, 1, 2, 2]),  # of members that have the same number
        ((1, 1, 1), 6, [0, 0, 1, 1, 2, 2]),
        ((2, 0, 1), 3, [0, 0, 2]),
        ((2, 0, 1), 6, [0, 0, 0, 0, 2, 2]),
        ((0, 1, 2), 3, [1, 2, 2]),
    ],
)
def test_a_members_value_is_repeated_for_each_of_its_rows(counts, rows, expected):
    values = torch.tensor([[0.5, 10], [1.5, 11], [2.5, 12]])
    assert torch.equal(MemberRows((1,), counts).repeated(values, rows), values[expected])


# LowRankFactors


@UNEVEN
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
def test_factors_correct_rows_of_members_that_have_different_numbers_of_them(signs, counts, tokens, kernels):
    """Against a loop over the rows, exactly."""
    pairs, members = len(counts) // len(signs), MemberRows(signs, counts)
    factors = LowRankFactors(whole_numbers(pairs, INPUTS, 2), whole_numbers(pairs, 2, OUTPUTS), kernels)
    rows = sum(counts) * tokens
    x, y = whole_numbers(rows, INPUTS), whole_numbers(rows, OUTPUTS)
    owner = [member for member, count in enumerate(counts) for _ in range(count * tokens)]
    expected = y.clone()
    for row, member in enumerate(owner):
        p, sign = divmod(member, len(signs))
        expected[row] += signs[sign] * (x[row] @ factors.right[p]) @ factors.left[p]

    projected = factors.project(x, members, ALONE)
    assert projected.shape == ((rows, 2) if kernels else (pairs, len(signs) * max(counts) * tokens, 2))
    factors.add(y, projected, members, ALONE)
    assert torch.equal(y, expected)
    assert torch.equal(x, whole_numbers(rows, INPUTS)), "the argument is as it was"


def test_factors_of_a_slice_and_of_the_transposed_matrix():
    factors = LowRankFactors(whole_numbers(4, INPUTS, 2), whole_numbers(4, 2, OUTPUTS))
    some = factors[1:3]
    assert torch.equal(some.right, factors.right[1:3]) and torch.equal(some.left, factors.left[1:3])
    transposed = factors.transposed()
    assert torch.equal(transposed.right @ transposed.left, (factors.right @ factors.left).transpose(1, 2))
    again = transposed.transposed()
    assert torch.equal(again.right, factors.right) and torch.equal(again.left, factors.left)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_the_scale_is_applied_to_a_in_float32_before_it_is_rounded(compute):
    each = [(torch.randn(OUTPUTS, 3), torch.randn(INPUTS, 3), scale) for scale in (0.3, 1e-4)]
    factors = factors_of(each, compute)
    assert factors.right.dtype == factors.left.dtype == compute
    for p, (left, right, scale) in enumerate(each):
        assert torch.equal(factors.right[p], right.to(compute))
        assert torch.equal(factors.left[p], (np.float32(scale) * left.T).to(compute))


# Owners of vectors


def norm() -> Shared:
    with torch.device("meta"):
        module = nn.LayerNorm(INPUTS)
    return Shared(module, tensors_of(module), ALONE)


@pytest.mark.parametrize("members", [1, 2, 3])
def test_a_norm_uses_each_members_vectors_on_its_own_rows(members):
    shared, x = norm(), torch.randn(members * SAMPLES, LENGTH, INPUTS)
    made = [{"weight": torch.randn(INPUTS), "bias": torch.randn(INPUTS)} for _ in range(members)]
    operands(shared, made, (1,))
    rows = x.split(SAMPLES)
    expected = [functional.layer_norm(own, (INPUTS,), **vectors) for own, vectors in zip(rows, made, strict=True)]
    assert torch.equal(shared((x,), {}), torch.cat(expected))
    tokens = shared((x.view(-1, INPUTS),), {})
    assert torch.equal(tokens.view(x.shape), torch.cat(expected))


class Vector(nn.Module):
    """Owns a vector; records how many rows it is given. Its forward is `use`."""

    def __init__(self, use: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], width: int = INPUTS) -> None:
        super().__init__()
        self.use = use
        self.rows: list[int] = []
        self.vector = nn.Parameter(torch.empty(width, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows.append(x.shape[0])
        return self.use(x, self.vector)


def rms(x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """As RMSNorm does: what is computed in float32 is rounded before the vector is used."""
    states = x.float()
    return vector * (states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


USES = {
    "RMSNorm": (rms, INPUTS, True),
    "an offset": (lambda x, vector: x + 2 * vector, INPUTS, True),
    "the whole vector": (lambda x, vector: x * vector.sum(), INPUTS, False),
    "the vector's shape": (lambda x, vector: functional.layer_norm(x, vector.shape, vector), INPUTS, False),
    "a type error": (lambda x, vector: x * float(vector.mean()) if vector.dim() == 1 else x * None, INPUTS, False),
    "one number": (lambda x, vector: x * vector, 1, False),
    "half of the states": (lambda x, vector: torch.cat([x[..., :20] * vector, x[..., 20:]], dim=-1), 20, False),
}
"""How a module uses its vector, the vector's width, and whether the module can be run once for all members."""


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [(3, 3, 3), (4, 1, 2), (0, 2, 5)], ids=str)
@pytest.mark.parametrize("shape", [(LENGTH, INPUTS), (LENGTH, 2, INPUTS), None], ids=["states", "heads", "tokens"])
@pytest.mark.parametrize("use", USES)
def test_a_module_runs_once_for_all_members_if_it_uses_vectors_element_by_element(use, shape, counts, compute):
    """And otherwise once for each that has rows; either way with the bits of that member alone."""
    function, width, once = USES[use]
    module, random = Vector(function, width), torch.Generator().manual_seed(1)
    shared = Shared(module, tensors_of(module), ALONE)
    recorded = shared.module.rows
    made = [{"vector": torch.randn(width, generator=random).to(compute)} for _ in counts]
    x = torch.randn(sum(counts), *(shape or (LENGTH, INPUTS)), generator=random).to(compute)
    expected = torch.cat([function(rows, own["vector"]) for rows, own in zip(x.split(counts), made, strict=True)])
    given = x if shape else x.view(-1, INPUTS)
    operands(shared, made, (1,), counts)
    assert torch.equal(shared((given,), {}).view(expected.shape), expected)
    recorded.clear()
    assert torch.equal(shared((given,), {}).view(expected.shape), expected), "it is tried only once"
    each = 1 if shape else LENGTH
    runs = [sum(counts)] if once else [count for count in counts if count]
    assert recorded == [each * rows for rows in runs]


@pytest.mark.parametrize("kind", [Qwen3RMSNorm, Gemma3RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_norms_of_models_have_the_bits_of_each_member_alone(monkeypatch, kind, compute):
    with torch.device("meta"):
        module = kind(INPUTS)
    run = VectorsShared._run
    shared, random, calls = Shared(module, tensors_of(module), ALONE), torch.Generator().manual_seed(1), []
    made = [{name: torch.randn(INPUTS, generator=random).to(compute) for name, _ in module.named_parameters()} for _ in range(3)]
    counts, x = (2, 1, 4), torch.randn(7, 1, INPUTS, generator=random).to(compute)
    expected = [functional_call(module, own, (rows,)) for own, rows in zip(made, x.split(counts), strict=True)]
    operands(shared, made, (1,), counts, length=1)
    shared((x,), {})
    monkeypatch.setattr(VectorsShared, "_run", lambda *each: calls.append(each) or run(*each))
    assert torch.equal(shared((x,), {}), torch.cat(expected))
    assert len(calls) == (3 if kind is nn.LayerNorm else 1)


class Gate(nn.Module):
    """Owns a vector; takes other arguments than states."""

    def __init__(self) -> None:
        super().__init__()
        self.power = 2.0
        self.vector = nn.Parameter(torch.empty(INPUTS, device="meta"))

    def forward(self, x: torch.Tensor, beside: torch.Tensor, factor: float, *, shift: float = 0.0) -> torch.Tensor:
        return (x + beside) * self.vector * factor + shift


def test_the_other_arguments_of_an_owner_of_vectors_reach_every_member():
    """Those that are tensors are divided as the states are; numbers are not."""
    gate = Gate()
    shared, x, beside = (
        Shared(gate, tensors_of(gate), ALONE),
        whole_numbers(2 * SAMPLES, LENGTH, INPUTS),
        whole_numbers(2 * SAMPLES, LENGTH, 1),
    )
    made = [{"vector": whole_numbers(INPUTS)}, {"vector": 1 + whole_numbers(INPUTS)}]
    operands(shared, made)
    vectors = torch.stack([own["vector"] for own in made]).repeat_interleave(SAMPLES, dim=0)[:, None]
    assert torch.equal(shared((x, beside, 2.0), {"shift": 1.0}), (x + beside) * vectors * 2 + 1)
    transposed = x.transpose(0, 1)
    for args, kwargs in (
        ((x[:1], beside, 2.0), {}),
        ((x, beside[:1], 2.0), {}),
        ((transposed, beside, 2.0), {}),
        ((x,), {"beside": beside, "factor": 2.0}),
    ):
        with pytest.raises(RowsMixed):
            shared(args, kwargs)
    operands(shared, made[:1])
    assert torch.equal(shared((x,), {"beside": beside[:1], "factor": 1.0}), (x + beside[:1]) * made[0]["vector"])


# Modules that read parameters of others, and those that mix rows


@pytest.mark.parametrize("rows", [1, SAMPLES, 2 * SAMPLES - 1, 2 * SAMPLES * LENGTH + 1])
def test_rows_that_are_not_the_tiles_are_refused_if_they_belong_to_several_members(rows):
    module = module_of(nn.Linear)
    shared, made = Shared(module, tensors_of(module), ALONE), [{"bias": torch.zeros(OUTPUTS)}] * 2
    base = {"weight": whole_numbers(OUTPUTS, INPUTS)}
    operands(shared, made, base=base)
    with pytest.raises(RowsMixed):
        shared((whole_numbers(rows, 2, INPUTS),), {})
    operands(norms := norm(), [{"weight": torch.ones(INPUTS), "bias": torch.zeros(INPUTS)}] * 2)
    with pytest.raises(RowsMixed):
        norms((whole_numbers(rows, 2, INPUTS),), {})
    operands(shared, made[:1], base=base)
    assert shared((whole_numbers(rows, 2, INPUTS),), {}).shape == (rows, 2, OUTPUTS)


def test_a_matrix_that_another_module_reads_is_made_for_one_member_only():
    module = module_of(nn.Linear)
    shared, asked = Shared(module, tensors_of(module), ALONE), []
    matrix, bias = whole_numbers(OUTPUTS, INPUTS), whole_numbers(OUTPUTS)
    operands(shared, [{"bias": bias}], make=lambda name: asked.append(name) or matrix)
    assert shared.module.weight is matrix and shared.module.bias is bias and asked == ["weight"]
    operands(shared, [{"bias": bias}] * 2)
    for name in ("weight", "bias"):
        with pytest.raises(RowsMixed):
            getattr(shared.module, name)
    assert asked == ["weight"]
    bare = module_of(nn.Linear, bias=False)
    assert Shared(bare, tensors_of(bare), ALONE).module.bias is None


def test_a_vector_that_another_module_reads_is_given_for_one_member_only():
    shared, vector = Shared(gate := Gate(), tensors_of(gate), ALONE), whole_numbers(INPUTS)
    operands(shared, [{"vector": vector}])
    assert shared.module.vector is vector
    assert shared.module.power == 2.0  # other attributes are the module's
    with pytest.raises(AttributeError, match="forwards"):
        _ = shared.module.forwards
    operands(shared, [{"vector": vector}] * 2)
    with pytest.raises(RowsMixed):
        _ = shared.module.vector


# Which modules are shared


class Own(nn.Linear):
    """A class of its own, which may do anything with its matrix."""


class Block(nn.Module):
    """Owns a vector beside linear maps, which is not theirs."""

    def __init__(self, beside: bool = False, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 4), Conv1D(4, 4), nn.LayerNorm(4)
        self.inner = inner
        if beside:
            self.sinks = nn.Parameter(torch.empty(4))


@pytest.mark.parametrize(
    ("block", "others", "mixes"),
    [
        (lambda: Block(), [], False),
        (lambda: Block(inner=Block()), [], False),
        (lambda: Block(beside=True), ["sinks"], True),
        (lambda: Block(inner=nn.Conv1d(4, 4, 2)), ["inner.weight", "inner.bias"], True),
        (lambda: Block(inner=nn.Embedding(4, 4)), ["inner.weight"], True),
        (lambda: Block(inner=Own(4, 4)), ["inner.weight", "inner.bias"], True),
        (lambda: Block(inner=nn.ModuleList([nn.Linear(4, 4)])), [], True),  # experts, perhaps
    ],
)
def test_linear_maps_are_shared_and_what_owns_more_than_vectors_makes_members_take_turns(block, others, mixes):
    with torch.device("meta"):
        module = block()
    kinds = [type(part) for part in module.modules()]
    shared = Shared(module, tensors_of(module), ALONE)
    exact = [name for name, part in module.named_modules() if type(part) in (nn.Linear, Conv1D)]
    assert shared.linear == [f"{name}.weight" for name in exact]
    assert (shared.others, shared.mixes) == (others, mixes)
    assert set(dict(shared.module.named_parameters())) == set(others), "what is shared owns no parameters any more"
    assert [type(part) for part in module.modules()] == kinds, "the module itself is as it was"


def test_a_block_of_shared_modules_uses_the_tensors_of_each_name():
    """A linear map within the block has its own matrix and factors."""
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 2, bias=False)))
    shared, x = Shared(module, tensors_of(module), ALONE), whole_numbers(2 * SAMPLES, LENGTH, 4)
    base = {"0.weight": whole_numbers(6, 4), "2.0.weight": whole_numbers(2, 6)}
    factors = {"2.0.weight": LowRankFactors(whole_numbers(1, 6, 1), whole_numbers(1, 1, 2))}
    made = [{"0.bias": k + whole_numbers(6), "1.weight": torch.full((6,), k), "1.bias": torch.ones(6)} for k in (1.0, 2.0)]
    operands(shared, made, base=base, factors=factors)
    expected = []
    for own, rows, sign in zip(made, x.split(SAMPLES), (1, -1), strict=True):
        states = functional.layer_norm(rows @ base["0.weight"].T + own["0.bias"], (6,), own["1.weight"], own["1.bias"])
        moved = (factors["2.0.weight"].right @ factors["2.0.weight"].left)[0].T
        expected.append(states @ (base["2.0.weight"] + sign * moved).T)
    torch.testing.assert_close(shared((x,), {}), torch.cat(expected), rtol=0, atol=2e-5)
