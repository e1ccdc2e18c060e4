"""``lorafind train`` on a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from lorafind.cli.app import make_app
from lorafind.train import seeds
from lorafind.train.cache import Prepared
from lorafind.train.captions import gather
from lorafind.train.loop import Run, train_together
from lorafind.train.model import load_base
from lorafind.train.settings import Settings
from tests.e2e.tools import environment
from tests.train.conftest import apart, prepared, rings, stripes, tiny_folder

__all__ = ["apart", "prepared", "rings", "stripes", "tiny_folder"]

QUICK = ("--resolution", "64", "--steps", "3", "--rank", "2", "--prior-weight", "0")


def call(*arguments: str | Path, code: int = 0, **environment: str) -> Result:
    result = CliRunner(env=environment).invoke(make_app(), [*map(str, arguments)])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


@pytest.fixture(autouse=True)
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where an index would be: there is none."""
    monkeypatch.setenv("LORAFIND_DB", str(tmp_path / "index.db"))
    return tmp_path / "index.db"


@pytest.fixture
def quick(tiny_folder: Path) -> tuple[str, ...]:
    return ("--model", str(tiny_folder), *QUICK)


def metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
    return found


def test_from_pictures_to_a_file(rings: Path, quick: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "rings.safetensors"
    result = call("train", rings, "-o", out, *quick, "--title", "Rings", "--json")
    row = json.loads(result.stdout)
    said = metadata(out)
    seed = seeds.of_pictures(gather([rings], resolution=64).pictures)
    assert row | {"loss_first": 0, "loss_last": 0} == {
        "path": str(out),
        "word": said["modelspec.trigger_phrase"],
        "pictures": 6,
        "steps": 3,
        "seed": seed,
        "loss_first": 0,
        "loss_last": 0,
        "nearest": [],
    }
    assert row["loss_first"] > 0 and row["loss_last"] > 0
    assert (said["ss_seed"], said["modelspec.title"]) == (str(seed), "Rings")
    told = result.stderr
    assert "Pictures: 6; captions: 6 from files." in told
    # 64, 64 and 32 layers; rank × (inputs + outputs) of each.
    assert f"160 layers, {2 * 31616:,} parameters, 3 steps" in told
    assert "Memory: about" in told and "s a step, measured" in told
    assert "There is no index" in told


def test_every_option_reaches_the_settings(
    rings: Path, stripes: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """What an option says is what the file says; the rest is seen in what is written."""
    out = tmp_path / "a.safetensors"
    options: dict[str, Any] = {
        "--model": tiny_folder,
        "--groups": "ff,self",
        "--rank": 3,
        "--alpha": 6,
        "--steps": 4,
        "--learning-rate": 0.001,
        "--weight-decay": 0.01,
        "--schedule": "cosine",
        "--warmup": 1,
        "--resolution": 64,
        "--batch-size": 2,
        "--accumulate": 2,
        "--seed": 7,
        "--token": "xyz",
        "--min-snr": 5,
        "--offset-noise": 0.1,
        "--prior-weight": 0.5,
        "--prior-prompt": "a drawing",
        "--class-images": stripes,
        "--ema": 0.9,
        "--save-every": 1,
        "--save-from": 2,
        "--keep-last": 1,
        "--sample": "a red ring",
        "--sample-every": 4,
        "--save-precision": "fp32",
        "--device": "cpu",
    }
    words = [str(word) for option in options.items() for word in option]
    call("train", rings, "-o", out, *words, "--gradient-checkpointing")
    said = metadata(out)
    expected = {
        "ss_network_dim": "3",
        "ss_network_alpha": "6.0",
        "ss_network_args": '{"groups": "self_attn,ff"}',
        "ss_steps": "4",
        "ss_learning_rate": "0.001",
        "ss_optimizer_args": "weight_decay=0.01",
        "ss_lr_scheduler": "cosine",
        "ss_lr_warmup_steps": "1",
        "ss_resolution": "(64, 64)",
        "ss_total_batch_size": "2",
        "ss_gradient_accumulation_steps": "2",
        "ss_seed": "7",
        "modelspec.trigger_phrase": "xyz",
        "ss_min_snr_gamma": "5.0",
        "ss_noise_offset": "0.1",
        "ss_prior_loss_weight": "0.5",
        "ss_num_reg_images": "6",
        "ss_gradient_checkpointing": "True",
        "ss_training_comment": "moving average of the weights, decay 0.9",
    }
    assert {key: said[key] for key in expected} == expected
    # Saved at 2 and 3, of which the last is kept; sampled at the end.
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["a-000003.safetensors", "a-samples", "a.safetensors"]
    assert [path.name for path in (tmp_path / "a-samples").iterdir()] == ["000004-1.png"]
    assert (out.stat().st_size) > 4 * 3 * 1000


def test_the_defaults_are_the_papers() -> None:
    from lorafind.cli.training import _asked

    asked = _asked()
    assert asked.settings == Settings() and not asked.seeded
    assert (asked.spelling, asked.dtype, asked.caption) == ("kohya", "fp16", "files")


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    rings: Path, quick: tuple[str, ...], tmp_path: Path
) -> None:
    row = json.loads(call("train", rings, "--dry-run", *quick, "--json").stdout)
    wanted = {"pictures": 6, "captions": 6, "loras": 1, "steps": 3, "layers": 160}
    assert row | wanted == row and row["seconds"] > 0 and row["memory"] > 10**6
    assert row["class_images"] == 0
    line = call("train", rings, "--dry-run", *quick, "--quiet")
    assert line.stdout.split("\t")[:5] == ["6", "6", "1", "3", "63232"] and line.stderr == ""
    assert not list(tmp_path.iterdir())


def test_into_the_index_with_its_nearest(
    prepared: Prepared, rings: Path, quick: tuple[str, ...], tmp_path: Path, index: Path
) -> None:
    """The others are made in one pass, which is quicker."""
    settings = Settings(resolution=64, steps=3, rank=2)
    names = [tmp_path / f"{number}.safetensors" for number in range(3)]
    runs = [Run(prepared, replace(settings, seed=i), name) for i, name in enumerate(names)]
    train_together(load_base(quick[1]), runs)
    call("index", *names)
    out = tmp_path / "out.safetensors"
    row = json.loads(call("train", rings, "-o", out, *quick, "--json").stdout)
    assert sorted(n["path"] for n in row["nearest"]) == sorted(map(str, names))
    scores = [n["score"] for n in row["nearest"]]
    assert scores == sorted(scores, reverse=True)
    again = call("similar", out, "--json").stdout
    assert json.loads(again) == row["nearest"]


def test_with_class_images_in_half_precision_and_another_spelling(
    rings: Path, stripes: Path, quick: tuple[str, ...], tmp_path: Path, index: Path
) -> None:
    from lorafind.formats.read import read

    out = tmp_path / "adapter_model.safetensors"
    call("index", tmp_path)
    ways = ("--precision", "bf16", "--format", "peft", "--no-index")
    priors = ("--prior-weight", "1", "--class-images", str(stripes))
    call("train", rings, "-o", out, *quick, *priors, *ways)
    assert metadata(out)["ss_mixed_precision"] == "bf16"
    plan = read(out).plan
    assert plan is not None and plan.spelling == "peft"
    assert (tmp_path / "adapter_config.json").is_file()
    assert call("ls", "--tsv").stdout == ""


def refused(*arguments: str | Path, code: int = 4) -> str:
    said = call("train", *arguments, code=code).stderr
    assert said.startswith("lorafind: ") and "Traceback" not in said
    assert len(said.splitlines()) < 3
    return said


def test_what_is_wrong_is_said_before_anything_is_trained(
    rings: Path, quick: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    own = shutil.copytree(rings, tmp_path / "own")
    (own / "rings-1.txt").unlink()
    assert "have no caption" in refused(own, "-o", out, *quick)
    (own / "rings-2.png").write_bytes(b"x")
    said = refused(own, "-o", out, *quick)
    assert "rings-2.png" in said and "rings-1.png" in said
    lenient = ("--skip-unreadable", "--caption", "none")
    done = call("train", own, "-o", out, *quick, *lenient, code=3)
    assert "rings-2.png is left out" in done.stderr and out.exists()
    assert "write over it (--force)" in refused(rings, "-o", out, *quick)
    assert "There is no folder" in refused(rings, "-o", tmp_path / "no" / "a.safetensors", *quick)
    new = tmp_path / "new.safetensors"
    assert "nothing to go on with" in refused(rings, "-o", new, *quick, "--resume")
    assert metadata(out)["ss_num_train_images"] == "5"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--format", "lycoris"), "--format is one of kohya, diffusers, peft"),
        (("--caption", "gpt"), "--caption is one of files, blip, none"),
        (("--save-precision", "fp8"), "--save-precision is one of"),
        (("--rank", "0"), "The setting rank is 0; it must be at least 1."),
        (("--groups", "conv"), "The setting groups is conv"),
        (("--groups", "everything"), "everything"),
        (("--device", "tpu"), "unknown device 'tpu'"),
        (("--sample-every", "5"), "Sample pictures need a prompt"),
        ((), "name the file to write"),
    ],
)
def test_wrong_use(rings: Path, options: tuple[str, ...], words: str) -> None:
    output = ("-o", "x.safetensors") if options else ()
    assert words in refused(rings, *output, *options, code=2)


