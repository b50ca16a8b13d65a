"""The perturbed forward against Hugging Face's own forward of a model whose weights were perturbed by hand."""

import os
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from es_lite.algorithm import noise
from es_lite.algorithm.jit import Threads
from es_lite.data import Batch
from es_lite.errors import UserError
from es_lite.scoring import doors
from es_lite.scoring.forward import PerturbedModel
from es_lite.scoring.lanes import Lanes
from es_lite.scoring.perturb import UNPERTURBED, Perturbation, Scratch
from es_lite.weights import working
from es_lite.weights.layout import Multipliers, layout, skeleton
from es_lite.weights.stored import Part
from es_lite.weights.working import WorkingCopy

SIGMA = 0.0123
PLUS = Perturbation(seed=2**64 - 3, step=7, pair=2, sigma=SIGMA, signs=(1,))
BOTH = Perturbation(seed=2**64 - 3, step=7, pair=2, sigma=SIGMA, signs=(1, -1))
LENGTHS = [20, 20, 17, 9, 4, 2]

COMMON = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 300, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
SLIDING = {
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "num_hidden_layers": 3,
}
ARCHITECTURES = {
    "qwen3": ("qwen3", {}),
    "qwen3-sliding": ("qwen3", SLIDING | {"use_sliding_window": True}),
    "qwen2": ("qwen2", {}),  # with biases
    "llama": ("llama", {}),
    "llama-biases": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    ),
    "mistral": ("mistral", {"sliding_window": 5}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", SLIDING | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", SLIDING),
    "gpt2": ("gpt2", {}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "granite": ("granite", {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}),
    "smollm3": ("smollm3", {}),
    "olmo2": ("olmo2", {}),
}


def config_of(name: str, tied: bool = True, attention: str | None = None, **changes) -> PretrainedConfig:
    kind, keys = ARCHITECTURES[name]
    keys = (GPT2 if kind == "gpt2" else COMMON) | keys | changes
    config = AutoConfig.for_model(kind, **{"pad_token_id": None, **keys}, tie_word_embeddings=tied)
    config._attn_implementation = attention  # None is the model's own choice
    return config


def batch_of(lengths: Sequence[int] = LENGTHS, vocabulary: int = 300) -> Batch:
    random = np.random.default_rng(len(lengths))
    tokens = np.zeros((len(lengths), max(lengths)), np.int32)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = random.integers(0, vocabulary, length)
    return Batch(tokens, np.array(lengths, np.int32))


class Tiny:
    """A model of random weights, in a working copy and, as the same bfloat16 values in float32, by name."""

    def __init__(self, config: PretrainedConfig, groups=(), nes=False, shared=False) -> None:
        self.config = config
        self._reference: PreTrainedModel | None = None
        self.layout = layout(skeleton(config), groups, nes, shared)
        descriptor = working.allocate(self.layout, "bf16")
        self.working = WorkingCopy(self.layout, "bf16", descriptor)
        self.weights: dict[str, np.ndarray] = {}
        random = np.random.default_rng(1)
        for tensor in self.layout.tensors:
            values = random.standard_normal(tensor.size, np.float32)
            values = 0.15 * values if len(tensor.shape) > 1 or tensor.name.endswith("bias") else 1 + 0.1 * values
            self.working.write(Part(tensor, 0, values), Threads(1))
            self.weights[tensor.name] = (self.working.part(tensor).data.astype(np.uint32) << 16).view(np.float32)
        os.close(descriptor)  # the map stays

    def perturbed(self, perturbation: Perturbation, sign: int) -> dict[str, torch.Tensor]:
        """w ± float32(σ)·ε, in numpy."""
        out = {}
        for tensor in self.layout.tensors:
            p = perturbation
            epsilon = noise.gaussian(p.seed, p.step, p.pair, tensor.number, 0, tensor.size)
            moved = self.weights[tensor.name] + np.float32(sign * p.sigma * tensor.sigma) * epsilon
            out[tensor.name] = torch.from_numpy(moved).view(tensor.shape)
        return out

    @torch.no_grad()
    def hugging_face(self, weights: dict[str, torch.Tensor], batch: Batch, dtype=torch.float32) -> np.ndarray:
        """Mean log-probability of each sample, alone and unpadded, from the model that holds `weights`."""
        model = self._model()
        parameters = dict(model.named_parameters())
        assert parameters.keys() == weights.keys()
        for name, parameter in parameters.items():
            parameter.data = weights[name].to(dtype)  # buffers stay float32, as in a model that was loaded
        means = []
        for row, length in zip(batch.tokens, batch.lengths, strict=True):
            ids = torch.from_numpy(row[:length].astype(np.int64))
            log_probabilities = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
            means.append(log_probabilities.gather(1, ids[1:, None]).mean().item())
        return np.array(means)

    def _model(self) -> PreTrainedModel:
        if self._reference is None:
            self._reference = AutoModelForCausalLM.from_config(self.config).eval()
        return self._reference

    def reference(self, perturbation: Perturbation, batch: Batch, dtype=torch.float32) -> np.ndarray:
        return np.stack([self.hugging_face(self.perturbed(perturbation, sign), batch, dtype) for sign in perturbation.signs])

    def score(self, perturbation, batch, compute=torch.float32, threads=1, micro_batch=3, pass_samples=None) -> np.ndarray:
        model = PerturbedModel(skeleton(self.config), self.layout, self.working, compute, Lanes(1, threads), micro_batch)
        (scores,) = model.score([perturbation], batch, pass_samples or len(batch.lengths))
        return scores


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> bool:
    return found.shape == expected.shape and found.dtype == np.float64 and float(np.abs(found - expected).max()) < tolerance


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads of torch that wait for one another are most of the time of models as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def qwen3() -> Tiny:
    return Tiny(config_of("qwen3"))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_perturbed_forward_is_hugging_faces_of_perturbed_weights(name, tied):
    tiny, batch = Tiny(config_of(name, tied)), batch_of()
    found = tiny.score(BOTH, batch)
    assert close(found, tiny.reference(BOTH, batch))
    at_rest = tiny.score(UNPERTURBED, batch)
    assert close(at_rest, tiny.reference(UNPERTURBED, batch))
    assert np.abs(found - at_rest).max(axis=1).min() > 1e-2, "so small a perturbation would prove nothing"


