"""Captions -> noun-phrase concepts, and hard negatives, by part-of-speech tags and a grammar.

    >>> extract("A cat sits on its hind legs, and swats at the plant.")
    ['A cat', 'its hind legs', 'the plant']

Words get tags from NLTK's perceptron, then from CLASSES and CONTEXT; GRAMMAR finds noun phrases in the tags. The fast
path tags a batch of captions in step with numpy and turns the grammar into regular expressions; the NLTK path, with
identical results, is PerceptronTagger and RegexpParser. On 160 hand-bracketed captions (`eval`) F1 is 98.9, spaCy's
en_core_web_sm has 96.0, at 43 times spaCy's captions a second on one core (tests/bench_concepts.py).

A concept is a substring of its caption, a repeated one is given once; a caption without any is its own concept
(stripped), a blank caption has none. assets/tagger.json.gz was trained on MASC (NLTK's masc_tagged, free for any use)
and VALSE captions tagged by spaCy. This writes the same bytes again, in about two minutes:
    python concepts.py train --corpus masc_tagged.zip captions_spacy_tagged.txt --output assets/tagger.json.gz
"""
import argparse
import csv
import functools
import gzip
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import tarfile
import time
import zipfile
from bisect import bisect_right
from collections import Counter, deque
from itertools import accumulate, islice
from pathlib import Path

import numpy as np  # NLTK is imported where it is used: the fast path does without

WEIGHTS = Path(__file__).resolve().parent / "assets" / "tagger.json.gz"
LONGEST = 64  # tokens: longer sentences are cut, so that time is linear in the length of a caption

# The grammar in NLTK's notation: <A|B> is one tag, {...} a chunk, around it stands the context it needs.
# Two ways to read the same tags inside a star would cost exponential time.
NOUN = "<NN|NNS|NNP|NNPS|QN>"
PART = f"(<VBG|VBN|VBD|GN|PX>(?={NOUN}|<JJ|ORG|PX|GN|VBN>))?"
MORE = f"((<,><CC>?|<CC>)(?=<RB>*<JJ|ORG>)|<,|CC><RB>?<VBN|PX>(?={NOUN}))?"
ADJ = f"<RB>*<JJ|ORG>{MORE}"
UNIT = f"({ADJ}{PART}|<RB>+<VBN|PX>(?={NOUN}|<JJ>)|<CD>{PART}|{NOUN}(<PX|GN>(?={NOUN}))?)"
BODY = f"{UNIT}*{NOUN}"
LONE = f"(({ADJ})+|<CD>)"
DET = rf"<PDT>?<DTA|DT|PRP\$>({PART}{BODY}|{LONE}?<ORG|GN|LOC>)|<DTA|PRP\$><JJ>+"
GRAMMAR = f"""
V:  <DTA>{PART}{UNIT}*<NN|NNP>{{<NNS>}}(?!{NOUN})
NP: {{({DET}|<VBG0>(?=<NN|NNS|NNP|NNPS>+<VBP|VBZ|VBD|MD>){BODY}|{BODY}|{LONE}<GN>|<JJ>*<ORG>)(<POS>{PART}{BODY})*}}
"""

