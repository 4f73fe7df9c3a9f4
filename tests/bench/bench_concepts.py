"""Captions a second on one core, and F1, of concepts.py against spaCy, in one run.

    OMP_NUM_THREADS=1 python tests/bench/bench_concepts.py captions.txt --gold gold.txt [other_gold.txt ...]

The captions are the lines of a file (default: the fixture of the tests, repeated). spaCy runs en_core_web_sm
with only the pipes that noun_chunks needs (tok2vec, tagger, parser, attribute_ruler), in batches of 256;
without that model (python -m spacy download en_core_web_sm) its row says so, and spaCy's tokenizer alone is
timed: noun_chunks can only be slower. "cold" is the extractor with an empty cache of words. The paths are
timed in turn, --rounds times; the table gives the median. Time is processor time, for what other programs
do must not count: OMP_NUM_THREADS=1 makes it the time of one core.
"""
import argparse
import re
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import concepts  # noqa: E402
from test_concepts import NLTKExtractor  # noqa: E402


def spacy_chunker(name):
    """A function from captions to spans, and what it is; blank English if there is no model."""
    try:
        import spacy
    except ImportError:
        return None, "spaCy is not installed: not measured"
    try:
        nlp = spacy.load(name, disable=["ner", "lemmatizer", "senter"])
    except OSError:
        nlp = spacy.blank("en")
        return (lambda captions: [[] for _ in nlp.pipe(captions, batch_size=256)],
                f"spaCy's tokenizer only (no model {name} here: noun_chunks NOT measured)")

    def chunks(captions):
        docs = nlp.pipe(captions, batch_size=256)
        return [[(c.start_char, c.end_char) for c in doc.noun_chunks if len(c) > 1 or c.root.pos_ != "PRON"]
                for doc in docs]
    return chunks, f"spaCy {spacy.__version__} {nlp.meta['name']} {nlp.meta['version']}, noun_chunks"


def read_gold(path):
    """[(caption, [phrase] spans, {phrase} spans), ...]"""
    gold = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        text, spans = "", {"[": set(), "{": set()}
        for piece in re.split(r"(\[.*?\]|\{.*?\})", line):
            if piece[:1] in ("[", "{"):
                spans[piece[0]].add((len(text), len(text) + len(piece) - 2))
                piece = piece[1:-1]
            text += piece
        gold.append((text, spans["["], spans["{"]))
    return gold


def f1(gold, found):
    """F1 of exact spans in percent; spans that overlap a {phrase} do not count."""
    right = wrong = expected = 0
    for (_, wanted, neutral), spans in zip(gold, found):
        spans = set(spans)
        right, expected = right + len(spans & wanted), expected + len(wanted)
        wrong += sum(not any(a < d and c < b for c, d in neutral) for a, b in spans - wanted)
    return 200 * right / (right + wrong + expected)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", nargs="?", default=str(ROOT / "tests/fixtures/concepts_captions.txt"),
                        help="text file")
    parser.add_argument("--gold", nargs="*", default=[], help="files of bracketed captions")
    parser.add_argument("--spacy-model", default="en_core_web_sm", help="name or folder of spaCy's model")
    parser.add_argument("--count", type=int, default=5000, help="captions timed (spaCy, NLTK: a quarter)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    lines = [line for line in Path(args.captions).read_text(encoding="utf-8").splitlines() if line.strip()]
    captions = (lines * (args.count // len(lines) + 1))[:args.count]
    fast, readable = concepts.ConceptExtractor(), NLTKExtractor()
    spacy_path, spacy_name = spacy_chunker(args.spacy_model)

    def cold(captions):
        concepts.FastTagger.learn.cache_clear()
        concepts.ConceptExtractor.refine.cache_clear()
        fast.extract_batch(captions)

    some = captions[:max(1, args.count // 4)]
    paths = {"fast path, warm cache": (fast.extract_batch, captions),
             "fast path, cold cache": (cold, captions),
             "readable path (NLTK)": (readable.extract_batch, some)}
    if spacy_path:
        paths[spacy_name] = spacy_path, some
    fast.extract_batch(captions)
    rates = {name: [] for name in paths}
    for _ in range(args.rounds):
        for name, (function, inputs) in paths.items():
            began = time.process_time()
            function(inputs)
            rates[name].append(len(inputs) / (time.process_time() - began))
    base = statistics.median(rates[spacy_name]) if spacy_path else None
    print(f"{len(captions)} captions, {len(set(captions))} different; median of {args.rounds} rounds")
    for name in paths:
        rate = statistics.median(rates[name])
        print(f"{name:60} {rate:8,.0f} captions/s" + (f" {rate / base:7.1f} x spaCy" if base else ""))
    if not spacy_path:
        print(spacy_name)
    for path in args.gold:
        gold = read_gold(path)
        texts = [text for text, _, _ in gold]
        ours, nltk = list(fast.phrases(texts, merge=False)), list(readable.phrases(texts, merge=False))
        measured = spacy_name.endswith("noun_chunks")
        spacy_f1 = f"{f1(gold, spacy_path(texts)):.1f}" if measured else "not measured"
        print(f"{path}: F1 {f1(gold, ours):.1f} (readable path {f1(gold, nltk):.1f}, "
              f"the same spans: {ours == nltk}), spaCy {spacy_f1}")


if __name__ == "__main__":
    main()
