"""compare, plot, show and interpolate against plain computations, and what they say to wrong inputs."""
import argparse
import csv
import json
import math
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from data import Scenes, load_image, train_tokenizer
import evaluate
from evaluate import Outcome, bootstrap, interpolate_weights as interpolate, mcnemar
from model import CLIP, MODELS


def command(argv):
    evaluate.call(argv)


def nano(seed, **changes):
    torch.manual_seed(seed)
    text, vocabulary, _ = train_tokenizer([Scenes(50)[i]["caption"] for i in range(50)])
    small = dict(tokenizer=text, vocab_size=vocabulary, vision=(96, 1, 3, 384), text=(96, 1, 3, 384))
    return CLIP(replace(MODELS["nano"], **small, **changes))


# ------------------------------------------------------------------------------------------------- compare

def paired(a, b, images, *options):
    """B - A in percent, the ends of its interval, p, the number of items gained and lost; of one subset."""
    change, numbers = np.subtract(b, a), np.unique(list(images), return_inverse=True)[1]
    draws = 100 * bootstrap([(numbers, change, np.ones(len(change)))], *options)[:, 0]
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    return draws[0], *np.quantile(draws[1:], (0.025, 0.975)), mcnemar(gained, lost), gained, lost


def plain_p(a, b):
    """Two-sided exact binomial: the probability, by fair coins, of a split at least as uneven as the one seen."""
    gained, lost = sum(x < y for x, y in zip(a, b)), sum(x > y for x, y in zip(a, b))
    n = gained + lost
    uneven = sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(gained - lost))
    return float(Fraction(uneven, 2 ** n))


@pytest.mark.parametrize("n, right_a, right_b", [(1, 0, 0), (1, 0, 1), (12, 0.5, 0.9), (300, 0.6, 0.62),
                                                 (3000, 0.2, 0.4)])
def test_paired_equals_plain_computation(n, right_a, right_b):
    rng = random.Random(n)
    a, b = [int(rng.random() < right_a) for _ in range(n)], [int(rng.random() < right_b) for _ in range(n)]
    difference, low, high, p, gained, lost = paired(a, b, range(n))
    assert gained == sum(y > x for x, y in zip(a, b)) and lost == sum(y < x for x, y in zip(a, b))
    assert difference == pytest.approx(100 * (sum(b) - sum(a)) / n)
    assert p == pytest.approx(plain_p(a, b), rel=1e-12) and low <= difference <= high
    if n == 3000:       # the bootstrap of a mean of many items is the normal interval
        half = 196 * math.sqrt(sum((y - x - difference / 100) ** 2 for x, y in zip(a, b))) / n
        assert low == pytest.approx(difference - half, rel=0.03) and high == pytest.approx(difference + half, rel=0.03)


def test_mcnemar_of_many_items_takes_no_time():
    """As many as two models on ImageNet differ in: nearly the normal distribution."""
    started = time.process_time()
    assert mcnemar(20_000, 20_300) == pytest.approx(math.erfc(299 / math.sqrt(2 * 40_300)), rel=1e-4)
    assert time.process_time() - started < 5


def test_bootstrap_draws_whole_groups_and_is_a_function_of_its_seed():
    rng = random.Random(0)
    a, b = [rng.randint(0, 1) for _ in range(60)], [rng.randint(0, 1) for _ in range(60)]
    single = paired(a, b, range(60))
    assert single == paired(a, b, range(60)) != paired(a, b, range(60), 2000, 1)
    fourfold = paired(a * 4, b * 4, [i % 60 for i in range(240)])   # the same 60 images, each item four times
    assert fourfold[:3] == pytest.approx(single[:3])                # tells nothing new about images ...
    assert fourfold[3] < single[3] and fourfold[4] == 4 * single[4]     # ... which McNemar's test cannot see
    independent = paired(a * 4, b * 4, range(240))
    assert independent[2] - independent[1] < 0.7 * (single[2] - single[1])

    groups = [rng.choice("vwxyz") for _ in range(60)]               # of unequal size, by a naive loop
    names, draws, generator = sorted(set(groups)), [], np.random.default_rng(3)
    for _ in range(200):
        drawn = [names[i] for i in generator.integers(len(names), size=len(names))]
        items = [i for name in drawn for i in range(60) if groups[i] == name]
        draws.append(100 * sum(b[i] - a[i] for i in items) / len(items))
    assert paired(a, b, groups, 200, 3)[1:3] == pytest.approx(np.quantile(draws, (0.025, 0.975)))


def subset(correct, **more):
    return {"accuracy": sum(correct) / len(correct), "n": len(correct), "low": 0, "high": 1, "chance": 0.5, "ties": 0,
            "correct": correct, "image": list(range(len(correct))), "items": [f"item {i}" for i in range(len(correct))],
            **more}


def results(path, results, **more):
    path.write_text(json.dumps({"checkpoint": "x.pt", "protocol": 1, "data_sha256": dict.fromkeys(results, "h"),
                                "results": results, **more}))
    return str(path)


def test_compare_prints_counts_intervals_items_and_what_it_skips(tmp_path, capsys):
    a = results(tmp_path / "a.json", {
        "crepe": {"swap": subset([1, 1, 0, 0, 0, 0, 1, 0]), "old": subset([1])},
        "means": {"score": {"accuracy": 0.3, "n": 4}, "r1": {"accuracy": 0.3}},
        "gone": {"x": subset([1, 0])}})
    b = results(tmp_path / "b.json", {
        "crepe": {"swap": subset([1, 0, 1, 1, 1, 1, 1, 0])},
        "means": {"score": {"accuracy": 0.3, "n": 4}, "r1": {"accuracy": 0.3}},
        "new": {"x": subset([1, 0])}})
    command(["compare", a, b, "--items"])
    out = capsys.readouterr().out
    row = [line for line in out.splitlines() if line.startswith("crepe swap")][0].split()
    low, high = paired([1, 1, 0, 0, 0, 0, 1, 0], [1, 0, 1, 1, 1, 1, 1, 0], range(8))[1:3]
    assert row[2:] == ["8", "37.5", "75.0", "+37.5", f"{low:+.1f}", "..", f"{high:+.1f}", "0.38", "4", "1"]
    found = [line.strip() for line in out.splitlines() if line.startswith(("    gained", "    lost"))]
    assert found == ["gained: item 2", "gained: item 3", "gained: item 4", "gained: item 5", "lost: item 1"]
    skipped = [line for line in out.splitlines() if line.startswith("in one file only")][0]
    assert all(name in skipped for name in ("crepe old", "gone x", "new x"))
    assert "swap" not in skipped
    assert "bootstrap over images" in out and "exact McNemar" in out


@pytest.mark.parametrize("correct, more, file", [
    ([1, 0], {"image": [0, 1]}, {}), ([1, 0, 1], {"image": [0, 0, 1]}, {}),
    ([1, 0, 1], {}, {"data_sha256": {"crepe": "other"}}), ([1, 0, 1], {}, {"protocol": 2})])
def test_compare_of_different_items_names_the_subset(tmp_path, correct, more, file):
    base = {"image": [0, 1, 2]}
    a = results(tmp_path / "a.json", {"crepe": {"same": subset([1]), "swap": subset([1, 1, 1], **base)}})
    changed = subset(correct, **{**base, **more})
    b = results(tmp_path / "b.json", {"crepe": {"same": subset([1]), "swap": changed}}, **file)
    with pytest.raises(ValueError, match="crepe sw|crepe same" if file else r"crepe swap: A \(3 items\)"):
        command(["compare", a, b])


def test_compare_of_files_that_lack_different_images(tmp_path):
    """As many items of as many images: item 1 is not set against item 0."""
    images, files, found = [f"{i}.jpg" for i in range(6)], [], []
    for name, unread in ("a", 0), ("b", 5), ("c", 0):
        margins = torch.tensor([1.0, -1, 1, -1, 1, -1])
        margins[unread] = float("nan")
        found.append(evaluate.summarize([Outcome("swap", margins, 0.5, images, images)], {})["swap"])
        files.append(results(tmp_path / f"{name}.json", {"crepe": {"swap": found[-1]}}))
    assert [some["image"] for some in found] == [[1, 2, 3, 4, 5], [0, 1, 2, 3, 4], [1, 2, 3, 4, 5]]
    with pytest.raises(ValueError, match=r"crepe swap: A \(5 items\) and B \(5\) differ in items"):
        command(["compare", *files[:2]])
    command(["compare", files[0], files[2]])


@pytest.mark.parametrize("settings", [{"allow_missing": True}, {"allow_missing": False}, None])
def test_compare_of_old_files_that_may_lack_images(tmp_path, capsys, settings):
    """Before protocol 6 images were numbered without those that were missing: 0, 1, ... in every file."""
    more = {"protocol": 5} | ({"settings": settings} if settings else {})
    files = [results(tmp_path / f"{name}.json", {"crepe": {"swap": subset([1, 0, 1], image=[0, 1, 2])}}, **more)
             for name in "ab"]
    if settings and settings["allow_missing"]:
        with pytest.raises(ValueError, match=r"crepe swap: A \(3 items\) and B \(3\) differ in items, .*: score both again"):
            command(["compare", *files])
        command(["compare", *files, "--format", "text"])
        assert "not of the same items, data, attack or protocol version in all files: crepe swap" in capsys.readouterr().err
    else:
        command(["compare", *files])
    command(["compare", files[0], files[0]])
    new = results(tmp_path / "new.json", {"crepe": {"swap": subset([1, 0, 1], image=[0, 1, 2])}}, protocol=evaluate.PROTOCOL)
    with pytest.raises(ValueError, match="differ in items, data, attack or protocol version"):
        command(["compare", files[0], new])


def test_images_that_are_not_used_are_not_drawn():
    """The numbers of images may have gaps, and all draws are of as many images as are left."""
    rng = np.random.default_rng(0)
    images, values = rng.integers(9, size=(2, 60)), rng.random((2, 60))
    columns = [(images[i], values[i], np.ones(60)) for i in range(2)]
    gaps = [(7 + 3 * images[i], values[i], np.ones(60)) for i in range(2)]
    assert (bootstrap(gaps, 100) == bootstrap(columns, 100)).all() and not np.isnan(bootstrap(gaps, 100)).any()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"results": 3}', '{"results": {"a": 1}}',
                                  '{"results": {"a": {"b": 1}}}'])
