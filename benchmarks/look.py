"""What looking costs: recording, sweeps, imports, beside the tools that people use for it now.

    pip install transformer-lens nnsight        (into the environment that runs this; without them only our own figures are printed)
    python benchmarks/look.py
    python benchmarks/look.py --only sweep      one of: record, small, sweep, long, import

One random GPT-2-124M (12 layers, 768 wide) of transformers is opened by all: the same weights. Everything in one figure takes turns in one process; times are
medians with their quartiles. Memory is the growth of the process's highest use (VmHWM), each measurement in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

PEERS = {"transformer_lens": "transformer-lens", "nnsight": "nnsight"}
RESIDUALS = ("blocks.*.attn.pattern", "blocks.*.resid_pre", "blocks.*.resid_post")


# The model, as each of us holds it


def their_gpt2(layers: int, d: int, heads: int, vocab: int, context: int) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=vocab, n_layer=layers, n_embd=d, n_head=heads, n_positions=context)
    return transformers.GPT2LMHeadModel(config).eval()


def ours(theirs: Any) -> Any:
    import glassformer as gf

    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return gf.weights.load(folder, dtype="float32").model.eval()


def lens_model(theirs: Any) -> Any:
    """TransformerLens's bridge around the same model (its attention is eager: that is how it shows patterns)."""
    import transformers
    from transformer_lens.model_bridge import TransformerBridge

    import glassformer as gf

    folder = tempfile.mkdtemp()
    theirs.save_pretrained(folder)
    gf.text.train("bpe", texts=["any text will do"], vocab_size=260, special=("<|endoftext|>",)).save(folder)
    end = "<|endoftext|>"
    transformers.PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", bos_token=end, eos_token=end).save_pretrained(folder)
    return TransformerBridge.boot_transformers(folder, device="cpu").eval()


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, taking turns, the first round thrown away."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if i:
                times[name].append(time.perf_counter() - begin)
    return times


def print_times(times: dict[str, list[float]], base: str) -> None:
    print("\n| what | ms, median (quartiles) | times the first row |")
    print("|---|---:|---:|")
    for name, seconds in times.items():
        ms = sorted(1e3 * s for s in seconds)
        ratios = [a / b for a, b in zip(seconds, times[base], strict=True)]
        print(f"| {name} | {statistics.median(ms):.2f} ({ms[len(ms) // 4]:.2f} to {ms[3 * len(ms) // 4]:.2f}) | {statistics.median(ratios):.3f} |", flush=True)


# Recording


def record(rounds: int) -> None:
    """A forward pass of (4, 256), plain and observed."""
    from glassformer import Record

    theirs = their_gpt2(12, 768, 12, 50_257, 1_024)
    model, tokens = ours(theirs), torch.randint(50_257, (4, 256))
    kept = sorted({"blocks.*." + s.path.split(".", 2)[2] if s.path.startswith("blocks.") else s.path for s in model.sites()} - {"blocks.*.attn.result"})
    calls: dict[str, Callable[[], Any]] = {
        "plain": lambda: model(tokens),
        "patterns and residuals recorded": lambda: model(tokens, tap=Record(*RESIDUALS)),
        "every site recorded": lambda: model(tokens, tap=Record("**")),
        "every site but the results of heads": lambda: model(tokens, tap=Record(*kept)),
    }
    calls |= peers_recording(theirs, tokens)
    with torch.no_grad():
        plain, taps = model(tokens), {"patterns and residuals": Record(*RESIDUALS), "every site": Record("**")}
        for name, tap in taps.items():
            assert torch.equal(model(tokens, tap=tap), plain), "looking changed a bit"
            asked = sum(v.nbytes for v in tap.values.values())
            print(f"{name}: {len(tap)} values, {asked / 1e6:,.0f} MB asked for, {tap.bytes / 1e6:,.0f} MB held; outputs equal to the bit")
            tap.clear()
        print_times(timed(calls, rounds), "plain")
    for name in (
        "ours: plain",
        "ours: patterns and residuals",
        "ours: every site",
        *(f"{p}: {w}" for p in PEERS for w in ("patterns and residuals", "everything")),
    ):
        if name.split(":")[0] != "ours" and not there(name.split(":")[0]):
            continue
        grown = in_a_process_of_its_own(name)
        print(f"memory, {name}: {grown}", flush=True)


