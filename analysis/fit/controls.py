"""What an axis measures besides characters: where prompts lie that ask for none, and whether the answers that
a judge scored 1, 2 and 3 give the same axis.

    place_controls(controls, layer, vector, x @ vector, groups)[0].place   # 0 the mean role, 1 the default
"""

from collections.abc import Sequence

import numpy as np

from personatlas.analysis.fit.geometry import Groups, cosine, direction
from personatlas.analysis.fit.result import ControlPlace, ScoreAxis
from personatlas.analysis.stats import Array, ratio_interval
from personatlas.persona.pipeline.activations import Activations
from personatlas.persona.rollout import RolloutKey

MIN_SCORE_ROLES = 3  # roles with answers of a score, for an axis of them


def place_controls(
    controls: Activations,
    layer: int,
    vector: Array,
    projections: Array,
    groups: Groups,
    questions: Sequence[str],
) -> tuple[ControlPlace, ...]:
    """Places each control between the mean role (0) and the positive pole (1), paired by question.

    With c an answer of the control to question q, r_q and d_q the mean projections of the roles and of the
    pole on it, the place is sum(c - r_q) / sum(d_q - r_q); its interval is clustered by question and by
    prompt. `vector` (D,) is the unit axis at the layer, `projections` (N,) those of the fit's answers, which
    `groups` sorts by role and question (index into `questions`). Empty where the layer kept no rollout means.
    """
    if layer not in controls.layers or groups.question is None:
        return ()
    shape = groups.n_roles + 1, groups.n_questions
    flat = groups.index * groups.n_questions + groups.question
    count = np.bincount(flat, minlength=shape[0] * shape[1]).reshape(shape)
    total = np.bincount(flat, projections, minlength=count.size).reshape(shape)
    cells = np.divide(total, count, out=np.full(shape, np.nan), where=count > 0)  # role x question
    n = (count[1:] > 0).sum(0)
    mean_role = np.divide(np.nansum(cells[1:], 0), n, out=np.full(len(n), np.nan), where=n > 0)
    poles = np.stack([cells[0], mean_role])
    known = {question: poles[:, index] for index, question in enumerate(questions)}
    own = controls.rollout_means[:, controls.layers.index(layer)].double().numpy() @ vector
    keys = [RolloutKey.parse(key) for key in controls.keys]
    places = []
    for name in dict.fromkeys(key.role for key in keys):
        rows = [
            (projection, *known[key.question], key.question, str(key.prompt))
            for key, projection in zip(keys, own, strict=True)
            if key.role == name and np.isfinite(known.get(key.question, np.nan)).all()
        ]
        if rows:
            projection, pole, roles = np.array([row[:3] for row in rows]).T
            clusters = [row[3] for row in rows], [row[4] for row in rows]
            place = ratio_interval(projection - roles, pole - roles, *clusters)
            places.append(ControlPlace(name[1:], float(projection.mean()), place))
    return tuple(sorted(places, key=lambda place: place.place.value))


def axes_by_score(
    activations: Activations, layer: int, positive: str, vector: Array
) -> tuple[ScoreAxis, ...]:
    """The cosine with the axis (D,) of the axis from the answers with one score alone, for each score that
    `MIN_SCORE_ROLES` roles have.
    """
    pole = activations.role_mean(positive)[0][layer].numpy()
    found = []
    for score in sorted({score for score in activations.scores if score is not None}):
        means = [activations.role_mean(role, {score}) for role in activations.roles if role != positive]
        rows = [mean[layer].numpy() for mean, n in means if n]
        if len(rows) >= MIN_SCORE_ROLES:
            n = sum(n for _, n in means)
            found.append(ScoreAxis(score, n, len(rows), cosine(direction(np.vstack([pole, *rows])), vector)))
    return tuple(found)
