"""What is made of result files: records, comparison and gate, pictures, the page, documentation."""

import csv
import json
import re
import shutil
import subprocess
from itertools import pairwise

import pytest

for needed in ("rich", "matplotlib"):
    pytest.importorskip(needed, reason="fusedopt.bench needs it")

from fusedopt.bench import __main__ as cli  # noqa: E402  # what they need is there
from fusedopt.bench import charts, documents, page, report, results, step, tables  # noqa: E402

MACHINE = {"date": "2026-01-02T03:04:05+00:00", "gpu": None, "cpu": "A <processor>", "torch": "9.9",
           "fusedopt": "0.1", "git_revision": "abc1234"}  # fmt: skip
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def stats(median):
    return {"median": median, "p20": 0.9 * median, "p80": 1.2 * median, "rounds": 5}


def row(workload, elements, optimizer="AdamW", best=4.0, **times):
    """A row of the step job as its result file has it."""
    times = {name.replace("_", "-"): ms for name, ms in times.items()}
    return {
        "workload": workload, "optimizer": optimizer, "dtype": "float32", "device": "cpu",
        "tensors": 3, "elements": elements, "bytes_per_parameter": 28,
        "step_ms": {name: stats(ms) for name, ms in times.items()},
        "baseline": "torch-best", "best_torch": "torch-fused",
        "baseline_over": {name: stats(best / ms) for name, ms in times.items()},
        "floor_over": {name: stats(times["floor"] / ms) for name, ms in times.items()},
        "parity": {"fusedopt": {"same": True, "same_update": True, "error": "", "ulps": {"a": 2.0}},
                   "bitsandbytes": {"same": False, "same_update": True, "error": "",
                                    "ulps": {"a": 1.0, "b": 9e8}}},
        "peak_bytes": {name: int(ms * 1e6) for name, ms in times.items() if name != "floor"},
        "seen": {}, "seconds": {name: [ms / 1e3] for name, ms in times.items()},
    }  # fmt: skip


def content(ours=1.0, floor=0.8, **machine):
    rows = [row("many", 4_096_000, fusedopt=ours, torch_fused=4.0, bitsandbytes=9.0, floor=floor)]
    rows += [
        row(f"sweep-{name}", size, fusedopt=ours, torch_fused=3.0, floor=floor)
        for name, size in (("1K", 1024), ("4K", 4096), ("16K", 16_384))
    ]
    machine = {**MACHINE, **machine}
    return {"machine": machine, "complete": True, "step": {"threads": 2, "rows": rows}}


def written(path, data):
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def result(tmp_path):
    return written(tmp_path / "result.json", content())


GPU_CHECK = {
    "machine": {**MACHINE, "device": "GPU 9000", "cuda": "13", "driver": "7", "triton": "3.6",
                "nvcc": "13.0"},
    "rehearsal": False,
    "parts": {
        "bits": {"rows": [{"differing": 0}]},
        "figures": {
            "rows": [
                {
                    "workload": "swarm", "optimizer": "AdamW", "dtype": "float32",
                    "tensors": 10_000, "elements": 640_000, "best_torch": "torch-fused",
                    "step_ms": {"torch-fused": stats(12.0), "fusedopt": stats(0.5),
                                "floor": stats(0.25)},
                    "device": {"fusedopt": {"kernels": 1.0, "copies": 2.0, "device_us": 40.0,
                                            "host_us": 450.0}},
                    "unavailable": {}, "ratios": {},
                }
            ]
        },
    },
}  # fmt: skip


# ---- records ----


def test_figures_are_derived_from_the_row(result):
    figures = results.load(result)
    ours = figures[0]
    assert (ours.workload, ours.provider) == ("many", "fusedopt")
    assert ours.machine == "A <processor>, 2 threads"
    assert ours.ns_per_parameter == pytest.approx(1e6 / 4_096_000)
    assert ours.gb_per_second == pytest.approx(28 * 4_096_000 / 1e6)
    assert ours.percent_of_floor == pytest.approx(80)
    assert (ours.times_faster, ours.ms_p20, ours.ms_p80) == (4.0, 0.9, 1.2)
    assert [f.parity for f in figures[:4]] == ["same", "", "decay differs", ""]
    assert figures[2].ulps == 9e8


def test_the_file_of_a_gpu_check_is_understood(tmp_path):
    _torch, ours, floor = results.load(written(tmp_path / "check.json", GPU_CHECK))
    assert ours.machine == "GPU 9000"
    assert (ours.launches, ours.host_us, ours.device_us) == (3.0, 450.0, 40.0)
    assert (ours.times_faster, ours.percent_of_floor) == (24.0, 50.0)
    assert ours.gb_per_second == pytest.approx(28 * 640_000 / 0.5e6)
    assert floor.launches is None
    rehearsed = written(tmp_path / "rehearsed.json", {**GPU_CHECK, "rehearsal": True})
    with pytest.raises(results.ResultError, match="has no rows"):
        results.load(rehearsed)


