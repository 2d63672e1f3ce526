"""Other people's clients against the real server: OpenAI's own, Inspect, lm-eval, and what Open WebUI sends."""

import asyncio
import gc
import logging
import re
import secrets
import sys

import httpx
import openai
import pytest
import torch
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from personatlas.persona.models.chat_template import chat_format
from personatlas.persona.models.load import load_model
from personatlas.persona.sampling.sampler import Sampling
from personatlas.steering.generate import generate
from personatlas.steering.serve.http.app import make_app

HI = [{"role": "user", "content": "Who are you?"}]
TALK = [
    {"role": "system", "content": "You are a nun."},
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Peace be with you."},
    {"role": "user", "content": "Who are you?"},
]


@pytest.fixture(scope="module")
def client(tiny_server):
    with openai.OpenAI(base_url=tiny_server.v1, api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def alone(tiny_run):
    """The same model once more, without an engine."""
    return load_model(str(tiny_run / "tiny"), device="cpu", dtype="float32")


def asked(client, messages=HI, **more):
    return client.chat.completions.create(**{"model": "tiny", "messages": messages, "temperature": 0, **more})


def scores(model, ids):
    """Log-probabilities of every next token, by a plain forward."""
    with torch.no_grad():
        return model.hf(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)


def test_a_chat_answer_has_all_that_openais_client_reads(client):
    answer = asked(client, TALK, max_tokens=9)
    (choice,) = answer.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert choice.message.content
    assert answer.usage.completion_tokens == 9
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 9
    persona = answer.model_extra["persona"]
    assert [turn["message"] for turn in persona["turns"]] == [2, 4]
    assert persona["turns"][-1]["projection"] == persona["projection"]
    assert persona["cap"] is None


def test_a_stream_is_the_same_answer_in_a_loop_that_expects_a_choice_in_every_chunk(client):
    whole = asked(client)
    chunks = list(asked(client, stream=True))
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].model_extra["persona"]["projection"] == pytest.approx(
        whole.persona["projection"], abs=1e-4
    )
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_tells_its_usage_in_a_last_chunk_when_asked(client):
    chunks = list(asked(client, stream=True, stream_options={"include_usage": True}, max_tokens=5))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 5
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].model_extra["persona"]["tokens"] == 5


