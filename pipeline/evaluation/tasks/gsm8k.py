"""GSM8K (Cobbe et al., arXiv 2110.14168): word problems whose answer is a number.

The references are the file's own answers, which end in ``#### NUMBER``. The model either writes a program,
whose value is compared (TinyGSM, arXiv 2312.09241), or a text that ends in the number.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from decimal import Decimal

from pipeline.base.errors import UserError
from pipeline.corpus.records import Document
from pipeline.evaluation.sandbox import Sandbox
from pipeline.evaluation.tasks.task import Item, Task, Verdict

MARK = "####"
TOLERANCE = Decimal("1e-6")  # relative: a program that computes in binary fractions gets 17.999999999999996
# A sign, before or after the currency, is one where no operand stands before it: 10-5 ends in 5.
_NUMBER = re.compile(
    r"(?:(?<![\w.)])(?P<sign>[-−])\s?)?(?:[$€£¥]\s?(?P<inner>[-−])?)?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)",
    re.ASCII,
)
_FENCE = re.compile(r"```[a-z]*\n(.*?)(?:```|\Z)", re.DOTALL)


def final_number(text: str) -> Decimal | None:
    """Return the first number behind the last ``####`` of a text, or else its last number.

    Thousands separators, currencies, units, a full stop at the end and zeros that do not count are left out.
    """
    _, mark, behind = text.rpartition(MARK)
    found = list(_NUMBER.finditer(behind))
    if not found:
        return None
    number = found[0] if mark else found[-1]
    value = Decimal(number["digits"].replace(",", ""))
    return -value if number["sign"] or number["inner"] else value


class _Gsm8k(Task):
    """The public files' records; see there for what tells their kinds apart."""

    keys = ("question", "answer")

    def check(self, item: Item, record: Document, before: Sequence[Item]) -> None:
        """See `Task`."""
        if MARK not in item.reference or final_number(item.reference) is None:
            raise UserError(
                f"{record.place}: the answer does not end in '{MARK} NUMBER', as GSM8K's do. Mend or remove "
                "the record."
            )


class FinalNumber(_Gsm8k):
    """The number that a text ends in equals the reference's."""

    def score(self, item: Item, answer: str) -> Verdict:
        """See `Task`."""
        found = final_number(answer)
        return Verdict(found == final_number(item.reference), "no number" if found is None else str(found))


class Program(_Gsm8k):
    """The answer is a Python program; the value of its function equals the reference, to 1e-6 of it."""

    def __init__(self) -> None:
        """Start the sandbox.

        Raises:
            UserError: on a machine that has none.
        """
        self.parallel = max(1, min(8, len(os.sched_getaffinity(0))))
        self.sandbox = Sandbox(servers=self.parallel)

    def score(self, item: Item, answer: str) -> Verdict:
        """See `Task`."""
        fenced = _FENCE.search(answer)
        outcome = self.sandbox.run(fenced[1] if fenced else answer)
        if outcome.value is None:
            return Verdict(False, outcome.error or "")
        reference = final_number(item.reference)
        assert reference is not None
        return Verdict(is_close(outcome.value, reference), outcome.value[:200])

    def close(self) -> None:
        """See `Task`."""
        self.sandbox.close()


def is_close(value: str, reference: Decimal) -> bool:
    """Say whether a value that a program gave, as text, is the reference's number."""
    try:
        number = Decimal(value)
        return number.is_finite() and abs(number - reference) <= TOLERANCE * max(Decimal(1), abs(reference))
    except ArithmeticError:  # no number, or one beyond all bounds, such as 1e9999999
        return False
