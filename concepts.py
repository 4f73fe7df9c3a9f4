"""Captions -> noun-phrase concepts and hard negatives: a perceptron and a lexicon tag words, GRAMMAR finds phrases.

    >>> extract("A cat sits on its hind legs, and swats at the plant.")
    ['A cat', 'its hind legs', 'the plant']
"""
import argparse
import csv
import functools
import gzip
import json
import os
import random
import re
import signal
import sys
import tarfile
import zipfile
from collections import Counter
from itertools import chain, islice, starmap
from multiprocessing import Pool
from pathlib import Path

import numpy as np  # NLTK is imported where it is used: the fast path does without

LEXICON, WEIGHTS = (Path(__file__).resolve().parent / "assets" / x for x in ("lexicon.json", "tagger.json.gz"))
# NLTK's notation: <A|B> is one tag, {...} is what gets the label, and around it stands the context it needs. A line
# sees the labels of those before it. Two ways to read the same tags inside a star would cost exponential time.
NOUN = "<NN|NNS|NNP|NNPS|QN>"
PART = f"(<VBG|VBN|VBD|GN|PX>(?={NOUN}|<JJ|ORG|PX|GN|VBN>))?"
MORE = f"((<,><CC>?|<CC>)(?=<RB>*<JJ|ORG>)|<,|CC><RB>?<VBN|PX>(?={NOUN}))?"
ADJ = f"<RB>*<JJ|ORG>{MORE}"
UNIT = f"({ADJ}{PART}|<RB>+<VBN|PX>(?={NOUN}|<JJ>)|<CD>{PART}|{NOUN}(<PX|GN>(?={NOUN}))?)"
BODY = f"{UNIT}*{NOUN}"
LONE = f"(({ADJ})+|<CD>)"
DET = rf"<PDT>?<DTA|DT|PRP\$>({PART}{BODY}|{LONE}?<ORG|GN|LOC>)|<DTA|PRP\$><JJ>+"
GRAMMAR = rf"""
JJ:  <S|OF|IN|INX|TO|VBG|,|CC>{{<VBN|PX>}}(?=<JJ>|{NOUN})   # next to parked cars
JJ:  <OF|IN|TO>{{<VBG|GN>}}(?={NOUN})                       # in running water
JJ:  <S|DTA|DT|PRP\$|IN|JJ>{{<RB|LOC>}}(?={NOUN})           # a hilly landscape, an outside table
NN:  <PRP\$>{{<RB>}}(?!<JJ|VBN|VBG|PX|RB>)                  # on its back
NN:  <JJ>{{<CD>}}(?!<JJ|CD>|{NOUN})                         # a pink one
NN:  {{<CAN>}}(?!<VB|VBP|RB|PRP>)                           # a trash can
JJ:  {{<JJR|JJS>}}
VBZ: <DTA>{PART}{UNIT}*<NN|NNP>{{<NNS>}}(?!{NOUN})          # a tall man rides
NP:  {{({DET}|{BODY}|{LONE}<GN>|<JJ>*<ORG>)(<POS>{PART}{BODY})*}}
"""
PADS = ["-START-", "-START2-"]  # what a tagger sees before a sentence


