"""One dial: what the rules promise, whatever numbers stand in them, and the verb that prints them."""

import json
from dataclasses import astuple
from types import SimpleNamespace

import pytest
import torch

from personatlas.cli.app import main
from personatlas.persona.errors import UserError
from personatlas.training.data.tokenizer import vocabulary_for
from personatlas.training.model.config import Shape, tokens_per_piece
from personatlas.training.plan import (
    CHIPS,
    DEPTHS,
    batch_for,
    depth_for,
    describe_epochs,
    detect_chip,
    flops_a_token,
    make_plan,
    memory_for,
    optimal_tokens,
    peak_rates,
    shape_at,
    utilisation,
    weight_decay_for,
)


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_depth_is_a_shape_with_whole_heads_and_tensor_core_sizes(depth):
    shape = shape_at(depth)
    assert shape.heads * shape.head_width == shape.width
    assert 0 <= shape.width - 64 * depth < shape.head_width
    assert shape.heads % shape.kv_heads == 0
    assert shape.inner % 128 == 0
    assert 0 <= shape.inner - 8 * shape.width / 3 < 128
    assert shape.context & (shape.context - 1) == 0
    assert shape.context <= 2048


def test_a_deeper_model_is_never_smaller():
    sizes = [shape_at(depth).matrix_parameters for depth in DEPTHS]
    assert sizes == sorted(sizes)
    assert shape_at(24).matrix_parameters == 8 * shape_at(12).matrix_parameters


def test_depth_12_is_the_shape_that_is_written_down():
    shape = shape_at(12)
    assert shape == Shape(32768, 12, 768, 6, 3, 128, 2048, 2048)
    assert shape.matrix_parameters == 12 * 11 * 768**2


def test_flops_are_counted_as_nanochat_counts_them():
    """Its depth 12 has full heads and a plain MLP: at 544,000 tokens/s it reports 48.8% of 989 TFLOP/s."""
    nanochat = Shape(32768, 12, 768, 6, 6, 128, 2048, 2048)  # 4 x 768 of two matrices are 8/3 x 768 of three
    assert nanochat.matrix_parameters == 84_934_656
    assert utilisation(544_000.0, nanochat, CHIPS["h200"]) == pytest.approx(0.488, abs=5e-4)


def test_optimal_tokens_are_twenty_a_matrix_parameter():
    assert optimal_tokens(shape_at(12)) == 20 * shape_at(12).matrix_parameters


def test_a_longer_horizon_has_larger_batches_and_more_steps():
    horizons = [10**7 * 4**k for k in range(9)]
    batches = [batch_for(tokens, 2048) for tokens in horizons]
    steps = [tokens / batch for tokens, batch in zip(horizons, batches, strict=True)]
    assert batches == sorted(batches)
    assert steps == sorted(steps)
    assert batches[-1] / batches[4] == pytest.approx(4 ** (4 * 0.383), rel=0.05)


