r"""Captions -> noun-phrase concepts, and hard negatives made of a caption's own words.

    >>> extract("A cat sits on its hind legs, and swats at the plant.")
    ['A cat', 'its hind legs', 'the plant']

    extract, extract_batch     the concepts of one caption, of many
    index_phrases              those of a batch as tensors, for the losses
    swap_negatives             hard negatives: two words or phrases exchanged,
    substitute_negatives       a word replaced by another of its class,
    negate, shuffle_bigrams    a statement negated, the order of the words changed
    unit_pairs                 parts of a caption, each with a false version of it

How a phrase is found (ConceptExtractor has these steps in this order):
    1. WORD, a regular expression, cuts the caption into words.
    2. FastTagger gives each word a tag of the Penn Treebank: NN is a noun, JJ an adjective. It is
       an averaged perceptron; assets/tagger.json.gz holds its weights.
    3. refine gives some words a class of assets/lexicon.json instead of their tag: "of" is OF.
    4. GRAMMAR, rules over tags, marks the noun phrases.
    5. "A group" and "people" with "of" between them become one phrase.
    6. JUNK leaves out those that no image shows, such as "the top".

This file needs numpy and its two files in assets/. NLTK, torch and tqdm are imported only where
they are used. `python concepts.py --help` lists the commands.
"""
import argparse
import csv
import functools
import gzip
import hashlib
import json
import multiprocessing
import os
import random
import re
import shlex
import signal
import sys
import threading
import zipfile
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

ASSETS = Path(__file__).resolve().parent / "assets"
LEXICON = ASSETS / "lexicon.json"
WEIGHTS = ASSETS / "tagger.json.gz"


# ----------------------------------------------------------------------------- concepts of captions
def extract(caption):
    """The concepts of one caption, a list of str; extract_batch is much faster for many."""
    return default_extractor().extract(caption)


def extract_batch(captions):
    """The concepts of each of a list of captions: a list of lists of str.

    Concepts are parts of their caption, letter by letter, in its order, each once whatever its
    case. A caption in which none is found is its own concept, without the space around it; a blank
    one has none. TypeError for anything but a list of str, ValueError without assets/.
    """
    return default_extractor().extract_batch(captions)


@functools.lru_cache(maxsize=None)
def default_extractor():
    """The ConceptExtractor with our weights, loaded when it is first asked for."""
    return ConceptExtractor()


def index_phrases(lists):
    """Number the phrases of a batch, so that each string is encoded once.

    lists: for each caption the list of its phrases, as extract_batch returns them. Returns
        strings  U different str, in the order in which they first appear
        ids      (U,) int64, string_id of each
        pairs    (P, 2) int64, (number of the caption, number of the string), each pair once

    "A cat", which begins one caption, and "a cat" within another are two strings, which a text
    tower may tell apart, but one concept: their ids are equal, and the losses take equal ids as the
    same concept. Otherwise "A cat" would be a negative of the image that shows "a cat".
    """
    import torch
    index = {}
    pairs = []
    for row, phrases in enumerate(lists):
        if isinstance(phrases, str) or not all(isinstance(phrase, str) for phrase in phrases):
            raise TypeError(f"expected a list of phrases for each caption, got {phrases!r:.80}")
        for phrase in dict.fromkeys(phrases):
            column = index.setdefault(phrase, len(index))
            pairs.append((row, column))
    strings = list(index)
    ids = torch.tensor([string_id(string) for string in strings], dtype=torch.long)
    return strings, ids, torch.tensor(pairs, dtype=torch.long).view(-1, 2)


