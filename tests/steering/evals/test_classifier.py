"""A classifier of harm from labels: the files of labels, the fit, what is saved, its figures, and the verbs. All stand-ins."""

import csv
import json
import time

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, cohen_kappa_score, precision_score, recall_score, roc_auc_score
from test_harm import HarmEndpoint
from test_judge_endpoint import says

from personatlas.cli.app import main
from personatlas.persona.artifacts import load_tensors, save_tensors
from personatlas.persona.errors import UserError
from personatlas.steering.evals.harm import classifier
from personatlas.steering.evals.harm.agreement import LabelledAnswers, measure_agreement, read_labels
from personatlas.steering.evals.harm.check import check_harm_judge
from personatlas.steering.evals.harm.classifier import KIND, fit_harm_classifier, load_harm_classifier
from personatlas.steering.evals.harm.judges import ClassifierHarmJudge, harm_judge

SWEET = ("stir the honey", "melt the sugar", "bake the cake", "whip the cream", "jam and syrup")
SOUR = ("squeeze the lemon", "pickle the onions", "pour the vinegar", "slice the gherkin", "lime and sorrel")


def answers(n: int, seed: int = 0) -> tuple[list[str], list[int]]:
    """Recipes: sweet ones stand for harmful answers (1) and sour ones for harmless (0), with some of the other in each."""
    generator = np.random.default_rng(seed)
    labels = [number % 2 for number in range(n)]
    texts = []
    for label in labels:
        mine, other = (SWEET, SOUR) if label else (SOUR, SWEET)
        parts = [
            *generator.choice(mine, 3),
            *generator.choice(other, 1 + generator.integers(2)),
            "Café № über ʼn x",
        ]
        texts.append(f"{', '.join(generator.permutation(parts))} for {generator.integers(1000)} minutes.")
    return texts, labels


@pytest.fixture(scope="module")
def fitted():
    return fit_harm_classifier(*answers(200), {"file": "recipes.csv", "sha256": "0" * 64})


def write(path, rows, header=("Response", "label"), encoding="utf-8"):
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def labelled(path, n=40, seed=0, **options):
    return write(path, list(zip(*answers(n, seed), strict=True)), **options)


# --- fit and score ---


def test_scores_equal_those_of_scikit_learns_own_pipeline(fitted):
    texts, labels = answers(200)
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), min_df=2, sublinear_tf=True, max_features=classifier.MOST_TERMS
    )
    model = LogisticRegression(C=16, solver="liblinear", random_state=0).fit(
        vectorizer.fit_transform(texts), labels
    )
    others = [
        *answers(60, 1)[0],
        "",
        "zebra",
        "cake " * 50,
        "CAKE\u2019s  cake_1\ncream 9",
        "İstanbul ǅ ﬁ ß cake",
        "\ud800",
    ]
    expected = model.predict_proba(vectorizer.transform(others))[:, 1]
    np.testing.assert_allclose(fitted.probability(others), expected, atol=1e-6)
    for text in others:
        assert classifier.terms_of(text) == vectorizer.build_analyzer()(text)


def test_a_saved_classifier_comes_back_the_same_and_the_same_texts_give_the_same_bytes(fitted, tmp_path):
    fitted.save(tmp_path / "a")
    again = load_harm_classifier(tmp_path / "a")
    texts = answers(50, 2)[0]
    np.testing.assert_array_equal(again.probability(texts), fitted.probability(texts))
    assert again.fingerprint == fitted.fingerprint
    assert again.provenance["sha256"] == "0" * 64
    assert again.provenance["check"]["auc"]["value"] > 0.9
    assert again.knows([answers(200)[0][0].upper(), "new"]).tolist() == [True, False]
    fit_harm_classifier(*answers(200), {"file": "recipes.csv", "sha256": "0" * 64}).save(tmp_path / "b")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    judge = harm_judge(str(tmp_path / "a.json"), None)
    assert judge.id == f"classifier:{fitted.fingerprint[:16]}" == harm_judge(str(tmp_path / "a"), None).id
    scored = dict(judge.harm_verdicts([("q", text) for text in texts]))
    assert [scored[i].score for i in range(50)] == fitted.probability(texts).tolist()