def test_compare_of_something_else(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    good = results(tmp_path / "a.json", {"crepe": {"swap": subset([1])}})
    for other in (tmp_path / "bad.json", tmp_path / "none.json"):
        with pytest.raises(ValueError, match="expected files of --json"):
            command(["compare", good, str(other)])


def test_compare_shows_the_means_with_their_intervals(tmp_path, capsys):
    """Means over subsets, over items (micro) and over labels, against the plain bootstrap with the same draws."""
    rng, files, summaries = random.Random(0), [], []
    names = [f"image {rng.randrange(30)}" for _ in range(120)]
    labels = [rng.choice("abc") for _ in names]
    for number in range(2):
        margins = [torch.tensor([float(rng.random() < 0.5 + 0.2 * number) - 0.5 for _ in names]) for _ in range(2)]
        outcomes = [Outcome("x", margins[0], 0.5, names, names, labels),
                    Outcome("y", margins[1][:50], 0.5, names[:50], names[:50])]
        summaries.append(evaluate.summarize(outcomes, {"both": ["x", "y"], "nested": ["both", "x"], "micro": ["x", "y"]}))
        files.append(results(tmp_path / f"{number}.json", {"crepe": summaries[-1]}))
    command(["compare", *files])
    out = capsys.readouterr().out.splitlines()
    a, b = summaries
    images = {"x": a["x"]["image"], "y": a["y"]["image"]}
    change = {name: np.subtract(b[name]["correct"], a[name]["correct"]) for name in "xy"}
    columns = [(np.array(images[name]), change[name], np.ones(len(change[name]))) for name in "xy"]
    columns += [(np.array(images["x"]), change["x"], np.array([1 / labels.count(label) for label in labels]))]
    x, y, macro = 100 * evaluate.bootstrap(columns).T
    draws = {"x_macro": macro, "both": (x + y) / 2, "nested": (3 * x + y) / 4, "micro": (120 * x + 50 * y) / 170}
    for name, some in draws.items():
        row = next(line for line in out if line.startswith(f"crepe {name} ")).split()[2:]
        low, high = np.quantile(some[1:], (0.025, 0.975))
        assert row[1:] == [f"{100 * a[name]['accuracy']:.1f}", f"{100 * b[name]['accuracy']:.1f}", f"{some[0]:+.1f}",
                           f"{low:+.1f}", "..", f"{high:+.1f}", "mean"]
        assert some[0] == pytest.approx(100 * (b[name]["accuracy"] - a[name]["accuracy"]))


def clear_best(files, parts):
    found = [evaluate.find_result(file, parts) for file in files]
    return evaluate.clear_best(found, parts, evaluate.all_differences(files))


def paired_mean(parts, files):
    return evaluate.paired_mean(parts, 0, 1, evaluate.all_differences(files))


def differences(a, b, images=None, labels=None, means=()):
    """Of two models with these items right, on a benchmark of one subset x."""
    images = images or [f"{i}.jpg" for i in range(len(a))]
    found = []
    for right in (a, b):
        outcome = Outcome("x", torch.tensor(right) - 0.5, 0.5, images, images, labels)
        found.append({name: {**r, "data": ""} for name, r in evaluate.summarize([outcome], dict(means)).items()})
    return evaluate.paired_differences("bench", *found), found


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 30, 400])
def test_the_interval_of_few_changes_is_as_careful_as_mcnemar(n):
    """Whether n of n items or n of some more are gained or lost: 0 is outside where p < 0.05, and nowhere else."""
    assert (mcnemar(n, 0) < 0.05) == (n > 5)
    for same in (0, 3, 40):
        worse, better = [0] * n + [1] * same, [1] * (n + same)
        labels = [i % 3 for i in range(n + same)]
        gain, files = differences(worse, better, None, labels, {"mean": ["x", "x_macro"]})
        loss, _ = differences(better, worse)
        for name in "x", "x_macro", "mean":
            low, high = gain[name].interval()
            assert (low > 0) == (n > 5) and low < gain[name].draws[0] <= high <= 100
        low, high = gain["x"].interval()
        assert loss["x"].interval() == pytest.approx((-high, -low), abs=1)
        best = clear_best([{"bench": file} for file in files], [("bench", "x")])
        assert best == (1 if n > 5 else None)
        if n == 400 and same == 40:     # of many, the bootstrap's
            assert low == np.quantile(gain["x"].draws[1:], 0.025)


def test_the_interval_of_no_change_is_no_point():
    """It narrows with the images, whatever the items: the share that changes may be what is not seen with 2.5 %."""
    for n, images in (4, None), (400, None), (400, ["1", "2", "3", "4"] * 100):
        found, _ = differences([1] * n, [1] * n, images)
        low, high = found["x"].interval()
        assert low == -high < 0 and (1 - high / 100) ** len(set(images or range(n))) == pytest.approx(0.025)


def test_changes_of_one_image_count_once_and_both_ways_are_the_bootstrap():
    images = ["1", "2", "3", "4"] * 5
    found, _ = differences([0] * 20, [1] * 20, images)      # McNemar's p of 20 items is 2e-6
    assert found["x"].interval()[0] < 0 and len(found["x"].gained) == 4 and not found["x"].lost
    found, _ = differences([0] * 9 + [1], [1] * 9 + [0])
    assert found["x"].interval() == pytest.approx(np.quantile(found["x"].draws[1:], (0.025, 0.975)))
    both = paired_mean([("b", "x"), ("c", "x")], [
        {"b": file, "c": file} for file in differences([0] * 3, [1] * 3)[1]])
    assert len(both.images) == len(both.gained) == 6 and both.interval()[0] > 0     # 3 of each: 6 images


@pytest.fixture
def three(tmp_path):
    """Files of three models: on swap, A is far ahead of B, and B not of C."""
    rng, files = random.Random(0), []
    rights = {"swap": [[1] * 90 + [0] * 10, [1] * 60 + [0] * 40, [1] * 59 + [0] * 41],
              "add": [[rng.randint(0, 1) for _ in range(100)] for _ in range(3)]}
    for number, name in enumerate("abc"):
        outcomes = []
        for part, right in rights.items():
            images = [f"{i}.jpg" for i in range(100)]
            outcomes.append(Outcome(part, torch.tensor(right[number]) - 0.5, 0.5, images, images))
        found = evaluate.summarize(outcomes, {"macro_3": ["swap", "add"]})
        files.append(results(tmp_path / f"{name}.json", {"sugarcrepe": found}, checkpoint=f"out/model_{name}/last.pt"))
    return files


def test_tables_to_paste(three, capsys):
    def printed(*args):
        command(["compare", *three, *args])
        return capsys.readouterr().out.rstrip().splitlines()

    def cell(path, subset):
        found = json.loads(open(path).read())["results"]["sugarcrepe"][subset]
        return [f"{100 * found[name]:.1f}" for name in ("accuracy", "low", "high")]

    rows = list(csv.reader(printed("--format", "csv", "--columns", "all")))
    assert rows[0][:4] == ["sugarcrepe", "swap", "swap_low", "swap_high"] and rows[0][-3] == "macro_3"
    assert [row[0] for row in rows[1:]] == ["model_a", "model_b", "model_c"]
    for row, path in zip(rows[1:], three):
        assert row[1:] == [x for subset in ("swap", "add", "macro_3") for x in cell(path, subset)]
    lines = printed("--format", "markdown", "--columns", "swap")
    value, low, high = cell(three[0], "swap")
    assert lines == ["| sugarcrepe | swap |", "| --- | ---: |", f"| model_a | **{value}** [{low}, {high}] |"] + [
        f"| model_{name} | {x} [{low}, {high}] |" for name, path in zip("bc", three[1:])
        for x, low, high in [cell(path, "swap")]]
    command(["compare", *three[1:], "--format", "markdown", "--columns", "swap"])   # b is not clearly ahead of c
    assert "**" not in capsys.readouterr().out
    lines = printed("--format", "latex", "--columns", "swap")
    assert lines[:4] == [r"\begin{tabular}{lr}", r"\toprule", r"sugarcrepe & swap \\", r"\midrule"]
    assert lines[4] == rf"model\_a & \textbf{{{value}}}$_{{{low}}}^{{{high}}}$ \\" and lines[-1] == r"\end{tabular}"
    lines = printed()                               # the means, where there are any
    assert lines[0].split() == ["sugarcrepe", "macro_3"] and len(lines) == 6
    lines = printed("--format", "text", "--columns", "all", "--reference")
    assert max(map(len, lines)) <= 100 and f"{value}* {low}-{high}" in lines[1]
    row = next(line for line in lines if line.startswith("C2LIP B/16 (published)")).split()
    assert row[3:] == ["73.1", "94.2"]


def test_names_of_latex_are_no_commands():
    """A subset of one's own may be "red & blue": it is one column."""
    out = evaluate.latex_form(["choices", "red & blue"], [["50% of {a_b}", evaluate.Cell("1.0")]])
    assert r"choices & red \& blue \\" in out.splitlines() and r"50\% of \{a\_b\} & 1.0 \\" in out.splitlines()


def test_a_lead_over_other_items_is_no_lead(three, tmp_path):
    names, files = evaluate.read_all_results(three[:2])
    swap = [("sugarcrepe", "swap")]
    assert clear_best(files, swap) == 0 == clear_best(files[::-1], swap) - 1
    files[1]["sugarcrepe"]["swap"] = {**files[1]["sugarcrepe"]["swap"], "data": "others"}
    assert clear_best(files, swap) is None and clear_best(files[:1], swap) is None


def test_a_table_draws_each_benchmark_once(three, monkeypatch):
    """However many columns it has, for each two models that lead in one."""
    names, files = evaluate.read_all_results(three)
    for file in files:
        for number in range(20):
            file["sugarcrepe"][f"swap_{number}"] = file["sugarcrepe"]["swap"]
    counted = []
    plain = evaluate.bootstrap
    monkeypatch.setattr(evaluate, "bootstrap", lambda *args: counted.append(0) or plain(*args))
    columns = [("sugarcrepe", name) for name in files[0]["sugarcrepe"] if name.startswith("swap")]
    table = evaluate.format_table("sugarcrepe", columns, names, files)
    assert len(columns) == 21 and table.count("*") == 22 and len(counted) == 1      # one * in the legend


@pytest.fixture
def several(tmp_path):
    """Files of three models on two benchmarks: the first is ahead on each attribute, and has no scenes."""
    rng, files = random.Random(1), []
    for number in range(3):
        found = {}
        for bench, subsets in ("sugarcrepe", ("swap_att", "add_att", "swap_obj")), ("scenes", ("np_binding", "swap_att")):
            outcomes, images = [], [f"{i}.jpg" for i in range(80)]
            for subset in subsets:
                right = [rng.random() < (0.9 if number == 1 else 0.4) for _ in images]
                outcomes.append(Outcome(subset, torch.tensor(right).float() - 0.5, 0.5, images, images))
            found[bench] = evaluate.summarize(outcomes, {"macro_7": ["swap_att", "add_att"]})
        if number == 0:
            del found["scenes"]
        files.append(results(tmp_path / f"{number}.json", found, checkpoint=f"out/m{number}/last.pt"))
    return files


