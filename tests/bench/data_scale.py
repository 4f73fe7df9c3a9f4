"""What opening large data costs: tables of 10^4 to 10^7 rows, tars of 10^3 to 10^6 tiny samples.

    python tests/bench/data_scale.py [--rows 10000 100000 1000000] [--samples 1000 10000] [--ranks 1 2]

For each size and number of ranks, each rank a process with 2 loader workers:
    build       seconds until the slowest rank has opened files without an index, which it writes
    rows/s      rows (or samples) a second of this
    a core      the same for each second of a processor, which other programs on the machine do not change
    warm        seconds of the same with the index there
    private     MiB of memory of one rank's own that opening and reading 1,000 rows added (warm), and shared: pages of files
    worker      MiB of its own that reading 1,000 rows added to a process that was forked, as a loader's worker is
    resume      seconds from a warm start to the first batch, at a step in the middle of the tenth epoch
    read        rows a second that one process reads then, without their images
    index       size of the index, in MiB
The files are made in --folder, and removed. assets/data.md has the figures, and what follows from them for 12 and 128
million rows.
"""
import argparse
import glob
import multiprocessing
import os
import shutil
import sys
import tarfile
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def make_table(path, rows):
    """A csv with a path, a caption of natural length and a url a row, as CC3M's."""
    thousand = "".join(f'train/{i:03}/MMMMMM{i:03}.jpg,"a person, number MMMMMM{i:03}, walks along the beach with a dog '
                       f'and a ball",https://example.com/images/MMMMMM{i:03}.jpg\n' for i in range(1000))
    with open(path, "w") as f:
        f.write("image,caption,url\n")
        for number in range(rows // 1000):
            f.write(thousand.replace("MMMMMM", f"{number:06}"))


def make_tars(folder, samples, each=10_000):
    """Shards as img2dataset's, with pictures of 1 kB that nobody decodes here."""
    contents = {"jpg": os.urandom(1000), "txt": b"a dog 000000000",
                "json": b'{"url": "https://example.com/000000000", "caption": "a dog", "width": 256}'}
    headers = {}
    for ending, content in contents.items():
        info = tarfile.TarInfo(f"000000000.{ending}")
        info.size = len(content)
        headers[ending] = info.tobuf(tarfile.USTAR_FORMAT)
    for first in range(0, samples, each):
        with open(f"{folder}/{first // each:05d}.tar", "wb") as f:
            for i in range(first, min(samples, first + each)):
                digits = b"%09d" % i        # in place of the zeros: several times as fast as tarfile
                more = sum(digits) - 9 * ord("0")
                for ending, content in contents.items():
                    header = headers[ending]
                    checksum = b"%06o" % (int(header[148:154], 8) + more)
                    f.write(digits + header[9:148] + checksum + header[154:])
                    f.write(content.replace(b"000000000", digits) + bytes(-len(content) % 512))
            f.write(bytes(1024))
    return f"{folder}/*.tar"


def memory():
    """This process's own memory and that of pages of files, which processes share, in MiB."""
    with open("/proc/self/smaps_rollup") as f:
        sizes = dict(line.split()[:2] for line in f if "kB" in line)
    own = int(sizes["Anonymous:"]) / 1024
    return own, int(sizes["Rss:"]) / 1024 - own


def processor_seconds():
    """Of this process and those that it started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def read_some(data):
    for i in range(1000):
        data.sample(i * 7919 % len(data))


def worker(data, results):
    """MiB of memory that is this process's alone, after reading less before."""
    sizes = []
    for _ in range(2):
        with open("/proc/self/smaps_rollup") as f:
            sizes.append(sum(int(line.split()[1]) / 1024 for line in f if line.startswith("Private_Dirty")))
        read_some(data)
    results.put(sizes[1] - sizes[0])


def only_keys(rows):
    return [row["key"] for row in rows]


class Rows:
    """A data set's rows without their images."""
    def __init__(self, data):
        self.data = data

    def __getitem__(self, item):
        return self.data.sample(item[1])


def rank_process(rank, ranks, source, warm, results):
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks), RANK="1")      # no progress bar
    import torch
    from torch.utils.data import DataLoader

    from data import CaptionFile, Epochs
    torch.set_num_threads(1)
    private, shared = memory()
    start, used = time.perf_counter(), processor_seconds()
    data = CaptionFile(source)
    found = {"rows": len(data), "open": time.perf_counter() - start, "processor": processor_seconds() - used}
    if warm:
        step = 10 * (len(data) // 768) - len(data) // 1536
        stream = Epochs(len(data), min(768, len(data)), 0, rank, ranks, start_step=step, stop_step=step + 4)
        loader = DataLoader(Rows(data), batch_sampler=stream, num_workers=2, collate_fn=only_keys,
                            multiprocessing_context="fork")
        batches = iter(loader)
        next(batches)
        found["resume"] = time.perf_counter() - start
        begin = time.perf_counter()
        read_some(data)
        found["read"] = 1000 / (time.perf_counter() - begin)
        found["private"], found["shared"] = (after - before for after, before in zip(memory(), (private, shared)))
        context = multiprocessing.get_context("fork")
        answers = context.Queue()
        context.Process(target=worker, args=(data, answers)).start()
        found["worker"] = answers.get()
    results.put(found)


def measure(source, ranks, warm):
    """The slowest rank's figures; the processor's time is that of all."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=rank_process, args=(rank, ranks, source, warm, results))
                 for rank in range(ranks)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    combine = {"read": min, "processor": sum}
    return {name: combine.get(name, max)(row[name] for row in found) for name in found[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[10**4, 10**5, 10**6], help="of tables")
    parser.add_argument("--samples", type=int, nargs="*", default=[10**3, 10**4, 10**5], help="of tars")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the files are made")
    args = parser.parse_args()
    print(f"{'':6}{'rows':>11}{'ranks':>6}{'build s':>9}{'rows/s':>9}{'a core':>9}{'warm s':>8}{'private':>9}{'worker':>8}"
          f"{'shared':>8}{'resume s':>10}{'read/s':>9}{'index':>8}")
    for kind, sizes in (("table", args.rows), ("tars", args.samples)):
        for size in sizes:
            folder = tempfile.mkdtemp(dir=args.folder)
            if kind == "table":
                source = f"{folder}/t.csv"
                make_table(source, size)
            else:
                source = make_tars(folder, size)
            for ranks in args.ranks:
                shutil.rmtree(f"{folder}/.c2lip-index", ignore_errors=True)
                cold = measure(source, ranks, warm=False)
                warm = measure(source, ranks, warm=True)
                assert cold["rows"] == warm["rows"] == size
                index = sum(map(os.path.getsize, glob.glob(f"{folder}/.c2lip-index/*")))
                print(f"{kind:6}{size:11,}{ranks:6}{cold['open']:9.2f}{size / cold['open']:9.0f}"
                      f"{size / cold['processor']:9.0f}{warm['open']:8.2f}{warm['private']:9.1f}{warm['worker']:8.1f}"
                      f"{warm['shared']:8.1f}{warm['resume']:10.2f}{warm['read']:9.0f}{index / 2**20:8.0f}", flush=True)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