class FastTagger:
    """NLTK's PerceptronTagger for many sentences at once: their first words, then their second words, ..."""
    def __init__(self, weights, tagdict, classes):
        self.tags = [*sorted(classes, reverse=True), *PADS]  # argmax takes the first of equals, NLTK the last
        self.fixed = {word: self.tags.index(tag) for word, tag in [*tagdict.items(), *zip(PADS, PADS[::-1])]}
        self.row = {feature: i for i, feature in enumerate(weights, 1)}  # row 0: no such feature
        self.scores = np.array([[row.get(tag, 0) for tag in self.tags[:-2]] for row in ({}, *weights.values())], "f4")
        self.history = np.array([[self.score(f"i-1 tag {p}", f"i-2 tag {q}", f"i tag+i-2 tag {p} {q}").sum(0)
                                  for q in self.tags] for p in self.tags])

    def score(self, *features):
        return self.scores[[self.row.get(feature, 0) for feature in features]]

    @functools.lru_cache(maxsize=1 << 14)  # about a kilobyte each
    def learn(self, word):
        """Of a word: its only tag or -1; rows of scores after each tag; scores for itself and four neighbours."""
        norm = word if word in PADS else word.lower()
        if "-" in word and word[0] != "-":  # as PerceptronTagger.normalize
            norm = "!HYPHEN"
        elif word[0].isdigit():
            norm = "!YEAR" if word.isdigit() and len(word) == 4 else "!DIGITS"
        end = norm.replace("-START", "-END")  # a pad is also behind a sentence
        scores = self.score("bias", "i suffix " + word[-3:], "i pref1 " + word[0], "i word " + norm,
                            "i-1 word " + norm, "i-1 suffix " + norm[-3:], "i-2 word " + norm,
                            "i+1 word " + end, "i+1 suffix " + end[-3:], "i+2 word " + end)
        after = np.array([self.row.get(f"i-1 tag+i word {tag} {norm}", 0) for tag in self.tags])
        return self.fixed.get(word, -1), after, np.add.reduceat(scores, [0, 4, 6, 7, 9])

    def tag_sents(self, sentences):
        """Lists of words -> lists of (word, tag)."""
        words = [word for sentence in sentences for word in (*PADS, *sentence)] + PADS
        index = {word: i for i, word in enumerate(dict.fromkeys(words))}
        tags, after, scores = map(np.array, zip(*map(self.learn, index)))  # of the different words
        words = np.array([index[word] for word in words])
        tags, lengths = tags[words], np.array([len(sentence) for sentence in sentences], int)
        first = np.cumsum(lengths + 2) - lengths
        alone = sum(scores[np.roll(words, -distance), role] for role, distance in enumerate((0, -1, -2, 1, 2)))
        for step in range(max(lengths, default=0)):
            i = first[lengths > step] + step
            i = i[tags[i] < 0]
            score = alone[i] + self.history[tags[i - 1], tags[i - 2]] + self.scores[after[words[i], tags[i - 1]]]
            tags[i] = score.argmax(1)
        names = iter([self.tags[tag] for tag in tags.tolist()])
        return [list(zip([*PADS, *sentence], names))[2:] for sentence in sentences]


