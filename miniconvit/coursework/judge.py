"""What is right, what is wrong, and what the mistake looks like."""

from dataclasses import dataclass
from math import isclose, sqrt

import numpy as np

from .runner import MISSING, PRINTING, Broken, Failure, Other
from .task import Exercise

TOLERANCE = {"float64": 1e-8, "float32": 1e-4}  # of the largest entry; one float32 step is 6e-8


@dataclass(frozen=True)
class Row:
    """One named tensor of one unit: right in every case, or what is wrong in the first that fails.

    is_free: also right where nothing was written, so it earns nothing by itself. is_plain: the
    complaint shows nothing of the inputs, nor what the student's code says of them.
    """

    unit: str
    tensor: str
    complaint: str = ""
    is_free: bool = False
    is_plain: bool = False

    @property
    def ok(self):
        return not self.complaint


BLANK = "NotImplementedError"  # what a blank raises


@dataclass(frozen=True)
class Result:
    """One exercise of one student: rows of tensors, or the problem because of which none was run.

    printed: the beginning of what the student's code printed. remark: what was left out of it.
    """

    exercise: Exercise
    rows: tuple[Row, ...] = ()
    problem: str = ""
    printed: str = ""
    remark: str = ""

    @property
    def score(self):
        """Points: every tensor counts alike. What is right without any work counts only in a unit
        of which something else is right."""
        earned = {row.unit for row in self.rows if row.ok and not row.is_free}
        right = sum(row.ok and row.unit in earned for row in self.rows)
        return round(self.exercise.points * right / max(len(self.rows), 1), 2)

    @property
    def is_full(self):
        return self.score == self.exercise.points

    @property
    def text(self):
        """What to tell the student: a line per wrong tensor."""
        if self.problem or self.is_blank:
            return self.problem or "not written yet"
        wrong = [row for row in self.rows if not row.ok]
        units = {row.unit: [r for r in wrong if r.unit == row.unit] for row in wrong}
        lines = [] if wrong else [f"all {len(self.rows)} tensors are right"]
        for unit, rows in units.items():
            if len(rows) > 1 and len({row.complaint for row in rows}) == 1:
                lines.append(f"{unit}: {rows[0].complaint} ({len(rows)} tensors lost)")
            else:
                lines += [f"{unit}, {row.tensor}: {row.complaint}" for row in rows]
        if wrong and self.printed.strip():
            lines.append(f"printed: {self.printed.strip()[:500]}")
        return "\n".join([*lines, *[self.remark] * bool(self.remark)])

    @property
    def is_blank(self):
        """Whether nothing is written."""
        return bool(self.rows) and all(row.complaint.startswith(BLANK) for row in self.rows)

    @property
    def brief(self):
        """The same of hidden tests, for the student: which tensors, but not on which inputs."""
        if self.is_blank:
            return self.text
        lines = []
        for name in dict.fromkeys(row.unit for row in self.rows):
            rows = [row for row in self.rows if row.unit == name]
            said = {row: _plainly(row) for row in rows if not row.ok}
            lines += sorted({f"{name}: {sentence}" for sentence in said.values() if sentence})
            wrong = [row for row, sentence in said.items() if not sentence]
            tensors = ", ".join(row.tensor for row in wrong)
            if wrong and all(row.complaint.startswith(BLANK) for row in wrong):
                lines.append(f"{name}: not written yet ({tensors})")
            elif wrong:
                lines.append(f"{name}: wrong in {tensors}")
        return "\n".join(lines) or self.text


def _plainly(row):
    """What a student may read of a hidden test's complaint, or "".

    The student's process may have made it up, so no more than a fixed sentence is passed on.
    """
    if row.is_plain:
        return row.complaint
    missing = [MISSING.format(f"{row.unit}_{way}") for way in ("forward", "backward")]
    if row.complaint in missing:
        return row.complaint
    return PRINTING if row.complaint.startswith(PRINTING) else ""


def judge(call, unit, drawn):
    """The Rows of a unit on these Cases. call(name, *args) runs a function of the student's."""
    ledger = _Ledger(unit)
    for case in drawn:
        _announce(unit, case, ledger)
    ledger.add("arguments", "")
    try:
        for case in drawn:
            _judge_case(call, unit, case, ledger)
        _judge_arguments(call, drawn[0], ledger)
    except Failure as error:
        ledger.blame(ledger.stage, str(error))
    except Broken as error:
        ledger.blame("", str(error))
        ledger.plain.add(str(error))
    return ledger.rows()


