"""No test of the data room touches the user's cache or finds the user's data by accident."""

import pytest


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("user-cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.delenv("CONJUGO_DATA", raising=False)
    return folder / "conjugo"
