"""A model and interventions as a model of EleutherAI's lm-eval harness: what it asks is answered steered, and
accounted for.

    from lm_eval.evaluator import simple_evaluate

    lm = PersonatlasLM(model, chat, [cap])              # [] is the baseline
    simple_evaluate(model=lm, tasks=["arc_easy"], apply_chat_template=True)
    lm.counts.share                             # of the tokens times layers that were read, the changed ones

A log-likelihood is ln p(continuation | context), the sum over the continuation's tokens, in fp32. The context
is read in the prompt phase, the continuation in the answer phase; of a text that is scored from its beginning
(rolling) all but the token put before it is answer. What was asked once is not asked again: the cache holds
it, in a file if it has one.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Interventions, interventions_digest
from personatlas.persona.logs import ResultCache
from personatlas.persona.models.chat_template import ChatFormat
from personatlas.persona.models.load import Model
from personatlas.persona.pipeline.stages import CPU_CHUNK, GPU_CHUNK
from personatlas.persona.progress import progress
from personatlas.persona.records import JsonObject
from personatlas.persona.rollout import seed_of
from personatlas.persona.sampling.cuda_graph import fastest_sampler
from personatlas.persona.sampling.sampler import Answer, Prompt, Sampling, batch_end, pad
from personatlas.steering.evals.harnesses.lm_eval_result import RequestCounts
from personatlas.steering.hooks.steering import Steering, SteeringCallback, steer
from personatlas.steering.teacher_forcing import CPU_LOGIT_TOKENS, GPU_LOGIT_TOKENS

MAX_NEW_TOKENS = 256  # of a task that names no length, as in lm-eval
# what a task may call its longest answer
LENGTH_SETTINGS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# settings of a generation that change nothing at these values; others would be ignored, and are refused
NEUTRAL: dict[str, tuple[object, ...]] = {
    "num_beams": (1,), "repetition_penalty": (1, 1.0), "top_k": (0, None), "num_return_sequences": (1,),
    "min_p": (0, None), "use_cache": (True, False),
}  # fmt: skip


@dataclass(frozen=True)
class ScoredText:
    """A text to score from token `start` on; in the answer phase from token `answer_from` on."""

    ids: tuple[int, ...]
    start: int
    answer_from: int


class PersonatlasLM(TemplateLM):
    """A model under one list of interventions.

    `as_chat` says that contexts come through `apply_chat_template`, so that nothing is put before them and
    the template's own marks end an answer; without it both are as in lm-eval's own models. `label` heads the
    progress on stderr; none is shown without one.
    """

    backend = "causal"

    def __init__(
        self,
        model: Model,
        chat: ChatFormat,
        plan: Interventions = (),
        *,
        as_chat: bool = False,
        cache: ResultCache | None = None,
        label: str = "",
    ) -> None:
        super().__init__()
        self.model, self.chat, self.plan, self.tokenizer = model, chat, tuple(plan), model.tokenizer
        self.as_chat, self.label = as_chat, label
        self.cache = ResultCache(None, "key") if cache is None else cache
        self.arm = {
            "plan": interventions_digest(self.plan),
            "model": model.fingerprint,
            "dtype": str(model.dtype),
        }
        self._counts = dict.fromkeys(("requests", "reused", "cut", "seen", "fired"), 0)
        config = model.hf.generation_config
        eos = None if config is None else config.eos_token_id
        own = {eos} if isinstance(eos, int) else set(eos or ())
        self._end_ids = chat.end_ids if as_chat else frozenset(own | {self.eot_token_id})

    @property
    def counts(self) -> RequestCounts:
        """What it was asked since it was made."""
        seen = self._counts["seen"]
        return RequestCounts(**self._counts, share=self._counts["fired"] / seen if seen else None)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Most tokens that the model reads at once."""
        return int(min(self.model.context or self.tokenizer.model_max_length, 1 << 20))

    @property
    def tokenizer_name(self) -> str:
        """The name in lm-eval's own caches."""
        return self.model.id.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text. Without `add_generation_prompt` its last message, the assistant's, is to
        be continued."""
        plain = [{"role": one["role"], "content": one["content"]} for one in chat_history]
        if add_generation_prompt or plain[-1]["role"] != "assistant":
            return self.chat.render(plain, generation=add_generation_prompt)
        return self.chat.render(plain[:-1], generation=True) + plain[-1]["content"]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids; unless told otherwise with the tokenizer's own beginning, but in a chat or where it
        stands there already."""
        if add_special_tokens is None and (
            self.as_chat or string.startswith(str(self.tokenizer.decode(self.prefix_token_id)))
        ):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, verbose=False, **special)["input_ids"])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """ln p of each continuation after its context, and whether greedy decoding would write it."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        texts = []
        for (_context, continuation), before, after in requests:
            if not after:
                raise UserError(
                    f"the continuation {continuation!r} has no token of its own after its context"
                )
            if len(after) > self.max_length:
                raise UserError(
                    f"a continuation of {len(after)} tokens is longer than the {self.max_length} that "
                    f"{self.model.id} reads"
                )
            over = max(0, len(before) + len(after) - self.max_length - 1)
            self._counts["cut"] += over > 0
            start = len(before) - over
            texts.append(ScoredText((*before[over:], *after), start, start))
        return self._score(texts)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """ln p of each whole text, in windows where it is longer than the model reads."""
        texts, owners = [], []
        for owner, request in enumerate(requests):
            (text,) = request.args
            is_marked = text.startswith(str(self.tokenizer.decode(self.prefix_token_id)))
            special = {"add_special_tokens": False} if is_marked else {}
            ids = list(self.tokenizer(text, verbose=False, **special)["input_ids"])
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            for number, (before, after) in enumerate(map(make_disjoint_window, windows)):
                texts.append(ScoredText((*before, *after), len(before), int(number == 0)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._score(texts), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Each context's continuation up to its stop strings; greedy unless the task asks for sampling."""
        groups: dict[tuple[Sampling, tuple[str, ...]], dict[str, Prompt]] = {}
        keys: list[str] = []
        repeats: dict[str, int] = {}
        for request in requests:
            context, settings = request.args
            sampling, stops = parse_generation(settings)
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                reason = f"{sampling.max_new_tokens} new tokens leave no room for a prompt"
                most = f"in the {self.max_length} that {self.model.id} reads"
                raise UserError(f"{reason} {most}: give fewer with --max-new-tokens")
            whole = self.tok_encode(context) or [self.prefix_token_id]
            self._counts["cut"] += len(whole) > room
            ids = tuple(whole[-room:])
            key = self._key("write", ids, repr(sampling), stops, sorted(self._end_ids))
            repeats[key] = repeats.get(key, -1) + 1
            if sampling.temperature and repeats[key]:  # the same context again: other random numbers
                key = self._key(key, repeats[key])
            keys.append(key)
            groups.setdefault((sampling, stops), {})[key] = Prompt(ids, seed_of(key, 0))
        self._counts["reused"] += sum(key in self.cache for key in set(keys))
        for (sampling, stops), prompts in groups.items():
            self._write(sampling, stops, prompts)
        self._count(keys)
        return [self.cache[key]["text"] for key in keys]

    def _write(self, sampling: Sampling, stops: tuple[str, ...], prompts: Mapping[str, Prompt]) -> None:
        """Answers what the cache lacks, in chunks that are logged whole."""
        missing = [key for key in prompts if key not in self.cache]
        missing.sort(key=lambda key: -len(prompts[key].ids))
        if not missing:
            return
        chunk = GPU_CHUNK if self.model.device.type == "cuda" else CPU_CHUNK
        # stop strings of one token end an answer at once, others when it is cut
        stop_ids = [self.tokenizer(stop, add_special_tokens=False)["input_ids"] for stop in stops if stop]
        end_ids = self._end_ids | {ids[0] for ids in stop_ids if len(ids) == 1}
        sampler = fastest_sampler(self.model, end_ids, sampling, len(prompts[missing[0]].ids))
        done, quiet = len(prompts) - len(missing), not self.label
        with (
            progress(self.label, len(prompts), done=done, quiet=quiet) as advance,
            self._steered() as steering,
        ):
            callback = None if steering is None else steering.callback
            for first in range(0, len(missing), chunk):
                keys = missing[first : first + chunk]
                answers: dict[int, Answer] = {}
                for answer in sampler.answers([prompts[key] for key in keys], callback):
                    answers[answer.index] = answer
                    advance(1, len(answer.ids))
                accounts = _accounts(callback, len(keys))
                rows = []
                for index, key in enumerate(keys):
                    text = self.model.decode(answers[index].ids)
                    for stop in filter(None, stops):
                        text = text.partition(stop)[0]
                    rows.append(self._row(key, accounts[index], text=text, stopped=answers[index].stopped))
                self.cache.add(rows)

    @torch.no_grad()
    def _score(self, texts: Sequence[ScoredText]) -> list[tuple[float, bool]]:
        """Sum of ln p and greediness of each text. Those that differ in their last token alone share a
        forward."""
        keys = [self._key("read", text.ids, text.start, text.answer_from) for text in texts]
        groups: dict[tuple[tuple[int, ...], int, int], dict[str, ScoredText]] = {}
        for key, text in zip(keys, texts, strict=True):
            if key not in self.cache:
                groups.setdefault((text.ids[:-1], text.start, text.answer_from), {})[key] = text
        self._counts["reused"] += sum(key in self.cache for key in set(keys))
        order = sorted(groups, key=lambda group: -len(group[0]))
        lengths, first = [len(group[0]) for group in order], 0
        tokens = GPU_LOGIT_TOKENS if self.model.device.type == "cuda" else CPU_LOGIT_TOKENS
        with progress(self.label, len(order), quiet=not self.label) as advance, self._steered() as steering:
            while first < len(order):
                stop = batch_end(lengths, first, tokens)
                self.cache.add(self._read([groups[group] for group in order[first:stop]], steering))
                advance(stop - first)
                first = stop
        self._count(keys)
        return [(self.cache[key]["value"], self.cache[key]["greedy"]) for key in keys]

    def _read(
        self, groups: Sequence[Mapping[str, ScoredText]], steering: Steering | None
    ) -> list[JsonObject]:
        """The log's rows of one padded forward, of B groups."""
        rows = [next(iter(group.values())) for group in groups]
        ids = pad([row.ids[:-1] for row in rows], self.model.device)
        if steering is not None:
            steering.begin(torch.zeros(len(rows), dtype=torch.long))
            lengths = torch.tensor([len(row.ids) - 1 for row in rows])
            steering.describe(lengths, torch.tensor([row.answer_from for row in rows]), opening=True)
        first = min(row.start for row in rows) - 1
        logits = self.model.hf(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - first).logits
        values, greedy = [], []
        for index, (row, group) in enumerate(zip(rows, groups, strict=True)):
            # (B, T - first, V) -> (n, V): before each scored token
            own = logits[index, row.start - 1 - first : len(row.ids) - 1 - first].float().log_softmax(-1)
            targets = torch.tensor(
                [one.ids[one.start :] for one in group.values()], device=own.device
            )  # (G, n)
            values.append(own.gather(1, targets.T).double().sum(0))
            greedy.append((own.argmax(-1) == targets).all(1))
        accounts = []
        for group, account in zip(groups, _accounts(steering, len(rows)), strict=True):
            # the forward's account goes to the first of those that share it
            accounts += [account, *[(0, 0)] * (len(group) - 1)]
        keys = [key for group in groups for key in group]
        results = zip(keys, accounts, torch.cat(values).tolist(), torch.cat(greedy).tolist(), strict=True)
        return [self._row(key, account, value=value, greedy=own) for key, account, value, own in results]

    def _steered(self) -> AbstractContextManager[Steering | None]:
        return steer(self.model, self.plan) if self.plan else nullcontext()

    def _row(self, key: str, account: tuple[int, int], **content: object) -> JsonObject:
        return {"key": key, **self.arm, **content, "seen": account[0], "fired": account[1]}

    def _key(self, *content: object) -> str:
        return hashlib.sha256(json.dumps([self.arm, *content]).encode()).hexdigest()[:32]

    def _count(self, keys: Iterable[str]) -> None:
        for key in set(keys):
            self._counts["requests"] += 1
            self._counts["seen"] += self.cache[key]["seen"]
            self._counts["fired"] += self.cache[key]["fired"]