def test_a_missing_package_is_named(rings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafind.cli import training

    monkeypatch.setattr(training, "NEEDED", ("diffusers", "peft_that_is_not_there"))
    said = call("train", rings, "--dry-run", code=4).stderr
    assert "peft_that_is_not_there" in said


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_and_resume(
    rings: Path, tiny_folder: Path, apart: Path, tmp_path: Path, index: Path
) -> None:
    out, whole = tmp_path / "out.safetensors", tmp_path / "whole.safetensors"
    options = (
        *("--model", str(tiny_folder), "--resolution", "64", "--rank", "2"),
        *("--prior-weight", "0", "--save-every", "1", "--keep-last", "1", "--steps", "40"),
    )
    words = [sys.executable, "-m", "lorafind", "train", str(rings), "-o", str(out), *options]
    more = {"LORAFIND_CACHE": str(apart / "cache"), "HF_HUB_OFFLINE": "1"}
    child = subprocess.Popen(
        words, env=environment(index, **more), stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    # As soon as a LoRA was saved on the way.
    until = time.monotonic() + 120
    while not list(tmp_path.glob("out-*.safetensors")) and time.monotonic() < until:
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, told = child.communicate(timeout=120)
    said = told.decode()
    assert child.returncode == 130, said
    assert "Stopped after step" in said and "--resume" in said and "Traceback" not in said
    assert not out.exists()
    assert "go on with it (--resume)" in refused(rings, "-o", out, *options)
    call("train", rings, "-o", out, *options, "--resume")
    call("train", rings, "-o", whole, *options)
    assert out.read_bytes() == whole.read_bytes()


def test_every_setting_has_an_option() -> None:
    from inspect import signature

    from lorafind.cli.training import _asked

    command = typer.main.get_command(make_app()).commands["train"]  # type: ignore[attr-defined]
    options = {name for p in command.params for name in p.opts}
    renamed = {"sample_prompts": "--sample"}
    for field in fields(Settings):
        assert renamed.get(field.name, f"--{field.name.replace('_', '-')}") in options
    assert all(p.default is not p.empty for p in signature(_asked).parameters.values())