class ConceptExtractor:
    """weights: None (ours), "nltk" (its averaged_perceptron_tagger_eng) or a file of train's. Rounded: sums are exact.

    fast: False for NLTK's own tagger and chunker, the same results, slowly. May be pickled and shared by threads.
    Raises ValueError (no such file) or LookupError (NLTK's data is missing)."""
    def __init__(self, weights=None, fast=True):
        if weights == "nltk" or not fast:
            from nltk import PerceptronTagger, RegexpParser
        try:
            self.lexicon = lexicon = json.loads(LEXICON.read_text("utf-8"))
            table, tagdict, classes = (PerceptronTagger().encode_json_obj() if weights == "nltk" else
                                       json.loads(gzip.decompress(Path(weights or WEIGHTS).read_bytes())))
            table = {f: {tag: round(w * 1024) / 1024 for tag, w in row.items()} for f, row in table.items()}
            if not classes or not {*tagdict.values()} <= {*classes} <= {*lexicon["tags"]}:
                raise ValueError("not the tags of the lexicon")
        except (OSError, EOFError, ValueError, TypeError, AttributeError, ArithmeticError, gzip.zlib.error) as e:
            raise ValueError(f"{weights or LEXICON.parent}: {e}; expected assets/ and weights of our train") from None
        self.word, self.lower, self.junk = (re.compile("|".join(lexicon[name])) for name in ("word", "lower", "junk"))
        self.class_of = {word: name for name, words in lexicon["classes"].items() for word in words}
        self.symbol = {tag: chr(0xC0 + i) for i, tag in enumerate(lexicon["tags"])}  # one letter a tag
        self.tag_of = {symbol: tag for tag, symbol in self.symbol.items()}
        if fast:
            self.tagger, self.chunk = FastTagger(table, tagdict, classes), self.fast_chunk
            rules = re.sub("<(.+?)>", lambda m: f"[{''.join(map(self.symbol.get, m[1].split('|')))}]",
                           re.sub(r"[ \\]|#.*", "", GRAMMAR))
            rules = re.sub(r"\((?!\?)", "(?:", rules).replace("{", ")(?P<chunk>").replace("}", ")")
            self.rules = [(label, re.compile("(?P<left>" + rule)) for label, rule in re.findall("(.+?):(.+)", rules)]
        else:
            self.tagger, self.chunk = PerceptronTagger.decode_json_obj((table, tagdict, classes)), self.nltk_chunk
            self.parser = RegexpParser(GRAMMAR)

    def fast_chunk(self, symbols):
        """(symbols, corrected; [(first, end), ...] of noun phrases) by the rules of GRAMMAR."""
        for label, rule in self.rules[:-1]:
            symbols = rule.sub(rf"\g<left>{self.symbol[label]}", symbols)
        return symbols, [m.span("chunk") for m in self.rules[-1][1].finditer(symbols)]

    def nltk_chunk(self, symbols):
        tree = self.parser.parse([(i, self.tag_of[symbol]) for i, symbol in enumerate(symbols)])
        tags = [tag if label in ("S", "NP") else label for (_, tag), label in tree.pos()]
        chunks = [node.leaves() for node in tree.subtrees(lambda node: node.label() == "NP")]
        return "".join(map(self.symbol.get, tags)), [(chunk[0][0], chunk[-1][0] + 1) for chunk in chunks]

    @functools.lru_cache(maxsize=1 << 15)
    def refine(self, word, tag):
        """The symbol of a word's tag: the name of its class, if it has one for such a tag."""
        sign = word[0] in "<&" or not any(map(str.isalnum, word))  # or emoji, markup
        name = self.class_of.get(word.lower(), ":" if sign else "GN" if word.lower().endswith("ing") else "")
        return self.symbol[name if name and tag in self.lexicon["only"].get(name, [tag]) else tag]

    def parse(self, captions):
        """(number of the caption, start, end) and symbol of each word and, before a sentence, S; noun phrases."""
        sentences, places = [], []
        for number, caption in enumerate(captions):
            text, sentence = caption.replace("’", "'"), None
            if not self.lower.search(text) and len(text.lower()) == len(text):
                text = text.lower()
            for m in self.word.finditer(text):
                if sentence is None:
                    sentences.append(sentence := [])
                    places.append((number, 0, 0))
                sentence.append(word := m[0])
                places.append((number, m.start(), m.end()))
                if word in ".!?;" or len(sentence) == 64:  # cut: time stays linear
                    sentence = None
        tagged = self.tagger.tag_sents(sentences)
        return places, *self.chunk("".join(self.symbol["S"] + "".join(starmap(self.refine, s)) for s in tagged))

    def phrases(self, captions, merge=True):
        """Yield the noun phrases [(start, end), ...] of each caption; merge: "a group of people" is one, not two."""
        if isinstance(captions, str) or not all(isinstance(c, str) for c in captions):
            raise TypeError(f"expected a list of captions (str), got {captions!r:.80}")
        for batch in (captions[i:i + 256] for i in range(0, len(captions), 256)):
            places, symbols, chunks = self.parse(batch)
            found = [[] for _ in batch]
            for (_, last), (first, end) in zip([(0, 0), *chunks], chunks):
                (i, start, _), (_, _, stop) = places[first], places[end - 1]
                measure = symbols[last - 1:first] == self.symbol["QN"] + self.symbol["OF"]
                if merge and measure and len(batch[i][found[i][-1][0]:stop].split()) <= 8:
                    start, _ = found[i].pop()
                found[i].append((start, stop))
            yield from found

    def words(self, caption):
        """[(start, end, tag), ...] of a caption: Penn Treebank tags, or classes of the lexicon."""
        places, symbols, _ = self.parse([caption])
        return [(start, end, self.tag_of[symbol]) for (_, start, end), symbol in zip(places, symbols) if end]

    @functools.lru_cache(maxsize=1 << 15)
    def is_junk(self, phrase):
        return bool(self.junk.search(phrase))

    def extract_batch(self, captions, spans=False):
        """Each caption's different concepts (with spans: (start, end)), else its text. TypeError for no list of str."""
        out = []
        for caption, phrases in zip(captions, self.phrases(captions)):
            kept = {x.lower(): (a, b) for a, b in reversed(phrases) if not self.is_junk(x := caption[a:b])}
            if not kept and caption.strip():
                kept = {caption: (len(caption) - len(caption.lstrip()), len(caption.rstrip()))}
            out.append([(a, b) if spans else caption[a:b] for a, b in sorted(kept.values())])
        return out

    def extract(self, caption, spans=False):
        """The concepts of one caption; extract_batch is much faster for many."""
        return self.extract_batch([caption], spans)[0]


