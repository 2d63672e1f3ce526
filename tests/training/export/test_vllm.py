"""vLLM runs what is exported. It asks for packages of its own, so it is tried where an environment of its own is named:

PERSONATLAS_VLLM=/path/to/that/bin/python python -m pytest tests/test_vllm.py
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from exported import PROMPT, QUESTION, SHAPE, exported_in

from personatlas.training.export.huggingface import load_exported, load_hf_tokenizer

PYTHON = os.environ.get("PERSONATLAS_VLLM")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="PERSONATLAS_VLLM names no Python with vLLM"),
]
TEXT = "The pier, at 10 o'clock:\n  fog — and \u00e9clairs."


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return exported_in(tmp_path_factory.mktemp("vllm"), context=256)


@pytest.fixture(scope="module")
def said(exported):
    """What vLLM says, in fp32."""
    asked, said = exported.parent / "asked.json", exported.parent / "said.json"
    what = {
        "prompt": PROMPT[0].tolist(),
        "tokens": 24,
        "context": 256,
        "conversation": QUESTION,
        "text": TEXT,
    }
    asked.write_text(json.dumps(what))
    how = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    script = Path(__file__).parents[2] / "support" / "vllm_answers.py"
    done = subprocess.run([PYTHON, script, exported, asked, said], env=how, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(said.read_text())


def test_greedy_answers_and_their_likelihoods_are_the_models(exported, said):
    model = load_exported(exported)
    ids = model.continued(PROMPT, 24)
    assert said["tokens"] == ids[0, PROMPT.shape[1] :].tolist()
    ours = model(ids)[0, PROMPT.shape[1] - 1 : -1].log_softmax(-1)
    assert ours.std() > 0.5
    for row, step in zip(ours, said["likely"], strict=True):
        theirs = torch.tensor(list(step.values()))
        assert (row[[int(id) for id in step]] - theirs).abs().max() < 1e-4


def test_conversations_and_texts_become_the_same_tokens(exported, said):
    tokenizer = load_hf_tokenizer(exported, SHAPE)
    assert (
        said["conversation"]
        == tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    )
    assert said["text"] == tokenizer(TEXT)["input_ids"]
