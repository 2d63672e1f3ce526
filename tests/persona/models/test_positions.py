"""A text has the same activations, answers and losses alone, beside longer ones, and across every switch."""

from dataclasses import dataclass

import pytest
import torch
from families import COMMON, FAMILIES, LLAMA, PARALLEL, tiny_model

from personatlas.persona.errors import UserError
from personatlas.persona.models.load import Model
from personatlas.persona.models.positions import far_neighbour_error, scale_switch
from personatlas.persona.pipeline.record import record
from personatlas.persona.pipeline.self_test import run_self_test
from personatlas.persona.rollout import Rollout
from personatlas.persona.sampling.cuda_graph import GraphSampler
from personatlas.persona.sampling.sampler import Prompt, Sampler, Sampling, pad


def rope(type: str, **settings: object) -> dict:
    return {"rope_parameters": {"rope_type": type, "rope_theta": 10000.0, **settings}}


LONG = {
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 64,
}
FREQUENCIES = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
# family, settings, and where its context ends
ROPES = {
    "linear": ("llama", LLAMA | rope("linear", factor=4.0), 512),
    "dynamic": ("llama", LLAMA | {"max_position_embeddings": 64} | rope("dynamic", factor=4.0), 64),
    "yarn": ("llama", LLAMA | rope("yarn", factor=8.0, original_max_position_embeddings=64), 512),
    "llama3": ("llama", LLAMA | rope("llama3", factor=8.0, **FREQUENCIES), 512),
    "longrope": (
        "phi3",
        LLAMA | {"sliding_window": None, "original_max_position_embeddings": 64} | rope("longrope", **LONG),
        64,
    ),
    "llama4": (
        "llama4_text",
        LLAMA
        | {"intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1}
        | {"floor_scale": 64, "attention_chunk_size": 24, "no_rope_layers": [1, 1, 0]},
        63,
    ),
    "learned": ("opt", COMMON | {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48}, 512),
    "alibi": (
        "falcon",
        PARALLEL | {"alibi": True, "new_decoder_architecture": False, "ffn_hidden_size": 48},
        512,
    ),
    "window": ("mistral", LLAMA | {"sliding_window": 24}, 512),
}
ROPES["learned"][1].update(num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=512)


@pytest.fixture(params=ROPES)
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Model:
    return of_kind(request.param, monkeypatch)


def of_kind(kind: str, monkeypatch: pytest.MonkeyPatch) -> Model:
    family, settings, _ = ROPES[kind]
    monkeypatch.setitem(FAMILIES, f"positions {kind}", (family, settings))
    return tiny_model(f"positions {kind}")


def text(seed: int, length: int) -> tuple[int, ...]:
    return tuple((13 * i * i + 31 * seed + 7) % 313 + 3 for i in range(length))


def test_the_context_ends_where_the_scale_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {kind: of_kind(kind, monkeypatch).context for kind in ROPES} == {
        kind: context for kind, (_, _, context) in ROPES.items()
    }


def test_parameters_by_layer_type_are_read_too() -> None:
    @dataclass
    class Config:
        rope_parameters: dict
        max_position_embeddings: int = 4096

    own = {"rope_type": "longrope", "original_max_position_embeddings": 1024}
    assert (
        scale_switch(Config({"full_attention": own, "sliding_attention": {"rope_type": "default"}})) == 1024
    )
    assert scale_switch(Config({"rope_type": "longrope"})) == 4096
    assert scale_switch(Config({"rope_type": "default"})) is None


def test_every_check_of_the_self_test_passes(model: Model) -> None:
    assert [check.name for check in run_self_test(model) if not check.passed] == []


def test_answers_are_the_same_alone_and_beside_rows_that_reach_the_end(model: Model) -> None:
    new = 6
    longest = min(model.context or 100, 100) - new
    prompts = [Prompt(text(i, length), seed=i) for i, length in enumerate((3, longest, 20, longest - 9, 7))]
    for sampler in (
        Sampler(model, frozenset(), Sampling(new)),
        GraphSampler(model, frozenset(), Sampling(new), slots=2),
    ):
        together = {answer.index: answer.ids for answer in sampler.answers(prompts)}
        for index, prompt in enumerate(prompts):
            assert next(iter(sampler.answers([prompt]))).ids == together[index]


def test_recorded_means_are_the_same_alone_and_beside_the_longest_text(model: Model) -> None:
    longest = min(model.context or 100, 100)
    texts = [text(i, length) for i, length in enumerate((6, longest, 30))]
    rollouts = [Rollout(f"a/0/{i}/0", (), ids[:4], ids[4:], "", 0, "end") for i, ids in enumerate(texts)]
    means = torch.empty(len(rollouts), model.n_layers, model.d_model)
    for indices, values in record(model, rollouts, tokens=4096):
        means[indices] = values
    for index, rollout in enumerate(rollouts):
        ((_, alone),) = record(model, [rollout])
        torch.testing.assert_close(means[index : index + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_switch_within_the_context_would_be_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = of_kind(kind, monkeypatch)
    assert far_neighbour_error(model) == 0
    monkeypatch.setattr(Model, "context", 512)
    assert far_neighbour_error(model) > 1e-3


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "llama4"])
def test_what_is_longer_than_the_scale_is_refused_in_one_line(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = of_kind(kind, monkeypatch)
    context = model.context or 0
    with pytest.raises(UserError, match=f"do not fit into the {context}"):
        list(Sampler(model, frozenset(), Sampling(12)).answers([Prompt(text(0, context - 11), seed=0)]))
    ids = torch.tensor([text(0, context + 1)])
    model.base(input_ids=ids[:, :-1], use_cache=False)
    with pytest.raises(UserError, match=f"after {context} tokens"):
        model.base(input_ids=ids, use_cache=False)
    with pytest.raises(UserError, match=f"after {context} tokens"):
        model.hf(ids)


def test_padding_to_a_multiple_stops_at_the_context() -> None:
    cpu = torch.device("cpu")
    assert pad([[1] * 33], cpu, 32).shape == (1, 64)
    assert pad([[1] * 33], cpu, 32, most=40).shape == (1, 40)
    assert pad([[1] * 33], cpu, 32, most=20).shape == (1, 33)
