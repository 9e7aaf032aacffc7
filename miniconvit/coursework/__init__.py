"""A coursework kit: blanks cut out of the library, graded by gradient checks.

`create` makes it, `grade_exercise` and `grade_submission` judge, `grade` judges a folder of
submissions, `pack` makes a submission; `EXERCISES` is the table of what there is to write.
"""

from ..errors import printable
from .create import create
from .exercises import EXERCISES, exercises
from .grading import (
    autograde,
    grade,
    grade_exercise,
    grade_submission,
    load_assignment,
    submissions_in,
)
from .sandbox import walls
from .submission import pack, read_submission, read_work
from .work import packed, row
