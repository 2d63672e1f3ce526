"""Which families of models work: the table of docs/models.md, tried on tiny random checkpoints of each.

`python tests/robustness/test_families.py` prints the table anew. The usual tests try a few of the families.
"""

import re
import sys
import tempfile
from pathlib import Path

import pytest
from engines import ENDS, PROMPTS, Listener, alone
from families import FAMILIES, MORE, REFUSED, SEEING, tiny_hf, tokenizer
from tiny_axis import axis_of

from personatlas.persona.errors import UserError
from personatlas.persona.models.load import Model, load_model
from personatlas.persona.pipeline.self_test import run_self_test
from personatlas.steering.arms import Arm
from personatlas.steering.hooks.binding_check import run_cap_test
from personatlas.steering.serve.engine.scheduler import Engine, EngineLimits, GenerationRequest

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
KEYS, TEXTS, NO = "from keys and values", "from whole texts", "no"
SAMPLE = ("mamba", "rwkv", "lfm2", "bloom", "llava", "qwen2.5-vl", "t5", "paligemma", "vit")
ALL = [*FAMILIES, *MORE, *SEEING, *REFUSED]


def stored_rows() -> dict[str, tuple[str, str]]:
    """The table in the docs: what the family is called -> how it decodes, and why it does not."""
    rows = re.findall(r"^\| (\S+) \| (\w[^|]*?) \| ([^|]*?) ?\|$", DOCS.read_text(encoding="utf-8"), re.M)
    return {family: (decoding, reason) for family, decoding, reason in rows if family != "family"}


def load(family: str, folder: Path) -> Model:
    tiny_hf(family).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return load_model(str(folder), device="cpu", dtype="float32")


def served_answers(model: Model) -> tuple[list, list]:
    """Answers of a full engine, baseline and capped, and those that the rows get alone."""
    axis, listener = axis_of(model), Listener()
    cap = axis.quantile_cap((0, 1), 0.5)
    engine = Engine(model, ENDS, axis, [Arm("mild", (cap,))], EngineLimits(slots=3, context=128), listener)
    engine.start()
    arms = [None, engine.arms.resolve("mild")] * 2
    asked = [GenerationRequest(PROMPTS[n], seed=n, max_tokens=5, arm=arm) for n, arm in enumerate(arms)]
    tickets = [engine.submit(request) for request in asked]
    listener.ended(tickets)
    engine.close()
    return [listener.answer(ticket) for ticket in tickets], [
        alone(engine, own.ids, own.arm, own.seed, own.max_tokens, own.temperature, own.top_p).ids
        for own in asked
    ]


def row_of(family: str, folder: Path) -> tuple[str, str]:
    """A family's row: loading, the self-test with caps and the engine agree on it, or the model is not loaded."""
    try:
        model = load(family, folder)
    except UserError as error:
        line = str(error).replace(str(folder), "MODEL")
        assert "\n" not in line
        assert len(line) < 200
        return NO, re.sub(r"^MODEL:? ?", "", line).split(";")[0]
    checks = [*run_self_test(model), *run_cap_test(model, axis_of(model))]
    assert [check for check in checks if not check.passed] == []
    together, single = served_answers(model)
    assert together == single
    return (KEYS if any("decoding (slots)" in check.name for check in checks) else TEXTS), ""


def test_the_docs_say_of_every_family_whether_it_works():
    rows = stored_rows()
    assert list(rows) == ALL
    assert len(ALL) > 50
    assert [family for family, (decoding, _) in rows.items() if decoding == NO] == list(REFUSED)


@pytest.mark.parametrize("family", SAMPLE)
def test_a_few_families_do_as_the_docs_say(family, tmp_path):
    assert row_of(family, tmp_path / "model") == stored_rows()[family]


@pytest.mark.robustness
@pytest.mark.parametrize("family", [family for family in ALL if family not in SAMPLE])
def test_every_family_does_as_the_docs_say(family, tmp_path):
    assert row_of(family, tmp_path / "model") == stored_rows()[family]


if __name__ == "__main__":
    for name in sys.argv[1:] or ALL:
        with tempfile.TemporaryDirectory() as place:
            decoding, reason = row_of(name, Path(place) / "model")
        print(f"| {name} | {decoding} | {reason} |", flush=True)