class _Ledger:
    """Tensor to its first complaint, "" while there is none."""

    def __init__(self, unit):
        self.unit, self.stage, self.plain = unit, "", set()
        self.complaints, self.changed = {}, ""
        self.free, self.gradients = {"arguments"}, {"arguments"}

    def blame(self, stage, sentence):
        """All tensors that are right so far, or at the stage "backward" all gradients, fail."""
        for name in self.complaints:
            if stage != "backward" or name in self.gradients:
                self.add(name, sentence)

    def add(self, name, complaint):
        self.complaints[name] = self.complaints.get(name) or complaint

    def rows(self):
        return [
            Row(
                self.unit.name,
                name,
                self._explained(complaint),
                name in self.free,
                complaint in self.plain,
            )
            for name, complaint in self.complaints.items()
        ]

    def _explained(self, complaint):
        """The complaint, with the change in place that may be its cause."""
        is_likely = any(words in complaint for words in (NEARLY, AGAIN))
        return f"{complaint}; {self.changed}" if self.changed and is_likely else complaint


def _judge_case(call, unit, case, ledger):
    """Forward and backward; both for other inputs in between; backward once more on the first."""
    first, second = case.first, case.second
    ledger.stage = ""
    if not unit.gradients:
        for draw, remark in ((first, ""), (second, ""), (first, AGAIN)):
            _compare(ledger, call(unit.forward, *draw.args), draw.y, None, case, (), remark)
        return
    y, kept = call(unit.forward, *first.args)
    _compare(ledger, y, first.y, None, case, unit.outputs)
    ledger.stage = "backward"
    got = call(unit.backward, first.dy, kept)
    _compare(ledger, got, first.gradients, first.of_first_image, case, unit.gradients)
    ledger.stage = ""
    y, other = call(unit.forward, *second.args)
    _compare(ledger, y, second.y, None, case, unit.outputs)
    ledger.stage = "backward"
    got = call(unit.backward, first.dy, kept)
    _compare(ledger, got, first.gradients, None, case, unit.gradients, AGAIN)
    got = call(unit.backward, second.dy, other)
    _compare(ledger, got, second.gradients, second.of_first_image, case, unit.gradients)


AGAIN = (
    "right at first, wrong when it runs again after other inputs: it changes what was kept, "
    "or leans on something outside its arguments"
)
NEARLY = "nearly right"


def _announce(unit, case, ledger):
    """Enters the tensors of the case, so that they count however the student's code ends."""
    for draw in (case.first, case.second):
        outputs = named(draw.y, unit.outputs if unit.gradients else ())
        gradients = named(draw.gradients, unit.gradients)
        for name, expected in (outputs | gradients).items():
            ledger.complaints.setdefault(name, "")
            if not np.any(expected):
                ledger.free.add(name)
        ledger.gradients |= set(gradients)


def _judge_arguments(call, case, ledger):
    try:
        for function, position in call("changed_arguments"):
            name = case.parameters[function][position]
            ledger.changed = ledger.changed or f"{function} changes its argument {name} in place"
            ledger.add("arguments", ledger.changed)
            ledger.plain.add(ledger.changed)
    except (TypeError, ValueError, LookupError, AttributeError):
        ledger.add("arguments", "the process answered with something else")


def named(value, names):
    """{name: array} of what a function returned; names ("dx", "grads"): grads is a dict."""
    if value is None and not names:
        return {}
    if len(names) == 1:
        value = (value,)
    if isinstance(value, dict) and not names:
        return dict(value)
    if not isinstance(value, tuple | list) or len(value) != len(names):
        return {}
    arrays = {}
    for name, item in zip(names, value, strict=True):
        if isinstance(item, dict):
            arrays |= {f'{name}["{key}"]': array for key, array in item.items()}
        elif item is not None:
            arrays[name] = item
    return arrays


def _compare(ledger, got, expected, of_first_image, case, names, remark=""):
    """Enters a complaint for every tensor that is missing or wrong."""
    right, got = named(expected, names), named(got, names)
    first = named(of_first_image, names) if of_first_image is not None else {}
    for name, array in right.items():
        complaint = ""
        if name not in got:
            complaint = f"missing: {', '.join(names or right)} must be returned"
        else:
            others = {other: a for other, a in right.items() if other != name}
            complaint = complain(got[name], array, case.size, first.get(name), others)
            complaint = complaint and (remark or complaint)
        ledger.add(name, complaint and f"{complaint} [{case.size}]")