def parse_generation(settings: Mapping[str, object]) -> tuple[Sampling, tuple[str, ...]]:
    """How a task wants its answers: length, temperature and stop strings, with lm-eval's own defaults.

    Raises `UserError` for settings that would be ignored.
    """
    left: JsonObject = dict(settings)
    lengths = [value for name in LENGTH_SETTINGS if (value := left.pop(name, None)) is not None]
    until, is_sampled = left.pop("until", None) or (), left.pop("do_sample", None)
    temperature, top_p = float(left.pop("temperature", None) or 0.0), float(left.pop("top_p", None) or 1.0)
    for name, value in left.items():
        if value not in NEUTRAL.get(name, ()):
            allowed = f"a task may set until, do_sample, temperature, top_p and {LENGTH_SETTINGS[0]}"
            raise UserError(f"generation setting {name}: {value!r} is not supported here: {allowed}")
    if is_sampled is False:
        temperature = 0.0
    stops = (until,) if isinstance(until, str) else tuple(until)
    return Sampling(int(lengths[0]) if lengths else MAX_NEW_TOKENS, temperature, top_p), stops


def _accounts(steering: Steering | SteeringCallback | None, rows: int) -> list[tuple[int, int]]:
    """Tokens times layers seen and fired, by row."""
    if steering is None:
        return [(0, 0)] * rows
    tally = steering.tally
    return list(zip(tally.seen.sum(0).tolist(), tally.fired.sum(0).tolist(), strict=True))
