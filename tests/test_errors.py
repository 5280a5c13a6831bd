import pytest

from ilvr_ds.data.members import MemberError
from ilvr_ds.data.sample import SampleError
from ilvr_ds.errors import RunError, UserError, counted, first_line, nearest


@pytest.mark.parametrize("kind", [UserError, RunError, SampleError, MemberError])
def test_a_message_is_one_line_that_can_be_printed(kind: type[Exception]) -> None:
    """A value quoted from a file, with a line feed, an escape sequence and half a character in it."""
    error = kind("unknown type 'te\nxt\x1b[2J\ud800'; step 2 × 3")
    assert str(error) == r"unknown type 'te\nxt\x1b[2J\ud800'; step 2 × 3"
    str(error).encode()


def test_a_misspelt_name_gets_the_closest_valid_one() -> None:
    assert nearest("optin", ["optim", "option_list", "train"]) == "; did you mean 'optim'?"


def test_an_error_that_says_nothing_is_named() -> None:
    """Catches a message of which the first line is taken though there is none."""
    assert [first_line(OSError(text)) for text in ("", "\n", " no room\r\non disk")] == [
        "OSError",
        "OSError",
        "no room",
    ]


def test_one_is_one() -> None:
    assert [counted(n, "rank") for n in (0, 1, 2)] == ["0 ranks", "1 rank", "2 ranks"]


def test_a_name_like_no_other_gets_the_sorted_list() -> None:
    assert nearest("xyz", ["train", "data"]) == "; valid: data, train"


def test_without_valid_names_there_is_no_hint() -> None:
    assert nearest("x", []) == ""