# Closed classes: a word gets the name of its class for a tag, or only if the tagger says one of ONLY.
CLASSES = {
    "S": "-start- -start2-", "DTA": "a an each every another", "OF": "of", "CAN": "can", "ORG": "orange",
    "LOC": "inside outside past", "RB": "asleep overhead nearby upside together", "VB": "play pose sit eat wear hold",
    "PRP": "each_other one_another", "NN": "living dining parking close-up closeup close_up",
    "IN": "in on at with w/ from near under behind between into onto through against above below beside among beneath "
          "underneath upon toward towards without within during before after amid atop",
    "INX": "over across along around off up down while for by as like than because if when until since",
    "JJ": "red blue green yellow black white brown gray grey pink purple beige tan maroon silver gold golden teal "
          "turquoise blonde",
    "VBZ": "swats sits leans poses stares smiles wears eats grazes glides hovers peers gazes",
    "QN": "group groups bunch bunches pair pairs couple piece pieces bowl bowls cup cups glass glasses plate plates "
          "slice slices herd herds flock flocks pile piles stack stacks set sets row rows variety collection number "
          "lot crowd team box boxes basket baskets bottle bottles bag bags jar jars line assortment tray trays display",
    "PX": "filled shaped drawn covered painted approved lined topped sized colored coloured themed styled made "
          "powered capped flavored patterned soaked trimmed decorated loaded stuffed framed tiled eyed haired legged "
          "wheeled clad glazed baked cooked grilled fried roasted mounted carved formed",
    "": ", . ! ? & ' building ceiling clothing wedding evening morning painting railing ring king string thing wing "
        "spring swing crossing landing serving topping frosting icing dressing stuffing something everything anything "
        "nothing pudding filling bedding awning flooring lighting drawing opening meeting being",
}
CLASS_OF = {word.replace("_", " "): name for name, words in CLASSES.items() for word in words.split()}
ONLY = {"QN": ("NN", "NNS", "NNP"), "VBZ": ("NNS",), "VB": ("NN",), "GN": ("NN",)}
# Then the words around decide: (tag before, tag, tag after, new tag), the first that fits; * fits any tag.
NOUNS = "NN NNS NNP NNPS QN"
CONTEXT = (
    ("S OF IN TO VBG , CC", "VBN PX", "JJ " + NOUNS, "JJ"),      # next to parked cars
    ("OF IN INX", "VBN VBD PX", NOUNS, "JJ"),                    # under striped awnings
    ("OF IN TO", "VBG GN", NOUNS, "JJ"),                         # in running water
    ("DTA PRP$ JJ", "VB VBP", NOUNS, "JJ"),                      # an empty clean kitchen
    ("DTA DT PRP$", "RB", NOUNS, "JJ"),                          # a hilly landscape
    ("S DTA DT IN JJ", "LOC", NOUNS, "JJ"),                      # an outside table
    ("PRP$", "RB", "JJ VBN VBG PX RB", "RB"),
    ("PRP$", "RB", "*", "NN"),                                   # on its back
    ("JJ", "CD", "JJ CD " + NOUNS, "CD"),
    ("JJ", "CD", "*", "NN"),                                     # a pink one
    ("TO", "NN NNS", "DTA DT PRP$", "VB"),                       # about to board a bus
    ("NN NNP ORG", "NNS", "DTA DT PDT PRP$", "VBZ"),             # a man in uniform rides a horse
    ("*", "CAN", "VB VBP RB PRP", "MD"),
    ("*", "CAN", "*", "NN"),                                     # a trash can
    ("S", "VBG", "*", "VBG0"),
    ("*", "JJR JJS", "*", "JJ"),
)
# One symbol a tag: a Latin-1 letter. S stands between sentences.
SYMBOL = {tag: chr(0xC0 + i) for i, tag in enumerate((
    "CC CD DT EX FW IN JJ JJR JJS LS MD NN NNS NNP NNPS PDT POS PRP PRP$ RB RBR RBS RP SYM TO UH VB VBD VBG "
    "VBN VBP VBZ WDT WP WP$ WRB . , : $ # `` '' ( ) S DTA OF INX LOC CAN ORG QN GN PX VBG0 V").split())}
TAG = {symbol: tag for tag, symbol in SYMBOL.items()}
# Words as NLTK's word tokenizer finds them in a caption, each with the white space before it; every repeat is
# bounded. Markup, links and entities are one token each.
PIECES = re.compile(r"""(?x) \s* (?: </?[A-Za-z][^<>\n]{0,60}> | &\#?\w{1,8}; | https?://\S{1,200}
    | [A-Z]\.(?:[A-Z]\.){1,4} | [A-Z]\.(?=[ \t]+[A-Z]) | (?:Mr|Mrs|Ms|Dr|St|Ave)\.(?=[ \t])
    | (?i:close[ ]up|each[ ]other|one[ ]another)\b | [A-Za-z]{2,6}(?=n't\b) | n't\b | w/(?=[ \t])
    | \w{1,50}(?: (?: [-&/](?=\w) | \.(?=[a-z\d]) | (?<=\d)[,:](?=\d)
                    | '(?!(?i:s|m|d|ll|re|ve|t)\b)(?=\w) ) \w{1,50} ){0,8}
    | '(?i:s|m|d|ll|re|ve)\b | \S )""")
# A caption without such a word is in capitals or a title: its case says nothing.
LOWER = re.compile(r"(?<![\w'])(?!(?:an?|and|as|at|by|for|from|in|is|of|on|or|the|to|with|w)\b)[a-z]")
ASCII_LOWER = {c: c + 32 for c in range(ord("A"), ord("Z") + 1)}
PADS = ["-START-", "-START2-"]  # what the tagger sees before a sentence