@pytest.mark.parametrize("gpus", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("tokens", [10**6, 10**8, 3 * 10**9])
def test_every_gpu_gets_the_same_number_of_whole_sequences(gpus, tokens):
    batch = batch_for(tokens, 512, gpus)
    assert batch % (512 * gpus) == 0
    plan = make_plan(6, tokens=tokens, context=512, gpus=gpus)
    assert plan.accumulation * plan.micro_batch * plan.gpus * 512 == plan.batch


def test_a_short_run_has_hundreds_of_steps():
    assert batch_for(95_000_000, 2048) == 65_536
    assert make_plan(12, tokens=105_000_000).steps > 700
    assert make_plan(4, tokens=2_000_000, context=256).steps >= 390


def test_rates_follow_the_root_of_the_batch_and_width_only_at_the_head():
    small, large = peak_rates(65_536, 768), peak_rates(4 * 65_536, 768)
    assert astuple(large) == pytest.approx(tuple(2 * rate for rate in astuple(small)))
    assert (small.matrix, small.head) == (0.021, 0.0028)
    wide = peak_rates(65_536, 1536)
    assert wide.head == pytest.approx(0.0014)
    assert (wide.matrix, wide.embedding, wide.norm) == (small.matrix, small.embedding, small.norm)


def test_weight_decay_averages_over_a_share_of_the_run_and_never_binds_the_norm():
    assert 1 / (0.02 * weight_decay_for(0.02, 10_000)) == pytest.approx(1500)
    assert weight_decay_for(0.02, 20_000) == pytest.approx(weight_decay_for(0.02, 10_000) / 2)
    assert weight_decay_for(0.009, 100) == 0.2


@pytest.mark.parametrize("tokens", [4096, 50_000, 10**7, 10**9])
def test_the_schedule_rises_once_stays_and_falls_to_nothing_after_the_last_step(tokens):
    plan = make_plan(4, tokens=tokens, context=512)
    rates = [plan.rate_at(step) for step in range(plan.steps)]
    top = rates.index(max(rates))
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert plan.rate_at(plan.steps) == 0
    assert plan.warmup + plan.decay <= max(plan.steps, 2)


def test_half_the_minutes_are_half_the_tokens_with_a_smaller_batch():
    long, short = (make_plan(12, minutes=minutes, chip=CHIPS["h200"]) for minutes in (6.0, 3.0))
    assert short.tokens / long.tokens == pytest.approx(0.5, rel=0.01)
    assert short.batch < long.batch
    assert long.seconds == pytest.approx(360, rel=0.01)
    assert long.seconds <= 360
    assert long.cost == pytest.approx(long.seconds / 3600 * CHIPS["h200"].price)


def test_two_gpus_do_twice_as_much_in_the_same_minutes():
    one, two = (make_plan(12, minutes=5.0, gpus=gpus) for gpus in (1, 2))
    assert two.tokens / one.tokens == pytest.approx(2, rel=0.01)
    assert two.cost == pytest.approx(2 * one.cost, rel=0.01)


def test_memory_is_what_its_parts_say():
    shape = shape_at(12)
    plain = memory_for(shape, 8, checkpointing=False)
    again = memory_for(shape, 8, checkpointing=True)
    spread = memory_for(shape, 8, checkpointing=False, gpus=4)
    assert plain.weights == plain.gradients == 4 * shape.parameters
    assert plain.optimizer == 4 * shape.matrix_parameters + 8 * (shape.parameters - shape.matrix_parameters)
    assert spread.optimizer == -(-plain.optimizer // 4)
    assert again.activations < plain.activations / 4
    assert plain.total == plain.weights + plain.gradients + plain.optimizer + plain.activations + plain.logits
    assert (
        plain.logits == 2**14 * 2**15 * 6 + 8 * shape.embedding_parameters
    )  # a micro-batch is less than a piece


def test_the_loss_holds_as_many_logits_whatever_the_vocabulary():
    assert [tokens_per_piece(words, compiled=True) for words in (1024, 32_768, 50_304)] == [
        2**20,
        2**15,
        20_480,
    ]
    assert [tokens_per_piece(words, compiled=False) for words in (1024, 32_768)] == [2**16, 2**11]


def test_a_model_too_large_for_the_memory_checkpoints_and_then_does_not_fit():
    small, large, larger = (make_plan(depth, chip=CHIPS["4090"]) for depth in (12, 26, 40))
    assert (small.fits, small.checkpointing) == (True, False)
    assert (large.fits, large.micro_batch) == (True, 1)
    assert not larger.fits
    assert larger.memory.total > 24e9


def test_a_corpus_that_is_too_small_is_said_plainly():
    assert describe_epochs(10**8, 2 * 10**8) == "50% of the corpus is read, once"
    assert "read 3.0 times (nearly as good as new text" in describe_epochs(3 * 10**8, 10**8)
    assert "worth nothing any more" in describe_epochs(10**10, 10**8)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"depth": 0}, "--depth 0 is not one of 1..48"),
        ({"depth": 12, "vocabulary": 100}, "257"),
        ({"depth": 12, "context": 1}, "--context 1"),
        ({"depth": 12, "tokens": 10, "minutes": 1.0}, "give one of them"),
        ({"depth": 12, "tokens": 10}, "10 tokens are less than a batch of 16,384"),
        ({"depth": 12, "minutes": float("nan")}, "no time to train in"),
        ({"depth": 12, "gpus": 0}, "--gpus 0"),
        ({"depth": 12, "share_of_peak": 45.0}, "45%"),
    ],
)
def test_what_makes_no_run_is_refused(how, message):
    with pytest.raises(UserError, match=message):
        make_plan(**how)


def test_the_verb_prints_what_a_run_takes(capsys):
    main(["train", "plan", "--depth", "12", "--minutes", "3", "--gpu", "h200"])
    told = " ".join(capsys.readouterr().out.split())
    assert "128.2 M: matrices 77.9, embedding 25.2, head 25.2" in told
    assert "(what 3 minutes hold)" in told
    assert "1 x h200 526,918 180 s $0.19" in told


