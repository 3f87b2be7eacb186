"""A recipe from speech to a certified bundle: its stages, and where each lies.

<out>/<name>/features             what is cached of every clip, for all seeds
<out>/<name>/targets-<key>        what students of it hear and are taught
<out>/<name>/baselines            linear probe and MFCC + SVM on the same split
<out>/<name>/seed<N>/folds        out-of-fold scores, for a recipe with [folds]
<out>/<name>/seed<N>/train        the head, or the student
<out>/<name>/seed<N>/graph        model.onnx
<out>/<name>/seed<N>/quantize     the INT8 graphs, and those for GPUs in half precision
<out>/<name>/seed<N>/certify      certificate.json and .png
<out>/<name>/seed<N>/bundle       what the runtime loads
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edge_ser.bundle import ADAPTATION
from export.baselines import make_baselines
from export.certify import make_certificate
from export.crossfit import make_heads
from export.distill import make_student
from export.encoders import encode_states
from export.errors import RecipeError
from export.folds import make_folds
from export.graph import make_graph
from export.pack import describe, make_bundle
from export.quantize import make_int8
from export.recipe import Recipe
from export.recipe_file import read_recipe
from export.speech import Speech
from export.stage import discard, fingerprint, key_of, run_stage
from export.teacher import TEACHERS, load_teacher
from export.views import Compute, make_sound_views, make_views

Make = Callable[[Path], None]


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: As ``--only`` and ``--from`` take it.
        folder: Where its results lie.
        after: The stage whose results it reads; None for the first.
        reads: What else its results depend on.
        make: Fills the folder that it is given.
    """

    name: str
    folder: Path
    after: str | None
    reads: dict[str, Any]
    make: Make


