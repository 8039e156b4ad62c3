"""Runs on disk: killed, resumed, refused."""
from __future__ import annotations

import json
import os
import warnings
from dataclasses import asdict, replace

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_birds import BANK, Recorder, bird_vlm, same, weights

from dealkit import ConceptBank, DealConfig, finetune, load_model
from dealkit.datasets import Birdworld

CONFIG = DealConfig(lambda_disentangle=1., gamma_localize=.1, overlap="cosine", aggregate="max", guard=1., lr=1e-3,
                    batch_size=8, epochs=2)
STEPS = 6                                                                # 24 images in batches of 8, twice


def run(vlm, config=CONFIG, fails_at=None, **options):
    return finetune(vlm, Recorder(Birdworld(n=24), fails_at), BANK, config, progress=False, **options)


@pytest.fixture
def killed(tmp_path):
    """The folder of a run that died in its fifth step and had last been saved after the fourth."""
    with pytest.raises(RuntimeError, match="power"):
        run(bird_vlm(), fails_at=4, out_dir=tmp_path / "run", save_every=2)
    return tmp_path / "run"


@pytest.mark.filterwarnings("ignore:there is no run in", "ignore:the run in .* began with other weights")
@pytest.mark.parametrize("fails_at, save_every", [(0, 2), (1, 2), (3, 2), (4, 2), (5, 1), (5, 50)])
def test_a_killed_run_goes_on_bit_by_bit(tmp_path, fails_at, save_every):
    whole = bird_vlm()
    table = run(whole)
    with pytest.raises(RuntimeError, match="power"):
        run(bird_vlm(), fails_at=fails_at, out_dir=tmp_path, save_every=save_every)
    saved = fails_at // save_every * save_every
    # where something was saved, the weights come from there and not from the model that is passed in
    resumed = bird_vlm(seed=5 if saved else 0)
    again = run(resumed, fails_at=STEPS - saved, out_dir=tmp_path, save_every=save_every, resume=True)
    assert again.equals(table)
    assert same(weights(resumed), weights(whole))


def test_history_csv_keeps_step_with_the_checkpoint(killed):
    rows = pd.read_csv(killed / "history.csv")
    pd.testing.assert_frame_equal(rows, run(bird_vlm())[:4], rtol=1e-12)


def test_resuming_what_never_began_says_that_it_begins(tmp_path):
    with pytest.warns(UserWarning, match="no run in .* to go on with: this one starts from its beginning") as caught:
        table = run(bird_vlm(), out_dir=tmp_path / "run", resume=True)
    assert table.equals(run(bird_vlm())) and caught[0].filename == __file__


def test_a_run_saved_before_there_were_other_precisions_goes_on(killed):
    """A setting that the file does not know had the value that is now the default."""
    path = killed / "checkpoint.safetensors"
    with safe_open(path, "pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()
    settings = json.loads(metadata["settings"])
    del settings["precision"], settings["checkpoint_activations"]
    save_file(tensors, path, metadata | {"settings": json.dumps(settings)})
    with pytest.raises(ValueError, match="precision: float32 then, bfloat16 now"):
        run(bird_vlm(), replace(CONFIG, precision="bfloat16"), out_dir=killed, resume=True)
    assert run(bird_vlm(), out_dir=killed, resume=True).equals(run(bird_vlm()))


@pytest.mark.parametrize("config", [replace(CONFIG, freeze_text=True),
                                    replace(CONFIG, detach_maps=True, method="gradcam")])
def test_other_configs_resume_too(tmp_path, config):
    whole, resumed = bird_vlm(), bird_vlm()
    table = run(whole, config)
    with pytest.raises(RuntimeError, match="power"):
        run(bird_vlm(), config, fails_at=3, out_dir=tmp_path, save_every=3)
    assert run(resumed, config, out_dir=tmp_path, resume=True).equals(table)
    assert same(weights(resumed), weights(whole))


@pytest.mark.filterwarnings("ignore:the run in .* began with other weights")
def test_a_finished_run_leaves_its_model_its_history_and_its_config(tmp_path):
    vlm = bird_vlm()
    table = run(vlm, out_dir=tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.safetensors", "config.json", "history.csv", "model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(json.dumps(asdict(CONFIG)))
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "history.csv"), table, rtol=1e-12)
    # resuming it does no step, and gives the same model and history
    resumed = bird_vlm(seed=5)
    assert run(resumed, fails_at=0, out_dir=tmp_path, resume=True).equals(table)
    assert same(weights(resumed), weights(vlm))


