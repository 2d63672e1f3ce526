"""A subject and a plan as a model of EleutherAI's lm-eval harness: what it asks is answered steered, and accounted for.

    from lm_eval.evaluator import simple_evaluate

    model = PersonaxisLM(subject, chat, [cap])           # [] is the model as it is
    simple_evaluate(model=model, tasks=["arc_easy"], apply_chat_template=True)
    model.counts.share                                   # of the tokens times layers that were read, how many were changed

A log-likelihood is ln p(continuation | context), the sum over the continuation's tokens, in fp32. The context is read in the
plan's prompt phase, the continuation in its answer phase; of a text that is scored from its beginning (rolling) all but the
token put before it is answer. What was asked once is not asked again: `Kept` holds it, in a file if it is given one.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from personaxis.persona.chat import ChatFormat
from personaxis.persona.errors import KnownError
from personaxis.persona.graph import fastest_sampler
from personaxis.persona.progress import progress
from personaxis.persona.rollouts import seed_of
from personaxis.persona.sampler import Answer, Prompt, Sampling, batch_end, pad
from personaxis.persona.stages import CPU_CHUNK, GPU_CHUNK
from personaxis.persona.store import append_lines, read_lines
from personaxis.persona.subject import Subject
from personaxis.steering.cost import CPU_TOKENS, GPU_TOKENS
from personaxis.steering.evals.lm_eval_tasks import LENGTHS
from personaxis.steering.interventions import plan_digest
from personaxis.steering.steer import Plan, Steering, steered

MAX_NEW_TOKENS = 256  # of a task that names no length, as in lm-eval
# settings of a generation that change nothing at these values; others would be ignored, and are refused
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "repetition_penalty": (1, 1.0), "top_k": (0, None), "num_return_sequences": (1,), "min_p": (0, None),
    "use_cache": (True, False),
}  # fmt: skip


class Kept:
    """Rows by key, appended to a JSONL file if there is one."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._rows = {row["key"]: row for row in read_lines(path)} if path is not None else {}

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._rows[key]

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keep rows, all of them or none."""
        if self.path is not None:
            append_lines(self.path, rows, sync=False)
        self._rows |= {row["key"]: row for row in rows}


@dataclass
class Counts:
    """What a model was asked since it was made: distinct `requests`, how many of them had been answered before (`reused`) or
    were cut on the left to fit (`cut`), and tokens times layers `seen` and `fired`, those of reused answers included."""

    requests: int = 0
    reused: int = 0
    cut: int = 0
    seen: int = 0
    fired: int = 0

    @property
    def share(self) -> float | None:
        """Fired among seen; None for a plan that did nothing."""
        return self.fired / self.seen if self.seen else None


@dataclass(frozen=True)
class Reading:
    """A text to score from token `start` on; in the plan's answer phase from token `answer_from` on."""

    ids: tuple[int, ...]
    start: int
    answer_from: int


