"""What a router file says of the model it was trained for."""

from pathlib import Path

import pytest

from training.provenance import model_name


@pytest.mark.parametrize("given", ["models/Small-1B", "models/Small-1B/", "models/x/../Small-1B"])
def test_folder_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given) -> None:
    (tmp_path / "models" / "Small-1B").mkdir(parents=True)
    (tmp_path / "models" / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_name(given) == "Small-1B"
    assert model_name(str(tmp_path / given)) == "Small-1B"


def test_hub_name_as_it_is() -> None:
    assert model_name("org/Small-1B") == "org/Small-1B"