def sentences_of(caption):
    """Yield lists of tokens, each with the white space before it: up to a mark, at most LONGEST."""
    caption, sentence = caption.rstrip().replace("’", "'"), []
    pieces = PIECES.findall(caption)
    if not LOWER.search(caption):
        pieces = [piece.translate(ASCII_LOWER) for piece in pieces]
    for piece in pieces:
        sentence.append(piece)
        if len(sentence) == LONGEST or piece[-1] in ".!?;" and len(piece.lstrip()) == 1:
            yield sentence
            sentence = []
    if sentence:
        yield sentence


DETERMINERS = set("a an the this that these those some any each every another no his her its their my your our".split())
EMPTY = {"close up", *("image photo photograph picture view shot close-up closeup scene top side front back middle "
                       "background foreground corner left right center edge someone something somebody anyone anything "
                       "everything nothing other others lots one").split()}
JUNK = re.compile(r"[][(){}<>]|\w_\w|https?:|\b(?:IMG|DSC)\d+|^(?:jpe?g|png)$", re.I)


@functools.lru_cache(maxsize=1 << 15)
def is_concept(phrase):
    """Whether a noun phrase says something of a picture: no bare "top" or "image", at most 8 words."""
    words = phrase.lower().split()
    bare = " ".join(words[1:] if words[0] in DETERMINERS else words)
    return len(words) <= 8 and len(words[-1]) > 1 and not (bare in EMPTY | DETERMINERS or JUNK.search(phrase))


def load_weights(source=None):
    """(weights, tagdict, classes) as PerceptronTagger has them, rounded so that float sums are exact."""
    if source == "nltk":
        from nltk.tag.perceptron import PerceptronTagger
        tagger = PerceptronTagger()  # its LookupError says how to download them
        weights, tagdict, classes = tagger.model.weights, tagger.tagdict, tagger.classes
    else:
        path = Path(source or WEIGHTS)
        try:
            weights, tagdict, classes = json.loads(gzip.decompress(path.read_bytes()))
        except (OSError, EOFError, TypeError, ValueError) as e:
            raise ValueError(f"{path}: expected a file that python concepts.py train writes ({e})") from None
    weights = {f: {tag: round(w * 1024) / 1024 for tag, w in row.items()} for f, row in weights.items()}
    return weights, tagdict, sorted(classes)


