import pytest

from conjugo.studies import report


@pytest.fixture
def no_report(monkeypatch):
    """Spares the seconds that drawing takes."""
    monkeypatch.setattr(report, "write", lambda result, path: None)
    monkeypatch.setattr(report, "write_plots", lambda result, out: None)
