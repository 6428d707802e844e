"""The `compare` command: what it reads, the numbers it reports, what it writes and how it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from prenorm_jax import demo
from prenorm_jax.base.console import run_command
from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.files import flatten
from prenorm_jax.compare import main
from prenorm_jax.report import page, runs_figure, table
from prenorm_jax.report.runs import compare
from prenorm_jax.report.runs_words import two_digits

pytestmark = pytest.mark.filterwarnings("error")  # matplotlib warns about what it cannot draw


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is said of numbers: reports without their figure, which takes half a second."""
    monkeypatch.setattr(runs_figure, "figure", lambda report, width=0: b"")


def write_run(
    workdir: Path,
    losses: list[Any] | dict[int, Any],
    norm: str = "layernorm",
    evals: dict[int, float] | None = None,
    info: dict[str, Any] | None = None,
    unit: str = "token",
    more: dict[str, list[Any]] | None = None,
    **config: Any,
) -> Path:
    """A workdir as training leaves it; `losses` and `more` of the metrics from step 1 on, or `losses` by step."""
    workdir.mkdir(parents=True)
    base = {"batch_size": 2, "data": {"seq_len": 5}, "seed": 0, "parameterization": "pre_ln"}
    base["model"] = {"norm": norm, "dtype": "float32"}
    (workdir / "config.json").write_text(json.dumps(base | config))
    if info is not None:
        (workdir / "run.json").write_text(json.dumps(info))
    steps = losses if isinstance(losses, dict) else dict(enumerate(losses, 1))
    rates = {f"{unit}s_per_s": 100.0, "model_flops_per_s": 1e9}
    lines = [
        {"step": step, "loss": loss} | {key: step * rate for key, rate in rates.items()} for step, loss in steps.items()
    ]
    for key, values in (more or {}).items():
        for line, value in zip(lines, values, strict=True):
            line[key] = value
    lines += [{"step": step, "eval_loss": loss} for step, loss in (evals or {}).items()]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


def append(workdir: Path, text: str) -> None:
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write(text)


def written_json(folder: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((folder / "report.json").read_text(), parse_constant=refuse)


@pytest.mark.usefixtures("undrawn")
def test_numbers_are_those_computed_by_hand(tmp_path: Path) -> None:
    info = {"parameters": {"trained": 1000, "computed": 900}, "device": "cpu ×1", "versions": {"jax": "1"}}
    ln = write_run(tmp_path / "ln", [8.0, 4.0, 3.0, 1.0], evals={2: 5.0, 4: 6.0})
    rms = write_run(tmp_path / "rms", [8.0, 4.5, 2.75, 1.0], "rmsnorm", {2: 5.5, 4: 5.25}, info)
    report = compare([rms, ln], tmp_path / "report")
    assert report["reference"] == "ln"
    row, base = report["runs"]
    assert (row["name"], row["norm"], row["parameterization"]) == ("rms", "rmsnorm", "pre_ln")
    assert (row["parameters_trained"], row["parameters_computed"], row["device"]) == (1000, 900, "cpu ×1")
    assert row["final_loss"] == 16.25 / 4
    assert (row["final_eval_loss"], row["final_eval_step"]) == (5.25, 4)
    assert (base["best_eval_loss"], base["best_eval_step"]) == (5.0, 2)
    assert (row["max_abs_delta"], row["max_abs_delta_step"]) == (0.5, 2)
    assert (row["first_abs_delta"], row["median_abs_delta"], row["common_steps"]) == (0.0, 0.125, 4)
    assert (row["final_eval_abs_delta"], row["final_eval_abs_delta_step"]) == (0.75, 4)
    assert base["change_per_step"] == 2.0
    assert (row["units_per_s"], row["steps_per_s"]) == (250.0, 25.0)
    assert report["curves"]["rms"]["delta_loss"] == [[1, 0.0], [2, 0.5], [3, -0.25], [4, 0.0]]
    assert base["parameters_trained"] is None and base["max_abs_delta"] is None
    assert written_json(tmp_path / "report") == {key: value for key, value in report.items() if key != "files"}


@pytest.mark.usefixtures("undrawn")
def test_final_loss_and_speed_leave_out_what_they_say(tmp_path: Path) -> None:
    row = compare([write_run(tmp_path / "ln", [1000.0] * 10 + [1.0] * 20)], tmp_path / "report")["runs"][0]
    assert row["final_loss"] == 1.0  # of the last 20 steps
    assert row["units_per_s"] == 100 * (4 + 30) / 2  # the first 3 of 30 left out


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("delta", "words"),
    [(0.0, "equals"), (0.0625, "follows ln closely"), (0.9, "follows ln:"), (1.1, "departs")],
)
def test_verdict_measures_against_the_reference_own_changes(tmp_path: Path, delta: float, words: str) -> None:
    ln = write_run(tmp_path / "ln", [3.0, 2.0, 1.0])
    rms = write_run(tmp_path / "rms", [3.0, 2.0 + delta, 1.0], "rmsnorm")
    assert words in compare([ln, rms], tmp_path / "report")["verdict"][0]