def test_the_seed_decides_and_n_answers_are_those_of_n_seeds(client):
    several = asked(client, n=3, seed=5, temperature=1)
    texts = [choice.message.content for choice in several.choices]
    assert texts == [asked(client, seed=5 + i, temperature=1).choices[0].message.content for i in range(3)]
    assert len(set(texts)) == 3
    assert [one["tokens"] for one in several.persona["choices"]] == [12, 12, 12]
    streamed = ["", "", ""]
    for chunk in asked(client, n=3, seed=5, temperature=1, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    assert (
        asked(client, temperature=1).choices != asked(client, temperature=1).choices
    )  # without one they differ


def test_pieces_tokens_and_bytes_of_an_answer_all_spell_it(client):
    """Of a random model, whose tokens are mostly parts of characters."""
    how = {"temperature": 2, "top_p": 1, "max_tokens": 40, "logprobs": True, "top_logprobs": 2}
    more = {"extra_body": {"persona": {"per_token": True}}}
    for seed in range(6):
        whole = asked(client, seed=seed, **how, **more)
        text = whole.choices[0].message.content
        chunks = list(asked(client, seed=seed, stream=True, **how, **more))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
        assert "".join(token["text"] for token in whole.persona["per_token"]) == text
        streamed = [
            token
            for chunk in chunks[:-1]
            for token in (chunk.model_extra.get("persona") or {"tokens": []})["tokens"]
        ]
        assert [token["text"] for token in streamed] == [
            token["text"] for token in whole.persona["per_token"][: len(streamed)]
        ]
        tokens = whole.choices[0].logprobs.content
        spelled = b"".join(bytes(one.bytes) for one in tokens if not re.fullmatch("<.+>", one.token))
        assert spelled.decode("utf-8", "replace") == text


def test_a_stop_text_ends_the_answer_before_it(client):
    text = asked(client, max_tokens=40).choices[0].message.content
    stop = text[10:12]
    cut = asked(client, max_tokens=40, stop=[stop, "nowhere in it"]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (text[: text.index(stop)], "stop")


def test_log_probabilities_of_a_chat_are_those_of_a_plain_forward(client, alone):
    answer = asked(
        client, logprobs=True, top_logprobs=3, max_tokens=6, extra_body={"persona": {"per_token": True}}
    )
    prompt = chat_format(alone.tokenizer).prompt_ids(HI)
    ids = [token["id"] for token in answer.persona["per_token"]]
    expected = scores(alone, prompt + ids)[len(prompt) - 1 : -1]
    for at, token in enumerate(answer.choices[0].logprobs.content):
        assert token.logprob == pytest.approx(float(expected[at, ids[at]]), abs=1e-4)
        best = expected[at].topk(3).values.tolist()
        assert [one.logprob for one in token.top_logprobs] == pytest.approx(best, abs=1e-4)
        assert bytes(token.bytes).decode("utf-8", "backslashreplace") == token.token


def test_a_completion_echoes_its_prompt_with_the_forwards_log_probabilities(client, alone):
    for prompt in ("The sea, the sea", list(b"ships and sails")):
        found = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=2, echo=True, logprobs=2, temperature=0
        )
        (choice,) = found.choices
        ids = alone.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        own, expected = choice.logprobs.token_logprobs, scores(alone, ids)
        assert own[0] is None
        assert own[1 : len(ids)] == pytest.approx(
            [float(expected[i, ids[i + 1]]) for i in range(len(ids) - 1)], abs=1e-4
        )
        assert own[len(ids)] == pytest.approx(float(expected[-1].max()), abs=1e-4)
        assert max(choice.logprobs.top_logprobs[3].values()) == pytest.approx(
            float(expected[2].max()), abs=1e-4
        )
        assert choice.text.startswith(alone.tokenizer.decode(ids))
        assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == len(own)


def test_several_prompts_are_several_choices_and_a_completion_streams(client):
    whole = client.completions.create(
        model="tiny", prompt=["A sea", "A ship", "A"], max_tokens=4, temperature=0
    )
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    chunks = client.completions.create(
        model="tiny", prompt="A ship", max_tokens=4, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[1].text


def test_every_object_is_what_openais_own_types_require(tiny_server):
    """Strictly: the client itself takes almost anything."""

    def post(route, **body):
        answer = httpx.post(f"{tiny_server.v1}/{route}", json={"max_tokens": 3, "seed": 0, **body})
        assert answer.status_code == 200
        return answer

    def streamed(kind, answer):
        lines = [line.removeprefix("data: ") for line in answer.text.split("\n") if line]
        assert lines.pop() == "[DONE]"
        return [kind.model_validate_json(line, strict=True) for line in lines]

    told = {"logprobs": True, "top_logprobs": 2, "n": 2, "persona": {"cap": "held", "per_token": True}}
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    ChatCompletion.model_validate_json(post("chat/completions", messages=TALK, **told).text, strict=True)
    chunks = streamed(ChatCompletionChunk, post("chat/completions", messages=TALK, **told, **usage))
    assert [
        sum(bool(c.choices and c.choices[0].index == i and c.choices[0].finish_reason) for c in chunks)
        for i in (0, 1)
    ] == [1, 1]
    seen = [
        token
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs
        for token in choice.logprobs.content
    ]
    assert len(seen) == 6  # every token's log-probability is told once
    Completion.model_validate_json(post("completions", prompt=["A", "B"], logprobs=2).text, strict=True)
    for one in httpx.get(f"{tiny_server.v1}/models").json()["data"]:
        Model.model_validate(one, strict=True)


def test_the_models_are_the_model_and_its_caps(client):
    names = [model.id for model in client.models.list()]
    assert names == ["tiny", "tiny:none", "tiny:firm", "tiny:held"]
    assert asked(client, model="tiny:held").persona["cap"] == "held"
    assert asked(client, model="tiny:held", extra_body={"persona": {"cap": None}}).persona["cap"] is None
    assert client.models.retrieve("tiny:held").id == "tiny:held"


def test_errors_are_the_clients_own_exceptions(client):
    with pytest.raises(openai.NotFoundError, match="is not one of tiny, tiny:none") as missing:
        asked(client, model="gpt-4o")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")
    for wrong in (
        {"temperature": 3},
        {"max_tokens": -2},
        {"messages": []},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        {"extra_body": {"persona": {"cap": "nobody"}}},
        {"messages": [{"role": "user", "content": "x" * 300}]},
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            asked(client, **wrong)
        assert refused.value.type == "invalid_request_error", wrong
    with pytest.raises(openai.BadRequestError, match=r"--context") as long:
        asked(client, [{"role": "user", "content": "x" * 300}])
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt=["x", "x" * 300])
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize("wanted", [4096, -1, 2**31])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_longer_answer_than_fits_is_as_long_as_fits_and_says_so(client, wanted, name):
    """Clients send such numbers for every model."""
    prompt = "x" * 180
    whole = asked(client, [{"role": "user", "content": prompt}], **{name: wanted})
    fitting = 256 - whole.usage.prompt_tokens
    assert (whole.usage.completion_tokens, whole.choices[0].finish_reason) == (fitting, "length")
    assert whole.persona.get("max_tokens") == (fitting if wanted > 0 else None)
    chunks = list(asked(client, [{"role": "user", "content": prompt}], stream=True, **{name: wanted}))
    assert chunks[-1].model_extra["persona"].get("max_tokens") == whole.persona.get("max_tokens")
    assert "max_tokens" not in asked(client, **{name: 3}).persona


def test_a_wrong_key_is_an_authentication_error(tiny_server):
    app = make_app(tiny_server.service, "a key of ours")

    async def listed(key):
        transport = httpx.ASGITransport(app=app)
        async with openai.AsyncOpenAI(
            base_url="http://here/v1",
            api_key=key,
            max_retries=0,
            http_client=httpx.AsyncClient(transport=transport),
        ) as client:
            return [model.id async for model in client.models.list()]

    with pytest.raises(openai.AuthenticationError):
        asyncio.run(listed("another"))
    assert asyncio.run(listed("a key of ours"))[0] == "tiny"


def test_capped_and_uncapped_at_once_are_the_same_as_one_by_one_and_as_generate(client, tiny_server, alone):
    """Batches of any mixture: fp32, greedy."""
    questions = [f"{word} {i}?" for i in range(3) for word in ("Who are you", "What is the sea", "Why")]
    wanted = [(text, cap) for text in questions for cap in ("none", "held", "firm")]

    async def all_at_once():
        async with openai.AsyncOpenAI(base_url=tiny_server.v1, api_key="none", max_retries=0) as many:
            return await asyncio.gather(
                *(
                    many.chat.completions.create(
                        model=f"tiny:{cap}",
                        messages=[{"role": "user", "content": text}],
                        temperature=0,
                        max_tokens=10,
                    )
                    for text, cap in wanted
                )
            )

    together = asyncio.run(all_at_once())
    axis, sampling = tiny_server.service.axis, Sampling(10, 0.0, 1.0)
    differ = 0
    for at, ((text, cap), answer) in enumerate(zip(wanted, together, strict=True)):
        messages = [{"role": "user", "content": text}]
        if at % 4 == 0:
            single = asked(client, messages, model=f"tiny:{cap}", max_tokens=10)
            assert single.choices[0].message.content == answer.choices[0].message.content
        plan = [tiny_server.service.arms.named[cap].interventions[0]] if cap != "none" else []
        one = generate(alone, messages, steer=plan, axis=axis, sampling=sampling)
        assert answer.choices[0].message.content == one.text
        read = answer.persona["turns"][-1]["tokens"]  # the last token of an answer that was cut is never fed
        fired = float(one.trace.fired_layers[one.trace.answer_from :][:read].sum())
        assert answer.persona["projection"] == pytest.approx(float(one.trace.answer[:read].mean()), abs=1e-3)
        assert (answer.persona["fired"] or 0) == pytest.approx(fired / (read * (3 if cap == "held" else 1)))
        differ += (
            cap != "none"
            and answer.choices[0].message.content != together[at - at % 3].choices[0].message.content
        )
    assert differ > 9  # the caps do something


def test_what_open_webui_sends_is_answered(tiny_server, monkeypatch):
    """Its model list, and its body with fields of its own, nulls, content in parts and usage in the stream."""
    monkeypatch.setattr(secrets, "randbelow", lambda _: 3)  # of the seed, which it does not send
    listed = httpx.get(f"{tiny_server.v1}/models").json()
    assert listed["object"] == "list"
    assert all({"id", "object", "created", "owned_by"} <= set(model) for model in listed["data"])
    body = {
        "model": "tiny",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [
            {
                "role": "system",
                "content": [{"type": "text", "text": "You are "}, {"type": "text", "text": "a nun."}],
            },
            {"role": "user", "content": "Hello", "name": None, "files": None},
            {"role": "assistant", "content": "Peace.", "tool_calls": None},
            {"role": "user", "content": [{"type": "text", "text": "Who are you?"}]},
        ],
        "chat_id": "3f0c",
        "session_id": "x",
        "id": "y",
        "metadata": {"chat_id": "3f0c", "features": {"web_search": False}},
        "features": {},
        "background_tasks": {"title_generation": True},
        "tools": None,
        "stop": None,
        "temperature": None,
        "max_tokens": None,
        "frequency_penalty": None,
        "logit_bias": None,
        "seed": None,
        "user": {"name": "a", "role": "admin"},
    }
    with httpx.stream("POST", f"{tiny_server.v1}/chat/completions", json=body) as answer:
        assert (answer.status_code, answer.headers["content-type"]) == (
            200,
            "text/event-stream; charset=utf-8",
        )
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert '"completion_tokens": 12' in lines[-2]
    plain = {**body, "stream": False, "stream_options": None, "n": None}
    assert httpx.post(f"{tiny_server.v1}/chat/completions", json=plain).json()["choices"][0]["message"][
        "content"
    ]


@pytest.fixture
def quiet(monkeypatch):
    """Inspect's and lm-eval's handlers and hooks gone afterwards; what they leave to the collector is collected here."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    hook, handlers, level = sys.excepthook, list(logging.root.handlers), logging.root.level
    yield
    sys.excepthook, logging.root.handlers = hook, handlers
    logging.root.setLevel(level)
    gc.collect()


@pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning")
def test_inspects_openai_provider_runs_a_task_on_it(client, tiny_server, tmp_path, quiet):
    pytest.importorskip("inspect_ai")
    from inspect_ai import Task
    from inspect_ai import eval as run_task
    from inspect_ai.dataset import Sample
    from inspect_ai.model import get_model
    from inspect_ai.scorer import includes
    from inspect_ai.solver import generate as answer

    samples = [Sample(input=text, target="e") for text in ("Who are you?", "What is rain?", "Why?")]
    model = get_model("openai-api/personatlas/tiny:held", base_url=tiny_server.v1, api_key="none")
    how = {"max_tokens": 8, "temperature": 0, "seed": 3, "display": "none", "ctl_server": False}
    (log,) = run_task(
        Task(dataset=samples, solver=answer(), scorer=includes()), model, log_dir=str(tmp_path), **how
    )
    assert log.status == "success", log.error
    for sample in log.samples:
        again = asked(client, [{"role": "user", "content": sample.input}], model="tiny:held", max_tokens=8)
        assert sample.output.completion == again.choices[0].message.content
        assert sample.output.usage.output_tokens == again.usage.completion_tokens


def ends_at_once(model):
    """Tokens after which the model's likeliest next one ends the answer."""
    ends = chat_format(model.tokenizer, model.hf.generation_config.eos_token_id).end_ids
    draw, letters = (
        torch.Generator().manual_seed(0),
        torch.tensor(model.tokenizer("abcdefghijklmnopqrstuvwxyz .,?")["input_ids"]),
    )
    for _ in range(60):
        ids = letters[torch.randint(len(letters), (128, 4), generator=draw)]
        with torch.no_grad():
            best = model.hf(input_ids=ids).logits[:, -1].argmax(-1)
        for row, token in zip(ids.tolist(), best.tolist(), strict=True):
            if token in ends:
                return row
    raise AssertionError("no such tokens were found")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:(lm_eval|datasets|evaluate|nltk|langdetect|dill).*")
def test_lm_evals_local_completions_scores_as_a_plain_forward_does(tiny_server, tiny_run, alone, quiet):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    how = {
        "tokenizer_backend": "huggingface",
        "tokenizer": str(tiny_run / "tiny"),
        "max_length": 256,
        "max_retries": 1,
    }
    lm = LocalCompletionsAPI(base_url=f"{tiny_server.v1}/completions", model="tiny", **how)
    # after the last of them the likeliest token is one that ends the answer: harnesses count on it being told all the same
    closing = alone.tokenizer.decode(ends_at_once(alone))
    texts = [("Who are you?", " yes"), ("Who are you?", " n"), ("The sea", "e"), (closing[:1], closing[1:])]
    found = lm.loglikelihood(
        [Instance("loglikelihood", {}, text, i) for i, text in enumerate(texts)], disable_tqdm=True
    )
    for (before, after), (value, is_greedy) in zip(texts, found, strict=True):
        first, last = (alone.tokenizer(text)["input_ids"] for text in (before, after))
        expected = scores(alone, first + last)[len(first) - 1 : -1]
        assert value == pytest.approx(float(expected[range(len(last)), last].sum()), abs=1e-4)
        assert is_greedy == (expected.argmax(-1).tolist() == last)
    asked_for = Instance("generate_until", {}, ("Who are you?", {"until": ["\n\n"], "max_gen_toks": 6}), 0)
    (text,) = lm.generate_until([asked_for], disable_tqdm=True)
    assert text == tiny_text(tiny_server, prompt="Who are you?", max_tokens=6)


def tiny_text(server, **body):
    answer = httpx.post(f"{server.v1}/completions", json={"model": "tiny", "temperature": 0, **body})
    return answer.json()["choices"][0]["text"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:(lm_eval|datasets|evaluate|nltk|langdetect|dill).*")
def test_lm_evals_local_chat_completions_writes_answers(client, tiny_server, quiet):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion

    lm = LocalChatCompletion(
        base_url=f"{tiny_server.v1}/chat/completions", model="tiny:held", num_concurrent=2, max_retries=1
    )
    questions = [
        lm.apply_chat_template([{"role": "user", "content": text}]) for text in ("Who are you?", "Why?")
    ]
    how = {"until": ["\n\n"], "max_gen_toks": 6}
    found = lm.generate_until(
        [Instance("generate_until", {}, (one, how), i) for i, one in enumerate(questions)], disable_tqdm=True
    )
    expected = [
        asked(client, [{"role": "user", "content": text}], model="tiny:held", max_tokens=6)
        .choices[0]
        .message.content
        for text in ("Who are you?", "Why?")
    ]
    assert found == expected