class ConceptExtractor:
    """Finds the noun-phrase concepts of captions. May be pickled and shared between threads.

    weights: None for assets/tagger.json.gz, "nltk" for NLTK's averaged_perceptron_tagger_eng, or the path of
        a file that `train` wrote. Raises ValueError (no such file), LookupError (NLTK's data is missing).
    fast: False for NLTK's tagger and chunker: the same results, slowly.
    """

    def __init__(self, weights=None, fast=True):
        weights, tagdict, classes = load_weights(weights)
        self.tags = sorted(classes, reverse=True)  # argmax takes the first of equals, NLTK the last
        before = [*self.tags, "-START-", "-START2-"]
        self.number = number = {tag: i for i, tag in enumerate(before)}
        self.fixed = {word: number[tag] for word, tag in tagdict.items()}
        self.fixed.update(zip(PADS, (number["-START2-"], number["-START-"])))
        self.rows = {feature: i for i, feature in enumerate(weights, 1)}
        self.scores = np.zeros((len(weights) + 1, len(self.tags)), np.float32)  # row 0: no such feature
        for feature, row in self.rows.items():
            for tag, score in weights[feature].items():
                self.scores[row, number[tag]] = score
        row = lambda feature: self.scores[self.rows.get(feature, 0)]
        self.history = np.array([[row("i-1 tag " + p) + row("i-2 tag " + q) + row(f"i tag+i-2 tag {p} {q}")
                                  for q in before] for p in before])
        code = {tag: i for i, tag in enumerate(SYMBOL)}
        self.kinds = {name: i for i, name in enumerate([*CLASSES, "GN", ":"])}
        self.retag = np.array([[code.get(name if name and tag in ONLY.get(name, (tag,)) else tag, 0)
                                for tag in before] for name in self.kinds])
        self.context = np.tile(np.arange(len(code))[:, None], (len(code), 1, len(code)))
        for *rule, new in reversed(CONTEXT):  # the first that fits is the last written
            fits = [[code[tag] for tag in (code if field == "*" else field.split())] for field in rule]
            self.context[np.ix_(*fits)] = code[new]
        # The rules as regular expressions over symbols, with the chunk in a group of that name.
        symbols = lambda m: f"[{''.join(SYMBOL[tag] for tag in m[1].split('|'))}]"
        self.verb, self.phrase = (
            re.compile("(?P<left>" + re.sub(r"\((?!\?)", "(?:", re.sub("<(.+?)>", symbols, rule))
                       .replace("{", ")(?P<chunk>").replace("}", ")"))
            for rule in re.findall("^[A-Z]+:(.*)", re.sub(r"[ \\]", "", GRAMMAR), re.M))
        if not fast:
            from nltk.chunk import RegexpParser
            from nltk.tag.perceptron import PerceptronTagger
            self.parser, self.tagger = RegexpParser(GRAMMAR), PerceptronTagger(load=False)
            self.tagger.model.weights, self.tagger.tagdict = weights, tagdict
            self.tagger.classes = self.tagger.model.classes = set(classes)
            self.tag, self.chunk = self.nltk_tag, self.nltk_chunk

    @functools.lru_cache(maxsize=1 << 14)  # about a kilobyte each
    def learn(self, piece):
        """Facts of a token, rows of its scores after each tag, and its scores in five roles."""
        word = piece.lstrip()
        norm = low = word.lower()
        if piece in PADS:
            norm = piece
        elif "-" in word[1:]:  # from here as PerceptronTagger.normalize
            norm = "!HYPHEN"
        elif word[0].isdigit():
            norm = "!YEAR" if word.isdigit() and len(word) == 4 else "!DIGITS"
        name = CLASS_OF.get(low, "GN" if low.endswith("ing") else "")
        if low not in CLASS_OF and (word[0] in "<&" or not any(map(str.isalnum, word))):
            name = ":"  # signs, emoji, markup
        end = norm.replace("-START", "-END")  # a pad is also behind a sentence
        features = ("bias", "i suffix " + word[-3:], "i pref1 " + word[0], "i word " + norm,
                    "i-1 word " + norm, "i-1 suffix " + norm[-3:], "i-2 word " + norm,
                    "i+1 word " + end, "i+1 suffix " + end[-3:], "i+2 word " + end)
        scores = self.scores[[self.rows.get(feature, 0) for feature in features]]
        after = [self.rows.get(f"i-1 tag+i word {tag} {norm}", 0) for tag in self.number]
        size = 0 if piece in PADS else len(word)
        facts = size and len(piece), size, self.kinds[name], self.fixed.get(word, -1)
        return facts, np.array(after), np.add.reduceat(scores, [0, 4, 6, 7, 9])

    def parse(self, captions):
        """(symbols, starts, ends, phrases): a symbol a token, PADS before, between and after sentences; where
        tokens lie if the right-stripped captions follow each other; (first, end) symbol of noun phrases."""
        sentences = [sentence for caption in captions for sentence in sentences_of(caption)]
        pieces = [piece for sentence in sentences for piece in (*PADS, *sentence)] + PADS
        index = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
        words = np.fromiter(map(index.__getitem__, pieces), np.int64, len(pieces))
        facts, after, roles = zip(*map(self.learn, index))
        facts, after, roles = np.array(facts), np.array(after), np.stack(roles, 1)
        lengths, sizes, kinds, fixed = facts[words].T
        codes = self.retag[kinds, self.tag(sentences, words, fixed, after, roles)]
        codes[1:-1] = self.context[codes[:-2], codes[1:-1], codes[2:]]
        symbols = (codes + 0xC0).astype(np.uint8).tobytes().decode("latin-1")
        ends = np.cumsum(lengths)
        return symbols, (ends - sizes).tolist(), ends.tolist(), self.chunk(symbols)

    def tag(self, sentences, words, fixed, after, roles):
        """Tag numbers of words: the first words of all sentences, then the second, ..."""
        tags, free = fixed.copy(), np.flatnonzero(fixed < 0)
        scores = roles[0, words[free]]  # (words, tags)
        for role, distance in enumerate((-1, -2, 1, 2), 1):
            scores += roles[role, words[free + distance]]
        pads = np.flatnonzero(words == 1)
        steps = free - pads[np.searchsorted(pads, free) - 1]
        order = np.argsort(steps, kind="stable")
        for step in np.split(order, np.flatnonzero(np.diff(steps[order])) + 1):
            now = free[step]
            score = scores[step] + self.history[tags[now - 1], tags[now - 2]]
            score += self.scores[after[words[now], tags[now - 1]]]
            tags[now] = score.argmax(1)
        return tags

    def chunk(self, symbols):
        """The noun phrases in symbols."""
        symbols = self.verb.sub(lambda m: m["left"] + SYMBOL["V"] * len(m["chunk"]), symbols)
        return [m.span("chunk") for m in self.phrase.finditer(symbols)]

    def nltk_tag(self, sentences, *_):
        """The same with NLTK's tagger, a sentence at a time. The tags of PADS do not matter."""
        tags = []
        for sentence in sentences:
            tagged = self.tagger.tag([piece.lstrip() for piece in sentence])
            tags += [0, 0, *(self.number[tag] for _, tag in tagged)]
        return tags + [0, 0]

    def nltk_chunk(self, symbols):
        """The same with NLTK's chunker."""
        tree = self.parser.parse([(i, TAG[symbol]) for i, symbol in enumerate(symbols)])
        chunks = [node.leaves() for node in tree.subtrees(lambda node: node.label() == "NP")]
        return [(leaves[0][0], leaves[-1][0] + 1) for leaves in chunks]

    def phrases(self, captions, merge=True):
        """Yield for every caption its noun phrases, [(start, end), ...], before the filters.

        merge: "a group of people" is one phrase; False: "a group" and "people", base noun phrases.
        """
        if isinstance(captions, str) or not all(isinstance(c, str) for c in captions):
            raise TypeError(f"expected a list of captions (str), got {captions!r:.80}")
        some = max(1, min(512, (1 << 18) * len(captions) // (sum(map(len, captions)) + 1)))
        for batch in (captions[i:i + some] for i in range(0, len(captions), some)):
            symbols, starts, ends, phrases = self.parse(batch)
            offsets = [0, *accumulate(len(caption.rstrip()) for caption in batch)]
            found, last = [[] for _ in batch], 0
            for first, end in phrases:
                i = bisect_right(offsets, starts[first]) - 1
                start, stop = starts[first] - offsets[i], ends[end - 1] - offsets[i]
                if merge and first == last + 1 and symbols[last - 1:first] == SYMBOL["QN"] + SYMBOL["OF"] \
                        and len(batch[i][found[i][-1][0]:stop].split()) <= 8:
                    start, _ = found[i].pop()
                found[i].append((start, stop))
                last = end
            yield from found

    def words(self, caption):
        """[(start, end, tag), ...] of a caption: Penn Treebank tags, or names of CLASSES."""
        symbols, starts, ends, _ = self.parse([caption])
        return [(start, end, TAG[s]) for s, start, end in zip(symbols, starts, ends) if end > start]

    def extract_batch(self, captions, spans=False):
        """A list of concepts for every caption, as strings or, with spans, as (start, end) in the caption.

        Repeated concepts are given once, without regard to case. Raises TypeError for anything but str.
        """
        captions, out = captions if isinstance(captions, str) else list(captions), []
        for caption, phrases in zip(captions, self.phrases(captions)):
            found = {}
            for start, end in phrases:
                phrase = caption[start:end]
                if is_concept(phrase):
                    found.setdefault(phrase.lower(), (start, end))
            if not found and caption.strip():
                found[""] = len(caption) - len(caption.lstrip()), len(caption.rstrip())
            out.append(list(found.values()) if spans else [caption[a:b] for a, b in found.values()])
        return out

    def extract(self, caption, spans=False):
        """The concepts of one caption; see extract_batch, which is much faster for many."""
        return self.extract_batch([caption], spans)[0]


default_extractor = functools.lru_cache(ConceptExtractor)  # loaded at first use, once


def extract(caption):
    """The concepts of a caption (str), a list of substrings of it. TypeError for anything else."""
    return default_extractor().extract(caption)


def extract_batch(captions):
    """The concepts of each of a list of captions."""
    return default_extractor().extract_batch(captions)


# ------------------------------------------------------------------------------------------ hard negatives
AUXILIARY = frozenset("is are was were am be been being has have had do does did can will would".split())
# What negate() looks for, in this order: tags ("" for any), a word, and its negation.
NEGATIONS = (
    ("", r"\bnot\b ?", ""),
    ("", r"\bno\b", "some"),
    ("", r"\b(?:is|are|was|were)\b", r"\g<0> not"),
    ("", r"\bwithout\b", "with"),
    ("", r"\bwith\b", r"\g<0>out"),
    ("VBZ", r"\bhas\b", "does not have"),
    ("VBZ", r"\b([a-z]+)ies\b", r"does not \1y"),
    ("VBZ", r"\b([a-z]+?)(?:(?<=sh|ch|ss)es|(?<=o)es|s)\b", r"does not \1"),
    ("VBP", r"\b[a-z]+\b", r"do not \g<0>"),
    ("VBG VBG0", r"\b\w+", r"not \g<0>"),
)


def exchange(caption, first, second):
    """Swap two spans; a capital at the beginning stays there, and "a" or "an" fits the word after it."""
    one, two = caption[slice(*first)], caption[slice(*second)]
    if not caption[:first[0]].strip() and one[:1].isupper() and one[1:] == one[1:].lower():
        one, two = one[0].lower() + one[1:], two[:1].upper() + two[1:]
    swapped = ""
    for text, word in (caption[:first[0]], two), (caption[first[1]:second[0]], one):
        n = "n" if re.match(r"(?!uni|use|eu|one)[aeiou]|hour", word, re.I) else ""
        swapped += re.sub(r"\b([Aa])n?(\s+)$", rf"\1{n}\2", text) + word
    return swapped + caption[second[1]:]


def swap_negatives(caption, rng, kinds=("noun", "adjective", "verb", "phrase")):
    """NegCLIP's hard negatives: the caption with two different words or phrases of one kind exchanged.

    rng: a random.Random, which alone decides. Returns at most one string a kind, in the order of kinds, without
    repeats; a kind of which the caption has no two is left out. Never the caption itself. A noun is the last word of
    a noun phrase; verbs are exchanged with verbs of the same form. Source: Yuksekgonul et al., When and why
    vision-language models behave like bags-of-words (ICLR 2023).
    """
    words, phrases = default_extractor().words(caption), next(default_extractor().phrases([caption]))
    heads, nouns = {end for _, end in phrases}, NOUNS.split()
    spans = [("phrase", span) for span in phrases]
    spans += [("noun", (a, b)) for a, b, tag in words if tag in nouns and b in heads]
    spans += [("adjective", (a, b)) for a, b, tag in words if tag in ("JJ", "ORG")]
    spans += [("verb " + tag[:3], (a, b)) for a, b, tag in words
              if tag[:2] == "VB" and caption[a:b].lower() not in AUXILIARY]
    groups = {}  # kind -> text -> span, so that two of a group differ
    for kind, span in spans:
        groups.setdefault(kind, {}).setdefault(caption[slice(*span)].lower(), span)
    negatives = []
    for kind in kinds:
        if kind not in ("noun", "adjective", "verb", "phrase"):
            raise ValueError(f"kind {kind!r}: expected one of noun, adjective, verb, phrase")
        choices = [list(group.values()) for name, group in groups.items()
                   if name.startswith(kind) and len(group) > 1]
        if choices:
            negatives.append(exchange(caption, *sorted(rng.sample(rng.choice(choices), 2))))
    return [text for text in dict.fromkeys(negatives) if text.lower() != caption.lower()]


def negate(caption, rng=None):
    """The caption with one statement negated, as CoN-CLIP's negated captions; never the caption itself.

    "is" -> "is not", "with" -> "without" (and back), "sits" -> "does not sit", "riding" -> "not riding"; else "no"
    before a phrase. The first of its kind, or the choice of rng (random.Random).
    Source: Singh et al., Learn "No" to say "Yes" better (CoN-CLIP, WACV 2025).
    """
    tag_at = {start: tag for start, _, tag in default_extractor().words(caption)}
    for tags, word, negation in NEGATIONS:
        found = [m for m in re.finditer(word, caption, re.I)
                 if not tags or tag_at.get(m.start()) in tags.split()]
        if found:
            m = rng.choice(found) if rng else found[0]
            return caption[:m.start()] + m.expand(negation) + caption[m.end():]
    phrases = next(default_extractor().phrases([caption]))
    if not phrases:
        return f"not {caption}"
    start, end = rng.choice(phrases) if rng else phrases[0]
    phrase = re.sub(r"^(?:an?|the|some)\s+", "", caption[start:end], flags=re.I)
    return caption[:start] + ("No " if caption[start].isupper() else "no ") + phrase + caption[end:]


# ------------------------------------------------------------------------------------------- command line
FORMATS = (".txt", ".csv", ".tsv", ".jsonl", ".tar")
KEYS = ("image", "filepath", "file_name", "filename", "image_path", "path", "url", "key", "id")


def train(args):
    """Train NLTK's tagger, drop small weights, round the others; the file has no date: the same bytes."""
    from nltk.tag.perceptron import PerceptronTagger
    sentences = []
    for path in args.corpus:
        data, weight = Path(path).read_bytes(), 3  # captions weigh more
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as z:
                data, weight = b"\n".join(z.read(n) for n in sorted(z.namelist()) if n.endswith(".txt")), 1
        lines = data.decode("utf-8", "replace").replace("’", "'").split("\n")
        found = [[tuple(token.rpartition("_")[::2]) for token in line.split()] for line in lines]
        found = [s for s in found if s and all(word and tag in SYMBOL for word, tag in s)]
        if not found:
            raise ValueError(f"{path}: expected lines of word_TAG (A_DT cat_NN), or a zip of such .txt files")
        sentences += found * weight
    print(f"{len(sentences):,} sentences, {sum(map(len, sentences)):,} words: a few minutes", file=sys.stderr)
    random.seed(0)  # NLTK shuffles sentences with the global generator
    tagger = PerceptronTagger(load=False)
    tagger.train(sentences, nr_iter=5)
    weights = ((feature, {tag: round(w * 4) / 4 for tag, w in sorted(row.items()) if abs(w) >= 1})
               for feature, row in sorted(tagger.model.weights.items()))
    model = {feature: row for feature, row in weights if row}, dict(sorted(tagger.tagdict.items()))
    data = gzip.compress(json.dumps([*model, sorted(tagger.classes)], separators=(",", ":")).encode(), 9, mtime=0)
    Path(args.output).write_bytes(data)
    print(f"{args.output}: {len(data):,} bytes")


def evaluate(args):
    """Score base noun phrases against a gold file: [phrase] is right, what overlaps a {phrase} is ignored."""
    gold = []
    for number, line in enumerate(Path(args.gold).read_text("utf-8-sig", "replace").splitlines(), 1):
        text, spans = "", {"[": set(), "{": set()}
        for bracket, phrase, other in re.findall(r"([\[{])([^][{}]*)[]}]|(.)", line):
            if bracket:
                spans[bracket].add((len(text), len(text) + len(phrase)))
            if other in ("[", "]", "{", "}"):
                raise ValueError(f"{args.gold}, line {number}: unbalanced or nested brackets: {line:.60}")
            text += phrase + other
        gold.append((text, spans["["], spans["{"]))
    right = found = expected = 0
    phrases = ConceptExtractor(args.weights).phrases([text for text, _, _ in gold], merge=False)
    for (_, wanted, neutral), got in zip(gold, phrases):
        got = [p for p in got if p in wanted or not any(p[0] < b and a < p[1] for a, b in neutral)]
        right += len(wanted.intersection(got))
        found, expected = found + len(got), expected + len(wanted)
    if not expected:
        raise ValueError(f"{args.gold}: no bracketed phrase; expected lines such as: [A cat] on [a mat].")
    print(f"{len(gold)} captions, {expected} phrases, {found} found\nprecision {100 * right / max(found, 1):.1f}"
          f" recall {100 * right / expected:.1f} F1 {200 * right / (found + expected):.1f}")


def load_record(line):
    """The dict in a line of json; {} if there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = {}
    return record if isinstance(record, dict) else {}


def read_records(path, caption_key):
    """Yield (default key, dict) for the rows of a file; the dict is empty for a row that cannot be read."""
    if path.endswith(".tar"):  # a webdataset shard: captions are .txt files or, with --caption-key, in .json
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                tar.members = []  # tarfile would keep every header
                stem, extension = os.path.splitext(member.name)
                if member.isfile() and extension == (".json" if caption_key else ".txt"):
                    text = tar.extractfile(member).read().decode("utf-8", "replace")
                    yield stem, load_record(text) if caption_key else {"caption": text}
        return
    with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as file:
        if path.endswith(".txt"):
            records = ({"caption": line} for line in file)
        elif path.endswith(".jsonl"):
            records = map(load_record, file)
        elif path.endswith((".csv", ".tsv")):
            records = csv.DictReader(file, delimiter="\t" if path.endswith(".tsv") else ",")
        else:
            raise ValueError(f"{path}: expected a file that ends in {', '.join(FORMATS)}")
        for number, record in enumerate(records, 1):
            yield next((record[key] for key in KEYS if record.get(key) is not None), number), record


def read_rows(args, bad):
    """Yield (key, caption) of all inputs; bad, a Counter, counts the rows without a caption, by file."""
    for path in args.inputs:
        try:
            for key, record in read_records(path, args.caption_key):
                caption = record.get(args.caption_key or "caption")
                if isinstance(caption, str) and caption.strip():
                    yield record.get(args.key) if args.key else key, caption.strip()
                else:
                    bad[path] += 1
        except (tarfile.TarError, EOFError, csv.Error) as e:
            print(f"{path}: damaged, its rest is left out ({e})", file=sys.stderr)
            bad[path] += 1


def extract_rows(rows):
    """The lines of output for some rows, in a worker."""
    found = extract_batch([caption for _, caption in rows])
    return "".join(json.dumps({"key": key, "caption": caption, "concepts": concepts}) + "\n"
                   for (key, caption), concepts in zip(rows, found)).encode()


def extract_files(args):
    """Write {"key", "caption", "concepts"} a line for every caption; goes on where an earlier run ended."""
    bad, counts, began, done, size, last = Counter(), Counter(), time.time(), 0, 0, "{}"
    rows = read_rows(args, bad)
    list(map(os.stat, args.inputs))  # no output if an input is missing
    with open(args.output, "ab+") as out:
        out.seek(0)
        for line in out:
            if line.endswith(b"\n"):  # else torn by a kill
                done, size, last = done + 1, size + len(line), line
        last = load_record(last)
        if done and [*deque(islice(rows, done), maxlen=1)] != [(last.get("key"), last.get("caption"))]:
            raise ValueError(f"{args.output} comes from other inputs: choose another --output")
        out.truncate(size)
        captions, batches = done, iter(lambda: list(islice(rows, 512)), [])
        with multiprocessing.Pool(args.workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            while some := list(islice(batches, 16 * args.workers)):  # constant memory: not all at once
                for lines in pool.imap(extract_rows, some):
                    out.write(lines)
                    captions += lines.count(b"\n")
                    if sys.stderr.isatty():
                        rate = (captions - done) / (time.time() - began)
                        print(f"\r{captions:,} captions, {rate:,.0f}/s ", end="", file=sys.stderr, flush=True)
        out.seek(0)
        for line in out:
            counts.update(map(str.lower, json.loads(line)["concepts"]))
            if len(counts) > 1_000_000:  # constant memory: forget the rarer half
                counts = Counter(dict(counts.most_common(500_000)))
    print(f"{captions:,} captions ({done:,} from an earlier run), {sum(bad.values()):,} bad rows skipped")
    print("most frequent: " + ", ".join(f"{concept} {n:,}" for concept, n in counts.most_common(10)))
    if bad and not captions:
        raise ValueError(f"no captions in {', '.join(bad)}: choose their --caption-key")


def main(argv):
    parser = argparse.ArgumentParser(prog="concepts.py", description="Noun-phrase concepts of captions: concepts.py 'A "
                                     "cat on a mat', or concepts.py captions.csv, which writes captions.concepts.jsonl")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    p = commands.add_parser("extract", help="captions of files -> jsonl; run again after a kill, it goes on")
    p.add_argument("inputs", nargs="+", help=".txt (a caption a line), .csv, .tsv, .jsonl, webdataset .tar")
    p.add_argument("--output", required=True, help='lines {"key": ..., "caption": ..., "concepts": [...]}')
    p.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default 1)")
    p.add_argument("--caption-key", help="column or json key (default caption; in .tar the .txt files)")
    p.add_argument("--key", help=f"column or json key (default {', '.join(KEYS)}, else the row's number)")
    p = commands.add_parser("eval", help="precision, recall and F1 of base noun phrases, before the filters")
    p.add_argument("gold", help="captions with [noun phrases]; what overlaps a {phrase} does not count")
    p.add_argument("--weights", help="a file that train wrote, or nltk (default assets/tagger.json.gz)")
    p = commands.add_parser("train", help="train the tagger")
    p.add_argument("--corpus", nargs="+", required=True, help="word_TAG lines: zips; text counts thrice")
    p.add_argument("--output", default=WEIGHTS, help="gzipped json (default assets/tagger.json.gz)")
    if len(argv) == 1 and argv[0] not in commands.choices and not argv[0].startswith("-"):
        stem, extension = os.path.splitext(argv[0])
        if extension not in FORMATS:
            return print("\n".join(extract(argv[0])))
        argv = ["extract", argv[0], "--output", stem + ".concepts.jsonl"]
    args = parser.parse_args(argv)
    {"extract": extract_files, "eval": evaluate, "train": train}[args.command](args)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # emoji where the terminal has no UTF-8
    try:
        main(sys.argv[1:])
    except (OSError, ValueError, LookupError, KeyboardInterrupt) as e:
        sys.exit(f"error: {str(e) or 'interrupted; the same command goes on'}")
