"""The measuring code: what it counts, compares, prints and writes."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.bench import chart, main, measure, peers, report
from fastattn.bench.cases import CASES, GROUPS, QUICK, Case, select
from fastattn.bench.host import Host, this_host
from fastattn.bench.measure import Effort, Result
from fastattn.bench.peers import ENGINES, OURS, Call, Engine, Unavailable
from fastattn.call.halves import cast, name_of
from fastattn.console import arguments
from fastattn.console.terminal import Style

ROOT = Path(__file__).parents[2]
SMALL = Case("small", 1, 2, 48, 16)
PLAIN = Style(colour=False)
HOST = Host(
    "Some CPU, 2 cores", "avx2", "Python 3, Linux", {"fastattn": "1", "PyTorch": "2", "NumPy": "3"}, "2000-01-01"
)
NUMPY = next(engine for engine in ENGINES if engine.name == "NumPy")


def engine(name: str, build: Any) -> Engine:
    return Engine(name, ("numpy",), build)


def result(**times: list[float]) -> Result:
    return Result(Case("float32", 1, 1, 1000, 250), times)


# --------------------------------------------------------------------------------------------------------------------
# Cases
# --------------------------------------------------------------------------------------------------------------------


def test_flops_are_those_of_two_products_and_half_of_them_where_causal() -> None:
    assert Case("x", 2, 3, 5, 7).flops == 2 * (2 * 2 * 3 * 5 * 5 * 7)
    assert Case("x", 2, 3, 5, 7, causal=True).flops == 2 * 2 * 3 * 5 * 5 * 7


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_arguments_are_what_the_case_says(case: Case) -> None:
    arguments = case.arguments
    assert arguments.query.shape == arguments.key.shape == arguments.value.shape == case.shape
    assert name_of(arguments.query.dtype) == case.dtype
    assert arguments.causal == case.causal
    assert (arguments.mask is None) == (case.mask == "")
    if arguments.mask is not None:
        assert arguments.mask.dtype == (case.dtype if case.mask == "float" else np.bool_)
        assert (
            np.broadcast_shapes(arguments.mask.shape, (*case.shape[:2], case.length, case.length))[:2] == case.shape[:2]
        )
        if case.mask != "float":
            assert arguments.mask.any(axis=-1).all(), "a row is empty"
            assert not arguments.mask.all()


def test_names_are_unique_and_select() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert select([]) == CASES
    assert {case.group for case in select(["float64"])} == {"float64", "float64 causal"}
    assert [case.group for case in QUICK] == list(GROUPS)
    with pytest.raises(ValueError, match="'float128'.*float32"):
        select(["float128"])


# --------------------------------------------------------------------------------------------------------------------
# Peers
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["", "float", "bool", "padding"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("one", ENGINES, ids=lambda one: one.name)
def test_every_installed_engine_computes_the_same(one: Engine, causal: bool, mask: Any) -> None:
    if causal and mask:
        pytest.skip("no case of the table")
    case = Case("small", 2, 3, 40, 16, causal=causal, mask=mask)
    try:
        call = peers.prepare(one, case, peers.cores())
    except Unavailable as reason:
        if "not installed" not in str(reason):
            raise
        pytest.skip(str(reason))
    first = call.result().copy()
    call.run()
    np.testing.assert_array_equal(call.result(), first)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("one", [one for one in ENGINES if one.build_backward], ids=lambda one: one.name)
def test_every_engine_that_differentiates_computes_the_same(one: Engine, dtype: str) -> None:
    case = Case("small", 2, 3, 40, 16, dtype=dtype, backward=True)
    try:
        peers.prepare(one, case, peers.cores())
    except Unavailable as reason:
        if "not installed" not in str(reason) and not (one is NUMPY and "half precision" in str(reason)):
            raise
        return

    def build(arguments: Any, threads: int) -> Call:
        right = one.build_backward(arguments, threads)  # type: ignore[misc]
        return Call(right.run, lambda: cast(right.result(), np.dtype(np.float64)) * 1.02)

    with pytest.raises(Unavailable, match="its result is off by"):
        peers.prepare(replace(one, build_backward=build), case, peers.cores())


@pytest.mark.parametrize("change", [lambda x: x * 1.001, lambda x: np.where(x == x, np.nan, x), lambda x: x[:, ::-1]])
def test_a_wrong_result_is_not_timed(change: Any) -> None:
    def build(arguments: Any, threads: int) -> Call:
        right = NUMPY.build(arguments, threads)
        return Call(right.run, lambda: change(right.result()))

    with pytest.raises(Unavailable, match="its result is off by"):
        peers.prepare(engine("wrong", build), SMALL, peers.cores())


@pytest.mark.parametrize("causal", [False, True])
def test_a_result_that_ignores_the_causal_mask_or_invents_one_is_not_timed(causal: bool) -> None:
    def build(arguments: Any, threads: int) -> Call:
        return NUMPY.build(peers.Arguments(arguments.query, arguments.key, arguments.value, None, not causal), threads)

    with pytest.raises(Unavailable, match="off by"):
        peers.prepare(engine("wrong", build), Case("x", 1, 2, 48, 16, causal=causal), peers.cores())


def test_a_peer_that_is_missing_or_refuses_says_why() -> None:
    def refuse(arguments: Any, threads: int) -> Call:
        raise RuntimeError("\n  no such kernel\nat line 7")

    absent = Engine("absent", ("a-package-that-does-not-exist",), refuse)
    outcome = measure.measure(SMALL, Effort(2, 0.001), [NUMPY, absent, engine("refuses", refuse)])
    assert list(outcome.times) == ["NumPy"]
    assert outcome.absent == {
        "absent": "a-package-that-does-not-exist is not installed",
        "refuses": "RuntimeError: no such kernel",
    }


def test_numpy_does_not_claim_to_use_one_thread() -> None:
    with pytest.raises(Unavailable, match="threads"):
        peers.prepare(NUMPY, SMALL, peers.cores() + 1)


# --------------------------------------------------------------------------------------------------------------------
# Arithmetic
# --------------------------------------------------------------------------------------------------------------------


def test_ratios_are_medians_of_the_ratios_of_a_round() -> None:
    # in the last round everything was ten times slower, and PyTorch had bad luck in one
    outcome = result(fastattn=[1.0, 1.0, 10.0], PyTorch=[1.2, 9.0, 12.0], NumPy=[5.0, 5.0, 50.0])
    assert outcome.ratio("PyTorch") == pytest.approx(1.2)
    assert outcome.ratio("NumPy") == pytest.approx(5)
    assert outcome.ratio("OpenVINO") is None
    assert outcome.seconds("PyTorch") == 9.0


def test_the_best_peer_is_the_fastest_library_and_numpy_only_where_it_is_alone() -> None:
    assert result(fastattn=[1.0], A=[3.0], B=[2.0], NumPy=[1.5]).best_peer == "B"
    assert result(fastattn=[1.0], NumPy=[1.5]).best_peer == "NumPy"
    assert result(fastattn=[1.0]).best_peer is None


def test_rates_times_and_the_part_of_the_peak() -> None:
    outcome = result(fastattn=[1.0, 0.5, 2.0])
    assert outcome.figure("fastattn") == pytest.approx(1.0)  # 4 · 1000 · 1000 · 250 operations in a second
    assert outcome.of_peak is None
    outcome.peaks = [2.0, 2.5, 1.0]
    assert outcome.of_peak == pytest.approx(0.5)
    paced = Result(Case("x", 1, 1, 8, 8, pace="paced"), {"fastattn": [3e-6]})
    assert (paced.case.unit, paced.figure("fastattn")) == ("µs", pytest.approx(3))


# --------------------------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pace", ["steady", "tight", "paced"])
def test_a_sample_is_the_time_of_one_call(pace: Any) -> None:
    calls: list[float] = []

    def run() -> None:
        calls.append(time.perf_counter())
        time.sleep(0.004)

    seconds = measure.sample(run, pace, 0.03)
    assert 0.004 <= seconds < 0.015
    pauses = np.diff(calls)
    assert np.median(pauses[-3:]) >= (measure.PACE_S if pace == "paced" else 0)


def test_a_call_longer_than_the_time_there_is_is_made_twice() -> None:
    calls: list[int] = []
    measure.sample(lambda: (calls.append(0), time.sleep(0.05)), "steady", 0.01)
    assert len(calls) == 2  # the first one warms up


def test_settling_waits_for_threads_that_spin() -> None:
    def waits() -> bool:
        stop = time.perf_counter() + 0.15

        def spin() -> None:
            while time.perf_counter() < stop:
                pass

        spinner = threading.Thread(target=spin)
        spinner.start()
        measure.settle()
        waited = time.perf_counter() >= stop
        spinner.join()
        return waited

    # on a busy machine the thread itself may not be scheduled for a while
    assert any(waits() for _ in range(5))


def test_settling_gives_up() -> None:
    done = threading.Event()

    def spin() -> None:
        while not done.is_set():
            pass

    spinner = threading.Thread(target=spin)
    spinner.start()
    begin = time.perf_counter()
    measure.settle(limit=0.05)
    assert time.perf_counter() - begin < 1
    done.set()
    spinner.join()


def test_a_disturbed_sample_is_taken_again_and_the_least_disturbed_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def others(*used: float) -> None:
        clock, total = [0.0], [0.0]
        steps = iter([step for one in used for step in (0.0, one)])

        def seconds() -> float:
            total[0] += next(steps)
            return total[0]

        def perf_counter() -> float:  # between two readings a second passes
            clock[0] += 1.0
            return clock[0]

        monkeypatch.setattr(measure, "others_seconds", seconds)
        monkeypatch.setattr(measure.time, "perf_counter", perf_counter)

    values = iter(range(100))
    others(0.1)
    assert measure.undisturbed(lambda: next(values)) == (0, pytest.approx(0.1))
    others(0.9, 0.1)
    assert measure.undisturbed(lambda: next(values)) == (2, pytest.approx(0.1))
    others(0.9, 0.5, 0.7)
    assert measure.undisturbed(lambda: next(values)) == (4, pytest.approx(0.5))


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux counts")
def test_own_work_is_nobody_elses() -> None:
    def work() -> float:
        begin, before = time.process_time(), measure.others_seconds()
        while time.process_time() - begin < 0.3:
            pass
        return measure.others_seconds() - before

    start, quiet = time.perf_counter(), min(work() for _ in range(3))
    assert quiet < (time.perf_counter() - start) * peers.cores()
    spinner = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    before = measure.others_seconds()
    subprocess.run([sys.executable, "-c", spinner], check=True)
    assert measure.others_seconds() - before > 0.25


def test_engines_alternate_in_a_new_order_each_round() -> None:
    order: list[str] = []

    def build(name: str) -> Any:
        def make(arguments: Any, threads: int) -> Call:
            right = NUMPY.build(arguments, threads)
            return Call(lambda: (order.append(name), right.run()), right.result)

        return make

    seen: list[tuple[int, int, str]] = []
    outcome = measure.measure(
        SMALL,
        Effort(6, 0.0001),
        [engine(name, build(name)) for name in "abc"],
        progress=lambda *step: seen.append(step),
    )
    assert {name: len(times) for name, times in outcome.times.items()} == {"a": 6, "b": 6, "c": 6}
    rounds = [[what for done, _, what in seen if done == i and len(what) == 1] for i in range(6)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    assert set(order) == {"a", "b", "c"}


def test_the_global_random_state_and_thread_count_are_left_alone() -> None:
    state, threads = random.getstate(), fastattn.get_num_threads()
    measure.measure(SMALL, Effort(1, 0.0001), [OURS], threads=1)
    assert random.getstate() == state
    assert fastattn.get_num_threads() == threads


# --------------------------------------------------------------------------------------------------------------------
# Reports
# --------------------------------------------------------------------------------------------------------------------


def outcomes() -> list[Result]:
    rate = Result(Case("float32", 1, 1, 1000, 250), {"fastattn": [1.0], "PyTorch": [1.5], "NumPy": [4.0]}, peaks=[1.25])
    short = Result(
        Case("tiny", 1, 1, 8, 8, pace="tight"), {"fastattn": [5e-6], "NumPy": [2e-5]}, absent={"PyTorch": "why"}
    )
    return [rate, short]


def test_the_markdown_table() -> None:
    assert report.markdown(outcomes(), HOST).splitlines() == [
        "| GF/s, more is better | fastattn | PyTorch | NumPy | of peak | against the best of the others |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
        "| float32 (1,1,1000,250) | **1.00** | 0.67 | 0.25 | 80 % | 1.50 × PyTorch |",
        "",
        "| µs a call, less is better | fastattn | PyTorch | NumPy | against the best of the others |",
        "| --- | ---: | ---: | ---: | --- |",
        "| tiny (1,1,8,8) | **5.00** | – | 20.0 | 4.00 × NumPy |",
        "",
        "Measured on Some CPU, 2 cores, avx2; fastattn 1, PyTorch 2, NumPy 3; Python 3, Linux; 2000-01-01.",
    ]


def test_bars_have_the_figures_and_the_fastest_is_the_longest() -> None:
    title, *lines = report.bars(outcomes()[0], PLAIN)
    assert title == "float32 (1,1,1000,250): 1.50 × PyTorch, 80 % of peak"
    assert [line.split()[:3] for line in lines] == [
        ["fastattn", "1.00", "GF/s"],
        ["PyTorch", "0.67", "GF/s"],
        ["NumPy", "0.25", "GF/s"],
    ]
    lengths = [line.count("█") for line in lines]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[1] > lengths[2] > 0
    assert len({line.index("█") for line in lines}) == 1
    assert report.bars(outcomes()[1], PLAIN)[0] == "tiny (1,1,8,8): 4.00 × NumPy"
    assert report.bars(Result(SMALL, absent={"fastattn": "why"}), PLAIN) == []


@pytest.mark.parametrize("width", [24, 40, 80, 120])
def test_bars_fit_the_terminal(width: int) -> None:
    for outcome in outcomes():
        for blocks in (False, True):
            assert max(map(len, report.bars(outcome, Style(False, blocks, width)))) <= width


def test_reasons_name_the_cases_unless_it_is_all_of_them() -> None:
    assert report.reasons(outcomes()) == ["PyTorch: why [tiny (1,1,8,8)]"]
    assert report.reasons(outcomes()[1:]) == ["PyTorch: why"]


def test_others_are_mentioned_only_where_they_matter() -> None:
    outcome = outcomes()[0]
    outcome.others = [0.0, 0.05, 0.01]
    assert report.disturbance([outcome]) is None
    outcome.others = [0.0, 1.0, 0.5]
    assert "0.5 cores" in (report.disturbance([outcome]) or "")


def test_a_table_is_read_as_it_was_written() -> None:
    rows = report.speeds_in(report.markdown(outcomes(), HOST))
    assert rows == {
        "float32 (1,1,1000,250)": {"fastattn": 1.5, "PyTorch": 1.0, "NumPy": pytest.approx(0.25 / 0.67)},
        "tiny (1,1,8,8)": {"fastattn": 4.0, "NumPy": 1.0},
    }
    alone = Result(Case("alone", 1, 1, 8, 8), {"fastattn": [1.0]})
    assert report.speeds_in(report.markdown([alone], HOST)) == {}


def test_the_overview_goes_between_its_markers_and_nowhere_else() -> None:
    text = "before\n<!-- overview:begin -->\nold\n<!-- overview:end -->\nafter\n"
    new = report.with_overview(text, r"new \1")
    assert new == "before\n<!-- overview:begin -->\nnew \\1\n<!-- overview:end -->\nafter\n"
    assert report.with_overview(new, r"new \1") == new
    for broken in ("none", "<!-- overview:begin -->", "<!-- overview:end -->"):
        with pytest.raises(ValueError, match="overview:begin"):
            report.with_overview(broken, "new")


def test_the_latest_section_is_that_of_the_latest_day() -> None:
    text = "# Title\n"
    for machine, day in (("A", "2026-02-10"), ("B (2), 2 cores", "2026-11-09"), ("C", "2025-12-31")):
        text = report.with_section(text, machine, f"| of {machine} |\n\nMeasured on it; {day}.")
    assert report.latest(text) == ("B (2), 2 cores", "| of B (2), 2 cores |\n\nMeasured on it; 2026-11-09.")
    with pytest.raises(ValueError, match="no section of a machine"):
        report.latest("# Title\n")


def test_sections_of_other_machines_stay() -> None:
    text = "# Title\n\nwords\n"
    for machine in ("A (1), 2 cores", "A (1), 22 cores", "B"):
        text = report.with_section(text, machine, f"old of {machine}")
    text = report.with_section(text + "\nlast words\n", "A (1), 2 cores", r"new \g<0>")
    assert r"new \g<0>" in text
    assert "old of A (1), 2 cores" not in text
    assert "old of A (1), 22 cores" in text
    assert "old of B" in text
    assert text.startswith("# Title\n\nwords\n")
    assert text.endswith("\nlast words\n")


def test_this_host_has_a_name() -> None:
    host = this_host()
    assert host.versions["fastattn"] == fastattn.__version__
    assert "NumPy" in host.versions
    assert "core" in host.name


@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_a_picture_is_drawn(tmp_path: Path, suffix: str, begins: bytes) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, which draws the picture, is not installed")
    alone = Result(Case("alone", 1, 1, 8, 8), {"fastattn": [1.0]})
    for number, results in enumerate((outcomes(), [*outcomes(), alone], [alone])):
        path = tmp_path / f"{number}{suffix}"
        chart.save_picture(results, HOST, path)
        assert path.read_bytes().startswith(begins)


def test_the_picture_says_what_the_table_says(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, which draws the picture, is not installed")
    chart.save_picture(outcomes(), HOST, tmp_path / "picture.svg")
    drawn = set(re.findall(r">([^<]+)</text>", (tmp_path / "picture.svg").read_text("utf-8")))
    for outcome in outcomes():
        assert {outcome.case.name, report.versus(outcome), *outcome.times} <= drawn
    assert any(text.startswith(f"{HOST.name}, {HOST.isa}") for text in drawn)


def test_speeds_are_the_ratios_of_the_rounds() -> None:
    """Of a machine that grew slower in the second round, ours and the others' times alike."""
    slower = Result(Case("float32", 1, 1, 8, 8), {"fastattn": [1.0, 8.0], "PyTorch": [2.0, 16.0], "NumPy": [4.0, 32.0]})
    assert chart.speeds(slower) == {"fastattn": 2.0, "PyTorch": 1.0, "NumPy": 0.5}
    assert chart.speeds(Result(Case("alone", 1, 1, 8, 8), {"fastattn": [1.0]})) == {}
    assert chart.speeds(Result(Case("absent", 1, 1, 8, 8), {"NumPy": [1.0]})) == {}


