"""Chat formats over sixteen template families and five kinds of tokenizer, all built here."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from personatlas.persona.errors import UserError
from personatlas.persona.models.chat_template import ChatFormat, chat_format

SENTENCES = [
    "Who are you? I am a helpful assistant, and I answer questions about the sea.\n\nAsk me more.\n",
    "You are a pirate who sails the seven seas. Answer as the pirate would, whatever the user says.",
    "<|user|>\nhello there\n<|assistant|>\nHello! How can I help?\nsystem user assistant model [INST] [/INST]",
    "  indented text\n    and more  of it\n\n\nthe end ...\n<<SYS>>\nBe brief.\n<</SYS>>\n\n",
]


@dataclass(frozen=True)
class Family:
    """A template file and what its format must be found to be."""

    name: str
    specials: tuple[str, ...]
    bos: str | None
    eos: str
    end: str
    system: str = "native"
    injected: str | None = None
    prompt_is_prefix: bool = True
    trims: tuple[str, ...] = ()
    swallows: bool = False  # its marks swallow the whitespace after them
    blank: bool = False  # the template writes a blank before an answer

    @property
    def template(self) -> str:
        return (Path(__file__).parents[2] / "templates" / f"{self.name}.jinja").read_text(encoding="utf-8")


IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
INST = ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
LLAMA3 = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
PHI3 = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
R1 = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
)
GRANITE = ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>")
COHERE = (
    "<BOS_TOKEN>",
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
)
BOTH, ALL = ("user", "assistant"), ("system", "user", "assistant")
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024"

FAMILIES = {
    family.name: family
    for family in (
        Family("chatml", IM, None, IM[1], IM[1], injected="You are a small and helpful assistant."),
        Family("qwen3", (*IM, "<think>", "</think>"), None, IM[1], IM[1]),
        Family("llama2", INST[:2], "<s>", "</s>", "</s>", trims=BOTH, blank=True),
        Family("llama3", LLAMA3, LLAMA3[0], LLAMA3[1], LLAMA3[1], injected=DATES, trims=ALL),
        Family(
            "mistral_v03", INST[:4], "<s>", "</s>", "</s>", system="merged", trims=("assistant",), blank=True
        ),
        Family(
            "mistral_v7", INST, "<s>", "</s>", "</s>", injected="You are Mistral, an assistant made in Paris."
        ),
        Family("gemma2", GEMMA, "<bos>", "<eos>", GEMMA[3], system="merged", trims=BOTH),
        Family("gemma3", GEMMA, "<bos>", "<eos>", GEMMA[3], trims=BOTH),
        Family("phi3", PHI3, None, PHI3[0], "<|end|>", swallows=True),
        Family("phi4", (*IM, "<|im_sep|>"), None, IM[2], IM[1]),
        Family("zephyr", INST[:2], "<s>", "</s>", "</s>"),
        Family("olmo2", IM[2:], IM[2], IM[2], IM[2]),
        Family("deepseek_r1", R1, R1[0], R1[1], R1[1], prompt_is_prefix=False),
        Family(
            "granite",
            GRANITE,
            None,
            GRANITE[2],
            GRANITE[2],
            injected="Knowledge Cutoff Date: April 2024.\nYou are Granite, an assistant.",
        ),
        Family("command_r", COHERE, COHERE[0], COHERE[2], COHERE[2], trims=BOTH),
        Family("generation", IM, None, IM[1], IM[1]),
    )
}

# A newer byte-level pre-tokenizer: newlines stick to the punctuation before them, so tokens cross content boundaries.
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def _trained(kind: str) -> str:
    """A tokenizer of one kind, trained on `SENTENCES`, as JSON."""
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "metaspace":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        bytes_ = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=bytes_, show_progress=False)
        lines = [
            line for sentence in SENTENCES for line in sentence.splitlines()
        ]  # sentencepiece keeps newlines apart
        tokenizer.train_from_iterator(lines, trainer)
        return tokenizer.to_str()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "cl100k":
        split = pre_tokenizers.Split(Regex(CL100K), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    if kind == "trimmed":
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if kind == "lower":
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


KINDS = ("bytes", "cl100k", "trimmed", "metaspace", "lower")


@cache
def tokenizer_of(name: str, kind: str = "cl100k") -> Any:
    """A fast tokenizer with a family's special tokens and template."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    named = {"eos_token": family.eos, **({"bos_token": family.bos} if family.bos else {})}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_trained(kind)), **named)
    marks = [AddedToken(s, special=True, normalized=False, rstrip=family.swallows) for s in family.specials]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.chat_template = family.template
    return tokenizer