def test_one_table_over_benchmarks(several, capsys):
    files = [json.loads(open(path).read())["results"] for path in several]

    def table(*args):
        command(["compare", *several, "--format", "csv", "--columns", *args])
        return list(csv.reader(capsys.readouterr().out.strip().splitlines()))

    head, *rows = table("headline")
    assert head[::3] == ["headline", "scenes swap_att_high", "sugarcrepe macro_7_high"]
    assert [row[0] for row in rows] == ["m0", "m1", "m2"] and rows[0][1:4] == ["", "", ""]
    assert rows[1][1] == f"{100 * files[1]['scenes']['swap_att']['accuracy']:.1f}"
    head, *rows = table("attribute")
    columns = [("sugarcrepe", "add_att"), ("sugarcrepe", "swap_att"), ("scenes", "np_binding"), ("scenes", "swap_att")]
    assert head[1::3] == [*(" ".join(column) for column in columns), "mean"] and rows[0][-3:] == ["", "", ""]
    means, aboves = [], []
    for bench in "sugarcrepe", "scenes":        # whose images are drawn once for both subsets
        found = [files[2][bench][subset] for name, subset in columns if name == bench]
        both = bootstrap([(np.array(r["image"]), np.array(r["correct"]), np.ones(80)) for r in found]).mean(1)
        means.append(both[0])
        aboves.append(np.quantile(both[1:], 0.975) - both[0])
    mean, above = np.mean(means), math.hypot(*aboves) / 2
    assert rows[2][-3] == f"{100 * mean:.1f}" and rows[2][-1] == f"{100 * (mean + above):.1f}"
    command(["compare", *several, "--format", "markdown", "--columns", "attribute"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| m1"))
    assert line.count("**") == 2 * 5        # ahead on each, and on their mean
    command(["compare", *several])
    out = capsys.readouterr().out
    assert out.index("headline") < out.index("sugarcrepe  ") and out.count("percent with 95 % intervals") == 3
    assert "not of the same items" not in out
    for columns in ("relation", "swap_attribute"):
        with pytest.raises(ValueError, match=f"no figure of these files is named {columns}: expected .* headline, attri"):
            command(["compare", *several, "--columns", columns])


def test_a_table_of_other_items_says_so(several, tmp_path, capsys):
    """Of other images, or of another number of items; a model without the benchmark does not count."""
    file = json.loads(open(several[1]).read())
    images = file["results"]["sugarcrepe"]["swap_att"]["image"]
    images[0] = images[1]
    file["results"]["scenes"]["np_binding"]["n"] = 79
    changed = results(tmp_path / "changed.json", file["results"])
    command(["compare", several[0], changed, several[2], "--columns", "swap_att,swap_obj,np_binding"])
    unlike = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not of the same items")]
    says = "not of the same items, data, attack or protocol version in all files: "
    assert unlike == [f"{says}sugarcrepe swap_att", f"{says}scenes np_binding"]
    command(["compare", several[0], changed, "--columns", "np_binding"])
    assert "not of the same items" not in capsys.readouterr().out
    command(["compare", several[0], changed, "--columns", "swap_att", "--format", "csv"])       # to paste: only the table
    printed = capsys.readouterr()
    assert "not of the same items" not in printed.out and "not of the same items" in printed.err


@pytest.mark.parametrize("more", [{"data_sha256": {"sugarcrepe": "other"}}, {"protocol": 2}])
def test_a_table_of_other_data_says_so(several, tmp_path, capsys, more):
    """As many items of as many images, with other texts, or by another protocol."""
    file = json.loads(open(several[1]).read())
    command(["compare", several[0], results(tmp_path / "other.json", file["results"], **more), "--columns", "swap_obj"])
    assert "version in all files: sugarcrepe swap_obj\n" in capsys.readouterr().out


def test_items_are_of_two_files(three):
    for more in (three[2:], ["--columns", "swap"], ["--format", "csv"], ["--reference"]):
        with pytest.raises(ValueError, match="^--items are those of two files: give two, and neither --format"):
            command(["compare", *three[:2], *more, "--items"])


def test_the_mean_of_benchmarks_is_of_independent_ones():
    """Its interval is near that of drawing all benchmarks anew."""
    rng, outcomes = np.random.default_rng(0), {}
    for bench, n in ("a", 300), ("b", 200), ("c", 500):
        images = [str(i) for i in range(n)]
        outcomes[bench] = [Outcome("top1", torch.from_numpy(rng.random(n) - 0.4), 0.1, images, images)]
    file = {bench: evaluate.summarize(some, {}) for bench, some in outcomes.items()}
    found = [results["top1"] for results in file.values()]
    mean, draws = evaluate.find_result(file, [(bench, "top1") for bench in file]), []
    for _ in range(4000):
        draws.append(np.mean([np.mean(rng.choice(r["correct"], r["n"])) for r in found]))
    assert mean["accuracy"] == pytest.approx(np.mean([r["accuracy"] for r in found])) and mean["n"] == 1000
    assert [mean["low"], mean["high"]] == pytest.approx(np.quantile(draws, (0.025, 0.975)), abs=0.004)


def test_the_mean_of_subsets_of_one_benchmark_draws_its_images_once():
    """Where they agree on every image, their mean is as uncertain as each of them, and no less; beside another
    benchmark, all parts count alike."""
    images = [f"{i}.jpg" for i in range(100)]
    outcomes = [Outcome(name, torch.tensor([1] * 60 + [0] * 40) - 0.5, 0.5, images, images) for name in "xyz"]
    other = [Outcome("x", torch.tensor([1] * 20 + [0] * 80) - 0.5, 0.1, images, images)]
    file = {"b": evaluate.summarize(outcomes, {}), "c": evaluate.summarize(other, {})}
    one, two = file["b"]["x"], file["c"]["x"]
    parts = [("b", name) for name in "xyz"]
    mean = evaluate.find_result(file, parts)
    for key in "accuracy", "low", "high", "chance":
        assert mean[key] == pytest.approx(one[key]), key
    mean = evaluate.find_result(file, [parts[0], ("c", "x"), *parts[1:]])
    assert mean["accuracy"] == pytest.approx(0.5) and mean["chance"] == pytest.approx(0.4) and mean["n"] == 400
    below = math.hypot(3 * (one["accuracy"] - one["low"]), two["accuracy"] - two["low"]) / 4
    assert mean["low"] == pytest.approx(0.5 - below)
    assert evaluate.find_result(file, [*parts, ("d", "x")]) is None
    del file["b"]["y"]["correct"]
    with pytest.raises(ValueError, match="no items of b x and others: expected files of --json"):
        evaluate.find_result(file, parts)


def test_run_gives_the_mean_of_the_eleven_sets(monkeypatch):
    assert len(evaluate.GROUPS[evaluate.ELEVEN]) == 11
    assert all(len(evaluate.READERS[bench].__doc__) > 99 for bench in evaluate.GROUPS[evaluate.ELEVEN])
    monkeypatch.setattr(evaluate, "ELEVEN_SETS", [("scenes_pointing", "quadrant"), ("scenes", "swap_att")])
    found = evaluate.run(nano(0).eval(), ["scenes", "scenes_pointing"], quiet=True)
    both = [found["scenes_pointing"]["quadrant"]["accuracy"], found["scenes"]["swap_att"]["accuracy"]]
    assert found[evaluate.ELEVEN]["mean"]["accuracy"] == pytest.approx(sum(both) / 2)


@pytest.fixture
def eleven(tmp_path):
    """Files of two models on the eleven sets of 60 images and more; the second is ahead."""
    files = []
    for number in range(2):
        rng, found = np.random.default_rng(number), {}
        for more, (bench, (name,)) in enumerate(evaluate.GROUPS[evaluate.ELEVEN].items()):
            images = [f"{i}.jpg" for i in range(60 + more)]
            margins = torch.from_numpy(rng.random(len(images)) - 0.5 + 0.1 * number)
            outcome = Outcome("top1", margins, 0.1, images, images, [i % 7 for i in range(len(images))])
            found[bench] = evaluate.summarize([outcome], {})
        parts = [(bench, name) for bench, (name,) in evaluate.GROUPS[evaluate.ELEVEN].items()]
        found[evaluate.ELEVEN] = {"mean": evaluate.find_result(found, parts)}
        files.append(results(tmp_path / f"{number}.json", found, checkpoint=f"out/m{number}/last.pt"))
    return files


def test_compare_shows_the_mean_of_the_eleven_sets(eleven, capsys):
    """Its difference and interval, against items of each set drawn anew, the same of both models."""
    command(["compare", *eleven])
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("classification_11 mean")]
    a, b = (json.loads(open(path).read())["results"] for path in eleven)
    rng, draws, differences = np.random.default_rng(9), [], []
    for bench, (name,) in evaluate.GROUPS[evaluate.ELEVEN].items():
        weights = np.array(a[bench][name].get("weights", np.ones(a[bench]["top1"]["n"])))
        change = np.subtract(b[bench]["top1"]["correct"], a[bench]["top1"]["correct"])
        drawn = rng.integers(len(change), size=(4000, len(change)))
        draws.append((change * weights)[drawn].sum(1) / weights[drawn].sum(1))
        differences.append(b[bench][name]["accuracy"] - a[bench][name]["accuracy"])
    low, high = 100 * np.quantile(np.mean(draws, 0), (0.025, 0.975))
    row = line.split()
    means = [100 * file[evaluate.ELEVEN]["mean"]["accuracy"] for file in (a, b)]
    assert row[2:6] == [str(11 * 60 + 55), *(f"{mean:.1f}" for mean in means), f"{100 * np.mean(differences):+.1f}"]
    assert float(row[6]) == pytest.approx(low, abs=0.4) and float(row[8]) == pytest.approx(high, abs=0.4)
    assert row[9:] == ["mean"] and out.endswith("in one file only: none\n") and low > 0
    command(["compare", *eleven, "--columns", "headline", "--format", "markdown"])
    assert f"| **{means[1]:.1f}** [" in capsys.readouterr().out.splitlines()[3]

    file = json.loads(open(eleven[1]).read())
    del file["results"]["pets"], file["results"][evaluate.ELEVEN]
    results(Path(eleven[1]), file["results"])
    command(["compare", *eleven])
    out = capsys.readouterr().out
    assert "\nclassification_11" not in out and "pets top1_macro, classification_11 mean" in out


def test_the_lead_in_several_subsets_of_one_benchmark_draws_its_images_once():
    """Their mean is as uncertain as each of them where they agree on every image."""
    images = [f"{i}.jpg" for i in range(100)]
    files = []
    for right in ([1] * 50 + [0] * 50, [1] * 56 + [0] * 44):
        outcomes = [Outcome(name, torch.tensor(right) - 0.5, 0.5, images, images) for name in "xyz"]
        files.append(dict.fromkeys("bc", {name: {**r, "data": ""} for name, r in evaluate.summarize(outcomes, {}).items()}))
    one, three = (paired_mean([("b", name) for name in names], files).draws for names in ("x", "xyz"))
    assert np.allclose(one, three) and one[0] == pytest.approx(6)
    both = paired_mean([("b", "x"), ("c", "x")], files).draws       # of two benchmarks they are others
    assert both[0] == pytest.approx(6) and both.std() == pytest.approx(one.std() / math.sqrt(2), rel=0.1)


def test_groups_name_what_benchmarks_have():
    """Each subset of a table over benchmarks is a file, a mean, or what a benchmark without files yields."""
    for title, group in evaluate.GROUPS.items():
        for bench, subsets in group.items():
            spec = evaluate.TABLE.get(bench, {})
            known = {*spec.get("means", {}), *spec.get("files", {}), *evaluate.PAIRED, "macro", "top1", "top1_macro"}
            known |= {f"{name}_{rule}" for name in ("attribute", "object", "relation") for rule in evaluate.PAIRED}
            known |= {f"{name}{end}" for name in spec.get("files", {}) for end in ("_macro", "_itt", "_tot", "_t2i_r1")}
            known |= {*evaluate.SCENE_CAPTIONS, "quadrant", "cell", "mean", "coco", "choices"}
            assert set(subsets) <= known, (title, bench)


# ------------------------------------------------------------------------------------------------- plot

def log_file(folder, rows):
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(folder / "log.jsonl")


def run_log(folder, slope):
    rows = [{"args": {}, "config": {}}] + [{"step": i, "loss": 9.0 / i, "logit_bias": None} for i in range(1, 101)]
    rows += [{"step": i, "eval": {"scenes": {"swap": {"accuracy": slope(i)}}}} for i in range(20, 101, 20)]
    return log_file(folder, rows)


@pytest.fixture
def figures(monkeypatch):
    """The figures of matplotlib that were saved, beside their files."""
    kept, save = [], evaluate.save_figure
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, output: (kept.append(figure), save(figure, output)))
    return kept


def lines(panel):
    return {line.get_color(): (list(line.get_xdata()), list(line.get_ydata())) for line in panel.get_lines()}


def test_plot_draws_each_run_where_its_values_are(tmp_path, figures):
    up, down = run_log(tmp_path / "up", lambda i: i / 100), run_log(tmp_path / "down", lambda i: 1 - i / 100)
    command(["plot", up, down, "--output", str(tmp_path / "c.png")])
    assert Image.open(tmp_path / "c.png").format == "PNG" and Image.open(tmp_path / "c.png").width > 1500
    loss, swap = figures[0].axes                                        # two panels beside each other
    steps = list(range(1, 101))
    for colour in evaluate.CURVES[:2]:
        assert lines(loss)[colour] == (steps, [9.0 / i for i in steps])
    steps = list(range(20, 101, 20))
    assert lines(swap)[evaluate.CURVES[0]] == (steps, pytest.approx(steps))
    assert lines(swap)[evaluate.CURVES[1]] == (steps, pytest.approx([100 - i for i in steps]))
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["up", "down"]
    # in plain words, and steps in whole numbers
    assert loss.get_title() == "loss" and swap.get_title() == "swap (scenes)"
    for panel in (loss, swap):
        assert panel.get_xlabel() == "step" and all(tick == int(tick) for tick in panel.get_xticks())
    command(["plot", up, down, "--keys", "scenes.swap", "--output", str(tmp_path / "c.svg")])
    assert len(figures[1].axes) == 1 and (tmp_path / "c.svg").read_text().startswith("<?xml")


