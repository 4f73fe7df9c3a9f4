"""What the README shows, as a reader would try it: every command in a copy without tests/, and the loop of ten lines."""
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from test_files import FILES, ROOT, copy

README = (ROOT / "README.md").read_text("utf-8")


def blocks(language):
    """The texts of README's fenced blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


# ------------------------------------------------------------------------------------------------- the loop of ten lines

# What a stranger has of his own: images as features and patch tokens of some tower, captions, a tokenizer, a text
# tower. The README's lines stand in the middle, and must end in `loss`.
STRANGER = '''
import torch
from torch.nn.functional import normalize
from concepts import extract_batch, index_phrases
from losses import concept_columns, npc_loss, siglip_loss, xac_loss
from pooling import concept_similarity

torch.manual_seed(0)
captions = ["A cat sits on a red mat.", "a red mat and a dog", "Two birds over the old house.", "The dog runs."]
words = sorted({word for caption in captions for word in caption.lower().strip(".").split()})


def tokenize(texts):
    """Bags of words: counts (N, W)."""
    split = [text.lower().strip(".").split() for text in texts]
    return torch.tensor([[float(row.count(word)) for word in words] for row in split])


text_tower = torch.nn.Linear(len(words), 16)
image_tower = torch.nn.Linear(12, 16)
raw_images, raw_patches = torch.randn(4, 12), torch.randn(4, 9, 12)
scale, bias = torch.nn.Parameter(torch.tensor(5.0)), torch.nn.Parameter(torch.tensor(-5.0))
optimizer = torch.optim.SGD([*text_tower.parameters(), *image_tower.parameters(), scale, bias], lr=0.05)
found = []
for step in range(6):
    images = normalize(image_tower(raw_images), dim=-1)                 # (B, D)
    patch_tokens = normalize(image_tower(raw_patches), dim=-1)          # (B, T, D)
    texts = normalize(text_tower(tokenize(captions)), dim=-1)           # (B, D)
    # -- the README's lines --
    found.append(loss.item())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
assert all(later < earlier for earlier, later in zip(found, found[1:])), found
print(found)
'''


def test_ten_lines_in_a_loop_of_ones_own(tmp_path):
    """Only pooling.py, losses.py and concepts.py with its assets are copied; five steps, and each lowers the loss."""
    shown = [block for block in blocks("python") if "index_phrases(" in block]
    assert len(shown) == 1, "README shows the loop once, with index_phrases"
    copy(tmp_path, "pooling.py", "losses.py", "concepts.py")
    lines = "".join(f"    {line}\n" for line in shown[0].splitlines())
    (tmp_path / "loop.py").write_text(STRANGER.replace("    # -- the README's lines --\n", lines))
    done = subprocess.run([sys.executable, "loop.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_python_blocks_can_be_parsed():
    for block in blocks("python"):
        compile(block, "README.md", "exec")


# ------------------------------------------------------------------------------------------------- commands

# The commands run in bash as they stand, but what they call is replaced by this: python and torchrun call the script
# with flags that shorten it, and what needs a network does nothing. Files that the README only names get a stand-in.
SHORTENED = '''#!{python}
import os
import re
import sys

TRAIN = """--model nano --preset nano --steps 2 --batch-size 8 --warmup 1 --eval-every 0 --workers 0 --device cpu
           --dtype float32 --no-compile""".split()
STAND_INS = {{".pt": "out/nano/last.pt", ".jsonl": "out/nano/log.jsonl", ".json": "stand_in.json",
             ".csv": "pairs.csv", ".tar": "pairs.csv", ".txt": "captions.txt", ".jpg": "images/0.png"}}
OUTPUTS = ("--output", "--json", "--out-dir", "--bench", "--model", "--method")


def stand_in(flag, value):
    """A file that is there, for one that is not; a hub id becomes a checkpoint."""
    if flag in OUTPUTS or any(map(os.path.exists, value.split(","))):
        return value
    if flag == "--init" and value != "scratch":
        return STAND_INS[".pt"]
    if flag == "--checkpoint":
        return ",".join(STAND_INS[".pt"] for _ in value.split(","))
    if flag in ("--data", "--val-data", "--captions"):
        return STAND_INS[".csv"]
    if flag == "--image-root":
        return "images"
    if flag == "--image":
        return STAND_INS[".jpg"]
    ending = os.path.splitext(value)[1]
    return STAND_INS.get(ending, value) if flag == "" else value


def shorten(name, args):
    """The arguments to run, or None for what cannot run here."""
    if name in ("pip", "npm", "git", "tar", "cd", "hf", "export"):
        return None
    while args and args[0] != "-c" and not args[0].endswith(".py"):     # torchrun's own flags; python -m pytest
        args = args[1:]
    if not args or "download" in args[1:2]:
        return None
    script, *given = args
    flag, found = "", []
    for arg in given:
        found.append(arg if arg.startswith("-") else stand_in(flag, arg))
        flag = arg if arg.startswith("--") else "" if flag == "" else flag
    if script == "train.py":
        found += TRAIN
        for name in ("--captions", "--caption-key"):    # of another table's columns
            if name in found:
                place = found.index(name)
                found[place:place + 2] = []
        if "--data" in given:
            found += ["--data", "pairs.csv", "--image-root", "images"]
        if "--init" not in given:
            found += ["--init", "scratch"]
        if "--resume" not in given:
            found += ["--overwrite"]                        # shortened, all write into few folders
    words = ("download", "compare", "describe", "plot", "show")
    if script == "evaluate.py" and given[0] not in (*words, "--help", "-h"):
        benches = given[given.index("--bench") + 1].split(",") if "--bench" in given else ["scenes"]
        if not set(benches) <= {{"scenes", "retrieval"}}:
            found += ["--bench", "scenes"]
        if "--init" in given:
            found += ["--model", "nano"]
        found += ["--device", "cpu"]
    return [script, *found]


args = shorten(os.path.basename(sys.argv[0]), sys.argv[1:])
with open("commands.log", "a") as f:
    f.write(" ".join([*sys.argv[:1], *map(repr, sys.argv[1:]), "->", repr(args)]) + chr(10))
if args:
    os.execv({python!r}, [{python!r}, *args])
'''
TOOLS = ("python", "torchrun", "pip", "npm", "git", "tar", "hf")


def commands(block):
    """The lines of a block that are typed: those behind "$ ", if there are any."""
    typed = re.findall(r"^\$ ((?:.*\\\n)*.*\n)", block, re.M)
    return "".join(typed) or block


@pytest.fixture
def project(tmp_path):
    """A copy without tests/, the inputs that the README speaks of, and tools that shorten."""
    copy(tmp_path, *FILES, "README.md")
    for path in (ROOT / "assets").iterdir():
        if path.is_file():
            (tmp_path / "assets" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "images").mkdir()
    rng, rows = random.Random(0), []
    for i in range(12):
        Image.frombytes("RGB", (5, 5), rng.randbytes(75)).resize((40, 40)).save(tmp_path / "images" / f"{i}.png")
        rows.append(f"{i}.png,a {('red', 'blue', 'green')[i % 3]} wall and {i} windows\n")
    (tmp_path / "pairs.csv").write_text("image,caption\n" + "".join(rows))
    (tmp_path / "captions.txt").write_text("A cat sits on a mat.\nA dog\n")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in TOOLS:
        (tools / name).write_text(SHORTENED.format(python=sys.executable))
        (tools / name).chmod(0o755)
    return tmp_path


def test_every_command_works_without_tests(project):
    """Each block of sh in order; a command that fails fails its block."""
    environment = {**os.environ, "PATH": f"{project / 'tools'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
                   "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

    def bash(text):
        return subprocess.run(["bash", "-euo", "pipefail", "-c", text], cwd=project, env=environment,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True)

    done = bash("python train.py --out-dir out/nano && python evaluate.py --checkpoint out/nano/last.pt "
                "--json stand_in.json")
    assert done.returncode == 0, done.stderr
    failed = []
    for block in blocks("sh"):
        done = bash(commands(block))
        if done.returncode:
            failed.append(f"{commands(block)}\n{done.stderr[-800:]}")
    log = (project / "commands.log").read_text()
    assert not failed, "\n\n".join(failed)
    assert log.count("train.py") > 3 and log.count("evaluate.py") > 3, log


def test_commands_name_nothing_in_tests():
    """But for the tests themselves."""
    for block in blocks("sh"):
        for line in block.splitlines():
            if "pytest" not in line and "tests/requirements.txt" not in line:
                assert "tests/" not in line, line


def test_python_blocks_import_our_names():
    """A block that calls a class or function of ours shows where it comes from."""
    ours = {"CLIP": "model", "extract_batch": "concepts", "npc_loss": "losses", "concept_similarity": "pooling"}
    for block in blocks("python"):
        for name, file in ours.items():
            if re.search(rf"\b{name}\b", block):
                assert re.search(rf"^from {file} import .*\b{name}\b", block, re.M), f"{name}\n{block}"