def peers_recording(theirs: Any, tokens: torch.Tensor) -> dict[str, Callable[[], Any]]:
    calls: dict[str, Callable[[], Any]] = {"transformers, plain": lambda: theirs(tokens)}
    if there("transformer_lens"):
        lens = lens_model(theirs)
        some = lambda name: name.endswith(("hook_pattern", "hook_resid_pre", "hook_resid_post"))
        calls["TransformerLens, plain"] = lambda: lens(tokens)
        calls["TransformerLens, patterns and residuals"] = lambda: lens.run_with_cache(tokens, names_filter=some)
        calls["TransformerLens, everything"] = lambda: lens.run_with_cache(tokens)
    if there("nnsight"):
        calls["nnsight, residuals"] = nnsight_call(theirs, tokens)
    return calls


def nnsight_call(theirs: Any, tokens: torch.Tensor) -> Callable[[], Any]:
    import nnsight

    model = nnsight.NNsight(theirs)

    def call() -> Any:
        with model.trace(tokens):
            saved = nnsight.save([])
            for block in model.transformer.h:
                saved.append(block.output)
        return saved

    return call


def memory(name: str) -> None:
    """One recorded pass; prints by how much the process's highest use grew over that of a plain pass before it."""
    who, what = name.split(": ")
    theirs = their_gpt2(12, 768, 12, 50_257, 1_024)
    tokens = torch.randint(50_257, (4, 256))
    with torch.no_grad():
        if who == "ours":
            from glassformer import Record

            model = ours(theirs)
            del theirs
            run: Callable[[], Any] = lambda: model(tokens)
            tap = Record(*RESIDUALS) if what == "patterns and residuals" else Record("**")
            seen: Callable[[], Any] = run if what == "plain" else lambda: (model(tokens, tap=tap), tap)
        elif who == "transformer_lens":
            lens = lens_model(theirs)
            del theirs
            some = None if what == "everything" else lambda n: n.endswith(("hook_pattern", "hook_resid_pre", "hook_resid_post"))
            run, seen = (lambda: lens(tokens)), (lambda: lens.run_with_cache(tokens, names_filter=some))
        else:
            run, seen = (lambda: theirs(tokens)), nnsight_call(theirs, tokens)
        run()
        before = resident()
        Path("/proc/self/clear_refs").write_text("5")  # the highest use begins anew
        run()
        plain = highest() - before
        held = seen()
        print(json.dumps({"plain": plain, "observed": highest() - before, "kept": type(held).__name__}))


def resident() -> int:
    return _status("VmRSS")


