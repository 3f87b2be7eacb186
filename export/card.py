"""The model card: the README of a bundle, generated from its metadata and its certificate."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from edge_ser.bundle import Metadata
from export.conditions import table


def model_card(metadata: Metadata, certificate: Mapping[str, Any]) -> str:
    """Return the bundle's README: what it is, what it scored, what it must not be used for.

    Of a part that the certificate does not have, the card says nothing.
    """
    languages = sorted({corpus["language"] for corpus in metadata.corpora})
    front = ["---", "library_name: edge-ser", "pipeline_tag: audio-classification"]
    front += [f"language: [{', '.join(languages)}]", "license: other", "---"]
    gate = certificate["gate"]["int8_x86"]
    equal = (
        f"INT8 gives the same label as full precision on {gate['labels_equal']:.1%} of the clips"
    )
    if "ua_kept" in gate:
        equal += f" and keeps {gate['ua_kept']:.1%} of the pooled UA"
    made = "made and certified" if metadata.certified else "made, and NOT certified,"
    no_speech = certificate["nonspeech"]
    lines = [
        *front,
        "",
        f"# {metadata.name}",
        "",
        f"Speech emotion recognition: {', '.join(metadata.labels)}. INT8 ONNX for CPUs, {made} by "
        "edge_ser. `model_fp16.onnx` and `model_int8_fp16.onnx`, where they lie beside it, are for "
        "GPUs: full precision and INT8 with their float parts in half, which the certificate does "
        "not score.",
        "",
        f"Encoder: `{json.dumps(metadata.encoder)}`. Head: `{json.dumps(metadata.head)}`. "
        f"Teacher: `{json.dumps(metadata.teacher)}`.",
        "",
        "## Scores",
        "",
        *(_scores(certificate) if "pooled" in certificate["systems"]["fp32"] else ()),
        f"{equal}. `certificate.json` has everything else.",
        "",
        "How often INT8 says what full precision says, and how far their answers are apart, on "
        "clips of other lengths (the longer ones clips of one voice and emotion joined), levels "
        "and noise:",
        "",
        table(certificate["conditions"]),
        *_float_layers(certificate["quantization"]),
        *(_adapted(certificate["adapted"]) if "adapted" in certificate else ()),
        f"Of {no_speech['minutes']} minutes of noise, tones like music, hum and silence, "
        f"{no_speech['uncertain']:.1%} were called uncertain.",
        "",
        "## Limits",
        "",
        "It tells how speech sounds, not what a person feels. Not for judging people, for hiring, "
        "schooling, policing or health.",
        "",
    ]
    if metadata.corpora:
        lines += ["Trained on acted and broadcast speech of few speakers.", ""]
        lines += ["## Corpora", ""]
        lines += [
            f"- {corpus['name']} ({corpus['language']}): {corpus['licence']}. {corpus['source']}"
            for corpus in metadata.corpora
        ]
        lines += [
            "",
            "Several of them allow research only or no commercial use; that carries over to these "
            "weights.",
            "",
        ]
    return "\n".join(lines)


def _scores(certificate: Mapping[str, Any]) -> list[str]:
    fp32, int8 = (certificate["systems"][name] for name in ("fp32", "int8_x86"))

    def cell(interval: Mapping[str, Any]) -> str:
        return f"{interval['value']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"

    rows = [
        f"| {name} | {row['clips']} | {len(row['speakers'])} | {cell(row['masked']['ua'])} | "
        f"{cell(int8['corpora'][name]['masked']['ua'])} |"
        for name, row in fp32["corpora"].items()
    ]
    seed = f" Seed {certificate['seed']}." if "seed" in certificate else ""
    return [
        "Unweighted accuracy on test speakers that nothing here was trained or chosen on; 95 % "
        f"bootstrap intervals. Masked to the labels of each corpus; pooled among all labels.{seed}",
        "",
        "| corpus | clips | speakers | full precision | INT8 |",
        "|---|---|---|---|---|",
        *rows,
        f"| pooled, all labels | {fp32['pooled']['clips']} | | {cell(fp32['pooled']['ua'])} | "
        f"{cell(int8['pooled']['ua'])} |",
        "",
    ]


def _float_layers(found: Mapping[str, Any]) -> list[str]:
    """Name the layers that do not round what they read; count the nodes that are float anyway."""
    counts = Counter(
        reason for name, reason in found["float_nodes"].items() if name not in found["given_back"]
    )
    named = [f"`{name}` ({found['float_nodes'][name]})" for name in found["given_back"]]
    kinds = [f"{count} {reason}" for reason, count in counts.items()]
    given_back = f"Given back, reading what is not rounded: {', '.join(named)}. " if named else ""
    return [f"{given_back}Stay float: {', '.join(kinds)}.", ""]


def _adapted(rows: list[Mapping[str, Any]]) -> list[str]:
    return [
        "## Adapting to a speaker",
        "",
        "Pooled UA of INT8 on the test speakers after so many earlier utterances of the same "
        "speaker, drawn at random, means of five draws: emotions alike, four fifths of one "
        "emotion, or all of one.",
        "",
        "| earlier utterances | how many | pooled UA |",
        "|---|---|---|",
        *(f"| {row['history']} | {row['utterances']} | {row['pooled_ua']:.3f} |" for row in rows),
        "",
    ]
