"""How long a corpus takes from files to batches, and how well the tokenizer compresses text that it has not seen.

    python benchmarks/corpus.py PATH --held-out PATH --out FOLDER [--vocabulary 32768] [--sample BYTES] [--only-held-out]

Prints seconds of each step, bytes per token with its interval and n, and tokens/s of encoding and of drawing batches.
`--only-held-out` tokenises the held-out texts alone: enough for a rate.
"""

import argparse
import resource
import time
from pathlib import Path

from personatlas.training.data.batches import CorpusBatches
from personatlas.training.data.corpus import Corpus
from personatlas.training.data.token_shards import make_tokens
from personatlas.training.data.tokenizer import SAMPLE, make_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--sample", type=int, default=SAMPLE)
    parser.add_argument("--only-held-out", action="store_true")
    arguments = parser.parse_args()
    corpus = Corpus.open(arguments.corpus, held_out=arguments.held_out)
    start = time.perf_counter()
    record = make_tokenizer(
        corpus, arguments.out / "tokenizer", vocabulary=arguments.vocabulary, sample=arguments.sample
    )
    print(f"tokenizer: {time.perf_counter() - start:.1f} s, scanning, training and checking")
    print(record["scan"])
    print(record["held_out"])
    if arguments.only_held_out:
        corpus = Corpus.open(arguments.held_out, held_share=0.5)
    start = time.perf_counter()
    tokens = make_tokens(corpus, arguments.out / "tokenizer", arguments.out / "tokens")
    seconds = time.perf_counter() - start
    total = len(tokens.train) + len(tokens.held_out)
    print(f"tokens: {total:,} in {seconds:.1f} s, {total / seconds:,.0f} tokens/s")
    batches = CorpusBatches(tokens.train, context=2048, rows=32)
    start = time.perf_counter()
    for step in range(50):
        batches.rows_at(step, 0, 32)
    print(f"batches: {50 * 32 * 2048 / (time.perf_counter() - start):,.0f} tokens/s")
    print(f"most memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10:,} MiB")


if __name__ == "__main__":
    main()
