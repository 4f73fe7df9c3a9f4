"""The scripts as a user runs them: training, torchrun, resuming, evaluation, mistakes."""
import argparse
import ast
import contextlib
import dataclasses
import json
import math
import os
import pty
import random
import resource
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

import data
from losses import METHODS, TERMS
from model import CLIP, CLIPConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SMALL = ["--batch-size", "32", "--steps", "12", "--log-every", "1", "--eval-every", "0", "--warmup", "2",
         "--lr", "3e-4", "--bench", "none"]
SCENES = ["--bench", "scenes"]      # evaluation takes longer than these few steps


class Forked:
    """A script that runs in a fork of this process, which has imported torch already: seconds are saved each time.

    It has the part of subprocess.Popen's interface that is used here. It leads a process group of its own.
    """
    def __init__(self, script, *args, folder, environment=None, cwd=ROOT, prepare=None):
        self.returncode = None
        self.prepare = prepare      # called in the child, before the script
        self.files = [tempfile.mkstemp(dir=folder)[1] for _ in range(2)]
        self.pid = os.fork()
        if self.pid == 0:
            self.become(script, [str(arg) for arg in args], {**ENV, **(environment or {})}, cwd)

    def become(self, script, args, environment, cwd):
        """The child; never returns."""
        status = 1
        try:
            os.setsid()
            for number, path in ((1, self.files[0]), (2, self.files[1])):
                os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
            sys.stdout = open(1, "w", closefd=False)
            sys.stderr = open(2, "w", closefd=False)
            os.environ.clear()
            os.environ.update(environment)
            sys.argv = [script, *args]
            sys.path[0] = ROOT
            os.chdir(cwd)
            # torch makes its pool of threads anew after a fork, at the first call of this; threads of a backward pass
            # that call it all at once can meet no pool
            torch.set_num_threads(torch.get_num_threads())
            if self.prepare:
                self.prepare()
            runpy.run_path(os.path.join(ROOT, script), run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout=300):
        end = time.time() + timeout
        while self.poll() is None:
            if time.time() > end:
                self.kill()
                raise AssertionError(f"still running after {timeout} s:\n{self.stdout}\n{self.stderr}")
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    @property
    def stdout(self):
        return open(self.files[0]).read()

    @property
    def stderr(self):
        return open(self.files[1]).read()


@pytest.fixture(scope="session", autouse=True)
def outputs(tmp_path_factory):
    global OUTPUTS
    OUTPUTS = tmp_path_factory.mktemp("outputs")


def start(script, *args, processes=1, **environment):
    """A running script, or a list of one for each process, as torchrun would start them."""
    if processes == 1:
        return Forked(script, *args, folder=OUTPUTS, environment=environment)
    return start_each([((script, *args), ROOT)] * processes, **environment)


def start_each(commands, **environment):
    """A process for each (script and arguments, folder to start in), which find each other."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = []
    for rank, (command, cwd) in enumerate(commands):
        places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(commands)),
                  "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks.append(Forked(*command, folder=OUTPUTS, environment={**places, **environment}, cwd=cwd))
    return ranks


def finish(processes):
    """Wait for all; one that died would leave the others waiting, so they are ended, as torchrun does."""
    while any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes):
            time.sleep(1)
            for process in processes:
                if process.poll() is None:
                    process.kill()
        time.sleep(0.02)
    return processes


def run(script, *args, processes=1, check=True, **environment):
    """Run it to its end. Of several processes the first is returned."""
    if processes == 1:
        done = start(script, *args, **environment)
        done.wait()
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done
    ranks = finish(start(script, *args, processes=processes, **environment))
    for done in ranks:
        assert not check or done.returncode == 0, done.stdout + done.stderr
    return ranks[0]


def torchrun(*args):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", *map(str, args)],
                            cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def children_of(pid):
    return [int(x) for x in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()]


def function_of_train(name, **names):
    """A function of train.py by itself, which as a script cannot be imported; names: what it reads."""
    source = open(os.path.join(ROOT, "train.py")).read()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            exec(compile(ast.Module([node], []), "train.py", "exec"), names)
            return names[name]
    raise AssertionError(f"train.py has no function {name}")


def curve(folder, key="loss"):
    with open(folder / "log.jsonl") as f:
        return [row[key] for row in map(json.loads, f) if key in row]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One uninterrupted run on one process, with which the others are compared."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run("train.py", *SMALL, *SCENES, "--out-dir", folder).stdout


def weights(folder):
    return torch.load(folder / "last.pt", weights_only=True)["model"]


# ------------------------------------------------------------------------------------------------- the main job

def test_main_command_writes_what_it_says(whole):
    folder, stdout = whole
    for text in ("np_binding", "swap_att", "replace_att", "replace_obj", "i2t_r1", "t2i_r1", "chance", "95 % interval",
                 "next: python train.py --method siglip"):
        assert text in stdout
    losses = curve(folder)
    assert len(losses) == 12 and losses[-1] < losses[0]
    row = [r for r in map(json.loads, open(folder / "log.jsonl")) if r.get("step") == 12][0]
    assert row["loss"] == pytest.approx(row["contrastive"] + row["npc"] + 0.01 * row["xac"], rel=1e-5)


def test_checkpoint_alone_gives_the_same_table(whole, tmp_path):
    folder, stdout = whole
    again = run("evaluate.py", "--checkpoint", folder / "last.pt", "--bench", "scenes", "--json", tmp_path / "r.json")
    table = [line for line in stdout.splitlines() if ".." in line]
    names = ["np_binding", "swap_att", "replace_att", "replace_obj", "swap_obj", "add", "i2t_r1", "t2i_r1",
             "seen_np_binding", "single", "single_colour", "single_shape"]
    assert len(table) == len(names) and all(line in again.stdout for line in table)
    results = json.load(open(tmp_path / "r.json"))["results"]["scenes"]
    assert sorted(results) == sorted(names)
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
                                                     pytest.param(3, 2, ("--loss", "clip"), marks=pytest.mark.slow)])
def test_processes_and_accumulation_change_nothing(exact, tmp_path, processes, accum, extra):
    run("train.py", *SMALL, *EXACT, *extra, "--accum", accum, "--out-dir", tmp_path, processes=processes)
    for term in ("loss", "contrastive", "npc", "xac", "grad_norm", "logit_scale"):
        assert curve(tmp_path, term) == pytest.approx(curve(exact(*extra), term), rel=1e-9)
    ours, theirs = weights(tmp_path), weights(exact(*extra))
    for name in ours:       # after six steps of AdamW: any gradient that differed would show
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-8, msg=name)


def test_interrupted_and_resumed_is_bit_equal(whole, tmp_path):
    process = start("train.py", *SMALL, "--out-dir", tmp_path)
    while not (tmp_path / "log.jsonl").exists() or not curve(tmp_path):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0 and "interrupted: saved step" in process.stdout
    steps = len(curve(tmp_path))
    assert 1 <= steps < 12
    run("train.py", *SMALL, "--out-dir", tmp_path, "--resume", "auto")
    assert curve(tmp_path) == curve(whole[0])
    a, b = weights(whole[0]), weights(tmp_path)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_bfloat16_stays_near_float32(tmp_path):
    """Over 50 steps every loss within 5 %, and the average difference below 1 %."""
    run("train.py", *SMALL, "--steps", 50, "--out-dir", tmp_path / "full")
    run("train.py", *SMALL, "--steps", 50, "--dtype", "bfloat16", "--out-dir", tmp_path)
    full, half = curve(tmp_path / "full"), curve(tmp_path)
    assert len(full) == 50 and half == pytest.approx(full, rel=0.05)
    assert sum(abs(a / b - 1) for a, b in zip(half, full)) / 50 < 0.01
    assert all(p.dtype == torch.float32 for p in CLIP.load(tmp_path / "last.pt").parameters())


def test_weights_in_bfloat16_lose_small_updates(tmp_path):
    """With a rate of 1e-5, as the released code trains, Adam's first step is at most 1e-5 (and the decay 1e-6 w).
    That is less than half a step of bfloat16 above 2**-8: such weights stay, and smaller ones move."""
    base = ["--batch-size", 32, "--bench", "none", "--dtype", "pure-bfloat16", "--warmup", 0]
    run("train.py", *base, "--steps", 1, "--lr", 1e-12, "--out-dir", tmp_path / "before")
    run("train.py", *base, "--steps", 1, "--lr", 1e-5, "--out-dir", tmp_path / "after")
    before = CLIP.load(tmp_path / "before" / "last.pt").state_dict()
    after = torch.load(tmp_path / "after" / "last.pt", weights_only=True)["model"]
    moved = {"small": 0, "large": 0}
    for name, weight in after.items():
        assert weight.dtype == torch.bfloat16, name
        old = before[name].float()
        is_other = weight.float() != old
        moved["large"] += int(is_other[old.abs() > 2**-8].sum())
        moved["small"] += int(is_other[(old.abs() > 0) & (old.abs() < 2**-9)].sum())
    assert moved["large"] == 0
    assert moved["small"] > 10_000


# ------------------------------------------------------------------------------------------------- every method

METHOD_RUNS = [("tecoa",), ("gift", "--loss", "clip"), ("clic", "--loss", "clip"),
               ("ce_clip",), ("degla", "--loss", "clip"), ("con_clip", "--relations", "1"),
               ("triplet_clip", "--loss", "clip"), ("c2lip", "--concept-features", "span", "--distill-weight", "0.1"),
               ("siglip", "--caption-xac-weight", "0.5", "--paraphrase-weight", "0.5", "--relations", "0.5"),
               ("fsc_clip",), ("fsc_clip", "--loss", "clip", "--npc-weight", "1", "--concept-features", "span"),
               ("cs_clip", "--relations", "0.5")]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHOD_RUNS, ids=" ".join)
def test_methods_do_not_depend_on_processes_and_parts(exact, tmp_path, method):
    extra = ("--method", *method)
    run("train.py", *SMALL, *EXACT, *extra, "--accum", 2, "--out-dir", tmp_path, processes=2)
    whole = [r for r in map(json.loads, open(exact(*extra) / "log.jsonl")) if "loss" in r]
    parts = [r for r in map(json.loads, open(tmp_path / "log.jsonl")) if "loss" in r]
    assert len(whole) == len(parts) == 6
    terms = {"ce_clip": 3, "degla": 4, "con_clip": 1, "triplet_clip": 1, "c2lip": 4, "siglip": 3, "fsc_clip": 4 if "clip" in method else 3,
             "cs_clip": 2, "tecoa": 1, "gift": 4, "clic": 4}[method[0]]
    names = [k for k in list(whole[-1]) if k == "contrastive" or k in TERMS]
    assert len(names) == terms
    for a, b in zip(whole, parts):
        for name in {*names, "loss", "grad_norm"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-8, abs=1e-12), name
    ours, theirs = weights(tmp_path), weights(exact(*extra))
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-7) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tecoa", "gift", "clic"])
def test_methods_resume_bit_equal(tmp_path, method):
    """From an odd step: what comes next is a batch of single images for clic."""
    args = [*SMALL, "--method", method, "--steps", 8, "--save-every", 5, "--keep", 2]
    run("train.py", *args, "--out-dir", tmp_path / "a")
    run("train.py", *args, "--out-dir", tmp_path / "b", "--resume", tmp_path / "a" / "step_00000005.pt")
    assert curve(tmp_path / "b") == curve(tmp_path / "a")[5:]
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method, terms", [
    ("tecoa", {"contrastive"}), ("gift", {"contrastive", "cd", "ita", "awc"}),
    ("clic", {"contrastive", "pairs", "sneg", "uni"})])
def test_methods_beside_compositionality_on_pairs(tmp_path, method, terms):
    """Photographs of both shapes, some of equal captions, some unreadable; they learn, and freeze what they say."""
    flags = varied_pairs(tmp_path)[:6]
    extra = ["--replay", tmp_path / "pairs.csv"] if method == "gift" else []
    run("train.py", *flags, *SMALL, *extra, "--preset", "nano", "--init", "scratch", "--method", method, "--steps", 6,
        "--save-every", 1, "--keep", 6, "--out-dir", tmp_path / "out")
    rows = [r for r in map(json.loads, open(tmp_path / "out" / "log.jsonl")) if "loss" in r]
    assert len(rows) == 6 and terms <= rows[-1].keys()
    first, last = (torch.load(tmp_path / "out" / f"step_0000000{n}.pt")["model"] for n in (1, 6))
    moved = {name.split(".")[0] for name in first if not torch.equal(first[name], last[name])}
    frozen = {"tecoa": "text", "clic": "visual"}.get(method)
    assert moved >= {"visual", "text"} - {frozen} and frozen not in moved


@pytest.mark.parametrize("processes, accum", [(1, 2), (2, 1)])
def test_a_loss_that_does_not_see_the_scale_or_the_bias(tmp_path, processes, accum):
    """GIFT's distillation alone has no bias: its gradient is 0, not missing, in parts and over processes."""
    run("train.py", *SMALL, "--steps", 2, "--method", "gift", "--ita-weight", 0, "--accum", accum, "--out-dir", tmp_path,
        processes=processes)
    assert len(curve(tmp_path)) == 2


