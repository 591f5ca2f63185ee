"""Processes that answer the tests: what has died is started anew, whatever it was asked."""

from __future__ import annotations

import signal

from processes import Process


def test_a_question_to_a_dead_process_is_no_error():
    process = Process("conformance.worker", "mlxshim")
    process.ask(["add", 10**6, -1])
    while process.line() != {"done": True}:
        pass
    assert process.process is not None
    process.process.kill()
    process.process.wait()
    process.ask(["add", 10**6, -1])
    assert process.line() == -signal.SIGKILL
    assert process.process is None
