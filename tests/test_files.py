"""The house: what each file may import, that it can be copied out alone, and that it stays short."""
import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = ["model.py", "pooling.py", "concepts.py", "losses.py", "data.py", "train.py", "evaluate.py"]
USES = {
    "pooling.py": "from pooling import concept_pool, concept_similarity\nimport torch\n"
                  "v, p = torch.randn(2, 5, 8), torch.randn(3, 8)\n"
                  "assert concept_pool(v, p).shape == (2, 3, 8) and concept_similarity(v, p).shape == (2, 3)",
    "losses.py": "from losses import siglip_loss, clip_loss\nimport torch\nx = torch.eye(4)\n"
                 "assert siglip_loss(x, x, torch.tensor(10.), torch.tensor(-5.)) > 0 and clip_loss(x, x, 10.) > 0",
    "concepts.py": "from concepts import extract\nassert extract('A cat sits on a mat.') == ['A cat', 'a mat']",
    "model.py": "from model import CLIP, MODELS\nimport torch\nm = CLIP(MODELS['nano'])\n"
                "assert m.encode_image(torch.zeros(2, 3, 32, 32)).shape == (2, 96)",
}
ALLOWED = {"pooling.py": {"torch"}, "losses.py": {"torch"}, "concepts.py": {"nltk", "numpy"}}


def imports(name):
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", FILES)
def test_imports_run_one_way(name):
    found = set(imports(name))
    ours = {file[:-3] for file in FILES}
    if name in USES:
        assert not found & ours, "this file is copied alone into other projects"
    if name in ALLOWED:
        assert found - set(sys.stdlib_module_names) <= ALLOWED[name]


@pytest.mark.parametrize("name", USES)
def test_copied_alone(name, tmp_path):
    (tmp_path / name).write_text((ROOT / name).read_text())
    if name == "concepts.py":       # with its weights and lexicon
        (tmp_path / "assets").mkdir()
        for file in (ROOT / "assets").glob("*.json*"):
            (tmp_path / "assets" / file.name).write_bytes(file.read_bytes())
    subprocess.run([sys.executable, "-c", USES[name]], cwd=tmp_path, check=True)


def test_readable_in_one_sitting():
    lines = {name: (ROOT / name).read_text().splitlines() for name in FILES}
    assert sum(map(len, lines.values())) < 3000
    assert max(map(len, lines.values())) <= 600
    assert max(len(line) for text in lines.values() for line in text) <= 120
