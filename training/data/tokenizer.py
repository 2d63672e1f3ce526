"""A byte-level BPE of one's own: trained, checked on held-out text, saved as any Hugging Face tokenizer is.

    make_tokenizer(corpus, Path("tokenizer"), vocabulary=32_768)
    AutoTokenizer.from_pretrained("tokenizer")           # its chat template marks the assistant's tokens
    load_corpus_tokenizer(Path("tokenizer")).encode(text)          # markup in a text is text, never a token

Training is Hugging Face's Rust trainer, fed piece by piece. `PATTERN` parts text into words first, and no
token crosses two words. It parts any text as Llama 3's does (200,000 random strings agreed), a word that is a
token is that token (`ignore_merges`), and a text by itself starts with <|bos|>: what llama.cpp knows by the
name `llama-bpe`, so a GGUF of our models needs no new code there, only that name.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from personatlas.analysis.stats import ratio_interval
from personatlas.persona.artifacts import atomic_folder, digest, locked, make_folder, read_object, write_json
from personatlas.persona.errors import UserError
from personatlas.persona.progress import say
from personatlas.persona.records import JsonObject
from personatlas.training.data.corpus import Corpus
from personatlas.training.data.documents import Piece

Item = TypeVar("Item")
BOS, START, END, PAD = "<|bos|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL = (BOS, START, END, PAD)  # ids 0 to 3
BYTES = 256
DEFAULT_VOCABULARY, MAX_VOCABULARY = 32_768, 1 << 20
# Bytes of text for each token of a derived vocabulary: a token that is met a few times is not learned
BYTES_FOR_TOKEN = 512
SAMPLE = 1_000_000_000  # bytes; counts of words hardly change after that
CHECKED = 1 << 26  # bytes of held-out text that are read back
# Characters without a blank after which the trainer is given a new text: its time grows with the square of
# a word's length (1 MB of letters: 20 s for 140 merges). No token that is worth having is longer.
WORD = 256
# Characters of such text that it is given at most: every distinct word is kept, at 80 bytes a character
WORDLESS = 1 << 25
ENCODED_AT_ONCE = 64  # pieces, over all cores

# Alternatives are tried from left to right.
PATTERN = "|".join(
    (
        r"'(?i:[sdmt]|ll|re|ve)",  # the end of he's, I'd, we'll
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # letters, with the blank or the one sign before them
        r"\p{N}{1,3}",  # digits by three: longer numbers would fill the vocabulary with themselves
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # signs, with the blank before and the line's end after them
        r"\s*[\r\n]+",  # ends of lines, with the blanks that lead to them
        r"\s+(?!\S)",  # blanks but for the last one, which belongs to the word that follows
        r"\s+",
    )
)

# Marks what chat tuning learns: the assistant's words and their end.
TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
        {{- '\\n' }}
    {%- elif message['role'] in ('system', 'user') %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- raise_exception('the roles are system, user and assistant, not ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@dataclass(frozen=True)
class Compression:
    """Bytes per token of held-out texts, every one of which was decoded exactly."""

    documents: int
    bytes: int
    tokens: int
    bytes_per_token: float
    interval: tuple[float, float] | None
    "95%, documents drawn again; None for a single document"


def make_tokenizer(
    corpus: Corpus, out: Path, *, vocabulary: int | None = None, sample: int = SAMPLE, quiet: bool = False
) -> JsonObject:
    """Trains, checks and saves a tokenizer; one of the same corpus and settings in `out` is taken as it is.

    Without a `vocabulary` it is `vocabulary_for` the text, or as many tokens as that has pairs for. Returns
    the record, `training.json`. Raises `UserError` for a vocabulary that the corpus cannot fill and
    for a folder that holds something else.
    """
    if vocabulary is not None:
        require_vocabulary(vocabulary)
    if sample < 1:
        raise UserError(f"--sample {sample}: give how many bytes of text to train on, 1 or more")
    settings: JsonObject = {"corpus": corpus.digest, "sample": sample}
    settings |= {} if vocabulary is None else {"vocabulary": vocabulary}
    make_folder(out.absolute().parent, "--out")
    with locked(out):
        if (known := _finished_record(out, settings)) is not None:
            return known
        scan = corpus.scan(quiet=quiet)
        if not quiet:
            say(f"training on {min(sample, scan.train.bytes) / 1e6:,.1f} of {scan.train.bytes / 1e6:,.1f} MB")
        left_out: Counter[str] = Counter()
        size = vocabulary_for(scan.train.bytes) if vocabulary is None else vocabulary
        tokenizer = train_tokenizer(corpus.sample(scan, sample), size, left_out, at_most=vocabulary is None)
        settings["vocabulary"] = tokenizer.get_vocab_size()
        if left_out and not quiet:
            count = f"{left_out['characters']:,} characters"
            say(f"note: {count} in stretches of {WORD} without a blank were not trained on")
        held_out = asdict(compression(tokenizer, corpus.pieces("held-out"), corpus.unit))
        facts = {"asked": settings, "scan": scan.to_json(), "left_out": dict(left_out), "held_out": held_out}
        return _save(tokenizer, out, facts)


def vocabulary_for(size: int) -> int:
    """Tokens of a vocabulary for so many bytes of text: a power of two, 512 to 32,768."""
    return min(DEFAULT_VOCABULARY, max(512, 1 << max(0, (size // BYTES_FOR_TOKEN).bit_length() - 1)))


def require_vocabulary(vocabulary: int) -> None:
    """Raises `UserError` unless the bytes, the special tokens and at least one merge fit."""
    least = BYTES + len(SPECIAL) + 1
    if not least <= vocabulary <= MAX_VOCABULARY:
        raise UserError(
            f"--vocabulary {vocabulary} is not in {least}..{MAX_VOCABULARY}: "
            f"{BYTES} bytes and {len(SPECIAL)} special tokens are always in it"
        )


def train_tokenizer(
    texts: Iterable[str], vocabulary: int, left_out: Counter[str] | None = None, *, at_most: bool = False
) -> Tokenizer:
    """A byte-level BPE with exactly `vocabulary` tokens. Raises `UserError` if the texts do not have so many,
    unless `at_most` is set.

    `left_out` counts what `short_words` leaves out.
    """
    left_out = Counter() if left_out is None else left_out
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    words = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    single_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, single_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,  # a pair that is met once is not worth a token
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.encode_special_tokens = True
    tokenizer.train_from_iterator(chunked(short_words(texts, left_out), ENCODED_AT_ONCE), trainer)
    size = tokenizer.get_vocab_size()
    if size < vocabulary and not at_most:
        raise UserError(
            f"the training text has pairs for {size} tokens only, not for {vocabulary}; "
            f"give --vocabulary {size} or more text"
        )
    # A text that is tokenised by itself starts a document; chat templates write the mark themselves.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, SPECIAL.index(BOS))]
    )
    return tokenizer


def short_words(texts: Iterable[str], left_out: Counter[str], most: int = WORDLESS) -> Iterator[str]:
    """The texts, cut after `WORD` characters without a blank (counted from multiples of `WORD`).

    `most` characters of such stretches are given; the rest is left out and counted, as "characters".
    """
    for text in texts:
        start = 0
        for stop in range(WORD, len(text), WORD):
            block = text[stop - WORD : stop]
            if " " in block or any(map(str.isspace, block)):
                continue
            if most >= WORD:
                yield text[start:stop]
                most -= WORD
            else:
                yield text[start : stop - WORD]
                left_out["characters"] += WORD
            start = stop
        yield text[start:]


def compression(
    tokenizer: Tokenizer, pieces: Iterable[Piece], unit: Callable[[Piece], str], most: int = CHECKED
) -> Compression:
    """Bytes per token over pieces, up to `most` bytes; `unit` names a piece's document.

    Raises `UserError` if a piece is not decoded exactly.
    """
    sizes: dict[str, list[int]] = {}  # of each document: bytes, tokens
    read = 0
    for chunk in chunked(pieces, ENCODED_AT_ONCE):
        encoded = encode(tokenizer, [piece.text for piece in chunk])
        decoded = tokenizer.decode_batch(encoded, skip_special_tokens=False)
        for piece, ids, back in zip(chunk, encoded, decoded, strict=True):
            if back != piece.text:
                pairs = enumerate(zip(piece.text, back, strict=False))
                at = next((i for i, (a, b) in pairs if a != b), min(len(piece.text), len(back)))
                raise UserError(
                    f"the tokenizer does not give back {piece.document} (piece {piece.number}): at character "
                    f"{at} {piece.text[at : at + 20]!r} became {back[at : at + 20]!r}; it cannot be used"
                )
            size = sizes.setdefault(unit(piece), [0, 0])
            size[0] += len(piece.text.encode())
            size[1] += len(ids)
            read += len(piece.text.encode())
        if read >= most:
            break
    if not read:
        raise UserError("there is no held-out text to check the tokenizer on")
    table = np.array(list(sizes.values()))  # (documents, 2)
    total = table.sum(0)
    byte_counts, token_counts = table.T.astype(float)
    found, interval = ratio_interval(byte_counts, token_counts), None
    if found.low is not None and found.high is not None:
        interval = (round(found.low, 4), round(found.high, 4))
    return Compression(len(table), int(total[0]), int(total[1]), round(found.value, 4), interval)


def chunked(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size`, the last one shorter."""
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of texts, without the document's mark; over all cores."""
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def load_corpus_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer for corpora, in which markup such as <|im_end|> is text. Raises `UserError` for others."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} has no tokenizer.json; make it with `personatlas train tokenizer`")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 (the Rust side raises Exception itself)
        raise UserError(f"{path} cannot be read: {error}") from None
    if tokenizer.token_to_id(BOS) is None:
        raise UserError(f"{path} has no token {BOS}; use one of `personatlas train tokenizer`")
    ids = set(tokenizer.get_vocab(with_added_tokens=True).values())
    if gaps := sorted(set(range(max(ids))) - ids):
        raise UserError(f"{path} has no token with id {gaps[0]}, but ids up to {max(ids)}; make it again")
    tokenizer.encode_special_tokens = True
    return tokenizer


