"""A search for a failing program by hypothesis, and its shrinking."""

from __future__ import annotations

import collections
from collections.abc import Collection, Sequence
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase

from .generate import KINDS, programs
from .worker import Worker


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
    ) -> None:
        self.strategy = programs(families, depth, kinds)
        self.worker = Worker(limit)
        #: How many programs were compared, looped, no case, or failed.
        self.counts: collections.Counter[str] = collections.Counter()
        self.no_case: collections.Counter[str] = collections.Counter()
        self.warned: dict[str, str] = {}
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
        verdict = self.worker.run(program)
        if self.failing is None:  # shrinking does not count
            kind = "no case" if verdict.no_case else "looped" if verdict.warnings else "compared"
            self.counts["failed" if verdict.failure else kind] += 1
            if verdict.no_case:
                self.no_case[verdict.no_case[:70]] += 1
            for said in verdict.warnings:
                self.warned.setdefault(said[:200], program)
        if verdict.failure:
            if self.failing is None or len(program) <= len(self.failing[0]):
                self.failing = program, verdict.failure
            raise Failing(verdict.failure)
