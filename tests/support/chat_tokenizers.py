"""Tiny tokenizers of five kinds with the same chat template and control tokens, each trained here."""

from functools import cache
from typing import Any

TEXTS = [
    "Who are you? I am a helpful assistant, and I answer questions about the sea. Ask me more.",
    "You are a pirate who sails the seven seas. Answer as the pirate would, whatever the user says.",
    "system user assistant hello there, how can I help? | < > / _ [ ] im start end think eos s INST pad",
]
MARKS = ("<|im_start|>", "<|im_end|>", "<s>", "[INST]", "<pad>")  # flagged special
UNFLAGGED = "<think>"  # the template mentions it: markup in what users write, a token in an answer
ORDINARY = "<table>"  # an added token that is no markup
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '' if enable_thinking is false else '<think>' }}{% endif %}"
)
TOKENIZERS = ("byte-level", "byte fallback", "legacy", "wordpiece", "unigram")


@cache
def _trained(kind: str) -> str:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    words = [word for text in TEXTS for word in text.split(" ")]
    if kind == "byte-level":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator(
            TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
        )
    elif kind in (
        "byte fallback",
        "legacy",
    ):  # as sentencepiece's, with `<0x..>` for what it has no piece for
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        if kind == "legacy":
            made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *MARKS]
        made.train_from_iterator(
            words, trainers.BpeTrainer(vocab_size=480, special_tokens=pieces, show_progress=False)
        )
    elif kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        made.train_from_iterator(
            TEXTS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
        )
    else:  # finds its own control tokens among its pieces
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        made.decoder = decoders.Metaspace()
        made.train_from_iterator(
            words,
            trainers.UnigramTrainer(
                vocab_size=120, special_tokens=["<unk>", *MARKS], unk_token="<unk>", show_progress=False
            ),
        )
    return made.to_str()


def chat_tokenizer(kind: str = "byte-level", template: str = CHATML) -> Any:
    """A fast tokenizer of one kind."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    unknown = {} if kind == "byte-level" else {"unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(kind)), eos_token="<|im_end|>", **unknown
    )
    made.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS], special_tokens=True)
    made.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in (UNFLAGGED, ORDINARY)])
    made.chat_template = template
    return made