def test_plot_counts_torn_lines_and_takes_the_later_of_two(tmp_path, capsys, figures):
    rows = [{"step": 1, "loss": 5.0}, '{"step": 2, "lo\n', "7\n", {"step": 2, "loss": float("nan")},
            {"step": 3, "loss": 9.0}, {"step": 3, "loss": 2.0}]
    curves = {"step": {1: 1, 2: 2, 3: 3}, "loss": {1: 5.0, 3: 2.0}}
    assert evaluate.read_log(log_file(tmp_path / "read", rows)) == (curves, {})
    assert capsys.readouterr().out == f"{tmp_path}/read/log.jsonl: lines skipped that are not of train.py: 2\n"
    command(["plot", log_file(tmp_path / "torn", rows), "--output", str(tmp_path / "c.png")])
    assert "lines skipped that are not of train.py: 2\n" in capsys.readouterr().out and len(figures[0].axes) == 1
    run, other = run_log(tmp_path / "run", lambda i: 0.5), tmp_path / "other" / "log.jsonl"
    log_file(tmp_path / "other", [{"step": 4, "eval": {"retrieval": {"i2t_r1": {"accuracy": 0.5}}}}])
    command(["plot", run, str(other), "--output", str(tmp_path / "c.png")])     # curves that only one of them has
    assert [len(panel.get_lines()) for panel in figures[1].axes] == [1, 1, 1]
    constant = log_file(tmp_path / "flat", [{"step": 0, "loss": 0.0}])      # one point, no range on either axis
    command(["plot", constant, "--output", str(tmp_path / "c.png")])


def test_plot_draws_of_several_methods_what_means_the_same_in_all(tmp_path, capsys, figures):
    def training(name, method, bias=-10.0, bench=None, **weights):
        rows = [{"args": {"method": method, **weights}}]
        for step in range(1, 4):
            rows.append({"step": step, "loss": 1.0, "contrastive": 0.5, "logit_bias": bias})
        if bench:
            rows.append({"step": 3, "eval": {bench: {"x": {"accuracy": 0.5}}}})
        return log_file(tmp_path / name, rows)

    def drawn(*logs):
        command(["plot", *logs, "--output", str(tmp_path / "c.png")])
        return [panel.get_title() for panel in figures.pop().axes], capsys.readouterr().out.split("\n")[:-2]

    plain, ours = training("plain", "siglip"), training("ours", "c2lip", npc_weight=1.0)
    hard, softmax = training("hard", "negclip"), training("softmax", "clip", bias=None)
    assert drawn(plain, training("again", "siglip", npc_weight=0.0)) == (["loss"], [])
    titles, (line,) = drawn(plain, ours)
    assert titles == ["contrastive"] and "contrastive is drawn, which is the same in all" in line
    assert drawn(ours, training("more", "c2lip", npc_weight=2.0))[0] == ["contrastive"]
    for other in hard, softmax:
        titles, (line,) = drawn(plain, other)
        assert titles == ["loss"] and "compare their course, not their height" in line
    a, b = training("a", "siglip", bench="s"), training("b", "negclip", bench="s")
    titles, (line,) = drawn(a, b)
    assert titles == ["x (s)"] and "left out: --keys loss draws them" in line
    assert drawn(a, ours)[0] == ["contrastive", "x (s)"]


def test_plot_draws_results_as_bars(three, tmp_path, figures):
    command(["plot", *three, "--output", str(tmp_path / "c.png")])
    (panel,) = figures[0].axes
    bars = [bar for container in panel.containers for bar in getattr(container, "patches", ())]
    heights = sorted(round(bar.get_height(), 6) for bar in bars if bar.get_width() < 0.5)
    found = [json.loads(open(path).read())["results"]["sugarcrepe"] for path in three]
    assert heights == sorted(round(100 * r["accuracy"], 6) for file in found for r in file.values())
    assert [label.get_text() for label in panel.get_xticklabels()] == ["swap", "add", "macro_3"]
    command(["plot", *three, "--radar", "--output", str(tmp_path / "r.png")])
    (panel,) = figures.pop().axes
    for line, file in zip(panel.get_lines(), found):
        values = [100 * file[name]["accuracy"] for name in ("swap", "add", "macro_3", "swap")]
        assert list(line.get_ydata()) == pytest.approx(values)
    assert list(panel.get_lines()[0].get_xdata()) == pytest.approx([0, 2 * np.pi / 3, 4 * np.pi / 3, 0])
    with pytest.raises(ValueError, match="--radar: no three figures that all models have: see --keys"):
        command(["plot", *three, "--radar", "--keys", "swap"])
    command(["plot", *three, "--keys", "swap", "--output", str(tmp_path / "c.png")])
    assert [label.get_text() for label in figures[1].axes[0].get_xticklabels()] == ["swap"]


def test_plot_mistakes(tmp_path):
    good, empty = run_log(tmp_path / "good", lambda i: 0.5), log_file(tmp_path / "empty", [{"args": {}}])
    bare = log_file(tmp_path / "bare", [{"step": 1}])       # neither loss nor evaluation
    for argv in ([bare], [empty], [good, empty], [good, "--keys", "lss"], [good] * 8):
        with pytest.raises(ValueError, match="plot takes .*none empty, and --keys from|plot takes up to 7 files"):
            command(["plot", *argv, "--output", str(tmp_path / "c.png")])
    with pytest.raises(FileNotFoundError, match="none.jsonl"):
        command(["plot", str(tmp_path / "none.jsonl")])
    with pytest.raises(ValueError, match="--output .*c.xyz"):
        command(["plot", good, "--output", str(tmp_path / "c.xyz")])
    assert not (tmp_path / "c.png").exists()


def test_pictures_say_what_draws_them(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)     # as if it were not installed
    with pytest.raises(ValueError, match="pip install matplotlib"):
        command(["plot", run_log(tmp_path / "good", lambda i: 0.5), "--output", str(tmp_path / "c.png")])


# ------------------------------------------------------------------------------------------------- show

@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        model = nano(seed, patch_size=8 if seed else 16)
        os.makedirs(folder / f"run{seed}")
        torch.save(model.checkpoint(), folder / f"run{seed}" / "last.pt")
    return [str(folder / "run0" / "last.pt"), str(folder / "run1" / "last.pt")]


def test_show_draws_the_similarities_on_one_scale(checkpoints, tmp_path, figures):
    command(["show", "--checkpoint", ",".join(checkpoints), "--scene", "5", "--output", str(tmp_path / "a.png")])
    assert Image.open(tmp_path / "a.png").format == "PNG"
    scene, scales = Scenes(9, "val", 1)[5], set()
    panels = figures[0].axes[:6]                    # a row a checkpoint: the scene and two phrases; then the colour bar
    assert [panel.get_title() for panel in panels] == ["run0", *scene["concepts"], "run1", *scene["concepts"]]
    assert "cosine" in figures[0].axes[6].get_ylabel()
    every = []
    for row, path in enumerate(checkpoints):
        photograph, = panels[3 * row].get_images()
        assert np.array_equal(photograph.get_array(), np.asarray(scene["image"]))       # its own size, untinted
        model = CLIP.load(path).eval()
        with torch.no_grad():
            v = model.encode_image(model.transform(scene["image"])[None], True, True)[1][0].double()     # (T, D)
            p = model.encode_text(model.tokenize(scene["concepts"]), True).double()                      # (2, D)
        side = math.isqrt(len(v))
        for n, panel in enumerate(panels[3 * row + 1:3 * row + 3]):
            values = [[float(v[y * side + x] @ p[n]) for x in range(side)] for y in range(side)]    # a patch at a time
            drawn = panel.get_images()[1]
            assert np.allclose(drawn.get_array(), values, atol=1e-5)
            scales.add((drawn.norm.vmin, drawn.norm.vmax))
            every += sum(values, [])
            y, x = np.unravel_index(np.argmax(values), (side, side))
            peak = panel.get_lines()[0]
            assert peak.get_xdata()[0] == (x + 0.5) * 32 / side and peak.get_ydata()[0] == (y + 0.5) * 32 / side
    (scale,) = scales
    assert scale == pytest.approx((min(every), max(every)), abs=1e-5)


def test_show_puts_the_map_where_the_model_looks(tmp_path, figures):
    """A model that sees the square in the middle."""
    model = nano(0, resize="shortest")
    torch.save(model.checkpoint(), tmp_path / "m.pt")
    Image.effect_noise((90, 50), 90).convert("RGB").save(tmp_path / "i.png")
    command(["show", "--checkpoint", str(tmp_path / "m.pt"), "--image", str(tmp_path / "i.png"),
             "--concepts", "a dog", "--output", str(tmp_path / "a.svg")])
    panel = figures[0].axes[1]
    assert panel.get_images()[1].get_extent() == [20, 70, 50, 0]
    assert panel.get_xlim() == (0, 90) and panel.get_ylim() == (50, 0)     # the whole photograph stays


def test_show_of_an_image_file_with_a_caption_or_concepts(checkpoints, tmp_path, figures):
    Image.effect_noise((50, 70), 90).save(tmp_path / "i.jpg")
    show = ["show", "--checkpoint", checkpoints[1], "--image", str(tmp_path / "i.jpg"),
            "--output", str(tmp_path / "a.png")]
    command([*show, "--caption", "A cat sits on a mat beside the old dog."])
    assert [panel.get_title() for panel in figures[0].axes] == ["run1", "A cat", "a mat", "the old dog", ""]
    command([*show, "--concepts", "a red couch"])
    assert [panel.get_title() for panel in figures[1].axes] == ["run1", "a red couch", ""]
    for extra in ([], ["--caption", " "]):
        with pytest.raises(ValueError, match="give --concepts, or a --caption"):
            command([*show, *extra])
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "i.jpg").read_bytes()[:300])
    with pytest.raises(ValueError, match=f"^--image {tmp_path / 'torn.jpg'}: "):
        command([*show, "--image", str(tmp_path / "torn.jpg"), "--concepts", "a red couch"])
    with pytest.raises(ValueError, match="no checkpoint at none.pt"):
        command(["show", "--checkpoint", "none.pt"])
    with pytest.raises(FileNotFoundError, match="none.jpg"):
        command(["show", "--checkpoint", checkpoints[1], "--image", "none.jpg"])


