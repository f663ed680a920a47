"""A run's files: damage and mix-ups are found when they are used, and two trainings do not meet."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from crossan_fast import CrossanModel
from crossan_fast._digests import load_tensors, save_tensors
from crossan_fast._files import locked
from crossan_fast.cli import main
from crossan_fast.training import RunFolder, TrainConfig, Trainer
from crossan_fast.training import run_folder as run_folder_module
from crossan_fast.training.checkpoint import load_checkpoint
from crossan_fast.training.verify import verify_run

FILES = ("last.safetensors", "best/model.safetensors", "best/config.json", "config.yaml", "population.json")


def fit(values: dict[str, Any], *, resume: bool = False, **changes: Any) -> RunFolder:
    trainer = Trainer(TrainConfig.from_dict({**values, **changes}))
    trainer.fit(resume=resume, progress=False, say=lambda line: None)
    return trainer.folder


@pytest.fixture
def run(values: dict[str, Any]) -> RunFolder:
    return fit(values, epochs=1)


def read_all(folder: RunFolder) -> list[torch.Tensor]:
    """All that evaluation and `--resume` read."""
    config = folder.read_config()
    population = folder.read_population()
    models = [folder.load_model(which, backend="eager") for which in ("best", "last")]  # type: ignore[arg-type]
    fresh = Trainer(config)
    load_checkpoint(folder.last, fresh.model, fresh.optimizer, run=folder.run())
    models.append(fresh.model)
    state = [value for model in models for value in model.state_dict().values()]
    numbers = torch.tensor(list(repr((config, population, models[0].config)).encode()))
    return [*state, *(v for own in fresh.optimizer.state.values() for v in own.values()), numbers]


def damage(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_or_changes_nothing(run: RunFolder, name: str) -> None:
    """It changes nothing where it hits the word `sha256`, or a blank."""
    expected, path = read_all(run), run.path / name
    sound, random = path.read_bytes(), np.random.default_rng(0)
    found = 0
    # Small files everywhere, also in the headers of large ones.
    places = [*random.integers(min(len(sound), 2000), size=10), *random.integers(len(sound), size=10)]
    for place in places:
        damage(path, place, int(random.integers(8)))
        try:
            assert all(map(torch.equal, read_all(run), expected)), f"byte {place}"
        except (ValueError, TypeError, RuntimeError, FileNotFoundError) as error:
            assert path.name in str(error) or "config" in name, error
            assert verify_run(run.path).problems
            found += 1
        path.write_bytes(sound)
    assert found > 12
    assert not verify_run(run.path).problems


@pytest.mark.parametrize("name", ["log.jsonl", "results.json"])
def test_files_for_people_are_verified(run: RunFolder, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run.path)]) == 0
    sound = "population.json, config.yaml, last.safetensors, log.jsonl, best, results.json"
    assert capsys.readouterr().out == f"{run.path}: sound: {sound}\n"
    damage(run.path / name, 30, 0)
    assert main(["verify", str(run.path)]) == 1
    assert name in capsys.readouterr().err
    assert main(["verify", str(run.path / "best")]) == 2
    assert "run: expected config.yaml in" in capsys.readouterr().err


@pytest.mark.parametrize("name", FILES)
def test_files_cut_short_are_refused(run: RunFolder, name: str) -> None:
    path = run.path / name
    sound = path.read_bytes()
    for size in (0, 30, 200, len(sound) // 2, len(sound) - 3):
        path.write_bytes(sound[:size])
        with pytest.raises((ValueError, OSError), match=path.name):
            read_all(run)


def test_files_that_are_missing_are_verified(run: RunFolder) -> None:
    shutil.rmtree(run.best)
    run.population.unlink()
    (problem,) = verify_run(run.path).problems
    assert "population.json: expected it beside last.safetensors, found none" in problem


def test_a_damaged_cache_is_not_trained_on(values: dict[str, Any], world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "cache", tmp_path / "cache")
    values["cache"] = str(tmp_path / "cache")
    run = fit(values, epochs=1)
    damage(tmp_path / "cache" / "image.states.bin", 900, 0)
    for verify, message in (("lazy", "its bytes differ"), ("open", "is damaged: image")):
        with pytest.raises(ValueError, match=rf"{message}.*"):
            fit(values, epochs=2, resume=True, verify=verify)
        assert main(["evaluate", "--run", str(run.path), "--verify", verify]) == 2
    assert main(["evaluate", "--run", str(run.path), "--verify", "off"]) == 0
    assert main(["evaluate", "--run", str(run.path)]) == 2
    fit(values, epochs=2, resume=True, verify="off")


# -- files of other runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["last.safetensors", "best/model.safetensors", "config.yaml"])
def test_files_of_another_run_are_refused(values: dict[str, Any], name: str, tmp_path: Path) -> None:
    own = fit(values, epochs=1)
    other = fit(values, epochs=1, seed=1, run=str(tmp_path / "other"))
    assert own.run() != other.run() != ""
    shutil.copy(other.path / name, own.path / name)
    with pytest.raises(ValueError, match=rf"{Path(name).name} is of another run \({other.run()}\)"):
        read_all(own)
    assert any("another run" in problem for problem in verify_run(own.path).problems)
    if name == "last.safetensors":
        with pytest.raises(ValueError, match="is of another run"):
            fit(values, epochs=2, resume=True)


def test_equal_runs_write_equal_models_and_go_on_as_one(values: dict[str, Any], tmp_path: Path) -> None:
    first, second = fit(values, epochs=1), fit(values, epochs=2, run=str(tmp_path / "second"))
    assert first.run() == second.run() != ""
    assert fit(values, epochs=2, resume=True).run() == second.run()
    for name in ("config.json", "model.safetensors"):
        assert (first.best / name).read_bytes() == (second.best / name).read_bytes()


# -- files without digests ----------------------------------------------------------------------------------


def test_runs_of_before_digests_go_on_and_say_so_once(
    values: dict[str, Any], run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read_all(run)
    for path in (run.last, run.best / "model.safetensors"):
        tensors, metadata = load_tensors(path, "x")
        known = ("version", "progress", "format") + (("config",) if path == run.last else ())
        save_file(tensors, path, {key: metadata[key] for key in known if key in metadata})
    run.config.write_text("".join(run.config.read_text().splitlines(keepends=True)[1:]))
    for path in (run.population, run.results):
        body = json.loads(path.read_text())
        path.write_text(json.dumps({key: body[key] for key in body.keys() - {"sha256", "run"}}))
    run_folder_module._say_once.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert all(map(torch.equal, read_all(run)[:-1], expected[:-1]))
    assert [str(w.message).startswith(f"run: {run.path} was made before digests") for w in said] == [True]
    report = verify_run(run.path)
    assert not report.problems
    assert report.unchecked == ["population.json", "config.yaml", "last.safetensors", "best", "results.json"]
    assert len((fit(values, epochs=2, resume=True).log).read_text().splitlines()) == 2


def test_plain_safetensors_of_others_load(run: RunFolder) -> None:
    weights = load_file(run.best / "model.safetensors")
    save_file(weights, run.best / "model.safetensors")
    loaded = CrossanModel.from_pretrained(run.best, backend="eager").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_not_loaded(run: RunFolder, value: float) -> None:
    path = run.best / "model.safetensors"
    weights = load_file(path)
    weights["heads.image.bias"][3] = value
    save_file(weights, path)
    message = (
        rf"^heads\.image\.bias: expected finite values in .*model\.safetensors, got {value} at \[3\], in 1 of"
    )
    with pytest.raises(ValueError, match=message + ".*; safetensors.torch.load_file reads them as they are"):
        CrossanModel.from_pretrained(run.best)


def test_a_config_beside_weights_is_theirs(run: RunFolder) -> None:
    path = run.best / "config.json"
    body = json.loads(path.read_text())
    path.write_text(json.dumps(body))  # spaced otherwise
    CrossanModel.from_pretrained(run.best)
    path.write_text(json.dumps({**body, "activation": "relu"}))
    with pytest.raises(
        ValueError, match=r"activation: .*config\.json says 'relu', the weights beside it .* 'gelu'"
    ):
        CrossanModel.from_pretrained(run.best)


# -- checkpoints that digests fit, but nothing else ---------------------------------------------------------

Tensors = dict[str, torch.Tensor]
FORGED: dict[str, tuple[Callable[[Tensors, dict[str, str]], object], str]] = {
    "no generator": (lambda t, m: t.pop("random/cpu"), "random/cpu: expected uint8 .* got none"),
    "no weight": (
        lambda t, m: t.pop("model/heads.text.bias"),
        r"model/heads\.text\.bias: expected .* got none",
    ),
    "a weight of another type": (
        lambda t, m: t.update({"model/heads.text.bias": t["model/heads.text.bias"].double()}),
        r"model/heads\.text\.bias: expected float32 .* got float64",
    ),
    "a moment of another shape": (
        lambda t, m: t.update({"optimizer/heads.text.bias:exp_avg": torch.zeros(3)}),
        r"optimizer state heads\.text\.bias:exp_avg: expected float32 \[16\] on cpu, got float32 \[3\]",
    ),
    "a moment missing": (
        lambda t, m: t.pop("optimizer/heads.text.bias:exp_avg_sq"),
        r"optimizer state of 'heads\.text\.bias': lacks \['exp_avg_sq'\]",
    ),
    "no config": (lambda t, m: m.pop("config"), "expected its config as JSON, got KeyError"),
    "a config that is a list": (lambda t, m: m.update(config="[]"), "expected its config as JSON"),
    "a progress that is deep": (
        lambda t, m: m.update(progress="[" * 100_000),
        "expected its progress as JSON",
    ),
    "a progress that is empty": (
        lambda t, m: m.update(progress="{}"),
        "expected history as a list in its progress",
    ),
    "a NaN": (
        lambda t, m: t["model/heads.text.bias"].fill_(float("nan")),
        "expected finite values in .*last",
    ),
}


@pytest.mark.parametrize("what", FORGED)
def test_an_ill_typed_checkpoint_is_named(values: dict[str, Any], run: RunFolder, what: str) -> None:
    tensors, metadata = load_tensors(run.last, "x")
    change, message = FORGED[what]
    change(tensors, metadata)
    del metadata["sha256"]
    run.last.write_bytes(save_tensors(tensors, metadata))
    with pytest.raises(ValueError, match=message):
        fit(values, epochs=2, resume=True)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 40, b"\x10" + bytes(7) + b"[" * 16, (1 << 62).to_bytes(8, "little")]
)
def test_files_that_are_no_safetensors_are_named(run: RunFolder, content: bytes) -> None:
    for path, which in ((run.last, "last"), (run.best / "model.safetensors", "best")):
        path.write_bytes(content)
        with pytest.raises((ValueError, OSError), match=rf"{path.name}"):
            run.load_model(which)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "content", ["", "[1]", "{}", "[" * 100_000, '{"items": 1}', "\xff", '{"items": "x"}']
)
def test_populations_that_are_none_are_named(run: RunFolder, content: str) -> None:
    run.population.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"run: .*population\.json"):
        run.read_population()


def twice(path: Path, key: str) -> None:
    """The key once more, in front and with the same value: what was read before this was refused."""
    body = path.read_text(encoding="utf-8")
    value = json.dumps(json.loads(body)[key])
    path.write_text(f'{{"{key}": {value}, {body.lstrip()[1:]}', encoding="utf-8")


def test_a_key_twice_in_a_file_is_named(run: RunFolder) -> None:
    twice(run.best / "config.json", "bottleneck")
    with pytest.raises(ValueError, match=r"config\.json: .*the key 'bottleneck' twice in one object"):
        run.load_model("best")
    twice(run.results, "epochs")
    (_, problem) = verify_run(run.path).problems  # beside the config's
    assert "results.json: expected JSON, got the key 'epochs' twice in one object" in problem
    twice(run.population, "items")
    with pytest.raises(ValueError, match=r"population\.json: .*the key 'items' twice in one object"):
        run.read_population()


# -- two trainings at once, and what killed ones left -------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from crossan_fast.training.run_folder import RunFolder
from crossan_fast import _files
folder = RunFolder(sys.argv[1])
with folder.writing(), _files._draft_of(folder.last, Path.touch):
    print("held", flush=True)
    time.sleep(60)
"""


def test_leftovers_go_with_the_next_training_and_not_while_one_is_alive(
    values: dict[str, Any], run: RunFolder
) -> None:
    before = sorted(run.path.rglob("*"))
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        held = set(run.path.iterdir()) - set(before)
        assert len(held) == 1
        with pytest.raises(BlockingIOError, match="run: another process is writing to"):
            fit(values, epochs=1, resume=True)
        assert held <= set(run.path.iterdir())
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    (run.best / ".model.safetensors.0a1b2c3d.tmp").touch()
    fit(values, epochs=1, resume=True)  # writes neither last nor best
    assert sorted(run.path.rglob("*")) == before
    with locked(run.path):
        pass
