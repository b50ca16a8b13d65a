"""How a step scales from one host to ten thousand: a simulation from measured parts of a step.

    python tools/simulate_scale.py [--score S] [--update S] [--pair S] ... [--out PNG]

A host scores in proportion to its speed; tasks take a little longer or shorter by chance, now and then one is a straggler's or is
lost with its host; when it is late, idle hosts score it too, as `hosts.engine` has it. All hosts apply all pairs' noise. Prints
a table of seconds a step, and of efficiency: the share of all hosts' time that goes into scoring members. Defaults are those of
Qwen3 0.5B on hosts of two cores, 128 tokens a member (benchmarks/lowrank.md), in a network of 1 Gbit/s.

What does not follow from measurements is stated: --spread, --stragglers and --failures are guesses about machines of all kinds.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from _measuring import table

from es_lite.hosts.sharing import Span, divide

HOSTS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)


@dataclass(frozen=True)
class Parts:
    """Seconds of a step's parts on a host of usual speed."""

    score: float
    """Of one member."""
    update: float
    """Without any pair: reading and writing the weights."""
    pair: float
    """More of it for each pair."""


FULL, LOW_RANK = Parts(0.33, 0.75, 0.132), Parts(0.19, 0.74, 0.012)
"""Full noise and low-rank noise."""


@dataclass(frozen=True)
class Cluster:
    latency: float
    """Seconds that a message takes."""
    call: float
    """Seconds of the coordinator for each host and step."""
    bandwidth: float
    """Bytes a second of a host's link."""
    spread: float
    """Standard deviation of the logarithm of hosts' speeds; a third of it is that of a task's duration."""
    stragglers: float
    """Share of the tasks that take STRAGGLE times as long."""
    failures: float
    """Of a host, in an hour."""


STRAGGLE = 5.0

LATE = 1.5
"""Times the expected duration, after which others score a task too (`hosts.engine`)."""


def step_seconds(
    hosts: int, pairs: int, parts: Parts, cluster: Cluster, sharded: float, chance: np.random.Generator
) -> tuple[float, float]:
    """Seconds of one step, and its efficiency.

    sharded: bytes of the weights, if each host updates its own layers and gets the others; 0: all hosts update all.
    """
    speeds = np.exp(cluster.spread * chance.standard_normal(hosts))
    update = parts.update + parts.pair * pairs
    if sharded:
        update = parts.update + parts.pair * pairs / hosts + sharded * (1 - 1 / hosts) / cluster.bandwidth
    shares = np.array([sum(map(len, spans)) for spans in divide([Span(0, pairs)], speeds.tolist())])
    busy = shares > 0
    expected = (update + 2 * parts.score * shares) / speeds
    taken = expected * np.exp(cluster.spread / 3 * chance.standard_normal(hosts))
    taken[chance.random(hosts) < cluster.stragglers] *= STRAGGLE
    lost = chance.random(hosts) < cluster.failures * expected / 3600
    taken[lost] = np.inf
    done = _with_takeovers(taken[busy], expected[busy], shares[busy], speeds, parts)
    seconds = float(done + 2 * cluster.latency + cluster.call * hosts)
    return seconds, float(2 * pairs * parts.score / (speeds.sum() * seconds))


