import pytest

from benchmarks import report

STATS = {"p50_ms": 200.0, "p90_ms": 210.4, "p99_ms": 1234.5}


@pytest.fixture
def result():
    measured = {"samples_ms": {"engine": [1.0] * 3}, "threads": 1}
    graph = {"graph": "model_int8.onnx", "graph_sha256": "ab", "bundle_sha256": "cd"}
    tiny_ms = {"p50_ms": 2.0, "p90_ms": 9.996, "p99_ms": 12.34}
    rows = [
        {"system": "A", "detail": "random", "stats": {"engine": STATS}, "speedup": 1.0, **measured},
        {"system": "B", "threads": 1, "not_measured": "no weights"},
        {"system": "C", **graph, "stats": {"engine": tiny_ms}, "speedup": 99.96,
         "predict_adds_ms": 0.0604, **measured},
        {"system": "C", **graph, "stats": {"engine": tiny_ms}, "speedup": None,
         **measured, "threads": 2},
    ]  # fmt: skip
    loads = [
        {"system": "A", "threads": 1, "load_ms": 2500.4, "first_run_ms": 30.0,
         "peak_memory_mb": 812.6},
        {"system": "B", "threads": 1, "not_measured": "no weights"},
    ]  # fmt: skip
    cold = {
        "samples_ms": {"predict": [1.0] * 5, "import": [1.0] * 5},
        "stats": {"predict": {"p50_ms": 300.0}, "import": {"p50_ms": 200.0}},
        "ratios": [1.5, 1.0],
    }
    return {
        "schema": 1, "benchmark": "latency", "date": "2026-01-02T03:04:05+00:00", "commit": "abc",
        "machine": {"cpu": "Chip", "architecture": "x86_64", "vnni": True, "cores": 2,
                    "memory_mb": 8040, "os": "Linux", "load_average": 0.1},
        "versions": {"python": "3.12.1", "torch": "2.13.0"},
        "protocol": {"window_s": 3.0, "runs": 3, "warm_up": 3},
        "rows": rows, "loads": loads, "cold": cold,
    }  # fmt: skip


def test_the_markdown_is_exactly_this(result):
    assert report.latency_markdown(result) == (
        "# Latency of 3 s of audio\n"
        "\n"
        "2026-01-02T03:04:05+00:00, commit abc. Chip (x86_64, VNNI: yes), 2 cores, 8.0 GB, "
        "load average before: 0.1. python 3.12.1, torch 2.13.0.\n"
        "\n"
        "Noise, front ends included. 3 rounds; in each of them every system takes its turn: one "
        "run to warm the caches, then the timed one. Speedup is against A with as many threads, "
        "the median of the ratios of the rounds; what `Recognizer.predict` on an array adds to "
        "the bare session run is the median of the differences.\n"
        "\n"
        "| system | threads | p50 ms | p90 ms | p99 ms | speedup | predict adds ms | runs |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| A (random) | 1 | 200 | 210 | 1234 | 1.0x |  | 3 |\n"
        "| B | 1 | not measured: no weights |  |  |  |  |  |\n"
        "| C (model_int8.onnx) | 1 | 2.00 | 10.00 | 12.3 | 100.0x | 0.060 | 3 |\n"
        "| C (model_int8.onnx) | 2 | 2.00 | 10.00 | 12.3 | not measured |  | 3 |\n"
        "\n"
        "Each system in a process of its own. Loading is with imports; random weights are drawn, "
        "not read.\n"
        "\n"
        "| system | threads | load ms | first run ms | peak memory MB |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| A | 1 | 2500 | 30.0 | 813 |\n"
        "| B | 1 | not measured: no weights |  |  |\n"
        "\n"
        "Whole processes, in turns, their files in memory.\n"
        "\n"
        "| command | p50 ms | ratio | runs |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| `predict` | 300 | 1.50x | 5 |\n"
        "| `import` | 200 | 1.00x | 5 |\n"
        "\n"
        "| system | graph | SHA-256 of the graph | SHA-256 of metadata.json |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| C | model_int8.onnx | ab | cd |\n"
    )


def test_a_cold_start_that_failed_says_why(result):
    result["cold"] = {"not_measured": "no bundle"}
    assert "| cold start | not measured: no bundle |  |  |\n" in report.latency_markdown(result)


def test_the_plot_names_the_systems_that_were_measured(result, tmp_path):
    file = tmp_path / "plot.svg"
    report.latency_plot(result, file)
    text = file.read_text()  # matplotlib writes every text as a comment beside its outlines
    assert [
        name for name in ("A, threads: 1", "B, threads: 1", "C, threads: 2") if name in text
    ] == [
        "A, threads: 1",
        "C, threads: 2",
    ]


def test_the_plot_can_be_a_png(result, tmp_path):
    report.latency_plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
