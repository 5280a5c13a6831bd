from ilvr_ds.errors import nearest


def test_a_misspelt_name_gets_the_closest_valid_one() -> None:
    assert nearest("optin", ["optim", "option_list", "train"]) == "; did you mean 'optim'?"


def test_a_name_like_no_other_gets_the_sorted_list() -> None:
    assert nearest("xyz", ["train", "data"]) == "; valid: data, train"


def test_without_valid_names_there_is_no_hint() -> None:
    assert nearest("x", []) == ""