@pytest.mark.usefixtures("undrawn")
def test_verdict_names_runs_that_train_other_parameters(tmp_path: Path) -> None:
    ln = write_run(tmp_path / "ln", [3.0, 2.0], parameterization="native")
    rms = write_run(tmp_path / "rms", [3.0, 2.0], "rmsnorm", parameterization="native")
    report = compare([ln, rms], tmp_path / "report")
    assert "rms trained the parameters of the variant's own tree" in report["verdict"][0]
    assert not report["warnings"]


@pytest.mark.usefixtures("undrawn")
def test_last_line_of_a_step_wins(tmp_path: Path) -> None:
    ln = write_run(tmp_path / "ln", [3.0, 2.0, 9.0])
    append(ln, '{"step": 3, "loss": 1.0}\n{"step": 2, "loss": 2.5}\n')
    curves = compare([ln], tmp_path / "report")["curves"]["ln"]
    assert curves["loss"] == [[1, 3.0], [2, 2.5], [3, 1.0]]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("cut", ['{"step": 4, "lo', "{", '{"step": 4, "loss": 1.0'])
def test_only_a_last_line_cut_short_is_ignored(tmp_path: Path, cut: str) -> None:
    ln = write_run(tmp_path / "ln", [3.0, 2.0, 1.0])
    append(ln, cut)
    assert compare([ln], tmp_path / "report")["runs"][0]["last_step"] == 3
    append(ln, "\n")
    with pytest.raises(PrenormError, match=r"ln/metrics\.jsonl, line 4: "):
        compare([ln], tmp_path / "report")


@pytest.mark.usefixtures("undrawn")
def test_a_complete_last_line_without_newline_counts(tmp_path: Path) -> None:
    ln = write_run(tmp_path / "ln", [3.0])
    append(ln, '{"step": 2, "loss": 1.0}')
    assert compare([ln], tmp_path / "report")["runs"][0]["last_step"] == 2


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[1]",
        '{"loss": 1.0}',
        '{"step": 1.5}',
        '{"step": 2, "loss": "1"}',
        '{"step": 2, "loss": true}',
    ],
)
def test_malformed_middle_line_is_named(tmp_path: Path, line: str) -> None:
    ln = write_run(tmp_path / "ln", [3.0])
    append(ln, line + '\n{"step": 2, "loss": 1.0}\n')
    with pytest.raises(PrenormError, match=r"ln/metrics\.jsonl, line 2: .*repair or delete this line"):
        compare([ln], tmp_path / "report")


