"""An error of any library as one line."""

import pytest

from fewstep.samplers.errors import UserError, one_line, reason


def test_a_reason_is_the_first_line_that_says_something():
    assert reason(ValueError("\n  \n  no such layer \nand a traceback")) == "no such layer"
    assert reason(OSError()) == "OSError"


@pytest.mark.parametrize(
    ("error", "said"),
    [(OSError(), "x: OSError"), (KeyError("k"), "x: KeyError: 'k'"), (UserError("as it is"), "as it is")],
)
def test_one_line_says_what_and_why(error: Exception, said: str):
    with pytest.raises(UserError) as caught, one_line("x"):
        raise error
    assert str(caught.value) == said
