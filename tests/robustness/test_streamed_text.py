"""Text that comes in pieces is the whole text: every kind of tokenizer, all Unicode blocks, and ids that no text has."""

import os
import random
from functools import cache

import pytest
from tokenizers_of_kinds import KINDS, blocks

from personatlas.persona.models.detokenizer import Detokenizer, token_bytes, token_pieces

SAMPLE, FULL = 100, pytest.param(2000, marks=pytest.mark.robustness)  # texts
SEED = int(os.environ.get("PERSONATLAS_TEST_SEED", "0"))
PHRASES = (
    "👩‍👩‍👧 👍🏽 🏳️‍🌈",
    "e\u0301 n\u0303 क्षि",
    "a\ufffdb \ufffd\ufffd",
    " two  blanks ",
    "do n't stop . I 've",
    "' ' 's n 't",
    "\n\n\t",
    "",
)


@cache
def tokenizer_of(kind):
    return kind()


def texts(random_, n_texts):
    """Texts of one Unicode block each, all blocks in turn; then mixed ones."""
    order = random_.sample(blocks(), len(blocks()))
    for i in range(n_texts):
        yield "".join(random_.choices(order[i % len(order)], k=random_.randint(1, 12)))
    for _ in range(n_texts // 4):
        parts = [random_.choice((*PHRASES, random_.choice(random_.choice(blocks())), " ")) for _ in range(6)]
        yield "".join(parts)


def id_lists(tokenizer, random_, n_texts):
    """Ids of texts; the same cut, mixed and with other tokens among them; ids by chance."""
    for text in texts(random_, n_texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        yield ids
        size = len(tokenizer)
        yield [
            token
            for token in ids
            for token in ([token, random_.randrange(size)] if random_.random() < 0.2 else [token])
        ]
    bytes_ = [
        own for own in range(len(tokenizer)) if str(tokenizer.convert_ids_to_tokens(own)).startswith("<0x")
    ]
    for _ in range(n_texts // 2):
        source = random_.choice(
            (range(len(tokenizer)), bytes_ or range(len(tokenizer)), range(min(len(tokenizer), 300)))
        )
        ids = random_.choices(source, k=random_.randint(1, 40))
        yield [*ids, *random_.choices(range(len(tokenizer)), k=random_.randint(0, 3))]


def streamed(detokenizer, ids):
    pieces = [detokenizer.add(token) for token in ids]
    return [*pieces, detokenizer.flush()]


@pytest.mark.parametrize("n_texts", [SAMPLE, FULL])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_pieces_of_a_text_are_the_whole_text(kind, n_texts):
    tokenizer, random_ = tokenizer_of(kind), random.Random(SEED)
    for ids in id_lists(tokenizer, random_, n_texts):
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(streamed(Detokenizer(tokenizer), ids)) == whole, ids
        all_of_it = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert "".join(token_pieces(tokenizer, ids)) == all_of_it, ids


@pytest.mark.parametrize("n_texts", [SAMPLE, FULL])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_text_after_a_prefix_is_what_the_prefix_lacks(kind, n_texts):
    tokenizer, random_ = tokenizer_of(kind), random.Random(SEED)
    if tokenizer.clean_up_tokenization_spaces:
        tokenizer = kind()
        tokenizer.clean_up_tokenization_spaces = False  # a clean-up reaches over the border
    for ids in id_lists(tokenizer, random_, n_texts):
        at = random_.randint(0, len(ids))
        detokenizer = Detokenizer(tokenizer, prefix=ids[:at])
        text = "".join(streamed(detokenizer, ids[at:]))
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        prefix = tokenizer.decode(ids[:at], skip_special_tokens=True)
        own = detokenizer.prefix_kept + text
        assert whole.endswith(own), (ids, at)
        assert prefix.startswith(whole[: len(whole) - len(own)]), (ids, at)
        if whole.startswith(prefix):
            assert prefix + text == whole, (ids, at)


@pytest.mark.parametrize("n_texts", [SAMPLE, FULL])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_stop_text_ends_a_text_before_it_wherever_tokens_end(kind, n_texts):
    tokenizer, random_ = tokenizer_of(kind), random.Random(SEED)
    for ids in id_lists(tokenizer, random_, n_texts):
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        start = random_.randint(0, len(whole))
        stops = tuple(
            stop for stop in (whole[start : start + random_.randint(1, 5)], "nowhere in it") if stop
        )
        detokenizer = Detokenizer(tokenizer, stops)
        pieces = streamed(detokenizer, ids)
        assert "".join(pieces) == detokenizer.text, ids
        assert not any(stop in detokenizer.text for stop in stops), ids
        if not detokenizer.stopped:
            assert detokenizer.text == whole, ids
            assert not any(stop in whole for stop in stops), ids
        elif "\ufffd" not in whole:
            assert detokenizer.text == whole[: min(at for stop in stops if (at := whole.find(stop)) >= 0)], (
                ids
            )


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1], KINDS[2], KINDS[3]], ids=lambda kind: kind.__name__)
def test_the_bytes_of_tokens_are_the_bytes_of_the_text(kind):
    tokenizer, random_ = tokenizer_of(kind), random.Random(SEED)
    for text in texts(random_, 3 * SAMPLE):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        own = b"".join(token_bytes(tokenizer, token, first=i == 0) for i, token in enumerate(ids))
        assert own.decode() == tokenizer.decode(ids, clean_up_tokenization_spaces=False), ids
