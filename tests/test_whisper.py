import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import WhisperFeatureExtractor, WhisperModel

from export.encoders import encode_states, load_encoder
from export.encoders.whisper import Neighbours, load_whisper
from export.errors import RecipeError
from export.recipe import EncoderChoice
from tests.speech_corpus import make_whisper

RATE_HZ = 16000
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    make_whisper(folder)
    return folder


def speech(seconds, seed=0, level=0.1):
    rng = np.random.default_rng(seed)
    return (level * rng.standard_normal(round(seconds * RATE_HZ))).astype(np.float32)


def states_of_transformers(model, samples, bins=80):
    """Return the input of every layer and the output of the last, averaged in pairs: (S, F, D).

    The model hears as many seconds as its position table is long, which the samples must be.
    """
    seconds = model.config.max_source_positions // 50
    extractor = WhisperFeatureExtractor(feature_size=bins, chunk_length=seconds)
    mel = extractor(samples, sampling_rate=RATE_HZ, return_tensors="pt").input_features
    encoder = model.get_encoder()
    found = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for layer in (*encoder.layers, encoder.layer_norm)
    ]
    with torch.no_grad():
        encoder(mel)
    for hook in hooks:
        hook.remove()
    stacked = torch.cat(found)  # (S, F at 50 Hz, D)
    return (stacked[:, 0::2] + stacked[:, 1::2]) / 2


@pytest.mark.parametrize(("layers", "states"), [(1, 2), (2, 3), (3, 4), (3, 1), (3, 2)])
def test_hidden_states_are_those_of_transformers(tmp_path, layers, states):
    model = make_whisper(tmp_path, seconds=2, encoder_layers=3)
    samples = speech(2)
    with torch.no_grad():
        found = load_whisper(str(tmp_path), layers, 2.0, states)(torch.from_numpy(samples)[None])[0]
    expected = states_of_transformers(model, samples)
    assert found.shape == (states, 50, 32)
    assert expected.std() > 0.1
    kept = expected[layers + 1 - states : layers + 1]
    torch.testing.assert_close(found, kept, atol=1e-4, rtol=0)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 7, 8, 51, 100])
