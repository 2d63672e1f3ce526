"""The typed view of fit.json, and the library functions that write it."""

import json
from dataclasses import replace

import pytest

from personatlas.analysis.fit.pipeline import compute_axis, fit_run, report_run
from personatlas.analysis.fit.result import FIT_VERSION, FitResult, RolePlay
from personatlas.persona.errors import UserError
from personatlas.persona.models.load import load_model
from personatlas.persona.options import FitOptions, JudgeOptions, PlanOptions

OPTIONS = FitOptions(keep="all", replicates=4)


def test_fit_json_comes_back_as_it_was(tiny_run):
    stored = json.loads((tiny_run / "run" / "fit.json").read_text())
    fit = FitResult.load(tiny_run / "run")
    assert fit.to_json() == stored
    assert fit.options["version"] == stored["asked"]["version"] == FIT_VERSION
    assert fit.layer_reason == stored["why"]
    assert fit.cos_pc1.to_json() == stored["layers"][fit.layer]["cos_pc1_by_roles"]
    assert fit.at_layer.angle_resampled == stored["layers"][fit.layer]["wobble"]
    assert (fit.positive_role.role, len(fit.other_roles)) == ("default", len(fit.roles) - 1)


def test_a_loaded_model_is_used_as_it_is_and_its_run_resumes(tiny_run, tmp_path):
    model = load_model(str(tiny_run / "tiny"), device="cpu", dtype="float32")
    plan = PlanOptions(plan="standard", bank=tiny_run / "bank", samples=2, max_new_tokens=4)
    judge = JudgeOptions(judge="none")
    fit = compute_axis(model, tmp_path / "run", plan=plan, judge=judge, fit=OPTIONS)
    assert fit == FitResult.load(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["asked"]["model_name"] == model.id
    written = (tmp_path / "run" / "axis.safetensors").stat().st_mtime_ns
    assert compute_axis(model, tmp_path / "run", plan=plan, judge=judge, fit=OPTIONS) == fit
    assert fit_run(tmp_path / "run", OPTIONS) == fit
    assert (tmp_path / "run" / "axis.safetensors").stat().st_mtime_ns == written
    (tmp_path / "run" / "report.html").unlink()
    assert report_run(tmp_path / "run").is_file()


def test_a_fit_of_another_version_is_not_shown(tiny_run, tmp_path):
    content = json.loads((tiny_run / "run" / "fit.json").read_text())
    content["asked"]["version"] = FIT_VERSION - 1
    (tmp_path / "fit.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="was fitted by another version"):
        FitResult.load(tmp_path)


def test_warnings_name_what_does_not_exceed_chance(tiny_run):
    fit = FitResult.load(tiny_run / "run")
    null = fit.null
    assert null is not None

    def warnings(**changes):
        rows = [replace(row, null=replace(null, **changes)) for row in fit.layers]
        return replace(fit, layers=tuple(rows), role_play=None, trait_problem=None).warnings

    assert warnings(p_norm=0.01, p_cos_pc1=0.01) == ()
    assert "|axis| is no larger" in warnings(p_norm=0.2, p_cos_pc1=0.2)[0]
    assert "cos(PC1, axis) is no larger" in warnings(p_norm=0.01, p_cos_pc1=0.2)[0]
    bare = replace(fit, layers=tuple(replace(row, null=None) for row in fit.layers))
    assert "no null at layer" in bare.warnings[0]
    seldom = replace(fit, role_play=RolePlay(0.1, 40, (0.04, 0.2)))
    assert "only 10% of the judged answers show their role" in seldom.warnings