def string_id(text):
    """A 63-bit hash of the lower-case text, equal in all processes, unlike Python's own."""
    digest = hashlib.blake2b(text.lower().encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


# ------------------------------------------------------------------------------------ the extractor
BATCH = 256  # captions tagged together
MAX_SENTENCE = 64  # words: a longer sentence is cut, which keeps the time linear
MAX_CONCEPT = 8  # words


class Word(NamedTuple):
    start: int
    end: int
    text: str  # in lower case
    tag: str  # see GRAMMAR


class ConceptExtractor:
    """Finds noun phrases in captions. May be pickled, and shared by threads.

    weights: None for ours, "nltk" for NLTK's averaged_perceptron_tagger_eng, or the path of a file
    that `concepts.py train` wrote. Raises ValueError for a file that is missing or damaged,
    LookupError if NLTK's data is missing.
    """
    def __init__(self, weights=None):
        try:
            lexicon = json.loads(LEXICON.read_text("utf-8"))
            model = load_weights(weights)
            _, tagdict, classes = model
            if not {*tagdict.values()} <= {*classes} <= {*lexicon["tags"]}:
                raise ValueError("its tags are not those of the lexicon")
        except (OSError, EOFError, ValueError, TypeError, AttributeError, ArithmeticError,
                gzip.zlib.error) as error:
            raise ValueError(f"{weights or ASSETS}: {error}; expected assets/ as it was, beside "
                             "concepts.py, or a file that its train command wrote") from None
        self.auxiliary = set(lexicon["auxiliary"])
        self.only = lexicon["only"]
        self.class_of = {}
        for name, words in lexicon["classes"].items():
            self.class_of.update(dict.fromkeys(words, name))
        self.symbol = {tag: chr(0xC0 + number) for number, tag in enumerate(lexicon["tags"])}
        self.tag_of = {symbol: tag for tag, symbol in self.symbol.items()}
        self.tagger = FastTagger(*model)
        self.rules = compile_grammar(self.symbol)

    def extract(self, caption, spans=False):
        """The concepts of one caption."""
        return self.extract_batch([caption], spans)[0]

    def extract_batch(self, captions, spans=False):
        """As the function extract_batch; spans: (start, end) in the caption instead of strings."""
        found = []
        for caption, phrases in zip(captions, self.phrases(captions)):
            kept = {}
            for start, end in phrases:
                phrase = caption[start:end]
                if not self.is_junk(phrase):
                    kept.setdefault(phrase.lower(), (start, end))
            if not kept and caption.strip():
                kept[caption] = (len(caption) - len(caption.lstrip()), len(caption.rstrip()))
            if spans:
                found.append([*kept.values()])
            else:
                found.append([caption[start:end] for start, end in kept.values()])
        return found

    def phrases(self, captions, merge=True):
        """Yield the noun phrases of each caption, [(start, end), ...], before any is left out.

        merge: "a group of people" is one phrase, not two.
        """
        if isinstance(captions, str):
            raise TypeError(f"expected a list of captions, got the text {captions!r:.80}")
        for i in range(0, len(captions), BATCH):
            yield from self.phrases_of_batch(captions[i:i + BATCH], merge)

    def phrases_of_batch(self, captions, merge):
        places, symbols, chunks = self.parse(captions)
        measure_of = self.symbol["QN"] + self.symbol["OF"]
        found = [[] for _ in captions]
        previous_end = 0
        for first, end in chunks:
            number, start, _ = places[first]
            _, _, stop = places[end - 1]
            spans = found[number]
            # "a group" ends in a measure, and only "of" stands between it and "people".
            if merge and previous_end == first - 1 and symbols[first - 2:first] == measure_of:
                whole_start, _ = spans[-1]
                if len(captions[number][whole_start:stop].split()) <= MAX_CONCEPT:
                    spans.pop()
                    start = whole_start
            spans.append((start, stop))
            previous_end = end
        return found

    def parse(self, captions):
        """Captions -> a row of places: the words, and one more before each sentence.

        Returns places, of each (number of its caption, start, end), with end 0 before a sentence;
        symbols, a str with the symbol of each place's tag; and chunks, the noun phrases:
        [(first place, place after the last), ...].
        """
        sentences, places = [], []
        for number, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise TypeError(f"expected a caption (str), got {caption!r:.80}")
            text = caption.replace("’", "'")
            # A letter whose lower case is longer would move all places behind it.
            if not LOWER_CASE_WORD.search(text) and len(text.lower()) == len(text):
                text = text.lower()
            sentence = None
            for match in WORD.finditer(text):
                if sentence is None:
                    sentence = []
                    sentences.append(sentence)
                    places.append((number, 0, 0))
                word = match[0]
                sentence.append(word)
                places.append((number, match.start(), match.end()))
                if word in ".!?;" or len(sentence) == MAX_SENTENCE:
                    sentence = None
        symbols = []
        for tagged in self.tagger.tag_sents(sentences):
            symbols.append(self.symbol["S"])
            symbols += [self.refine(word, tag) for word, tag in tagged]
        return places, *self.chunk("".join(symbols))

    @functools.lru_cache(maxsize=1 << 15)
    def refine(self, word, tag):
        """The symbol of the word's class in the lexicon, or else, as for class "", of its tag."""
        lower = word.lower()
        if word == "'" and tag != "POS":
            name = ":"  # a quotation mark, which the tagger may take for a noun
        elif lower in self.class_of:
            name = self.class_of[lower]
        elif word[0] in "<&" or not any(letter.isalnum() for letter in word):
            name = ":"  # markup, emoji and other signs
        elif lower.endswith("ing"):
            name = "GN"
        else:
            name = ""
        if name and tag in self.only.get(name, [tag]):
            return self.symbol[name]
        return self.symbol[tag]

    def chunk(self, symbols):
        """Apply GRAMMAR: the symbols as its rules leave them, and the chunks of parse."""
        *corrections, (_, noun_phrase) = self.rules  # the last rule is NP
        for label, rule in corrections:
            symbols = rule.sub(rf"\g<left>{self.symbol[label]}", symbols)
        return symbols, [match.span("chunk") for match in noun_phrase.finditer(symbols)]

    @functools.lru_cache(maxsize=1 << 15)
    def is_junk(self, phrase):
        return len(phrase.split()) > MAX_CONCEPT or bool(JUNK.search(phrase))

    def words(self, caption):
        """The Words of a caption, with their tags as the rules of the grammar leave them."""
        places, symbols, _ = self.parse([caption])
        words = []
        for (_, start, end), symbol in zip(places, symbols):
            if end > 0:
                words.append(Word(start, end, caption[start:end].lower(), self.tag_of[symbol]))
        return words


# ---------------------------------------------------------------------------------------- its words
# Words, as NLTK's word tokenizer finds them in a caption. Every repeat is bounded, so that the
# time stays linear in the length of any text.
WORD = re.compile(r"""
    </?[A-Za-z][^<>\n]{0,60}>                     # markup is one word
  | &\#?\w{1,8};                                  # so is &amp;
  | https?://\S{1,200}
  | [A-Z]\.(?:[A-Z]\.){1,4}                       # U.S.A.
  | [A-Z]\.(?=[ \t]+[A-Z])                        # W. Centre
  | (?:Mr|Mrs|Ms|Dr|St|Ave)\.(?=[ \t])
  | (?i:close[ ]up|each[ ]other|one[ ]another)\b
  | [A-Za-z]{2,6}(?=n't\b)                        # do|n't
  | n't\b
  | w/(?=[ \t])                                   # with
  | \w[\w\u0300-\u036f]{0,49}(?:                 # a word, with its accents where these are
                                                  # signs of their own, and what joins its parts:
        (?: [-/](?=\w)                            #   t-shirt, black/white
          | &(?=\w)(?!(?:amp|quot|apos|lt|gt|nbsp);)  # R&B, but dog|&quot;
          | \.(?=[a-z\d])                         #   3.5, x.org
          | (?<=\d)[,:](?=\d)                     #   1,000 and 10:30
          | '(?!(?i:s|m|d|ll|re|ve|t)\b)(?=\w)    #   o'clock, but man|'s
        )\w[\w\u0300-\u036f]{0,49}){0,8}
  | '(?i:s|m|d|ll|re|ve)\b
  | \S                                            # any other sign is a word of its own
""", re.VERBOSE)

# A caption without a match is all in capitals or a title: its case says nothing about its words.
LOWER_CASE_WORD = re.compile(
    r"(?<![\w'])(?!(?:an?|and|as|at|by|for|from|in|is|of|on|or|the|to|with|w)\b)[a-z]")


# --------------------------------------------------------------------------------------- its tagger
PADS = ["-START-", "-START2-"]  # what a tagger sees before a sentence
# A word has a share in the scores of itself, of the words one and two places after it, and of those
# one and two places before it.
ROLE_DISTANCES = [0, 1, 2, -1, -2]


class FastTagger:
    """NLTK's PerceptronTagger, the same tags, for many sentences at once.

    The tagger goes from left to right. The score of a tag is a sum of weights: of features of the
    word, of its neighbours, and of the two tags before it. What depends on words alone is summed
    once for each different word, and kept. What depends on tags is looked up for the first words
    of all sentences at once, then for their second words, and so on.

    weights {feature: {tag: weight}}, tagdict {word: its only tag} and classes (all tags) are as
    NLTK's encode_json_obj returns them. Weights must be multiples of a power of two: their sums
    then do not depend on the order, and both taggers agree.
    """
    def __init__(self, weights, tagdict, classes):
        # Of equal scores argmax takes the first tag, NLTK the last.
        self.tags = sorted(classes, reverse=True) + PADS
        self.only_tag = {word: self.tags.index(tag) for word, tag in tagdict.items()}
        # NLTK's pads come in one order as words, and in the other as tags.
        self.only_tag["-START-"] = self.tags.index("-START2-")
        self.only_tag["-START2-"] = self.tags.index("-START-")
        self.row_of = {feature: row for row, feature in enumerate(weights, 1)}
        scores = [[0] * len(classes)]  # row 0 is for features without weights
        for row in weights.values():
            scores.append([row.get(tag, 0) for tag in self.tags[:-2]])
        self.scores = np.array(scores, "f4")  # (features, C)
        history = [[self.score_of_history(p, q) for q in self.tags] for p in self.tags]
        self.history = np.array(history)  # (C + 2, C + 2, C)

    def rows(self, features):
        return [self.row_of.get(feature, 0) for feature in features]

    def score_of_history(self, before, before_that):
        features = (f"i-1 tag {before}", f"i-2 tag {before_that}",
                    f"i tag+i-2 tag {before} {before_that}")
        return self.scores[self.rows(features)].sum(0)

    @functools.lru_cache(maxsize=1 << 14)  # about a kilobyte each
    def learn(self, word):
        """The WordScores of a word."""
        norm = normalize_word(word)
        end = norm.replace("-START", "-END")  # a pad also stands behind the sentence before
        features = (  # a line for each of ROLE_DISTANCES, filled up with features without weights
            "bias", f"i suffix {word[-3:]}", f"i pref1 {word[0]}", f"i word {norm}",
            f"i-1 word {norm}", f"i-1 suffix {norm[-3:]}", "", "",
            f"i-2 word {norm}", "", "", "",
            f"i+1 word {end}", f"i+1 suffix {end[-3:]}", "", "",
            f"i+2 word {end}", "", "", "")
        after = self.rows([f"i-1 tag+i word {tag} {norm}" for tag in self.tags])
        roles = self.scores[self.rows(features)].reshape(5, 4, -1).sum(1)  # (5, C)
        return WordScores(self.only_tag.get(word, -1), np.array(after), roles)

    def tag_sents(self, sentences):
        """Lists of words -> lists of (word, tag)."""
        words = []
        for sentence in sentences:
            words += PADS
            words += sentence
        words += PADS  # behind the last sentence
        number_of = {word: number for number, word in enumerate(dict.fromkeys(words))}
        known = [self.learn(word) for word in number_of]
        only_tag, after, roles = (np.array(column) for column in zip(*known))

        numbers = np.array([number_of[word] for word in words])  # (W,)
        tags = only_tag[numbers]  # (W,), -1 where it is still to be found
        score_of_words = np.zeros((len(words), roles.shape[2]), "f4")  # (W, C)
        for role, distance in enumerate(ROLE_DISTANCES):
            score_of_words += roles[np.roll(numbers, distance), role]

        lengths = np.array([len(sentence) for sentence in sentences], int)
        first = np.cumsum(lengths + 2) - lengths  # where each sentence begins
        for step in range(max(lengths, default=0)):
            i = first[lengths > step] + step  # a word of each sentence that is long enough
            i = i[tags[i] < 0]
            score_of_tags = self.history[tags[i - 1], tags[i - 2]]
            score_of_both = self.scores[after[numbers[i], tags[i - 1]]]
            tags[i] = (score_of_words[i] + score_of_tags + score_of_both).argmax(1)

        names = [self.tags[tag] for tag in tags.tolist()]
        tagged = []
        for sentence, start in zip(sentences, first.tolist()):
            tagged.append(list(zip(sentence, names[start:start + len(sentence)])))
        return tagged


class WordScores(NamedTuple):
    """What FastTagger knows of a word; C is the number of tags.

    tag: the number of the word's only tag, or -1 if the tag depends on the context.
    after (C + 2,): for each tag or pad before the word, the row of FastTagger.scores for both.
    roles (5, C): the word's share in the scores of itself and of its four neighbours.
    """
    tag: int
    after: np.ndarray
    roles: np.ndarray


def normalize_word(word):
    """The form of a word in the tagger's features, as PerceptronTagger.normalize."""
    if word in PADS:
        return word
    if "-" in word and word[0] != "-":
        return "!HYPHEN"
    if word[0].isdigit():
        return "!YEAR" if word.isdigit() and len(word) == 4 else "!DIGITS"
    return word.lower()


def load_weights(weights):
    """(weights, tagdict, classes) of a tagger, as NLTK's PerceptronTagger writes them.

    Weights are rounded to multiples of 1/1024, so that their sums are exact.
    """
    if weights == "nltk":
        from nltk import PerceptronTagger
        table, tagdict, classes = PerceptronTagger().encode_json_obj()
    else:
        text = gzip.decompress(Path(weights or WEIGHTS).read_bytes())
        table, tagdict, classes = json.loads(text)
    rounded = {}
    for feature, row in table.items():
        rounded[feature] = {tag: round(weight * 1024) / 1024 for tag, weight in row.items()}
    if not classes:
        raise ValueError("no tags")
    return rounded, tagdict, classes


# -------------------------------------------------------------------------------------- its grammar
# The rules for noun phrases, in NLTK's notation: <A|B> is one word with tag A or B, {...} is what
# gets the label, and around the braces stands the context that it needs. Each rule sees the labels
# of those before it. All but the last give one word another tag: their braces hold exactly one.
# To change a rule, see the tags: ConceptExtractor().words(caption); and measure the phrases:
# python concepts.py eval. Beside the tags of the Penn Treebank there are ours, from the lexicon:
#   S    before each sentence                DTA  a, an, each: with a singular
#   IN   a preposition, whatever follows     INX  one that may also be a conjunction or an adverb
#   OF   of                                  LOC  inside, outside, past
#   QN   a measure: a group, a bowl          ORG  orange, the fruit or the colour
#   PX   a participle: covered, shaped       GN   a word in -ing that was tagged as a noun
#   CAN  can, the noun or the verb
# Where a part may be repeated, no two alternatives in it may read the same tags: matching would
# take exponential time. A test measures it.
NOUN = "<NN|NNS|NNP|NNPS|QN>"
PARTICIPLE = f"(<VBG|VBN|VBD|GN|PX>(?={NOUN}|<JJ|ORG|PX|GN|VBN>))?"
NEXT_ADJECTIVE = f"((<,><CC>?|<CC>)(?=<RB>*<JJ|ORG>)|<,|CC><RB>?<VBN|PX>(?={NOUN}))?"
ADJECTIVE = f"<RB>*<JJ|ORG>{NEXT_ADJECTIVE}"
UNIT = (f"({ADJECTIVE}{PARTICIPLE}"                # red, old and worn
        f"|<RB>+<VBN|PX>(?={NOUN}|<JJ>)"           # brightly painted
        f"|<CD>{PARTICIPLE}"                       # two
        f"|{NOUN}(<PX|GN>(?={NOUN}))?)")           # fire (hydrant), snow covered (hill)
BODY = f"{UNIT}*{NOUN}"
WITHOUT_NOUN = f"(({ADJECTIVE})+|<CD>)"
DETERMINED = (rf"<PDT>?<DTA|DT|PRP\$>({PARTICIPLE}{BODY}|{WITHOUT_NOUN}?<ORG|GN|LOC>)"
              rf"|<DTA|PRP\$><JJ>+")
GRAMMAR = rf"""
JJ:  <S|OF|IN|INX|TO|VBG|,|CC>{{<VBN|PX>}}(?=<JJ>|{NOUN})   # next to parked cars
JJ:  <OF|IN|TO>{{<VBG|GN>}}(?={NOUN})                       # in running water
JJ:  <S|DTA|DT|PRP\$|IN|JJ>{{<RB|LOC>}}(?={NOUN})           # a hilly landscape, an outside table
NN:  <PRP\$>{{<RB>}}(?!<JJ|VBN|VBG|PX|RB>)                  # on its back
NN:  <JJ>{{<CD>}}(?!<JJ|CD>|{NOUN})                         # a pink one
NN:  {{<CAN>}}(?!<VB|VBP|RB|PRP>)                           # a trash can
JJ:  {{<JJR|JJS>}}
VBZ: <DTA>{PARTICIPLE}{UNIT}*<NN|NNP>{{<NNS>}}(?!{NOUN})    # a tall man rides
NP:  {{({DETERMINED}|{BODY}|{WITHOUT_NOUN}<GN>|<JJ>*<ORG>)(<POS>{PARTICIPLE}{BODY})*}}
"""


def compile_grammar(symbol):
    """GRAMMAR as regular expressions over texts with one symbol for each tag.

    symbol: {tag: its symbol}. Returns [(label, pattern), ...]. In a pattern the group "chunk" is
    what stands in braces, and the group "left" is what stands before: with j and c as symbols,
    "NN: <JJ>{<CD>}(?!<JJ>)" becomes ("NN", "(?P<left>[j])(?P<chunk>[c])(?![j])").
    """
    def symbol_class(match):
        return "[" + "".join(symbol[tag] for tag in match[1].split("|")) + "]"

    text = re.sub(r"[ \\]|#.*", "", GRAMMAR)  # spaces, the backslash of PRP\$, comments
    text = re.sub("<(.+?)>", symbol_class, text)
    text = re.sub(r"\((?!\?)", "(?:", text)  # groups need no numbers
    text = text.replace("{", ")(?P<chunk>").replace("}", ")")
    rules = []
    for label, rule in re.findall("(.+?):(.+)", text):
        rules.append((label, re.compile("(?P<left>" + rule)))
    return rules


# ------------------------------------------------------------------------------- what is no concept
JUNK = re.compile(r"""
    (?i:\A                                        # an empty word with or without a determiner
        (?:(?:a|an|the|this|that|these|those|some|any|each|every|another|no
             |his|her|its|their|my|your|our)(?:\s+|\Z))?
        (?:close[ ]up|close-up|closeup|image|photo|photograph|picture|view|shot|scene
          |top|side|front|back|middle|background|foreground|corner|left|right|center|edge
          |someone|something|somebody|anyone|anything|everything|nothing|other|others|lots|one)?
     \Z)
  | (?:\A|\s)\S\Z                                 # a single letter at the end
  | [][(){}<>]                                    # brackets and markup
  | \w_\w
  | (?i:https?:|\b(?:IMG|DSC)\d+|^(?:jpe?g|png)$)
""", re.VERBOSE)


# ------------------------------------------------------------------ hard negatives: words exchanged
NOUN_TAGS = {*NOUN.strip("<>").split("|")}
# What swap_negatives exchanges: for each kind, groups of tags; both words are of one group.
SWAP_TAGS = {
    "noun": [NOUN_TAGS],
    "adjective": [{"JJ", "ORG"}],
    "verb": [{"VB"}, {"VBD"}, {"VBG"}, {"VBN"}, {"VBP"}, {"VBZ"}],  # of one form
    "phrase": [{"phrase"}],
}


def swap_negatives(caption, rng, kinds=("noun", "adjective", "verb", "phrase")):
    """NegCLIP's hard negatives (ICLR 2023): two words or phrases of one kind exchanged.

    rng: a random.Random. Returns a list of str, at most one for each kind, and never the caption
    itself: "a red dog near a blue cat" gives "a red cat near a blue dog", "a blue dog near a red
    cat" and "a blue cat near a red dog". Nouns are those that end a noun phrase; a verb changes
    places with one of the same form, an adjective with one of another noun phrase. What is seen to
    be still true ("a cat and a dog" for "a dog and a cat") is drawn again, ten times at most: then
    there is no text. ValueError for an unknown kind.

    Of 100 texts of each kind, read as for substitute_negatives, those that were grammatical and
    false: noun 53, adjective 57, phrase 67, counted when a quarter of the adjectives were two of
    one noun, and lists were exchanged, too. Most describe what cannot be ("a brown pillow leaps
    across a small dog"). The errors are a singular in place of a plural, phrases cut amiss, and
    texts that are still true.
    """
    spans = swappable(caption)
    negatives = []
    for kind in kinds:
        if kind not in SWAP_TAGS:
            raise ValueError(f"kind {kind!r}: expected one of {', '.join(SWAP_TAGS)}")
        groups = []
        for tags in SWAP_TAGS[kind]:
            group = different_words(caption, spans, tags)
            if len(group) > 1:
                groups.append(group)
        if groups:
            group = rng.choice(groups)
            whole = []      # noun phrases, of which "a large group of small dogs" has two
            if kind == "adjective":
                whole = next(default_extractor().phrases([caption], merge=False))
            for _ in range(10):
                first, second = sorted(rng.sample(group, 2))
                one_noun = of_one_noun(caption, whole, first, second)
                if not one_noun and not is_reordered_list(caption, spans, first, second):
                    negatives.append(exchange(caption, first, second))
                    break
    return [text for text in dict.fromkeys(negatives) if text.lower() != caption.lower()]


def of_one_noun(caption, phrases, first, second):
    """Whether two adjectives, spans of the caption, describe one noun: "a small brown dog"."""
    in_one = any(start <= first[0] and second[1] <= end for start, end in phrases)
    return in_one and not re.search("['’]", caption[first[1]:second[0]])  # a red dog's blue collar


def is_reordered_list(caption, spans, first, second):
    """Whether two spans of the caption, exchanged, only tell a list in another order: "a bird, a
    cat and a dog" for "a dog, a cat and a bird". spans: see swappable."""
    phrases = [(start, end) for start, end, tag in spans if tag == "phrase"]
    around = []     # the phrases that the two belong to
    for a, b in (first, second):
        around += [(start, end) for start, end in phrases if start <= a and b <= end]
    if len(around) != 2 or around[0] == around[1]:
        return False
    (_, end_of_one), (start_of_other, _) = around
    link = caption[end_of_one:start_of_other]
    for start, end in phrases:
        if end_of_one <= start and end <= start_of_other:
            link = link.replace(caption[start:end], "", 1)
    if not set(link.replace(",", " ").split()) <= {"and", "or"}:
        return False
    in_another_order = exchange(caption, *around)
    return without_articles(exchange(caption, first, second)) == without_articles(in_another_order)


def without_articles(text):
    """The text in lower case, without articles: "The woman and man" is "woman and the man"."""
    return re.sub(r"\b(?:an?|the)\s+", "", text.lower())


def swappable(caption):
    """[(start, end, tag), ...] of what may change places: words, and phrases with tag "phrase"."""
    extractor = default_extractor()
    phrases = next(extractor.phrases([caption]))
    ends = {end for _, end in phrases}
    spans = [(start, end, "phrase") for start, end in phrases]
    for word in extractor.words(caption):
        inner_noun = word.tag in NOUN_TAGS and word.end not in ends  # "fire" of a fire hydrant
        contracted = re.match("n?['’]", word.text)  # "'s" of "she's", "n't" of "isn't"
        if not (inner_noun or contracted or word.text in extractor.auxiliary):
            spans.append((word.start, word.end, word.tag))
    return spans


def different_words(caption, spans, tags):
    """The spans with one of the tags, in their order, the first of each different text."""
    found = {}
    for start, end, tag in spans:
        if tag in tags:
            found.setdefault(caption[start:end].lower(), (start, end))
    return sorted(found.values())


def exchange(caption, first, second):
    """The caption with two spans of it in each other's place, "a" and "an" mended."""
    (a, b), (c, d) = first, second
    one, two = caption[a:b], caption[c:d]
    if a == 0 and one == one.capitalize():  # the capital stays in front
        one, two = one.lower(), two[0].upper() + two[1:]
    text = join(join(caption[:a], two) + caption[b:c], one)
    return text + caption[d:]


LAST_ARTICLE = re.compile(r"(?i)\ba(n?)\s+\Z")
AFTER_AN = re.compile(r"(?i)(?!uni|use|eu|one)[aeiou]|hour")


def join(before, words):
    """Two texts as one. An "a" or "an" at the end of the first becomes what the second needs.

    Others stay as they are: a caption may say "a orange", and its negative should not differ there.
    """
    article = LAST_ARTICLE.search(before)
    needs_n = bool(AFTER_AN.match(words))
    if article and needs_n != bool(article[1]):
        before = before[:article.start(1)] + "n" * needs_n + before[article.end(1):]
    return before + words


def shuffle_bigrams(caption, rng):
    """One of FSC-CLIP's negatives: the caption's words in pairs, and these in another order.

    rng: a random.Random. Returns a list of one text, or of none where ten orders gave none that
    differs in more than its capitals.
    """
    words = caption.split()
    pairs = [words[i:i + 2] for i in range(0, len(words), 2)]
    for _ in range(10):
        rng.shuffle(pairs)
        text = " ".join(chain.from_iterable(pairs))
        if text.lower() != " ".join(words).lower():
            return [text]
    return []


# --------------------------------------------------------------- hard negatives: statements negated
# What makes "has" an auxiliary. The tag alone does not tell: it is VBN for an unknown noun, too
# ("has mermaid painting on it"), and RB for the adverb of "has very long hair".
PERFECT = r"""just already recently nearly almost finally now \w+ed been begun bent bitten blown
    bought broken brought built caught chosen come cut done drawn driven drunk dug eaten fallen
    flown found frozen given gone got gotten grown had held hidden hit hung kept laid left let lit
    lost made met paid put ridden risen run seen sent set shot shown slid slept spread sprung
    stolen stood struck stuck swum swung taken thrown torn won worn wound written""".split()
# What negate tries in turn: the tags of the word (any, if empty), the word, what takes its place.
NEGATIONS = [
    ((), r"\bnot\b ?", ""),
    ((), r"\b(is|are|was|were|has|have|had|do|does|did) ?n['’]t\b", r"\1"),
    ((), r"\bca ?n['’]t\b|\bcannot\b", "can"),
    ((), r"\bno\b", "some"),
    ((), r"\b(?:is|are|was|were)\b", r"\g<0> not"),
    ((), r"\bwithout\b", "with"),
    ((), r"\bwith\b", r"\g<0>out"),
    (("VBN", "VBD", "RB"), rf"(?:(?<=\bhas )|(?<=\bhave ))(?:{'|'.join(PERFECT)})\b",
     r"not \g<0>"),  # has jumped
    (("VBZ",), r"\bhas\b", "does not have"),
    (("VBZ", "VBP"), r"\b([a-z]+)ies\b", r"does not \1y"),  # what ends in s is no VBP
    (("VBZ", "VBP"), r"\b([a-z]+?)(?:(?<=sh|ch|ss)es|(?<=o)es|(?<!s)s)\b", r"does not \1"),
    (("VBP",), r"(?<!can )(?<!will )\b[a-z]+\b", r"do not \g<0>"),
    (("VBG",), r"\b\w+", r"not \g<0>"),
    (("MD", "CAN"), r"\b(?:can|could|will)\b(?! (?:we|you)\b)", r"\g<0> not"),
    (("DTA", "DT"), r"\b(?:an?|the|some)\b", "no"),
]


def negate(caption, rng=None):
    """CoN-CLIP's negatives: one statement negated, by the first of NEGATIONS that fits, a str.

    "A dog is on a sofa" -> "A dog is not on a sofa"; where none fits, "no " before the caption.
    rng: a random.Random, which chooses among several places; without it the first is taken.
    """
    tag_at = {word.start: word.tag for word in default_extractor().words(caption)}
    for tags, word, negation in NEGATIONS:
        matches = []
        for match in re.finditer(word, caption, re.I):
            if not tags or tag_at.get(match.start()) in tags:
                matches.append(match)
        if matches:
            match = rng.choice(matches) if rng else matches[0]
            new = match.expand(negation)
            if match[0].isupper() and len(match[0]) > 1:
                new = new.upper()
            elif match[0][0].isupper():
                new = new[:1].upper() + new[1:]
            text = caption[:match.start()] + new + caption[match.end():]
            if text.strip():  # "not" alone would leave nothing
                return text
    return f"no {caption}"


# ------------------------------------------------------------------- hard negatives: words replaced
def substitute_negatives(caption, rng, kinds=("attribute", "noun", "number", "preposition"),
                         frequency=None, within=None):
    """The caption with one word replaced by another of its class: "a red dog" -> "a black dog".

    The classes are the "substitutes" of assets/lexicon.json: words that exclude one another. What
    takes the place of a word is not in the caption already, nor may it be true together with a
    word that is ("navy" beside "blue"). Singular and plural stay as they are.

    Parameters
    ----------
    rng : a random.Random.
    kinds : what is replaced; at most one text is returned for each. ValueError for others.
    frequency : None, or what word_frequency made of the captions at hand. Words are then drawn as
        often as these captions use them, so that no rare word betrays a negative, and words that
        they do not use are not drawn.
    within : None, or (start, end), the part of the caption in which words may be replaced.

    Returns a list of str. Each differs from the caption in one place, in the word itself and an "a"
    or "an" before it.

    100 texts of each kind, made of captions of Flickr8k's test split, were read by one person. Both
    grammatical and false were: attribute 99, noun 97, number 100 (in 3 of them the number is
    smaller, and "two dogs" may be held to be true of three), preposition 99. The rules had been
    mended after a first draw (nouns 96, prepositions 90). Errors come of words that were misread,
    and of what the caption goes on to say ("a cat jumps, two other dogs watch").
    """
    words, phrases = words_and_phrases(caption)
    counts = Counter(word.text for word in words)
    negatives = []
    for kind in kinds:
        if kind not in FIND_PLACES:
            raise ValueError(f"kind {kind!r}: expected one of {', '.join(FIND_PLACES)}")
        choices = []
        for place in FIND_PLACES[kind](words, phrases):
            start, end = words[place.first].start, words[place.end - 1].end
            options = options_of(kind, place, words, counts, frequency)
            inside = within is None or (within[0] <= start and end <= within[1])
            if options and inside:
                choices.append((start, end, options))
        if choices:
            start, end, options = rng.choice(choices)
            [new] = rng.choices(list(options), list(options.values()))
            negatives.append(replace_words(caption, start, end, new))
    return negatives


def word_frequency(captions):
    """{word in lower case: how often the captions use it}, for substitute_negatives."""
    frequency = Counter()
    for caption in captions:
        frequency.update(WORD.findall(caption.lower()))
    return frequency


def replace_words(caption, start, end, new):
    """The caption with new words in a span, in its case, and an "a" or "an" before them mended."""
    old = caption[start:end]
    in_title = not LOWER_CASE_WORD.search(caption)
    if old.isupper() and len(old) > 1:
        new = new.upper()
    elif old[0].isupper() and (in_title or not caption[:start].strip()):  # but not for a Frisbee
        new = new[0].upper() + new[1:]
    return join(caption[:start], new) + caption[end:]


class Place(NamedTuple):
    """The numbers of words that might be replaced, and what rules ask about them."""
    first: int
    end: int
    head: str = ""  # the noun that an attribute describes, or the noun after a preposition
    after: str = ""  # the word before the phrase of a noun
    determiners: tuple = ()  # the Words before a noun in its phrase


@functools.lru_cache(maxsize=16)  # unit_pairs asks for the same caption several times
def words_and_phrases(caption):
    """The Words of a caption, and its noun phrases as [(first word, end), ...]."""
    extractor = default_extractor()
    words = extractor.words(caption)
    first_at = {word.start: number for number, word in enumerate(words)}
    end_at = {word.end: number + 1 for number, word in enumerate(words)}
    spans = next(extractor.phrases([caption], merge=False))
    return words, [(first_at[start], end_at[end]) for start, end in spans]


def find_attributes(words, phrases):
    """Places of words before the noun of their phrase, and of the colour in "a man in red"."""
    inside = set()
    for first, end in phrases:
        inside.update(range(first, end))
        for number in range(first, end - 1):
            head = head_after(words, number, end)
            if head:
                yield Place(number, number + 1, head)
    for number in range(1, len(words)):
        if words[number - 1].text == "in" and words[number].tag == "JJ" and number not in inside:
            yield Place(number, number + 1)


def head_after(words, number, end):
    """The noun that a word of a phrase describes, the last of the next nouns; "" before a 's."""
    head = ""
    for word in words[number + 1:end]:
        if word.tag in NOUN_TAGS:
            head = word.text
        elif head or word.tag == "POS":
            break
    return head


def find_nouns(words, phrases):
    """Places of the nouns that end a phrase or stand before a 's; "fire truck" is one noun."""
    for first, end in phrases:
        begin = first  # of what belongs to the next noun
        for number in range(first, end):
            is_last = number + 1 == end or words[number + 1].tag == "POS"
            if not is_last or words[number].tag not in NOUN_TAGS:
                continue
            noun = number
            while noun > begin and words[noun - 1].tag in NOUN_TAGS | {"GN"}:
                noun -= 1
            after = words[first - 1].text if first > 0 else ""
            yield Place(noun, number + 1, after=after, determiners=tuple(words[begin:noun]))
            begin = number + 1


def find_numbers(words, phrases):
    """Places of numbers."""
    for number, word in enumerate(words):
        if word.tag == "CD":
            yield Place(number, number + 1)


def find_prepositions(words, phrases):
    """Places of one to three words before a noun phrase, as "in front of" before "a house"."""
    for first, end in phrases:
        for number in range(max(first - 3, 0), first):
            before = words[number - 1].text if number > 0 else ""
            if before not in ("out", "high", "fenced"):  # "looks out into", "fenced in"
                yield Place(number, first, words[end - 1].text)


FIND_PLACES = {"attribute": find_attributes, "noun": find_nouns, "number": find_numbers,
               "preposition": find_prepositions}


def options_of(kind, place, words, counts, frequency):
    """{words that may be put into a place: how often they should be}; counts is of the caption."""
    old = [word.text for word in words[place.first:place.end]]
    rules = rules_of(kind).get(" ".join(old), [])
    rule = next((rule for rule in rules if fits(rule, place)), None)
    options = {}
    if rule is not None:
        for new, excluded in rule.options.items():
            often = 1
            if frequency is not None:
                often = min(frequency.get(word, 0) for word in new.split())
            elsewhere = any(counts[word] > old.count(word) for word in excluded)
            if often > 0 and not elsewhere and new.isdigit() == old[0].isdigit():
                options[new] = often
    return options


class Rule(NamedTuple):
    """What may take the place of a word, and where."""
    options: dict  # {new words: the words that must not stand elsewhere in the caption}
    heads: frozenset = frozenset()  # Place.head is one of these, unless there are none
    after: frozenset = frozenset()  # and so is Place.after
    article: str = ""  # "needed": a singular needs "a", "the", "his"; "not a": food without number


def fits(rule, place):
    """Whether a rule holds for the words in a place."""
    if rule.heads and place.head not in rule.heads:
        is_thing = not any(place.head in nouns for nouns in living_nouns().values())
        if not (is_thing and "a thing" in rule.heads):
            return False
    if rule.after and place.after not in rule.after:
        return False
    # "another dog" says that there is a dog elsewhere, and "no dog" is no statement about one.
    if any(word.text in ("another", "other", "same", "no") for word in place.determiners):
        return False
    tags = {word.tag for word in place.determiners}
    if rule.article == "needed":
        return not tags.isdisjoint({"DTA", "DT", "PRP$", "POS"})
    return rule.article != "not a" or "DTA" not in tags


@functools.lru_cache(maxsize=None)
def rules_of(kind):
    """{word: [Rule, ...]} of one kind. The first rule that fits counts."""
    rules = {}
    for row in substitutes()[kind]:
        if kind == "preposition":
            options = {new: set() for new in row["to"]}
            new_rules = [(old, Rule(options, heads_of(row))) for old in row["from"]]
        else:
            new_rules = rules_of_class(row, kind == "noun")
        for old, rule in new_rules:
            rules.setdefault(old, []).append(rule)
    return rules


def rules_of_class(row, nouns):
    """Yield (word, Rule) for the words of a class; for nouns, for their plurals too."""
    sets = row["words"]
    if nouns and not (row.get("mass") or row.get("plural")):
        plurals = [[plural_of(word) for word in words] for words in sets]
        both = [words + plural for words, plural in zip(sets, plurals)]
        yield from rules_of_form(row, sets, both, "needed")
        yield from rules_of_form(row, plurals, both, "")
    else:
        yield from rules_of_form(row, sets, sets, "not a" if row.get("mass") else "")


def rules_of_form(row, sets, all_forms, article):
    """Yield (word, Rule) for the words of a class in one form; all_forms has each set in all."""
    compatible, excluded = {}, {}  # of a word: the words of all its sets, and what they exclude
    for words, forms in zip(sets, all_forms):
        seen_by = [form.split()[-1] for form in forms]  # one of them shows the set in a caption
        for word in words:
            compatible.setdefault(word, set()).update(words)
            excluded.setdefault(word, set(row.get("unless", ()))).update(seen_by)
    good = [word for word in excluded if word not in substitutes()["never put in"]]
    for word in excluded:
        options = {new: excluded[new] for new in good if new not in compatible[word]}
        yield word, Rule(options, heads_of(row), frozenset(row.get("after", ())), article)


def heads_of(row):
    """The heads of a class, with their nouns for "a person" and "an animal"."""
    heads = set()
    for head in row.get("heads", ()):
        heads |= living_nouns().get(head, {head})
    return frozenset(heads)


@functools.lru_cache(maxsize=None)
def living_nouns():
    """{"a person": nouns, "an animal": nouns}, in singular and in plural."""
    nouns = {"a person": set(substitutes()["person"]), "an animal": set(substitutes()["animal"])}
    for row in substitutes()["noun"]:
        if "kind" in row:
            nouns[row["kind"]].update(chain.from_iterable(row["words"]))
    for singulars in nouns.values():
        singulars.update([plural_of(noun) for noun in singulars])
    return nouns


def plural_of(noun):
    """The plural of a noun; of several words, of the last."""
    *modifiers, word = noun.split()
    if word in substitutes()["plurals"]:
        word = substitutes()["plurals"][word]
    elif word.endswith(("s", "x", "ch", "sh")):
        word += "es"
    elif re.search("[^aeiou]y$", word):
        word = word[:-1] + "ies"
    else:
        word += "s"
    return " ".join([*modifiers, word])


@functools.lru_cache(maxsize=None)
def substitutes():
    """The classes of words that exclude one another; their "about" explains them."""
    return json.loads(LEXICON.read_text("utf-8"))["substitutes"]


# ---------------------------------------------------------------- hard negatives: parts of captions
def unit_pairs(caption, rng, count=2, phrases=None):
    """CS-CLIP's units of a caption, each with a false version of it, a foil, by rules.

    Kargi et al. 2026, Half-truths break similarity-based retrieval, have a language model for both.
    Here a unit is a noun phrase, or a relation: the text from one noun phrase to the next, with
    both. A foil is the unit with a word replaced by another of its class that the caption does not
    use (substitute_negatives), or a relation with two words exchanged.

    rng: a random.Random. count: how many pairs are wanted. phrases: the noun phrases where they are
    known, a list of str, by default extract(caption). Returns a list of at most `count`
    (unit, foil), drawn among all units that have a foil.

    100 pairs, made of captions of Flickr8k's test split, were read one by one, after the rules had
    been mended by as many others: 93 foils were grammatical and false, 7 not grammatical ("a feet
    lays at his kayak", and phrases cut amiss), and none was still true. One reader.
    """
    places = []
    for phrase in phrases or extract(caption):
        # With the article, which changes with the word: "an apple", "a banana".
        match = re.search(rf"(?<!\w)(?:(?i:an?)\s+)?{re.escape(phrase)}(?!\w)", caption)
        if match and phrase.strip():
            places.append(match.span())
    places.sort()
    units = [(start, end, None) for start, end in places]
    for first, second in zip(places, places[1:]):
        if first[1] <= second[0]:
            units.append((first[0], second[1], (first, second)))
    rng.shuffle(units)
    pairs = []
    for start, end, relation in units:
        if len(pairs) == count:
            break
        foils = []
        for changed in substitute_negatives(caption, rng, within=(start, end)):
            foils.append(changed[start:end + len(changed) - len(caption)])
        if relation:
            foils += swapped_relations(caption, *relation, rng)
        if foils:
            pairs.append((caption[start:end], rng.choice(foils)))
    return pairs


# "a dog near a cat" is as true as "a cat near a dog".
SYMMETRIC = {"", "and", "or", "with", "along with", "together with", "near", "by", "beside",
             "next to", "alongside"}


def swapped_relations(caption, first, second, rng):
    """False versions of a relation, a word of its one phrase (start, end) and one of the other
    exchanged. ("A white and brown dog" would still be true.)"""
    (a, b), (c, d) = first, second
    relation = caption[a:d]
    still_true = ""
    if caption[b:c].strip(" ,") in SYMMETRIC:
        still_true = exchange(relation, (0, b - a), (c - a, d - a))
    swapped = []
    for text in swap_negatives(relation, rng, ("noun", "adjective")):
        in_one_phrase = text.startswith(caption[a:b]) or text.endswith(caption[c:d])
        if not in_one_phrase and without_articles(text) != without_articles(still_true):
            swapped.append(text)
    return swapped


# ------------------------------------------------------------------------ the command line: extract
CAPTION_KEYS = ("txt", "caption", "title", "text", "caption_text")  # as in data.py
DELIMITERS = {".csv": ",", ".tsv": "\t"}
ENDINGS = (".txt", *DELIMITERS, ".jsonl")
MAX_RECORD = 100  # lines of one row of a .csv: more come of a quote that is never closed
TASK = 512  # captions that a worker gets at a time
TASKS_AHEAD = 4  # of these for each worker are in memory
COUNTED = 1_000_000  # different concepts: the memory for their counts is bounded

EXTRACT_HELP = """\
Write each row of the INPUTS with the concepts of its caption, one JSON object for each line, to
one file. A row keeps all its columns, and gets "concepts", a list of strings, in place of a column
of that name. A line of a .txt file becomes {"key": its number, "caption": ..., "concepts": [...]}.

train.py reads this file as it reads the table before it, and then need not extract anything:
    python train.py --data pairs.concepts.jsonl --image-root images
For the images of tar shards, which a table of captions names by their key or url, it is
    python train.py --data 'shards/{000..331}.tar' --captions captions.concepts.jsonl
Tar shards themselves are no input here: train.py extracts concepts from them as it goes.

The same command goes on after it was interrupted or killed. What cannot be read is passed over,
counted and named at the end."""


def extract_files(args):
    """The command `extract`: read tables of captions, write their rows with concepts."""
    from tqdm import tqdm
    output = check_paths(args)
    size = sum(os.path.getsize(path) for path in args.inputs)
    report, frequency = Report(), Counter()
    rows = chain.from_iterable(read_rows(path, args.caption_key, report) for path in args.inputs)
    rows = chain([next(rows)], rows)  # if there is no caption, this ends before there is an output
    pool = ProcessPoolExecutor(args.workers, initializer=start_worker)
    bar = tqdm(desc="extracting", total=size, unit="B", unit_scale=True,
               disable=not sys.stderr.isatty())
    with pool, bar, open(output, "ab+") as out:
        rows, finished = skip_finished(out, rows, frequency)
        for lines, concepts in extract_in_pool(pool, rows, args.workers):
            out.write(lines)
            add_counts(frequency, concepts)
            bar.set_postfix_str(f"{report.captions:,} captions", refresh=False)
            bar.update(report.bytes - bar.n)
    print(f"{output}: {report.captions:,} captions ({finished:,} from an earlier run), "
          f"{report.skipped():,} bad rows skipped")
    report.print()
    most_frequent = [f"{concept} {number:,}" for concept, number in frequency.most_common(10)]
    print("most frequent:", ", ".join(most_frequent))
    print(next_command(args, output))


def check_paths(args):
    """The name of the output. ValueError for arguments that cannot be meant."""
    output = args.output or os.path.splitext(args.inputs[0])[0] + ".concepts.jsonl"
    for path in args.inputs:
        if path.lower().endswith(".tar"):
            raise ValueError(f"{path}: tar shards go to train.py --data {path}, which extracts "
                             f"concepts as it reads; expected {', '.join(ENDINGS)}")
        if not path.lower().endswith(ENDINGS):
            raise ValueError(f"{path}: expected a file that ends in {', '.join(ENDINGS)}")
        if os.path.exists(output) and os.path.samefile(path, output):
            raise ValueError(f"{output} is also an input: choose another --output")
    if output.lower().endswith((".json", ".txt", *DELIMITERS)):
        raise ValueError(f"--output {output}: what is written is .jsonl, expected a name with that")
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: expected 1 or more")
    if os.path.exists(output) and not os.path.isfile(output):
        raise ValueError(f"--output {output} is not a file")
    return output


class Report:
    """What was read of the inputs, and what was wrong with it: how often, and where first."""
    def __init__(self):
        self.captions = 0
        self.bytes = 0
        self.counts = Counter()  # of (fate, problem): fate is "skipped" or "kept"
        self.first_place = {}

    def add(self, fate, problem, place):
        self.counts[fate, problem] += 1
        self.first_place.setdefault((fate, problem), place)

    def skipped(self):
        return sum(count for (fate, _), count in self.counts.items() if fate == "skipped")

    def print(self):
        for (fate, problem), count in self.counts.items():
            print(f"  {fate} {count:,}: {problem}, first in {self.first_place[fate, problem]}")


def read_rows(path, caption_key, report):
    """Yield (row, caption) for each row of a file: a dict of its columns, and its caption's text.

    ValueError for a file without any caption.
    """
    ending = os.path.splitext(path)[1].lower()
    keys = (caption_key,) if caption_key and ending != ".txt" else CAPTION_KEYS
    captions_before, bytes_before = report.captions, report.bytes
    columns = {}  # an ordered set
    newline = "" if ending in DELIMITERS else "\n"
    with open(path, encoding="utf-8-sig", errors="replace", newline=newline) as file:
        if ending == ".txt":
            rows = read_text(file)
        elif ending == ".jsonl":
            rows = read_jsonl(file)
        else:
            rows = read_table(file, DELIMITERS[ending], path)
        for number, (row, problem) in enumerate(rows, 1):
            report.bytes = bytes_before + file.buffer.tell()
            place = f"{path}, row {number:,}"
            if row is None:
                report.add("skipped", problem, place)
                continue
            if len(columns) < 100:  # enough for a message
                columns.update(dict.fromkeys(row))
            row.pop("concepts", None)
            caption = caption_of(row, keys)
            if not caption:
                report.add("skipped", "no caption, or one that is no text", place)
                continue
            if problem:
                report.add("kept", problem, place)
            if "\ufffd" in caption:
                report.add("kept", "a caption with bytes that are not UTF-8", place)
            report.captions += 1
            yield row, caption
    if report.captions == captions_before:
        raise ValueError(f"{path}: no captions in a column or key {', '.join(keys)}; it has "
                         f"{', '.join(columns) or 'none'}: name one of them by --caption-key")


def caption_of(row, keys):
    """The text of the first of the columns that is not empty; "" if it is no text."""
    for key in keys:
        if row.get(key):
            return row[key].strip() if isinstance(row[key], str) else ""
    return ""


# Each reader yields (row, problem). What is skipped has None for its row and the problem; for a row
# that is kept the problem may be "".
def read_text(file):
    for number, line in enumerate(file, 1):
        yield {"key": number, "caption": line.strip()}, ""


def read_jsonl(file):
    for line in file:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # RecursionError: a line of 100,000 brackets
            row = None
        if isinstance(row, dict):
            yield row, ""
        else:
            yield None, "no JSON object on the line"


def read_table(file, delimiter, path="the table"):
    columns = None
    for fields, problem in read_records(file, delimiter):
        if not fields:  # a blank line
            continue
        if columns is None:
            columns = [name.strip() for name in fields]  # "image, caption" has no column " caption"
            check_columns(columns, path)
        elif len(fields) > len(columns):
            yield None, "more fields than columns"
        else:
            yield dict(zip(columns, fields)), problem


def check_columns(columns, path):
    """ValueError for two columns of one name. Of those without a name there may be several."""
    counts = Counter(name for name in columns if name)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise ValueError(f"{path}: several columns are called {', '.join(map(repr, twice))}, of "
                         "which only one would be read: give each a name of its own in the first "
                         "line")


def read_records(file, delimiter):
    """Yield (fields, problem) for each record. A quote that is never closed costs one line."""
    dialect = {"delimiter": delimiter}
    if delimiter == "\t":  # has no quotes, as other projects write it
        dialect["quoting"] = csv.QUOTE_NONE
    csv.field_size_limit(2**31 - 1)  # a long caption is no mistake
    waiting = deque()  # lines that an earlier record should not have read
    while True:
        taken = []
        problem = ""
        try:
            fields = next(csv.reader(take_lines(file, waiting, taken), strict=True, **dialect))
            if len(taken) > 1:
                problem = "a field that holds line breaks"
        except StopIteration:
            return
        except csv.Error:
            waiting.extendleft(reversed(taken[1:]))
            fields = next(csv.reader(taken[:1], **dialect), [])
            problem = "a quote that is not closed, or is followed by text"
        yield fields, problem


def take_lines(file, waiting, taken):
    """Yield the lines of one record, first those that wait, and append them to taken."""
    while len(taken) < MAX_RECORD:
        line = waiting.popleft() if waiting else next(file, None)
        if line is None:
            return
        taken.append(line)
        yield line


def skip_finished(out, rows, frequency):
    """Pass over the rows that an earlier run wrote to out: (the rows that are left, number passed).

    A line that the earlier run was writing when it was killed is cut off. ValueError if the file
    holds anything else: other rows, or, among its first, concepts of other captions.
    """
    finished = size = 0
    out.seek(0)
    for line in out:
        torn = not line.endswith(b"\n")
        if torn and finished:
            break
        row, caption = next(rows, ({}, ""))
        start = row_start(row)
        if not line.startswith(start) and not (torn and start.startswith(line)):
            raise ValueError(f"{out.name} comes from other inputs: choose another --output")
        if torn:
            rows = chain([(row, caption)], rows)
            break
        concepts = json.loads(line)["concepts"]
        if finished < TASK and concepts != extract(caption):
            raise ValueError(f"{out.name}, line {finished + 1:,}: its concepts are not those of "
                             f"this caption, {caption!r:.80}. Was it made with another "
                             "--caption-key, or of another version? Choose another --output")
        add_counts(frequency, Counter(concepts))
        finished += 1
        size += len(line)
    out.truncate(size)
    return rows, finished


def row_start(row):
    """The beginning of the line that is written for a row, up to its concepts."""
    return json.dumps({**row, "concepts": None}).removesuffix("null}").encode()


def extract_in_pool(pool, rows, workers):
    """Yield extract_rows of TASK rows after TASK rows, in order; a few tasks are in memory."""
    waiting = deque()
    while True:
        task = list(islice(rows, TASK))
        if task:
            waiting.append(pool.submit(extract_rows, task))
        if not waiting:
            return
        if not task or len(waiting) == TASKS_AHEAD * workers:
            yield waiting.popleft().result()


def extract_rows(task):
    """In a worker: the lines to write for a list of (row, caption), and all their concepts."""
    found = extract_batch([caption for _, caption in task])
    lines = []
    for (row, _), concepts in zip(task, found):
        lines.append(row_start(row) + json.dumps(concepts).encode() + b"}\n")
    return b"".join(lines), Counter(chain.from_iterable(found))


def add_counts(frequency, concepts):
    """Add {concept: count}, whatever its case. After the first million, no new ones are counted."""
    for concept, number in concepts.items():
        concept = concept.lower()
        if concept in frequency or len(frequency) < COUNTED:
            frequency[concept] += number


def next_command(args, output):
    """What to do with the output: a line for the user."""
    if all(path.lower().endswith(".txt") for path in args.inputs):
        return "next: to train, begin with a table of images and captions: a .txt names no images"
    command = f"python train.py --data {shlex.quote(output)} --image-root FOLDER"
    if args.caption_key:
        command += f" --caption-key {shlex.quote(args.caption_key)}"
    return f"next: {command}     (for shards: --data SHARDS.tar --captions {shlex.quote(output)})"


def start_worker():
    """In each worker: leave Ctrl-C to the parent, and end when the parent was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


# ----------------------------------------------------------------- the command line: train and eval
TRAIN_HELP = """\
Train the part-of-speech tagger with NLTK, as assets/tagger.json.gz was made: small weights are
dropped and the others rounded. The same corpora give the same bytes."""

EVAL_HELP = """\
Compare the noun phrases that are found with those of a file of captions, in which each noun phrase
stands in [brackets]. A found phrase that overlaps a {phrase} in braces does not count. Prints
precision, recall and F1 of exact phrases."""


def train_tagger(args):
    """The command `train`."""
    from nltk import PerceptronTagger
    sentences = []
    for path in args.corpus:
        sentences += read_corpus(path)
    random.seed(0)  # NLTK shuffles the sentences with the global generator
    tagger = PerceptronTagger(load=False)
    tagger.train(sentences, nr_iter=5)
    weights = {}
    for feature, row in tagger.model.weights.items():
        kept = {tag: round(weight * 4) / 4 for tag, weight in row.items() if abs(weight) >= 1}
        if kept:
            weights[feature] = kept
    model = [weights, tagger.tagdict, sorted(tagger.classes)]
    text = json.dumps(model, sort_keys=True, separators=(",", ":"))
    data = gzip.compress(text.encode(), 9, mtime=0)  # without a date
    Path(args.output).write_bytes(data)
    print(f"{args.output}: {len(sentences):,} sentences, {len(data):,} bytes")


def read_corpus(path):
    """The sentences of a corpus, lists of (word, tag); those of a text file three times."""
    tags = json.loads(LEXICON.read_text("utf-8"))["tags"]
    times = 3
    data = Path(path).read_bytes()
    if zipfile.is_zipfile(path):
        times = 1
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".txt"))
            data = b"\n".join(archive.read(name) for name in names)
    sentences = []
    for line in data.decode("utf-8", "replace").replace("’", "'").split("\n"):
        sentence = [token.rpartition("_")[::2] for token in line.split()]
        if sentence and all(word and tag in tags for word, tag in sentence):
            sentences.append(sentence)
    if not sentences:
        raise ValueError(f"{path}: expected lines of word_TAG (A_DT cat_NN), or a zip of them")
    return sentences * times


def evaluate_phrases(args):
    """The command `eval`."""
    extractor = ConceptExtractor(args.weights)
    right = found = expected = 0
    for line in Path(args.gold).read_text("utf-8-sig", "replace").splitlines():
        text, wanted, neutral = read_brackets(line)
        if re.search(r"[][{}]", text):
            raise ValueError(f"{args.gold}: unbalanced or nested brackets: {line:.60}")
        spans = set(next(extractor.phrases([text], merge=False)))
        right += len(spans & wanted)
        expected += len(wanted)
        for start, end in spans:
            overlaps = any(start < stop and begin < end for begin, stop in neutral)
            found += (start, end) in wanted or not overlaps
    if not expected:
        raise ValueError(f"{args.gold}: no bracketed phrase; expected lines such as: [A cat] sits.")
    precision = 100 * right / max(found, 1)
    recall = 100 * right / expected
    f1 = 200 * right / (found + expected)
    print(f"{expected} phrases, {found} found")
    print(f"precision {precision:.1f} recall {recall:.1f} F1 {f1:.1f}")


def read_brackets(line):
    """The text of "[A cat] on {a mat}", and the spans of its [phrases] and of its {phrases}."""
    text, wanted, neutral = "", set(), set()
    pieces = re.split(r"(\[[^][{}]+\]|\{[^][{}]+\})", line)  # every second one is in brackets
    for number, piece in enumerate(pieces):
        if number % 2 == 1:
            spans = wanted if piece[0] == "[" else neutral
            piece = piece[1:-1]
            spans.add((len(text), len(text) + len(piece)))
        text += piece
    return text, wanted, neutral


# --------------------------------------------------------------------------------- the command line
def command_line():
    """The parser of the command line, and the names of its commands."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Noun-phrase concepts of captions, and the tagger that finds them.",
        epilog="Two short forms:\n"
               "  concepts.py 'A cat on a mat'    prints the concepts of one caption\n"
               "  concepts.py pairs.csv           is concepts.py extract pairs.csv")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add_command(name, run, summary, description):
        command = commands.add_parser(name, help=summary, description=description,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
        command.set_defaults(run=run)
        return command.add_argument

    add = add_command("extract", extract_files, "write the concepts of all captions of a file",
                      EXTRACT_HELP)
    add("inputs", nargs="+", metavar="INPUT",
        help=".csv, .tsv or .jsonl with a caption in each row, or .txt with one on each line")
    add("--output", metavar="FILE",
        help="default: the first input's name with .concepts.jsonl for its ending")
    add("--workers", type=int, default=1, metavar="N",
        help="number of processes that extract (default: 1)")
    add("--caption-key", metavar="NAME",
        help="column or JSON key of the caption (default: the first that is not empty of "
             f"{', '.join(CAPTION_KEYS)})")

    add = add_command("eval", evaluate_phrases,
                      "measure precision and recall on bracketed captions", EVAL_HELP)
    add("gold", metavar="FILE", help="lines such as: [A cat] on [a mat] in {the middle}.")
    add("--weights", metavar="FILE",
        help="a file that train wrote, or nltk for NLTK's own (default: assets/tagger.json.gz)")

    add = add_command("train", train_tagger, "train the part-of-speech tagger", TRAIN_HELP)
    add("--corpus", nargs="+", required=True, metavar="FILE",
        help="text files with lines of word_TAG, which count three times, or zip files of such "
             ".txt files, which count once")
    add("--output", default=WEIGHTS, metavar="FILE", help="default: assets/tagger.json.gz")
    return parser, [*commands.choices]


def names_file(text):
    """Whether it is no caption but the name of a file, also of one that is not there."""
    return os.path.exists(text) or bool(re.fullmatch(r"\S+\.[A-Za-z]\w{1,7}", text))


def main(argv):
    parser, commands = command_line()
    if len(argv) == 1 and argv[0] not in ("-h", "--help", *commands):
        if not names_file(argv[0]):
            print(*extract(argv[0]), sep="\n")
            return
        argv = ["extract", *argv]
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # emoji, where the terminal has no UTF-8
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("error: interrupted; the same command goes on")
    except BrokenProcessPool:
        sys.exit("error: a worker was killed, probably for want of memory; "
                 "the same command goes on, try fewer --workers")
    except OSError as error:
        sys.exit(f"error: {error.filename or 'the output'}: {error.strerror or error}")
    except (ValueError, LookupError, csv.Error) as error:
        sys.exit(f"error: {error}")