def token_sizes(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes of text each id stands for, (V,) int64; 0 for the special tokens."""
    special = tokenizer.get_added_tokens_decoder()
    names = [tokenizer.id_to_token(id) for id in range(tokenizer.get_vocab_size())]
    # in the vocabulary a byte is one printable character
    lengths = [0 if id in special else len(name or "") for id, name in enumerate(names)]
    return np.array(lengths, dtype=np.int64)


def _finished_record(out: Path, settings: JsonObject) -> JsonObject | None:
    """The record of a tokenizer in `out`; `UserError` for one of other settings and for anything else."""
    record_path, path = out / "training.json", out / "tokenizer.json"
    if not record_path.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out} is there and was not made here; choose another folder")
        return None
    record = read_object(record_path)
    if record.get("kind") != "tokenizer" or not isinstance(record.get("asked", {}), dict):
        raise UserError(f"{record_path} is not the record of a tokenizer; choose another --out")
    before = record.get("asked") or {}
    changed = [name for name, value in settings.items() if before.get(name) != value]
    if changed:
        raise UserError(f"--out {out} has a tokenizer of another {' and '.join(changed)}; choose another")
    if not path.is_file() or digest(path) != record.get("sha256"):
        raise UserError(f"{path} is not the one of training.json: damaged or replaced; remove the folder")
    return record


def _save(tokenizer: Tokenizer, out: Path, facts: JsonObject) -> JsonObject:
    """Writes the whole folder at once, beside its final path, and renames it."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    text = tokenizer.to_str(pretty=True)
    record = {
        "kind": "tokenizer",
        "format": 1,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "special": {name: id for id, name in enumerate(SPECIAL)},
        "tokenizers": version("tokenizers"),
        **json.loads(json.dumps(facts)),  # as it will be read back
    }
    with atomic_folder(out) as temporary:
        (temporary / "tokenizer.json").write_text(text, encoding="utf-8")
        (temporary / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
        write_json(temporary / "tokenizer_config.json", config)
        write_json(temporary / "training.json", record)
    return record