@pytest.mark.parametrize("method", ["siglip", "gift"])
def test_scenes_are_drawn_at_the_models_size(tmp_path, method):
    """As evaluate.py draws them, and not drawn small and enlarged."""
    def prepare():
        render = data.Scenes.render

        def recorded(scenes, *args):
            with open(tmp_path / "sizes", "a") as f:
                f.write(f"{scenes.image_size}\n")
            return render(scenes, *args)
        data.Scenes.render = recorded
    process = Forked("train.py", *SMALL, "--model", "micro-siglip", "--init", "scratch", "--preset", "nano", "--method",
                     method, "--steps", 1, "--batch-size", 4, "--out-dir", tmp_path, folder=OUTPUTS, prepare=prepare)
    assert process.wait() == 0, process.stderr
    sizes = (tmp_path / "sizes").read_text().split()
    assert sizes[2000:] == ["48"] * (8 if method == "gift" else 4)      # after those whose captions a tokenizer reads


def test_gift_replays_photographs_beside_scenes(tmp_path):
    """JPEGs, which come as tensors, and are cropped as those of --data."""
    with open(tmp_path / "b.csv", "w") as table:
        table.write("image,caption\n")
        for i in range(8):
            Image.new("RGB", (40 + i, 36)).save(tmp_path / f"{i}.jpg")
            table.write(f"{i}.jpg,a red dog\n")
    run("train.py", *SMALL, "--method", "gift", "--replay", tmp_path / "b.csv", "--image-root", tmp_path, "--steps", 2,
        "--out-dir", tmp_path / "out")
    assert len(curve(tmp_path / "out", "cd")) == len(curve(tmp_path / "out", "ita")) == 2


def test_the_baseline_of_a_softmax_is_one(tmp_path):
    """Also where the weights decide, and no --loss is given."""
    run("train.py", *SMALL, "--method", "clip", "--steps", 2, "--out-dir", tmp_path / "a")
    done = run("train.py", *SMALL, "--init", tmp_path / "a" / "last.pt", "--steps", 2, "--out-dir", tmp_path / "b")
    assert "--method clip " in done.stdout and "--method siglip" not in done.stdout
    done = run("train.py", *SMALL, "--init", tmp_path / "a" / "last.pt", "--steps", 2, "--out-dir", tmp_path / "b",
               "--resume", "auto", "--dry-run")
    assert done.returncode == 0 and "is at step 2 of 2: nothing is left to train" in done.stdout + done.stderr