def highest() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def in_a_process_of_its_own(name: str) -> str:
    done = subprocess.run([sys.executable, __file__, "--memory", name], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"failed: {done.stderr.strip().splitlines()[-1]}"
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return f"a plain pass needs {found['plain'] / 1e6:,.0f} MB at its highest, with what was asked for {found['observed'] / 1e6:,.0f} MB"


def small(rounds: int) -> None:
    """2 layers, 64 wide, 32 tokens: what a call costs besides its products."""
    from glassformer import Record

    theirs = their_gpt2(2, 64, 4, 512, 64)
    model, tokens = ours(theirs), torch.randint(512, (1, 32))
    calls: dict[str, Callable[[], Any]] = {
        "plain": lambda: model(tokens),
        "patterns and residuals recorded": lambda: model(tokens, tap=Record(*RESIDUALS)),
        "every site recorded": lambda: model(tokens, tap=Record("**")),
    }
    calls |= peers_recording(theirs, tokens)
    with torch.no_grad():
        print_times(timed(calls, rounds * 20), "plain")


# Sweeps


def sweep(rounds: int) -> None:
    """Every head of every layer patched, 32 tokens, the last logits asked for."""
    from glassformer import Edit, Record, look

    theirs = their_gpt2(12, 768, 12, 50_257, 1_024)
    model = ours(theirs)
    clean, corrupted = (torch.randint(50_257, (32,)).tolist() for _ in range(2))
    target = (11, 12)

    @torch.no_grad()
    def loop() -> torch.Tensor:
        tap = Record("blocks.*.attn.z")
        model(torch.tensor([clean]), tap=tap)
        found = torch.zeros(12, 12)
        for layer in range(12):
            z = tap[f"blocks.{layer}.attn.z"]
            for head in range(12):
                edit = Edit(f"blocks.{layer}.attn.z[{head}]", lambda _, z=z, head=head: z[:, :, [head]])
                logits = model(torch.tensor([corrupted]), tap=edit)[0, -1]
                found[layer, head] = logits[target[0]] - logits[target[1]]
        return found

    ready = lambda: look.activation_patch(model, clean, corrupted, "z", by=("layer", "head"), target=target)
    calls: dict[str, Callable[[], Any]] = {"one sweep": ready, "one full forward per patch": loop}
    if there("transformer_lens"):
        calls["TransformerLens, get_act_patch_attn_head_out_all_pos"] = lens_sweep(theirs, clean, corrupted, target)
    print_times(timed(calls, max(1, rounds // 4)), "one sweep")


def lens_sweep(theirs: Any, clean: list[int], corrupted: list[int], target: tuple[int, int]) -> Callable[[], Any]:
    from transformer_lens import patching

    lens = lens_model(theirs)

    @torch.no_grad()
    def call() -> Any:
        _, cache = lens.run_with_cache(torch.tensor([clean]), names_filter=lambda n: n.endswith("hook_z"))
        metric = lambda logits: logits[0, -1, target[0]] - logits[0, -1, target[1]]
        return patching.get_act_patch_attn_head_out_all_pos(lens, torch.tensor([corrupted]), cache, metric)

    return call


def long(rounds: int) -> None:
    """2,000 tokens: the patterns of all 144 heads, one after the other."""
    done = subprocess.run([sys.executable, __file__, "--memory-long"], capture_output=True, text=True, check=False)
    print(done.stdout.strip() or done.stderr.strip().splitlines()[-1])


def memory_long() -> None:
    from glassformer import look
    from glassformer.models.presets import gpt2
    from glassformer.parts.position import Learned

    model = gpt2(12, 768, 12).replace(vocab_size=50_257, position=Learned(2_048)).build(seed=0).eval()
    tokens = torch.randint(50_257, (2_000,)).tolist()
    with torch.no_grad():
        model(torch.tensor([tokens]), keep=1)
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")
    begin = time.perf_counter()
    captured = look.capture(model, tokens, "blocks.*.resid_pre")  # one head at a time is made from the stream that enters its layer
    total = 0.0
    for layer in range(12):
        for head in range(12):
            total += float(captured.pattern(layer, head).sum())
    seconds = time.perf_counter() - begin
    held = 144 * 2_000 * 2_000 * 4
    used, shown = (highest() - before) / 1e6, f"{held / 1e9:.2f} GB if all were held"
    print(f"144 patterns of 2,000 x 2,000 ({shown}): highest use {used:,.0f} MB, {seconds:.1f} s; mean sum of a row {total / 288_000:.6f}")


def imports(rounds: int) -> None:
    """Seconds to import, each in a fresh process."""
    names = ["glassformer", "glassformer.look", "torch", *(p for p in PEERS if there(p))]
    times: dict[str, list[float]] = {n: [] for n in names}
    for _ in range(max(3, rounds // 2)):
        for name in names:
            code = f"import time; t = time.perf_counter(); import {name}; print(time.perf_counter() - t)"
            times[name].append(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1]))
    print("\n| import | seconds, median |\n|---|---:|")
    for name, seconds in times.items():
        print(f"| {name} | {statistics.median(seconds):.2f} |")


def there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def main() -> None:
    parts = {"record": record, "small": small, "sweep": sweep, "long": long, "import": imports}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=parts, action="append")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--memory-long", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory:
        memory(given.memory)
        return
    if given.memory_long:
        memory_long()
        return
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers", *PEERS.values()) if there(p.replace("-", "_")))
    print(f"{date.today()}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {versions}")
    for name in given.only or parts:
        print(f"\n## {name}", flush=True)
        parts[name](given.rounds)


if __name__ == "__main__":
    main()