class Run:
    """One recipe and one seed.

    Args:
        path: The recipe's file.
        corpora: Folder of the corpora.
        weights: Folder of the pretrained checkpoints; None takes every source as a hub id.
        out: Where the results go.
        seed: Of all chance in training.
        only: Stop after this stage; `forget` starts with it.
        start: `forget` starts with this stage.
        recipe: In place of what the file holds: a variant of it.

    Attributes:
        keys: The key of every stage that was made or found, by its name.

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
        recipe: Recipe | None = None,
    ) -> None:
        self.path, self.weights, self.out, self.seed = path, weights, out, seed
        self.recipe = recipe or read_recipe(path)
        self.speech = Speech(self.recipe, corpora)
        self.home = out / self.recipe.name
        self.folder = self.home / f"seed{seed}"
        self._only, self._start = only, start
        self.keys: dict[str, str] = {}
        names = [stage.name for stage in (*self.shared(), *self.seeded())]
        for name in (only, start):
            if name is not None and name not in names:
                raise RecipeError(f"stage {name!r}: {path} has the stages {', '.join(names)}")

    @property
    def trainings(self) -> int:
        """How many trainings of a seed run at the same time, as far as there are cores."""
        recipe = self.recipe
        if recipe.distill:
            return 2 if recipe.distill.refit else 1
        assert recipe.train  # a recipe has either [train] or [distill]
        return recipe.folds.k if recipe.folds else recipe.train.folds + 1

    def forget(self) -> None:
        """Remove the results of the stage that is to be made again, and of all later ones."""
        stages = [*self.shared(), *self.seeded()]
        names = [stage.name for stage in stages]
        first = self._only or self._start
        for stage in stages[names.index(first) :] if first else ():
            discard(stage.folder)

    def make(self, stages: Sequence[Stage]) -> None:
        """Make every stage that is not there or whose inputs have changed."""
        for stage in stages:
            reads = {"after": self.keys.get(stage.after or ""), **stage.reads}
            self.keys[stage.name] = run_stage(stage.folder, reads, stage.make)
            if stage.name == self._only:
                return

    def shared(self) -> list[Stage]:
        """Return the stages that all seeds share."""
        speech, recipe = self.speech, self.recipe
        if recipe.distill:
            teacher, trained = self.teacher()
            settings = recipe.distill
            layers = settings.layers > 0
            load = partial(load_teacher, teacher, self.weights, trained, recipe.encoder, layers)
            files = [f / part / "model.safetensors" for f in trained for part in TEACHERS.values()]
            reads = {
                "teacher": fingerprint(files),
                "pretrained": [
                    pretrained(one, self.weights) for one in (teacher, recipe) if one.encoder.source
                ],
                "features": "samples" if recipe.encoder.family == "wav" else "mel",
                "layers": layers,
            }
            reads, make = views_of(speech, settings.views, settings.nonspeech, reads, load)
            # Students that hear the same from the same teacher share it.
            home = self.out / teacher.name / f"targets-{key_of(reads)[:8]}"
            return [Stage("targets", home, None, reads, make)]
        home = self.home / "features"
        features = Stage("features", home, None, *features_of(speech, self.weights))
        if recipe.folds:
            return [features]
        make = partial(make_baselines, speech, self.weights, features.folder)
        baselines = Stage(
            "baselines", self.home / "baselines", "features", {"data": recipe.data}, make
        )
        return [features, baselines]

    def seeded(self) -> list[Stage]:
        """Return the stages of this seed."""
        speech, recipe, seed = self.speech, self.recipe, self.seed
        settings = {
            name: getattr(recipe, name)
            for name in ("data", "encoder", "head", "train", "distill", "folds")
        }
        cache = self.shared()[0]
        if recipe.folds:
            make = partial(make_folds, speech, self.weights, cache.folder, seed)
            reads = {**settings, "seed": seed}
            return [Stage("folds", self.folder / "folds", cache.name, reads, make)]
        learn = partial(make_student, speech, self.weights, cache.folder, seed)
        reads = {**settings, "seed": seed}
        if recipe.train:
            learn = partial(make_heads, speech, self.weights, cache.folder, seed)
        folders = {
            name: self.folder / name for name in ("train", "graph", "quantize", "certify", "bundle")
        }
        makes: dict[str, Make] = {
            "train": learn,
            "graph": partial(make_graph, speech, self.weights, folders["train"]),
            "quantize": self._quantize,
            "certify": self._certify,
            "bundle": self._bundle,
        }
        reads_of: dict[str, dict[str, Any]] = {
            "train": reads,
            "quantize": {"quantize": recipe.quantize},
        }
        stages, after = [], cache.name
        for name, make in makes.items():
            stages.append(Stage(name, folders[name], after, reads_of.get(name, {}), make))
            after = name
        return stages

    def scores(self) -> dict[str, Any]:
        """Return the scores of every system of a finished run, by the name of the system."""
        found = self.findings()
        return {**found["systems"], **found.get("baselines", {})}

    def findings(self) -> dict[str, Any]:
        """Return what a finished run found out: its certificate, or with [folds] its answers."""
        folds, certify = self.folder / "folds" / "folds.json", self.folder / "certify"
        return _read_json(folds if self.recipe.folds else certify / "certificate.json")

    def teacher_scores(self) -> list[dict[str, Any]]:
        """Return the scores of every finished seed of the teacher; none without a teacher."""
        if not self.recipe.distill:
            return []
        home = self.out / self.teacher()[0].name
        files = sorted(home.glob("seed*/certify/certificate.json"))
        return [_read_json(file)["systems"] for file in files]

    def _quantize(self, folder: Path) -> None:
        split, first = self.speech.split, self.speech.first_windows
        windows, judged = first(split.calibration), first(split.validation)
        make_int8(self.folder / "graph", windows, judged, self.recipe.quantize, folder)

    def _certify(self, folder: Path) -> None:
        facts = {
            "recipe": asdict(self.recipe),
            "command": f"python -m export run {self.path.name} --seeds {self.seed}",
            "seed": self.seed,
            "speakers_not_heard": _read_json(self.folder / "train" / "confidence.json")["scores"],
            "parity": _read_json(self.folder / "graph" / "parity.json"),
            "quantization": _read_json(self.folder / "quantize" / "quantization.json"),
        }
        if self.recipe.train:
            facts["baselines"] = _read_json(self.home / "baselines" / "baselines.json")
            rows = _read_json(self.folder / "train" / "adaptation_scores.json")
            facts["adapted_speakers_not_heard"] = rows
        make_certificate(
            self.speech, self._metadata(), self.folder / "quantize",
            self._adaptation(), facts, folder,
        )  # fmt: skip

    def _bundle(self, folder: Path) -> None:
        make_bundle(
            self._metadata(), self.folder / "quantize", self.folder / "certify",
            self._adaptation(), folder,
        )  # fmt: skip

    def _adaptation(self) -> Path:
        """Return the adaptation of the bundle; a student answers like its teacher, and takes its.

        A student's own answers for speakers whom it has not heard are too few to learn one.
        """
        home = self.teacher()[1][0] if self.recipe.distill else self.folder / "train"
        return home / ADAPTATION

    def _metadata(self) -> Any:
        teacher = None
        if self.recipe.distill:
            recipe, trained = self.teacher()
            sha256 = fingerprint([folder / "model.safetensors" for folder in trained])
            teacher = {"name": recipe.name, "sha256": sha256}
        confidence = _read_json(self.folder / "train" / "confidence.json")
        return describe(self.speech, confidence, teacher)

    def teacher(self) -> tuple[Recipe, list[Path]]:
        """Return the teacher's recipe and the folders of its trainings, which must be there."""
        assert self.recipe.distill  # only such recipes have a teacher
        path = self.path.parent / self.recipe.distill.teacher
        recipe = read_recipe(path)
        folders = []
        for seed in self.recipe.distill.seeds:
            folders.append(self.out / recipe.name / f"seed{seed}" / "train")
            if not (folders[-1] / "model.safetensors").is_file():
                raise RecipeError(
                    f"no teacher {str(folders[-1])!r}; run {path} with the same --out first, "
                    f"--seeds {seed}"
                )
        return recipe, folders