@pytest.mark.parametrize("data", [[], {}, {"machine": {}, "step": {"rows": [{}]}}, {"step": 3}])
def test_other_files_are_refused_by_name(data, tmp_path, capsys):
    path = written(tmp_path / "other.json", data)
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(path), "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "other.json" in capsys.readouterr().err


def test_csv_has_a_line_a_figure(result, tmp_path):
    path = tmp_path / "all.csv"
    assert cli.main(["report", str(result), "--out", str(tmp_path), "--csv", str(path)]) == 0
    with path.open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(results.load(result)) == 13
    assert lines[0]["provider"] == "fusedopt"
    assert float(lines[0]["times_faster"]) == 4.0
    assert lines[0]["torch"] == "9.9"


def test_the_table_has_a_gpus_columns_and_an_interrupted_row_leaves_them_empty():
    rows = [step.Row(step.Task("tiny", "SGD")), step.Row(step.Task("tiny", "AdamW"))]
    for measured in rows:
        measured.race.seconds = {"fusedopt": [1e-3], "floor": [5e-4]}
    looked = {"kernels": 1.0, "copies": 2.0, "device_us": 41.5, "host_us": 450.0}
    rows[0].seen = {"fusedopt": looked, "floor": looked}
    console = report.make_console()
    with console.capture() as captured:
        console.print(tables.step_tables(rows))
    lines = [text.split() for text in captured.get().splitlines() if "fusedopt" in text]
    assert [text[-3:] for text in lines] == [["3", "450.0", "41.5"], ["-", "-", "-"]]


# ---- comparison and gate ----


def test_the_gate_compares_with_the_baseline(result, tmp_path, capsys):
    arguments = ["report", str(result), "--out", str(tmp_path)]
    assert cli.main([*arguments, "--fail-below", "3.9"]) == 0
    assert cli.main([*arguments, "--fail-below", "4.1"]) == 1
    assert "Below 4.1: many, AdamW float32" in capsys.readouterr().out


def test_two_runs_are_compared_in_units_of_their_floors(result, tmp_path, capsys):
    # Twice the time on a machine that is half as fast: nothing has changed.
    slower = written(tmp_path / "slow.json", content(ours=2.0, floor=1.6))
    worse = written(tmp_path / "worse.json", content(ours=2.0, floor=0.8))
    tail = ["--against", str(result), "--fail-below", "0.9", "--out", str(tmp_path)]
    assert cli.main(["report", str(slower), *tail]) == 0
    capsys.readouterr()
    assert cli.main(["report", str(worse), *tail]) == 1
    said = capsys.readouterr().out
    assert "Below 0.9: many, AdamW float32" in said
    assert "0.50 times as fast as on 2026-01-02" in said
    changes = results.compare(results.load(worse), results.load(result))
    by_name = {(c.now.workload, c.now.provider): c for c in changes}
    assert by_name["many", "fusedopt"].speed == pytest.approx(0.5)
    assert by_name["many", "floor"].speed == pytest.approx(1.0)
    assert not by_name["many", "floor"].by_floor


def test_runs_without_a_common_row_are_not_compared(result, tmp_path, capsys):
    other = written(tmp_path / "check.json", GPU_CHECK)
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(result), "--against", str(other), "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "no row in common" in capsys.readouterr().err


def test_the_step_job_has_the_same_gate(monkeypatch, capsys):
    arguments = ["--workloads", "sweep", "--optimizers", "SGD", "--rounds", "1", "--skip-parity"]
    arguments += ["--providers", "torch-default,fusedopt", "--memory", "none"]
    monkeypatch.setattr(cli.machine, "available_memory", lambda device: 1_000_000)
    assert cli.main(["step", *arguments, "--fail-below", "0"]) == 0
    assert cli.main(["step", *arguments, "--fail-below", "1e9"]) == 1
    assert "Below 1000000000.0: sweep-1K, SGD float32" in capsys.readouterr().out


# ---- pictures and the page ----


def test_labels_never_lie_on_each_other():
    placed = charts.spread([1.0, 1.001, 1.002, 90.0, 99.0], (0.1, 100.0))
    gaps = [b - a for a, b in pairwise(placed)]
    assert min(gaps) >= 0.19
    assert placed[-1] < 2


