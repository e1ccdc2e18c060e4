"""Publishing a basis: what arrives, and what is said when nothing does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lorafind.bases.problem import BasisProblem
from lorafind.hub import names as hub
from lorafind.hub.pictures import draw
from tests.hub.hub_net import NAME, Net
from tests.hub.hub_server import READER, WRITER, Fault
from tests.hub.made_basis import spoiled, write_basis


def test_what_is_pushed_can_be_pulled(net: Net, tmp_path: Path) -> None:
    data = "Made of | and *stars*."
    file = write_basis(tmp_path / "mine.safetensors", seed=4, licence="Very own", data=data)
    plots = draw({**dict(calibration="scale only", components=1), **PLOTTED}, tmp_path)
    made = hub.push(file, "alice/new", token=WRITER, endpoint=net.server.url, pictures=plots)
    repository = net.server.repositories["alice/new"]
    commit = repository.refs["main"]
    assert made.name == f"hf:alice/new@{commit}"
    assert made.url == f"{net.server.url}/alice/new/commit/{commit}"
    assert len(repository.trees) == 2 and not repository.private
    assert net.server.messages == ["Basis wild (00000004)"]
    tree = repository.trees[commit]
    assert set(tree) - {".gitattributes"} == {
        *("basis.safetensors", "config.json", "README.md"),
        *("explained_variance.png", "calibration_scales.png"),
    }
    assert tree["basis.safetensors"] == file.read_bytes()
    config = json.loads(tree["config.json"])
    assert (config["data"], config["evaluation"][0]["plain"]) == (data, 72.25)
    assert not {"explained_variance", "scales", "layouts"} & set(config)
    _, front, text = tree["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "lorafind",
        "license": "other",
        "license_name": "Very own",
        "base_model": "someone/sd1",
        "tags": ["lorafind", "lora", "lora-similarity", "sd1", "style"],
    }
    assert "lorafind similar FILE --basis hf:alice/new " in text
    assert (
        "| test (same) | mAP over the whole ranking, % | 100 | 72.25 | 80.00 | 81.00 | 88.50 |"
        in text
    )
    assert r"Made of | and \*stars\*." in text
    assert "![explained variance](explained_variance.png)" in text
    assert net.resolve("hf:alice/new").path.read_bytes() == file.read_bytes()


PLOTTED = {"explained_variance": [0.5, 0.2, 0.1], "scales": [1.0, 1.2]}


def test_plots_are_pictures_of_what_the_facts_have(tmp_path: Path) -> None:
    shares = {"components": 2, "explained_variance": [0.5, 0.2]}
    wanted: list[tuple[dict[str, object], list[str]]] = [
        ({}, []),
        (shares, ["explained_variance.png"]),
        ({"calibration": "none", "scales": [1.0]}, []),
    ]
    for facts, names in wanted:
        drawn = draw(facts, tmp_path)
        assert [path.name for path in drawn] == names
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_a_private_push_to_a_branch(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITER)
    url = net.server.url
    made = hub.push(
        net.file, "alice/secret", private=True, revision="next", message="First", endpoint=url
    )
    repository = net.server.repositories["alice/secret"]
    assert repository.private
    assert made.name == f"hf:alice/secret@{repository.refs['next']}"
    assert repository.refs["next"] != repository.refs["main"]
    assert net.server.messages == ["First"]
    card = repository.trees[repository.refs["next"]]["README.md"].decode()
    assert "--basis hf:alice/secret@next " in card
    assert net.resolve("hf:alice/secret@next", token=READER).path.read_bytes() == net.data
    # Once more, into what is there.
    again = hub.push(
        net.file, "alice/secret", private=True, revision="next", message="More", endpoint=url
    )
    assert again.name != made.name
    # What is to be private must not become public by accident.
    with pytest.raises(BasisProblem) as problem:
        hub.push(net.file, NAME, private=True, endpoint=url)
    assert str(problem.value) == (
        f"{NAME} on {net.host} is there already and public: nothing was published. Make it private "
        f"at {url}/{NAME}/settings, or push without --private."
    )
    assert len(net.server.repositories[NAME].trees) == 1


@pytest.mark.parametrize(
    ("token", "fault", "sentence"),
    [
        (
            None,
            None,
            "Nobody can publish on {host} without a token that may write: set HF_TOKEN, give "
            "--token, or run `hf auth login`.",
        ),
        (
            READER,
            None,
            "{host} does not let you write to alice/wild (You may not write here): use a token "
            "with that right.",
        ),
        (
            "hf_wrong",
            None,
            "{host} does not accept the token for alice/wild (Invalid credentials in "
            "Authorization header): make a new one.",
        ),
        (
            WRITER,
            Fault("POST /api/models/alice/wild/commit", status=500),
            "{host} is out of order (500): try again in a while.",
        ),
        (
            WRITER,
            Fault(r"PUT /[0-9a-f]{64}", status=403),
            "{host} does not let you write to alice/wild: use a token with that right.",
        ),
        (
            WRITER,
            Fault(f"GET /api/models/{NAME}", status=429, headers={"Retry-After": "9"}),
            "{host} has had too many requests from here (429): try again in 9 seconds.",
        ),
        (
            WRITER,
            Fault("POST /api/models/alice/wild/commit", after=5),
            "The connection to {host} was cut (",
        ),
    ],
)
def test_what_cannot_be_pushed(
    net: Net, token: str | None, fault: Fault | None, sentence: str
) -> None:
    net.server.faults += [fault] if fault else []
    with pytest.raises(BasisProblem) as problem:
        hub.push(net.file, NAME, token=token, endpoint=net.server.url)
    assert str(problem.value).startswith(sentence.format(host=net.host))


def test_a_licence_that_the_hub_does_not_know(net: Net, tmp_path: Path) -> None:
    file = write_basis(tmp_path / "b.safetensors", licence="forbidden")
    with pytest.raises(BasisProblem) as problem:
        hub.push(file, NAME, token=WRITER, endpoint=net.server.url)
    assert str(problem.value) == (
        'The Hub refuses this basis: Invalid metadata in README.md. - "license" must be one of '
        "[mit, …]"
    )
    assert len(net.server.repositories[NAME].trees) == 1


def test_what_is_no_basis_is_not_pushed(net: Net, tmp_path: Path) -> None:
    broken: dict[str, Callable[[bytes], bytes]] = {
        "truncated": lambda data: data[:-10],
        "text": lambda data: b"hello",
        "spoiled": spoiled,
    }
    for name, change in broken.items():
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(change(net.data))
        with pytest.raises(
            BasisProblem, match=f"{name}.safetensors (is no basis|fails its self-test)"
        ):
            hub.push(file, NAME, token=WRITER, endpoint=net.server.url)
    assert not net.server.requests
