"""Messages about bad input."""

import pickle

import pytest

from conjugo import errors
from conjugo.errors import CorruptFile, DataUnavailable, TrainingDiverged, UnknownName, check, unknown


def test_check_says_who_what_which_and_what_would_do():
    check(True, "NLCG", "period", 5, ">= 1")
    with pytest.raises(ValueError, match=r"^NLCG: period must be >= 1, got 0$"):
        check(False, "NLCG", "period", 0, ">= 1")
    with pytest.raises(ValueError, match=r"^f: name must be one word, got 'two words'$"):
        check(False, "f", "name", "two words", "one word")


def test_unknown_suggests_the_nearest():
    with pytest.raises(UnknownName, match=r"^unknown optimizer 'nlgc'; did you mean 'nlcg'\? Known: adamw, nlcg, sgd$"):
        unknown("optimizer", "nlgc", ["sgd", "nlcg", "adamw"])


def test_unknown_may_suggest_several():
    with pytest.raises(UnknownName, match=r"did you mean 'resnet2\d' or 'resnet2\d'\?"):
        unknown("model", "resnet2", ["resnet20", "resnet21", "mlp"])


def test_unknown_without_anything_near_lists_all():
    with pytest.raises(UnknownName, match=r"^unknown data set 'xyz'\. Known: cifar10, digits$"):
        unknown("data set", "xyz", ("digits", "cifar10"))


@pytest.mark.parametrize("name", [None, 3, ("a",)])
def test_unknown_takes_anything_for_a_name(name):
    with pytest.raises(UnknownName, match="unknown thing"):
        unknown("thing", name, ["a", "b"])


def test_unknown_with_nothing_known():
    with pytest.raises(UnknownName, match=r"^unknown thing 'a'\. Known: $"):
        unknown("thing", "a", [])


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (UnknownName, ValueError),
        (CorruptFile, RuntimeError),
        (DataUnavailable, RuntimeError),
        (TrainingDiverged, RuntimeError),
    ],
)
def test_what_users_catch(kind, base):
    assert issubclass(kind, base)
    error = pickle.loads(pickle.dumps(kind("text")))  # worker processes hand them over
    assert type(error) is kind
    assert str(error) == "text"


def test_everything_public_is_listed():
    public = {name for name, value in vars(errors).items() if getattr(value, "__module__", "") == "conjugo.errors"}
    assert public == set(errors.__all__)
