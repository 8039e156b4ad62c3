"""Fine-tuning told by others: out of memory, a curve while it runs, loaders, and a result that leaves the house."""
from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from accelerate import PartialState
from tiny_birds import BANK, Recorder, bird_vlm, same, weights

from dealkit import DealConfig, finetune
from dealkit.datasets import Birdworld
from dealkit.models import VLM
from dealkit.training import DealObjective, OutOfMemory

DEAL = DealConfig(lambda_disentangle=.7, gamma_localize=.1, overlap="cosine", aggregate="max", guard=.4, lr=1e-3,
                  batch_size=8)


def run(vlm, config=DEAL, n=24, **options):
    return finetune(vlm, options.pop("data", None) or Birdworld(n=n), BANK, config, progress=False, **options)


# ------------------------------------------------------------------------------------------------------- out of memory


def fail_at(monkeypatch, call: int, error: Exception, held: list | None = None) -> None:
    """The objective's forward raises at its `call`-th call, while it holds a tensor."""
    forward, calls = DealObjective.forward, []

    def failing(self, images, *rest):
        calls.append(1)
        terms = forward(self, images, *rest)
        if len(calls) == call:
            if held is not None:
                held.append(weakref.ref(terms["total"]))
            raise error
        return terms

    monkeypatch.setattr(DealObjective, "forward", failing)


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14 GiB")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
                   " to allocate 99 bytes.")


@pytest.mark.parametrize("error", [CUDA, CPU, MemoryError("no memory")])
@pytest.mark.parametrize("batch_size, other", [(8, 4), (6, 4), (7, 4), (4, 2), (12, 8)])
def test_out_of_memory_names_what_to_try(monkeypatch, error, batch_size, other):
    reference, vlm = bird_vlm(), bird_vlm()
    config = replace(DEAL, batch_size=batch_size)
    seen = []
    run(reference, config, callback=lambda row: seen.append(weights(reference)))
    fail_at(monkeypatch, 2, error)
    with pytest.raises(OutOfMemory, match=f"step 1 with batch_size={batch_size} did not fit.*weights are those before "
                       f"this step.*batch_size={other}, or checkpoint_activations=True, or precision='bfloat16', or "
                       "freeze_text=True"):
        run(vlm, config)
    assert same(weights(vlm), seen[0])                                   # step 0 was taken, and nothing of step 1
    assert all(p.grad is None for p in vlm.model.parameters())


def test_out_of_memory_is_a_memory_error_and_a_runtime_error_and_lets_go_of_the_tensors(monkeypatch):
    held = []
    fail_at(monkeypatch, 1, RuntimeError(*CUDA.args), held)              # of its own: an error keeps what it passed
    with pytest.raises(MemoryError) as caught:
        run(bird_vlm())
    assert isinstance(caught.value, RuntimeError) and caught.value.__context__ is None
    monkeypatch.undo()
    gc.collect()
    assert held[0]() is None                                             # a smaller batch can be tried right away


def test_a_forward_pass_has_the_memory_of_the_last_gradients(monkeypatch):
    vlm, forward, held = bird_vlm(), DealObjective.forward, []
    monkeypatch.setattr(DealObjective, "forward", lambda *inputs: (
        held.append(sum(p.grad is not None for p in vlm.model.parameters())), forward(*inputs))[1])
    run(vlm)
    assert held == [0, 0, 0]


def test_what_was_tried_already_is_not_offered_again(monkeypatch):
    fail_at(monkeypatch, 1, CUDA)
    tried = replace(DEAL, batch_size=2, checkpoint_activations=True, precision="bfloat16", freeze_text=True)
    with pytest.raises(OutOfMemory) as caught:
        run(bird_vlm(), tried)
    assert "smaller model" in str(caught.value) and "precision=" not in str(caught.value)
    assert str(caught.value).count("batch_size") == 1


def test_an_optimizer_that_ran_out_of_memory_does_not_claim_that_the_weights_are_whole(monkeypatch):
    def step(*_, **__):
        raise CPU
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    with pytest.raises(OutOfMemory, match="step 0 .*may have been updated.*last checkpoint"):
        run(bird_vlm())


def test_other_errors_pass_as_they_are(monkeypatch):
    fail_at(monkeypatch, 1, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="^shapes do not match$"):
        run(bird_vlm())


# ------------------------------------------------------------------------------------------------- a curve and loaders


def test_the_callback_sees_every_row_of_the_history():
    rows = []
    table = run(bird_vlm(), replace(DEAL, epochs=2), callback=rows.append)
    assert rows == table.to_dict("records") and len(rows) == 6