def test_every_run_has_its_pictures(result, tmp_path):
    check = written(tmp_path / "check.json", GPU_CHECK)
    out = tmp_path / "out"
    assert cli.main(["report", str(result), str(check), "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {
        "report.html", "1-times-AdamW.png", "1-memory-AdamW.png", "1-sweep.png",
        "2-times-AdamW.png",
    }  # fmt: skip
    for path in out.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    text = (out / "report.html").read_text()
    assert "A &lt;processor&gt;" in text
    assert "GPU 9000" in text
    assert not re.search(r'(src|href)="(?!data:)', text)  # self-contained


def test_light_and_dark_pictures_differ():
    figures = [
        f
        for r in content()["step"]["rows"]
        for f in results.figures_of({**r, "threads": 2}, MACHINE)
    ]
    for picture in page.draw(figures):
        assert picture.light != picture.dark


def browse(url, folder, *arguments):
    """What headless Chromium makes of a page: the process, its files in a folder of its own."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--enable-logging=stderr", "--v=0", f"--user-data-dir={folder}",
             "--virtual-time-budget=3000"]  # fmt: skip
    return subprocess.run(
        [CHROMIUM, *flags, *arguments, url], capture_output=True, text=True, timeout=120
    )


PROBE = """<script>addEventListener("load", () => {
  const seen = [...document.images].map(i => `${i.naturalWidth}x${i.naturalHeight}`);
  const paper = getComputedStyle(document.body).backgroundColor;
  document.body.dataset.probe = [seen.length, seen.includes("0x0"), paper].join("|");
  document.body.dataset.rows = document.querySelectorAll("table tbody tr").length;
});</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to open the page with")
@pytest.mark.parametrize(
    ("theme", "paper"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(22, 24, 29)")]
)
def test_a_browser_shows_tables_and_pictures_without_complaint(result, tmp_path, theme, paper):
    assert cli.main(["report", str(result), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    probed = tmp_path / "probed.html"
    probed.write_text(text.replace("</body>", PROBE))
    # --force-dark-mode would invert colours: this is what a reader's setting does.
    dark = ["--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
    done = browse(probed.as_uri(), tmp_path / "profile", "--dump-dom", *dark)
    assert "CONSOLE" not in done.stderr, done.stderr
    assert f'data-probe="3|false|{paper}"' in done.stdout
    # One optimizer's verdict, and four workloads with a line for it and 4 + 3 * 3 figures.
    assert 'data-rows="18"' in done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to open the page with")
def test_the_browser_would_say_what_is_wrong(tmp_path):
    broken = tmp_path / "broken.html"
    body = '<body><img src="data:image/png;base64,AAAA"><script>nonsense()</script></body>'
    broken.write_text(body.replace("</body>", PROBE))
    done = browse(broken.as_uri(), tmp_path / "profile", "--dump-dom")
    assert "CONSOLE" in done.stderr
    assert 'data-probe="1|true|' in done.stdout


# ---- documentation ----


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout's pages and results, to write to."""
    for name, path in (("README", "README.md"), ("PAGE", "page.md"), ("STATUS", "status.md"),
                       ("RESULTS", "results")):  # fmt: skip
        monkeypatch.setattr(documents, name, tmp_path / "checkout" / path)
    documents.RESULTS.mkdir(parents=True)
    documents.STATUS.write_text("before\n<!-- gpu: machine -->\nold\n<!-- /gpu -->\nafter\n")
    for page_ in (documents.README, documents.PAGE):
        page_.write_text(f"before\n{documents.BEGIN}\nold\n{documents.END}\nafter\n")
    return tmp_path / "checkout"


def test_docs_are_written_from_the_files_that_are_kept(result, checkout, tmp_path):
    arguments = ["--update-docs", "--out", str(tmp_path)]
    assert cli.main(["report", str(result), *arguments]) == 0
    (kept,) = documents.RESULTS.iterdir()
    assert kept.name == "a-processor-2-threads-2026-01-02.json"
    assert "seconds" not in kept.read_text()
    assert results.load(kept) == results.load(result)
    where = "| A <processor>, 2 threads; torch 9.9, fusedopt abc1234; 2026-01-02 |"
    front, whole = documents.README.read_text(), documents.PAGE.read_text()
    for text in (front, whole):
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "old" not in text
    assert f"| many | AdamW | - | - | 4 | 1 | 0.8 | 80 | 4.0 {where}" in front
    assert whole.count(where) == 13
    written(documents.RESULTS / "nvidia-x.json", GPU_CHECK)  # a check's file as it is
    assert cli.main(["report", *arguments]) == 0
    assert "GPU 9000; torch 9.9, fusedopt abc1234; 2026-01-02 |" in documents.README.read_text()
    status = documents.STATUS.read_text()
    assert status.startswith("before\n<!-- gpu: machine -->\nGPU 9000, driver ")
    assert status.endswith("\n<!-- /gpu -->\nafter\n")
    assert documents.replaced(front, "new").count("new") == 1


def test_docs_without_markers_are_left_alone(result, checkout, tmp_path, capsys):
    documents.PAGE.write_text("by hand")
    with pytest.raises(SystemExit):
        cli.main(["report", str(result), "--update-docs", "--out", str(tmp_path)])
    assert "lost its markers" in capsys.readouterr().err
    assert documents.PAGE.read_text() == "by hand"
    assert "old" in documents.README.read_text()


def test_the_docs_show_the_committed_results():
    if not documents.PAGE.is_file():
        pytest.skip("not a checkout")
    figures = documents.committed()
    front, whole = documents.README.read_text(), documents.PAGE.read_text()
    said = "run `make bench-docs`"
    assert documents.replaced(front, documents.front_table(figures)) == front, said
    assert documents.replaced(whole, documents.full_tables(figures)) == whole, said