def features_of(speech: Speech, weights: Path | None) -> tuple[dict[str, Any], Make]:
    """Return what the features of a recipe with [train] depend on, and what makes them."""
    recipe = speech.recipe
    assert recipe.train  # only such recipes have features
    train = recipe.train
    load = partial(encode_states, recipe.encoder, weights, recipe.windows.window_s, train.tuned)
    reads = {
        "pretrained": pretrained(recipe, weights),
        "encoder": recipe.encoder,
        "tuned": train.tuned,
    }
    return views_of(speech, train.views, train.nonspeech, reads, load)


def views_of(
    speech: Speech, most: int, nonspeech: int, reads: dict[str, Any], load: Callable[[], Compute]
) -> tuple[dict[str, Any], Make]:
    """Return what a cache of views depends on, and what makes it.

    Args:
        speech: The clips.
        most: Augmented views of a clip.
        nonspeech: Sounds that are no speech.
        reads: What ``load`` depends on.
        load: As `make_views` takes it.
    """
    clips = (*speech.clips, *speech.unlabelled)
    views = speech.views(most)

    def make(folder: Path) -> None:
        make_views(folder, clips, views, speech.cutting, load)
        if nonspeech:
            make_sound_views(folder, len(clips), nonspeech, speech.cutting, load())

    heard = {"speech": speech.key, "cutting": speech.cutting, "views": views}
    return {**heard, "nonspeech": nonspeech, **reads}, make


def pretrained(recipe: Recipe, weights: Path | None) -> str:
    """Return the fingerprint of the checkpoint's folder, or its hub id."""
    source = recipe.encoder.source
    folder = weights / source if weights else None
    if folder and folder.is_dir():
        return fingerprint(sorted(folder.glob("*")))
    return source


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text())
