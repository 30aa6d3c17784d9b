"""A stop by Ctrl-C is acknowledged at once; a second one stops without waiting for the step."""

import signal

import pytest

from sdpo_kernels.stepwise.training.callbacks import StopOnSignal


def test_the_first_ctrl_c_says_what_happens_and_the_second_stops_at_once():
    said = []
    stop = StopOnSignal(said.append)
    with stop.installed():
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        assert said == ["stopping after this step, which is saved; Ctrl-C again stops at once, without saving"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert len(said) == 1
