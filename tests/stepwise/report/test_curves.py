"""What the pictures of a run draw: curves over steps, bars by stage."""

import math

import numpy as np
import pytest

from sdpo_kernels.stepwise.report import curves, drawing, pictures
from sdpo_kernels.stepwise.report.curves import Curves
from tests.stepwise.report.folders import all_lines, line, stage


@pytest.fixture(autouse=True)
def _style():
    with drawing.picture_style():
        yield


def drawn(figure) -> list[list[list[float]]]:
    """The points of every line in the figure."""
    return [curve.get_xydata().tolist() for curve in figure.axes[0].get_lines()]


def test_loss_picture_shows_what_was_logged():
    stages = [stage(1, "easy"), stage(2, "hard", loss="ipo")]
    lines = [*all_lines(2), line(2, 8, eval_loss=0.3)]
    figure = curves.loss_picture(Curves(stages, lines, {1: math.log(2)}))
    assert figure is not None
    ax = figure.axes[0]
    assert [[8 + step, line(2, step)["loss"]] for step in range(1, 9)] in drawn(figure)
    assert [[16.0, 0.3]] in drawn(figure)
    assert len(drawn(figure)) == 4, "two stages, one evaluation, the rule between the stages"
    (level,) = [segment.tolist() for lines in ax.collections for segment in lines.get_segments()]
    assert level == [[0, math.log(2)], [8, math.log(2)]]
    assert {"1 easy", "2 hard", "0.693"} <= {text.get_text() for text in ax.texts}


def test_the_mean_starts_at_the_first_value_and_never_looks_ahead():
    values = np.array([1.0, 2.0, 6.0, 3.0, 10.0])
    assert curves.mean_so_far(values, 3).tolist() == pytest.approx([1.0, 1.5, 3.0, 11 / 3, 19 / 3])
    assert curves.mean_so_far(values, 1).tolist() == values.tolist()
    later = values + np.array([0, 0, 0, 100.0, 100.0])
    assert curves.mean_so_far(later, 3)[:3].tolist() == curves.mean_so_far(values, 3)[:3].tolist()


def test_long_stages_are_smoothed_over_a_tenth_each_from_its_own_start():
    def run(steps):
        lines = [
            {"stage/index": i, "step": s, "stage/global_step": steps * (i - 1) + s, "loss": float(10 * i + s % 2)}
            for i in (1, 2)
            for s in range(1, steps + 1)
        ]
        return Curves([stage(1, "a"), stage(2, "b")], lines, {})

    assert run(39).window == 1
    assert run(200).window == 20
    figure = curves.loss_picture(run(40))
    assert figure is not None
    starts = [points[0] for points in drawn(figure) if len(points) == 40]
    assert starts == [[1, 11.0], [1, 11.0], [41, 21.0], [41, 21.0]], "raw and smoothed, in both stages"


def test_a_thinned_curve_keeps_its_ends_and_its_extremes():
    y = np.sin(np.arange(20_000.0))
    y[7_777], y[12_345] = 9.0, -9.0
    x, thin = curves.thinned(np.arange(20_000.0), y)
    assert len(x) <= curves.MOST_POINTS + 2
    assert (x[0], x[-1], thin.max(), thin.min()) == (0, 19_999, 9.0, -9.0)
    assert np.array_equal(thin, y[x.astype(int)])
    assert (np.diff(x) > 0).all()


@pytest.mark.parametrize(
    ("logged", "shown"),
    [
        ({"rewards/accuracies": 0.0, "rewards/ties": 1.0}, 0.5),
        ({"rewards/accuracies": 0.25, "rewards/ties": 0.5}, 0.5),
        ({"rewards/accuracies": 0.75, "rewards/ties": 0.0}, 0.75),
        # of an earlier version: no pair is right and the mean margin is 0, so all are equal
        ({"rewards/accuracies": 0.0, "rewards/margins": 0.0}, 0.5),
        ({"rewards/accuracies": 0.0, "rewards/margins": -0.1}, 0.0),
        ({"rewards/accuracies": math.nan}, None),
    ],
)
def test_a_tie_is_no_error(logged, shown):
    assert curves.half_ties(logged) == shown
    figure = curves.accuracy_picture(Curves([stage(1, "a")], [line(1, 1, **logged)], {}))
    assert (figure is None) == (shown is None)
    if figure is not None:
        assert [[1.0, shown]] in drawn(figure)


