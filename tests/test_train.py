"""The scripts as a user runs them: training, torchrun, resuming, evaluation, mistakes."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from model import CLIP

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SMALL = ["--batch-size", "32", "--steps", "12", "--log-every", "1", "--eval-every", "0", "--warmup", "2",
         "--lr", "3e-4"]


def run(script, *args, processes=1, check=True):
    launcher = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run([*launcher, script, *map(str, args)], cwd=ROOT, env=ENV, capture_output=True, text=True,
                          timeout=300)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def curve(folder, key="loss"):
    with open(folder / "log.jsonl") as f:
        return [row[key] for row in map(json.loads, f) if key in row]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One uninterrupted run on one process, with which the others are compared."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run("train.py", *SMALL, "--out-dir", folder).stdout


def weights(folder):
    return torch.load(folder / "last.pt", weights_only=True)["model"]


# ------------------------------------------------------------------------------------------------- the main job

def test_main_command_writes_what_it_says(whole):
    folder, stdout = whole
    for text in ("np_binding", "swap_att", "replace_att", "replace_obj", "i2t_r1", "t2i_r1", "chance", "95 % interval",
                 "next: python train.py --npc-weight 0 --xac-weight 0"):
        assert text in stdout
    losses = curve(folder)
    assert len(losses) == 12 and losses[-1] < losses[0]
    row = [r for r in map(json.loads, open(folder / "log.jsonl")) if r.get("step") == 12][0]
    assert row["loss"] == pytest.approx(row["contrastive"] + row["npc"] + 0.01 * row["xac"], rel=1e-5)


def test_checkpoint_alone_gives_the_same_table(whole, tmp_path):
    folder, stdout = whole
    again = run("evaluate.py", "--checkpoint", folder / "last.pt", "--bench", "scenes", "--json", tmp_path / "r.json")
    table = [line for line in stdout.splitlines() if ".." in line]
    assert len(table) == 6 and all(line in again.stdout for line in table)
    results = json.load(open(tmp_path / "r.json"))["results"]["scenes"]
    assert list(results) == ["np_binding", "swap_att", "replace_att", "replace_obj", "i2t_r1", "t2i_r1"]
    for r in results.values():
        assert r["n"] == 1000 == len(r["correct"]) and r["accuracy"] == sum(r["correct"]) / 1000
        assert 0 <= r["low"] <= r["accuracy"] <= r["high"] <= 1


def test_baseline_computes_no_concept_loss(tmp_path):
    run("train.py", *SMALL, "--npc-weight", "0", "--xac-weight", "0", "--steps", "3", "--out-dir", tmp_path)
    row = [r for r in map(json.loads, open(tmp_path / "log.jsonl")) if r.get("step") == 3][0]
    assert "npc" not in row and "xac" not in row and row["loss"] == row["contrastive"]


# ------------------------------------------------------------------------------------------------- exactness

EXACT = ["--dtype", "float64", "--steps", "6", "--batch-size", "30"]


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """Runs in float64 on one process at once, by their extra flags."""
    runs = {}

    def get(*extra):
        if extra not in runs:
            runs[extra] = tmp_path_factory.mktemp("exact")
            run("train.py", *SMALL, *EXACT, *extra, "--out-dir", runs[extra])
        return runs[extra]
    return get


@pytest.mark.parametrize("processes, accum, extra", [(1, 4, ()), (2, 1, ()), (2, 2, ("--no-dedupe",)),
                                                     (3, 2, ("--loss", "clip"))])
def test_processes_and_accumulation_change_nothing(exact, tmp_path, processes, accum, extra):
    run("train.py", *SMALL, *EXACT, *extra, "--accum", accum, "--out-dir", tmp_path, processes=processes)
    for term in ("loss", "contrastive", "npc", "xac", "grad_norm", "logit_scale"):
        assert curve(tmp_path, term) == pytest.approx(curve(exact(*extra), term), rel=1e-9)
    ours, theirs = weights(tmp_path), weights(exact(*extra))
    for name in ours:       # after six steps of AdamW: any gradient that differed would show
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-8, msg=name)


def test_interrupted_and_resumed_is_bit_equal(whole, tmp_path):
    process = subprocess.Popen([sys.executable, "train.py", *SMALL, "--out-dir", str(tmp_path)], cwd=ROOT, env=ENV,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (tmp_path / "log.jsonl").exists() or not curve(tmp_path):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "interrupted: saved step" in output
    steps = len(curve(tmp_path))
    assert 1 <= steps < 12
    run("train.py", *SMALL, "--out-dir", tmp_path, "--resume", "auto")
    assert curve(tmp_path) == curve(whole[0])
    a, b = weights(whole[0]), weights(tmp_path)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_bfloat16_stays_near_float32(whole, tmp_path):
    run("train.py", *SMALL, "--dtype", "bfloat16", "--out-dir", tmp_path)
    assert curve(tmp_path) == pytest.approx(curve(whole[0]), rel=0.05)
    assert all(p.dtype == torch.float32 for p in CLIP.load(tmp_path / "last.pt").parameters())


# ------------------------------------------------------------------------------------------------- real pairs

def pairs(folder, good, bad):
    for i in range(good):
        Image.new("RGB", (40, 36), (7 * i % 256, 90, 255 - i)).save(folder / f"{i}.png")
    with open(folder / "pairs.csv", "w") as f:
        f.write("image,caption\n" + "".join(f"{i}.png,a picture of a wall number {i}\n" for i in range(good))
                + "".join(f"missing{i}.png,a wall\n" for i in range(bad)))
    return ["--data", folder / "pairs.csv", "--image-root", folder, "--epochs", "1", "--batch-size", "16"]


def test_pairs_with_workers_and_a_bad_row(tmp_path):
    args = [*pairs(tmp_path, 64, 1), "--max-bad", "0.05"]
    done = run("train.py", *args, "--workers", "2", "--out-dir", tmp_path / "out", "--val-data",
               tmp_path / "pairs.csv")
    assert "skipped missing0.png (row 65)" in done.stdout + done.stderr and "1 rows were skipped" in done.stdout
    assert "t2i_r1" in done.stdout
    done = run("evaluate.py", "--checkpoint", tmp_path / "out" / "last.pt", "--bench", "retrieval", "--data",
               tmp_path / "pairs.csv", "--image-root", tmp_path, check=False)
    assert done.returncode == 1 and "missing0.png" in done.stderr and "--allow-missing" in done.stderr
    done = run("evaluate.py", "--checkpoint", tmp_path / "out" / "last.pt", "--bench", "retrieval", "--data",
               tmp_path / "pairs.csv", "--image-root", tmp_path, "--allow-missing")
    assert "skipped 1 of 65 images" in done.stdout


def test_too_many_bad_rows_end_training(tmp_path):
    done = run("train.py", *pairs(tmp_path, 20, 20), "--out-dir", tmp_path / "out", check=False)
    assert done.returncode == 1 and "rows could not be read, more than --max-bad 0.01" in done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("script, args, status, says", [
    ("train.py", ["--model", "ViT-B-31"], 2, "no model 'ViT-B-31': expected one of nano, ViT-B-32"),
    ("train.py", ["--batch-size", "0"], 2, "--batch-size 0: expected more than 0"),
    ("train.py", ["--data", "none.csv"], 1, "no file none.csv"),
    ("train.py", ["--data", "README.md"], 1, "expected a .csv, .tsv or .jsonl"),
    ("train.py", ["--resume", "none.pt"], 1, "no checkpoint at none.pt"),
    ("train.py", ["--tokenizer", "none.json"], 1, "none.json"),
    ("train.py", ["--steps", "40", "--lr", "1e12", "--warmup", "1"], 1, "last good checkpoint"),
    ("evaluate.py", [], 2, "give what to evaluate"),
    ("evaluate.py", ["--checkpoint", "x.pt", "--bench", "sugarcrape"], 2, "no bench 'sugarcrape': expected one of"),
    ("evaluate.py", ["--checkpoint", "README.md"], 1, "README.md holds no readable weights"),
])
def test_mistakes_get_one_line(tmp_path, script, args, status, says):
    extra = ["--out-dir", tmp_path] if script == "train.py" else []
    done = run(script, *args, *extra, check=False)
    message = [line for line in done.stderr.splitlines() if says in line]
    assert done.returncode == status and message and "Traceback" not in done.stderr, done.stderr


def test_checkpoint_of_another_architecture(whole, tmp_path):
    done = run("train.py", "--model", "ViT-B-32", "--resume", whole[0] / "last.pt", "--out-dir", tmp_path, check=False)
    assert done.returncode == 1 and "holds a nano, but --model is ViT-B-32" in done.stderr


def test_batch_larger_than_the_data(tmp_path):
    done = run("train.py", *pairs(tmp_path, 8, 0), "--out-dir", tmp_path / "out", check=False)
    assert done.returncode == 1 and "--batch-size 16 is more than the 8 rows" in done.stderr
