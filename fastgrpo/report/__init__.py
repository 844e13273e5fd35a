"""A run's report: one HTML file that a person wants to look at and that opens anywhere, without a network."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from fastgrpo.config import UserError
from fastgrpo.metrics import iter_jsonl


def write_report(run_dir: str | Path) -> Path:
    """Make report.html from metrics.jsonl, samples.jsonl and config.yaml in run_dir, and return its path.

    Works at any moment of a run, on what is there: missing files, missing metrics, values that were not finite and
    lines torn by a kill leave gaps. Replaces an older report atomically. Raises UserError where there is no run.
    """
    from fastgrpo.report.page import build
    from fastgrpo.report.samples import first_and_last
    from fastgrpo.report.series import merge_rows

    run_dir = Path(run_dir)
    metrics, config_path = run_dir / "metrics.jsonl", run_dir / "config.yaml"
    if not metrics.exists() and not config_path.exists():
        raise UserError(f"{run_dir} holds no run: neither metrics.jsonl nor config.yaml is there; give a run's folder")
    config_text = config_path.read_text(encoding="utf-8", errors="replace") if config_path.exists() else ""
    written = ""
    if metrics.exists():
        written = time.strftime(", last step written %Y-%m-%d %H:%M", time.localtime(metrics.stat().st_mtime))
    page = build(
        name=_run_name(run_dir),
        rows=merge_rows(iter_jsonl(metrics)),
        kept=first_and_last(iter_jsonl(run_dir / "samples.jsonl")),
        config=_parse(config_text),
        config_text=config_text,
        written=written,
    )
    path = run_dir / "report.html"
    temporary = run_dir / "report.html.tmp"
    temporary.write_bytes(page.encode("utf-8", "replace"))
    os.replace(temporary, path)
    return path


def _run_name(run_dir: Path) -> str:
    """The experiment and the time, as runs/<experiment>/<time> has them."""
    resolved = run_dir.resolve()
    return f"{resolved.parent.name} / {resolved.name}" if resolved.parent.parent.name == "runs" else resolved.name


def _parse(text: str) -> dict[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:  # shown as it is all the same
        return {}
    return config if isinstance(config, dict) else {}
