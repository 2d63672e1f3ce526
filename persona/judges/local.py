"""A judge without an endpoint: a model on this machine says which digit it would write next.

    score = argmax over the wording's digits d (0..3 for roles) of <h, W[d]> + b[d],   h the final hidden state of the rubric prompt's last token

Nothing is sampled and no reply has to be parsed: each item is one prefill, and the digits' logits are fp32
(in bf16 two digits often tie). A small model is a poor judge: SmolLM2-135M gave a 1 to each of 26 labelled
answers, whatever they said. Take an instruction-tuned model of several billion parameters, and compare a few
dozen scores with your own first.

    judge = LocalJudge(load_model("path/to/a/large/model"))
"""

from collections.abc import Generator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from personatlas.persona.errors import UserError
from personatlas.persona.judges.base import SCORES, Item, Verdict
from personatlas.persona.judges.wording import ROLE_WORDING, Wording
from personatlas.persona.models.load import Model
from personatlas.persona.sampling.sampler import batch_end, batch_tokens, pad

CPU_TOKENS, GPU_TOKENS = 2048, 65536  # most padded tokens a batch


class LocalJudge:
    """Scores with a loaded `Model`. Raises `UserError` when it has no chat template or no single-token
    digits.

    `wording` is what it asks and `digits` how many scores it may give, from 0 up to 9 at most. The reply that
    goes into the log is the digits' probabilities among themselves, 0 first.
    """

    def __init__(
        self,
        model: Model,
        *,
        tokens: int | None = None,
        wording: Wording = ROLE_WORDING,
        digits: int = len(SCORES),
    ) -> None:
        if not 2 <= digits <= 10:
            raise ValueError(f"{digits} digits: from 2 (0 and 1) to 10 (0 to 9) can be compared")
        self.model, self.wording = model, wording
        self.tokens = tokens or batch_tokens(model, CPU_TOKENS, GPU_TOKENS)
        if getattr(model.tokenizer, "chat_template", None) is None:
            raise UserError(
                f"{model.id} has no chat template and cannot judge; take a chat model, or give a template"
            )
        self._head = model.hf.get_output_embeddings()
        if self._head is None or not self._head.weight.is_floating_point():
            raise UserError(
                f"{model.id} has no plain output head whose digits could be compared; take another model"
            )
        self._digits = self._digit_ids(digits)

    @property
    def id(self) -> str:
        """Name and weights of the model, and the wording of the rubric."""
        return f"local:{self.model.name}:{self.model.fingerprint[:8]}:{self.wording.hash}"

    def verdicts(self, items: Sequence[Item]) -> Generator[Verdict, None, None]:
        """One verdict per item, longest first. An item beyond the model's context is a problem, and is not
        cut.
        """
        limit = self.model.context
        pending: list[tuple[Item, list[int]]] = []
        for item in items:
            ids = self._prompt_ids(item)
            if limit and len(ids) > limit:
                yield Verdict(
                    item.key, None, f"{len(ids)} tokens, {limit} fit", "longer than the judge's context"
                )
            else:
                pending.append((item, ids))
        pending.sort(key=lambda pair: -len(pair[1]))
        lengths, first = [len(ids) for _, ids in pending], 0
        while first < len(pending):
            batch = pending[first : batch_end(lengths, first, self.tokens)]
            logits = self._logits([ids for _, ids in batch])
            for (item, _), row in zip(batch, logits, strict=True):
                yield _verdict(item.key, row)
            first += len(batch)

    @torch.no_grad()
    def _logits(self, prompts: list[list[int]]) -> Float[Tensor, "B S"]:
        """The digits' logits after each prompt. Rows are padded on the right, where causal attention never
        looks.
        """
        h = self.model.base(input_ids=pad(prompts, self.model.device), use_cache=False)[
            0
        ]  # (B, T, D), after the final norm
        last = torch.tensor([len(ids) - 1 for ids in prompts], device=h.device)
        weight = self._head.weight
        h = h[torch.arange(len(prompts), device=h.device), last].to(weight.device)  # (B, D)
        logits = h.float() @ weight[self._digits].float().T
        bias = getattr(self._head, "bias", None)
        return (logits if bias is None else logits + bias[self._digits].float()).cpu()

    def _prompt_ids(self, item: Item) -> list[int]:
        """Token ids of the rubric prompt up to where the digit goes."""
        return self._ids(self.wording.message(item), "0")[:-1]

    def _ids(self, message: str, digit: str) -> list[int]:
        """The template's text with the digit behind it: some tokenizers put a token of their own before a
        digit.
        """
        return self.model.chat.prompt_ids([{"role": "user", "content": message}], opening=digit)

    def _digit_ids(self, n: int) -> list[int]:
        """The token ids of the first n digits where they stand as an answer."""
        with_digit = [self._ids("?", str(score)) for score in range(n)]
        before, ids = {tuple(ids[:-1]) for ids in with_digit}, [ids[-1] for ids in with_digit]
        if len(before) != 1 or len(set(ids)) != n:
            raise UserError(
                f"the tokenizer of {self.model.id} has no token for each of the digits 0-{n - 1}; it cannot judge"
            )
        return ids


def _verdict(key: str, logits: Float[Tensor, " S"]) -> Verdict:
    if not torch.isfinite(logits).all():
        return Verdict(key, None, str(logits.tolist()), "logits that are not finite")
    shares = " ".join(f"{share:.3f}" for share in logits.softmax(0).tolist())
    return Verdict(key, int(logits.argmax()), shares)
