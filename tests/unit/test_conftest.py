"""What tests share: a program's signals end with its test."""

import signal

from demo.server import leave_on_signals

BEFORE = signal.getsignal(signal.SIGTERM)


def test_a_program_takes_signals_over() -> None:
    leave_on_signals()
    assert signal.getsignal(signal.SIGTERM) is not BEFORE


def test_the_next_test_has_them_back() -> None:
    assert signal.getsignal(signal.SIGTERM) is BEFORE
