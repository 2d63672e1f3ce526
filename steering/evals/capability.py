"""What a cap costs a model that does nothing wrong: loss and KL on its own everyday answers, bits per byte of a text, coherence.

    content = measured(bench, suites, answers, arms, Path("book.txt"), 200_000)
    content["benign"]["capped"]["more_loss"]                  # teacher-forced on the answers of the model as it is
    content["text"]["arms"]["capped"]["bits_per_byte"]        # nats / ln 2 / bytes, windows of 512 tokens

Coherence is measured on what each arm wrote: distinct n-grams, loops, and the loss of its answers under the model as it is,
where nonsense is dear and a loop is cheap, so that one of the two shows.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Interventions, interventions_digest
from personatlas.persona.logs import append_lines, read_lines
from personatlas.persona.models.load import Model
from personatlas.persona.progress import progress
from personatlas.persona.rollout import Rollout
from personatlas.steering.arms import distinct
from personatlas.steering.evals.answers import Answers, Bench, Said
from personatlas.steering.evals.suites.build import Suite
from personatlas.steering.loss_cost import CPU_TOKENS, GPU_TOKENS, Cost, benign_costs
from personatlas.steering.teacher_forcing import batches

WINDOW = 512  # tokens of a text that are read together
LOOP = 4  # an answer loops when a run of so many tokens stands in it so often


def measured(
    bench: Bench,
    suites: Sequence[Suite],
    answers: Mapping[str, Answers],
    arms: Mapping[str, Interventions],
    text: Path | None,
    text_bytes: int,
) -> dict[str, Any]:
    """Loss and KL on the suite of benign answers, the loss of what each arm wrote there, and bits per byte of a text; by arm.

    What was read once is kept in capability.jsonl.
    """
    plain = next(name for name, plan in arms.items() if not plan)
    acting = {name: plan for name, plan in arms.items() if plan}
    content: dict[str, Any] = {}
    for suite in suites:
        if suite.name == "benign":
            texts = [text for text in rollouts_of(suite, answers[suite.name], plain) if text.answer_ids]
            costs = _read_costs(bench, texts, acting, "reading benign answers")
            content["benign"] = {name: cost_row(cost) for name, cost in costs.items()}
            said = {name: [answers[suite.name][name, case.key, 0] for case in suite.cases] for name in arms}
            content["own_loss"] = {
                name: dict(zip(("loss", "error"), own_losses(bench.model, own), strict=True))
                for name, own in said.items()
            }
    if text is not None and acting:
        windows, predicted = text_windows(bench.model, text, text_bytes)
        costs = _read_costs(bench, windows, acting, "reading the text")
        first = next(iter(costs.values()))
        bits = {plain: bits_per_byte(first, predicted, before=True)}
        bits |= {name: bits_per_byte(cost, predicted) for name, cost in costs.items()}
        rows = {
            name: {"bits_per_byte": value} | (cost_row(costs[name]) if name in costs else {})
            for name, value in bits.items()
        }
        content["text"] = {"file": text.name, "bytes": predicted, "arms": rows}
    return content


def _read_costs(
    bench: Bench, texts: Sequence[Rollout], arms: Mapping[str, Interventions], what: str
) -> dict[str, Cost]:
    log = bench.folder / "capability.jsonl"
    asked = [[text.prompt_ids, text.answer_ids] for text in texts]
    sha = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    keys = {name: f"{sha}-{interventions_digest(plan)}" for name, plan in arms.items()}
    known = {row["key"]: row for row in read_lines(log)}
    waiting = {name: plan for name, plan in arms.items() if keys[name] not in known}
    if waiting:
        with progress(what, len(waiting) * len(texts)) as advance:
            found = benign_costs(bench.model, texts, waiting, advance)
        rows = {keys[name]: {"key": keys[name], **cost.to_json()} for name, cost in found.items()}
        append_lines(log, rows.values())
        known |= rows
    return {name: Cost.from_json(known[keys[name]]) for name in arms}


def rollouts_of(suite: Suite, answers: Answers, arm: str) -> list[Rollout]:
    """An arm's first answers as rollouts."""
    found = []
    for case in suite.cases:
        said = answers[arm, case.key, 0]
        found.append(_rollout(said))
    return found


