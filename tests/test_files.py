"""The house: what each file may import, that it can be copied out alone, and that it stays readable."""
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = ("model.py", "pooling.py", "concepts.py", "losses.py", "data.py", "train.py", "evaluate.py")
TOP = {*FILES, "README.md", "LICENSE", "requirements.txt", ".gitignore", ".ci", "assets", "tests"}


# ------------------------------------------------------------------------------------------------- imports

# Of our own files; imports run one way, and the first four import none.
OURS = {
    "pooling.py": set(),
    "concepts.py": set(),
    "losses.py": set(),
    "model.py": set(),
    "data.py": {"concepts", "model"},
    "evaluate.py": {"concepts", "data", "losses", "model", "pooling"},
    "train.py": {"concepts", "data", "evaluate", "losses", "model", "pooling"},
}
# Of packages, for the files that a stranger copies; of the others, whatever stands in requirements.txt.
PACKAGES = {
    "pooling.py": {"torch"},
    "losses.py": {"torch"},
    "concepts.py": {"nltk", "numpy", "torch", "tqdm"},
}
INSTALLED_AS = {"PIL": "pillow"}
OPTIONAL = {"matplotlib", "tensorboard", "open_clip", "datasets"}        # imported where they are used, with a line on how to install them


def imports(name):
    """Names of the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names)


def required():
    """Names of the packages in requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    return {re.match(r"[\w-]+", line)[0] for line in lines if re.match(r"\w", line)}


@pytest.mark.parametrize("name", FILES)
def test_imports_run_one_way(name):
    ours = {file.removesuffix(".py") for file in FILES}
    found = imports(name)
    assert found & ours <= OURS[name]
    packages = {INSTALLED_AS.get(package, package) for package in found - ours}
    assert packages <= required() | OPTIONAL, "each package that is imported stands in requirements.txt"
    if name in PACKAGES:
        assert packages <= PACKAGES[name]


def test_packages_are_needed():
    """pytest runs the tests; everything else in requirements.txt is imported somewhere."""
    found = set().union(*(imports(name) for name in FILES))
    assert required() - {"pytest"} <= {INSTALLED_AS.get(package, package) for package in found}


def test_nothing_else_stands_at_the_top():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("no git repository here")
    assert {path.split("/")[0] for path in listed.stdout.splitlines()} <= TOP


# ------------------------------------------------------------------------------------------------- copied alone

USES = {
    "pooling.py": """
        import torch
        from pooling import concept_pool, concept_similarity
        v, p = torch.randn(2, 5, 8), torch.randn(3, 8)
        assert concept_pool(v, p).shape == (2, 3, 8) and concept_similarity(v, p).shape == (2, 3)
        """,
    "losses.py": """
        import torch
        from losses import clip_loss, siglip_loss
        x = torch.eye(4)
        assert siglip_loss(x, x, torch.tensor(10.), torch.tensor(-5.)) > 0 and clip_loss(x, x, 10.) > 0
        """,
    "concepts.py": """
        from concepts import extract, index_phrases
        assert extract('A cat sits on a mat.') == ['A cat', 'a mat']
        phrases, ids, pairs = index_phrases([['A cat', 'a mat'], ['a cat']])
        assert len(phrases) == len(ids) and pairs[:, 0].tolist() == [0, 0, 1]
        """,
    # it knows all named models, without any file beside it
    "model.py": """
        import torch
        from model import CLIP, MODELS, SOURCES
        m = CLIP(MODELS['nano'])
        assert m.encode_image(torch.zeros(2, 3, 32, 32)).shape == (2, 96)
        assert len(MODELS) > 20 and 'ViT-B-16-SigLIP' in MODELS and 'ViT-B-16-SigLIP' in SOURCES
        """,
}
ASSETS = {"concepts.py": ("lexicon.json", "tagger.json.gz")}


def copy(folder, *names):
    """Copy files of the project, with the assets that they need."""
    for name in names:
        (folder / name).write_bytes((ROOT / name).read_bytes())
        for asset in ASSETS.get(name, ()):
            (folder / "assets").mkdir(exist_ok=True)
            (folder / "assets" / asset).write_bytes((ROOT / "assets" / asset).read_bytes())


def unindented(text):
    return "\n".join(line.strip() for line in text.splitlines())