def test_the_overview_sums_up_every_group_once() -> None:
    assert sorted(group for groups in chart.FAMILIES.values() for group in groups) == sorted(GROUPS)
    rows = {case.name: {"fastattn": 2.0} for case in CASES}
    assert chart.families(rows) == {family: {"fastattn": pytest.approx(2.0)} for family in chart.FAMILIES}


# --------------------------------------------------------------------------------------------------------------------
# From end to end
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let only ourselves and NumPy take part: quick on any machine."""
    monkeypatch.setattr(measure, "ENGINES", (OURS, NUMPY))


@pytest.mark.usefixtures("few")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--rounds", "1", "--case", "(1,1,16,64)", "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert "tiny, in a loop (1,1,16,64)" in printed
    assert "× NumPy" in printed
    assert "\x1b" not in printed
    saved = json.loads((tmp_path / "out.json").read_text("utf-8"))
    (entry,) = saved["results"]
    assert set(entry["seconds"]) == {"fastattn", "NumPy"}
    assert saved["host"]["versions"]["fastattn"] == fastattn.__version__


def test_the_command_lists_its_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [case.name for case in CASES]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--case", "nothing"], "no case is called 'nothing'"),
        (["--json", "/no/such/folder/x.json"], "/no/such/folder is not a folder"),
        (["--rounds", "0"], "--rounds: '0' is not a number of rounds of at least 1"),
        (["--rounds", "many"], "--rounds: 'many' is not a number of rounds of at least 1"),
        (["--threads", "0"], "--threads: '0' is not a number of threads from 1 to 1024"),
        (["--threads", "99999"], "--threads: '99999' is not a number of threads from 1 to 1024"),
        (["--plot", "x.foo"], "--plot: 'x.foo' does not end in .png or .svg or .pdf"),
        (["--plot", "x"], "--plot: 'x' does not end in"),
        (["--plot", "/no/such/folder/x.png"], "/no/such/folder is not a folder"),
        (["--json", "."], "--json: . is a folder"),
        (["--json", "x.png", "--plot", "x.png"], "--plot: the same file as --json"),
        (["--json", "y" * 300], "--json: cannot write yyy"),
        (["--case", "tiny", "--case", "nothing"], "no case is called 'nothing'"),
        (["--fast"], "--fast"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Before it measures, and leaving nothing behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "measure", None)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert says in printed.err
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_file_is_what_it_was_until_it_is_written(tmp_path: Path) -> None:
    """Also what can be opened only once."""
    file = tmp_path / "file.json"
    file.write_text("before")
    assert arguments.output_file(".json")(str(file)) == file
    assert file.read_text() == "before"
    assert arguments.output_file()("/dev/null") == Path("/dev/null")
    assert arguments.output_file(".png")(str(tmp_path / "a.PNG")) == tmp_path / "a.PNG"
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]