@torch.no_grad()
def own_losses(model: Model, said: Sequence[Said]) -> tuple[float, float]:
    """Mean loss per token of answers under the model as it is, and the standard error over answers."""
    texts = [_rollout(one) for one in said if one.ids]
    tokens = GPU_TOKENS if model.device.type == "cuda" else CPU_TOKENS
    sums, counts = [], []
    for batch in batches(model, texts, tokens):
        sums += batch.losses(batch.log_probs(model))
        counts += [len(text.answer_ids) for text in batch.texts]
    if not counts:
        return float("nan"), float("nan")
    total, n = np.array(sums), np.array(counts)
    mean = total.sum() / n.sum()
    error = np.sqrt(((total - mean * n) ** 2).sum()) / n.sum()
    return float(mean), float(error)


def loops(ids: Sequence[int]) -> bool:
    """Whether a run of `LOOP` tokens stands in the answer `LOOP` times or more."""
    grams = [tuple(ids[i : i + LOOP]) for i in range(len(ids) - LOOP + 1)]
    return bool(grams) and max(map(grams.count, set(grams))) >= LOOP


def coherence(said: Sequence[Said]) -> dict[str, float]:
    """Means over answers: distinct 1-, 2- and 3-grams, share that loops, tokens."""
    spoken = [one.ids for one in said if one.ids]
    if not spoken:
        return {
            "distinct_1": math.nan,
            "distinct_2": math.nan,
            "distinct_3": math.nan,
            "loops": math.nan,
            "tokens": 0.0,
        }
    means = {f"distinct_{n}": float(np.nanmean([distinct(ids, n) for ids in spoken])) for n in (1, 2, 3)}
    return {
        **means,
        "loops": float(np.mean([loops(ids) for ids in spoken])),
        "tokens": float(np.mean([len(ids) for ids in spoken])),
    }


def text_windows(model: Model, path: Path, most: int) -> tuple[list[Rollout], int]:
    """The first `most` bytes of a text as windows of tokens, and the bytes that they predict.

    Each window's first token is its prompt and is not predicted. Raises `UserError` for a text that cannot be read or is short.
    """
    text = read_text(path, most)
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < 2:
        raise UserError(
            f"--text {path} has {len(ids)} tokens; at least 2 are needed, and thousands to say anything"
        )
    windows = []
    for first in range(
        0, len(ids) - 1, WINDOW
    ):  # a window's first token is the last one of the window before
        part = ids[first : first + WINDOW + 1]
        windows.append(Rollout(f"text/0/{first}/0", (), tuple(part[:1]), tuple(part[1:]), "", 0, "length"))
    return windows, len(text.encode()) - len(model.tokenizer.decode(ids[:1]).encode())


def bits_per_byte(cost: Cost, predicted: int, *, before: bool = False) -> float:
    """Bits per predicted byte of a text's windows, steered or (`before`) as the model is."""
    return float((cost.before if before else cost.after).sum()) / math.log(2) / predicted


def cost_row(cost: Cost) -> dict[str, Any]:
    """What the report says of a cost."""
    return {
        "more_loss": cost.more,
        "more_loss_interval": list(cost.more_interval),
        "loss": cost.loss,
        "kl": cost.kl,
        "fired": float(cost.fired.mean()),
        "texts": len(cost.tokens),
        "tokens": int(cost.tokens.sum()),
    }


def _rollout(said: Said) -> Rollout:
    return Rollout(said.key, (), said.prompt_ids, said.ids, said.text, said.seed, said.stopped)


def read_text(path: Path, most: int) -> str:
    """The first bytes of a file as text; a character that the cut goes through is left out. `UserError` for what is none."""
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise UserError(f"--text {path} cannot be read: {error.strerror}") from None
    kept = content[:most]
    try:
        return kept.decode()
    except UnicodeDecodeError as error:
        if len(content) <= most or error.start < most - 3:
            raise UserError(f"--text {path} is not UTF-8 (byte {error.start})") from None
        return kept[: error.start].decode()
