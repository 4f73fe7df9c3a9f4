"""Our token ids against open_clip's on every caption and negative of SugarCrepe, and both speeds.

    python tests/bench/bench_tokenizer.py --data-dir DIR_OF_THE_SEVEN_JSON_FILES [--model MODEL] [--tokenizer tokenizer.json]

Without --tokenizer: CLIP's BPE, built from the vocabulary that open_clip ships. With the tokenizer.json of a SigLIP
(e.g. that of timm/ViT-B-16-SigLIP) and its --model: against open_clip's wrapper of that file.
"""
import argparse
import glob
import json
import os
import sys
import tempfile
import time
from dataclasses import replace

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(os.path.dirname(HERE)), HERE]
from model import MODELS, Tokenizer, read_tokenizer  # noqa: E402


def openai_tokenizer(folder):
    """CLIP's tokenizer.json, built from open_clip's vocabulary by way of the hub's vocab.json and merges.txt, which are
    left in the folder. Returns (the text of the tokenizer.json, open_clip's tokenizer)."""
    from open_clip import SimpleTokenizer
    from tokenizers import Regex, Tokenizer as Backend, models, normalizers, pre_tokenizers, processors
    peer = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}     # as on the hub
    vocab, merges = os.path.join(folder, "vocab.json"), os.path.join(folder, "merges.txt")
    with open(vocab, "w", encoding="utf-8") as f:
        json.dump({names.get(k, k): v for k, v in peer.encoder.items()}, f, ensure_ascii=False)
    with open(merges, "w", encoding="utf-8") as f:
        pairs = sorted(peer.bpe_ranks, key=peer.bpe_ranks.get)
        f.write("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in pairs) + "\n")

    t = Backend(models.BPE.from_file(vocab, merges, end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    ends = list(names.values())
    t.add_special_tokens(ends)
    t.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "removed", invert=True),
                                               pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.post_processor = processors.TemplateProcessing(
        single=f"{ends[0]} $A {ends[1]}", special_tokens=[(e, t.token_to_id(e)) for e in ends])
    return t.to_str(), peer


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data-dir", required=True, help="folder with SugarCrepe's json files")
    p.add_argument("--model", default="ViT-B-32", help="whose context length, cleaning and padding (ViT-B-32)")
    p.add_argument("--tokenizer", help="a tokenizer.json; default: CLIP's BPE")
    args = p.parse_args()
    files = sorted(glob.glob(os.path.join(args.data_dir, "*.json")))
    if args.model not in MODELS:
        p.error(f"no model {args.model!r}: expected one of {', '.join(MODELS)}")
    if not files:
        sys.exit(f"bench_tokenizer.py: no .json files in {args.data_dir}: expected SugarCrepe's seven")
    texts = [row[k] for name in files for row in json.load(open(name, encoding="utf-8")).values()
             for k in ("caption", "negative_caption")]
    config = MODELS[args.model]
    with tempfile.TemporaryDirectory() as folder:
        if args.tokenizer:
            from open_clip.tokenizer import HFTokenizer
            text = read_tokenizer(args.tokenizer)
            pad = next(t["content"] for t in json.loads(text)["added_tokens"] if t["id"] == config.pad_id)
            for name, content in (("tokenizer.json", json.loads(text)), ("tokenizer_config.json", {
                    "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad})):
                json.dump(content, open(os.path.join(folder, name), "w"))
            peer = HFTokenizer(folder, context_length=config.context_length, clean=config.text_clean)
        else:
            text, peer = openai_tokenizer(folder)
        ours = Tokenizer(replace(config, tokenizer=text))
        start = time.process_time()
        a = ours(texts)
        middle = time.process_time()
        b = peer(texts)
        end = time.process_time()
    differ = [t for t, x, y in zip(texts, a, b) if not x.equal(y)]
    print(f"{len(texts)} texts of {len(files)} files, {len(differ)} with other ids; texts per CPU-second: "
          f"ours {len(texts) / (middle - start):,.0f}, open_clip {len(texts) / (end - middle):,.0f}")
    for t in differ[:20]:
        print(repr(t))
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
