"""The checks as a table for people, and what failed."""

from __future__ import annotations

from dataclasses import dataclass

OF_THE_HEAD = ("loss", "logprobs", "entropy", "dlogits", "dhidden", "dweight")
OF_A_LAYER = ("output", "gradient")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One quantity of one case: its error and the error it may have."""

    op: str
    dtype: str
    quantity: str
    error: float
    tolerance: float
    objective: str = "-"
    aggregation: str = "-"
    mask: str = "-"

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def report(checks: list[Check]) -> int:
    """Print the table and what failed; 0 if nothing did, else 1."""
    failed = [check for check in checks if not check.ok]
    print(table(checks))
    print(f"\n{len(checks)} checks, {len(failed)} failed; each cell: worst error / its tolerance")
    for check in failed[:20]:
        print(f"FAILED {check}")
    return 1 if failed else 0


def table(checks: list[Check]) -> str:
    """A line per op, objective and dtype: the worst error of each quantity over aggregations, masks and sizes. One
    table of the loss head and one of a layer's kernels."""
    parts = [(q, [check for check in checks if check.quantity in q]) for q in (OF_THE_HEAD, OF_A_LAYER)]
    return "\n\n".join(_table(members, quantities) for quantities, members in parts if members)


def _table(checks: list[Check], quantities: tuple[str, ...]) -> str:
    groups: dict[tuple[str, str, str], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.op, check.objective, check.dtype), []).append(check)
    lines = [f"{'op':<20}{'objective':<34}{'dtype':<10}" + "".join(f"{q:>20}" for q in quantities)]
    for (op, objective, dtype), members in groups.items():
        cells = []
        for quantity in quantities:
            own = [c for c in members if c.quantity == quantity]
            worst = max(own, key=lambda c: (not c.ok, c.error / c.tolerance), default=None)
            mark = "" if worst is None or worst.ok else " !"
            cells.append("" if worst is None else f"{worst.error:.1e} / {worst.tolerance:.1e}{mark}")
        lines.append(f"{op:<20}{objective:<34}{dtype:<10}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)
