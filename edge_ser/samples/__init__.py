"""Clips of synthetic speech, to try a recognizer on."""

from pathlib import Path


def sample_paths() -> list[Path]:
    """Return the paths of the clips, FLAC of about two and a half seconds."""
    return sorted(Path(__file__).parent.glob("*.flac"))
