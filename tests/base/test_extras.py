"""A package that only some programs need, where it is not installed."""

from __future__ import annotations

import pytest

from pipeline.base.errors import UserError
from pipeline.base.extras import extra


def test_a_missing_package_names_its_purpose_and_its_remedy() -> None:
    with pytest.raises(UserError) as raised, extra("plots", "--histogram"):
        import no_such_package.part  # noqa: F401
    assert str(raised.value) == (
        "--histogram needs no_such_package, which is not installed: pip install 'puma-pipeline[plots]'."
    )


def test_a_package_that_is_broken_keeps_its_own_error(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installing it again would not help."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "broken_package.py").write_text("from sys import no_such_name")
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(ImportError, match="no_such_name"), extra("plots", "--histogram"):
        import broken_package  # noqa: F401
