"""What an intervention costs a model that does nothing wrong: loss and KL on its own everyday answers, bits
per byte of a text.

    capability = measure_capability(bench, suites, answers, arms, EvalOptions(text=Path("book.txt")), study)
    capability.benign["assistant"].more_loss             # teacher-forced on the baseline's answers
    capability.text.arms["assistant"].bits_per_byte      # nats / ln 2 / bytes, windows of 512 tokens

Coherence is measured on what each arm wrote: distinct n-grams, loops, and the loss of its answers under the
baseline, where nonsense is dear and a loop is cheap, so that one of the two shows.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Interventions, interventions_digest
from personatlas.persona.logs import ResultCache
from personatlas.persona.models.control_tokens import TextEncoder
from personatlas.persona.models.load import Model
from personatlas.persona.progress import Study, progress
from personatlas.persona.records import Count, Ends, FractionOrNaN, JsonRecord, NonNegative, NonNegativeOrNaN
from personatlas.persona.rollout import Rollout
from personatlas.steering.arms import distinct_ngrams
from personatlas.steering.conversations.runner import TurnRecord
from personatlas.steering.evals.answers import Answers, Bench, answer_rollout
from personatlas.steering.evals.harnesses.lm_eval_result import LmEvalResult
from personatlas.steering.evals.options import EvalOptions
from personatlas.steering.evals.suites import Suite
from personatlas.steering.loss_cost import Cost, benign_costs
from personatlas.steering.teacher_forcing import CPU_LOGIT_TOKENS, GPU_LOGIT_TOKENS, text_batches

BENIGN_LOSS, OWN_LOSS, TEXT_LOSS = "loss on everyday answers", "loss of the arms' answers", "bits per byte"
WINDOW = 512  # tokens of a text that are read together
LOOP = 4  # an answer loops when a run of so many tokens stands in it so often


@dataclass(frozen=True)
class BenignCost(JsonRecord):
    """Cost on texts: relative loss increase with its interval, loss and KL per token (nats), share of tokens
    that fired."""

    more_loss: float
    more_loss_interval: Ends
    loss: NonNegative
    kl: float
    fired: FractionOrNaN
    texts: Count
    tokens: Count


@dataclass(frozen=True)
class OwnLoss(JsonRecord):
    """Loss per token of an arm's own answers under the baseline, with its standard error; None without any
    token."""

    loss: NonNegative | None
    error: NonNegativeOrNaN | None


@dataclass(frozen=True)
class TextCost(JsonRecord):
    """Bits per byte of the text in one arm, and the cost; the baseline has none."""

    omit_none = ("more_loss", "more_loss_interval", "loss", "kl", "fired", "texts", "tokens")
    bits_per_byte: NonNegative
    more_loss: float | None = None
    more_loss_interval: Ends | None = None
    loss: NonNegative | None = None
    kl: float | None = None
    fired: FractionOrNaN | None = None
    texts: Count | None = None
    tokens: Count | None = None


@dataclass(frozen=True)
class TextCosts(JsonRecord):
    """A text's file name, the number of bytes that are predicted, and its costs by arm."""

    file: str
    bytes: Count
    arms: dict[str, TextCost]


@dataclass(frozen=True)
class Capability(JsonRecord):
    """Costs by arm, each None where it was not measured; `tasks` are those of lm-eval, without their
    samples."""

    omit_none = ("benign", "own_loss", "text", "tasks")
    benign: dict[str, BenignCost] | None = None
    own_loss: dict[str, OwnLoss] | None = None
    text: TextCosts | None = None
    tasks: LmEvalResult | None = None


def measure_capability(
    bench: Bench,
    suites: Iterable[Suite],
    answers: Mapping[str, Answers],
    arms: Mapping[str, Interventions],
    options: EvalOptions,
    study: Study,
) -> Capability:
    """Measures loss and KL on the answers of the suite benign, the loss of what each arm wrote there, and
    bits per byte of a text. What was read once is kept in capability.jsonl."""
    baseline = next(name for name, plan in arms.items() if not plan)
    acting = {name: plan for name, plan in arms.items() if plan}
    benign, own_loss, text_costs = None, None, None
    for suite in suites:
        if suite.name == "benign":
            own = answers[suite.name]
            texts = [answer_rollout(own[baseline, case.key, 0]) for case in suite.cases]
            texts = [one for one in texts if one.answer_ids]
            study.start(BENIGN_LOSS)
            costs = _read_costs(bench, texts, acting)
            benign = {name: _benign_cost(cost) for name, cost in costs.items()}
            study.start(OWN_LOSS)
            own_loss = {}
            with progress(OWN_LOSS, len(arms)) as advance:
                for name in arms:
                    answered = [own[name, case.key, 0] for case in suite.cases]
                    own_loss[name] = own_losses(bench.model, answered)
                    advance(1, note=f"arm {name}")
    if options.text is not None and acting:
        windows, n_bytes = text_windows(bench.model, options.text, options.text_bytes)
        study.start(TEXT_LOSS)
        costs = _read_costs(bench, windows, acting)
        before = float(next(iter(costs.values())).before.sum()) / math.log(2) / n_bytes
        rows = {baseline: TextCost(before)}
        for name, cost in costs.items():
            after = float(cost.after.sum()) / math.log(2) / n_bytes
            rows[name] = TextCost(after, **vars(_benign_cost(cost)))
        text_costs = TextCosts(options.text.name, n_bytes, rows)
    return Capability(benign, own_loss, text_costs)