@pytest.mark.parametrize("name", ["qwen3-sliding", "gemma2", "gemma3", "llama"])
def test_with_eager_attention_too(name):
    """There, masks are tensors, and Gemma 2 caps its attention."""
    tiny, batch = Tiny(config_of(name, attention="eager")), batch_of()
    assert close(tiny.score(BOTH, batch), tiny.reference(BOTH, batch))


def test_gemma3_sees_its_window():
    """The reference is as good as its window: a longer one must give other scores."""
    batch = batch_of()
    near, far = (Tiny(config_of("gemma3", sliding_window=window)).score(PLUS, batch) for window in (5, 50))
    assert np.abs(near - far)[0, :4].min() > 1e-4
    assert np.abs(near - far)[0, 4:].max() < 1e-5


@pytest.mark.parametrize(("name", "change"), [("cohere", {"logit_scale": 1.0}), ("granite", {"logits_scaling": 1.0})])
def test_scaled_logits_are_scored_scaled(name, change):
    batch = batch_of()
    scaled, plain = Tiny(config_of(name)).score(PLUS, batch), Tiny(config_of(name, **change)).score(PLUS, batch)
    assert np.abs(scaled - plain).min() > 1e-2


def test_capped_logits_are_scored_capped():
    batch = batch_of()
    capped, plain = (Tiny(config_of("gemma2", final_logit_softcapping=cap)).score(PLUS, batch) for cap in (3.0, None))
    assert np.abs(capped - plain).min() > 1e-2


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("token", [0, 250, 299])
def test_a_padding_token_is_a_token_like_any_other(name, token):
    """Whatever its id: only a few rows of the embedding are made, and it need not be among them."""
    tiny, batch = Tiny(config_of(name, pad_token_id=token)), batch_of([6, 3])
    assert close(tiny.score(BOTH, batch), tiny.reference(BOTH, batch))


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma3"])
@pytest.mark.parametrize("perturbation", [PLUS, BOTH], ids=["one", "two"])
@pytest.mark.parametrize("lengths", [[2], [5], [4, 4], [4, 2], [8, 8, 3, 2], [3, 3, 2], [6] * 3])
def test_batches_of_every_shape(name, perturbation, lengths):
    """Also where as many samples pass as there are tokens, heads or members: no dimension is taken for another."""
    tiny, batch = Tiny(config_of(name)), batch_of(lengths)
    expected = tiny.reference(perturbation, batch)
    for micro_batch in {1, 2, len(lengths)}:
        assert close(tiny.score(perturbation, batch, micro_batch=micro_batch), expected)


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
@pytest.mark.parametrize("micro_batch", [1, 3, 6])
def test_micro_batches_of_any_size_agree(name, micro_batch):
    tiny, batch = Tiny(config_of(name)), batch_of()
    assert close(tiny.score(BOTH, batch, micro_batch=micro_batch), tiny.score(BOTH, batch, micro_batch=2))


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma3"])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_how_many_samples_pass_together_changes_no_bit(name, compute, micro_batch):
    tiny, batch = Tiny(config_of(name)), batch_of()
    together = tiny.score(BOTH, batch, compute, micro_batch=micro_batch)
    for pass_samples in (2, 4, 100):
        apart = tiny.score(BOTH, batch, compute, micro_batch=micro_batch, pass_samples=pass_samples)
        assert apart.tobytes() == together.tobytes()


