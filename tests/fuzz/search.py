"""A search for a failing program by hypothesis, and its shrinking."""

from __future__ import annotations

import collections
import hashlib
import re
import time
from collections.abc import Collection, Sequence
from typing import Any

import hypothesis
import hypothesis.internal.conjecture.engine
from hypothesis import HealthCheck, Phase

from .generate import KINDS, programs
from .worker import Worker, is_empty

SHRINKING = 45  # seconds for one failure
_PULLED = re.compile("grad|vjp")

# Hypothesis repeats parts of what it has drawn, to find equal things: most of those programs are
# the same ones again, and take three quarters of the time.
_engine: Any = hypothesis.internal.conjecture.engine.ConjectureRunner
if hasattr(_engine, "generate_mutations_from"):
    _engine.generate_mutations_from = lambda *_: None


class Failing(AssertionError):
    """A program differs from the loop."""


class Search:
    """Runs programs until one fails, and makes that one small."""

    def __init__(
        self,
        families: Collection[str] = (),
        depth: int = 4,
        limit: float = 60,
        kinds: Sequence[str] = KINDS,
        may_hang: bool = True,
    ) -> None:
        """Without `may_hang`, no derivatives of empty arrays: MLX's kernel may not end."""
        self.strategy = programs(families, depth, kinds)
        self.worker = Worker(limit)
        self.may_hang = may_hang
        #: How many programs were compared, looped, no case, or failed.
        self.counts: collections.Counter[str] = collections.Counter()
        self.no_case: collections.Counter[str] = collections.Counter()
        self.warned: dict[str, str] = {}
        #: Digests of the programs that were run: how many of them are different.
        self.seen: set[str] = set()
        #: When what fails is small enough.
        self.shrinks_until = 0.0
        #: The smallest failing program, and what is wrong with it.
        self.failing: tuple[str, str] | None = None

    def run(self, count: int, seed: int | None = None) -> None:
        """Up to `count` programs; without a seed always the same ones."""
        settings = hypothesis.settings(
            max_examples=count,
            database=None,
            deadline=None,
            derandomize=seed is None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            verbosity=hypothesis.Verbosity.quiet,
            report_multiple_bugs=False,
        )

        def test(program: str) -> None:
            self._judge(program)

        decorated: Any = settings(hypothesis.given(self.strategy)(test))
        if seed is not None:
            decorated = hypothesis.seed(seed)(decorated)
        try:
            decorated()
        except Exception:  # Failing, or hypothesis' words about it
            if self.failing is None:
                raise
        finally:
            self.worker.close()

    def _judge(self, program: str) -> None:
        wanted = self.failing is None or program == self.failing[0]
        if not wanted and time.monotonic() > self.shrinks_until:
            return  # hypothesis would go on for minutes
        digest = hashlib.sha256(program.encode()).hexdigest()[:12]
        if self.failing is None and digest in self.seen:
            return
        if not self.may_hang and is_empty(program) and _PULLED.search(program):
            return
        verdict = self.worker.run(program)
        if self.failing is None:  # shrinking does not count
            kind = "no case" if verdict.no_case else "looped" if verdict.warnings else "compared"
            self.counts["failed" if verdict.failure else kind] += 1
            self.seen.add(digest)
            if verdict.no_case:
                self.no_case[verdict.no_case[:70]] += 1
            for said in verdict.warnings:
                self.warned.setdefault(said[:200], program)
        if verdict.failure:
            if self.failing is None:
                self.shrinks_until = time.monotonic() + SHRINKING
            if self.failing is None or len(program) <= len(self.failing[0]):
                self.failing = program, verdict.failure
            raise Failing(verdict.failure)
