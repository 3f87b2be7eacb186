from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from torch import nn

from export.distill import (
    _loss,
    distill,
    layer_loss,
    rates,
    stack,
)
from export.encoders import load_encoder
from export.encoders.mel import MelEncoder
from export.encoders.wav import WavEncoder
from export.encoders.whisper import WhisperEncoder, WhisperStem
from export.heads import CnnHead
from export.model import Classifier, load_classifier, new_classifier, trained_part
from export.recipe import Data, Distill, EncoderChoice, HeadChoice, Recipe, Train, Windows
from export.targets import Targets, mean_answer, soft_loss
from export.teacher import TEACHERS, load_teacher, taught_by
from export.train import CHECKPOINT
from export.views import View
from tests.speech_corpus import LABELS, RESONANCES_HZ, make_whisper, voice


def log_probs(logits, temperature):
    return torch.from_numpy(log_softmax(logits / temperature, axis=1))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_soft_loss_is_the_divergence_times_t_squared(temperature):
    student, teacher = np.random.default_rng(0).standard_normal((2, 6, 4)) * 3
    softened = softmax(teacher / temperature, axis=1), softmax(student / temperature, axis=1)
    expected = temperature**2 * entropy(*softened, axis=1).mean()
    found = soft_loss(torch.from_numpy(student), log_probs(teacher, temperature), temperature)
    assert found.item() == pytest.approx(expected)


def test_the_soft_loss_of_equal_answers_is_zero():
    logits = np.random.default_rng(0).standard_normal((6, 4))
    shifted = torch.from_numpy(logits + 5)  # logits are equal up to a constant
    assert soft_loss(shifted, log_probs(logits, 2.0), 2.0).item() == pytest.approx(0, abs=1e-12)


def test_arrays_are_stacked_on_zeros_and_the_mask_says_where():
    arrays = [np.full((2, length), 0.5, np.float16) for length in (9, 4, 6)]
    stacked, real = stack(arrays, 10)
    assert stacked.dtype == torch.float32
    assert stacked.shape == (3, 2, 10)
    assert real.shape == (3, 1, 10)
    for row, length in enumerate((9, 4, 6)):
        assert real[row, 0].tolist() == [True] * length + [False] * (10 - length)
        assert torch.equal(stacked[row], 0.5 * real[row].expand(2, 10))


def recipe(**parts):
    data = Data(("mine",), LABELS)
    return Recipe("r", data, Windows(1.0, 0.5), head=HeadChoice(width=8), **parts)


@pytest.mark.parametrize("tuned", [0, 2])
def test_each_student_hears_its_own_teacher(tmp_path, tuned):
    from safetensors.torch import save_file

    make_whisper(tmp_path / "small")
    teacher = recipe(encoder=EncoderChoice("whisper", 2, "small"), train=Train(1, tuned=tuned))
    for seed, part in enumerate(("fold0", "whole")):
        torch.manual_seed(seed)
        network = new_classifier(teacher, tmp_path)
        with torch.no_grad():
            for layer in network.encoder.layers[2 - tuned :]:
                layer.fc1.bias.add_(0.3 * (seed + 1))
        (tmp_path / part).mkdir()
        state = trained_part(teacher, network).state_dict()
        save_file(state, tmp_path / part / "model.safetensors")
    samples = voice(1000.0, 120.0, 0.8, 0) * 9  # beyond 1.0, as a gain can make it
    student = EncoderChoice("mel", 1, "small", width=8)
    answer = load_teacher(teacher, tmp_path, [tmp_path], student)
    view = View(3, 1, answer(samples))
    window = torch.from_numpy(samples)[None]
    found = {}
    for name, part in TEACHERS.items():
        (taught,) = taught_by(name, [view])
        assert (taught.clip, taught.number) == (3, 1)
        network = load_classifier(teacher, tmp_path, tmp_path / part / "model.safetensors")
        pooled = []
        network.head.members[0].pool.register_forward_pre_hook(
            lambda _, inputs, kept=pooled: kept.append(inputs[0])
        )
        with torch.no_grad():
            logits, embedding = network(window)
            features = load_encoder(student, tmp_path, 1.0).stem.features(window)
        close = {"atol": 5e-3}  # what is cached was rounded to half precision
        np.testing.assert_allclose(taught.arrays["logits"], logits[0], **close)
        np.testing.assert_allclose(taught.arrays["embedding"], embedding[0], **close)
        np.testing.assert_allclose(taught.arrays["frames"], pooled[0][0], **close)
        np.testing.assert_array_equal(
            taught.arrays["features"], features[0].numpy().astype(np.float16)
        )
        found[name] = logits
    assert (found["choice"] - found["refit"]).abs().max() > 0.05