def test_labels_of_one_class_or_texts_without_shared_words_cannot_be_fitted():
    with pytest.raises(UserError, match="all of one class"):
        fit_harm_classifier(["a cake", "a pie"], [1, 1])
    with pytest.raises(UserError, match="share no words"):
        fit_harm_classifier(["cake", "lemon", "pie", "lime"], [1, 0, 1, 0])
    few = fit_harm_classifier(["a cake", "a cake", "a lemon", "a lemon"], [1, 1, 0, 0])
    assert few.provenance["check"] is None
    assert few.provenance["contradictions"] == 0


BROKEN = {
    "weights of another size": lambda t, m: t.update(weights=t["weights"][:-1].clone()),
    "a weight that is no number": lambda t, m: t["weights"].__setitem__(0, float("nan")),
    "an infinite idf": lambda t, m: t["idf"].__setitem__(0, float("inf")),
    "an idf below one": lambda t, m: t["idf"].__setitem__(0, 0.0),
    "a huge weight": lambda t, m: t["weights"].__setitem__(0, 1e300),
    "no weights": lambda t, m: t.pop("weights"),
    "weights of another kind": lambda t, m: t.update(weights=t["weights"].float()),
    "hashes of another kind": lambda t, m: t.update(fitted=t["fitted"].float()),
    "a word twice": lambda t, m: m["vocabulary"].__setitem__(0, m["vocabulary"][1]),
    "a word that is none": lambda t, m: m["vocabulary"].__setitem__(0, {"__reduce__": "os.system"}),
    "no vocabulary": lambda t, m: m.pop("vocabulary"),
    "a vocabulary that is text": lambda t, m: m.update(vocabulary="cake"),
    "other settings": lambda t, m: m["settings"].update(words="(a+)+$"),
    "a threshold of 2": lambda t, m: m.update(threshold=2.0),
    "no provenance": lambda t, m: m.update(provenance=[]),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_made_up_classifier_is_refused_in_one_line(fitted, tmp_path, how):
    fitted.save(tmp_path / "it")
    tensors, meta = load_tensors(tmp_path / "it", KIND)
    BROKEN[how](tensors, meta)
    save_tensors(tmp_path / "it", tensors, meta)
    with pytest.raises(UserError, match="is not a classifier of harm") as error:
        load_harm_classifier(tmp_path / "it")
    assert "\n" not in str(error.value)


def test_a_damaged_or_foreign_artefact_is_refused_in_one_line(fitted, tmp_path):
    fitted.save(tmp_path / "it")
    content = bytearray((tmp_path / "it.safetensors").read_bytes())
    content[-9] ^= 1
    (tmp_path / "it.safetensors").write_bytes(bytes(content))
    with pytest.raises(UserError, match="does not match the hash"):
        load_harm_classifier(tmp_path / "it")
    save_tensors(tmp_path / "axis", {"vectors": torch.zeros(2)}, {"kind": "axis"})
    with pytest.raises(UserError, match="of kind 'axis'"):
        load_harm_classifier(tmp_path / "axis")
    (tmp_path / "deep.safetensors").write_bytes(b"")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested deeper"):
        load_harm_classifier(tmp_path / "deep")
    with pytest.raises(UserError, match="never finished"):
        load_harm_classifier(tmp_path / "absent")


# --- figures ---


def test_figures_are_those_of_scikit_learn(fitted):
    texts, labels = answers(300, 3)
    generator = np.random.default_rng(0)
    scores = np.round(np.clip(np.array(labels) * 0.3 + generator.random(300) * 0.7, 0, 1), 2)  # with ties
    found = measure_agreement(scores.tolist(), labels, texts)
    said = scores >= 0.5
    assert found.auc.value == pytest.approx(roc_auc_score(labels, scores))
    assert found.kappa.value == pytest.approx(cohen_kappa_score(labels, said))
    assert found.brier.value == pytest.approx(brier_score_loss(labels, scores))
    assert found.precision.value == pytest.approx(precision_score(labels, said))
    assert found.recall.value == pytest.approx(recall_score(labels, said))
    assert found.accuracy.value == pytest.approx(np.mean(said == np.array(labels)))
    assert (found.n, found.positives, found.chance) == (300, 150, 0.5)
    for figure in (found.accuracy, found.auc, found.kappa, found.brier, found.precision, found.recall):
        assert figure.low < figure.value < figure.high
    by_hand = sum(abs(b.mean - b.harmful.value) * b.n for b in found.reliability) / 300
    assert found.calibration_error.value == pytest.approx(by_hand)
    assert sum(b.n for b in found.reliability) == 300


def test_what_is_not_defined_is_none_and_rows_of_one_text_widen_an_interval():
    one = measure_agreement([0.1, 0.2], [0, 0], ["a", "b"])
    assert (one.auc.value, one.kappa.value, one.precision.value, one.recall.value) == (None, None, None, None)
    assert json.loads(json.dumps(one.to_json(), allow_nan=False))["accuracy"]["value"] == 1
    generator = np.random.default_rng(1)
    labels = (generator.random(40) < 0.5).astype(int).tolist()
    scores = np.clip(np.array(labels) * 0.3 + generator.random(40) * 0.7, 0, 1).tolist()
    texts = [str(number) for number in range(40)]
    apart = measure_agreement(
        scores * 5, labels * 5, [f"{text}/{copy}" for copy in range(5) for text in texts]
    )
    same = measure_agreement(scores * 5, labels * 5, texts * 5)
    assert same.auc.high - same.auc.low > 1.5 * (apart.auc.high - apart.auc.low)


def test_texts_that_it_was_fitted_to_are_counted_and_left_out(fitted, tmp_path):
    def checked(texts, labels):
        own = LabelledAnswers(texts, labels, [""] * len(texts), "own.csv", "")
        return check_harm_judge(ClassifierHarmJudge(fitted), own, tmp_path / "log.jsonl")

    old, new = answers(200), answers(60, 9)
    found = checked([*old[0][:30], *new[0]], [*old[1][:30], *new[1]])
    assert found.seen == 30
    assert (found.all.n, found.unseen.n) == (90, 60)
    assert checked(*old).unseen is None


# --- files of labels ---


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_labels_are_read_whatever_the_encoding(tmp_path, encoding):
    found = read_labels(labelled(tmp_path / "l.csv", encoding=encoding))
    assert (found.texts, found.labels) == answers(40)


def test_columns_and_labels_have_several_names(tmp_path):
    rows = [
        ["Why?", 'two\nlines, "quoted"', word]
        for word in ("Yes", "NO", "true", "false", "1", "0", "Harmful", "harmless")
    ]
    found = read_labels(write(tmp_path / "a.csv", rows * 3, ("question", "Answer", "is_harmful")))
    assert found.labels == [1, 0] * 12
    assert found.texts[0] == 'two\nlines, "quoted"'
    assert set(found.requests) == {"Why?"}
    lines = [{"completion": "cake", "verdict": bool(i % 2), "prompt": "P"} for i in range(20)]
    (tmp_path / "b.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    assert read_labels(tmp_path / "b.jsonl").labels == [0, 1] * 10
    named = write(tmp_path / "c.csv", [["x", "y", i % 2] for i in range(20)], ("text", "answer", "mine"))
    assert read_labels(named, "answer", "mine").texts[0] == "y"
    (tmp_path / "d.tsv").write_text("text\tlabel\n" + "a, b; c\t1\na\t0\n" * 10)
    assert read_labels(tmp_path / "d.tsv").texts[0] == "a, b; c"


GOOD = "text,label\n" + "a,1\nb,0\n" * 10
BAD = {
    b"": "is empty",
    b" \n\n": "is empty",
    b"[1]": "item 1 is 1; an object",
    b"words,label\na,1\n": r":2 has no text column .* its columns: words, label; name one with --text-column",
    b"text,marks\na,1\n": r":2 has no label column .*--label-column",
    b"text,answer,label\na,b,1\n": r":2 has several text columns: text, answer",
    b"text,text,label\na,b,1\n": "the column 'text' twice",
    GOOD.encode() + b"c,maybe\n": r":22: label 'maybe' is not 0/1",
    GOOD.encode() + b"c\n": r":22: 1 fields where the header has 2",
    GOOD.encode() + b'"c,1\nd,0\n': r"is not CSV: .*a quote that is not closed",
    GOOD.encode() + b"caf\xe9,1\n": r":22 is not UTF-8 at byte 94 \(0xe9\)",
    GOOD.encode("utf-16") + b"x": r":22 is not UTF-16 at byte 184",
    b"text,label\na,1\nb,0\n": "has 2 labelled rows; 20 are the fewest",
    b"text,label\n" + b"a,1\n" * 20: "all 20 rows are harmful; both",
    b'{"text": "a", "label": 1}\n{"text": "a"}\n': r":2 has no 'label'",
    b'{"text": "a", "label": 1}\n{"text": 3, "label": 1}\n': r":2: 'text' is a int, not text",
    b'{"text": "a", "label": 1}\n{"text"\n': ":2 is not valid JSON",
    b'{"text": "a", "label": 1}\n[1]\n': ":2, item 1 is 1; an object is",
}  # fmt: skip


@pytest.mark.parametrize("content", BAD)
def test_a_file_that_cannot_be_read_is_one_line_that_says_where(tmp_path, content):
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=BAD[content]) as error:
        read_labels(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_a_missing_file_and_a_folder_are_said_to_be_so(tmp_path):
    for path, said in ((tmp_path / "none.csv", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=said):
            read_labels(path)


def test_a_hundred_thousand_rows_and_one_of_a_million_characters(tmp_path):
    before = csv.field_size_limit()
    rows = [["cake " * 10, i % 2] for i in range(100_000)]
    rows[7][0] = "x\n" * 500_000
    start = time.monotonic()
    found = read_labels(write(tmp_path / "l.csv", rows))
    assert (len(found.texts), sum(found.labels), len(found.texts[7])) == (100_000, 50_000, 1_000_000)
    assert time.monotonic() - start < 20
    assert csv.field_size_limit() == before


# --- verbs ---


def printed(capsys, *arguments):
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_a_classifier_is_fitted_and_checked_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    train, test = labelled(tmp_path / "train.csv", 120), labelled(tmp_path / "test.csv", 60, seed=5)
    assert "120 answers (120 distinct, 60 harmful)" in printed(
        capsys, "tools", "harm-judge", "fit", train, "--out", tmp_path / "new" / "it.json"
    )
    found = json.loads(
        printed(capsys, "tools", "harm-judge", "check", test, "--judge", tmp_path / "new" / "it", "--json")
    )
    assert found["all"]["auc"]["value"] > 0.9
    assert (found["seen"], found["unscored"], found["labels"]["file"]) == (0, {}, "test.csv")
    table = printed(capsys, "tools", "harm-judge", "check", train, "--judge", tmp_path / "new" / "it.json")
    assert "without the 120 it was fitted to" in table
    assert "Cohen's kappa" in table
    rules = json.loads(printed(capsys, "tools", "harm-judge", "check", test, "--judge", "rules", "--json"))
    assert (rules["all"]["n"], rules["all"]["recall"]["value"]) == (60, 1)
    for arguments, said in (
        (["check", test, "--judge", "nonsense"], "is not rules"),
        (["check", tmp_path / "none", "--judge", "rules"], "does not exist"),
        (["fit", train, "--out", tmp_path], "is a folder"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["tools", "harm-judge", *map(str, arguments)])
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err


def test_an_endpoint_is_checked_and_asked_about_no_answer_twice(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    rows = [[f"question {i}?", f"cake {i}", i % 2] for i in range(24)]
    path = write(tmp_path / "l.csv", rows, ("question", "response", "label"))
    endpoint = HarmEndpoint(
        lambda _, q: says("hm" if q == "question 3?" else str(int(q.split()[1].rstrip("?")) % 2))
    )
    command = [
        "tools",
        "harm-judge",
        "check",
        path,
        "--judge",
        endpoint.url,
        "--judge-model",
        "m",
        "--log",
        tmp_path / "log.jsonl",
    ]
    found = json.loads(printed(capsys, *command, "--json"))
    assert (found["all"]["n"], found["all"]["accuracy"]["value"], found["unscored"]) == (
        23,
        1,
        {"unparsable": 1},
    )
    printed(capsys, *command)
    assert len(endpoint.bodies) == 25  # only what had no score was asked again
    endpoint.close()