def test_lost_rows_of_replay_count_against_max_bad(tmp_path):
    Image.new("RGB", (40, 36)).save(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text("image,caption\n" + "a.png,a red dog\n" * 40)
    (tmp_path / "b.csv").write_text("image,caption\n" + "a.png,a red dog\n" * 20 + ",a cat\n" * 20)
    done = run("train.py", *SMALL, "--method", "gift", "--data", tmp_path / "a.csv", "--replay", tmp_path / "b.csv",
               "--image-root", tmp_path, "--preset", "nano", "--out-dir", tmp_path / "out", check=False)
    assert done.returncode == 1
    assert "20 of 40 rows could not be read, more than --max-bad 0.01" in done.stderr


def test_method_weights_are_the_published_ones(exact):
    def arguments(*extra):
        return json.loads(open(exact("--method", *extra) / "log.jsonl").readline())["args"]
    assert {k: arguments("ce_clip")[k] for k in ("cmr_weight", "imc_weight", "negatives")} == {
        "cmr_weight": 0.2, "imc_weight": 0.3, "negatives": "typed"}
    degla = arguments("degla", "--loss", "clip")
    assert [degla[k] for k in ("tgc_weight", "igc_weight", "distill_weight", "ema")] == [0.1, 0.1, 0.005, 0.9996]
    assert arguments("con_clip", "--relations", "1")["freeze"] == "visual"
    assert METHODS["fsc_clip"].weights == {"ghn": 0.5, "lhn": 0.2} and METHODS["cs_clip"].weights == {"units": 0.5}


def test_captions_and_concepts_are_pooled_together(exact):
    """The terms of c2lip do not change where captions are queries as well; at the first step all weights are equal."""
    alone, both = exact(), exact("--caption-xac-weight", "0.5")
    for term in ("contrastive", "npc", "xac"):
        assert curve(both, term)[0] == pytest.approx(curve(alone, term)[0], rel=1e-12)
    assert curve(both, "loss")[0] == pytest.approx(curve(alone, "loss")[0] + 0.5 * curve(both, "caption_xac")[0], rel=1e-12)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Flags, and the folder of a run on one process: 32 images, of which 3 have captions of two to four sentences."""
    folder = tmp_path_factory.mktemp("told")
    rng, rows = random.Random(1), []
    for i in range(32):
        Image.new("RGB", (32, 32), (8 * i, 90, 255 - i)).save(folder / f"{i}.png")
        number = rng.randint(2, 4) if i < 3 else 1
        sentences = [f"A {rng.choice(['red', 'big'])} {rng.choice('dog cat tree'.split())}." for _ in range(number)]
        rows.append(json.dumps({"image": f"{i}.png", "caption": " ".join(sentences)}))
    (folder / "told.jsonl").write_text("\n".join(rows))
    args = [*SMALL, *EXACT, "--data", folder / "told.jsonl", "--image-root", folder, "--preset", "nano", "--init", "scratch",
            "--steps", 4, "--batch-size", 8, "--caption-xac-weight", 0.5, "--caption-xac-sentences", 2]
    run("train.py", *args, "--out-dir", folder / "out")
    return args, folder / "out"


@pytest.mark.parametrize("processes, accum", [(2, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_sentences_as_queries_do_not_depend_on_processes_and_parts(told, tmp_path, processes, accum):
    """Three rows with sentences are in at most three of four batches; most processes and parts have none."""
    args, alone = told
    run("train.py", *args, "--accum", accum, "--out-dir", tmp_path, processes=processes)
    for term in ("loss", "caption_xac", "npc", "grad_norm"):
        assert curve(tmp_path, term) == pytest.approx(curve(alone, term), rel=1e-9)
    ours, theirs = weights(tmp_path), weights(alone)
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-8) for name in ours)


def test_sentences_change_the_term_of_captions_alone(told, tmp_path):
    args, with_sentences = told
    run("train.py", *args, "--caption-xac-sentences", 0, "--out-dir", tmp_path)
    steps = zip(*(curve(folder, term) for term in ("caption_xac", "npc", "contrastive") for folder in (with_sentences, tmp_path)))
    for ours, without, *others in steps:
        assert others[::2] == pytest.approx(others[1::2], rel=1e-12)
        if ours != pytest.approx(without, rel=1e-12):
            break       # from the first batch with sentences on, the weights differ as well
    assert ours != pytest.approx(without, rel=1e-3)


def test_paraphrases_need_several_captions(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "0.png")
    for name, caption in (("one", ["a wall", "a wall"]), ("two", ["a wall", "a black wall"])):
        rows = [json.dumps({"image": "0.png", "caption": caption if i % 2 else "a door"}) for i in range(64)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    common = ["--image-root", tmp_path, "--preset", "nano", "--paraphrase-weight", "0.5", "--out-dir", tmp_path / "out"]
    says = mistake("--data", tmp_path / "one.jsonl", *common)
    assert "none of the 64 rows" in says and "--caption-key" in says
    done = run("train.py", *SMALL, "--data", tmp_path / "two.jsonl", *common)
    assert "32 of the first 64 rows have a second caption" in done.stdout
    assert all(x > 0 for x in curve(tmp_path / "out", "paraphrase"))


def test_concept_count_changes_the_divisor_of_both_terms_alone(exact, tmp_path):
    """Phrases repeat in a batch of scenes, so there are more pairs than different phrases; the sums are the same."""
    different = exact()
    run("train.py", *SMALL, *EXACT, "--concept-count", "all", "--out-dir", tmp_path, processes=2)
    ratios = [curve(tmp_path, term)[0] / curve(different, term)[0] for term in ("npc", "xac")]
    assert ratios[0] < 0.9 and ratios[1] == pytest.approx(ratios[0], rel=1e-9)
    assert curve(tmp_path, "contrastive")[0] == pytest.approx(curve(different, "contrastive")[0], rel=1e-9)


# ------------------------------------------------------------------------------------------------- kills and failures

@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_is_bit_equal(whole, tmp_path):
    """kill -9 at random times, and once while a checkpoint is being written; save-every 1, so that writes are many."""
    rng, args = random.Random(time.time()), ["train.py", *SMALL, "--save-every", 1, "--keep", 2, "--out-dir", tmp_path,
                                             "--resume", "auto"]
    kills = 0
    for kind in ["write", *["any"] * 5]:
        done = curve(tmp_path) if (tmp_path / "log.jsonl").exists() else []
        process = start(*args)
        if kind == "write":
            while not (tmp_path / "last.pt.tmp").exists() and process.poll() is None:
                time.sleep(0.0005)
        else:   # a random time after the first step that this run adds
            while process.poll() is None and (not (tmp_path / "last.pt").exists() or curve(tmp_path) == done):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.15))
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills >= 3
    run(*args, *SCENES)
    assert curve(tmp_path) == curve(whole[0]) and curve(tmp_path, "grad_norm") == curve(whole[0], "grad_norm")
    a, b = weights(whole[0]), weights(tmp_path)
    assert all(torch.equal(a[k], b[k]) for k in a)
    kept = ["best.pt", "last.pt", "step_00000011.pt", "step_00000012.pt"]
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == kept


def mistake(*args, status=1, **environment):
    """The one line that train.py ends with."""
    small = [] if "--epochs" in args else SMALL
    done = run("train.py", *small, *args, check=False, **environment)
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert done.returncode == status and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


def test_a_new_run_does_not_begin_in_the_folder_of_another(tmp_path):
    run("train.py", *SMALL, "--steps", 6, "--save-every", 3, "--keep", 2, "--out-dir", tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    line = mistake("--seed", 1, "--out-dir", tmp_path)
    assert "holds a run already" in line and "--resume auto" in line and "--overwrite" in line
    line = mistake("--steps", 6, "--resume", tmp_path / "step_00000003.pt", "--out-dir", tmp_path)
    assert "is not the newest checkpoint" in line and "last.pt" in line
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    run("train.py", *SMALL, "--seed", 1, "--steps", 2, "--keep", 2, "--overwrite", "--out-dir", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "log.jsonl", "step_00000002.pt"]
    assert curve(tmp_path, "step") == [1, 2]


def test_a_folder_with_results_alone_is_not_lost(tmp_path):
    """Its last.pt may have been moved away; best.pt would be the next run's."""
    (tmp_path / "best.pt").write_bytes(b"of a run")
    line = mistake("--out-dir", tmp_path)
    assert "holds best.pt of a run, without a checkpoint to go on from" in line and "--overwrite" in line
    assert "holds best.pt of a run" in mistake("--resume", "auto", "--out-dir", tmp_path)
    assert (tmp_path / "best.pt").read_bytes() == b"of a run"


def test_another_runs_folder_is_not_mixed_with_this_run(tmp_path):
    """A checkpoint of one folder, and --out-dir with --overwrite in another: nothing of the latter stays."""
    run("train.py", *SMALL, "--steps", 2, "--out-dir", tmp_path / "a")
    run("train.py", *SMALL, "--seed", 1, "--steps", 3, "--save-every", 1, "--keep", 3, "--out-dir", tmp_path / "b")
    run("train.py", *SMALL, "--steps", 4, "--resume", tmp_path / "a" / "last.pt", "--overwrite", "--out-dir",
        tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["last.pt", "log.jsonl"]
    assert curve(tmp_path / "b", "step") == [3, 4] and curve(tmp_path / "a", "step") == [1, 2]


def test_data_that_has_changed_is_not_resumed(tmp_path):
    args = [*SMALL, *pairs(tmp_path, 32, 0)[:4], "--preset", "nano", "--out-dir", tmp_path / "out"]
    run("train.py", *args, "--steps", 2)
    resume = [*args, "--resume", "auto", "--steps", 3]
    table = tmp_path / "pairs.csv"
    text = table.read_text()
    table.write_text(text + "0.png,one more\n")
    done = run("train.py", *resume, check=False)
    assert done.returncode == 1 and "pairs.csv has changed, it had 32 rows, now 33: go on with what it was" in done.stderr
    table.write_text(text.replace("number 7", "number 70"))
    done = run("train.py", *resume, check=False)
    assert done.returncode == 1 and "it had the same number of rows, with other captions" in done.stderr
    table.write_text(text)
    run("train.py", *resume)
    assert curve(tmp_path / "out", "step") == [1, 2, 3]


def test_a_model_may_be_named_where_weights_named_it(tmp_path):
    run("train.py", *SMALL, "--steps", 2, "--out-dir", tmp_path / "a")
    run("train.py", *SMALL, "--init", tmp_path / "a" / "last.pt", "--preset", "nano", "--steps", 2, "--out-dir",
        tmp_path / "b")
    run("train.py", *SMALL, "--steps", 3, "--resume", "auto", "--out-dir", tmp_path / "b")
    assert curve(tmp_path / "b", "step") == [1, 2, 3]


def test_the_best_of_the_same_run_stays_the_best_where_overwrite_is_given(tmp_path):
    """--overwrite keeps a best.pt of the step that is gone on from; a worse model must not take its place."""
    args = ["train.py", *SMALL, *SCENES, "--out-dir", tmp_path]
    run(*args, "--steps", 2)
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    torch.save({**best, "mean": 2.0}, tmp_path / "best.pt")
    run(*args, "--steps", 3, "--resume", "auto", "--overwrite")
    assert torch.load(tmp_path / "best.pt", weights_only=True)["mean"] == 2


def test_going_back_discards_what_followed(tmp_path):
    args = ["train.py", *SMALL, "--save-every", 2, "--keep", 5, "--out-dir", tmp_path]
    run(*args, "--steps", 8)
    back = ["--resume", tmp_path / "step_00000004.pt", "--overwrite"]
    run(*args, *back, "--steps", 5)
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["last.pt"] + [f"step_0000000{i}.pt" for i in (2, 4, 5)]
    assert curve(tmp_path, "step") == [1, 2, 3, 4, 5]


def test_resuming_with_other_arguments(tmp_path):
    run("train.py", *SMALL, "--steps", 2, "--out-dir", tmp_path)
    resume = ["--steps", 3, "--resume", "auto", "--out-dir", tmp_path]
    for flag, value in (("--batch-size", 16), ("--seed", 1), ("--method", "siglip"), ("--freeze", "visual"),
                        ("--loss", "clip"), ("--ema", 0.9), ("--relations", 0.5), ("--xac-weight", 1)):
        line = mistake(*resume, flag, value)
        assert "was trained with --" in line and "--init" in line
    line = mistake(*resume, "--steps", 1)
    assert "--steps 1: " in line and "is at step 2 already" in line
    done = run("train.py", *SMALL, *resume, "--lr", "1e-4", "--eval-every", 3)
    for text in (f"resuming {tmp_path}/last.pt at step 2 of 3", "with --lr 0.0001 instead of 0.0003",
                 "with --steps 3 instead of 2", "with --eval-every 3 instead of 0"):
        assert text in done.stdout
    done = run("train.py", *SMALL, *resume)     # there is nothing left to do
    assert "last.pt is at step 3 already: nothing was left to train" in done.stdout and "minutes; wrote" not in done.stdout
    assert curve(tmp_path, "step") == [1, 2, 3]


def test_a_checkpoint_with_another_order_of_rows(tmp_path):
    run("train.py", *SMALL, "--steps", 2, "--out-dir", tmp_path)
    checkpoint = torch.load(tmp_path / "last.pt", weights_only=True)
    del checkpoint["order"]     # the first edition saved none
    torch.save(checkpoint, tmp_path / "last.pt")
    assert "whose order of rows this version cannot continue" in mistake("--resume", "auto", "--out-dir", tmp_path)


def test_changed_bytes_of_a_checkpoint_are_found(tmp_path):
    run("train.py", *SMALL, "--steps", 2, "--out-dir", tmp_path)
    content = bytearray((tmp_path / "last.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "last.pt").write_bytes(content)
    line = mistake("--resume", "auto", "--out-dir", tmp_path)
    assert "no checkpoint in" in line and "is whole" in line
    assert "is damaged" in mistake("--resume", tmp_path / "last.pt", "--out-dir", tmp_path)


@pytest.mark.parametrize("what", ["no file", "another step", "another rate"])
def test_processes_that_do_not_agree(what, tmp_path):
    """Two nodes, each with its own command line and its own disk, here a folder to start in."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        (folder / "out").mkdir(parents=True)
    run("train.py", *SMALL, "--steps", 4, "--save-every", 2, "--keep", 2, "--out-dir", first / "out")
    args = ["train.py", *SMALL, "--steps", 6, "--resume", "auto", "--out-dir", "out"]
    theirs = args
    if what == "another step":
        shutil.copy(first / "out" / "step_00000002.pt", second / "out" / "last.pt")
    if what == "another rate":
        shutil.copy(first / "out" / "last.pt", second / "out")
        theirs = [*args, "--lr", "1e-4"]
    ranks = finish(start_each([(args, first), (theirs, second)]))
    says = {"no file": "process 1 has --resume no file out/last.pt, process 0 has out/last.pt with digest",
            "another step": "process 1 has --resume out/last.pt with digest",
            "another rate": "process 1 has --lr 0.0001, process 0 has 0.0003"}[what]
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert says in ranks[1].stderr and "Traceback" not in ranks[0].stderr + ranks[1].stderr


def wait_for(process, condition, timeout=300):
    end = time.time() + timeout
    while not condition():
        assert process.poll() is None and time.time() < end, process.stdout + process.stderr
        time.sleep(0.01)


def test_a_signal_to_all_of_a_group_saves(tmp_path):
    """slurm, systemd and docker signal the workers, too."""
    process = start("train.py", *pairs(tmp_path, 64, 0), "--bench", "none", "--epochs", 100, "--log-every", 1,
                    "--workers", 2, "--out-dir", tmp_path / "out")
    wait_for(process, lambda: (tmp_path / "out" / "log.jsonl").exists() and curve(tmp_path / "out"))
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait() == 0 and "interrupted: saved step" in process.stdout
    assert "saving after this step; again to quit now" in process.stderr and "Traceback" not in process.stderr


def test_a_signal_to_all_during_an_evaluation(tmp_path):
    """Which has workers of its own; the evaluation that was cut off is made up for at the resume."""
    args = pairs(tmp_path, 64, 0)
    rows = (tmp_path / "pairs.csv").read_text().splitlines()[1:]
    for i in range(64):
        for k in range(20):
            shutil.copy(tmp_path / f"{i}.png", tmp_path / f"{i}-{k}.png")
    copies = [row.replace(".png", f"-{k}.png", 1) for row in rows for k in range(20)]
    (tmp_path / "val.csv").write_text("\n".join(["image,caption", *copies]) + "\n")
    args = ["train.py", *args, "--epochs", 1, "--workers", 2, "--val-data", tmp_path / "val.csv", "--out-dir",
            tmp_path / "out"]
    process = start(*args)
    wait_for(process, (tmp_path / "out" / "last.pt").exists)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait() == 0 and "Traceback" not in process.stderr, process.stderr
    run(*args, "--resume", "auto")
    assert len(curve(tmp_path / "out", "eval")) == 1


def test_a_killed_worker_does_not_cost_what_is_trained(tmp_path):
    process = start("train.py", *pairs(tmp_path, 64, 0), "--bench", "none", "--epochs", 100, "--log-every", 1,
                    "--workers", 2, "--out-dir", tmp_path / "out")
    wait_for(process, lambda: (tmp_path / "out" / "log.jsonl").exists() and curve(tmp_path / "out"))
    os.kill(children_of(process.pid)[0], signal.SIGKILL)
    assert process.wait() == 1 and "Traceback" not in process.stderr
    assert "for want of memory" in process.stderr and "go on with --resume auto" in process.stderr
    saved = torch.load(tmp_path / "out" / "last.pt", weights_only=True)["step"]
    assert saved == curve(tmp_path / "out", "step")[-1]


@pytest.mark.parametrize("ended", ["killed", "stopped"])
def test_a_process_that_hangs_or_dies_ends_all(ended, tmp_path):
    """Process 1 is killed, or stopped: process 0 saves what is trained after --timeout."""
    ranks = start("train.py", *SMALL, "--steps", 1000, "--timeout", 0.1, "--out-dir", tmp_path, processes=2)
    wait_for(ranks[0], lambda: (tmp_path / "log.jsonl").exists() and len(curve(tmp_path)) > 2)
    ranks[1].send_signal(signal.SIGKILL if ended == "killed" else signal.SIGSTOP)
    assert ranks[0].wait(60) == 1
    ranks[1].kill()
    assert "process 0 waited in vain for another one" in ranks[0].stderr and "Traceback" not in ranks[0].stderr
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == curve(tmp_path, "step")[-1]


@pytest.mark.slow
def test_a_signal_is_not_deaf_while_others_hang(tmp_path):
    ranks = start("train.py", *SMALL, "--steps", 1000, "--out-dir", tmp_path, processes=2)
    wait_for(ranks[0], lambda: (tmp_path / "log.jsonl").exists() and len(curve(tmp_path)) > 2)
    ranks[1].send_signal(signal.SIGSTOP)
    time.sleep(1)       # until process 0 waits for it
    ranks[0].send_signal(signal.SIGTERM)
    assert ranks[0].wait(60) == 1
    ranks[1].kill()
    assert "did not end within 30 s" in ranks[0].stderr


def test_what_a_run_needs_later_is_checked_before_it(tmp_path):
    data = pairs(tmp_path, 32, 0)
    (tmp_path / "val.csv").write_text("image,words\n0.png,a wall\n")
    line = mistake(*data, "--val-data", tmp_path / "val.csv", "--bench", "retrieval", "--out-dir", tmp_path / "out")
    assert "--val-data: " in line and "val.csv" in line and "words" in line
    shutil.move(tmp_path / "val.csv", tmp_path / "other.csv")
    (tmp_path / "val.csv").write_text("image,caption\nnone.png,a wall\n")
    line = mistake(*data, "--val-data", tmp_path / "val.csv", "--bench", "retrieval", "--out-dir", tmp_path / "out")
    assert "none.png" in line
    line = mistake("--bench", "sugarcrepe", "--data-dir", tmp_path, "--dry-run", "--out-dir", tmp_path / "out")
    assert "--bench: sugarcrepe" in line and "evaluate.py download sugarcrepe" in line
    line = mistake("--out-dir", "/proc/x")
    assert "--out-dir /proc/x cannot be written" in line
    (tmp_path / "file").write_text("")
    assert "cannot be written" in mistake("--out-dir", tmp_path / "file")
    assert not list((tmp_path / "out").iterdir())


def test_without_git_and_without_a_driver(tmp_path):
    run("train.py", *SMALL, "--steps", 1, "--out-dir", tmp_path, PATH="/nowhere")
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["commit"] == ""
    line = mistake("--device", "cuda", "--out-dir", tmp_path / "b")
    assert "--device cuda cannot be used here" in line and "give cpu" in line


def test_a_failing_evaluation_does_not_cost_the_checkpoint(tmp_path):
    """The held-out pairs go while training runs; when they are back, the evaluation is made up for."""
    args = ["train.py", *pairs(tmp_path, 32, 0), "--epochs", 2, "--log-every", 1, "--out-dir", tmp_path / "out"]
    args += ["--val-data", tmp_path / "val.csv"]
    (tmp_path / "val.csv").write_text("image,caption\n" + "".join(f"{i}.png,a wall\n" for i in range(4)))
    process = start(*args)
    wait_for(process, lambda: (tmp_path / "out" / "log.jsonl").exists())        # after the check
    (tmp_path / "val.csv").rename(tmp_path / "gone.csv")
    assert process.wait() == 1 and "Traceback" not in process.stderr
    assert torch.load(tmp_path / "out" / "last.pt", weights_only=True)["step"] == 4
    (tmp_path / "gone.csv").rename(tmp_path / "val.csv")
    done = run(*args, "--resume", "auto")
    assert curve(tmp_path / "out", "eval") and "t2i_r1" in done.stdout and (tmp_path / "out" / "best.pt").exists()


class DieAt:
    """Kills the process, as a power cut would, just before its n-th operation on files."""
    def __init__(self, n):
        self.left = n

    def __call__(self):
        for module, name in ((os, "replace"), (os, "link"), (os, "remove"), (os, "fsync"), (torch, "save")):
            setattr(module, name, self.deadly(getattr(module, name)))

    def deadly(self, function):
        def called(*args, **keywords):
            self.left -= 1
            if self.left == 0:
                if function.__name__ == "save":     # half a file
                    args[1].write(b"half a checkpoint" * 1000)
                    args[1].flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **keywords)
        return called


def killed_at_each_operation(folder, operations):
    """Chains of runs that die at the given operations since their start; returns how many of them died."""
    args = ["train.py", *SMALL, "--save-every", 1, "--keep", 2, "--out-dir", folder, "--resume", "auto"]
    died = 0
    for n in operations:
        process = Forked(*args, folder=OUTPUTS, environment={}, prepare=DieAt(n))
        died += process.wait() == -signal.SIGKILL
        assert "Traceback" not in process.stderr and "damaged" not in process.stdout, process.stderr
    run(*args)
    return died


@pytest.mark.parametrize("operations", [[3, 4, 5, 7], pytest.param(range(1, 20), marks=pytest.mark.slow)], ids=len)
def test_killed_at_an_operation_on_files(whole, tmp_path, operations):
    """Before a checkpoint is begun, in its middle, before it is flushed, renamed, has a second name, is removed."""
    # the last runs of the long chain have nothing left to do
    assert killed_at_each_operation(tmp_path, operations) >= len(operations) // 2
    assert curve(tmp_path) == curve(whole[0]) and curve(tmp_path, "step") == list(range(1, 13))
    a, b = weights(whole[0]), weights(tmp_path)
    assert all(torch.equal(a[k], b[k]) for k in a)
    names = ["last.pt", "log.jsonl", "step_00000011.pt", "step_00000012.pt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_a_gpu_without_enough_memory(tmp_path):
    """Simulated in the third step: what is trained is saved, and the line says what to do."""
    def fail():
        calls = []
        clip = torch.nn.utils.clip_grad_norm_

        def clip_grad_norm_(*args):
            calls.append(1)
            if len(calls) == 3:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return clip(*args)
        torch.nn.utils.clip_grad_norm_ = clip_grad_norm_
    process = Forked("train.py", *SMALL, "--out-dir", tmp_path, folder=OUTPUTS, prepare=fail)
    assert process.wait() == 1 and "Traceback" not in process.stderr
    assert "give --accum 2 or more" in process.stderr and "Saved step 2: go on with --resume auto" in process.stderr
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 2


class Disk:
    def __init__(self, free):
        self.free = free

    def disk_usage(self, folder):
        return self


def room_needed(folder, former=(), **more):
    """What train.py says, of --keep 1 and 10 steps if not of more; former: checkpoints that are there."""
    model = CLIP(CLIPConfig())
    args = {"steps": 10, "save_every": 10, "keep": 1, "eval_every": 0, **more}
    names = {"os": os, "math": math, "model": model, "trained": list(model.parameters()), "teacher": None, "benches": [],
             "averages": False, "args": argparse.Namespace(**args), "checkpoints": lambda: former,
             "best_path": folder / "best.pt", "ema_path": folder / "ema.pt"}
    names["bytes_of_former_run"] = function_of_train("bytes_of_former_run", **names)
    weights = 4 * sum(p.numel() for p in model.parameters())
    return function_of_train("room_needed", **names)() / weights


def test_room_is_needed_for_the_checkpoints_that_are_not_there_yet(tmp_path):
    """In units of the weights: a checkpoint has them and AdamW's two moments."""
    assert room_needed(tmp_path) == 6
    assert room_needed(tmp_path, keep=3, save_every=1) == 12
    assert room_needed(tmp_path, keep=100) == 6         # there will be but one
    last, same, other = tmp_path / "last.pt", tmp_path / "step_2.pt", tmp_path / "step_1.pt"
    last.write_bytes(bytes(12 * sum(p.numel() for p in CLIP(CLIPConfig()).parameters())))
    os.link(last, same)
    shutil.copy(last, other)
    assert room_needed(tmp_path, [last]) == pytest.approx(3)            # at a resume
    assert room_needed(tmp_path, [other, same, last], keep=3, save_every=1) == pytest.approx(6)
    assert room_needed(tmp_path, [other, same, last]) == 3


def test_a_folder_without_room_for_the_checkpoints(tmp_path):
    disk = Disk(2**20)
    names = {"os": os, "tempfile": tempfile, "shutil": disk, "hold_folder": lambda: None, "room_needed": lambda: 2**30,
             "args": argparse.Namespace(out_dir=tmp_path / "out")}
    with pytest.raises(ValueError, match="has 0.00 GiB free; the checkpoints need 1.00 GiB: make room"):
        function_of_train("check_folder", **names)()
    disk.free = 2**30
    function_of_train("check_folder", **names)()


def test_batches_of_workers_fit_into_the_shared_memory(tmp_path):
    """Docker's has 64 MB. A worker without room prints so, and training would wait for its batch for ever."""
    disk = Disk(64 * 2**20)
    args = argparse.Namespace(workers=8, batch_size=768, attack_steps=None, data="x.csv")
    names = {"os": os, "math": math, "shutil": disk, "SHARED_MEMORY": tmp_path, "args": args, "world_size": 8,
             "method": METHODS["c2lip"], "replay": None,
             "model": argparse.Namespace(config=argparse.Namespace(image_size=224))}
    check = function_of_train("check_shared_memory", **names)
    with pytest.raises(ValueError, match="--workers 8 need 248 MiB .* has 64 MiB free: give --workers 1, or"):
        check()
    args.workers = 1
    check()
    args.attack_steps = 2       # which brings noise
    with pytest.raises(ValueError, match="give --workers 0, or more shared memory"):
        check()
    args.workers = 0
    check()


def test_two_runs_in_one_folder(tmp_path):
    """The second would discard the first one's log and, later, its checkpoints. A kill frees the folder at once."""
    args = ["train.py", *pairs(tmp_path, 64, 0), "--bench", "none", "--log-every", 1, "--save-every", 10**6,
            "--out-dir", tmp_path / "out"]
    first = start(*args, "--epochs", 1000, "--workers", 1)
    wait_for(first, lambda: (tmp_path / "out" / "log.jsonl").exists() and curve(tmp_path / "out"))
    before = len(curve(tmp_path / "out"))
    for more in ([], ["--overwrite"], ["--resume", "auto"]):
        second = run(*args, "--epochs", 1, *more, check=False)
        assert second.returncode == 1 and "another run is training in" in second.stderr, second.stderr
    run(*args, "--epochs", 1, "--dry-run")
    assert len(curve(tmp_path / "out")) > before and first.poll() is None
    first.kill()
    first.wait()
    run(*args, "--epochs", 1)
    assert curve(tmp_path / "out", "step") == [1, 2, 3, 4]


def test_the_best_of_other_figures_is_not_compared_with(tmp_path):
    args = ["train.py", *SMALL, "--steps", 2, "--lr", 1e-12, "--out-dir", tmp_path]
    run(*args, *SCENES)
    assert torch.load(tmp_path / "best.pt", weights_only=True)["mean"] > 0.1
    data = pairs(tmp_path, 40, 0)
    more = ["--val-data", tmp_path / "pairs.csv", "--val-image-root", tmp_path, "--steps", 3, "--bench", "retrieval"]
    run(*args, *more, "--resume", "auto")
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert best["step"] == 3 and best["args"]["bench"] == "retrieval"


def test_a_gpu_without_memory_for_the_moments(tmp_path):
    def fail():
        def step(self, closure=None):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        torch.optim.AdamW.step = step
    process = Forked("train.py", *SMALL, "--out-dir", tmp_path, folder=OUTPUTS, prepare=fail)
    assert process.wait() == 1 and "Traceback" not in process.stderr
    assert "too little memory for AdamW's two moments" in process.stderr and not (tmp_path / "last.pt").exists()


def test_batches_and_rates_that_are_not_what_was_given_are_told(tmp_path):
    done = run("train.py", *pairs(tmp_path, 20, 0), "--bench", "none", "--warmup", 8, "--lr", 1e-3, "--out-dir",
               tmp_path / "out")
    assert "an epoch of 20 rows is cut into 2 equal batches, of 10 rows, not 16 (--batch-size)" in done.stdout
    assert "--warmup 8 is longer than the 2 steps: the learning rate ends at 0.00025 and never comes" in done.stdout


def test_a_file_system_without_second_names(tmp_path):
    def refuse():
        def link(*paths):
            raise PermissionError("no hard links here")
        os.link = link
    Forked("train.py", *SMALL, "--steps", 4, "--save-every", 1, "--keep", 2, "--out-dir", tmp_path, folder=OUTPUTS,
           prepare=refuse).wait()
    assert sorted(p.name for p in tmp_path.glob("*.pt*")) == ["last.pt", "step_00000003.pt", "step_00000004.pt"]
    assert torch.load(tmp_path / "step_00000003.pt", weights_only=True)["step"] == 3


def test_a_signal_before_the_first_step_ends_at_once(tmp_path):
    process = start("train.py", "--batch-size", 20000, "--steps", 2, "--out-dir", tmp_path)
    wait_for(process, lambda: "2 steps of 20000" in process.stdout)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM and "there is nothing to save" in process.stderr


def test_resume_auto_passes_over_a_damaged_checkpoint(tmp_path):
    run("train.py", *SMALL, "--steps", 3, "--save-every", 1, "--keep", 3, "--out-dir", tmp_path)
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[:len(whole) // 2])
    done = run("train.py", *SMALL, "--steps", 3, "--resume", "auto", "--out-dir", tmp_path)
    assert "passes over" in done.stdout + done.stderr
    assert curve(tmp_path, "step")[-1] == 3


@contextlib.contextmanager
def no_file_above(size):
    """Files that processes write, which are started in here, end at this size: as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    run("train.py", *SMALL, "--steps", 2, "--out-dir", tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    with no_file_above(1 << 20):
        process = start("train.py", *SMALL, "--resume", "auto", "--out-dir", tmp_path)
    process.wait()
    assert process.returncode == 1 and "cannot write" in process.stderr and "Traceback" not in process.stderr
    assert (tmp_path / "last.pt").read_bytes() == before


def test_what_a_kill_left_behind_is_removed_not_written_into(tmp_path):
    """A second name of last.pt under the name of the next unfinished file: writing into it would damage both."""
    args = ["train.py", *SMALL, "--save-every", 1, "--keep", 2, "--out-dir", tmp_path]
    run(*args, "--steps", 3)
    os.link(tmp_path / "last.pt", tmp_path / "last.pt.tmp")
    inode = os.stat(tmp_path / "last.pt").st_ino
    process = start(*args, "--resume", "auto")
    while os.stat(tmp_path / "last.pt").st_ino == inode:        # the first save of the resumed run
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    run(*args, "--resume", "auto")
    names = ["last.pt", "log.jsonl", "step_00000011.pt", "step_00000012.pt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert curve(tmp_path, "step") == list(range(1, 13))
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 12


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    with no_file_above(1 << 20):
        process = start("train.py", *SMALL, "--steps", 2, "--out-dir", tmp_path)
    assert process.wait() == 1
    assert [line for line in process.stderr.splitlines() if "cannot write" in line] == [
        process.stderr.splitlines()[-1]]
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path):
    """Its lines are torn at 6,000 bytes; then there is room again, and the next resume passes over the torn line."""
    with no_file_above(6000):
        process = start("train.py", *SMALL, "--steps", 300, "--warmup", 1, "--out-dir", tmp_path)
    while "cannot write" not in process.stdout:
        assert process.poll() is None
        time.sleep(0.02)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    lines = (tmp_path / "log.jsonl").read_text().count("\n")
    while (tmp_path / "log.jsonl").read_text().count("\n") < lines + 4:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0 and process.stdout.count("cannot write") == 1
    steps = torch.load(tmp_path / "last.pt", weights_only=True)["step"]
    done = run("train.py", *SMALL, "--steps", steps + 1, "--warmup", 1, "--resume", "auto", "--out-dir", tmp_path)
    assert "log.jsonl: 1 lines cannot be read and are left out" in done.stdout
    assert curve(tmp_path, "step")[-5:] == list(range(steps - 3, steps + 2))


def test_a_damaged_line_of_the_log_is_passed_over(tmp_path):
    run("train.py", *SMALL, "--steps", 3, "--out-dir", tmp_path)
    lines = (tmp_path / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_text("".join([*lines[:2], lines[2][:9] + "\n", "[]\n", *lines[3:], '{"step": ']))
    done = run("train.py", *SMALL, "--steps", 4, "--resume", "auto", "--out-dir", tmp_path)
    assert "log.jsonl: 3 lines cannot be read and are left out" in done.stdout
    assert curve(tmp_path, "step") == [1, 3, 4]


def test_tensorboard_gets_what_the_log_has(tmp_path):
    run("train.py", *SMALL, *SCENES, "--steps", 3, "--tensorboard", "--out-dir", tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(curve(tmp_path))
    figure = curve(tmp_path, "eval")[-1]["scenes"]["np_binding"]["accuracy"]
    assert events.Scalars("scenes/np_binding")[-1].value == pytest.approx(figure)


@pytest.mark.parametrize("family, patch", [("siglip", 8), ("clip", 4)])
def test_operations_are_those_that_are_counted(family, patch, tmp_path):
    """The formula behind tflops and mfu, against PyTorch's own counter; attention, heads, embeddings are left out.
    The counter finds less, as the last blocks are evaluated only where they are read (here one of twelve)."""
    model = CLIP(CLIPConfig(family=family, patch_size=patch, vision=(96, 12, 3, 384), text=(192, 12, 3, 768)))
    images, tokens = torch.randn(4, 3, 32, 32), torch.randint(1024, (12, 16))
    with FlopCounterMode(display=False) as counter:
        image, text = model.encode_image(images), model.encode_text(tokens)
        (image.sum() + text.sum()).backward()
    operations = function_of_train("operations_for_each_number")(model)
    counted = images.numel() * operations["images"] + tokens.numel() * operations["tokens"]
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_resumed_on_another_number_of_processes(exact, tmp_path):
    process = start("train.py", *SMALL, *EXACT, "--save-every", 1, "--out-dir", tmp_path)
    while not (tmp_path / "last.pt").exists():
        time.sleep(0.02)
    process.kill()
    process.wait()
    run("train.py", *SMALL, *EXACT, "--resume", "auto", "--out-dir", tmp_path, processes=2)
    assert curve(tmp_path) == pytest.approx(curve(exact()), rel=1e-9)


@pytest.mark.slow
def test_torchrun_restarts_what_died(tmp_path):
    """A worker is killed; torchrun starts all again, and --resume auto goes on to the end."""
    process = torchrun("--nproc_per_node", 2, "--max-restarts", 1,
                    "train.py", *SMALL, "--steps", 30, "--save-every", 2, "--out-dir", tmp_path, "--resume", "auto")
    while not (tmp_path / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(children_of(process.pid)[-1], signal.SIGKILL)
    assert process.wait(timeout=180) == 0
    assert curve(tmp_path, "step")[-1] == 30 and len(curve(tmp_path)) == 30


@pytest.mark.slow
def test_one_dead_process_ends_all(tmp_path):
    process = torchrun("--nproc_per_node", 2, "train.py", *SMALL,
                    "--steps", 500, "--out-dir", tmp_path)
    while not (tmp_path / "log.jsonl").exists() or not curve(tmp_path):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(children_of(process.pid)[-1], signal.SIGKILL)
    assert process.wait(timeout=60) != 0


def test_a_step_that_is_left_out_leaves_no_thresholds(tmp_path):
    """Those of ce_clip go from one step to the next; from a loss that is not a number they would spoil all the others."""
    calls = []

    def fail_at_the_second(features):
        calls.append(0)
        terms = METHODS["siglip"].loss(features)
        spoilt = math.nan if len(calls) == 2 else 1
        return {"contrastive": terms["contrastive"] * spoilt + features.thresholds.sum(),
                "thresholds": features.thresholds + spoilt}

    def prepare():
        METHODS["ce_clip"] = dataclasses.replace(METHODS["ce_clip"], loss=fail_at_the_second, weights={})
    process = Forked("train.py", *SMALL, "--method", "ce_clip", "--steps", 4, "--out-dir", tmp_path, folder=OUTPUTS,
                     prepare=prepare)
    assert process.wait() == 0, process.stderr
    assert curve(tmp_path, "left_out") == [1] and math.isfinite(curve(tmp_path)[-1])
    assert torch.load(tmp_path / "last.pt", weights_only=True)["thresholds"].tolist() == [3.0] * 4


def test_steps_that_are_not_finite_are_left_out(tmp_path):
    """One broken image after another: a learning rate that diverges at once stops after --max-skips steps."""
    done = run("train.py", *SMALL, "--lr", "1e12", "--warmup", 1, "--max-skips", 2, "--out-dir", tmp_path, check=False)
    left_out = curve(tmp_path, "left_out")
    assert done.returncode == 1 and left_out == [1, 2, 3] and "as 3 steps in a row (--max-skips 2)" in done.stderr


# ------------------------------------------------------------------------------------------------- steps, watched

# Runs train.py, and writes after each step what was compiled since the start.
COMPILATIONS = """
import json, os, runpy, sys
from functools import partial
import torch
from torch._dynamo.utils import counters

torch.compile = partial(torch.compile, backend=os.environ["BACKEND"])
step = torch.optim.AdamW.step
compiled = []

def counted(optimizer):
    compiled.append(counters["frames"]["total"])
    with open(os.environ["COUNTS"] + os.environ.get("RANK", "0"), "w") as f:
        json.dump(compiled, f)
    return step(optimizer)

torch.optim.AdamW.step = counted
runpy.run_path("train.py", run_name="__main__")
"""

# Runs train.py, and writes after each step how often a GPU would have been waited for, and how many collectives there
# were. Not watched: the plan, which is made on the CPU, and the optimizer, which is fused on a GPU. DDP's own exchange
# of gradients is in C++, and not counted.
WAITS = """
import contextlib, json, os, runpy
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
import losses

READS = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "equal"}
counts = {"waits": 0, "collectives": 0}
steps = []
unwatched = []


class Waits(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), keywords=None):
        name = function.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            torch.is_tensor(x) and x.dtype == torch.bool for x in (args[1] if isinstance(args[1], (list, tuple)) else ()))
        if not unwatched and (name in READS or by_mask):
            counts["waits"] += 1
        return function(*args, **(keywords or {}))


def counting(kind, function):
    def counted(*args, **keywords):
        if kind == "collectives" or not unwatched:
            counts[kind] += 1
        return function(*args, **keywords)
    return counted


def not_watched(function):
    def called(*args, **keywords):
        unwatched.append(1)
        try:
            return function(*args, **keywords)
        finally:
            unwatched.pop()
    return called


def after_step(function):
    def called(*args, **keywords):
        steps.append(dict(counts))
        counts.update(waits=0, collectives=0)
        with open(os.environ["COUNTS"] + os.environ.get("RANK", "0"), "w") as f:
            json.dump(steps, f)
        return function(*args, **keywords)
    return called


for name in ("all_gather", "all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor", "broadcast", "barrier",
             "all_gather_object", "broadcast_object_list", "all_to_all"):
    setattr(dist, name, counting("collectives", getattr(dist, name)))
for name in ("tolist", "cpu", "numpy"):
    setattr(torch.Tensor, name, counting("waits", getattr(torch.Tensor, name)))
losses.plan_batch = not_watched(losses.plan_batch)
torch.optim.AdamW.step = after_step(not_watched(torch.optim.AdamW.step))
with Waits():
    runpy.run_path("train.py", run_name="__main__")
"""

# Runs train.py, with a first step that takes three seconds longer, as one that compiles.
SLOW_START = """
import runpy, time
import torch

step = torch.optim.AdamW.step

def slow_once(optimizer):
    torch.optim.AdamW.step = step
    time.sleep(3)
    return step(optimizer)

torch.optim.AdamW.step = slow_once
runpy.run_path("train.py", run_name="__main__")
"""


def run_watched(source, folder, *args, processes=1, **environment):
    """What each process has written, a list."""
    (folder / "watched.py").write_text(source)
    run(str(folder / "watched.py"), *args, "--out-dir", folder / "out", processes=processes,
        COUNTS=str(folder / "counts"), **environment)
    return [json.loads((folder / f"counts{rank}").read_text()) for rank in range(processes)]


def varied_pairs(folder):
    """Captions of one to five phrases, and rows without an image: all numbers vary from batch to batch."""
    rng = random.Random(0)
    rows = ["image,caption"]
    for i in range(96):
        Image.new("RGB", (40, 36), (7 * i % 256, 90, 255 - i)).save(folder / f"{i}.png")
        things = []
        for _ in range(rng.randint(1, 5)):
            things.append(f"a {rng.choice(['red', 'big', 'old'])} {rng.choice('dog cat tree car house boat'.split())}")
        name = f"missing{i}.png" if i % 9 == 4 else f"{i}.png"
        rows.append(f"{name},{' and '.join(things)}")
    (folder / "pairs.csv").write_text("\n".join(rows))
    return ["--data", folder / "pairs.csv", "--image-root", folder, "--max-bad", 1, "--preset", "nano", "--init", "scratch"]


@pytest.mark.parametrize("backend, processes, extra", [
    ("eager", 1, ["--model", "micro"]),
    ("eager", 2, ["--model", "nano"]),
    pytest.param("eager", 2, ["--model", "nano", "--accum", "2", "--method", "ce_clip", "--npc-weight", "1",
                              "--distill-weight", "1"], marks=pytest.mark.slow),
    pytest.param("eager", 1, ["--model", "micro", "--concept-features", "span"], marks=pytest.mark.slow),
    pytest.param("inductor", 1, ["--model", "nano"], marks=pytest.mark.slow),
    pytest.param("inductor", 2, ["--model", "nano"], marks=pytest.mark.slow)],
    ids=["causal", "two processes", "parts and negatives", "spans", "inductor", "inductor on two processes"])
def test_all_shapes_are_compiled_at_the_start(tmp_path, backend, processes, extra):
    args = [*varied_pairs(tmp_path), *SMALL, "--batch-size", 16, "--steps", 8, "--compile", *extra]
    for compiled in run_watched(COMPILATIONS, tmp_path, *args, processes=processes, BACKEND=backend):
        assert len(compiled) == 8 and compiled[0] >= 2      # both towers
        assert compiled[2:] == compiled[2:3] * 6, compiled
    if not extra[2:]:
        assert compiled == [2] * 8      # not once more for phrases than for captions


@pytest.mark.parametrize("processes", [1, 2])
def test_waits_and_collectives_of_a_step(tmp_path, processes):
    """A GPU is waited for at most twice a step, and the processes exchange at most five times."""
    args = [*SMALL, "--steps", 5, "--workers", 1]
    for steps in run_watched(WAITS, tmp_path, *args, processes=processes):
        assert len(steps) == 5
        for step in steps[2:-1]:        # the last one plans no other
            assert 1 <= step["waits"] <= 2 and step["collectives"] <= 5, steps
            assert processes == 1 or step["collectives"] == 5, steps    # they are counted at all


def test_speed_is_that_of_the_rows_own_steps(tmp_path):
    (tmp_path / "watched.py").write_text(SLOW_START)
    run(str(tmp_path / "watched.py"), *SMALL, "--steps", 6, "--log-every", 2, "--out-dir", tmp_path / "out")
    first, *later = curve(tmp_path / "out", "images_per_second")
    assert len(later) == 2 and first < 64 / 3 and min(later) > first
    assert all(0 <= share < 1 for share in curve(tmp_path / "out", "waiting"))


def test_the_class_token_does_not_decay(tmp_path):
    run("train.py", *SMALL, "--model", "micro", "--init", "scratch", "--preset", "nano", "--batch-size", 8, "--steps", 1,
        "--weight-decay", 0.5, "--out-dir", tmp_path)
    decayed, undecayed = torch.load(tmp_path / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    model = CLIP.load(tmp_path / "last.pt")
    vectors = [name for name, p in model.named_parameters() if p.ndim < 2]
    assert len(undecayed["params"]) == len(vectors) + 1
    assert decayed["weight_decay"] == 0.5 and undecayed["weight_decay"] == 0


@pytest.mark.parametrize("name, own, chosen", [("cuda:1", "0", 1), ("cuda", "3", 3), ("cpu", "0", None)])
def test_the_gpu_that_is_named_becomes_the_current_one(monkeypatch, name, own, chosen):
    current = []

    class Torch:
        device = torch.device

        class cuda:
            set_device = current.append

        def empty(size, device):
            assert device == torch.device(name)

    monkeypatch.setenv("LOCAL_RANK", own)
    choose = function_of_train("choose_device")
    choose.__globals__.update(os=os, torch=Torch)
    assert choose(name) == torch.device(name) and current == ([] if chosen is None else [chosen])


@pytest.mark.parametrize("given, torchruns", [({}, True), ({"OMP_NUM_THREADS": "1"}, False)])
def test_threads_that_torchrun_set_are_told_from_the_users(monkeypatch, given, torchruns):
    """torchrun is the parent process; what it set is not in the environment that it was started with."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    parent = subprocess.Popen([sys.executable, "-c", "input()"], env={**environment, **given}, stdin=subprocess.PIPE)
    monkeypatch.setattr(os, "getppid", lambda: parent.pid)
    ask = function_of_train("torchrun_set_threads")
    ask.__globals__["os"] = os
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert not ask()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert ask() == torchruns
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert not ask()
    parent.communicate(b"\n")


# ------------------------------------------------------------------------------------------------- switches

def test_frozen_weights_stay(tmp_path):
    run("train.py", *SMALL, "--steps", 2, "--out-dir", tmp_path / "a")
    init = ["--preset", "nano", "--init", tmp_path / "a" / "last.pt", "--steps", 2]
    before = weights(tmp_path / "a")
    run("train.py", *SMALL, *init, "--freeze", "visual", "--out-dir", tmp_path / "b")
    after = weights(tmp_path / "b")
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved and not any(k.startswith("visual") for k in moved) and "text.norm.weight" in moved


@pytest.mark.slow
def test_average_of_the_weights(tmp_path):
    """--ema: each step the average moves by 1 - decay towards the weights, and it is evaluated beside them."""
    base = [*SMALL, "--dtype", "float64", "--warmup", 1]
    run("train.py", *base, *SCENES, "--steps", 2, "--ema", 0.75, "--save-every", 1, "--keep", 3, "--out-dir", tmp_path / "a")
    w2, ema = weights(tmp_path / "a"), torch.load(tmp_path / "a" / "ema.pt")["model"]
    first = torch.load(tmp_path / "a" / "step_00000001.pt")["teacher"]
    for name in w2:
        torch.testing.assert_close(ema[name], 0.75 * first[name] + 0.25 * w2[name])
    assert any(not torch.equal(first[name], ema[name]) for name in w2)
    rows = [r for r in map(json.loads, open(tmp_path / "a" / "log.jsonl")) if "eval" in r]
    assert list(rows[-1]["eval"]) == ["scenes", "ema scenes"]


def test_gradient_checkpointing_changes_nothing(exact, tmp_path):
    run("train.py", *SMALL, *EXACT, "--grad-checkpointing", "--out-dir", tmp_path)
    assert curve(tmp_path) == pytest.approx(curve(exact()), rel=1e-12)


def test_a_dry_run_trains_nothing(tmp_path):
    done = run("train.py", *SMALL, "--dry-run", "--out-dir", tmp_path)
    assert "dry run: 32 rows read, 0 bad" in done.stdout and "Nothing was trained" in done.stdout
    assert not list(tmp_path.iterdir())


def test_only_the_nano_models_begin_from_nothing_unasked(tmp_path):
    done = run("train.py", *SMALL, "--world", "many", "--model", "nano-48", "--dry-run", "--out-dir", tmp_path)
    assert done.stdout.startswith("nano-48, ") and "float32" in done.stdout
    line = mistake("--model", "micro", "--out-dir", tmp_path)
    assert "no released weights are known for model micro" in line and "--init scratch" in line


def test_the_log_says_what_ran(whole):
    rows = [json.loads(line) for line in open(whole[0] / "log.jsonl")]
    assert {"args", "config", "commit", "versions", "world_size"} <= rows[0].keys()
    assert {"loss", "grad_norm", "lr", "logit_scale", "logit_bias", "images_per_second", "waiting", "peak_mib"} <= next(
        r for r in rows if "loss" in r).keys()
    assert (whole[0] / "best.pt").exists()


# ------------------------------------------------------------------------------------------------- real pairs

def pairs(folder, good, bad):
    for i in range(good):
        Image.new("RGB", (40, 36), (7 * i % 256, 90, 255 - i)).save(folder / f"{i}.png")
    with open(folder / "pairs.csv", "w") as f:
        f.write("image,caption\n" + "".join(f"{i}.png,a picture of a wall number {i}\n" for i in range(good))
                + "".join(f"missing{i}.png,a wall\n" for i in range(bad)))
    return ["--data", folder / "pairs.csv", "--image-root", folder, "--epochs", "1", "--batch-size", "16"]


def test_dry_run_refuses_what_the_run_would(tmp_path):
    """Bad rows, and not the folder of another run, which it leaves alone. Captions that are cut are counted."""
    args = pairs(tmp_path, 12, 4)
    (tmp_path / "last.pt").write_bytes(b"another run")
    line = mistake(*args, "--dry-run", "--out-dir", tmp_path)
    assert "4 of 16 rows could not be read, more than --max-bad 0.01" in line
    text = (tmp_path / "pairs.csv").read_text().replace(",a wall\n", "," + 20 * "a red wall and " + "a door\n")
    (tmp_path / "pairs.csv").write_text(text)
    done = run("train.py", *args, "--dry-run", "--max-bad", 1, "--out-dir", tmp_path)
    assert "4 of the first 16 captions are cut at the model's 16 tokens" in done.stdout
    assert (tmp_path / "last.pt").read_bytes() == b"another run" and not (tmp_path / "log.jsonl").exists()


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


def test_a_batch_without_any_row_ends_training(tmp_path):
    """However many bad rows are allowed: there is nothing to take a step on."""
    done = run("train.py", *pairs(tmp_path, 0, 16), "--max-bad", 1, "--out-dir", tmp_path / "out", check=False)
    assert done.returncode == 1 and "no row could be read of the 16 of a batch that process 0 has" in done.stderr


def test_what_is_done_is_saved_before_bad_rows_end_training(tmp_path):
    args = pairs(tmp_path, 32, 0)
    for i in range(32):     # read one by one, in an order that is not that of the file
        if i % 4 == 0:
            (tmp_path / f"{i}.png").write_bytes(b"no image")
    done = run("train.py", *args, "--batch-size", 4, "--max-bad", 0.12, "--out-dir", tmp_path / "out", check=False)
    assert done.returncode == 1 and "more than --max-bad 0.12" in done.stderr
    saved = torch.load(tmp_path / "out" / "last.pt", weights_only=True)["step"]
    assert f"Saved step {saved}: go on with --resume auto" in done.stderr and saved > 0


def test_rows_that_a_file_has_lost_count_as_bad(tmp_path):
    args = pairs(tmp_path, 20, 0)
    rows = [json.dumps({"image": f"{i}.png", "caption": f"a wall number {i}"}) for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("\n".join([*rows[:9], '{"image": ', *rows[9:], "[1, 2]"]) + "\n")
    args[1] = tmp_path / "pairs.jsonl"
    done = run("train.py", *args, "--out-dir", tmp_path / "out", check=False)
    assert done.returncode == 1 and "2 of 22 rows could not be read, more than --max-bad 0.01" in done.stderr
    assert "the first is" in done.stderr and not (tmp_path / "out" / "last.pt").exists()
    done = run("train.py", *args, "--max-bad", "0.2", "--out-dir", tmp_path / "out")
    assert done.stdout.count("(2 in all)") == 2 and "2 rows were skipped" in done.stdout


def test_images_of_too_many_pixels_are_bad_rows(tmp_path):
    args = pairs(tmp_path, 20, 0)
    Image.new("RGB", (80, 70)).save(tmp_path / "3.png")
    done = run("train.py", *args, "--max-pixels", 2000, "--max-bad", "0.2", "--batch-size", 20, "--out-dir", tmp_path / "out")
    assert "skipped 3.png (row 4): 80 x 70 pixels are more than --max-pixels 2000" in done.stdout + done.stderr
    assert "1 rows were skipped" in done.stdout


def test_exact_decoding_differs_by_a_little(tmp_path):
    """JPEGs alone: the pixels differ by less than a level on average, and so the loss hardly does."""
    rng, losses = random.Random(0), {}
    for i in range(16):
        picture = Image.new("RGB", (90, 70))
        picture.putdata([(rng.randrange(256), 9 * i, (x * i) % 256) for x in range(90 * 70)])
        picture.resize((300, 260)).save(tmp_path / f"{i}.jpg")
    lines = [f"{i}.jpg,a picture of a wall number {i}" for i in range(16)]
    (tmp_path / "jpegs.csv").write_text("\n".join(["image,caption", *lines]))
    args = ["--data", tmp_path / "jpegs.csv", "--image-root", tmp_path, "--preset", "nano", "--batch-size", 16, "--steps", 1]
    for flags in ([], ["--exact-decode"]):
        run("train.py", *SMALL, *args, *flags, "--out-dir", tmp_path / f"out{len(flags)}")
        losses[len(flags)] = curve(tmp_path / f"out{len(flags)}")
    assert losses[0] == pytest.approx(losses[1], rel=0.01) and losses[0] != losses[1]


# ------------------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("script, args, status, says", [
    ("train.py", ["--model", "ViT-B-31"], 2, "invalid choice: 'ViT-B-31' (choose from"),
    ("train.py", ["--batch-size", "0"], 2, "--batch-size 0: expected a number above 0"),
    ("train.py", ["--lr", "nan"], 2, "--lr nan: expected a number above 0"),
    ("train.py", ["--weight-decay", "nan"], 2, "--weight-decay nan: expected a number"),
    ("train.py", ["--epochs", "1", "--steps", "3"], 2, "--steps and --epochs are two ways to say how long"),
    ("train.py", ["--init", "ViT-B-32"], 2, "--init ViT-B-32 is the name of a model: give --model ViT-B-32"),
    ("train.py", ["--batchsize", "3"], 2, "unrecognized arguments: --batchsize"),
    ("train.py", ["--data", "none.csv"], 1, "no file none.csv"),
    ("train.py", ["--data", ""], 2, "--data is empty, as where a variable of the shell is not set"),
    ("train.py", ["--val-data", ""], 2, "--val-data is empty"),
    ("train.py", ["--data", "README.md"], 1, "expected a .csv, .tsv or .jsonl"),
    ("train.py", ["--resume", "none.pt"], 1, "no checkpoint at none.pt"),
    ("train.py", ["--tokenizer", "none.json"], 1, "none.json"),
    ("train.py", ["--steps", "40", "--lr", "1e12", "--warmup", "1"], 1, "last good checkpoint"),
    ("train.py", ["--replay", "x.csv"], 2, "--method c2lip has no use for it"),
    ("train.py", ["--method", "gift", "--cd-weight", "0", "--ita-weight", "0"], 2, "give one of them a weight above 0"),
    ("train.py", ["--xac-weight", "-1"], 2, "--xac-weight -1: expected a number of at least 0"),
    ("train.py", ["--cmr-weight", "0.2"], 2, "--cmr-weight 0.2: --method c2lip has no such term. It takes caption_xac,"),
    ("train.py", ["--caption-xac-weight", "1", "--caption-xac-sentences", "-2"], 2, "--caption-xac-sentences -2: expected a number"),
    ("train.py", ["--caption-xac-sentences", "2"], 2, "--caption-xac-sentences 2: sentences are for the term"),
    ("train.py", ["--attack-steps", "0"], 2, "--attack-steps 0: expected a number above 0"),
    ("train.py", ["--beta2", "1.5"], 2, "--beta2 1.5: expected a number from 0 to 0.99999"),
    ("train.py", ["--grad-clip", "0"], 2, "--grad-clip 0.0: expected a number above 0"),
    ("train.py", ["--seed", str(2**64)], 2, f"--seed {2**64}: expected a number from 0 to 4294967295"),
    ("train.py", ["--max-pixels", "0"], 2, "--max-pixels 0: expected a number above 0"),
    ("train.py", ["--captions", "x.csv"], 2, "--captions x.csv is for the images of --data: give both"),
    ("train.py", ["--caption-key", "title"], 2, "--caption-key title is for files, and scenes are drawn: give --data"),
    ("train.py", ["--data", "x.csv", "--world", "large"], 2, "--world large is for scenes, not for --data"),
    ("train.py", ["--bench", "none", "--val-data", "x.csv"], 2, "--bench none evaluates nothing, and --val-data is"),
    ("train.py", ["--bench", "retrieval"], 1, "--data is missing"),
    ("evaluate.py", [], 1, "give what to evaluate"),
    ("evaluate.py", ["--checkpoint", "x.pt", "--bench", "sugarcrape"], 1, "no bench 'sugarcrape': expected"),
    ("evaluate.py", ["--checkpoint", "README.md"], 1, "README.md holds no readable weights"),
])
def test_mistakes_get_one_line(tmp_path, script, args, status, says):
    extra = ["--out-dir", tmp_path] if script == "train.py" else []
    done = run(script, *args, *extra, check=False)
    message = [line for line in done.stderr.splitlines() if says in line]
    assert done.returncode == status and message and "Traceback" not in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) <= (1 if status == 1 else 2), done.stderr