def test_workers_change_nothing():
    one, other = bird_vlm(), bird_vlm()
    assert run(one).equals(run(other, workers=2)) and same(weights(one), weights(other))


def test_tensorboard_has_the_numbers_of_the_history(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    before = dict(PartialState._shared_state)
    with pytest.raises(RuntimeError, match="power"):
        run(bird_vlm(), data=Recorder(Birdworld(n=24), fails_at=2), out_dir=tmp_path, save_every=1, tensorboard=True)
    table = run(bird_vlm(), out_dir=tmp_path, resume=True, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert PartialState._shared_state == before                          # or a later launch from a notebook would fail
    assert set(events.Tags()["scalars"]) == set(table.columns) - {"step"}
    for name in table.columns[1:]:
        logged = {event.step: event.value for event in events.Scalars(name)}
        assert [logged[step] for step in table.step] == pytest.approx(table[name].tolist(), rel=1e-6)


def test_tensorboard_without_a_folder_or_the_package_is_refused_before_any_work(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="give an out_dir"):
        run(bird_vlm(), tensorboard=True)
    monkeypatch.setattr("dealkit.training.log.is_tensorboard_available", lambda: False)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        run(bird_vlm(), tensorboard=True, out_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------- frozen text tower


def test_a_frozen_text_tower_encodes_every_text_of_the_bank_once():
    vlm, calls = bird_vlm(), []
    encode, vlm_type = VLM.encode_text, type(vlm)

    class Counting(vlm_type):
        def encode_text(self, texts):
            calls.append(list(texts))
            return encode(self, texts)

    vlm.__class__ = Counting
    run(vlm, replace(DEAL, freeze_text=True, concept_captions=0., epochs=4))
    encoded = [tuple(call) for call in calls]                            # category by category; no caption is new
    assert len(encoded) == len(set(encoded)) <= len(BANK) and {len(call) for call in encoded} == {6}
    assert not any(p.grad is not None for p in vlm.model.transformer.parameters())


@pytest.mark.parametrize("changes", [{}, {"overlap": "product", "aggregate": "sum", "concept_captions": 1.}])
def test_kept_texts_give_what_texts_encoded_at_every_step_give(changes):
    """Oracle: the uncached path, with a text tower whose gradient is cut."""
    config = replace(DEAL, freeze_text=True, epochs=2, weight_decay=.1, **changes)
    kept, plain = bird_vlm(dtype=torch.float64), bird_vlm(dtype=torch.float64)
    table = run(kept, config)
    for name, parameter in plain.model.named_parameters():
        parameter.requires_grad_(name.startswith(("visual.", "logit_")))
    other = run(plain, replace(config, freeze_text=False))
    assert table.to_numpy() == pytest.approx(other.to_numpy(), rel=1e-9)
    for name, value in weights(plain).items():
        # Adam takes large steps along noise where a gradient is zero by nature: that of a key's bias
        atol = 1e-3 if name.endswith("in_proj_bias") else 1e-7
        torch.testing.assert_close(weights(kept)[name], value, rtol=1e-6, atol=atol)


# ------------------------------------------------------------------------------------------ the result leaves the house


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_fine_tuned_model_is_loaded_by_stock_open_clip(tmp_path, precision):
    """Oracle: open_clip alone; both what vlm.save writes and what finetune leaves in its folder."""
    tiny = bird_vlm()
    text = {"context_length": 20, "vocab_size": tiny.model.vocab_size, "width": 16, "heads": 2, "layers": 2}
    config = {"embed_dim": 24, "text_cfg": text, "vision_cfg": {"image_size": 80, "patch_size": 16, "width": 32,
                                                                "layers": 3, "head_width": 8}}
    (tmp_path / "tiny-birds.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-birds.json")
    before = weights(tiny)
    run(tiny, replace(DEAL, precision=precision), out_dir=tmp_path / "run")
    assert not same(weights(tiny), before)
    images, texts = Birdworld("test", n=4).batch(range(4))["image"], ["red head", "a photo of a zorvit"]
    paths = [tiny.save(tmp_path / "saved.safetensors"), tmp_path / "run" / "model.safetensors"]
    for path in paths:
        stock = open_clip.create_model("tiny-birds", pretrained=str(Path(path)))
        stock.eval()
        with torch.no_grad():
            assert torch.equal(F.normalize(stock.encode_image(images), dim=-1), tiny.encode_image(images))
            ours, theirs = tiny.encode_text(texts), stock.encode_text(tiny.tokenizer(texts), normalize=True)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