FORMATS = {".txt": iter, ".jsonl": iter, ".tar": lambda file: tarfile.open(fileobj=file.buffer, mode="r|*"),
           ".csv": csv.DictReader, ".tsv": functools.partial(csv.DictReader, delimiter="\t")}
KEYS = ("image", "filepath", "file_name", "filename", "image_path", "path", "url", "key", "id")
default_extractor = functools.lru_cache(ConceptExtractor)  # loaded at first use, once


def extract(caption):
    """The concepts of a caption (str): substrings of it, or it alone; none if blank. TypeError for anything else."""
    return default_extractor().extract(caption)


def extract_batch(captions):
    """The concepts of each of a list of captions."""
    return default_extractor().extract_batch(captions)


def swap_negatives(caption, rng, kinds=("noun", "adjective", "verb", "phrase")):
    """NegCLIP's hard negatives (ICLR 2023): the caption with two different words or phrases of one kind exchanged.

    rng: a random.Random. At most one a kind, never the caption. Nouns end noun phrases; verbs are of one form."""
    extractor, negatives = default_extractor(), []
    swaps, phrases = extractor.lexicon["swaps"], next(extractor.phrases([caption]))
    heads = {end for _, end in phrases}
    spans = [(*span, "phrase") for span in phrases] + [
        (a, b, tag) for a, b, tag in extractor.words(caption) if (b in heads or tag not in swaps["noun"][0])
        and caption[a:b].lower() not in extractor.lexicon["auxiliary"]]
    for kind in kinds:
        if kind not in swaps:
            raise ValueError(f"kind {kind!r}: expected one of {', '.join(swaps)}")
        groups = [{caption[a:b].lower(): (a, b) for a, b, tag in spans[::-1] if tag in tags} for tags in swaps[kind]]
        if choices := [sorted(group.values()) for group in groups if len(group) > 1]:
            (a, b), (c, d) = sorted(rng.sample(rng.choice(choices), 2))
            one, two = caption[a:b], caption[c:d]
            if a == 0 and one == one.capitalize():  # the capital stays in front
                one, two = one.lower(), two[0].upper() + two[1:]
            text = caption[:a] + two + caption[b:c] + one + caption[d:]
            negatives.append(re.sub(extractor.lexicon["article"], lambda m: m[1] + "n" * bool(m[2]), text))
    return [text for text in dict.fromkeys(negatives) if text.lower() != caption.lower()]


def negate(caption, rng=None):
    """The caption with one statement negated, by the lexicon's first rule that fits; rng chooses where (CoN-CLIP)."""
    tag_at = {start: tag for start, _, tag in default_extractor().words(caption)}
    for tags, word, negation in default_extractor().lexicon["negations"]:
        if found := [m for m in re.finditer(word, caption, re.I) if not tags or tag_at.get(m.start()) in tags]:
            m = rng.choice(found) if rng else found[0]
            new = m.expand(negation).capitalize() if m[0][0].isupper() else m.expand(negation)
            return caption[:m.start()] + new + caption[m.end():]
    return f"no {caption}"


