"""A recipe from speech to a certified bundle: its stages, and where each lies.

<out>/<name>/features | targets     what is cached of every clip, for all seeds
<out>/<name>/baselines              linear probe and MFCC + SVM on the same split
<out>/<name>/folds                  out-of-fold scores, for a recipe with [folds]
<out>/<name>/seed<N>/train          the head, or the student
<out>/<name>/seed<N>/graph          model.onnx
<out>/<name>/seed<N>/quantize       the INT8 graphs
<out>/<name>/seed<N>/certify        certificate.json and .png
<out>/<name>/seed<N>/bundle         what the runtime loads
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from edge_ser.bundle import SCHEMA_VERSION, Metadata
from edge_ser.samples import sample_paths
from export import certify, quantize, splits
from export.baselines import linear_probe, mfcc_statistics, mfcc_svm, state_statistics
from export.confidence import abstain_threshold, clip_probs, fit_temperature
from export.corpora import Clip, describe, label_mask, load_corpora, select
from export.distill import distill, load_teacher
from export.encoders import load_encoder
from export.errors import RecipeError
from export.graph import check_parity, export_graph
from export.heads import CnnHead
from export.metrics import Floats
from export.model import Classifier, load_classifier, new_head
from export.pack import pack, tool_versions
from export.recipe import EncoderChoice, Recipe, read_recipe
from export.scores import brief, score
from export.stage import fingerprint, run_stage
from export.train import Targets, train_head, window_logits
from export.views import (
    Arrays,
    Compute,
    Cutting,
    Samples,
    View,
    load_views,
    make_views,
    view_windows,
)

RATE_HZ = 16000
CERTIFICATES = "seed*/certify/certificate.json"


def encode_states(choice: EncoderChoice, weights: Path | None, window_s: float) -> Compute:
    """Return what computes the hidden states (S, F, D) of a window, in half precision."""
    encoder = load_encoder(choice, weights, window_s)

    @torch.no_grad()
    def compute(samples: Samples) -> Arrays:
        return {"states": encoder(torch.from_numpy(samples)[None])[0].half().numpy()}

    return compute


class Run:
    """One recipe and one seed.

    Args:
        path: The recipe's file.
        corpora: Folder of the corpora.
        weights: Folder of the pretrained checkpoints.
        out: Where the results go.
        seed: Of the weights and of all chance in training.
        only: Make this stage again and stop after it.
        start: Make this stage and all later ones again.

    Raises:
        EdgeSerError: The recipe or the corpora cannot be used.
    """

    def __init__(
        self,
        path: Path,
        corpora: Path,
        weights: Path | None,
        out: Path,
        *,
        seed: int = 0,
        only: str | None = None,
        start: str | None = None,
    ) -> None:
        self.path, self.corpora, self.weights, self.out = path, corpora, weights, out
        self.recipe = read_recipe(path)
        self.seed, self.only, self.start = seed, only, start
        self.home = out / self.recipe.name
        self.folder = self.home / f"seed{seed}"
        for name in (only, start):
            if name is not None and name not in self.stages:
                allowed = ", ".join(self.stages)
                raise RecipeError(f"stage {name!r}: the stages of {path} are {allowed}")
        self._keys: dict[str, str] = {}

    @property
    def shared(self) -> dict[str, Callable[[], None]]:
        """The stages that all seeds share, by name and in order."""
        if self.recipe.distill:
            return {"targets": self._targets}
        if self.recipe.folds:
            return {"features": self._features}
        return {"features": self._features, "baselines": self._baselines}

    @property
    def seeded(self) -> dict[str, Callable[[], None]]:
        """The stages of one seed, by name and in order."""
        if self.recipe.folds:
            return {"folds": self._folds}
        train = self._train if self.recipe.train else self._distill
        return {
            "train": train,
            "graph": self._graph,
            "quantize": self._quantize,
            "certify": self._certify,
            "bundle": self._bundle,
        }

    @property
    def stages(self) -> dict[str, Callable[[], None]]:
        """The stages by name, in the order in which they are made."""
        return self.shared | self.seeded

    def run_shared(self) -> None:
        """Make the shared stages that are not there or whose inputs have changed."""
        self._run(self.shared)

    def run_seeded(self) -> None:
        """Make the stages of this seed that are not there or whose inputs have changed."""
        self._run(self.seeded)

    def _run(self, stages: Mapping[str, Callable[[], None]]) -> None:
        for name, make in stages.items():
            make()
            if name == self.only:
                return

    def scores(self) -> dict[str, Any]:
        """Return the scores of every system of a finished run, by the name of the system."""
        if self.recipe.folds:
            found = _read_json(self.folder / "folds" / "folds.json")
            return {name: found[name] for name in ("linear_probe", "head")}
        certificate = _read_json(self.folder / "certify" / "certificate.json")
        return {**certificate["systems"], **certificate.get("baselines", {})}

    def teacher_scores(self) -> list[dict[str, Any]]:
        """Return the scores of every finished seed of the teacher; none without a teacher."""
        if not self.recipe.distill:
            return []
        home = self.out / self._teacher()[0].name
        return [_read_json(file)["systems"] for file in sorted(home.glob(CERTIFICATES))]

    # What is read ---------------------------------------------------------------------------

    @cached_property
    def clips(self) -> tuple[Clip, ...]:
        """All clips that carry a label of the model, in the order of the recipe's corpora."""
        data = self.recipe.data
        selection = select(load_corpora(self.corpora, data.corpora), data.labels, data.merge)
        for (corpus, emotion), count in selection.dropped.items():
            tqdm.write(f"{corpus}: {count} clips of {emotion!r} left out, which is no label")
        return selection.clips

    @cached_property
    def split(self) -> splits.Split:
        """Train, validation, calibration and test clips."""
        data = self.recipe.data
        return splits.split(self.clips, data.validation, calibration_clips=data.calibration_clips)

    @cached_property
    def targets(self) -> Targets:
        """Labels of all clips."""
        return Targets.of(self.clips, self.recipe.data.labels)

    @cached_property
    def cutting(self) -> Cutting:
        """How views are cut."""
        return Cutting(RATE_HZ, self.recipe.windows, self.recipe.augmentation)

    @cached_property
    def speech(self) -> str:
        """The fingerprint of all audio and of what is said about it."""
        said = [[c.corpus, c.emotion, c.speaker_key, c.path.name] for c in self.clips]
        return fingerprint(clip.path for clip in self.clips) + json.dumps(said)

    def where(self, clips: Sequence[Clip]) -> list[int]:
        """Return the places of clips among all."""
        places = {clip: place for place, clip in enumerate(self.clips)}
        return [places[clip] for clip in clips]

    def views(self, most: int) -> list[int]:
        """Return the number of augmented views of each clip: none of a test speaker's."""
        heard = set(self.split.test) if not self.recipe.folds else set()
        return [0 if clip in heard else most for clip in self.clips]

    def _pretrained(self) -> str:
        source = (self.weights or Path()) / self.recipe.encoder.source
        return fingerprint(sorted(source.glob("*"))) if source.is_dir() else str(source)

    def _stage(
        self, name: str, folder: Path, reads: dict[str, Any], make: Callable[[Path], None]
    ) -> None:
        names = list(self.stages)
        again = name == self.only or (
            self.start is not None and names.index(name) >= names.index(self.start)
        )
        self._keys[name] = run_stage(folder, reads, make, again=again)

    # The stages -----------------------------------------------------------------------------

    def _features(self) -> None:
        recipe = self.recipe
        assert recipe.train  # a recipe has either [train] or [distill]
        views = self.views(recipe.train.views)
        load = partial(encode_states, recipe.encoder, self.weights, recipe.windows.window_s)
        reads = {
            "speech": self.speech,
            "pretrained": self._pretrained(),
            "encoder": recipe.encoder,
            "cutting": self.cutting,
            "views": views,
        }
        self._stage(
            "features",
            self.home / "features",
            reads,
            lambda folder: make_views(folder, self.clips, views, self.cutting, load),
        )

    def _baselines(self) -> None:
        features = self.home / "features"

        def make(folder: Path) -> None:
            (folder / "baselines.json").write_text(
                json.dumps(self._score_baselines(load_views(features)), indent=1)
            )

        reads = {"features": self._keys["features"], "data": self.recipe.data}
        self._stage("baselines", self.home / "baselines", reads, make)

    def _score_baselines(self, views: Sequence[View]) -> dict[str, Any]:
        """Score both baselines on the test speakers."""
        split, labels = self.split, self.recipe.data.labels
        heard = (split.train, split.test, split.validation)
        probe = linear_probe(state_statistics(views, self.clips), labels, *heard)
        svm = mfcc_svm(mfcc_statistics(self.clips), labels, *heard)
        masks = label_mask(self.clips, labels)
        return {
            baseline.name: {
                "settings": baseline.settings,
                **score(baseline.scores, split.test, labels, masks, are_probs=False),
            }
            for baseline in (probe, svm)
        }

    def _folds(self) -> None:
        recipe = self.recipe
        assert recipe.train and recipe.folds  # the stage is there only for such recipes

        def make(folder: Path) -> None:
            (folder / "folds.json").write_text(
                json.dumps(self._score_folds(load_views(self.home / "features"), folder), indent=1)
            )

        reads = {
            "features": self._keys["features"],
            **{name: getattr(recipe, name) for name in ("data", "head", "train", "folds")},
            "seed": self.seed,
        }
        self._stage("folds", self.folder / "folds", reads, make)

    def _score_folds(self, views: Sequence[View], folder: Path) -> dict[str, Any]:
        """Predict every clip by a head, and by a linear probe, that have not heard its speaker."""
        recipe, labels = self.recipe, self.recipe.data.labels
        statistics = state_statistics(views, self.clips)
        answers = {}

        def by_head(train: tuple[Clip, ...], held_out: tuple[Clip, ...]) -> Floats:
            part = folder / f"without-{held_out[0].speaker_key.replace('/', '-')}"
            part.mkdir(exist_ok=True)
            head = self._new_head(views)
            chosen = self.where(train)
            train_head(head, views, self.targets, chosen, recipe.train, seed=self.seed, folder=part)
            return clip_probs(window_logits(head, views, self.where(held_out)))

        def by_probe(train: tuple[Clip, ...], held_out: tuple[Clip, ...]) -> Floats:
            return linear_probe(statistics, labels, train, held_out).scores

        for name, answer in (("linear_probe", by_probe), ("head", by_head)):
            found = splits.out_of_fold(self.clips, recipe.folds.k, recipe.folds.seed, answer)
            answers[name] = score(
                found, self.clips, labels, label_mask(self.clips, labels), are_probs=name == "head"
            )
            tqdm.write(f"{name}: {brief(answers[name])}")
        return {"seed": self.seed, "folds": asdict(recipe.folds), **answers}

    def _new_head(self, views: Sequence[View]) -> CnnHead:
        states, _, dim = views[0].arrays["states"].shape
        torch.manual_seed(self.seed)
        return new_head(self.recipe, states, dim)

    def _train(self) -> None:
        recipe = self.recipe
        assert recipe.train  # a recipe has either [train] or [distill]

        def make(folder: Path) -> None:
            views = load_views(self.home / "features")
            train, validation = (self.where(c) for c in (self.split.train, self.split.validation))

            def fit(chosen: list[int], name: str) -> CnnHead:
                part = folder / name
                part.mkdir(exist_ok=True)
                head = self._new_head(views)
                train_head(
                    head, views, self.targets, chosen, recipe.train, seed=self.seed, folder=part
                )
                return head

            head = fit(train, "choice")
            self._write_confidence(window_logits(head, views, validation), folder)
            if recipe.train.refit:
                head = fit(train + validation, "refit")
            save_file(head.state_dict(), folder / "model.safetensors")

        reads = {
            "features": self._keys["features"],
            **{name: getattr(recipe, name) for name in ("data", "head", "train")},
            "seed": self.seed,
        }
        self._stage("train", self.folder / "train", reads, make)

    def _write_confidence(self, logits: Sequence[Floats], folder: Path) -> None:
        """Fit temperature and threshold on the validation clips, and say what they scored."""
        clips, labels = self.split.validation, self.recipe.data.labels
        true = self.targets.label[self.where(clips)].numpy()
        temperature = fit_temperature(logits, true)
        probs = clip_probs(logits, temperature)
        scores = score(probs, clips, labels, label_mask(self.clips, labels))
        tqdm.write(f"validation: {brief(scores)}")
        found = {"temperature": temperature, "abstain_below": abstain_threshold(probs, true)}
        (folder / "confidence.json").write_text(
            json.dumps({**found, "validation": scores}, indent=1)
        )

    def _teacher(self) -> tuple[Recipe, Path]:
        """Return the teacher's recipe and its trained weights, which must be there."""
        assert self.recipe.distill  # a recipe has either [train] or [distill]
        path = self.path.parent / self.recipe.distill.teacher
        recipe = read_recipe(path)
        trained = self.out / recipe.name / "seed0" / "train" / "model.safetensors"
        if not trained.is_file():
            raise RecipeError(f"no teacher {str(trained)!r}; run {path} with the same --out first")
        return recipe, trained

    def _targets(self) -> None:
        assert self.recipe.distill  # a recipe has either [train] or [distill]
        teacher, trained = self._teacher()
        views = self.views(self.recipe.distill.views)
        reads = {
            "speech": self.speech,
            "teacher": fingerprint([trained]),
            "cutting": self.cutting,
            "views": views,
        }
        load = partial(load_teacher, teacher, self.weights, trained)
        self._stage(
            "targets",
            self.home / "targets",
            reads,
            lambda folder: make_views(folder, self.clips, views, self.cutting, load),
        )

    def _distill(self) -> None:
        recipe = self.recipe
        assert recipe.distill  # a recipe has either [train] or [distill]

        def make(folder: Path) -> None:
            views = load_views(self.home / "targets")
            torch.manual_seed(self.seed)
            encoder = load_encoder(recipe.encoder, self.weights, recipe.windows.window_s)
            student = Classifier(encoder, new_head(recipe, encoder.states, encoder.dim))
            train = self.where(self.split.train)
            distill(
                student, views, self.targets, train, recipe.distill, seed=self.seed, folder=folder
            )
            validation = self.where(self.split.validation)
            self._write_confidence(window_logits(student, views, validation, "samples"), folder)
            save_file(student.state_dict(), folder / "model.safetensors")

        reads = {
            "targets": self._keys["targets"],
            **{name: getattr(recipe, name) for name in ("data", "encoder", "head", "distill")},
            "seed": self.seed,
        }
        self._stage("train", self.folder / "train", reads, make)

    def _confidence(self) -> dict[str, Any]:
        return _read_json(self.folder / "train" / "confidence.json")

    def _metadata(self) -> Metadata:
        """Return what the bundle says about itself, all but its files."""
        recipe, confidence = self.recipe, self._confidence()
        teacher = None
        if recipe.distill:
            made, trained = self._teacher()
            teacher = {"recipe": made.name, "sha256": fingerprint([trained])}
        encoder = {key: value for key, value in asdict(recipe.encoder).items() if value}
        return Metadata(
            schema_version=SCHEMA_VERSION,
            name=recipe.name,
            labels=recipe.data.labels,
            sample_rate_hz=RATE_HZ,
            window_s=recipe.windows.window_s,
            hop_s=recipe.windows.hop_s,
            temperature=confidence["temperature"],
            abstain_below=confidence["abstain_below"],
            encoder=encoder,
            head=asdict(recipe.head),
            teacher=teacher,
            corpora=tuple(describe(self.clips)),
            tools=tool_versions(),
            files={},
        )

    def _windows(self, clips: Sequence[Clip]) -> list[Samples]:
        """Return the first window of each clip."""
        return [next(view_windows(clip, 0, self.cutting)) for clip in clips]

    def _graph(self) -> None:
        def make(folder: Path) -> None:
            trained = self.folder / "train" / "model.safetensors"
            model = load_classifier(self.recipe, self.weights, trained)
            file = folder / "model.onnx"
            export_graph(model, self._metadata().graph_properties(), RATE_HZ, file)
            # Each eighth of the calibration clips by length: the shortest and the longest too.
            windows = sorted(self._windows(self.split.calibration), key=len)
            worst = check_parity(model, file, windows[:: max(1, len(windows) // 8)])
            (folder / "parity.json").write_text(json.dumps({"worst_logit_difference": worst}))
            tqdm.write(f"graph: differs from torch by {worst:.1e} at most")

        reads = {"train": self._keys["train"], "windows": self.recipe.windows}
        self._stage("graph", self.folder / "graph", reads, make)

    def _quantize(self) -> None:
        def make(folder: Path) -> None:
            fp32 = self.folder / "graph" / "model.onnx"
            windows = self._windows(self.split.calibration)
            kept = quantize.quantize(fp32, windows, folder)
            errors = quantize.layer_errors(fp32, folder / "model_int8_x86.onnx", windows[:8])
            said = {"float_nodes": kept, "layer_error": errors}
            (folder / "quantization.json").write_text(json.dumps(said, indent=1))
            shutil.copyfile(fp32, folder / fp32.name)

        clips = [f"{clip.corpus}/{clip.path.name}" for clip in self.split.calibration]
        reads = {"graph": self._keys["graph"], "calibration": clips}
        self._stage("quantize", self.folder / "quantize", reads, make)

    def _certify(self) -> None:
        def make(folder: Path) -> None:
            graphs, test = self.folder / "quantize", self.split.test
            masks = label_mask(self.clips, self.recipe.data.labels)
            with tqdm(total=len(test) * len(certify.SYSTEMS)) as bar:
                scores = certify.certify(self._metadata(), graphs, test, masks, bar)
            certificate = {**self._facts(), **scores}
            (folder / "certificate.json").write_text(json.dumps(certificate, indent=1) + "\n")
            for name in ("fp32", "int8_x86"):
                tqdm.write(f"test, {name}: {brief(certificate['systems'][name])}")
            certify.check_gate(certificate)
            certify.draw(certificate, folder / "certificate.png")

        reads = {"quantize": self._keys["quantize"], "data": self.recipe.data}
        self._stage("certify", self.folder / "certify", reads, make)

    def _facts(self) -> dict[str, Any]:
        """Return what a certificate says beside its scores: how to get them again."""
        split = self.split
        facts = {
            "schema_version": SCHEMA_VERSION,
            "recipe": json.loads(json.dumps(asdict(self.recipe))),
            "command": f"python -m export run {self.path.name} --seed {self.seed}",
            "seed": self.seed,
            "tools": tool_versions(),
            "test_speakers": sorted(splits.speakers(split.test)),
            "validation_speakers": sorted(splits.speakers(split.validation)),
            "calibration": [f"{clip.corpus}/{clip.path.name}" for clip in split.calibration],
            "validation": self._confidence()["validation"],
            "parity": _read_json(self.folder / "graph" / "parity.json"),
            "quantization": _read_json(self.folder / "quantize" / "quantization.json"),
        }
        if self.recipe.train:
            facts["baselines"] = _read_json(self.home / "baselines" / "baselines.json")
        return facts

    def _bundle(self) -> None:
        def make(folder: Path) -> None:
            certificate = self.folder / "certify"
            sample = sample_paths()[0]
            pack(self._metadata(), self.folder / "quantize", certificate, sample, folder)

        self._stage("bundle", self.folder / "bundle", {"certify": self._keys["certify"]}, make)


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text())