@pytest.mark.parametrize("name", USES)
def test_copied_alone(name, tmp_path):
    copy(tmp_path, name)
    done = subprocess.run([sys.executable, "-c", unindented(USES[name])], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------- a method of one's own

TOY = '''
def toy(features):
    """Cosine distance of each image to its own caption; nothing is contrasted."""
    rows = torch.arange(len(features.image_features), device=features.image_features.device)
    own = features.text_features[features.offset + rows]                # (b, D)
    distance = 1 - (features.image_features * own).sum(-1)              # (b,)
    return {"contrastive": distance.sum() / len(features.text_features)}


'''


def test_a_method_is_one_function_and_one_row(tmp_path):
    """Two edits in losses.py, and train.py trains it: it is a choice of --method, with its terms in the log."""
    copy(tmp_path, *FILES)
    if not (tmp_path / "assets").exists():
        (tmp_path / "assets").mkdir()
    for path in (ROOT / "assets").glob("*.json"):
        (tmp_path / "assets" / path.name).write_bytes(path.read_bytes())
    text = (tmp_path / "losses.py").read_text("utf-8")
    assert text.count("\nMETHODS = {\n") == 1
    text = text.replace("\nMETHODS = {\n", TOY + '\nMETHODS = {\n    "toy": Method(toy),\n')
    (tmp_path / "losses.py").write_text(text, "utf-8")
    done = subprocess.run([sys.executable, "train.py", "--method", "toy", "--steps", "2", "--batch-size", "8",
                           "--log-every", "1", "--eval-every", "0", "--dtype", "float64", "--out-dir", "out"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2 and 0 < losses[0] < 2 and losses[1] < losses[0]
    assert all("npc" not in row and "xac" not in row for row in rows)


# ------------------------------------------------------------------------------------------------- readability

# Calls, subscripts, operators, comprehensions, lambdas and conditional expressions for each line of code. nanoGPT and
# nanochat lie at 1.1 to 1.4; losses.py and pooling.py are formulas.
MOST_ON_A_LINE = {"concepts.py": 1.8, "losses.py": 2.0, "pooling.py": 2.0}
MOST_COMPREHENSIONS = 8         # for each 100 lines of code
MOST_BRANCHES = 15              # of a function: if, elif, for, while, except, conditional expressions, ...
LONGEST_FUNCTION = 60           # lines
WIDEST_LINE = 100               # columns

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DENSE = (*COMPREHENSIONS, ast.Call, ast.Subscript, ast.BinOp, ast.BoolOp, ast.Compare, ast.UnaryOp, ast.IfExp,
         ast.Lambda, ast.NamedExpr, ast.Starred, ast.JoinedStr)
BRANCHES = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.IfExp, ast.comprehension, ast.Match)


def is_text(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def code_lines(nodes):
    """How many lines hold code: no blank lines, comments or docstrings."""
    docstrings, lines = set(), set()
    for node in nodes:
        if is_text(node):
            docstrings.update(range(node.lineno, node.end_lineno + 1))
        if hasattr(node, "lineno"):
            lines.update((node.lineno, node.end_lineno))
    return len(lines - docstrings)


@pytest.fixture(params=FILES)
def source(request):
    """(name of a file, its text, all nodes of its syntax tree)."""
    text = (ROOT / request.param).read_text("utf-8")
    return request.param, text, list(ast.walk(ast.parse(text)))


def count(nodes, kinds):
    return sum(isinstance(node, kinds) for node in nodes)


def test_a_line_asks_little_of_its_reader(source):
    name, text, nodes = source
    lines = code_lines(nodes)
    assert count(nodes, DENSE) / lines <= MOST_ON_A_LINE.get(name, 1.5)
    assert 100 * count(nodes, COMPREHENSIONS) / lines <= MOST_COMPREHENSIONS


def test_lines_are_narrow(source):
    name, text, nodes = source
    assert [line for line in text.splitlines() if len(line) > WIDEST_LINE] == []


def test_a_function_fits_a_screen(source):
    name, text, nodes = source
    functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = [f.name for f in functions if f.end_lineno - f.lineno + 1 > LONGEST_FUNCTION]
    branching = [f.name for f in functions if count(ast.walk(f), BRANCHES) > MOST_BRANCHES]
    assert (long, branching) == ([], [])


def test_one_thing_a_line(source):
    """No expression where a statement belongs, none with two loops or two conditions, no table of lambdas."""
    name, text, nodes = source
    wrong = []
    for node in nodes:
        if isinstance(node, ast.Expr) and isinstance(node.value, (ast.IfExp, ast.BoolOp, *COMPREHENSIONS)):
            wrong.append(f"line {node.lineno}: an expression as a statement")
        if isinstance(node, COMPREHENSIONS):
            if len(node.generators) > 1 or len(node.generators[0].ifs) > 1:
                wrong.append(f"line {node.lineno}: a comprehension with two loops or conditions")
        if isinstance(node, ast.Dict) and count(node.values, ast.Lambda) > 1:
            wrong.append(f"line {node.lineno}: a dict of lambdas")
    assert wrong == []


def is_data(value):
    """Whether a value of json is free of flags and templates: no "--flag", no "$name"."""
    if isinstance(value, dict):
        return all(is_data(key) and is_data(x) for key, x in value.items())
    if isinstance(value, list):
        return all(is_data(x) for x in value)
    return not isinstance(value, str) or not re.match(r"(\$\w*|--[a-z][\w-]*)$", value)


def test_json_holds_data():
    for path in (ROOT / "assets").glob("*.json"):
        content = json.loads(path.read_text("utf-8"))
        if path.name == "lexicon.json":     # words and tags, among them PRP$ and signs
            continue
        assert is_data(content), f"{path.name} holds flags or a template: they belong into Python"


@pytest.mark.parametrize("name", FILES)
def test_nothing_of_the_product_lives_in_tests(name):
    text = (ROOT / name).read_text("utf-8")
    assert not re.search(r"tests/(?!fixtures)\w+\.py|\"tests\"", text)