def test_a_saved_model_loads_like_any_other(tmp_path):
    torch.manual_seed(0)
    vlm = load_model("birdworld-vit", pretrained=None, device="cpu")
    finetune(vlm, Birdworld(n=8), BANK, replace(CONFIG, epochs=1), out_dir=tmp_path, progress=False)
    loaded = load_model("birdworld-vit", pretrained=tmp_path / "model.safetensors", device="cpu")
    assert same(weights(vlm), weights(loaded))


def test_resume_with_another_config_names_the_difference(killed):
    vlm = bird_vlm()
    with pytest.raises(ValueError, match=r"lr: 0.001 then, 0.002 now"):
        run(vlm, replace(CONFIG, lr=2e-3), out_dir=killed, resume=True)
    assert same(weights(vlm), weights(bird_vlm()))


def test_resume_with_another_architecture_is_refused(killed):
    for other in (bird_vlm(width=48), bird_vlm(layers=2)):
        before = weights(other)
        with pytest.raises(ValueError, match="another architecture"):
            run(other, out_dir=killed, resume=True)
        assert same(weights(other), before)


def test_an_existing_run_is_never_overwritten_by_accident(killed):
    before = (killed / "checkpoint.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="resume=True"):
        run(bird_vlm(), out_dir=killed)
    assert (killed / "checkpoint.safetensors").read_bytes() == before


def test_resume_needs_a_folder():
    with pytest.raises(ValueError, match="out_dir"):
        run(bird_vlm(), resume=True)


def test_a_folder_that_cannot_be_written_is_an_error_before_any_work(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    vlm = bird_vlm()
    for out_dir in (tmp_path / "file", tmp_path / "file" / "run"):       # this also holds where tests run as root
        with pytest.raises(PermissionError, match="not writable.*choose another"):
            run(vlm, fails_at=0, out_dir=out_dir)
    assert same(weights(vlm), weights(bird_vlm()))


@pytest.mark.parametrize("content", [b"half a file", b""])
def test_a_damaged_checkpoint_is_an_error(killed, content):
    (killed / "checkpoint.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        run(bird_vlm(), out_dir=killed, resume=True)


def test_a_file_that_is_no_checkpoint_is_an_error(killed):
    bird_vlm().save(killed / "checkpoint.safetensors")
    with pytest.raises(ValueError, match="not a checkpoint"):
        run(bird_vlm(), out_dir=killed, resume=True)


def test_a_full_disk_leaves_the_last_checkpoint_whole(killed, monkeypatch):
    before = (killed / "checkpoint.safetensors").read_bytes()

    def no_space(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dealkit.training.checkpoint.save_file", no_space)
        with pytest.raises(OSError, match="step 6.*No space left.*resume=True"):
            run(bird_vlm(), out_dir=killed, save_every=2, resume=True)
    assert sorted(os.listdir(killed)) == ["checkpoint.safetensors", "history.csv"]
    assert (killed / "checkpoint.safetensors").read_bytes() == before
    whole, resumed = bird_vlm(), bird_vlm()
    assert run(resumed, out_dir=killed, resume=True).equals(run(whole))
    assert same(weights(resumed), weights(whole))


def test_nothing_is_kept_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(bird_vlm())
    assert os.listdir(tmp_path) == []


def test_resume_with_other_images_or_concepts_is_refused(tmp_path):
    config = replace(CONFIG, epochs=1)
    finetune(bird_vlm(), Birdworld(n=16), BANK, config, out_dir=tmp_path, progress=False)
    with pytest.raises(ValueError, match="images: 16 then, 24 now"):
        finetune(bird_vlm(), Birdworld(n=24), BANK, config, out_dir=tmp_path, resume=True, progress=False)
    shorter = ConceptBank("birds", {name: concepts[:4] for name, concepts in BANK.items()})
    with pytest.raises(ValueError, match="concepts: "):
        finetune(bird_vlm(), Birdworld(n=16), shorter, config, out_dir=tmp_path, resume=True, progress=False)


def test_a_run_that_began_with_other_weights_says_so_and_goes_on_from_its_own(killed):
    """A try with random weights, and then the same call with published ones: it would be reported as theirs."""
    with pytest.warns(UserWarning, match="began with other weights .* choose another out_dir"):
        run(bird_vlm(seed=5), out_dir=killed, resume=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")                       # what it began with is kept: no word for the right ones
        run(bird_vlm(), out_dir=killed, resume=True)
