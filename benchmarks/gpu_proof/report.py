"""The proof as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.gpu_proof.aims import aims

GIB = 2**30
SHOWN = {True: "yes", False: "**no**", None: "-"}
LONGEST = 6  # kernels of each training
Entry = Mapping[str, Any]


def markdown(proof: Entry) -> str:
    """Return the whole report."""
    parts: Mapping[str, Entry] = proof["parts"]
    lines = ["# GPU proof", "", *heading(proof), "", "## Aims, for one H100", "", *aims_table(proof)]
    lines += ["", "## Parts", "", *parts_table(parts)]
    for kind, title, render in SECTIONS:
        found = {
            name: part["figures"] for name, part in parts.items() if part["kind"] == kind and part["figures"]
        }
        if found:
            lines += ["", f"## {title}", "", *render(found)]
    for name, part in parts.items():
        if part.get("last_lines"):
            lines += ["", f"## {name}: {part['status']}", "", "```text", *part["last_lines"], "```"]
    commands = [part["command"] for part in parts.values() if "command" in part]
    lines += ["", "## Commands", "", "```bash", *commands, "```"]
    return "\n".join(lines) + "\n"


def heading(proof: Entry) -> list[str]:
    """Return what was measured where."""
    machine = proof["machine"] or {"device": "an unknown device", "cpu": "an unknown CPU", "versions": {}}
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    dry = "**A dry run in miniature on a CPU: it shows that everything runs, and no figure means anything.** "
    return [
        (dry if proof["dry_run"] else "")
        + f"{proof['gpus']} x {machine['device']} ({machine['cpu']}), {versions}. "
        f"Commit {proof['commit'] or 'unknown'}, {proof['started']}, {proof['seconds']:.0f} s in total."
    ]


def aims_table(proof: Entry) -> list[str]:
    """Return the aims beside what was measured."""
    return table(("aim", "measured", "aimed at", "reached"), aims_rows(proof))


def aims_rows(proof: Entry) -> list[tuple[str, str, str, str]]:
    """Return name, measured value, bound and verdict of each aim; a dry run reaches and misses none."""
    return [
        (
            aim.name,
            aim.measured or "not measured",
            aim.bound,
            SHOWN[None if proof["dry_run"] else aim.reached],
        )
        for aim in aims(proof["parts"])
    ]


def parts_table(parts: Mapping[str, Entry]) -> list[str]:
    """Return what became of the parts."""
    rows = []
    for name, part in parts.items():
        seconds = f"{part['seconds']:.0f} ({part['expected_seconds']})" if "seconds" in part else "-"
        rows.append((name, part["title"], part["status"], seconds))
    return table(("part", "what", "status", "s (expected)"), rows)


def ceilings(found: Mapping[str, Entry]) -> list[str]:
    """Return the rates of the card."""
    figures = found["ceilings"]
    rows = [
        (f"bf16 product, {name}", f"{rate / 1e12:.1f} TFLOP/s") for name, rate in figures["products"].items()
    ]
    rows += [
        ("copy in device memory, read and written", f"{figures['memory_bytes_per_second'] / 1e9:,.0f} GB/s"),
        ("copy from pinned host memory", f"{figures['host_bytes_per_second'] / 1e9:.1f} GB/s"),
        ("a launch", f"{figures['launch_seconds'] * 1e6:.1f} us"),
    ]
    return table(("ceiling", "measured"), rows)


def links(found: Mapping[str, Entry]) -> list[str]:
    """Return the rates of collectives by size."""
    rates = found["links"]["rates"]
    rows = [
        (name.replace("_", "-"), *(f"{rate / 1e9:.1f}" for rate in of_size.values()))
        for name, of_size in rates.items()
    ]
    sizes = [f"{int(size) / 2**20:.0f} MiB" for size in next(iter(rates.values()))]
    return table((f"GB/s through each of {found['links']['ranks']} links", *sizes), rows)


def numerics(found: Mapping[str, Entry]) -> list[str]:
    """Return the errors against float64."""
    figures = found["numerics"]
    tolerances = figures["tolerances"]
    rows = [
        (f"{head}: {name}", f"{error:.1e}", tolerances[name])
        for head, errors in figures["heads"].items()
        for name, error in errors.items()
    ]
    for kind, errors in figures["attention"].items():
        largest = max(errors, key=lambda name: -1 if errors[name] <= 0 else errors[name])
        unsound = next((name for name, error in errors.items() if error != error), largest)
        rows.append((f"attention, {kind}: {unsound}", f"{errors[unsound]:.1e}", tolerances["attention"]))
    return table(("error", "measured", "tolerance"), rows)


def trainings(found: Mapping[str, Entry]) -> list[str]:
    """Return times and memory of every training, and where its time went."""
    heads = ("training", "step", "planned", "update", "tokens/s", "MFU", "masked", "device busy", "launches",
             "allocated, GiB", "planned / allocated", "reserved, GiB")  # fmt: skip
    rows, kernels = [], []
    for name, run in found.items():
        memory, trace = run["memory"], run.get("trace")
        rows.append(
            (
                name,
                f"{1e3 * run['step_seconds']:.1f} ms",
                f"{1e3 * run['planned_step_seconds']:.1f} ms" if run["planned_step_seconds"] else "-",
                f"{1e3 * run['update_seconds']:.1f} ms",
                f"{run['tokens_per_second']:,.0f}",
                "-" if run["mfu"] is None else f"{run['mfu']:.3f}",
                f"{run['masked_share']:.2f}",
                f"{trace['device_seconds'] / trace['step_seconds']:.2f}" if trace else "-",
                f"{trace['launches']:,.0f}" if trace else "-",
                f"{memory['allocated'] / GIB:.2f}",
                f"{memory['planned / allocated']:.3f}",
                f"{memory['reserved'] / GIB:.2f}" if "reserved" in memory else "-",
            )
        )
        if trace:
            kernels.append((name, listed(trace["longest"]), listed(trace["longest_on_host"])))
    return [
        *table(heads, rows),
        "",
        "What takes longest in a step, profiled:",
        "",
        *table(("training", "kernels", "operations of the host"), kernels),
        *largest_allocations(found),
    ]


def largest_allocations(found: Mapping[str, Entry]) -> list[str]:
    """Return what the memory holds at the peak of a step, where that was recorded."""
    rows = []
    for name, run in found.items():
        first = list(run["memory"].get("at_peak", {}).items())[:LONGEST]
        if first:
            rows.append((name, "; ".join(f"{size / 2**20:,.0f} MiB `{clean(line)}`" for line, size in first)))
    if not rows:
        return []
    heads = ("training", "allocations")
    return ["", "Allocated since the start of a step, at its peak:", "", *table(heads, rows)]


def listed(seconds: Mapping[str, float]) -> str:
    """Return the first names with their milliseconds."""
    first = list(seconds.items())[:LONGEST]
    return "; ".join(f"{1e3 * each:.2f} ms `{clean(name)}`" for name, each in first)


def step(found: Mapping[str, Entry]) -> list[str]:
    """Return the ratios of the step beside full logits."""
    figures = found["step"]
    return table(("ratio", "measured"), [(name, f"{ratio:.3f}") for name, ratio in figures["ratios"].items()])


def options(found: Mapping[str, Entry]) -> list[str]:
    """Return every option beside the default of its group."""
    rows = []
    for group, results in found["options"].items():
        if group in ("shape", "batch_size", "machine"):
            continue
        for name, result in results.items():
            peak = f"{result['peak_bytes'] / 1e6:,.0f} MB" if "peak_bytes" in result else "-"
            rows.append((group, name, f"{1e3 * result['seconds']:.2f} ms", f"{result['ratio']:.3f}", peak))
    return table(("group", "option", "time", "to the default", "memory"), rows)


def resume(found: Mapping[str, Entry]) -> list[str]:
    """Return what was compared."""
    figures = found["resume"]
    return [
        f"{figures['kills']} kill(s) ({', '.join(figures['hits']) or 'none'}), {figures['steps']} steps on "
        f"{figures['ranks']} rank(s): {figures['differing']} of {figures['values']} values differ"
        + (f", the first {figures['first']}." if figures["differing"] else ".")
    ]


def sampling(found: Mapping[str, Entry]) -> list[str]:
    """Return the rates of every way of decoding."""
    rates = found["sampling"]["tokens_per_second"]
    forwards = found["sampling"]["tokens_per_forward"]
    return table(
        ("way", "tokens/s", "tokens a forward"),
        [(name, f"{rate:,.0f}", f"{forwards[name]:.2f}") for name, rate in rates.items()],
    )


def tests(found: Mapping[str, Entry]) -> list[str]:
    """Return how many tests ended how, and those that did not pass."""
    figures = found["tests"]
    counts = ", ".join(f"{len(figures[name])} {name}" for name in ("passed", "failed", "skipped"))
    return [
        f"{counts}.",
        *(f"- {name}: `{test}`" for name in ("failed", "skipped") for test in figures[name]),
    ]


SECTIONS = (
    ("training", "Trainings", trainings),
    ("step", "A step beside full logits", step),
    ("resume", "Killed and resumed", resume),
    ("ceilings", "Ceilings", ceilings),
    ("links", "Collectives", links),
    ("numerics", "Head and attention against float64", numerics),
    ("options", "Options of a step", options),
    ("sampling", "Sampling", sampling),
    ("tests", "Tests marked gpu", tests),
)


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def clean(kernel: str) -> str:
    """Return a kernel's name without what breaks a table."""
    return kernel.replace("`", "'").replace("\n", " ")[:70]


def line(name: str, part: Entry) -> str:
    """Return what became of a part, on one line."""
    seconds = f"{part['seconds']:6.1f} s" if "seconds" in part else "       -"
    last = f"  {part['last_lines'][-1][:120]}" if part.get("last_lines") else ""
    return f"{name:20} {part['status']:12} {seconds}{last}"


def summary(proof: Entry) -> str:
    """Return the aims beside what was measured, as text."""
    rows = aims_rows(proof)
    return "\n".join(
        f"{name:52} {value:>14}  {bound:14} {verdict.strip('*')}" for name, value, bound, verdict in rows
    )