def _benign_cost(cost: Cost) -> BenignCost:
    fired, counts = float(cost.fired.mean()), (len(cost.tokens), int(cost.tokens.sum()))
    return BenignCost(cost.more, cost.more_interval, cost.loss, cost.kl, fired, *counts)


def _read_costs(bench: Bench, texts: Sequence[Rollout], arms: Mapping[str, Interventions]) -> dict[str, Cost]:
    """The costs of all arms on the texts, those that were read before from the log."""
    content = json.dumps([[text.prompt_ids, text.answer_ids] for text in texts])
    sha = hashlib.sha256(content.encode()).hexdigest()[:16]
    keys = {name: f"{sha}-{interventions_digest(plan)}" for name, plan in arms.items()}
    cache = ResultCache(bench.folder / "capability.jsonl", "key", schema=Cost.from_json)
    missing = {name: plan for name, plan in arms.items() if keys[name] not in cache}
    if missing:
        with progress("reading", len(missing) * len(texts)) as advance:
            costs = benign_costs(bench.model, texts, missing, advance)
        rows = {keys[name]: {"key": keys[name], **cost.to_json()} for name, cost in costs.items()}
        cache.add(rows.values())
    return {name: Cost.from_json(cache[keys[name]]) for name in arms}


@torch.no_grad()
def own_losses(model: Model, answers: Sequence[TurnRecord]) -> OwnLoss:
    """Mean loss per token of answers under the baseline, and the standard error over answers."""
    texts = [answer_rollout(answer) for answer in answers if answer.ids]
    tokens = GPU_LOGIT_TOKENS if model.device.type == "cuda" else CPU_LOGIT_TOKENS
    sums, counts = [], []
    for batch in text_batches(model, texts, tokens):
        sums += batch.losses(batch.log_probs(model))
        counts += [len(text.answer_ids) for text in batch.texts]
    if not counts:
        return OwnLoss(None, None)
    total, n = np.array(sums), np.array(counts)
    mean = total.sum() / n.sum()
    error = np.sqrt(((total - mean * n) ** 2).sum()) / n.sum()
    return OwnLoss(float(mean), float(error))


def loops(ids: Sequence[int]) -> bool:
    """Whether a run of `LOOP` tokens stands in the answer `LOOP` times or more."""
    grams = [tuple(ids[i : i + LOOP]) for i in range(len(ids) - LOOP + 1)]
    return bool(grams) and max(map(grams.count, set(grams))) >= LOOP


def coherence(answers: Sequence[TurnRecord]) -> dict[str, float]:
    """Means over answers that are not empty: distinct_1, distinct_2, distinct_3 (n-grams), share that loops,
    tokens."""
    written = [answer.ids for answer in answers if answer.ids]
    if not written:
        return dict.fromkeys(("distinct_1", "distinct_2", "distinct_3", "loops"), math.nan) | {"tokens": 0.0}
    means = {
        f"distinct_{n}": float(np.nanmean([distinct_ngrams(ids, n) for ids in written])) for n in (1, 2, 3)
    }
    return {
        **means,
        "loops": float(np.mean([loops(ids) for ids in written])),
        "tokens": float(np.mean([len(ids) for ids in written])),
    }


def text_windows(model: Model, path: Path, n_bytes: int) -> tuple[list[Rollout], int]:
    """The first `n_bytes` bytes of a text as windows of tokens, and the number of bytes that they predict.

    Each window's first token is its prompt and is not predicted. Raises `UserError` for a text that cannot be
    read or is short.
    """
    text = read_head(path, n_bytes)
    ids = TextEncoder(model.tokenizer).text_ids(text)
    if len(ids) < 2:
        raise UserError(
            f"--text {path} has {len(ids)} tokens; at least 2 are needed, and thousands to say anything"
        )
    windows = []
    for first in range(0, len(ids) - 1, WINDOW):  # a window begins with the last token of the one before
        part = tuple(ids[first : first + WINDOW + 1])
        windows.append(Rollout(f"text/0/{first}/0", (), part[:1], part[1:], "", 0, "length"))
    return windows, len(text.encode()) - len(str(model.tokenizer.decode(ids[:1])).encode())


def read_head(path: Path, n_bytes: int) -> str:
    """The first bytes of a file as text; a character that the cut goes through is left out. Raises
    `UserError` for a file that cannot be read or is not UTF-8."""
    try:
        with path.open("rb") as file:
            content = file.read(n_bytes + 1)
    except OSError as error:
        raise UserError(f"--text {path} cannot be read: {error.strerror}") from None
    head = content[:n_bytes]
    try:
        return head.decode()
    except UnicodeDecodeError as error:
        if len(content) <= n_bytes or error.start < n_bytes - 3:
            raise UserError(f"--text {path} is not UTF-8 (byte {error.start})") from None
        return head[: error.start].decode()