def test_the_verb_says_what_does_not_fit(capsys):
    main(["train", "plan", "--depth", "40", "--gpu", "4090"])
    assert "does not fit: one sequence needs" in " ".join(capsys.readouterr().out.split())


def test_the_verb_prints_json_and_takes_a_price(capsys):
    main(["train", "plan", "--depth", "4", "--tokens", "10000000", "--price", "36", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["shape"]["width"] == 256
    assert told["cost"] == pytest.approx(told["seconds"] / 100)
    assert told["parameters"]["all"] == shape_at(4).parameters
    assert told["flops_a_token"] == flops_a_token(shape_at(4))


@pytest.mark.parametrize(("option", "value"), [("--gpu", "tpu"), ("--price", "-1"), ("--price", "inf")])
def test_the_verb_refuses_what_it_does_not_know(option, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "plan", "--depth", "4", option, value])
    assert stopped.value.code == 2
    assert option in capsys.readouterr().err


def test_the_verb_says_how_far_a_corpus_goes(tmp_path, capsys):
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"{number} All the world is a stage.\n" * 4000)
    main(["train", "plan", "--depth", "4", "--tokens", "1000000", "--corpus", str(tmp_path)])
    told = " ".join(capsys.readouterr().out.split())
    assert "830,368 bytes, about 193,109 tokens: the corpus is too small: it is read 5.2 times" in told
    main(["train", "plan", "--depth", "4", "--tokens", "100000", "--corpus", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)["corpus"] == {"bytes": 830_368, "tokens": 193_109}


def test_the_verb_refuses_a_corpus_without_text(tmp_path, capsys):
    (tmp_path / "blank.txt").write_text(" \n" * 9)
    with pytest.raises(SystemExit):
        main(["train", "plan", "--depth", "4", "--corpus", str(tmp_path)])
    assert "no text to train on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "chip", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "h100", 989e12),
        ("NVIDIA H100 PCIe", "h100-pcie", 756e12),
        ("NVIDIA H100 NVL", "h100-nvl", 835e12),
        ("NVIDIA H200", "h200", 989e12),
        ("NVIDIA H200 NVL", "h200-nvl", 835e12),
        ("NVIDIA A100-SXM4-80GB", "a100", 312e12),
    ],
)
def test_a_cards_peak_is_that_of_its_own_part(monkeypatch, name, chip, peak):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: name)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=9e10))
    found = detect_chip(torch.device("cuda"))
    assert (found.name, found.peak, found.memory) == (chip, peak, 9e10)


def test_causal_attention_counts_half_of_the_usual_attention():
    shape = shape_at(12)
    usual, causal = flops_a_token(shape), flops_a_token(shape, causal=True)
    assert usual - causal == 6 * 12 * 768 * 2048
    assert 0.467 * causal / usual == pytest.approx(0.405, abs=0.005)


def test_depth_and_vocabulary_follow_from_the_size_of_the_corpus():
    assert [vocabulary_for(size) for size in (0, 10_000, 1_000_000, 5_000_000, 16 << 20, 10**12)] == [
        *(512, 512, 1024, 8192, 32_768, 32_768)
    ]
    assert depth_for(400_000, 1024, CHIPS["cpu"], minutes=4.0) == 2
    depths = [depth_for(tokens, 32_768, CHIPS["h200"]) for tokens in (10**4, 10**6, 10**7, 10**8, 10**9)]
    assert depths == sorted(depths)
    assert depths[0] == 2 < depths[2] < depths[3] <= 12
    for tokens, depth in zip((10**6, 10**7, 10**8), depths[1:], strict=False):
        assert optimal_tokens(shape_at(depth)) <= 16 * tokens < optimal_tokens(shape_at(depth + 1))
    assert depth_for(10**8, 32_768, CHIPS["h200"], minutes=3.0) < depths[3]  # what minutes hold


def test_a_derived_length_reads_the_corpus_at_most_16_times():
    plan = make_plan(4, vocabulary=1024, corpus=400_000)
    assert plan.horizon == "16 epochs"
    assert 6_300_000 < plan.tokens <= 6_400_000
    assert make_plan(4, vocabulary=1024, corpus=10**9) == make_plan(4, vocabulary=1024)