def test_each_term_of_a_sum_has_a_picture():
    lines = [line(1, step, **{"loss": 3.0, "loss/sigmoid": 1.0, "loss/sft": 2.0, "loss/../x": 1.0}) for step in (1, 2)]
    run = Curves([stage(1, "a")], lines, {})
    figures = curves.term_pictures(run)
    assert set(figures) == {"loss_sigmoid", "loss_sft"}, "a name that leads out of the folder is left out"
    assert [[1.0, 2.0], [2.0, 2.0]] in drawn(figures["loss_sft"])
    assert curves.term_pictures(Curves([stage(1, "a")], all_lines(1), {})) == {}


def test_chosen_and_rejected_are_drawn_apart():
    logged = {"rewards/chosen": -0.5, "rewards/rejected": -1.5, "logps/chosen": -20.0, "logps/rejected": -30.0}
    run = Curves([stage(1, "a")], [line(1, 4, **logged)], {})
    rewards, logps = curves.reward_picture(run), curves.logps_picture(run)
    assert rewards is not None
    assert logps is not None
    assert [[4.0, -0.5]] in drawn(rewards)
    assert [[4.0, -1.5]] in drawn(rewards)
    assert {(4.0, -20.0), (4.0, -30.0)} == {tuple(points[0]) for points in drawn(logps)}
    assert [text.get_text() for text in logps.legends[0].get_texts()] == ["chosen", "rejected"]


def test_values_that_differ_little_are_not_bars_of_equal_height():
    stages = [stage(1, "a", gamma_reference=171.6), stage(2, "b", gamma_reference=172.2)]
    figure = pictures.reference_margin_picture(stages)
    assert figure is not None
    ax = figure.axes[0]
    assert {"171.6", "172.2"} <= {text.get_text() for text in ax.texts}
    assert 171 < ax.get_ylim()[0] < 171.6
    assert ax.get_ylabel() == "nat, axis not from 0"
    figure.canvas.draw()
    ticks = [label.get_text() for label in ax.get_yticklabels()]
    assert len(set(ticks)) == len(ticks) > 2

    far = pictures.reference_margin_picture([stage(1, "a", gamma_reference=1.0), stage(2, "b", gamma_reference=2.0)])
    assert far is not None
    assert far.axes[0].get_ylim()[0] == 0, "bars start at 0"


def test_values_of_models_can_be_told_apart():
    models = [(t, {"gamma": gamma}) for t, gamma in enumerate([171.6, 171.9, 172.2])]
    figure = pictures.eval_margin_picture(models)
    assert figure is not None
    assert [text.get_text() for text in figure.axes[0].texts] == ["171.6", "171.9", "172.2"]


def test_the_evaluation_has_reward_accuracy_and_log_probs():
    scores = {"pair_accuracy": 0.5, "reward_accuracy": 0.75, "logps_chosen": -3.0, "logps_rejected": -4.0}
    models = [(0, scores | {"reward_accuracy": None}), (1, scores)]
    accuracy, logps = pictures.eval_accuracy_picture(models), pictures.eval_logps_picture(models)
    assert accuracy is not None
    assert logps is not None
    assert drawn(accuracy) == [[[0, 0.5], [1, 0.5]], [[1, 0.75]]]
    assert drawn(logps) == [[[0, -3.0], [1, -3.0]], [[0, -4.0], [1, -4.0]]]
    assert pictures.eval_logps_picture([(0, {"gamma": 1.0})]) is None, "an earlier version did not record them"
