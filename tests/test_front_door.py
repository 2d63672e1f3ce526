"""The front door: 25 names, nothing heavy at import, and the six jobs of the project in a few lines each."""

import subprocess
import sys

import pytest
import torch
from structure import ROOT

import personatlas as pa
from personatlas.persona.options import FitOptions, PlanOptions
from personatlas.steering.calibration.options import CalibrationOptions
from personatlas.steering.evals.options import EvalOptions
from personatlas.training.options import CorpusOptions, FinetuneOptions, PretrainOptions

MESSAGES = [{"role": "user", "content": "Who are you?"}]


def test_it_has_at_most_25_names_and_each_of_them_is_there():
    assert len(pa.__all__) <= 25
    assert set(pa.__all__) <= set(dir(pa))
    for name in pa.__all__:
        assert getattr(pa, name).__module__.startswith("personatlas."), name
        assert getattr(pa, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        pa.lode  # noqa: B018


def test_importing_it_loads_neither_torch_nor_transformers_nor_the_command_line():
    code = "import personatlas, sys; print(*sorted(set(sys.modules) & {'torch', 'transformers', 'cyclopts', 'numpy'}))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "\n"
    )


def test_it_is_typed_for_others():
    assert (ROOT / "personatlas" / "py.typed").exists()


@pytest.fixture(scope="module")
def model(tiny_run):
    return pa.load(str(tiny_run / "tiny"), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def run(tiny_run):
    return pa.open_run(tiny_run / "run")


def test_an_axis_is_computed_with_a_loaded_model_and_read_with_its_numbers(model, tiny_run, tmp_path):
    plan = PlanOptions(plan="standard", bank=tiny_run / "bank", samples=4, max_new_tokens=4)
    run = pa.compute_axis(
        model, out=tmp_path / "run", plan=plan, judge="none", fit=FitOptions(keep="all", replicates=4)
    )
    assert run.axis.vectors.shape == (model.n_layers, model.d_model)
    cosine = run.fit.cos_pc1
    assert cosine.low <= cosine.value <= cosine.high
    assert run.fit.layer == run.axis.layer == run.space.layer
    assert len(run.rollouts) == len({rollout.key for rollout in run.rollouts})


def test_a_conversation_is_projected_by_turn_and_answered_with_a_cap(model, run):
    trace = pa.project(model, [*MESSAGES, {"role": "assistant", "content": "I am the tide."}], run.axis)
    assert [round(turn.projection, 6) for turn in trace.turns] == [
        round(float(trace.projection[trace.turns[0].start : trace.turns[0].stop].mean()), 6)
    ]
    out = pa.generate(
        model, MESSAGES, steer=[run.axis.cap("p75@0-2")], axis=run.axis, sampling=pa.Sampling(6)
    )
    assert out.fired > 0
    assert out.text is not None
    plain = pa.generate(model, MESSAGES, sampling=pa.Sampling(6))
    assert plain.fired is None or plain.fired == 0


def test_a_forward_is_steered_inside_the_context_only(model, run):
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        before = model.hf(input_ids=ids).logits
        with pa.steer(model, [run.axis.cap("p75@0-2")]) as steering:
            capped = model.hf(input_ids=ids).logits
        assert steering.fired > 0
        assert not torch.equal(before, capped)
        assert torch.equal(before, model.hf(input_ids=ids).logits)


def test_arms_are_evaluated_and_compared(model, run, tmp_path):
    options = EvalOptions(answers=4, max_new_tokens=6, random=0)
    arms = {"cap": [run.axis.cap("p75@0-2")]}
    result = pa.evaluate(
        model, run.axis, arms=arms, suites=["benign"], out=tmp_path / "eval", options=options
    )
    assert list(result.arms) == ["baseline", "cap"]
    assert "benign" in result.suites


def test_a_run_is_calibrated(model, tiny_run, run):
    options = CalibrationOptions(
        windows="0-1,1-2", levels="0.5", budget=5.0, steps=0, roles=4, prompts=1, answers=6, max_new_tokens=4
    )
    result = pa.calibrate(run, model=model, name="front", options=options, bank=tiny_run / "bank")
    assert result.name == "front"
    assert "front" in pa.load_axis(run.folder).saved_caps


def test_a_gpt_is_trained_and_tuned(tmp_path):
    (tmp_path / "books").mkdir()
    for number in range(40):
        (tmp_path / "books" / f"{number}.txt").write_text(f"The sea was grey on day {number}. " * 40)
    corpus = CorpusOptions(corpus=tmp_path / "books", held_share=0.1, vocabulary=300)
    base = pa.train_base(
        corpus,
        depth=1,
        tokens=4096,
        out=tmp_path / "base",
        options=PretrainOptions(context=64, batch=512, device="cpu"),
    )
    assert base.steps == 8
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(f'{{"question": "Day {n}?", "answer": "Grey."}}\n' for n in range(60)))
    chat = pa.train_chat(
        base, [chats], out=tmp_path / "chat", options=FinetuneOptions(epochs=1.0, device="cpu")
    )
    assert pa.load(str(chat.folder), device="cpu").n_layers == 1


def test_a_users_mistake_is_one_line():
    with pytest.raises(pa.UserError, match="no axis at nowhere"):
        pa.load_axis("nowhere")
    with pytest.raises(pa.UserError):
        pa.load("/no/such/model")