def read_rows(path, caption_key, seen):
    """Yield {"key", "caption"} of a file's rows; seen, a Counter, gets the bytes read, captions and bad rows."""
    before, extension = seen["bytes"], os.path.splitext(path)[1]
    with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as file:
        try:
            for key, row in enumerate(rows := FORMATS[extension](file), 1):
                seen["bytes"] = before + file.buffer.tell()
                if extension == ".tar":
                    rows.members = []  # tarfile would keep every header
                    if not row.isfile() or not row.name.endswith(".json" if caption_key else ".txt"):
                        continue
                    key, row = os.path.splitext(row.name)[0], rows.extractfile(row).read().decode("utf-8", "replace")
                try:
                    if extension == ".jsonl" or extension == ".tar" and caption_key:
                        row = json.loads(row)
                    if isinstance(row, dict):
                        names = [name for name in KEYS if row.get(name) is not None and extension != ".tar"]
                        key, row = row[names[0]] if names else key, row[caption_key or "caption"]
                    caption = row.strip()
                except (AttributeError, KeyError, ValueError, RecursionError):  # no text, no such key, no json
                    caption = ""
                seen["captions" if caption else "bad"] += 1
                if caption:
                    yield {"key": key, "caption": caption}
        except (tarfile.TarError, EOFError, csv.Error) as e:
            print(f"{path}: damaged, its rest is left out ({e})", file=sys.stderr)
            seen["bad"] += 1