def drawn_boxes(panel):
    """The boxes over a map, from left to right, each drawn twice: a white line and its rim."""
    corners = sorted((*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in panel.patches)
    assert corners[::2] == corners[1::2]
    return corners[::2]


def test_show_draws_the_boxes_of_what_a_phrase_names(checkpoints, tmp_path, figures):
    boxes = {"i.png": [["dog", 3, 4, 20, 10], ["dog", 30, 1, 5, 5], ["teddy bear", 9, 9, 9, 9], ["bear", 1, 2, 3, 4]],
             "other.png": [["dog", 0, 0, 1, 1]]}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    Image.effect_noise((60, 40), 90).convert("RGB").save(tmp_path / "i.png")
    show = ["show", "--checkpoint", checkpoints[1], "--image", str(tmp_path / "i.png"), "--boxes",
            str(tmp_path / "boxes.json"), "--output", str(tmp_path / "a.png")]
    command([*show, "--concepts", "two Dogs", "a teddy bear", "a brown bear", "a cat"])
    panels = figures[0].axes[:5]
    assert [drawn_boxes(panel) for panel in panels] == [
        [], [(3, 4, 20, 10), (30, 1, 5, 5)], [(9, 9, 9, 9)], [(1, 2, 3, 4)], []]
    command(["show", "--checkpoint", checkpoints[1], "--scene", "5", "--output", str(tmp_path / "a.png")])
    data = Scenes(9, "val", 1)      # of a scene the quadrants are known
    for panel, ((colour, shape), cell) in zip(figures[1].axes[1:3], zip(*data.objects(5)[:2])):
        assert f"{colour} {shape}" in panel.get_title()
        assert drawn_boxes(panel) == [(16 * (cell % 2), 16 * (cell // 2), 16, 16)]
    os.rename(tmp_path / "i.png", tmp_path / "j.png")
    with pytest.raises(ValueError, match="boxes.json has no boxes of j.png"):
        command(["show", "--checkpoint", checkpoints[1], "--image", str(tmp_path / "j.png"), "--boxes",
                 str(tmp_path / "boxes.json"), "--concepts", "a dog"])


# ------------------------------------------------------------------------------------------------- interpolate

def copy(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("weight", [0, 0.3, 0.5, 0.8, 1])
def test_interpolate_by_hand(weight):
    initial, tuned = nano(0), nano(1)
    start, end = copy(initial), copy(tuned)
    assert interpolate(tuned, initial, weight) is tuned
    for key, value in tuned.state_dict().items():
        if weight in (0, 1):
            assert torch.equal(value, (start, end)[weight][key])
        else:
            expected = (1 - weight) * start[key].double() + weight * end[key].double()
            torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=0)
    assert all(torch.equal(value, start[key]) for key, value in initial.state_dict().items())
    assert any(not torch.equal(start[key], end[key]) for key in start)


def test_interpolate_of_models_that_do_not_fit():
    tuned = nano(0)
    before = copy(tuned)
    for initial, what in ((nano(1, patch_size=16), "patch_size"), (nano(1, vision_act="quick_gelu"), "vision_act"),
                          (nano(1, mean=(0, 0, 0)), "mean")):
        with pytest.raises(ValueError, match=f"what differs: {what}$"):
            interpolate(tuned, initial, 0.5)
    other = nano(1)
    other.config.tokenizer = other.config.tokenizer + " "
    with pytest.raises(ValueError, match="what differs: tokenizer$"):
        interpolate(tuned, other, 0.5)
    for weight in (-0.1, 1.5):
        with pytest.raises(ValueError, match=rf"--interpolate {weight:g}: expected 0 \(--init\) to 1 \(--checkpoint\)"):
            interpolate(tuned, nano(1), weight)
    assert all(torch.equal(value, before[key]) for key, value in tuned.state_dict().items())

    other.config.tokenizer = ""                                 # a bare file of weights has none
    softmax = nano(2, logit_bias=None)                          # tuned from it with --loss siglip: the bias stays
    interpolate(tuned, other, 0.5)
    interpolate(tuned, softmax, 0)
    assert torch.equal(tuned.logit_bias, (before["logit_bias"] + other.logit_bias) / 2)
    assert torch.equal(tuned.visual.blocks[0].attn.qkv.weight, softmax.visual.blocks[0].attn.qkv.weight)


# ------------------------------------------------------------------------------------------------- the command line

def evaluate_py(*args):
    return subprocess.run([sys.executable, os.path.join(evaluate.ASSETS.parent, "evaluate.py"), *args],
                          capture_output=True, text=True)


@pytest.mark.parametrize("command", ["", *evaluate.COMMANDS])
def test_each_command_has_its_own_help_and_imports_nothing_for_it(command):
    before = os.times()
    done = evaluate_py(*command.split(), "--help")
    seconds = sum(os.times()[2:4]) - sum(before[2:4])       # of processors, not of the clock
    assert done.returncode == 0 and done.stdout.startswith("usage: evaluate.py") and seconds < 2
    if command in ("", "evaluate"):
        for name, text in {**evaluate.BENCHES, **evaluate.COMMANDS}.items():
            assert f"  {name:16s} {text}\n" in done.stdout
    else:
        assert f"usage: evaluate.py {command}" in done.stdout and "--interpolate" not in done.stdout


def test_a_wrong_flag_costs_two_lines():
    done = evaluate_py("download", "sugarcrepe", "--date-dir", "x")
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "evaluate.py: unrecognized arguments: --date-dir x", "see: evaluate.py --help"]
    done = evaluate_py("compare")
    assert done.stderr.splitlines()[1] == "see: evaluate.py compare --help"


def test_a_scene_before_the_first(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["show", "--checkpoint", "x.pt", "--scene", "-3"])
    assert "evaluate.py show: argument --scene: -3: expected a whole number, 0 or more" in capsys.readouterr().err


@pytest.mark.parametrize("bench", evaluate.BENCHES)
def test_describe_says_protocol_source_and_files(bench, capsys):
    command(["describe", bench, "--data-dir", "here"])
    out = capsys.readouterr().out
    spec = evaluate.TABLE.get(bench, {})
    assert out.startswith(f"{bench}: {evaluate.BENCHES[bench]}\n")
    assert evaluate.READERS[bench].__doc__.split(".")[0].split("\n")[0] in out and len(out) > 250
    assert spec.get("source", "") in out
    for file in spec.get("files", {}).values():
        assert f"here/{file['path']}" in out and file.get("url", "by hand") in out


@pytest.mark.parametrize("argv, says", [
    (["plot", "nope.jsonl"], "evaluate.py: no file nope.jsonl"),
    (["compare", "a.json", "b.json"], "evaluate.py: no file a.json: expected files of --json"),
    (["show", "--checkpoint", "nope.pt"], "evaluate.py: no checkpoint at nope.pt"),
    (["plot", "/"], "evaluate.py: /: Is a directory")])
def test_unknown_files_in_plain_words(argv, says):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(argv)
    assert str(stopped.value).startswith(says) and "Errno" not in says


def test_tables_of_benchmarks_agree():
    assert set(evaluate.READERS) == set(evaluate.BENCHES)
    assert set(evaluate.FUNCTIONS) == set(evaluate.COMMANDS)
    with pytest.raises(ValueError, match="no bench 'sugarcrape': expected some of scenes, "):
        command(["describe", "sugarcrape"])


class Plain:
    """The four members that run needs, and nothing else."""

    def __init__(self, model):
        self.encode_image, self.encode_text = model.encode_image, model.encode_text
        self.tokenize, self.transform = model.tokenize, model.transform


def test_run_takes_any_object_with_four_members():
    model = nano(0).eval()
    results = evaluate.run(Plain(model), ["scenes"], quiet=True)
    assert results == evaluate.run(model, ["scenes"], quiet=True)
    with pytest.raises(TypeError, match="image_rot"):
        evaluate.run(model, ["scenes"], image_rot="x")


def test_run_says_what_it_cannot_mean():
    for benches, options, says in (("scenes", {}, "expected a list of names"), ([], {}, "expected a list of names"),
                                   (["scnes"], {}, "no bench 'scnes'"), (["scenes", "all"], {}, "stands alone"),
                                   (["scenes"], {"dtype": "float16"}, "expected float32 or bfloat16")):
        with pytest.raises(ValueError, match=says):
            evaluate.run(nano(0).eval(), benches, **options)


def test_run_says_what_is_not_there(tmp_path, capsys):
    (tmp_path / "coco" / "val2017").mkdir(parents=True)
    (tmp_path / "sugarcrepe").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "coco" / "val2017" / "1.jpg")
    item = {"filename": "1.jpg", "caption": "a dog", "negative_caption": "a cat"}
    (tmp_path / "sugarcrepe" / "swap_att.json").write_text(json.dumps({"0": item}))
    found = evaluate.run(nano(0).eval(), ["sugarcrepe"], data_dir=str(tmp_path), allow_missing=True)
    assert found["sugarcrepe"].keys() == {"swap_att"}
    assert "not there: sugarcrepe: no " in capsys.readouterr().out


def test_all_leaves_out_what_is_not_as_it_should_be(tmp_path, capsys):
    """--bench all of a table of pairs, which is none of boxes nor of choices."""
    Image.new("RGB", (9, 9)).save(tmp_path / "1.png")
    (tmp_path / "pairs.csv").write_text("image,caption\n1.png,a dog\n")
    options = evaluate.Options(data=str(tmp_path / "pairs.csv"), image_root=str(tmp_path), data_dir=str(tmp_path))
    tasks, missing = evaluate.read(["all"], options)
    assert "retrieval" in tasks and not {"choices", "pointing"} & tasks.keys()
    assert any("needs image, caption and negative" in line for line in missing)


@pytest.mark.parametrize("argv, says", [
    (["--json", "."], "--json .: expected a file"), (["--json", "no/x.json"], "--json no/x.json: expected a file"),
    (["--checkpoint", "{good},"], "no checkpoint at ''"), (["--checkpoint", "{good},gone.pt"], "no checkpoint at gone.pt"),
    (["--bench", "scenes", "--data", "x.csv"], "--data x.csv: none of scenes reads it. As it is no folder, expected one of"),
    (["--bench", "retrieval", "--data", "."], "--data .: none of retrieval reads it. As it is a folder, expected one of"),
    (["--bench", "scenes,all"], "stands alone")])
def test_what_can_be_known_before_it_is_scored(checkpoints, capsys, argv, says):
    argv = [word.format(good=checkpoints[0]) for word in argv]
    if "--checkpoint" not in argv:
        argv += ["--checkpoint", checkpoints[0]]
    with pytest.raises(ValueError) as raised:
        command(argv)
    assert says in str(raised.value) and capsys.readouterr().out == ""


class Padding:
    """A tokenizer that pads its texts to the longest of them, as many do."""
    def tokenize(self, texts):
        longest = max(len(text) for text in texts)
        return torch.tensor([list(text.encode()) + [0] * (longest - len(text)) for text in texts])


def test_what_is_cut_is_said_and_nothing_else(capsys):
    texts = ["a dog", "a very long text of many words"]
    evaluate.report_cut(Padding(), texts, Padding().tokenize(texts))
    model = nano(0)
    length = model.config.context_length
    word = next(w for w in ("a", "q", "z") if model.tokenize.encode([w * length])[0].ids)
    for text in (word * (length - 2), word * (length - 1), "ring " * 3 * length, word * 3 * length):
        is_cut = bool(model.tokenize.encode([text])[0].overflowing)
        evaluate.report_cut(model, [text], model.tokenize([text]))
        assert ("are cut" in capsys.readouterr().out) == is_cut, text[:40]


def test_few_images_beside_many():
    """The interval of a subset of few images is what it is without the other subsets, up to chance; and so is that of
    its macro, and of a mean of it alone."""
    rng = random.Random(0)

    def outcome(subset, right, images):
        margins = torch.tensor(right) * 2.0 - 1
        return Outcome(subset, margins, 0.5, images, images, [0] * len(images))

    many = outcome("many", [rng.randint(0, 1) for _ in range(300)], [f"m{i}" for i in range(300)])
    for right in ([1], [1, 1, 1], [0, 0], [1, 1, 1, 1, 0], [1] * 20):
        few = outcome("few", right, [f"f{i}" for i in range(len(right))])
        alone = evaluate.summarize([few], {"mean": ["few"]})
        beside = evaluate.summarize([few, many], {"mean": ["few"], "both": ["few", "many"]})
        for name in ("few", "few_macro", "mean"):
            for end in ("low", "high"):
                assert 0 <= beside[name][end] <= 1
                assert beside[name][end] == pytest.approx(alone[name][end], abs=0.21 if len({*right}) == 2 else 1e-9), name
        assert 0 <= beside["both"]["low"] <= beside["both"]["accuracy"] <= beside["both"]["high"] <= 1


def test_models_of_one_folder_have_names_of_their_own():
    assert evaluate.distinct(["a", "b"], ["x/a/last.pt", "x/b/last.pt"]) == ["a", "b"]
    assert evaluate.distinct(["a", "a", "b"], ["x/a", "y/a", "b"]) == ["x/a", "y/a", "b"]
    assert evaluate.distinct(["a", "a"], ["x/a", "x/a"]) == ["a", "a"]
    assert evaluate.model_name({"checkpoint": "out/a/last.pt", "interpolate": 0.5}) == "a at 0.5"


def test_run_where_no_image_can_be_read_any_more(tmp_path):
    (tmp_path / "pairs.csv").write_text("image,caption\nnone.png,a dog\n1.png,a cat\n")
    with pytest.raises(ValueError, match="none of 2 images can be read, the first is .*none.png: check --image-root"):
        evaluate.run(nano(0).eval(), ["retrieval"], data=str(tmp_path / "pairs.csv"), image_root=str(tmp_path),
                     allow_missing=True)


def test_check_finds_what_run_would_find(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "1.png")
    (tmp_path / "pairs.csv").write_text("image,caption\nnone.png,a dog\n1.png,a cat\n")
    good = dict(data=str(tmp_path / "pairs.csv"), image_root=str(tmp_path), allow_missing=True)
    evaluate.check(["scenes", "scenes_pointing", "retrieval"], **good)
    for benches, changes, says in (
            (["scnes"], {}, "no bench 'scnes'"), (["sugarcrepe"], {"data_dir": str(tmp_path)}, "download sugarcrepe"),
            (["retrieval"], {"image_root": "elsewhere"}, "^retrieval: none of its images can be read, .*elsewhere.*: check"),
            (["retrieval"], {"allow_missing": False}, "cannot read .*none.png"),
            (["retrieval"], {"image_key": "picture"}, "no images with captions")):
        with pytest.raises(ValueError, match=says):
            evaluate.check(benches, **{**good, **changes})


# ------------------------------------------------------------------------------------------------- other models

FAMILIES = {
    "resnet": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64, "patch_size": None},
    "eva02": {"timm_model_name": "eva02_tiny_patch14_224", "image_size": 224},
    "convnext": {"timm_model_name": "convnext_atto", "image_size": 64},
    "mobileclip": {"timm_model_name": "fastvit_t8", "image_size": 64},
    "pe": {"timm_model_name": "vit_pe_core_tiny_patch16_384", "image_size": 384, "timm_pool": ""},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_open_clip_models_pick_as_open_clip_does(family, tmp_path, capsys):
    """Five families, small and random, through the command line: the same picks item by item."""
    import open_clip
    vision = {"timm_model_pretrained": False, **FAMILIES[family]}
    if family == "resnet":
        vision = FAMILIES[family]
    config = {"embed_dim": 32, "vision_cfg": vision,
              "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}
    (tmp_path / f"tiny-{family}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"tiny-{family}.json")
    torch.manual_seed(0)
    theirs, _, transform = open_clip.create_model_and_transforms(f"tiny-{family}")
    tokenize = open_clip.get_tokenizer(f"tiny-{family}")
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    theirs.eval()
    rng, rows = random.Random(0), []
    words = "a red blue dog cat sits on the table".split()
    for i in range(24):
        Image.frombytes("RGB", (5, 5), rng.randbytes(75)).resize((90, 70)).save(tmp_path / f"{i % 8}.png")
    for i in range(24):
        captions = [" ".join(rng.choices(words, k=6)) for _ in range(1 + rng.randint(1, 2))]
        rows.append({"image": f"{i % 8}.png", "caption": captions[0], "negative": captions[1:]})
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command(["--init", f"open_clip:tiny-{family}/{tmp_path / 'weights.pt'}", "--bench", "choices", "--data",
             str(tmp_path / "own.jsonl"), "--image-root", str(tmp_path), "--device", "cpu", "--json",
             str(tmp_path / "r.json")])
    found = json.loads((tmp_path / "r.json").read_text())["results"]["choices"]["choices"]
    correct = []
    with torch.no_grad():
        for row in rows:
            image = theirs.encode_image(transform(load_image(str(tmp_path / row["image"])))[None], normalize=True)
            texts = theirs.encode_text(tokenize([row["caption"], *row["negative"]]), normalize=True)
            scores = (image @ texts.T)[0].tolist()
            correct.append(int(scores[0] > max(scores[1:])))
    assert found["correct"] == correct and 0 < sum(correct) < 24
    assert found["chance"] == pytest.approx(np.mean([1 / (1 + len(row["negative"])) for row in rows]))


def test_open_clip_models_are_attacked_by_their_own_scale():
    """It is no second weight, which the sha256 of the weights would tell."""
    model = evaluate.OpenCLIP.__new__(evaluate.OpenCLIP)
    torch.nn.Module.__init__(model)
    model.model = nano(0)
    assert hasattr(model, "logit_scale") and model.logit_scale is model.model.logit_scale
    assert not any(name == "logit_scale" for name in model.state_dict())
    del model.model.logit_scale
    assert not hasattr(model, "logit_scale")


def test_open_clip_mistakes():
    with pytest.raises(ValueError, match="--tokenizer x.json: a model of open_clip: has its own: .* leave --tokenizer out"):
        command(["--init", "open_clip:ViT-B-32/openai", "--tokenizer", "x.json"])
    for name, says in (("ViT-B-99/x", "NAME one of"), ("ViT-B-32", "for this NAME, one of openai"),
                       ("ViT-B-32/nonsense", "open_clip:ViT-B-32/nonsense cannot be read")):
        with pytest.raises(ValueError, match=says) as wrong:
            command(["--init", f"open_clip:{name}"])
        assert "\n" not in str(wrong.value)


def test_a_model_that_fails_takes_no_other_with_it(checkpoints, tmp_path, capsys):
    with pytest.raises(ValueError, match="ViT-B-99"):
        command(["--checkpoint", checkpoints[1], "--init", "open_clip:ViT-B-99/x", "--bench", "scenes_pointing", "--json",
                 str(tmp_path / "r.json")])
    assert os.listdir(tmp_path) == ["r.1.json"] and f"wrote {tmp_path / 'r.1.json'}\n" in capsys.readouterr().out
    names, (found,) = evaluate.read_all_results([str(tmp_path / "r.1.json")])
    assert names == ["run1"] and found["scenes_pointing"]["quadrant"]["n"] == 2000


def test_what_any_of_several_models_lacks_is_told_once(checkpoints, capsys, monkeypatch):
    """--bench all, of which the first model has no patch tokens to point with."""
    blind = nano(1).eval()
    encode = blind.encode_image
    blind.encode_image = lambda pixels: encode(pixels)
    monkeypatch.setattr(evaluate, "BENCHES", dict.fromkeys(["scenes_pointing", "mmvp", "folder", "scenes"]))
    monkeypatch.setattr(evaluate, "models_of", lambda *flags: [("a", lambda: blind), ("b", lambda: CLIP.load(checkpoints[1]))])
    command(["--bench", "all", "--data-dir", "nowhere"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not there: ")]
    assert [line.split(": ")[1] for line in lines] == ["scenes_pointing", "mmvp", "folder"]


@pytest.fixture
def own(tmp_path):
    """A table of one's own, with one or two negatives and two subsets."""
    Image.new("RGB", (40, 40), "red").save(tmp_path / "1.png")
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "2.png")
    lines = ["image,caption,negative,negative_2,subset", "1.png,a red ring,a blue ring,,colour",
             "2.png,a blue cross,a red cross,a green cross,colour", "1.png,a cross,a ring,,shape"]
    (tmp_path / "own.csv").write_text("\n".join(lines))
    return tmp_path


def test_an_error_of_one_process_alone_is_said(monkeypatch):
    """Process 0, which says what goes wrong on all, does not know of it."""
    monkeypatch.setattr(evaluate, "RANK", 1)
    monkeypatch.setattr(evaluate.time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit, match="evaluate.py: process 1: --checkpoint none.pt: no checkpoint"):
        evaluate.main(["--checkpoint", "none.pt"])


def test_verify_downloads_by_one_process(tmp_path, monkeypatch):
    """Several would write into one file."""
    monkeypatch.setattr(evaluate, "WORLD", 2)
    monkeypatch.setattr(evaluate, "fetch", lambda *where: pytest.fail("fetched"))
    with pytest.raises(ValueError, match="no .*w.pt: verify fetches it without torchrun; after that give torchrun"):
        evaluate.load_verified("m", {"path": "w.pt", "url": "https://x.org/w.pt"}, str(tmp_path))


def test_a_process_without_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(evaluate, "WORLD", 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(evaluate, "RANK", 3)
    for local in ("3", None):           # a launcher may set none
        monkeypatch.setenv("LOCAL_RANK", local) if local else monkeypatch.delenv("LOCAL_RANK")
        with pytest.raises(ValueError, match="process 3 of this machine has no GPU, torch finds 2: .*--nproc-per-node 2"):
            evaluate.prepare({"device": "cuda", "workers": 0})


def test_too_little_memory_of_a_gpu_is_one_line(monkeypatch):
    def download(benches, data_dir):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")

    monkeypatch.setitem(evaluate.FUNCTIONS, "download", download)
    with pytest.raises(SystemExit, match="^evaluate.py: the GPU has too little memory: give a smaller --batch-size"):
        evaluate.main(["download", "sugarcrepe"])


def test_a_negative_image_is_no_caption(own):
    """The column of training data is a path."""
    (own / "own.csv").write_text("image,caption,negatives,negative_image\n1.png,a dog,a cat,2.png\n")
    tasks, _ = evaluate.read(["choices"], evaluate.Options(data=str(own / "own.csv"), image_root=str(own)))
    assert tasks["choices"][0].texts == [("a dog", "a cat")]


def test_choices_on_ones_own_table(own):
    model = nano(0).eval()
    found = evaluate.run(model, ["choices"], data=str(own / "own.csv"), image_root=str(own), quiet=True)["choices"]
    assert list(found) == ["colour", "shape", "macro", "micro"]
    assert found["colour"]["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2) and found["micro"]["n"] == 3
    with torch.no_grad():
        for name, texts in (("1.png", ["a red ring", "a blue ring"]), ("2.png", ["a blue cross", "a red cross",
                                                                                 "a green cross"])):
            image = model.encode_image(model.transform(Image.open(own / name))[None], True)[0]
            scores = (model.encode_text(model.tokenize(texts), True) @ image).tolist()
            assert found["colour"]["correct"][int(name[0]) - 1] == (scores[0] > max(scores[1:]))
    assert found["macro"]["accuracy"] == (found["colour"]["accuracy"] + found["shape"]["accuracy"]) / 2
    assert found["micro"]["accuracy"] == (2 * found["colour"]["accuracy"] + found["shape"]["accuracy"]) / 3


def test_the_chance_is_of_items_that_are_scored(own):
    """Of choices without the row whose image is torn; of text to image among the images that are there."""
    model = nano(0).eval()
    (own / "torn.png").write_bytes(b"torn")
    where = dict(image_root=str(own), data=str(own / "some.csv"), allow_missing=True, quiet=True)
    (own / "some.csv").write_text("image,caption,negative_1,negative_2,negative_3\n1.png,a red dog,a dog\n"
                                  "torn.png,a red ring,a ring,a dog,a cat\n2.png,a red cat,a cat,a ring\n")
    found = evaluate.run(model, ["choices"], **where)["choices"]["choices"]
    assert found["n"] == 2 and found["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    (own / "some.csv").write_text("image,caption\n1.png,a red dog\n1.png,a dog\ntorn.png,a ring\n2.png,a cat\n")
    for pooled in (False, True):
        found = evaluate.run(model, ["retrieval"], pooled=pooled, **where)["retrieval"]
        assert found["t2i_r1"]["n"] == 3 and found["t2i_r1"]["chance"] == pytest.approx(1 / 2)
        assert found["t2i_r5"]["chance"] == found["t2i_r5"]["accuracy"] == 1
        assert found["i2t_r1"]["n"] == 2 and found["i2t_r1"]["chance"] == pytest.approx((2 / 4 + 1 / 4) / 2)


@pytest.mark.parametrize("text, says", [
    ("image,caption\n1.png,a dog", "own.csv: row 1 needs image, caption and negative, and has image, caption"),
    ("image,caption,negative\n1.png,a dog,", "row 1 needs image, caption and negative, and has image, caption$"),
    ("image,caption,negative\n1.png,a dog,['a' 'b']", "own.csv: row 1: expected texts as negative .*is no list in json"),
    ("image,caption,negative\n9.png,a dog,a cat", "cannot read .*9.png"), ("", "no rows"),
    ("image,caption,negative\n1.png,a dog,a cat,more", "own.csv: none of its rows can be read"),
    ("image,caption,negative,subset\n1.png,a dog,a cat,macro", "row 1: the subset macro would be taken for the mean")])
def test_mistakes_in_ones_own_table(own, text, says):
    (own / "own.csv").write_text(text)
    with pytest.raises(ValueError, match=says):
        evaluate.run(nano(0).eval(), ["choices"], data=str(own / "own.csv"), image_root=str(own))
    with pytest.raises(ValueError, match="choices: --data is missing, for example --data mine.csv"):
        evaluate.run(nano(0).eval(), ["choices"])


def test_own_rows_that_cannot_be_read_are_told(own, capsys):
    (own / "own.csv").write_text("image,caption,negative\n1.png,a dog,a cat\n1.png,a dog,a cat,more\n")
    found = evaluate.run(nano(0).eval(), ["choices"], data=str(own / "own.csv"), image_root=str(own), quiet=True)
    assert found["choices"]["choices"]["n"] == 1 and "row 2: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="row 1 needs image, text and negative, and has image, caption, negative$"):
        evaluate.run(nano(0).eval(), ["choices"], data=str(own / "own.csv"), caption_key="text")
    with pytest.raises(ValueError, match="no file .*: --data takes a .csv, .tsv or .jsonl file"):
        evaluate.run(nano(0).eval(), ["choices"], data=str(own / "gone.csv"))


def test_own_rows_of_other_kinds_than_text(own):
    good = {"image": "1.png", "caption": "a dog", "negative": "a cat"}
    for key, wrong in (("image", 5), ("caption", 7), ("caption", ["a", "c"]), ("subset", 3)):
        (own / "own.jsonl").write_text(json.dumps({**good, key: wrong}) + "\n")
        with pytest.raises(ValueError, match=f"row 1 has .* as {key}: expected text"):
            evaluate.run(nano(0).eval(), ["choices"], data=str(own / "own.jsonl"), image_root=str(own))


def test_several_models_in_one_call(checkpoints, own, capsys):
    command(["--checkpoint", ",".join(checkpoints), "--init", checkpoints[1], "--bench", "choices", "--data",
             str(own / "own.csv"), "--image-root", str(own), "--json", str(own / "r.json")])
    out = capsys.readouterr().out
    alone = []
    for number, path in enumerate([*checkpoints, checkpoints[1]], 1):
        file = json.loads((own / f"r.{number}.json").read_text())
        model = CLIP.load(path).eval()
        found = evaluate.run(model, ["choices"], data=str(own / "own.csv"), image_root=str(own), quiet=True)
        assert file["results"] == json.loads(json.dumps(found)) and file["checkpoint"] == path
        alone.append(found["choices"])
    table = out[out.rindex("choices  "):].splitlines()
    assert table[0].split() == ["choices", "macro", "micro"]
    for line, name, found in zip(table[1:], ("run0", "run1", "run1"), alone):
        assert line.split()[:2] == [name, f"{100 * found['macro']['accuracy']:.1f}"]


# ------------------------------------------------------------------------------------------------- pooled

def pooled_plainly(model, picture, texts):
    """Cosines of texts and what they pool, one at a time and in float64."""
    with torch.no_grad():
        tokens = model.encode_image(model.transform(picture.open())[None], True, True)[1][0].double()     # (T, D)
        queries = model.encode_text(model.tokenize(list(texts)), True).double()                           # (K, D)
    scores = []
    for query in queries:
        pooled = torch.zeros(len(query), dtype=torch.float64)
        weights = [math.exp(patch @ query) for patch in tokens]
        for weight, patch in zip(weights, tokens):
            pooled += weight / sum(weights) * patch
        scores.append(float(pooled @ query / pooled.norm()))
    return scores


@pytest.mark.parametrize("world", ["scenes", pytest.param("scenes_large", marks=pytest.mark.slow)])
def test_pooled_scenes_equal_a_plain_loop(world):
    model = nano(0).eval()
    options = evaluate.Options(pooled=True, quiet=True, batch_size=7)
    tasks = list(evaluate.READERS[world](evaluate.Source(world, world, options), n=24, seed=5))
    results = evaluate.score(model, {world: tasks}, options)[world]
    assert all(result["pooled"] for result in results.values())
    for task in tasks:
        if isinstance(task, evaluate.Choices):
            for i, ((picture,), texts) in enumerate(zip(task.images, task.texts)):
                true, false = pooled_plainly(model, picture, texts)
                assert abs(true - false) > 1e-6 and results[task.subset]["correct"][i] == (true > false)
            continue
        scores = [pooled_plainly(model, picture, [text for text, in task.texts]) for picture, in task.images]
        for subset, (way, _) in task.recalls.items():
            rows, positive = torch.tensor(scores), task.positive
            if way == "t2i":
                rows, positive = rows.T, positive.T
            best = positive[range(len(rows)), rows.argmax(1)].int()
            assert results[subset]["correct"] == best.tolist(), subset
    assert {"np_binding", "swap_att", "i2t_r1", "t2i_r1", "single"} <= results.keys()


def test_pooled_own_captions_say_so(tmp_path, capsys):
    """Two images in an item, equal texts that tie, texts that are compared alone, and pictures that are not there; the
    tables, json and comparisons say that the model is pooled."""
    model, other = nano(0), nano(1)
    os.makedirs(tmp_path / "out")
    torch.save(model.checkpoint(), tmp_path / "out" / "last.pt")
    rows = []
    for i in range(6):
        scene = Scenes(6)[i]
        scene["image"].save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": scene["caption"], "negative": Scenes(9)[i + 1]["caption"]})
    rows.append({"image": "0.png", "caption": "a red  ring", "negative": "a red ring"})
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--checkpoint", str(tmp_path / "out" / "last.pt"), "--data", str(tmp_path / "mine.jsonl"),
                 "--image-root", str(tmp_path), "--bench", "choices,retrieval"]
    for name, more in ("plain", []), ("pooled", ["--pooled"]):
        command([*arguments, *more, "--json", str(tmp_path / f"{name}.json")])
        capsys.readouterr()
    command([*arguments, "--pooled"])
    out = capsys.readouterr().out
    assert "choices (pooled)  " in out and "retrieval (pooled)  " in out
    found = json.loads((tmp_path / "pooled.json").read_text())
    assert found["pooled"] and found["results"]["choices"]["choices"]["pooled"] and found["settings"]["pooled"]
    assert found["results"]["choices"]["choices"]["ties"] == 1
    assert "pooled" not in json.loads((tmp_path / "plain.json").read_text())["results"]["choices"]["choices"]
    command(["compare", str(tmp_path / "plain.json"), str(tmp_path / "pooled.json")])
    assert capsys.readouterr().out.startswith("A: out, B: out (pooled)\n")

    first, second = (evaluate.Picture(str(tmp_path / f"{i}.png")) for i in range(2))
    gone = evaluate.Picture("gone.png", missing=True)
    texts = [("a red ring", "a blue cross", "a ring")] * 3
    tasks = [evaluate.Choices("pairs", evaluate.group_score, 1 / 6, [(first, second), (second, first), (first, gone)],
                              [some[:2] for some in texts]),
             evaluate.Choices("texts", evaluate.captions_are_nearest, 1 / 3, [(first,)] * 3, texts, text_only=True)]
    results = [evaluate.score(other.eval(), {"choices": tasks}, evaluate.Options(pooled=pooled))["choices"]
               for pooled in (False, True)]
    assert results[0]["texts"]["correct"] == results[1]["texts"]["correct"]
    assert results[1]["pairs"]["n"] == 2 and "pairs: 1 of 3 items skipped" in capsys.readouterr().out
    scores = np.array([pooled_plainly(other, picture, texts[0][:2]) for picture in (first, second)])
    right = [all((some.argmax(1) == (0, 1)) & (some.argmax(0) == (0, 1))) for some in (scores, scores[::-1])]
    assert results[1]["pairs"]["correct"] == [int(x) for x in right]


def test_pooled_rules_of_one_list_encode_its_images_once(monkeypatch):
    model, seen = nano(0).eval(), []
    pictures = [(evaluate.Picture(f"{i}", (i,), lambda name, i: Scenes(9)[i]["image"]),) * 2 for i in range(9)]
    texts = [("a red ring", "a blue cross")] * 9
    tasks = [evaluate.Choices(name, *rule, pictures, texts) for name, rule in evaluate.PAIRED.items()]
    tasks.append(evaluate.Choices("other", *evaluate.PAIRED["text"], pictures, [("a ring", "a cross")] * 9))
    whole = evaluate.each_image
    monkeypatch.setattr(evaluate, "each_image", lambda *some: seen.append(len(some[1])) or whole(*some))
    found = evaluate.score(model, {"choices": tasks}, evaluate.Options(pooled=True))["choices"]
    assert seen == [18, 18] and {"text", "image", "group", "other"} <= found.keys()


def test_pooled_mistakes():
    model = nano(0).eval()
    for benches, options, says in ((["scenes"], {"attack": 1.0}, "--attack and --pooled exclude each other"),
                                   (["scenes_pointing"], {}, "scenes_pointing: it compares patches, which --pooled")):
        with pytest.raises(ValueError, match=says):
            evaluate.run(model, benches, pooled=True, **options)
    model = Plain(model)
    model.encode_image = lambda pixels: None
    with pytest.raises(ValueError, match="--pooled: this model's encode_image gives no patch tokens"):
        evaluate.run(model, ["scenes"], pooled=True)


# ------------------------------------------------------------------------------------------------- pointing

class Colours:
    """A model whose patch tokens are the patches' mean colours, and whose texts are colours: it points right."""

    def __init__(self, side=4, shortest=False):
        self.side = side
        self.config = argparse.Namespace(resize="shortest" if shortest else "squash")
        self.words = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}

    def transform(self, image):
        if self.config.resize == "shortest":
            image = ImageOps.fit(image, (min(image.size),) * 2)
        return torch.from_numpy(np.asarray(image.resize((8, 8)), dtype=np.float32)).permute(2, 0, 1) / 255

    def tokenize(self, texts):
        return torch.tensor([[list(self.words).index(text.split()[-1])] for text in texts])

    def encode_text(self, tokens):
        return torch.tensor(list(self.words.values())).float()[tokens[:, 0]]

    def encode_image(self, images, normalize=False, return_tokens=False):
        tokens = torch.nn.functional.adaptive_avg_pool2d(images, self.side).flatten(2).transpose(1, 2) + 0.01
        return (tokens.mean(1), tokens) if return_tokens else tokens.mean(1)


def test_pointing_at_colours(tmp_path):
    """A red field at the left, a blue one at the lower right; boxes of the size of the fields, and wrong ones."""
    image = Image.new("RGB", (160, 80), "black")
    image.paste("red", (0, 0, 40, 80))
    image.paste("blue", (120, 40, 160, 80))
    image.save(tmp_path / "1.png")
    content = {"1.png": [["red", 0, 0, 40, 80], ["blue", 120, 40, 40, 40], ["green", 0, 0, 160, 80]],
               "2.png": [["red", 120, 40, 40, 40], ["blue", 0, 0, 40, 40], ["blue", 121, 41, 5, 4]]}
    image.save(tmp_path / "2.png")
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    options = dict(data=str(tmp_path / "boxes.json"), image_root=str(tmp_path), quiet=True)
    found = evaluate.run(Colours(), ["pointing"], **options)["pointing"]
    assert found["coco"]["correct"] == [1, 1, 1, 0, 0]
    # patches inside: 4 of 16 red, 2 blue, all; then 2 red; 2 for one box of blue, and 1 for the small one
    assert found["coco"]["chance"] == pytest.approx((4 / 16 + 2 / 16 + 1 + 2 / 16 + 3 / 16) / 5)
    assert found["coco_macro"]["accuracy"] == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    assert found["coco"]["items"][0].endswith("1.png | a photo of a red")

    # a model that sees the square in the middle sees neither field; its boxes are moved to where it looks
    middle = evaluate.patches_inside([(60, 0, 40, 80)], evaluate.seen_box(Colours(shortest=True), (160, 80)), 4)
    assert middle.view(4, 4).tolist() == [[False, True, True, False]] * 4

    instances = {"images": [{"id": 7, "file_name": "1.png"}], "categories": [{"id": 3, "name": "blue"}],
                 "annotations": [{"image_id": 7, "category_id": 3, "bbox": [120, 40, 40, 40], "iscrowd": 0}]}
    os.makedirs(tmp_path / "coco" / "annotations")
    (tmp_path / "coco" / "annotations" / "instances_val2017.json").write_text(json.dumps(instances))
    official = evaluate.run(Colours(), ["pointing"], data_dir=str(tmp_path), image_root=str(tmp_path), quiet=True)
    assert official["pointing"]["coco"]["correct"] == [1]


@pytest.mark.parametrize("bench, world, asked, grid", [
    ("scenes_pointing", "small", 2, 2), ("scenes_crowded_pointing", "crowded", 4, 2), ("scenes_many_pointing", "many", 6, 3)])
def test_pointing_in_scenes_equals_a_plain_loop(bench, world, asked, grid):
    model = nano(0, image_size=16 * grid).eval()
    found = evaluate.run(model, [bench], quiet=True)[bench]["cell" if grid == 3 else "quadrant"]
    data, correct = Scenes(1000, "val", 1, 16 * grid, world=world), []
    for i in range(20):
        objects, cells, _ = data.objects(i)
        with torch.no_grad():
            tokens = model.encode_image(model.transform(data[i]["image"])[None], True, True)[1][0]
            for (colour, shape), cell in zip(objects, cells):
                text = model.encode_text(model.tokenize([f"a {colour} {shape}"]), True)[0]
                y, x = divmod(int((tokens @ text).argmax()), math.isqrt(len(tokens)))
                correct.append(int((x // 2, y // 2) == (cell % grid, cell // grid)))
    assert len(correct) == 20 * asked and found["correct"][:20 * asked] == correct
    assert found["n"] == 1000 * asked and found["chance"] == pytest.approx(1 / grid**2)
    assert len(set(found["image"])) == 1000


def test_pointing_mistakes(tmp_path):
    plain = Plain(nano(0))
    plain.encode_image = lambda pixels: None
    with pytest.raises(ValueError, match="scenes_pointing: this model's encode_image gives no patch tokens"):
        evaluate.run(plain, ["scenes_pointing"])
    with pytest.raises(ValueError, match="pointing: the model has no config.resize: expected 'shortest'"):
        evaluate.run(Plain(nano(0)), ["scenes_pointing"])
    (tmp_path / "five.json").write_text('{"1.png": [["a", 1, 2, 3, 4, 5]]}')
    with pytest.raises(ValueError, match="five.json: expected COCO's instances, or .*a box is ..a., 1, 2, 3, 4, 5"):
        evaluate.read_boxes(tmp_path / "five.json")
    for text in ("3", "[]", '{"1.png": [["a", 1, 2, 3]]}', '{"1.png": [["a", 1, 2, 3, null]]}', '{"annotations": [{}]}', "{"):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(ValueError, match="b.json: expected COCO's instances, or|coco"):
            evaluate.run(Colours(), ["pointing"], data=str(tmp_path / "b.json"), data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="instances_val2017.json; get it: python evaluate.py download pointing"):
        evaluate.run(Colours(), ["pointing"], data_dir=str(tmp_path))


def test_files_with_fewer_rows_are_scored_if_that_is_allowed(tmp_path, capsys, monkeypatch):
    model = nano(0).eval()
    for name in ("1.jpg", "2.jpg"):
        Image.new("RGB", (40, 40), "red" if name == "1.jpg" else "blue").save(tmp_path / name)
    rows = {str(i): {"filename": f"{i % 3 + 1}.jpg", "caption": f"a red ring {'and' * i}", "negative_caption": "a blue ring"}
            for i in range(9)}
    os.makedirs(tmp_path / "sugarcrepe")
    (tmp_path / "sugarcrepe" / "swap_obj.json").write_text(json.dumps(rows))
    options = dict(data_dir=str(tmp_path), image_root=str(tmp_path))
    with pytest.raises(ValueError, match="sugarcrepe"):
        evaluate.run(model, ["sugarcrepe"], **options)
    counted = {"texts": 0, "images": 0}
    for name, key in ("encode_image", "images"), ("encode_text", "texts"):
        def counting(x, *rest, function=getattr(model, name), key=key):
            counted[key] += len(x)
            return function(x, *rest)
        monkeypatch.setattr(model, name, counting)
    found = evaluate.run(model, ["sugarcrepe"], allow_missing=True, **options)["sugarcrepe"]
    assert list(found) == ["swap_obj"] and found["swap_obj"]["n"] == 6
    assert counted == {"images": 2, "texts": 7}     # 3.jpg is missing: its items cost nothing
    out = capsys.readouterr().out
    assert "partial: 9 of the official 245 rows" in out and "swap_obj: 3 of 9 items skipped" in out


# ------------------------------------------------------------------------------------------------- verify

def test_verify_tells_a_wrong_figure(checkpoints, tmp_path, capsys):
    """A made registry: a local checkpoint with one figure that is wrong, weights that are not there, a bench without
    files."""
    found = evaluate.run(CLIP.load(checkpoints[1]).eval(), ["scenes_pointing"], quiet=True)["scenes_pointing"]["quadrant"]
    right = round(100 * found["accuracy"] + 0.2, 1)
    registry = {
        "good": {"checkpoint": checkpoints[1], "figures": {"scenes_pointing": {"quadrant": right, "gone": 3.0}}},
        "wrong": {"checkpoint": checkpoints[1], "figures": {"scenes_pointing": {"quadrant": right + 1}}},
        "absent": {"init": str(tmp_path / "no"), "figures": {"scenes_pointing": {"quadrant": 1}}},
        "by hand": {"path": "x.pt", "by_hand": "see y", "figures": {"scenes_pointing": {"quadrant": 1}}},
        "no files": {"checkpoint": checkpoints[1], "figures": {"sugarcrepe": {"swap_obj": 50.0}}}}
    (tmp_path / "registry.json").write_text(json.dumps(registry))
    command(["verify", "--registry", str(tmp_path / "registry.json"), "--data-dir", str(tmp_path), "--device", "cpu"])
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines() if line.startswith("scenes_pointing quadrant")]
    ours = f"{100 * found['accuracy']:.1f}"
    assert lines[0][2:4] == [ours, f"{right:.1f}"] and len(lines[0]) == 5
    assert lines[1][2:4] == [ours, f"{right + 1:.1f}"] and lines[1][5:] == ["more", "than", "0.3"]
    assert "absent: not verified, " in out and "by hand: not verified, no " in out and "see y" in out
    assert "no files: not verified, none of the files of sugarcrepe are there" in out
    assert out.endswith("\n1 of 2 figures are within 0.3 points\n")


def test_verify_says_what_it_lacks(tmp_path, capsys):
    registry = {"no files": {"path": "x.pt", "figures": {"sugarcrepe": {"add": 1}, "winoground": {"text": 1}}}}
    (tmp_path / "registry.json").write_text(json.dumps(registry))
    command(["verify", "--registry", str(tmp_path / "registry.json"), "--data-dir", str(tmp_path)])
    assert capsys.readouterr().out.strip().splitlines() == [
        "no files: not verified, none of the files of sugarcrepe, winoground are there", "",
        "0 of 0 figures are within 0.3 points"]
    registry = {"of mine": {"path": "x.pt", "figures": {"scenes_pointing": {"quadrant": 1}, "sugarcrepe": {"add": 1}}},
                "of others": {"path": "y.pt", "figures": {"sugarcrepe": {"add": 1}}}}
    (tmp_path / "registry.json").write_text(json.dumps(registry))
    command(["verify", "--registry", str(tmp_path / "registry.json"), "--data-dir", str(tmp_path), "--bench",
             "scenes_pointing", "--tolerance", "2"])
    assert capsys.readouterr().out.strip().splitlines() == [
        f"of mine: not verified, no {tmp_path / 'x.pt'}: put the weights there", "", "0 of 0 figures are within 2 points"]


@pytest.mark.parametrize("entry, says", [
    ({"figures": {"scenes": {"a": "b"}}}, "a figure is no number"), ({"figures": {"scnes": {"a": 1}}}, "no bench 'scnes'"),
    ({}, r"\('figures'\)"), ({"figures": {"scenes": 3}}, "object has no"), (3, "not subscriptable"),
    *[({key: 5, "figures": {"scenes": {"a": 1}}}, f"{key} is no text") for key in ("init", "checkpoint", "path", "url")]])
def test_verify_of_a_registry_that_is_none(tmp_path, entry, says):
    (tmp_path / "bad.json").write_text(json.dumps({"x": entry}))
    with pytest.raises(ValueError, match="bad.json: expected {NAME: .*" + says):
        command(["verify", "--registry", str(tmp_path / "bad.json")])
    with pytest.raises(ValueError, match="no bench 'scnes': expected some of scenes, "):
        command(["verify", "--bench", "scnes"])


def test_verify_scores_what_evaluate_scores(tmp_path, capsys, monkeypatch):
    """Scenes are drawn at the size of the model; one without patch tokens, and one whose images cannot be read, do not
    keep the others from being verified."""
    model = nano(0, image_size=64, patch_size=16).eval()
    torch.save(model.checkpoint(), tmp_path / "last.pt")
    found = evaluate.run(model, ["scenes_pointing"], quiet=True)["scenes_pointing"]["quadrant"]
    figures = {"scenes_pointing": {"quadrant": 100 * found["accuracy"], "gone": 3.0}}
    registry = {"blind": {"init": "blind", "figures": figures},
                "torn": {"init": "torn", "figures": figures},
                "good": {"checkpoint": str(tmp_path / "last.pt"), "figures": figures}}
    (tmp_path / "registry.json").write_text(json.dumps(registry))
    blind, torn = nano(1), nano(2)
    blind.encode_image = lambda pixels: None

    def unreadable(image):
        if image.size != (64, 64):      # which asks for the size of the model
            raise OSError("torn")
        return torn.known(image)

    torn.known, torn.transform = torn.transform, unreadable
    monkeypatch.setattr(evaluate, "load_source", lambda source, name: {"blind": blind, "torn": torn}[source])
    command(["verify", "--registry", str(tmp_path / "registry.json"), "--tolerance", "0", "--workers", "0"])
    out = capsys.readouterr().out
    assert "blind: not verified, scenes_pointing: this model's encode_image gives no patch tokens" in out
    assert "torn: not verified, cannot read small val 1 0 (torn)" in out
    assert "\nscenes_pointing gone              not scored: its files are not there, or it is no subset\n" in out
    assert out.endswith("\n1 of 1 figures are within 0 points\n")


def test_the_registry_has_published_figures():
    registry = evaluate.read_registry(None)
    assert registry["SigLIP B/16"]["figures"]["sugarcrepe"]["swap_obj"] == 59.6
    assert all(entry["figures"]["sugarcrepe"] and not {"source"} & set(entry["figures"]["sugarcrepe"])
               for entry in registry.values())

