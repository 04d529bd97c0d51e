"""What is made of result files: comparison and gate, tables, pictures, the page, documentation."""

import json
import shutil
import subprocess

import pytest

for needed in ("rich", "matplotlib", "jinja2"):
    pytest.importorskip(needed, reason="fusedopt.bench needs it")

from fusedopt.bench import __main__ as cli  # noqa: E402  # what they need is there
from fusedopt.bench import report, rows, step_tables, tables  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WHERE = {"device": "cpu", "machine": "A <processor>, 2 threads", "torch": "9.9", "fusedopt": "0.1",
         "revision": "abc1234", "date": "2026-01-02"}  # fmt: skip


def measured(workload, elements, ours=1.0, floor=0.8, **more):
    """Rows of one workload; 4 ms of torch's, whose fastest all are compared with."""
    times = {"torch-fused": 4.0, "bitsandbytes": 9.0, "fusedopt": ours, "floor": floor}
    return [
        {"job": "step", "workload": workload, "optimizer": "AdamW", "dtype": "float32",
         "tensors": 1000, "elements": elements, "bytes": 28, "provider": name, "ms": ms,
         "p20": 0.9 * ms, "p80": 1.2 * ms, "rounds": 5, "baseline": "torch-best",
         "faster": 4.0 / ms, "faster_p20": 3.0 / ms, "faster_p80": 5.0 / ms,
         "floor_share": floor / ms, "parity": "differs" if name == "bitsandbytes" else "same",
         "peak_bytes": int(ms * 1e6), **WHERE, **more}
        for name, ms in times.items()
    ]  # fmt: skip


def result(path, **more):
    """A result file of a workload and a sweep."""
    found = measured("many", 4_096_000, **more)
    for size in (1024, 4096, 16384):
        found += measured(f"sweep-{size // 1024}K", size, **more)
    rows.write(path, found)
    return path


GPU = [
    {"job": "machine", "machine": "GPU 9000", "driver": "1", "triton": "3", "nvcc": "13",
     "torch": "9.9", "revision": "abc1234", "date": "2026-01-02", "rehearsal": False},
    {"job": "part", "part": "figures", "status": "passed", "seconds": 1.0},
    *({**row, "device": "cuda", "machine": "GPU 9000", "kernels": 1.0, "copies": 1.0,
       "device_us": 1000.0, "host_us": 41.5,
       "provider": row["provider"].replace("bitsandbytes", "fusedopt-triton")}
      for row in measured("billion", 2**30)),
]  # fmt: skip


def test_a_file_holds_what_was_written_and_no_nan(tmp_path):
    rows.write(tmp_path / "rows.jsonl", [{"job": "train", "loss": [1.0, float("nan")]}])
    assert rows.read(tmp_path / "rows.jsonl") == [{"job": "train", "loss": [1.0, None]}]


