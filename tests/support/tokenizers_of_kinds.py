"""Small tokenizers of every kind, made in memory from text of all Unicode blocks."""

import unicodedata
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>", "<|end|>")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = "the model don't say . it's you 've been , here ! who are you ? 1 2 3 \n naïve 日本語 ᏣᎳᎩ हिन्दी 👩‍👩‍👧 é \ufffd a "
SAMPLES = [
    WORDS,
    "Hello there, Assistant. I'm here; they're not 'quoted'. \ufffd 日本 \ufffd\ufffd",
    "ab abc abcd",
] * 40


@cache
def blocks():
    """The assigned characters of each 256 code points, without surrogates."""
    found = []
    for first in range(0, 0x110000, 256):
        characters = [chr(code) for code in range(first, first + 256)]
        characters = [one for one in characters if unicodedata.category(one) not in ("Cn", "Cs")]
        if characters:
            found.append("".join(characters))
    return found


def _fast(backend, **more):
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    backend.add_tokens([AddedToken("<tool>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", unk_token="<unk>", **more)


def byte_level():
    """GPT-2's kind. Its merges cross characters."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([*SAMPLES, *(block[:40] for block in blocks())], trainer)
    return _fast(backend)


def _sentencepiece(decoder, **more):
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", *BYTES], limit_alphabet=60, show_progress=False
    )
    backend.train_from_iterator(SAMPLES, trainer)
    backend.decoder = decoder
    return _fast(backend, **more)


def byte_fallback():
    """Llama 2's kind: one blank at the beginning is left out."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _sentencepiece(decoders.Sequence(steps))


def byte_fallback_without_strip():
    """Gemma's kind."""
    return _sentencepiece(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    )


def metaspace():
    """T5's and XGLM's kind, which cleans up."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(SAMPLES, trainer)
    return _fast(backend, clean_up_tokenization_spaces=True)


def word_piece(**more):
    """BERT's kind."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=not more)
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator(SAMPLES, trainer)
    return _fast(backend, **more)


def word_piece_with_clean_up():
    """The same, cleaned up by `transformers` as the whole text."""
    return word_piece(clean_up_tokenization_spaces=True)


def word_ends():
    """GPT-1's kind, whose tokens say where a word ends."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    backend.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(SAMPLES, trainer)
    return _fast(backend)


def no_decoder():
    """Words alone, joined by blanks."""
    words = sorted({word for sample in SAMPLES for word in sample.split()})
    vocabulary = {word: i for i, word in enumerate(["<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _fast(backend)


KINDS = (
    byte_level,
    byte_fallback,
    byte_fallback_without_strip,
    metaspace,
    word_piece,
    word_piece_with_clean_up,
    word_ends,
    no_decoder,
)
