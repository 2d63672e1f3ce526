"""`tools harm-judge fit` and `check`: a classifier of harm, and how judges of harm agree with human labels.

personatlas tools harm-judge fit labels.csv --out harm
personatlas tools harm-judge check others.csv --judge harm.json
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from personatlas.cli.options import JUDGE, OPTIONS, Json, OutFile
from personatlas.cli.output import print_json, print_line, print_table, with_interval
from personatlas.persona.errors import UserError
from personatlas.persona.progress import progress, say

if TYPE_CHECKING:
    from personatlas.steering.evals.harm.agreement import Estimate, JudgeAgreement
    from personatlas.steering.evals.harm.check import HarmJudgeCheck


@dataclass(frozen=True)
class LabelOptions:
    """Which columns of a file of labels are read."""

    text_column: str | None = None
    "the column of answers, if it is not called response, answer, completion or text"
    label_column: str | None = None
    "the column of labels, if it is not called label, harmful, is_harmful or verdict"


@dataclass(frozen=True)
class HarmOptions:
    """Who decides whether an answer is harmful."""

    judge: str
    """rules, a fitted classifier's file, local:MODEL, or the URL of an OpenAI-compatible endpoint (key in
    PERSONATLAS_JUDGE_KEY)"""
    judge_model: str | None = None
    "the model to ask for at that URL"
    rubric: str = "yes-no"
    "what a model is asked: yes-no, or scale (refused, convincing, specific)"
    judge_tokens: int | None = None
    "the longest reply of that model, with its thoughts; unless given as long as it needs"


FIGURES = {
    "accuracy": "accuracy",
    "auc": "AUC",
    "kappa": "Cohen's kappa",
    "brier": "Brier score",
    "calibration_error": "calibration error",
    "precision": "precision",
    "recall": "recall",
}


def fit(
    labels: Path,
    /,
    *,
    out: OutFile,
    columns: Annotated[LabelOptions, OPTIONS] = LabelOptions(),
    json: Json = False,
) -> None:
    """Fit a classifier of harm to human labels.

    Parameters
    ----------
    labels
        CSV or JSONL with a column of answers and one of labels (0/1, true/false, yes/no or harmful/harmless)
    out
        the file to write: FILE.safetensors and FILE.json, to be named with --judge FILE
    """
    from personatlas.steering.evals.harm import classifier
    from personatlas.steering.evals.harm.agreement import read_labels

    stem = out.with_suffix("") if out.suffix in (".json", ".safetensors") else out
    if out.is_dir() or not stem.name:
        raise UserError(f"--out {out} is a folder; give the file to write, such as {out / 'harm'}")
    found = read_labels(labels, columns.text_column, columns.label_column)
    say(f"fitting to {len(found.texts)} labelled answers, and {classifier.FOLDS} times to a part of them")
    fitted = classifier.fit_harm_classifier(
        found.texts, found.labels, {"file": found.name, "sha256": found.sha256}
    )
    stem.parent.mkdir(parents=True, exist_ok=True)
    fitted.save(stem)
    if json:
        print_json({"out": str(stem), "terms": len(fitted.terms), **fitted.provenance})
        return
    known, checked = fitted.provenance, fitted.provenance["check"]
    text = f"{known['n']} answers ({known['distinct']} distinct, {known['positives']} harmful), "
    text += f"{len(fitted.terms)} words and pairs"
    if checked is not None:
        auc = with_interval(checked["auc"]["value"], checked["auc"]["low"], checked["auc"]["high"], ".3f")
        text += f"; AUC {auc} on left-out fifths of the same file"
    print_line(f"{text}; written to {stem}.json and .safetensors")
    if known["contradictions"]:
        say(f"{known['contradictions']} texts stand in {known['file']} with both labels")


def check(
    labels: Path,
    /,
    *,
    judging: Annotated[HarmOptions, JUDGE],
    columns: Annotated[LabelOptions, OPTIONS] = LabelOptions(),
    log: OutFile = Path("runs/judge-check.jsonl"),
    json: Json = False,
) -> None:
    """Measure how well a judge of harm agrees with human labels.

    Parameters
    ----------
    labels
        CSV or JSONL as for fit; a judge that is a model also reads a column question, request, prompt,
        instruction or query
    log
        log of a model's verdicts, so that none is asked for twice
    """
    from personatlas.steering.evals.harm.agreement import read_labels
    from personatlas.steering.evals.harm.check import check_harm_judge
    from personatlas.steering.evals.harm.judges import ModelHarmJudge, harm_judge

    judge = harm_judge(judging.judge, judging.judge_model, judging.rubric, max_tokens=judging.judge_tokens)
    found = read_labels(labels, columns.text_column, columns.label_column)
    is_model = isinstance(judge, ModelHarmJudge)
    if is_model and not any(found.requests):
        say(f"{found.name} has no column of requests; the judge sees answers alone")
    with progress("judging", len(found.texts), quiet=not is_model) as advance:
        result = check_harm_judge(judge, found, log, advance)
    if why := result.unscored:
        said = ", ".join(f"{n} {problem}" for problem, n in sorted(why.items()))
        count = f"{sum(why.values())} of {len(found.texts)} answers"
        say(f"the judge gave no score for {count} ({said}); they are left out")
    if json:
        parts = {"all": result.all.to_json(), "unseen": result.unseen.to_json() if result.unseen else None}
        known = {
            "judge": judge.id,
            "labels": {"file": found.name, "sha256": found.sha256},
            "unscored": dict(why),
        }
        print_json({**known, "seen": result.seen, **parts})
        return
    _print(judge.id, found.name, result)


def _print(judge_id: str, labels: str, result: "HarmJudgeCheck") -> None:
    parts: list[tuple[str, JudgeAgreement | None]] = [("all", result.all)]
    if result.seen:
        parts.append((f"without the {result.seen} it was fitted to", result.unseen))

    counts = {"answers": "n", "distinct": "distinct", "labelled harmful": "positives"}
    rows = [
        [title, *(str(getattr(part, name)) if part else "-" for _, part in parts)]
        for title, name in counts.items()
    ]
    rows.append(["accuracy of chance", *(f"{part.chance:.3f}" if part else "-" for _, part in parts)])
    for name, title in FIGURES.items():
        rows.append([title, *(_cell(getattr(part, name)) if part else "-" for _, part in parts)])
    print_table(["95% intervals", *(title for title, _ in parts)], rows, title=f"{judge_id} on {labels}")
    best = result.unseen or result.all
    bins = [
        [f"{bin.low:.1f}-{bin.high:.1f}", str(bin.n), f"{bin.mean:.3f}", _cell(bin.harmful)]
        for bin in best.reliability
    ]
    columns = ["score", "answers", "mean score", "labelled harmful"]
    print_table(columns, bins, title="Share of harmful labels by score")


def _cell(figure: "Estimate") -> str:
    return with_interval(figure.value, figure.low, figure.high, ".3f")
