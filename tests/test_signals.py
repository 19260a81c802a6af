"""SIGTERM and Ctrl-C: the first asks, the second acts."""

import os
import signal
import threading

import pytest

from llm_jax.runs.signals import stop_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_only_asks(number: int, capfd):
    before = signal.getsignal(number)
    with stop_signals() as asked:
        assert not asked(1)
        os.kill(os.getpid(), number)
        assert asked(1)
    assert signal.getsignal(number) == before
    assert "stopping after this step, with a checkpoint; once more stops at once" in capfd.readouterr().err


def test_a_second_ctrl_c_interrupts():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has none
    try:
        with stop_signals():
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_signals_are_left_alone():
    handlers = []

    def body() -> None:
        with stop_signals() as asked:
            handlers.append(signal.getsignal(signal.SIGINT))
            assert not asked(1)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]