@pytest.mark.parametrize(
    ("losses", "others"),
    [
        ([3.0, 2.0, 1.0], [[3.0, 2.0, 1.0]]),
        ([3.0, 2.0, 1.0], [[3.0, 2.0 + 1e-7, 1.0], [3.0, 2.0, 1.0]]),
        ([3.0, 2.0, 1.0], [[3e6, 2e6, 1e6]]),
        ([3.0, 2.0, 0.0], [[3e6, -2e6, 1e6]]),
        ([3.0], [[3.0]]),
        ([3.0, float("nan")], [[float("nan"), 2.0]]),
        ([float("inf"), None], [[3.0, 2.0]]),
        ([1.0] * 30, [[1.0 + 1e-7] * 30] * 7),
    ],
    ids=[
        "zeros",
        "some zeros",
        "far larger",
        "negative",
        "one step",
        "never both finite",
        "never finite",
        "many",
    ],
)
def test_draws_what_is_hard_to_draw(tmp_path: Path, losses: list[Any], others: list[list[Any]]) -> None:
    runs = [write_run(tmp_path / "ln", losses, evals={1: losses[0] or 0.0})]
    runs += [write_run(tmp_path / f"o{i}", other, "rmsnorm", {1: 3.0}) for i, other in enumerate(others)]
    compare(runs, tmp_path / "report")
    assert (tmp_path / "report" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert written_json(tmp_path / "report")["reference"] == "ln"


def test_nonfinite_losses_are_reported(tmp_path: Path) -> None:
    ln = write_run(tmp_path / "ln", [3.0, 2.0, 1.0, 1.0])
    rms = write_run(tmp_path / "rms", [3.0, 2.0, float("nan"), float("inf")], "rmsnorm", {4: float("nan")})
    report = compare([ln, rms], tmp_path / "report")
    assert "rms: the training loss is not finite at 2 steps, first at step 3" in report["warnings"][0]
    assert "departs from ln" in report["verdict"][0]
    row = written_json(tmp_path / "report")["runs"][1]
    assert (row["final_loss"], row["final_eval_loss"], row["final_eval_step"], row["common_steps"]) == (
        None,
        None,
        4,
        2,
    )


def test_page_escapes_what_comes_from_files_and_fetches_nothing(tmp_path: Path) -> None:
    info = {"device": "<i>gpu</i>", "versions": {"<u>": "<s>"}, "sessions": []}
    bold = write_run(tmp_path / "<b>", [3.0, 2.0], "<em>$x$</em>", info=info, seed="<q>")
    other = write_run(tmp_path / r"$\frac$_{", [3.0, 2.0], parameterization="<tt>")
    compare([bold, other], tmp_path / "report", title="<script>$table & http://x.org")
    page = (tmp_path / "report" / "report.html").read_text()
    for tag in ("<b>", "<em>", "<i>", "<u>", "<s>", "<q>", "<tt>", "<script"):
        assert tag not in page
    assert "<title>&lt;script&gt;$table &amp; http://x.org</title>" in page
    assert "<td>&lt;b&gt;</td>" in page
    urls = re.findall(r'(?:src|srcset|href)\s*=\s*"([^"]*)', page)
    assert [url[:22] for url in urls] == ["data:image/png;base64,"] * 2
    assert not re.search(r"<link|<iframe|@import|url\(", page)


@pytest.mark.usefixtures("undrawn")
def test_reference(tmp_path: Path) -> None:
    rms, crms = (write_run(tmp_path / norm, [1.0], norm) for norm in ("rmsnorm", "crmsnorm"))
    ln = write_run(tmp_path / "ln", [1.0])
    out = tmp_path / "report"
    assert compare([rms, crms], out)["reference"] == "rmsnorm"
    assert compare([rms, ln], out)["reference"] == "ln"
    assert compare([rms, ln], out, reference=f"{tmp_path}/ln/../rmsnorm/")["reference"] == "rmsnorm"


@pytest.mark.usefixtures("undrawn")
def test_differing_configurations_are_warned_about(tmp_path: Path) -> None:
    ln = write_run(tmp_path / "ln", [1.0], log_every=1)
    rms = write_run(tmp_path / "rms", [1.0], "rmsnorm", log_every=2, parameterization="native")
    seed = write_run(tmp_path / "seed", [1.0], seed=1, log_every=1)
    report = compare([ln, rms], tmp_path / "report")
    assert report["config_differences"] == {"log_every": {"ln": "1", "rms": "2"}}
    assert not report["warnings"]
    assert "differ in seed:" in compare([ln, seed], tmp_path / "report")["warnings"][0]
    assert "differ in seed:" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.usefixtures("undrawn")
def test_different_lengths_are_warned_about_and_compared_where_both_are(tmp_path: Path) -> None:
    ln, rms = write_run(tmp_path / "ln", [3.0, 2.0]), write_run(tmp_path / "rms", {2: 2.5, 3: 1.0}, "rmsnorm")
    report = compare([ln, rms], tmp_path / "report")
    assert report["runs"][1]["common_steps"] == 1
    assert "end at different steps (ln at 2, rms at 3)" in report["warnings"][0]


@pytest.mark.usefixtures("undrawn")
def test_switches_are_those_that_later_sessions_left_standing(tmp_path: Path) -> None:
    starts = [
        (0, "layernorm"),
        (2, "layernorm"),
        (5, "crmsnorm"),
        (3, "rmsnorm"),
        (6, "rmsnorm"),
        (8, "crmsnorm"),
    ]
    info = {"sessions": [{"step": step, "norm": norm} for step, norm in starts]}
    run = compare([write_run(tmp_path / "ln", [1.0] * 9, "crmsnorm", info=info)], tmp_path / "report")["runs"][0]
    assert run["switches"] == [
        {"step": 3, "from": "layernorm", "to": "rmsnorm"},
        {"step": 8, "from": "rmsnorm", "to": "crmsnorm"},
    ]


# --- Where curves part that is not the norm's doing. ---


def starts(*settings: dict[str, Any], step: int = 2, norm: str = "layernorm") -> dict[str, Any]:
    """A run.json with a start at each multiple of `step`, with these settings."""
    return {"sessions": [{"step": step * i, "norm": norm, "settings": values} for i, values in enumerate(settings)]}


@pytest.mark.usefixtures("undrawn")
def test_a_changed_schedule_is_not_blamed_on_the_norm(tmp_path: Path) -> None:
    info = starts({"steps": 2}, {"steps": 4})
    extended = write_run(
        tmp_path / "ext", [4.0, 3.0, 3.5, 3.0], info=info, more={"learning_rate": [1.0, 0.5, 0.75, 0.5]}, steps=4
    )
    whole = write_run(
        tmp_path / "rms",
        [4.0, 3.0, 2.0, 1.0],
        "rmsnorm",
        {2: 3.0, 4: 1.0},
        more={"learning_rate": [1.0, 0.5000001, 0.25, 0.1]},
        steps=4,
    )
    report = compare([extended, whole], tmp_path / "report")
    row = report["runs"][1]
    assert (row["relation"], row["common_steps"]) == ("equals {} up to step 2", 2)
    assert "After step 2 their learning rates differ: how the curves part from there is not the" in report["verdict"][0]
    assert "ext went on after step 2 with steps=4 instead of 2: from there its training differs." in report["warnings"]
    assert "0 (step\N{NO-BREAK SPACE}1 of 2)" in (tmp_path / "report" / "report.html").read_text()
    assert report["runs"][0]["changes"] == [{"step": 2, "key": "steps", "from": 2, "to": 4}]


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_diverges_only_after_its_schedule_parted_does_not_depart(tmp_path: Path) -> None:
    ln = write_run(tmp_path / "ln", [4.0, 3.0, 2.0, 1.0], more={"learning_rate": [1.0, 1.0, 1.0, 1.0]})
    rms = write_run(tmp_path / "rms", [4.0, 3.0, 2.0, None], "rmsnorm", more={"learning_rate": [1.0, 1.0, 9.0, 9.0]})
    assert compare([ln, rms], tmp_path / "report")["runs"][1]["relation"] == "equals {} up to step 2"


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("key", ["accumulate", "model.scan"])
def test_other_dropout_masks_are_not_blamed_on_the_norm(tmp_path: Path, key: str) -> None:
    one, changed = starts({key: 1}), starts({key: 1}, {key: 2})
    ln = write_run(tmp_path / "ln", [4.0, 3.0, 2.0], info=one)
    rms = write_run(tmp_path / "rms", [4.0, 3.0, 9.0], "rmsnorm", info=changed)
    report = compare([ln, rms], tmp_path / "report")
    assert report["runs"][1]["relation"] == "equals {} up to step 2"
    assert f"After step 2 they differ in {key}" in report["verdict"][0]
    again = write_run(tmp_path / "again", [4.0, 3.0, 9.0], info=changed)
    assert compare([again, rms], tmp_path / "report")["runs"][1]["relation"] == "equals {}"


@pytest.mark.usefixtures("undrawn")
def test_one_step_is_no_steps(tmp_path: Path) -> None:
    ln = write_run(tmp_path / "ln", [3.0, 2.0])
    rms = write_run(tmp_path / "rms", [3.5, float("nan")], "rmsnorm")
    report = compare([ln, rms], tmp_path / "report")
    assert "over 1 common step with finite losses the training" in report["verdict"][0]
    assert "rms: the training loss is not finite at 1 step, first at step 2" in report["warnings"][0]


@pytest.mark.usefixtures("undrawn")
def test_an_update_that_one_run_left_out_is_not_blamed_on_the_norm(tmp_path: Path) -> None:
    ln = write_run(tmp_path / "ln", [4.0, 3.0, 2.0, 1.0], more={"grad_norm": [1.0] * 4})
    rms = write_run(tmp_path / "rms", [4.0, 3.0, 9.0, 9.0], "rmsnorm", more={"grad_norm": [1.0, None, 1.0, None]})
    report = compare([ln, rms], tmp_path / "report")
    assert report["runs"][1]["relation"] == "equals {} up to step 1"
    assert "After step 1 rms left out the update of step 2" in report["verdict"][0]
    assert "rms: at 2 steps the loss is finite, but its gradient or update was not" in report["warnings"][0]


@pytest.mark.usefixtures("undrawn")
def test_runs_on_other_data_or_settings_are_not_held_against_each_other(tmp_path: Path) -> None:
    here, moved, other = (
        write_run(tmp_path / name, [4.0, loss], info={"data": digest}, data={"path": name})
        for name, loss, digest in (("here", 3.0, "a"), ("moved", 3.0, "a"), ("other", 9.0, "b"))
    )
    assert compare([here, moved], tmp_path / "report")["verdict"][0].startswith("moved equals here:")
    seed = write_run(tmp_path / "seed", [4.0, 9.0], seed=1, data={"path": "here"}, info={"data": "a"})
    for run, key in ((other, "data"), (seed, "seed")):
        report = compare([here, run], tmp_path / "report")
        claim = f"{run.name} cannot be compared with here, for their configurations differ in {key}: whatever the norm"
        assert report["verdict"][0].startswith(claim) and "typically" not in report["verdict"][0]
        assert f"differ in {key}:" in report["warnings"][0]


@pytest.mark.usefixtures("undrawn")
def test_what_only_changes_rounding_or_came_with_a_later_version_does_not_part_runs(tmp_path: Path) -> None:
    ln = write_run(tmp_path / "ln", [4.0, 3.0], mesh={"fsdp": 1}, accumulate=1)
    rms = write_run(tmp_path / "rms", [4.0, 3.0], "rmsnorm", mesh={"fsdp": 2}, accumulate=2, later="x")
    report = compare([ln, rms], tmp_path / "report")
    assert report["runs"][1]["relation"] == "equals {}" and not report["warnings"]
    assert set(report["config_differences"]) == {"mesh.fsdp", "accumulate", "later"}


@pytest.mark.parametrize("sessions", [1, [[]], [{"norm": "layernorm"}], [{"step": 0, "norm": 1}], [{"step": "0"}]])
def test_a_run_json_of_wrong_types_is_refused(tmp_path: Path, sessions: Any) -> None:
    ln = write_run(tmp_path / "ln", [1.0], info={"sessions": sessions})
    with pytest.raises(PrenormError, match=r"ln/run\.json is damaged: .*leave this run out"):
        compare([ln], tmp_path / "report")


@pytest.fixture
def drawings(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collects the figures that are drawn, which are drawn in full."""
    drawn: list[Figure] = []

    def collect(drawing: Figure) -> bytes:
        drawing.draw_without_rendering()
        drawn.append(drawing)
        return b""

    monkeypatch.setattr(runs_figure, "png", collect)
    return drawn


def test_eight_runs_look_different_and_no_legend_covers_a_curve_nor_leaves_the_page(
    tmp_path: Path, drawings: list[Figure]
) -> None:
    runs = [write_run(tmp_path / f"run-of-a-rather-long-name-{i}", [3.0, 2.0 + i, 1.0]) for i in range(8)]
    compare(runs, tmp_path / "report")
    assert [round(drawing.get_figwidth() * 100) for drawing in drawings] == [720, 360]  # pixels on a page
    for drawing in drawings:
        assert len({line.get_color() for line in drawing.axes[0].lines if line.get_label().startswith("Pre-")}) == 8
        for legend in drawing.legends:
            box = legend.get_window_extent()
            assert not any(box.overlaps(ax.get_window_extent()) for ax in drawing.axes)
            assert box.x0 >= 0 and box.x1 <= drawing.bbox.x1 and all(text.get_fontsize() >= 8 for text in legend.texts)


def test_every_change_of_a_run_is_drawn_and_named_and_no_names_overlap(tmp_path: Path, drawings: list[Figure]) -> None:
    info = starts({"steps": 2}, {"steps": 2}, {"steps": 6}, norm="layernorm")
    info["sessions"][1]["norm"] = "rmsnorm"
    run = write_run(tmp_path / "ln", [3.0, 2.0, 2.0, 2.0, 2.0], info=info, more={"param_norm": [1, 1, 1, 1, None]})
    compare([run], tmp_path / "report")
    for drawing in drawings:
        *_, legend = drawing.legends
        assert [text.get_text() for text in legend.texts] == [
            "step 2, ln: Pre-RMSNorm",
            "step 4, ln: Pre-LN, steps 6",
            "step 5, ln: first update left out",
        ]
        assert {line.get_xdata()[0] for line in drawing.axes[0].lines if len(line.get_xdata()) == 2} == {2, 4, 5}


@pytest.mark.usefixtures("undrawn")
def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / parent / "ln", [1.0]) for parent in "ab"]
    assert [row["name"] for row in compare(runs, tmp_path / "report")["runs"]] == [str(run) for run in runs]


@pytest.mark.usefixtures("undrawn")
def test_output_replaces_an_older_report_and_leaves_nothing_else(tmp_path: Path) -> None:
    ln = write_run(tmp_path / "ln", [1.0])
    for _ in range(2):
        compare([ln], tmp_path / "new" / "report")
    assert sorted(path.name for path in (tmp_path / "new" / "report").iterdir()) == [
        "report.html",
        "report.json",
        "report.png",
    ]
    assert compare([ln], tmp_path / "page.html")["files"]["png"] == str(tmp_path / "page.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "none is not a folder"),
        (["bare"], "bare has no config.json"),
        (["ln", "converted"], "converted holds no training (no metrics.jsonl)"),
        (["empty"], "empty/metrics.jsonl holds no training line"),
        (["evals"], "evals/metrics.jsonl holds no training line"),
        (["broken"], "broken/config.json is damaged: "),
        (["ln", "later"], "later has no step in common with the reference ln"),
        (["ln", "vit"], "the losses of vit are per image, those of the reference ln per token: compare runs of one"),
        (["ln", "./ln/"], "ln is named twice"),
        (["ln", "--reference=later"], "the reference later is not among the runs"),
        (["ln", "--out=ln/config.json"], "cannot write ln/config.json (File exists)"),
    ],
)
def test_errors_are_one_line_and_exit_status_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("ln"), [1.0])
    write_run(Path("later"), {7: 1.0}, "rmsnorm")
    write_run(Path("vit"), [1.0], unit="image")
    write_run(Path("empty"), [])
    write_run(Path("evals"), [], evals={1: 1.0})
    write_run(Path("converted"), [1.0])
    Path("converted/metrics.jsonl").unlink()
    write_run(Path("broken"), [1.0])
    Path("broken/config.json").write_text("{")
    Path("bare").mkdir()
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: main(arguments))
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.err.startswith(f"error: {message}") and captured.err.count("\n") == 1
    assert captured.out == "" and not Path("report").exists()


def test_command_prints_a_table_and_the_page_last_without_jax(tmp_path: Path) -> None:
    write_run(tmp_path / "ln", [1.0])
    program = (
        "import sys; from prenorm_jax.compare import main; main(sys.argv[1:]); "
        "assert not {'jax', 'flax', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "ln"), f"--out={tmp_path / 'report'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    lines = done.stdout.splitlines()
    assert lines[0].startswith("run") and lines[1].startswith("ln")
    assert lines[-1] == str(tmp_path / "report" / "report.html")


@pytest.mark.usefixtures("undrawn")
def test_the_unit_is_the_one_that_the_metrics_count(tmp_path: Path) -> None:
    images = write_run(tmp_path / "vit", [2.0, 1.0], unit="image", data={})
    frames = write_run(tmp_path / "frames", [2.0, 1.0], unit="frame", data={})
    for run, unit in ((images, "image"), (frames, "frame")):
        report = compare([run], tmp_path / "report")
        assert (report["unit"], report["runs"][0]["units_per_s"], report["runs"][0]["steps_per_s"]) == (unit, 150, 75)
        html = (tmp_path / "report" / "report.html").read_text()
        assert f"nats per {unit}." in html and f"steps/s = {unit}s/s ÷ batch_size." in html


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("suffix", ["html", "png", "json"])
def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path, suffix: str) -> None:
    ln, rms = write_run(tmp_path / "ln", [1.0]), write_run(tmp_path / "rms", [2.0], "rmsnorm")
    out = tmp_path / "report"
    compare([ln], out)
    (out / f"report.{suffix}").unlink()
    (out / f"report.{suffix}").mkdir()
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with pytest.raises(
        PrenormError, match=rf"cannot write .*report\.{suffix} \(Is a directory\): choose another --out"
    ):
        compare([ln, rms], out)
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before and len(before) == 2


def test_a_table_in_its_three_forms() -> None:
    rows = [["", "largest |Δ\N{NO-BREAK SPACE}loss|"], ["<b>", "1"]]
    assert table.to_text(rows) == "     largest |Δ\N{NO-BREAK SPACE}loss|\n<b>  1"
    assert table.to_markdown(rows) == (
        "|     | largest |Δ\N{NO-BREAK SPACE}loss| |\n|-----|------------------|\n| <b> | 1                |"
    )
    html = table.to_html(rows)
    assert "<th><span>largest</span> <span>|Δ\N{NO-BREAK SPACE}loss|</span></th>" in html  # breaks between words alone
    assert "<td>&lt;b&gt;</td>" in html and "<b>" not in html


def test_what_makes_a_page_escapes_it() -> None:
    made = page.page(
        "<1>", [page.heading("<2>"), page.paragraphs(["<3>"], "quiet"), page.picture(b"", b"", '"<4>', "<5>")]
    )
    assert not re.search(rb"<\d>", made) and all(b"&lt;%d&gt;" % number in made for number in range(1, 6))
    assert b'alt="&quot;&lt;4&gt;"' in made


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (2.14e-5, "2.1×10⁻⁵"),
        (9.96e-4, "0.0010"),
        (0.03, "0.030"),
        (0.674, "0.67"),
        (22.4, "22"),
        (512.0, "5.1×10²"),
    ],
)
def test_small_numbers_in_two_digits(value: float, text: str) -> None:
    assert two_digits(value) == text


def test_flat_keys() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [{}]}, "e": None}) == {"a.b.c": 1, "a.d": [{}], "e": None}


def test_the_demo_fails_where_what_it_shows_is_not_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PrenormError, match=r"train\.py is not here"):
        demo.main([f"--workdir={tmp_path}"])
    row = {"relation": "follows {} closely", "final_eval_loss": 1.0, "max_abs_delta": 1e-6}
    rows = dict.fromkeys(demo.NORMS, row)
    demo.conclude(Path("report.html"), rows, expected=1.0, worst=1e-7, seconds=1)
    with pytest.raises(PrenormError, match=r"held-out loss differs by 1\.0e-04"):
        demo.conclude(Path("report.html"), rows, expected=1.0, worst=1e-4, seconds=1)
    departed = rows | {"crmsnorm": row | {"relation": "follows {}"}}
    with pytest.raises(PrenormError, match=r"crmsnorm departs from the Pre-LN curve: see report\.html"):
        demo.conclude(Path("report.html"), departed, expected=1.0, worst=1e-7, seconds=1)
