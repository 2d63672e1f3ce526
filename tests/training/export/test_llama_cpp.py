"""llama.cpp itself runs what is exported: its server reads texts as the tokenizer does, and goes on as the model does."""

import random

import httpx
import pytest
import torch
from exported import PROMPT, QUESTION, SHAPE, exported_in

from personatlas.training.export.gguf import write_gguf
from personatlas.training.export.huggingface import load_exported, load_hf_tokenizer

xllamacpp = pytest.importorskip("xllamacpp", reason="no build of llama.cpp for this machine")

ALPHABETS = (
    "abcXYZ",
    "0123456789",
    " \t\n\r",
    "'.,;:!?-_/\\\"()<|>",
    "äßéñøΩжשעرहि中文日本語",
    "🙂🏳️\u200d\u00a0\u2028\u0301",
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return exported_in(tmp_path_factory.mktemp("llama_cpp"), context=256)


@pytest.fixture(scope="module")
def tokenizer(exported):
    return load_hf_tokenizer(exported, SHAPE)


@pytest.fixture(scope="module")
def client(exported):
    """llama.cpp's server over the exported folder, in fp32 throughout, its cache as well."""
    how = xllamacpp.CommonParams()
    how.model.path = str(write_gguf(exported, exported.parent / "model.gguf", "f32"))
    how.cache_type_k = how.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    how.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    how.n_ctx, how.n_parallel, how.cpuparams.n_threads, how.verbosity = 256, 1, 1, 0
    server = xllamacpp.Server(how)
    with httpx.Client(base_url=server.listening_address) as client:
        yield client


def asked(client, path, **what):
    return client.post(path, json=what).raise_for_status().json()


def odd_texts(count):
    draw = random.Random(0)
    for _ in range(count):
        parts = (
            draw.choices(draw.choice(ALPHABETS), k=draw.randint(1, 6)) for _ in range(draw.randint(1, 12))
        )
        yield "".join("".join(part) for part in parts)


def test_texts_are_parted_alike(client, tokenizer):
    for text in odd_texts(300):
        theirs = asked(client, "/tokenize", content=text, add_special=True, parse_special=False)["tokens"]
        assert theirs == tokenizer(text)["input_ids"], text


def test_greedy_answers_are_the_models(client, exported):
    how = {"n_predict": 24, "temperature": 0, "return_tokens": True}
    theirs = asked(client, "/completion", prompt=PROMPT[0].tolist(), **how)["tokens"]
    assert theirs == load_exported(exported).generate(PROMPT, 24)[0, PROMPT.shape[1] :].tolist()


@pytest.mark.parametrize("length", [1, 2, 17, 40])
def test_the_likelihood_of_every_next_token_is_the_models(client, exported, tokenizer, length):
    # the likelihoods are those before the bias, which is there since none are given beside a token that ends within a character
    how = {
        "n_predict": 1,
        "n_probs": SHAPE.vocabulary,
        "logit_bias": [[tokenizer.convert_tokens_to_ids("a"), 1000]],
    }
    (step,) = asked(client, "/completion", prompt=PROMPT[0, :length].tolist(), **how)[
        "completion_probabilities"
    ]
    theirs = torch.full((SHAPE.vocabulary,), torch.nan)
    for one in step["top_logprobs"]:
        theirs[one["id"]] = one["logprob"]
    ours = load_exported(exported)(PROMPT[:, :length])[0, -1].log_softmax(-1)
    assert ours.std() > 0.5
    assert (theirs - ours).abs().max() < 1e-4


def test_a_conversation_becomes_the_same_tokens_with_one_first_token(client, tokenizer):
    ours = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    answer = asked(client, "/v1/chat/completions", messages=QUESTION, max_tokens=1, temperature=0)
    assert answer["usage"]["prompt_tokens"] == len(ours)
    rendered = asked(client, "/apply-template", messages=QUESTION)["prompt"]
    assert asked(client, "/tokenize", content=rendered, add_special=True)["tokens"] == ours
    assert ours.count(tokenizer.bos_token_id) == 1
