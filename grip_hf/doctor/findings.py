"""What the self-check tells."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

CHECKS = ("build", "prefill", "no cache", "dynamic cache", "static cache", "removal")
PASSED, ABSENT, FAILED = "passed", "absent", "failed"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: One of `CHECKS`.
        status: `PASSED`, `FAILED`, or `ABSENT` where transformers itself cannot do it with this model.
        error: Largest difference of a logit from the reference, if it came to that.
        allowed: How large it may be.
        message: What went wrong, or why it is absent.
    """

    check: str
    status: str
    error: float | None = None
    allowed: float | None = None
    message: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found about one family.

    Attributes:
        family: Its name.
        text: Type of its language model.
        attention: Attention implementation that ran.
        findings: One per check that was made.
        seconds: How long it took.
        note: What else there is to say.
    """

    family: str
    text: str
    attention: str
    findings: tuple[Finding, ...]
    seconds: float
    note: str = ""

    @property
    def failures(self) -> list[Finding]:
        """The findings that failed."""
        return [one for one in self.findings if one.status == FAILED]

    @property
    def passed(self) -> bool:
        """Whether nothing failed, and something passed."""
        return not self.failures and any(one.status == PASSED for one in self.findings)

    def finding(self, check: str) -> Finding | None:
        """The finding of one check, if it was made."""
        return next((one for one in self.findings if one.check == check), None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: figures that are not finite become None."""
        findings = [dataclasses.asdict(one) for one in self.findings]
        for one in findings:
            one.update({name: None for name in ("error", "allowed") if not math.isfinite(one[name] or 0)})
        return {**dataclasses.asdict(self), "findings": findings, "passed": self.passed}


def worst(findings: Iterable[Finding]) -> list[Finding]:
    """One finding per check: a failure before an absence, and the largest error."""
    order = (PASSED, ABSENT, FAILED)
    found: dict[str, Finding] = {}
    for one in findings:
        other = found.get(one.check)
        key = (order.index(one.status), one.error or 0)
        if other is None or key > (order.index(other.status), other.error or 0):
            found[one.check] = one
    return [found[check] for check in CHECKS if check in found]


def describe(error: BaseException) -> str:
    """The type and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