def test_help_does_not_import_torch():
    """Below two seconds, and complete: each argument has a sentence, each term of the losses its own."""
    command = [sys.executable, "-X", "importtime", "train.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    imported = [line.split("|")[-1].strip() for line in done.stderr.splitlines()]
    assert done.returncode == 0 and not {"torch", "timm", "torchvision", "numpy"} & set(imported)
    for term, text in TERMS.items():
        assert f"--{term.replace('_', '-')}-weight" in done.stdout and text[:20] in " ".join(done.stdout.split())
    assert all(name in done.stdout for name in METHODS)
    shown = " ".join(done.stdout.split())
    assert "lr 0.002" in shown and "batch-size 768" in shown


def test_world_size_without_torchrun(tmp_path):
    line = mistake("--out-dir", tmp_path, WORLD_SIZE="2")
    assert "WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set" in line


def test_not_on_a_terminal_there_is_a_line_a_log_interval(whole):
    process, (folder, stdout) = run("train.py", *SMALL, "--steps", 3, "--out-dir", str(whole[0]) + "-b"), whole
    assert "\r" not in stdout + process.stdout + process.stderr and process.stderr == ""
    assert sum(line.startswith("step ") and "img/s" in line for line in process.stdout.splitlines()) == 3


def test_on_a_terminal_an_error_stands_on_a_line_of_its_own(tmp_path):
    leader, follower = pty.openpty()
    command = [sys.executable, "train.py", *map(str, pairs(tmp_path, 32, 3)), "--out-dir", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=follower, stderr=follower)
    os.close(follower)
    output = b""
    with contextlib.suppress(OSError):      # at its end
        while part := os.read(leader, 1000):
            output += part
    assert process.wait() == 1
    lines = [line for line in output.decode().replace("\r", "\n").splitlines() if "more than --max-bad" in line]
    assert len(lines) == 1 and lines[0].startswith("train.py: ")


@pytest.mark.slow
def test_what_to_do_next_repeats_the_own_arguments(tmp_path):
    args = [*pairs(tmp_path, 32, 0), "--out-dir", tmp_path / "my out", "--val-data", tmp_path / "pairs.csv"]
    done = run("train.py", *args)
    lines = done.stdout[done.stdout.index("next: "):].splitlines()
    assert f"--method siglip --data {tmp_path}/pairs.csv" in lines[0] and "my out-plain'" in lines[0]
    assert all(f"{tmp_path}/my out" in line for line in lines) and len(lines) == 5
    for line in lines[1:3]:     # the commands run as they stand
        command = shlex.split(line, comments=True)
        done = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, env={**ENV, "MPLBACKEND": "agg"},
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    os.remove(os.path.join(ROOT, "curves.png"))


def test_held_out_pairs_may_have_other_columns_and_folders(tmp_path):
    data = pairs(tmp_path, 32, 0)
    (tmp_path / "held").mkdir()
    for i in range(4):
        (tmp_path / f"{i}.png").rename(tmp_path / "held" / f"v{i}.png")
    (tmp_path / "val.tsv").write_text("picture\twords\n" + "".join(f"v{i}.png\ta wall\n" for i in range(4)))
    done = run("train.py", *data, "--max-bad", 0.5, "--val-data", tmp_path / "val.tsv", "--val-image-root",
               tmp_path / "held", "--val-image-key", "picture", "--val-caption-key", "words", "--out-dir",
               tmp_path / "out")
    assert "t2i_r1" in done.stdout


def test_columns_of_held_out_pairs_are_named_by_their_own_flags(tmp_path):
    data = pairs(tmp_path, 32, 0)
    (tmp_path / "val.csv").write_text("picture,words\n0.png,a wall\n")
    line = mistake(*data, "--val-data", tmp_path / "val.csv", "--out-dir", tmp_path / "out")
    assert line.startswith("train.py: --val-data: ") and "--val-image-key, --val-caption-key" in line


def test_lost_rows_count_against_max_bad(tmp_path):
    args = pairs(tmp_path, 40, 0)
    text = (tmp_path / "pairs.csv").read_text()
    (tmp_path / "pairs.csv").write_text(text + "0.png,\n1.png,\n")
    assert "2 of 42 rows could not be read, more than --max-bad 0.01" in mistake(*args, "--out-dir", tmp_path / "o")
    done = run("train.py", *args, "--max-bad", 0.1, "--bench", "none", "--out-dir", tmp_path / "o")
    assert "2 rows were skipped" in done.stdout


def test_checkpoint_of_another_architecture(whole, tmp_path):
    done = run("train.py", "--model", "ViT-B-32", "--resume", whole[0] / "last.pt", "--out-dir", tmp_path, check=False)
    assert done.returncode == 1 and "holds a nano, but --model is ViT-B-32" in done.stderr


def test_batch_larger_than_the_data(tmp_path):
    done = run("train.py", *pairs(tmp_path, 8, 0), "--out-dir", tmp_path / "out", check=False)
    assert done.returncode == 1 and "--batch-size 16 is more than the 8 rows" in done.stderr


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_run_with_workers_ends_by_itself(tmp_path, more):
    done = run("train.py", *SMALL, "--steps", "2", "--workers", "1", "--bench", "none", *more,
               "--out-dir", tmp_path)
    assert ("Nothing was trained" if more else "2 steps in") in done.stdout