def _with_takeovers(taken: np.ndarray, expected: np.ndarray, shares: np.ndarray, speeds: np.ndarray, parts: Parts) -> float:
    """When all pairs are scored: late tasks are also shared among the hosts that are done."""
    late = np.flatnonzero(taken > LATE * expected)
    if late.size == taken.size:  # nobody is left to help: a lost host's part is scored when it is started again
        return float(np.where(np.isfinite(taken), taken, LATE * expected + expected).max())
    if not late.size:
        return float(taken.max())
    on_time = float(np.delete(taken, late).max())
    idle = max(1, speeds.size - late.size)
    again = [max(on_time, LATE * expected[i]) + 2 * parts.score * -(-shares[i] // idle) / np.median(speeds) for i in late]
    return max(on_time, *(min(taken[i], again[n]) for n, i in enumerate(late)))


def simulate(hosts: int, pairs: int, parts: Parts, cluster: Cluster, steps: int, sharded: float = 0.0) -> tuple[float, float]:
    """Median seconds of a step, and median efficiency."""
    chance = np.random.default_rng(hosts)
    seconds, efficiency = zip(*(step_seconds(hosts, pairs, parts, cluster, sharded, chance) for _ in range(steps)), strict=True)
    return float(np.median(seconds)), float(np.median(efficiency))


Curve = list[tuple[int, float, float]]
"""(hosts, seconds, efficiency)."""


def curves(arguments: argparse.Namespace) -> dict[tuple[str, str], Curve]:
    """By population and by kind of noise."""
    full = Parts(arguments.score, arguments.update, arguments.pair)
    cluster = Cluster(**{name: getattr(arguments, name) for name in Cluster.__dataclass_fields__})
    kinds = {
        "full noise": (full, 0.0),
        "full noise, update by layer": (full, 2.0 * arguments.parameters),
        "low rank": (replace(LOW_RANK, score=arguments.low_rank_score), 0.0),
    }
    found: dict[tuple[str, str], Curve] = {}
    for kind, (parts, sharded) in kinds.items():
        for what, fixed, of_a_host in (
            (f"N = {arguments.population:,}", arguments.population, 0),
            (f"N = {arguments.members} a host", 0, arguments.members),
        ):
            found[what, kind] = [
                (hosts, *simulate(hosts, (fixed + of_a_host * hosts) // 2, parts, cluster, arguments.steps, sharded))
                for hosts in HOSTS
            ]
    return found


def draw(found: dict[tuple[str, str], Curve], out: Path) -> None:
    """Seconds a step, and efficiency; a colour for each kind of noise, dashes where N grows with the hosts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), constrained_layout=True)
    colours = dict(zip(dict.fromkeys(kind for _, kind in found), ("#d9730d", "#448361", "#0b6e99"), strict=True))
    for (what, kind), points in found.items():
        hosts, seconds, efficiency = zip(*points, strict=True)
        style = "--" if what.endswith("host") else "-"
        left.plot(hosts, seconds, style, color=colours[kind], label=f"{kind}, {what}", linewidth=2)
        right.plot(hosts, efficiency, style, color=colours[kind], linewidth=2)
    left.set(xscale="log", yscale="log", xlabel="hosts", ylabel="seconds a step")
    right.set(xscale="log", xlabel="hosts", ylabel="share of the hosts' time that is scoring", ylim=(0, 1))
    left.legend(frameon=False, fontsize=9)
    figure.savefig(out, dpi=100)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--score", type=float, default=FULL.score, help="seconds of a member, full noise")
    parser.add_argument("--low-rank-score", type=float, default=LOW_RANK.score, help="the same, low-rank noise")
    parser.add_argument("--update", type=float, default=FULL.update, help="seconds of an update of no pairs")
    parser.add_argument("--pair", type=float, default=FULL.pair, help="seconds more for each pair")
    parser.add_argument("--parameters", type=float, default=0.533e9)
    parser.add_argument("--population", type=int, default=1024, help="N that stays the same")
    parser.add_argument("--members", type=int, default=16, help="N for each host, where it grows")
    parser.add_argument("--latency", type=float, default=1e-3, help="seconds of a message; 0.05 between continents")
    parser.add_argument("--call", type=float, default=1e-3, help="seconds of the coordinator for each host and step")
    parser.add_argument("--bandwidth", type=float, default=125e6, help="bytes a second of a host's link")
    parser.add_argument("--spread", type=float, default=0.3, help="of hosts' speeds, as a deviation of their logarithm")
    parser.add_argument("--stragglers", type=float, default=0.01, help=f"share of tasks that take {STRAGGLE:g} times as long")
    parser.add_argument("--failures", type=float, default=0.01, help="of a host, in an hour")
    parser.add_argument("--steps", type=int, default=20, help="simulated for each point")
    parser.add_argument("--out", metavar="PNG", type=Path)
    arguments = parser.parse_args(argv)
    if min(arguments.population, arguments.members) < 2 or arguments.steps < 1:
        parser.error("expected at least two members and one step")
    found = curves(arguments)
    lines = [["hosts", *(f"{kind}, {what}" for what, kind in found)]]
    for i, hosts in enumerate(HOSTS):
        lines.append([f"{hosts:,}", *(f"{points[i][1]:.3g} s, {points[i][2]:.0%}" for points in found.values())])
    print(table(lines))
    if arguments.out:
        draw(found, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