def complain(got, expected, size, of_first_image=None, others=()):
    """What is wrong with one tensor, with its error and a hint, or "" where it is right."""
    expected = np.asarray(expected)
    if isinstance(got, Other):
        return f"is {got.kind}, not an array of numbers"
    if not isinstance(got, np.ndarray | np.generic | int | float):
        return f"is of type {type(got).__name__}, not an array"
    is_array, got = isinstance(got, np.ndarray | np.generic), np.asarray(got)
    if got.shape != expected.shape:
        return _misshapen(got, expected, size)
    if got.dtype == object:
        return "is an integer beyond 64 bits"
    if not np.all(np.isfinite(got)):
        return f"not finite in {np.sum(~np.isfinite(got))} of {got.size} entries"
    tolerance = TOLERANCE[size.dtype]
    error = float(np.max(np.abs(got - expected), initial=0.0)) / _scale(expected)
    if not error <= tolerance:  # NaN too: odd bytes of a longdouble are finite and equal nothing
        hint = _hint(got.astype(float), expected, size, of_first_image, dict(others))
        return f"error {error:.1e}; {hint}"
    if is_array and got.dtype != size.dtype:
        return f"is {got.dtype}, but the inputs are {size.dtype}: the dtype must be kept"
    return ""


def _scale(expected):
    """The largest entry; 1 where all are zero, so that an error is then absolute."""
    return float(np.max(np.abs(expected), initial=0.0)) or 1.0


def _close(a, b, tolerance=1e-6):
    return a.shape == b.shape and np.max(np.abs(a - b), initial=0.0) <= tolerance * _scale(b)


def _misshapen(got, expected, size):
    text = f"shape {got.shape} instead of {expected.shape}"
    tolerance = TOLERANCE[size.dtype]
    if got.shape == expected.shape[::-1] and _close(got.T, expected, tolerance):
        return f"{text}: equal up to transposition"
    if got.shape[1:] == expected.shape and _close(got.sum(axis=0), expected, tolerance):
        return f"{text}: not summed over the first axis"
    if got.size == expected.size and _close(got.reshape(expected.shape), expected, tolerance):
        return f"{text}: a reshape is missing"
    return text


def _hint(got, expected, size, of_first_image, others):
    """The first known mistake that explains the difference; else where it lies."""
    tolerance = 10 * TOLERANCE[size.dtype]
    if not np.any(got):
        return "zero everywhere"
    if not np.any(expected):
        return "it should be exactly zero"
    if _close(got, expected, tolerance):  # all that follows would hold, of whatever is left
        return _place(got, expected, size)
    factor = float((got * expected).sum() / (expected * expected).sum())
    if _close(got, factor * expected, tolerance):
        return _factor(factor, size, tolerance)
    if expected.ndim > 1 and _close(got.swapaxes(-1, -2), expected, tolerance):
        return "equal up to transposition"
    for name, other in others.items():
        if _close(got, np.asarray(other), tolerance):
            return f"this is the right {name}: are the two exchanged?"
    if of_first_image is not None and _close(got, of_first_image, tolerance):
        return "the contribution of the first image alone: sum over the images"
    if expected.ndim > 2 and len(expected) == size.B > 1 and _close(got[0], expected[0], tolerance):
        return "right for the first image only"
    if _close(np.sort(got, axis=None), np.sort(expected, axis=None), tolerance):
        return "the right numbers in the wrong places: check axes and order"
    if _close(got, expected - expected.mean(), tolerance):
        return "right up to a constant"
    return _place(got, expected, size)


def _place(got, expected, size):
    """Where it is wrong, and how much it looks like the right one."""
    wrong = np.abs(got - expected) > TOLERANCE[size.dtype] * _scale(expected)
    cosine = float((got * expected).sum() / sqrt((got * got).sum() * (expected * expected).sum()))
    index = ", ".join(map(str, np.argwhere(wrong)[0]))
    place = f"{wrong.sum()} of {wrong.size} entries wrong, the first at [{index}]"
    if cosine > 0.9999:
        return f"{NEARLY}, {place}: is a constant rounded, or a formula an approximation?"
    return f"{place}; cosine with the right one {cosine:.3f}: a term is missing or wrong"


def _factor(factor, size, tolerance):
    """A sentence on got = factor * expected."""
    if f"{factor:.6g}" == "1":
        return f"{NEARLY}, all of it too {'large' if factor > 1 else 'small'} by the same factor"
    if isclose(factor, -1.0, rel_tol=tolerance):
        return "exactly the right value with the opposite sign"
    named_sizes = {
        "the batch size": size.B,
        "the number of tokens": size.N,
        "images times tokens": size.B * size.N,
        "the root of the head width": sqrt(size.d),
        "the head width": size.d,
        "the number of classes": size.C,
    }
    for name, value in named_sizes.items():
        if value > 1 and isclose(factor, value, rel_tol=tolerance):
            return f"exactly {value:.6g} times the right value; {value:.6g} is {name}"
        if value > 1 and isclose(factor, 1 / value, rel_tol=tolerance):
            mean = ": a mean where a sum belongs?" if "root" not in name else ""
            return f"exactly 1 / {value:.6g} of the right value; {value:.6g} is {name}{mean}"
    return f"exactly {factor:.6g} times the right value"