@pytest.mark.parametrize("stride", [1, 2])
def test_neighbours_are_a_convolution(stride, frames):
    torch.manual_seed(0)
    convolution = torch.nn.Conv1d(5, 7, kernel_size=3, stride=stride, padding=1)
    product = Neighbours(5, 7, stride)
    weight = Neighbours.from_kernel(convolution.weight)
    product.load_state_dict({"weight": weight, "bias": convolution.bias})
    samples = torch.randn(2, frames, 5)
    with torch.no_grad():
        expected = convolution(samples.transpose(1, 2)).transpose(1, 2)
        found = product(samples)
    assert found.shape == (2, -(-frames // stride), 7)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.corpora
@pytest.mark.parametrize("layers", [4, 6])
def test_hidden_states_of_the_real_weights_are_those_of_transformers(layers):
    root = os.environ.get("EDGE_SER_WEIGHTS")
    if root is None:
        pytest.skip("EDGE_SER_WEIGHTS does not name the folder of the real weights")
    folder = Path(root) / "whisper-base-encoder"
    model = WhisperModel.from_pretrained(folder).eval()
    model.config.max_source_positions = 3 * 50
    model.encoder.max_source_positions = 3 * 50
    positions = model.encoder.embed_positions.weight[: 3 * 50]
    model.encoder.embed_positions = torch.nn.Embedding.from_pretrained(positions)
    samples = speech(3)
    with torch.no_grad():
        found = load_whisper(str(folder), layers, 4.0, layers + 1)(torch.from_numpy(samples)[None])[
            0
        ]
    expected = states_of_transformers(model, samples)[: layers + 1]
    # Upper layers hold values over 200, whose sums are rounded; matrix products sum in an order of
    # their own.
    torch.testing.assert_close(found, expected, atol=1e-6 * float(expected.abs().max()), rtol=1e-4)


def test_as_a_student_it_hears_padded_clips_as_they_are(checkpoint):
    encoder = load_whisper(str(checkpoint), 2, 2.0, 2)
    samples = torch.from_numpy(np.stack([speech(2), speech(2, seed=1)]))
    features = encoder.features(samples)
    lengths = torch.tensor([119, 200])
    # As clips are padded; behind an odd end, the second convolution reaches over it.
    features[0, :, 119:] = 0
    with torch.no_grad():
        padded = encoder.encode(features, lengths)
        alone = encoder.encode(features[:1, :, :119])
        assert torch.equal(encoder.encode(encoder.features(samples)), encoder(samples))
    frames = int(encoder.frames_of(torch.tensor(119)))
    assert alone.shape == (1, 2, frames, 32)
    torch.testing.assert_close(padded[:1, :, :frames], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(padded[1], encoder.encode(features[1:])[0], atol=1e-4, rtol=0)


def test_convolutions_and_positions_stay_as_they_are_and_layers_learn(checkpoint):
    encoder = load_whisper(str(checkpoint), 1, 1.0, 2)
    learned = {name for name, weight in encoder.named_parameters() if weight.requires_grad}
    assert {name.split(".")[0] for name in learned} == {"layers"}


def test_what_is_said_of_the_encoder_is_true(checkpoint):
    encoder = load_whisper(str(checkpoint), 2, 1.0, 3)
    assert (encoder.states, encoder.dim, encoder.frame_rate_hz) == (3, 32, 25.0)
    assert not encoder.training
    assert encoder(torch.zeros(2, RATE_HZ)).shape == (2, 3, 25, 32)


@pytest.mark.parametrize(
    ("samples", "frames"), [(6400, 10), (6719, 10), (6879, 10), (6880, 11), (16000, 25)]
)
def test_a_window_is_as_long_as_it_is(checkpoint, samples, frames):
    encoder = load_whisper(str(checkpoint), 1, 1.0, 2)
    with torch.no_grad():
        assert encoder(torch.zeros(1, samples)).shape == (1, 2, frames, 32)


def test_nothing_is_shared_between_the_windows_of_a_batch(checkpoint):
    encoder = load_whisper(str(checkpoint), 2, 1.0, 3)
    samples = torch.from_numpy(
        np.stack([speech(1, seed, level) for seed, level in ((1, 1e-4), (2, 1.0))])
    )
    with torch.no_grad():
        both = encoder(samples)
        for row in range(2):
            alone = encoder(samples[row : row + 1])
            torch.testing.assert_close(both[row : row + 1], alone, atol=1e-4, rtol=0)


def test_a_choice_is_found_below_the_weights(checkpoint):
    choice = EncoderChoice("whisper", 2, checkpoint.name, states=3)
    encoder = load_encoder(choice, checkpoint.parent, 1.0)
    expected = load_whisper(str(checkpoint), 2, 1.0, 3)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor), name


def test_states_are_cached_in_half_precision(checkpoint):
    choice = EncoderChoice("whisper", 2, checkpoint.name, states=3)
    samples = speech(0.8)
    states = encode_states(choice, checkpoint.parent, 1.0, tuned=0)(samples)["states"]
    assert states.dtype == np.float16
    with torch.no_grad():
        expected = load_whisper(str(checkpoint), 2, 1.0, 3)(torch.from_numpy(samples)[None])[0]
    np.testing.assert_array_equal(states, expected.numpy().astype(np.float16))


def changed(checkpoint, folder, change):
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((checkpoint / "config.json").read_text())
    return str(folder)


def refused(*args):
    with pytest.raises(RecipeError) as fault:
        load_whisper(*args)
    return str(fault.value)


def test_a_missing_tensor_is_named(checkpoint, tmp_path):
    source = changed(checkpoint, tmp_path, lambda t: t.pop("model.encoder.layers.0.fc1.bias"))
    assert refused(source, 2, 1.0, 3) == (
        f"{source}: missing tensors ['layers.0.fc1.bias'], unexpected []; "
        "the checkpoint of such a network is needed"
    )


@pytest.mark.parametrize("damage", ["no config", "no weights", "text", "cut"])
def test_a_folder_that_is_no_checkpoint_is_refused_in_one_line(checkpoint, tmp_path, damage):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    weights = folder / "model.safetensors"
    if damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "text":
        (folder / "config.json").write_text("layers: 6")
    else:
        weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(RecipeError) as fault:
        load_whisper(str(folder), 2, 1.0, 1)
    (line,) = str(fault.value).splitlines()
    assert line.startswith(f"checkpoint {str(folder)!r} cannot be read (")
    needed = "config.json and model.safetensors or pytorch_model.bin"
    assert line.endswith(f"); it needs {needed}")


def test_an_unexpected_tensor_is_named(checkpoint, tmp_path):
    more = {"model.encoder.layers.1.gate": torch.zeros(1)}
    source = changed(checkpoint, tmp_path, lambda t: t.update(more))
    assert refused(source, 2, 1.0, 3) == (
        f"{source}: missing tensors [], unexpected ['layers.1.gate']; "
        "the checkpoint of such a network is needed"
    )


def test_what_belongs_to_layers_that_are_not_kept_may_be_missing(checkpoint, tmp_path):
    source = changed(checkpoint, tmp_path, lambda t: t.pop("model.encoder.layers.1.fc1.bias"))
    assert load_whisper(source, 1, 1.0, 2).states == 2


def test_half_precision_checkpoints_are_read(checkpoint, tmp_path):
    def halve(tensors):
        tensors |= {name: tensor.half() for name, tensor in tensors.items()}

    weight = load_whisper(changed(checkpoint, tmp_path, halve), 1, 1.0, 2).conv1.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, load_whisper(str(checkpoint), 1, 1.0, 2).conv1.weight.half().float())


@pytest.mark.parametrize("layers", [0, 3])
def test_layers_that_the_encoder_does_not_have_are_refused(checkpoint, layers):
    line = refused(str(checkpoint), layers, 1.0, 1)
    assert line == f"layers = {layers}: this encoder has 1 to 2 layers"


@pytest.mark.parametrize("states", [0, 4])
def test_states_that_the_layers_do_not_have_are_refused(checkpoint, states):
    line = refused(str(checkpoint), 2, 1.0, states)
    assert line == f"states = {states}: 2 layers have 1 to 3 states"


@pytest.mark.parametrize("window_s", [0.61, 1.01, 1.05, 1.1, 1.13])
def test_a_window_of_any_length_has_positions(checkpoint, window_s):
    encoder = load_whisper(str(checkpoint), 1, window_s, 2)
    samples = round(window_s * RATE_HZ)
    with torch.no_grad():
        assert encoder(torch.zeros(1, samples)).shape[2] == (samples // 160 + 1) // 4


def test_more_than_30_s_are_refused(checkpoint):
    assert load_whisper(str(checkpoint), 1, 30.0, 2).embed_positions.weight.shape == (1500, 32)
    line = refused(str(checkpoint), 1, 30.5, 2)
    assert line == "window_s = 30.5: Whisper hears at most 30 s; shorten it"


def load_offline(home, source):
    """Load by hub id in a process of its own: the hub's settings are read at import."""
    script = "import sys; from export.encoders.whisper import load_whisper\n"
    script += (
        "print(float(load_whisper(sys.argv[1], 2, 1.0, 3).conv1.weight.detach().double().sum()))"
    )
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script, source],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_a_hub_id_is_found_in_the_cache_of_the_hub(checkpoint, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--small"
    snapshot = repository / "snapshots" / commit
    for folder in (snapshot, repository / "refs", repository / "blobs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for name in ("config.json", "model.safetensors"):
        (repository / "blobs" / name[:5]).write_bytes((checkpoint / name).read_bytes())
        (snapshot / name).symlink_to(Path("..", "..", "blobs", name[:5]))
    done = load_offline(tmp_path, "someone/small")
    assert done.returncode == 0, done.stderr
    expected = load_whisper(str(checkpoint), 2, 1.0, 3).conv1.weight.detach().double().sum()
    assert float(done.stdout) == float(expected)


@pytest.mark.parametrize("source", ["someone/absent", "whisper-base-encoder", "no/hub/id"])
def test_a_source_that_is_nowhere_is_one_line(tmp_path, source):
    last = load_offline(tmp_path, source).stderr.splitlines()[-1]
    assert last.startswith(f"export.errors.RecipeError: no checkpoint {source!r}: ")
