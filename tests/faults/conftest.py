import pytest


@pytest.fixture(scope="module")
def canary_names():
    segment = "000000000-000000003-0123abcd.npy"
    return ["shell-start-up", segment, "manifest.json", "metrics.jsonl", "replay/" + segment, "state/d"]


@pytest.fixture
def home(tmp_path, canary_names):
    """Somebody's files, among them some with names of ours."""
    folder = tmp_path / "home"
    for name in canary_names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("canary")
    return folder