def messages_of(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant in turn, after a system message if there is one."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def test_probing_finds_what_each_family_does_with_a_system_message(family: Family) -> None:
    format = chat_format(tokenizer_of(family.name))
    assert format.system == family.system
    assert format.injected == family.injected
    assert format.prompt_is_prefix == family.prompt_is_prefix


def test_the_end_of_an_answer_is_the_token_after_it_the_eos_and_the_generation_config(family: Family) -> None:
    tokenizer = tokenizer_of(family.name)
    ends = {tokenizer.convert_tokens_to_ids(family.end), tokenizer.eos_token_id}
    assert chat_format(tokenizer).end_ids == ends
    assert chat_format(tokenizer, 7).end_ids == ends | {7}
    assert chat_format(tokenizer, [7, 9]).end_ids == ends | {7, 9}


def test_the_ids_are_those_of_the_text_with_at_most_one_bos(family: Family) -> None:
    tokenizer = tokenizer_of(family.name)
    format = chat_format(tokenizer)
    messages = messages_of("Who are you?", system="You are a pirate.")
    ids = format.prompt_ids(messages)
    assert ids == tokenizer(format.prompt_text(messages), add_special_tokens=False)["input_ids"]
    if family.bos and "bos_token" in family.template:  # Zephyr's names none
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id


def test_a_tokenizer_that_adds_a_bos_by_itself_does_not_double_the_templates() -> None:
    from tokenizers import processors

    tokenizer = tokenizer_of("llama3")
    bos = ("<|begin_of_text|>", tokenizer.bos_token_id)
    doubling = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token=bos[0],
    )
    doubling.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    doubling.chat_template = tokenizer.chat_template
    assert doubling("hi")["input_ids"].count(bos[1]) == 1
    assert chat_format(doubling).prompt_ids(messages_of("Who?")).count(bos[1]) == 1


def test_a_system_text_reaches_every_prompt_whether_native_or_merged(family: Family) -> None:
    format = chat_format(tokenizer_of(family.name))
    for turns in (["Who?"], ["Who?", "Me.", "Why?"]):
        text = format.prompt_text(messages_of(*turns, system="You are a pirate."))
        assert text.count("You are a pirate.") == 1
        assert text.index("You are a pirate.") < text.index("Who?")


def test_a_merged_system_text_stands_before_the_first_user_message_with_a_blank_line_between() -> None:
    format = chat_format(tokenizer_of("gemma2"))
    text = format.prompt_text(messages_of("Who?", "Me.", "Why?", system="You are a pirate."))
    assert "<start_of_turn>user\nYou are a pirate.\n\nWho?<end_of_turn>" in text
    assert format.prompt_text(messages_of("Who?", system="")) == format.prompt_text(messages_of("Who?"))


def test_thinking_is_switched_off_where_the_template_has_a_switch() -> None:
    text = chat_format(tokenizer_of("qwen3")).prompt_text(messages_of("Who?"))
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_an_end_token_without_its_special_flag_is_found() -> None:
    tokenizer = tokenizer_of("chatml")
    own = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer.from_str(_trained("bytes")))
    own.add_tokens(["<|im_start|>", "<|im_end|>"])
    own.chat_template = tokenizer.chat_template
    assert chat_format(own).end_ids == {own.convert_tokens_to_ids("<|im_end|>")}


def test_a_tokenizer_without_a_template_is_told_which_option_helps() -> None:
    tokenizer = tokenizer_of("chatml", "bytes")
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match=r"no chat template; pass --chat-template FILE\.jinja"):
        chat_format(bare)


def test_several_templates_without_a_default_are_told_the_same_option() -> None:
    tokenizer = tokenizer_of("chatml", "bytes")
    several = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    several.chat_template = {"rag": "a", "tool_use": "b"}
    with pytest.raises(UserError, match=r"several chat templates and no default; pass --chat-template"):
        chat_format(several)


@pytest.mark.parametrize(
    "template",
    [
        "{% for turn in messages %}",
        "{{ raise_exception('never\nmind') }}",
        "{{ 1 + 'one' }}",
        "{{ nothing.at.all }}",
    ],
)
def test_a_broken_template_is_one_line(template: str) -> None:
    tokenizer = tokenizer_of("chatml", "bytes")
    broken = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    broken.chat_template = template
    with pytest.raises(UserError, match="the chat template refuses") as caught:
        chat_format(broken)
    assert "\n" not in str(caught.value)


def test_roles_that_do_not_alternate_are_refused_with_the_templates_own_reason() -> None:
    format = chat_format(tokenizer_of("llama2"))
    with pytest.raises(UserError, match=r"refuses the messages \(user, user\): .*must alternate"):
        format.prompt_ids([{"role": "user", "content": "one"}, {"role": "user", "content": "two"}])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "without messages"),
        ([{"role": "user"}], "must have role and content"),
        ([{"role": "user", "content": "hi", "name": "Jo"}], "'name'"),
        ([{"role": "user", "content": [{"text": "hi"}]}], "is a list"),
        ([{"role": "human", "content": "hi"}], "'human'"),
        ([{"role": "user", "content": "\ud800"}], "not valid Unicode"),
    ],
)
def test_malformed_messages_are_named(messages: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        chat_format(tokenizer_of("chatml")).prompt_ids(messages)


def test_a_format_without_a_system_role_refuses_what_it_would_have_to_drop() -> None:
    format = chat_format(tokenizer_of("gemma2"))
    system = {"role": "system", "content": "You are a pirate."}
    with pytest.raises(UserError, match="no user message"):
        format.prompt_ids([system])
    with pytest.raises(UserError, match="only the first message"):
        format.prompt_ids([*messages_of("Who?", "Me."), system, *messages_of("Why?")])


def test_a_template_that_drops_the_system_message_silently_is_merged() -> None:
    tokenizer = tokenizer_of("chatml", "bytes")
    silent = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    silent.chat_template = (
        "{% for m in messages if m.role != 'system' %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}"
    )
    format: ChatFormat = chat_format(silent)
    assert format.system == "merged"
    assert format.prompt_text(messages_of("Who?", system="Be brief.")) == "user: Be brief.\n\nWho?\n"
