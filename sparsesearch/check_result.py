"""What the gate found: figures against their bounds, for people, for CI annotations and as JUnit XML."""

from dataclasses import dataclass
from xml.etree import ElementTree

from pydantic import BaseModel, ConfigDict, Field

from sparsesearch.errors import RegressionError
from sparsesearch.evaluate import Metrics
from sparsesearch.evaluate.task_metrics import SAYS_LITTLE_BELOW


class Thresholds(BaseModel):
    """What a plan must hold. The first three are relative to dense, measured in the same job; None asks for nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    recovery: float | None = Field(
        0.98, gt=0, le=1, description="least needle accuracy / dense's, and least dense loss / the plan's"
    )
    max_kl: float | None = Field(None, gt=0, description="most KL(dense ‖ plan) over all positions, nats")
    max_slowdown: float | None = Field(None, gt=0, description="most prefill time / dense's")
    num_errors: float = Field(
        2.0, ge=0, description="how many standard errors of the difference a figure may be worse than its baseline"
    )


@dataclass(frozen=True)
class CheckRow:
    """One figure against its bound.

    Attributes:
        figure: what was measured.
        length_tokens: at which length.
        measured: its value.
        bound: what it is held against.
        at_least: whether the value must be at least (True) or at most (False) the bound.
        reason: where the bound comes from.
    """

    figure: str
    length_tokens: int
    measured: float
    bound: float
    at_least: bool
    reason: str

    @property
    def passed(self) -> bool:
        """Whether the bound holds."""
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    @property
    def name(self) -> str:
        """Unique within a check."""
        return f"{self.figure} at {self.length_tokens} tokens, {self.reason}"

    def __str__(self) -> str:
        relation = ">=" if self.at_least else "<="
        return f"{self.name}: {self.measured:.4g} {relation} {self.bound:.4g} {'holds' if self.passed else 'DOES NOT HOLD'}"


@dataclass(frozen=True)
class CheckResult:
    """Every figure that was held against a bound, and the metrics behind them."""

    rows: tuple[CheckRow, ...]
    metrics: Metrics

    @property
    def failed(self) -> tuple[CheckRow, ...]:
        """What regressed."""
        return tuple(row for row in self.rows if not row.passed)

    @property
    def passed(self) -> bool:
        """Whether every bound holds."""
        return not self.failed

    @property
    def needles_say_little(self) -> bool:
        """Whether dense itself answers the needles so seldom, at every length, that a plan's share of that means nothing."""
        cells = [self.metrics.at(length, "dense") for length in self.metrics.lengths_tokens]
        return all(cell.needle.mean < SAYS_LITTLE_BELOW for cell in cells)

    def raise_if_failed(self) -> None:
        """Turn a regression into an error (exit code 4).

        Raises:
            RegressionError: names every bound that does not hold.
        """
        if self.failed:
            lines = "\n".join(f"  {row}" for row in self.failed)
            raise RegressionError(
                f"{len(self.failed)} of {len(self.rows)} bounds do not hold:\n{lines}\n"
                "Search again, loosen the bound, or record a new baseline with `sparsesearch eval`."
            )

    def annotations(self, file: str = "") -> list[str]:
        """GitHub workflow commands, one `::error` per regression and a `::notice` when there is none.

        Args:
            file: the plan's path in the repository, so that the annotation shows on it.
        """
        place = f"file={_property(file)}," if file else ""
        if self.passed:
            return [f"::notice {place}title=sparsesearch check::{_message(f'all {len(self.rows)} bounds hold')}"]
        return [
            f"::error {place}title={_property('sparsesearch: ' + row.figure)}::{_message(str(row))}"
            for row in self.failed
        ]

    def junit_xml(self) -> str:
        """The rows as a JUnit test suite, one test case each."""
        suite = ElementTree.Element(
            "testsuite",
            name="sparsesearch check",
            tests=str(len(self.rows)),
            failures=str(len(self.failed)),
            errors="0",
            skipped="0",
        )
        for row in self.rows:
            case = ElementTree.SubElement(suite, "testcase", classname="sparsesearch.check", name=row.name, time="0")
            if not row.passed:
                failure = ElementTree.SubElement(case, "failure", type="regression", message=str(row))
                failure.text = str(row)
        root = ElementTree.Element("testsuites")
        root.append(suite)
        ElementTree.indent(root)
        return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _message(text: str) -> str:
    """Escape a workflow command's message."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    """Escape a workflow command's property."""
    return _message(text).replace(":", "%3A").replace(",", "%2C")