@pytest.mark.parametrize("text", ["", "[]", "{}", "no json", '{"job": "load"}'])
def test_other_files_are_refused_by_name(text, tmp_path, capsys):
    path = tmp_path / "other.jsonl"
    path.write_text(text)
    with pytest.raises(SystemExit):
        cli.main(["report", str(path), "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert str(path) in said
    assert "wanted: a file" in said


def test_figures_are_derived_from_the_row():
    ours = measured("many", 4_096_000)[2]
    assert rows.nanoseconds(ours) == pytest.approx(1e6 / 4_096_000)
    assert rows.bandwidth(ours) == pytest.approx(28 * 4.096)
    assert tables.number(0.0) == "0.00"
    assert [tables.number(value) for value in (1234.5, 123.4, 12.34, 0.1234, None)] == [
        "1,234", "123", "12.3", "0.123", None,
    ]  # fmt: skip


def test_every_way_to_write_a_table_has_the_same_cells(capsys):
    table = step_tables.step_table(GPU[2:])
    assert table.heads[-3:] == ["launches", "host us", "device us"]
    line = ["AdamW", "fusedopt", "same", "1.00", "0.900", "1.20", "0.000931", "30,065", "80",
            "4.00x", "3.00x", "5.00x", "1.0", "2", "41.5", "1,000"]  # fmt: skip
    assert table.lines[2] == (line, "ours")
    assert f"| {' | '.join(line)} |" in table.to_markdown()
    from fusedopt.bench.console import Run

    Run().show([table])
    said = capsys.readouterr().out
    assert all(cell in said for cell in line)
    assert [style for _, style in step_tables.step_table(measured("many", 1)).lines] == [
        "", "bad", "ours", "",
    ]  # fmt: skip


def test_the_gate_compares_with_the_baseline(tmp_path, capsys):
    arguments = ["report", str(result(tmp_path / "r.jsonl")), "--out", str(tmp_path)]
    assert cli.main([*arguments, "--fail-below", "3.9"]) == 0
    assert cli.main([*arguments, "--fail-below", "4.1"]) == 1
    assert "many, AdamW float32 on A <processor>, 2 threads: 4.00 times" in capsys.readouterr().out


def test_two_runs_are_compared_in_units_of_their_floors(tmp_path, capsys):
    old = result(tmp_path / "old.jsonl")
    slower = result(tmp_path / "slow.jsonl", ours=2.0, floor=1.6)  # a slower machine
    worse = result(tmp_path / "worse.jsonl", ours=2.0)
    arguments = ["--against", str(old), "--fail-below", "0.9", "--out", str(tmp_path)]
    assert cli.main(["report", str(slower), *arguments]) == 0
    assert "Compared with 2026-01-02" in (tmp_path / "report.html").read_text()
    assert cli.main(["report", str(worse), *arguments]) == 1
    assert "0.50 times as fast as on 2026-01-02" in capsys.readouterr().out
    changes = rows.compare(rows.read(slower), rows.read(old))
    assert rows.by(changes, "provider")["floor"]["by_floor"] is False
    rows.write(old, measured("gone", 1))
    with pytest.raises(SystemExit):
        cli.main(["report", str(slower), *arguments])
    assert "has no row in common" in capsys.readouterr().err


def test_every_run_has_its_pictures(tmp_path):
    other = result(tmp_path / "other.jsonl", machine="Another")
    arguments = [str(result(tmp_path / "r.jsonl")), str(other), "--out", str(tmp_path / "out")]
    assert cli.main(["report", *arguments]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    drawn = ("times-AdamW", "memory-AdamW", "sweep")
    assert names == {"report.html", *(f"{run}-{name}.png" for run in "12" for name in drawn)}
    text = (tmp_path / "out" / "report.html").read_text()
    assert text.count("data:image/png;base64,") == 6
    assert "A &lt;processor&gt;" in text
    assert "A <processor>" not in text


PROBE = """<script>addEventListener("load", () => {
  const seen = [...document.images].map(i => `${i.naturalWidth}x${i.naturalHeight}`);
  document.body.dataset.probe = [seen.length, seen.includes("0x0")].join("|");
  document.body.dataset.rows = document.querySelectorAll("td:first-child").length;
});</script></body>"""


def browse(page, folder):
    """What headless Chromium makes of a page: the process, its files in a folder of its own."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--enable-logging=stderr", "--v=0", f"--user-data-dir={folder}",
             "--virtual-time-budget=3000", "--dump-dom"]  # fmt: skip
    page.write_text(page.read_text().replace("</body>", PROBE))
    command = [CHROMIUM, *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to open the page with")
def test_a_browser_shows_tables_and_pictures_without_complaint(tmp_path):
    path = result(tmp_path / "r.jsonl")
    assert cli.main(["report", str(path), "--out", str(tmp_path)]) == 0
    done = browse(tmp_path / "report.html", tmp_path / "profile")
    assert "CONSOLE" not in done.stderr, done.stderr
    assert 'data-probe="3|false"' in done.stdout
    assert 'data-rows="17"' in done.stdout  # one optimizer's verdict, and 4 workloads of 4 each
    broken = tmp_path / "broken.html"
    broken.write_text(
        '<body><img src="data:image/png;base64,AAAA"><script>nonsense()</script></body>'
    )
    done = browse(broken, tmp_path / "profile")
    assert "CONSOLE" in done.stderr
    assert 'data-probe="1|true"' in done.stdout


# ---- documentation ----


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout's pages and results, to write to."""
    root = tmp_path / "checkout"
    monkeypatch.setattr(report, "ROOT", root)
    monkeypatch.setattr(report, "RESULTS", root / "results")
    (root / "docs").mkdir(parents=True)
    for page, names in report.PAGES.items():
        blocks = [f"{report.BEGIN.format(name=name)}\n\nold\n\n{report.END}" for name in names]
        (root / page).write_text("\n".join(["before", *blocks, "after\n"]))
    return root


def test_docs_are_written_from_the_files_that_are_kept(checkout, tmp_path):
    path, check = result(tmp_path / "r.jsonl", curve=[1.0]), tmp_path / "check.jsonl"
    rows.write(check, GPU)
    arguments = ["report", str(path), str(check), "--update-docs", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    kept = sorted((checkout / "results").iterdir())
    assert [path.name for path in kept] == [
        "a-processor-2-threads-2026-01-02.jsonl", "gpu-9000-2026-01-02.jsonl",
    ]  # fmt: skip
    assert "curve" not in kept[0].read_text()
    for page in report.PAGES:
        text = (checkout / page).read_text()
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "old" not in text
    where = "A <processor>, 2 threads; torch 9.9, fusedopt abc1234; 2026-01-02 |"
    front = (checkout / "README.md").read_text()
    assert f"| many | AdamW | - | - | 4.00 | 1.00 | 0.800 | 80 | 4.0 | {where}" in front
    status = (checkout / "docs/gpu-status.md").read_text()
    assert "GPU 9000, driver 1, torch 9.9" in status
    assert "| billion | AdamW | - | 4.00 | 1.00 | 9.00 | 0.800 | 4.0 |" in status


def test_docs_without_markers_are_left_alone(checkout, tmp_path, capsys):
    (checkout / "docs/benchmarks.md").write_text("by hand")
    with pytest.raises(SystemExit):
        cli.main(["report", "--update-docs", "--out", str(tmp_path)])
    assert "lost its marker" in capsys.readouterr().err
    assert "old" in (checkout / "README.md").read_text()


def test_the_docs_show_the_committed_results():
    blocks = report.made_blocks(report.committed())
    assert set(blocks) == {name for names in report.PAGES.values() for name in names}
    for page in report.PAGES:
        text = (report.ROOT / page).read_text()
        assert report.replaced(text, blocks) == text, "run `make bench-docs`"


def test_the_committed_results_are_compact():
    for path in report.RESULTS.iterdir():
        lines = path.read_text().splitlines()
        assert path.suffix == ".jsonl"
        assert all(json.loads(line)["job"] for line in lines)
        assert not any(": " in line and line.startswith("  ") for line in lines)