class PersonaxisLM(TemplateLM):
    """A subject under one plan. `as_chat` says that contexts come through `apply_chat_template`, so that nothing is put before
    them and the template's own marks end an answer; without it both are as in lm-eval's own models. `label` heads the
    progress on stderr; none is shown without one."""

    backend = "causal"

    def __init__(
        self,
        subject: Subject,
        chat: ChatFormat,
        plan: Plan = (),
        *,
        as_chat: bool = False,
        kept: Kept | None = None,
        label: str = "",
    ) -> None:
        super().__init__()
        self.subject, self.chat, self.plan, self.tokenizer = subject, chat, tuple(plan), subject.tokenizer
        self.as_chat, self.kept, self.label = as_chat, kept or Kept(), label
        self.counts = Counts()
        self.arm = {"plan": plan_digest(self.plan), "model": subject.fingerprint, "dtype": str(subject.dtype)}
        config = subject.model.generation_config
        eos = None if config is None else config.eos_token_id
        own = {eos} if isinstance(eos, int) else set(eos or ())
        self._end_ids = chat.end_ids if as_chat else frozenset(own | {self.eot_token_id})

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Most tokens that the model reads at once."""
        config = self.subject.model.config.get_text_config(decoder=True)
        longest = getattr(config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        return int(min(longest, 1 << 20))

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's own caches."""
        return self.subject.id.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text. Without `add_generation_prompt` its last message, of the assistant, is one to go on with."""
        plain = [{"role": one["role"], "content": one["content"]} for one in chat_history]
        if add_generation_prompt or plain[-1]["role"] != "assistant":
            return self.chat.render(plain, generation=add_generation_prompt)
        return self.chat.render(plain[:-1], generation=True) + plain[-1]["content"]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; unless told otherwise with the tokenizer's own beginning, but in a chat or where it stands there already."""
        if add_special_tokens is None and (
            self.as_chat or string.startswith(self.tokenizer.decode(self.prefix_token_id))
        ):
            add_special_tokens = False
        how = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, verbose=False, **how)["input_ids"])

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """ln p of each continuation after its context, and whether greedy decoding would write it."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        readings = []
        for (_context, continuation), before, after in requests:
            if not after:
                raise KnownError(f"the continuation {continuation!r} has no token of its own after its context")
            if len(after) > self.max_length:
                raise KnownError(f"a continuation of {len(after)} tokens is longer than the {self.max_length} that {self.subject.id} reads")  # fmt: skip
            over = max(0, len(before) + len(after) - self.max_length - 1)
            self.counts.cut += over > 0
            start = len(before) - over
            readings.append(Reading((*before[over:], *after), start, start))
        return self._scored(readings)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """ln p of each whole text, in windows where it is longer than the model reads."""
        readings, owners = [], []
        for owner, request in enumerate(requests):
            (text,) = request.args
            is_marked = text.startswith(self.tokenizer.decode(self.prefix_token_id))
            ids = list(
                self.tokenizer(text, verbose=False, **({"add_special_tokens": False} if is_marked else {}))["input_ids"]
            )
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            for number, (before, after) in enumerate(map(make_disjoint_window, windows)):
                readings.append(Reading((*before, *after), len(before), int(number == 0)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._scored(readings), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Each context's continuation up to its stop strings; greedy unless the task asks for sampling."""
        asked: dict[tuple[Sampling, tuple[str, ...]], dict[str, Prompt]] = {}
        keys: list[str] = []
        met: dict[str, int] = {}
        for request in requests:
            context, given = request.args
            sampling, stops = sampling_of(given)
            ids = self._fitting(context, sampling.max_new_tokens)
            key = self._key("write", ids, repr(sampling), stops, sorted(self._end_ids))
            met[key] = met.get(key, -1) + 1
            if sampling.temperature and met[key]:  # the same context again: other random numbers
                key = self._key(key, met[key])
            keys.append(key)
            asked.setdefault((sampling, stops), {})[key] = Prompt(ids, seed_of(key, 0))
        self._count_reused(keys)
        for (sampling, stops), prompts in asked.items():
            self._write(sampling, stops, prompts)
        self._count(keys)
        return [self.kept[key]["text"] for key in keys]

    def _fitting(self, context: str, new: int) -> tuple[int, ...]:
        """A context's ids, cut on the left to leave room for `new` tokens."""
        room = self.max_length - new
        if room < 1:
            raise KnownError(
                f"{new} new tokens leave no room for a prompt in the {self.max_length} that {self.subject.id} reads: give fewer with --max-new-tokens"
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        self.counts.cut += len(ids) > room
        return tuple(ids[-room:])

    def _write(self, sampling: Sampling, stops: tuple[str, ...], prompts: Mapping[str, Prompt]) -> None:
        """Answer what is not kept, in chunks that are kept whole."""
        left = sorted((key for key in prompts if key not in self.kept), key=lambda key: -len(prompts[key].ids))
        if not left:
            return
        chunk = GPU_CHUNK if self.subject.device.type == "cuda" else CPU_CHUNK
        longest = max(len(prompts[key].ids) for key in left)
        sampler = fastest_sampler(self.subject, self._end_ids | self._stop_ids(stops), sampling, longest)
        with progress(self.label, len(prompts), done=len(prompts) - len(left), quiet=not self.label) as advance, self._steered() as held:  # fmt: skip
            for first in range(0, len(left), chunk):
                keys = left[first : first + chunk]
                found: list[Answer | None] = [None] * len(keys)
                for answer in sampler.answers([prompts[key] for key in keys], held):
                    found[answer.index] = answer
                    advance(1, len(answer.ids))
                account = _accounts(held, len(keys))
                self.kept.add(
                    [
                        self._row(key, one, text=self._text(answer, stops), stopped=answer.stopped)
                        for key, answer, one in zip(keys, found, account, strict=True)
                        if answer is not None
                    ]
                )

    def _text(self, answer: Answer, stops: Sequence[str]) -> str:
        text = self.tokenizer.decode(list(answer.ids), skip_special_tokens=True)
        for stop in stops:
            text = text.partition(stop)[0] if stop else text
        return text

    def _stop_ids(self, stops: Sequence[str]) -> set[int]:
        """Stop strings that are one token: they end an answer at once, others when it is cut."""
        ids = [self.tokenizer(stop, add_special_tokens=False)["input_ids"] for stop in stops if stop]
        return {own[0] for own in ids if len(own) == 1}

    @torch.no_grad()
    def _scored(self, readings: Sequence[Reading]) -> list[tuple[float, bool]]:
        """Sum of ln p and greediness of each reading. Those that differ in their last token alone share a forward."""
        keys = [self._key("read", one.ids, one.start, one.answer_from) for one in readings]
        groups: dict[tuple[Any, ...], dict[str, Reading]] = {}
        for key, one in zip(keys, readings, strict=True):
            if key not in self.kept:
                groups.setdefault((one.ids[:-1], one.start, one.answer_from), {})[key] = one
        self._count_reused(keys)
        order = sorted(groups, key=lambda group: -len(group[0]))
        lengths, first = [len(group[0]) for group in order], 0
        tokens = GPU_TOKENS if self.subject.device.type == "cuda" else CPU_TOKENS
        with progress(self.label, len(order), quiet=not self.label) as advance, self._steered() as held:
            while first < len(order):
                stop = batch_end(lengths, first, tokens)
                self.kept.add(self._read([groups[group] for group in order[first:stop]], held))
                advance(stop - first)
                first = stop
        self._count(keys)
        return [(self.kept[key]["value"], self.kept[key]["greedy"]) for key in keys]

    def _read(self, part: Sequence[Mapping[str, Reading]], held: Steering | None) -> list[dict[str, Any]]:
        """One padded forward over the groups of `part`."""
        rows = [next(iter(group.values())) for group in part]
        ids = pad([row.ids[:-1] for row in rows], self.subject.device)
        if held is not None:
            held.begin(torch.zeros(len(rows), dtype=torch.long))
            lengths = torch.tensor([len(row.ids) - 1 for row in rows])
            held.describe(lengths, torch.tensor([row.answer_from for row in rows]), opening=True)
        first = min(row.start for row in rows) - 1
        logits = self.subject.model(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - first).logits
        values, met = [], []
        for place, (row, group) in enumerate(zip(rows, part, strict=True)):
            # (B, T - first, V) -> (n, V): before each scored token
            own = logits[place, row.start - 1 - first : len(row.ids) - 1 - first].float().log_softmax(-1)
            targets = torch.tensor([one.ids[one.start :] for one in group.values()], device=own.device)  # (G, n)
            values.append(own.gather(1, targets.T).double().sum(0))
            met.append((own.argmax(-1) == targets).all(1))
        # the forward's account goes to the first of those that share it
        accounts = [one for group, own in zip(part, _accounts(held, len(rows)), strict=True) for one in [own, *[(0, 0)] * (len(group) - 1)]]  # fmt: skip
        keys = [key for group in part for key in group]
        answers = zip(keys, accounts, torch.cat(values).tolist(), torch.cat(met).tolist(), strict=True)
        return [self._row(key, account, value=value, greedy=greedy) for key, account, value, greedy in answers]

    def _steered(self) -> Any:
        return steered(self.subject, self.plan) if self.plan else nullcontext()

    def _row(self, key: str, account: tuple[int, int], **content: Any) -> dict[str, Any]:
        return {"key": key, **self.arm, **content, "seen": account[0], "fired": account[1]}

    def _key(self, *content: Any) -> str:
        return hashlib.sha256(json.dumps([self.arm, *content]).encode()).hexdigest()[:32]

    def _count_reused(self, keys: Iterable[str]) -> None:
        self.counts.reused += sum(key in self.kept for key in set(keys))

    def _count(self, keys: Iterable[str]) -> None:
        for key in set(keys):
            self.counts.requests += 1
            self.counts.seen += self.kept[key]["seen"]
            self.counts.fired += self.kept[key]["fired"]


def sampling_of(given: Mapping[str, Any]) -> tuple[Sampling, tuple[str, ...]]:
    """How a task wants its answers: lengths, temperature and stop strings, with lm-eval's own defaults.

    Raises `KnownError` for settings that would be ignored.
    """
    left = dict(given)
    lengths = [value for name in LENGTHS if (value := left.pop(name, None)) is not None]
    until, is_sampled = left.pop("until", None) or (), left.pop("do_sample", None)
    temperature, top_p = float(left.pop("temperature", None) or 0.0), float(left.pop("top_p", None) or 1.0)
    for name, value in left.items():
        if value not in NEUTRAL.get(name, ()):
            raise KnownError(f"generation setting {name}: {value!r} is not supported here: a task may set until, do_sample, temperature, top_p and {LENGTHS[0]}")  # fmt: skip
    if is_sampled is False:
        temperature = 0.0
    stops = (until,) if isinstance(until, str) else tuple(until)
    return Sampling(int(lengths[0]) if lengths else MAX_NEW_TOKENS, temperature, top_p), stops


def _accounts(held: Steering | None, rows: int) -> list[tuple[int, int]]:
    """Tokens times layers seen and fired, by row."""
    if held is None:
        return [(0, 0)] * rows
    tally = held.tally
    return list(zip(tally.seen.sum(0).tolist(), tally.fired.sum(0).tolist(), strict=True))