def test_members_together_and_alone_have_the_same_bits(qwen3):
    batch = batch_of()
    both = qwen3.score(BOTH, batch)
    for member, sign in enumerate((1, -1)):
        alone = Perturbation(BOTH.seed, BOTH.step, BOTH.pair, BOTH.sigma, (sign,))
        assert qwen3.score(alone, batch).tobytes() == both[member : member + 1].tobytes()


def test_a_model_scores_the_same_again_after_another_perturbation(qwen3):
    batch = batch_of()
    model = PerturbedModel(skeleton(qwen3.config), qwen3.layout, qwen3.working, torch.float32, Lanes(1, 1), 3)
    (first,) = model.score([BOTH], batch, 6)
    model.score([UNPERTURBED], batch_of([30, 2]), 6)
    (again,) = model.score([BOTH], batch, 6)
    assert again.tobytes() == first.tobytes()


def test_scoring_changes_no_weight(qwen3):
    before = {tensor.name: qwen3.working.part(tensor).data.copy() for tensor in qwen3.layout.tensors}
    qwen3.score(BOTH, batch_of(), torch.bfloat16)
    assert all(np.array_equal(qwen3.working.part(tensor).data, before[tensor.name]) for tensor in qwen3.layout.tensors)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "granite", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_blocks_of_the_vocabulary_add_up(monkeypatch, name, tied):
    tiny, batch = Tiny(config_of(name, tied)), batch_of()
    whole = tiny.score(BOTH, batch)
    monkeypatch.setattr(doors, "VOCABULARY_BLOCK", 64)
    blocks = tiny.score(BOTH, batch)
    assert close(blocks, whole)
    assert close(blocks, tiny.reference(BOTH, batch))


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_with_a_bias(monkeypatch, tied):
    """Phi's head has one; in several blocks of the vocabulary, too."""
    monkeypatch.setitem(ARCHITECTURES, "phi", ("phi", {}))
    tiny, batch = Tiny(config_of("phi", tied)), batch_of()
    assert any(tensor.name == "lm_head.bias" for tensor in tiny.layout.tensors)
    expected = tiny.reference(BOTH, batch)
    assert close(tiny.score(BOTH, batch), expected)
    monkeypatch.setattr(doors, "VOCABULARY_BLOCK", 64)
    assert close(tiny.score(BOTH, batch), expected)


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "gemma3", "gpt2"])
def test_in_bf16_it_stays_near_the_same_weights_in_float32(name):
    """The weights are rounded to bfloat16 in both; what is left is the rounding of activations and logits, 2^-9 of their size
    each time. Logits are about 3 here, and some twenty roundings add up on the way: √20 · 3 · 2^-9 = 0.026 a token, of which
    the mean of a longer sample keeps less."""
    tiny, batch = Tiny(config_of(name)), batch_of()
    found = tiny.score(BOTH, batch, torch.bfloat16)
    for member, sign in enumerate(BOTH.signs):
        rounded = {name: weight.bfloat16().float() for name, weight in tiny.perturbed(BOTH, sign).items()}
        errors = np.abs(found[member] - tiny.hugging_face(rounded, batch))
        assert errors.max() < 0.05
        assert errors.mean() < 0.015
    assert np.abs(found - tiny.score(UNPERTURBED, batch, torch.bfloat16)).mean() > 0.05


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma2", "gemma3", "gpt2"])
def test_in_bf16_it_is_what_hugging_face_makes_in_bf16(name):
    """Sample by sample, the very same operations: only the log-softmax, float32 here and float64 there, differs."""
    tiny, batch = Tiny(config_of(name)), batch_of()
    assert close(tiny.score(BOTH, batch, torch.bfloat16, micro_batch=1), tiny.reference(BOTH, batch, torch.bfloat16))


