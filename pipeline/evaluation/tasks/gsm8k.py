"""GSM8K (Cobbe et al., arXiv 2110.14168): word problems with a numeric answer.

References are the answers in the file, which end in ``#### NUMBER``. The model writes either a program, whose
value is compared (TinyGSM, arXiv 2312.09241), or a text that ends in the number.
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
TOLERANCE = Decimal("1e-6")  # relative: floating point gives 17.999999999999996
# A sign may precede or follow the currency. After an operand it is a minus: 10-5 ends in 5.
_NUMBER = re.compile(
    r"(?:(?<![\w.)])(?P<sign>[-−])\s?)?(?:[$€£¥]\s?(?P<inner>[-−])?)?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)",
    re.ASCII,
)
_FENCE = re.compile(r"```[a-z]*\n(.*?)(?:```|\Z)", re.DOTALL)


def final_number(text: str) -> Decimal | None:
    """Return the first number after the last ``####`` of a text, or without ``####`` the last number.

    Thousands separators, currencies, units and a final full stop are ignored.
    """
    _, mark, behind = text.rpartition(MARK)
    found = list(_NUMBER.finditer(behind))
    if not found:
        return None
    number = found[0] if mark else found[-1]
    value = Decimal(number["digits"].replace(",", ""))
    return -value if number["sign"] or number["inner"] else value


class _Gsm8k(Task):
    """Records of the public GSM8K files."""

    keys = ("question", "answer")

    def check(self, item: Item, record: Document, before: Sequence[Item]) -> None:
        if MARK not in item.reference or final_number(item.reference) is None:
            raise UserError(
                f"{record.place}: the answer does not end in '{MARK} NUMBER' as in GSM8K: fix or remove the "
                "record."
            )


class FinalNumber(_Gsm8k):
    """The final number of the answer must equal that of the reference."""

    def score(self, item: Item, answer: str) -> Verdict:
        found = final_number(answer)
        return Verdict(found == final_number(item.reference), "no number" if found is None else str(found))


class Program(_Gsm8k):
    """The answer is a Python program; the value of its function must equal the reference up to 1e-6."""

    def __init__(self) -> None:
        """Start the sandbox.

        Raises:
            UserError: on a machine without the required layers.
        """
        self.parallel = max(1, min(8, len(os.sched_getaffinity(0))))
        self.sandbox = Sandbox(servers=self.parallel)

    def score(self, item: Item, answer: str) -> Verdict:
        fenced = _FENCE.search(answer)
        outcome = self.sandbox.run(fenced[1] if fenced else answer)
        if outcome.value is None:
            return Verdict(False, outcome.error or "")
        reference = final_number(item.reference)
        assert reference is not None
        return Verdict(is_close(outcome.value, reference), outcome.value[:200])

    def close(self) -> None:
        self.sandbox.close()


def is_close(value: str, reference: Decimal) -> bool:
    """Return whether a program's value, given as text, equals the reference up to `TOLERANCE`.

    The value may be a fraction: 7/2 is what a program's `Fraction` is as text.
    """
    numerator, _, denominator = value.partition("/")
    try:
        number = Decimal(numerator) / Decimal(denominator or 1)
        return number.is_finite() and abs(number - reference) <= TOLERANCE * max(Decimal(1), abs(reference))
    except ArithmeticError:  # not a number, or out of range, such as 1e9999999
        return False