def toy(clips=36, front_end=WhisperStem(16, 8).features):  # noqa: B008 - it has no state
    """Return voices, what a sure teacher says of them, and their labels."""
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((3, 8)).astype(np.float32)
    views = []
    for clip in range(clips):
        label = clip % 3
        samples = voice(RESONANCES_HZ[LABELS[label]], rng.uniform(90, 220), 0.5, clip)
        arrays = {
            "features": front_end(torch.from_numpy(samples)[None])[0].numpy().astype(np.float16),
            "frames": np.repeat(embeddings[label, :5, None], 12, axis=1).astype(np.float16),
            "logits": 6 * np.eye(3, dtype=np.float32)[label],
            "embedding": embeddings[label],
            "layers": np.repeat(embeddings[label, None, None, :6], 12, axis=1).repeat(2, axis=0),
        }
        views.append(View(clip, 0, arrays))
    label = torch.arange(clips) % 3
    return views, Targets(label, torch.ones(clips, 3, dtype=torch.bool), group=label)


def new_student():
    torch.manual_seed(0)
    return Classifier(MelEncoder(WhisperStem(16, 8), 16, 1), CnnHead(1, 16, 3, width=8))


def slim_student():
    torch.manual_seed(0)
    config = {"num_mel_bins": 16, "d_model": 16, "encoder_layers": 1, "max_source_positions": 50}
    config |= {"encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    return Classifier(WhisperEncoder(config, 1, 1.0, 2), CnnHead(2, 16, 3, width=8))


def wav_student():
    torch.manual_seed(0)
    return Classifier(WavEncoder(32, 1), CnnHead(1, 32, 3, width=8))


@pytest.fixture(autouse=True)
def one_thread():
    """Processor time counts every thread: more of them would spend the budget on less."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SETTINGS = Distill("t.toml", 3 / 60, batch=8, learning_rate=5e-3, average=0.9, mask_mels=2)


def right(student, clips):
    views, targets = toy(front_end=student.encoder.features)
    with torch.no_grad():
        answers = [
            student.from_features(torch.from_numpy(views[c].arrays["features"]).float()[None])[0]
            .argmax()
            .item()
            for c in clips
        ]
    return np.mean([answer == targets.label[c] for answer, c in zip(answers, clips, strict=True)])


@pytest.mark.parametrize("hard", [0.0, 0.5])
def test_a_student_learns_what_its_teacher_says(tmp_path, hard):
    student = new_student()
    views, targets = toy()
    if not hard:  # then the labels, here wrong ones, are not read
        targets = replace(targets, label=targets.label.roll(1))
    chosen = list(range(24))
    distill(student, views, targets, chosen, replace(SETTINGS, hard=hard), seed=0, folder=tmp_path)
    assert not student.training
    assert right(student, range(24, 36)) == 1.0


@pytest.mark.parametrize("make", [slim_student, wav_student])
@pytest.mark.parametrize("layers", [0.0, 1.0])
def test_every_kind_of_student_learns(tmp_path, make, layers):
    student = make()
    views, targets = toy(front_end=student.encoder.features)
    settings = replace(SETTINGS, layers=layers, cpu_minutes=8 / 60, warp=0.0, mask_mels=0)
    distill(student, views, targets, list(range(24)), settings, seed=0, folder=tmp_path)
    assert right(student, range(24, 36)) >= 0.9


def test_pretrained_layers_learn_at_their_own_rate():
    student, heads = slim_student(), nn.Linear(3, 4)
    new, pretrained = rates(student, heads, replace(SETTINGS, tuned_rate=1e-4))
    assert (new["rate"], pretrained["rate"]) == (5e-3, 1e-4)
    assert {id(p) for p in pretrained["params"]} == {
        id(p) for p in student.encoder.layers.parameters()
    }
    learned = {id(p) for p in (*student.head.parameters(), *heads.parameters())}
    assert {id(p) for p in new["params"]} == learned
    (alone,) = rates(wav_student(), heads, SETTINGS)
    assert alone["rate"] == 5e-3


def test_several_teachers_answer_with_the_geometric_mean_of_their_probs():
    first, second = np.random.default_rng(0).standard_normal((2, 5, 3)) * 3
    found = softmax(mean_answer([torch.from_numpy(first), torch.from_numpy(second)]), axis=1)
    expected = np.sqrt(softmax(first, axis=1) * softmax(second, axis=1))
    np.testing.assert_allclose(found, expected / expected.sum(axis=1, keepdims=True))
    alone = torch.from_numpy(first)
    assert mean_answer([alone]) is alone


def test_the_layer_loss_is_that_of_distilhubert():
    rng = np.random.default_rng(0)
    found, layers = rng.standard_normal((2, 2, 3, 7, 4))
    real = np.zeros((2, 1, 7), bool)
    real[0, 0, :7] = real[1, 0, :4] = True
    sums = []
    for clip, frames in ((0, 7), (1, 4)):
        for state in range(3):
            for frame in range(frames):
                a, b = found[clip, state, frame], layers[clip, state, frame]
                alike = 1 - cosine(a, b)
                sums.append(np.abs(a - b).mean() - np.log(1 / (1 + np.exp(-alike))))
    got = layer_loss(*(torch.from_numpy(array) for array in (found, layers, real)))
    assert got.item() == pytest.approx(np.mean(sums))


def test_labels_alone_are_learned_as_well(tmp_path):
    student = new_student()
    views, targets = toy()
    alone = replace(SETTINGS, soft=0.0, frames=0.0, embedding=0.0, hard=1.0)
    distill(student, views, targets, list(range(24)), alone, seed=0, folder=tmp_path)
    assert right(student, range(24, 36)) == 1.0


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_the_teachers_frames_are_matched_where_it_has_any(weight):
    views, targets = toy(clips=2)
    short = views[1].arrays
    views[1] = replace(
        views[1],
        arrays={**short, "features": short["features"][:, :30], "frames": short["frames"][:, :7]},
    )
    nothing = nn.ModuleDict({"frames": nn.Linear(16, 5), "embedding": nn.Linear(16, 8)})
    for parameter in nothing.parameters():
        nn.init.zeros_(parameter)  # maps every frame to 0: the distance is the frame's own square
    only = replace(
        SETTINGS, soft=0.0, embedding=0.0, hard=0.0, frames=weight, mixup=0.0, mask_mels=0
    )
    target = torch.eye(3)[:2]
    found = _loss(
        new_student(), nothing, views, target, targets.mask, only, np.random.default_rng(0)
    )
    matched = np.concatenate([view.arrays["frames"].astype(np.float64) for view in views], axis=1)
    assert matched.shape == (5, 12 + 7)
    assert found.item() == pytest.approx(weight * np.square(matched).mean(), rel=1e-3)


def test_a_stopped_training_keeps_the_time_it_has_spent(tmp_path):
    student = new_student()
    views, targets = toy()
    left = iter(range(12))

    def stop(*_):
        if next(left, None) is None:
            raise KeyboardInterrupt

    student.head.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        distill(student, views, targets, list(range(24)), SETTINGS, seed=0, folder=tmp_path)
    before = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert before["epoch"] == 4  # of three batches
    assert before["steps"] == 12
    assert 0 < before["spent_s"] < 3
    # With all its time spent, what goes on from here must not train at all.
    torch.save({**before, "spent_s": 3.0}, tmp_path / CHECKPOINT)
    resumed = new_student()
    distill(resumed, views, targets, list(range(24)), SETTINGS, seed=0, folder=tmp_path)
    after = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert (after["epoch"], after["spent_s"]) == (4, 3.0)
    weights = dict(resumed.named_parameters())
    learned = {name for name, weight in weights.items() if weight.requires_grad}
    assert before["average"].keys() == learned != weights.keys()  # the stem is as it was
    for name in learned:
        assert torch.equal(weights[name], before["average"][name]), name


def test_no_time_is_left_after_the_last_epoch(tmp_path):
    views, targets = toy()
    first, second = new_student(), new_student()
    short = replace(SETTINGS, cpu_minutes=0.5 / 60)
    for student in (first, second):
        distill(student, views, targets, list(range(24)), short, seed=0, folder=tmp_path)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