def scratch_bits(tiny: Tiny, compute: torch.dtype, threads: int) -> dict[str, list[bytes]]:
    scratch = Scratch(compute, Threads(threads))
    out = {}
    for tensor in tiny.layout.tensors:
        part = tiny.working.part(tensor)
        made = [members["x"].clone() for members in scratch.tensors(BOTH, {"x": part})]
        if len(tensor.shape) == 2:
            rows = np.arange(tensor.shape[0])
            by_rows = scratch.rows(BOTH, tensor, rows, *tiny.working.rows(tensor, rows))
            assert all(torch.equal(a, b) for a, b in zip(made, by_rows, strict=True))
            block = Part(tensor, 3 * tensor.width, part.data[3 * tensor.width : 9 * tensor.width], part.scales)
            assert all(torch.equal(a[3:9], b) for a, b in zip(made, scratch.block(BOTH, block), strict=True))
        out[tensor.name] = [t.contiguous().view(torch.uint8).numpy().tobytes() for t in made]
    return out


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_threads_rows_and_blocks_make_the_same_weights(compute):
    tiny = Tiny(config_of("qwen3", vocab_size=3001))  # an embedding large enough to be cut among threads
    one = scratch_bits(tiny, compute, 1)
    assert one == scratch_bits(tiny, compute, 2)
    for member, sign in enumerate(BOTH.signs):
        for name, expected in tiny.perturbed(BOTH, sign).items():
            assert one[name][member] == expected.to(compute).contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit_of_a_score(qwen3, compute):
    batch = batch_of()
    assert qwen3.score(BOTH, batch, compute, threads=2).tobytes() == qwen3.score(BOTH, batch, compute).tobytes()


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_groups_have_their_own_sigma(name):
    """The first pattern that is found in a name counts; a multiplier of 0 leaves the tensors as they are."""
    groups = [Multipliers("norm|ln_", 0, 0), Multipliers("emb|wte", 2.5, 1), Multipliers("mlp", 0, 0), Multipliers("", 0.5, 1)]
    tiny, batch = Tiny(config_of(name), groups), batch_of()
    assert {tensor.sigma for tensor in tiny.layout.tensors} == {0, 2.5, 0.5}
    for tensor in tiny.layout.tensors:
        if "norm" in tensor.name or "ln_" in tensor.name:
            assert tensor.sigma == 0
    found = tiny.score(BOTH, batch)
    assert close(found, tiny.reference(BOTH, batch))
    assert not close(found, Tiny(config_of(name)).score(BOTH, batch), 1e-3)


def test_where_every_group_is_frozen_nothing_is_perturbed():
    tiny, batch = Tiny(config_of("qwen3"), [Multipliers("", 0, 0)]), batch_of()
    at_rest = tiny.score(UNPERTURBED, batch)
    assert tiny.score(BOTH, batch).tobytes() == np.concatenate([at_rest, at_rest]).tobytes()


def test_shared_noise_gives_tensors_of_equal_shape_equal_noise():
    tiny, batch = Tiny(config_of("qwen3"), shared=True), batch_of()
    numbers = {}
    for tensor in tiny.layout.tensors:
        numbers.setdefault(tensor.shape, set()).add(tensor.number)
    assert all(len(found) == 1 for found in numbers.values())
    assert len(numbers) < len(tiny.layout.tensors)
    found = tiny.score(BOTH, batch)
    assert close(found, tiny.reference(BOTH, batch))
    assert not close(found, Tiny(config_of("qwen3")).score(BOTH, batch), 1e-3)


def test_without_shared_noise_each_tensor_has_its_own():
    tensors = Tiny(config_of("qwen3", tied=False)).layout.tensors
    assert len({tensor.number for tensor in tensors}) == len(tensors)


def test_a_model_without_a_linear_head_is_refused(monkeypatch):
    tiny = Tiny(config_of("qwen3"))
    model = skeleton(tiny.config)
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    with pytest.raises(UserError, match="Qwen3ForCausalLM"):
        PerturbedModel(model, tiny.layout, tiny.working, torch.float32, Lanes(1, 1), 1)


def test_logits_changed_in_an_unknown_way_are_refused(monkeypatch):
    tiny = Tiny(config_of("gemma2"))
    model = skeleton(tiny.config)
    plain = type(model).forward

    def odd(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        out.logits = out.logits + 1
        return out

    monkeypatch.setattr(type(model), "forward", odd)
    with pytest.raises(UserError, match="Gemma2ForCausalLM"):
        PerturbedModel(model, tiny.layout, tiny.working, torch.float32, Lanes(1, 1), 1)