def extract_files(args):
    """Write a line {"key", "caption", "concepts"} for every caption; the same command goes on after a kill."""
    if wrong := [path for path in args.inputs if not path.endswith((*FORMATS,))]:
        raise ValueError(f"{wrong[0]}: expected a file that ends in {', '.join(FORMATS)}")
    output = args.output or os.path.splitext(args.inputs[0])[0] + ".concepts.jsonl"
    total, seen, counts = sum(map(os.path.getsize, args.inputs)), Counter(), Counter()
    rows = (row for path in args.inputs for row in read_rows(path, args.caption_key, seen))
    done = size = 0
    with Pool(args.workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool, open(output, "ab+") as out:
        out.seek(0)
        for line in out:
            if line.endswith(b"\n"):  # else torn by a kill
                if not line.startswith(json.dumps(next(rows, None)).encode()[:-1]):
                    raise ValueError(f"{output} comes from other inputs: choose another --output")
                done, size = done + 1, size + len(line)
        out.truncate(size)
        while some := list(islice(rows, 8192 * args.workers)):  # constant memory: not all at once
            batches = [[row["caption"] for row in some[i:i + 512]] for i in range(0, len(some), 512)]
            for row, concepts in zip(some, chain.from_iterable(pool.imap(extract_batch, batches))):
                out.write(json.dumps({**row, "concepts": concepts}).encode() + b"\n")
            if sys.stderr.isatty():
                share = seen["bytes"] / total
                print(f"[{'#' * int(20 * share):.<20}] {share:.0%} {seen['captions']:,}", end="\r", file=sys.stderr)
        out.seek(0)
        found = (concept.lower() for line in out for concept in json.loads(line)["concepts"])
        counts.update(c for c in found if c in counts or len(counts) < 1_000_000)  # the first million: constant memory
    print(f"{output}: {seen['captions']:,} captions ({done:,} from an earlier run), {seen['bad']:,} bad rows skipped")
    print("most frequent:", ", ".join(f"{concept} {n:,}" for concept, n in counts.most_common(10)))
    if not seen["captions"]:
        raise ValueError(f"no captions in {', '.join(args.inputs)}: choose their --caption-key")


def train(args):
    """Train NLTK's tagger, drop small weights, round the others; the file has no date: the same bytes every time."""
    from nltk import PerceptronTagger
    sentences, known = [], json.loads(LEXICON.read_text("utf-8"))["tags"]
    for path in args.corpus:
        text, times = Path(path).read_bytes(), 3  # captions weigh more
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as z:
                text, times = b"\n".join(z.read(name) for name in sorted(z.namelist()) if name.endswith(".txt")), 1
        lines = text.decode("utf-8", "replace").replace("’", "'").split("\n")
        found = [[token.rpartition("_")[::2] for token in line.split()] for line in lines]
        found = [s for s in found if s and all(word and tag in known for word, tag in s)]
        if not found:
            raise ValueError(f"{path}: expected lines of word_TAG (A_DT cat_NN), or a zip of such .txt files")
        sentences += found * times
    random.seed(0)  # NLTK shuffles sentences with the global generator
    tagger = PerceptronTagger(load=False)
    tagger.train(sentences, nr_iter=5)
    weights = {feature: kept for feature, row in tagger.model.weights.items()
               if (kept := {tag: round(w * 4) / 4 for tag, w in row.items() if abs(w) >= 1})}
    text = json.dumps([weights, tagger.tagdict, sorted(tagger.classes)], sort_keys=True, separators=(",", ":"))
    Path(args.output).write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(f"{args.output}: {len(sentences):,} sentences, {os.path.getsize(args.output):,} bytes")


def evaluate(args):
    """Score base noun phrases against a gold file: [phrase] is right, what overlaps a {phrase} is ignored."""
    extractor, right, found, expected = ConceptExtractor(args.weights), 0, 0, 0
    for line in Path(args.gold).read_text("utf-8-sig", "replace").splitlines():
        text, wanted, neutral = "", set(), set()
        for i, piece in enumerate(re.split(r"\[([^][{}]+)\]|\{([^][{}]+)\}", line)):
            if piece:  # in turn: outside, in [], in {}
                (set(), wanted, neutral)[i % 3].add((len(text), len(text) + len(piece)))
                text += piece
        if re.search(r"[][{}]", text):
            raise ValueError(f"{args.gold}: unbalanced or nested brackets: {line:.60}")
        got = next(extractor.phrases([text], merge=False))
        right, expected = right + len(wanted.intersection(got)), expected + len(wanted)
        found += sum((a, b) in wanted or not any(a < d and c < b for c, d in neutral) for a, b in got)
    if not expected:
        raise ValueError(f"{args.gold}: no bracketed phrase; expected lines such as: [A cat] on [a mat].")
    print(f"{expected} phrases, {found} found\nprecision {100 * right / max(found, 1):.1f} "
          f"recall {100 * right / expected:.1f} F1 {200 * right / (found + expected):.1f}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # emoji where the terminal has no UTF-8
    parser = argparse.ArgumentParser(description="Short forms: concepts.py 'A cat on a mat', concepts.py a.csv")
    commands = parser.add_subparsers(required=True)
    for name, run in (("extract", extract_files), ("eval", evaluate), ("train", train)):
        commands.add_parser(name, help=run.__doc__, description=run.__doc__).set_defaults(run=run)
    add = commands.choices["extract"].add_argument
    add("inputs", nargs="+", help=".txt (a caption a line), .csv, .tsv, .jsonl, webdataset .tar")
    add("--output", help="default INPUT.concepts.jsonl")
    add("--workers", type=int, default=1, metavar="N", help="processes (default 1)")
    add("--caption-key", help="column or json key (default caption; in .tar the .txt files)")
    add = commands.choices["eval"].add_argument
    add("gold", help="captions with [noun phrases]; what overlaps a {phrase} does not count")
    add("--weights", help="a file that train wrote, or nltk (default assets/tagger.json.gz)")
    add = commands.choices["train"].add_argument
    add("--corpus", nargs="+", required=True, help="word_TAG lines; a zip of .txt counts once, text thrice")
    add("--output", default=WEIGHTS, help="gzipped json (default assets/tagger.json.gz)")
    argv = sys.argv[1:]
    short = len(argv) == 1 and argv[0] not in ("-h", "--help", *commands.choices)
    try:
        if short and not argv[0].endswith((*FORMATS,)):
            print("\n".join(extract(argv[0])))
        else:
            args = parser.parse_args(["extract"] * short + argv)
            args.run(args)
    except (OSError, ValueError, LookupError, KeyboardInterrupt) as e:
        sys.exit(f"error: {str(e) or 'interrupted; the same command goes on'}")
