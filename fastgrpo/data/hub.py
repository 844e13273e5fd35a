"""Data sets of the Hugging Face hub, through the `datasets` package, which is only needed here."""

from __future__ import annotations

from fastgrpo.config import UserError
from fastgrpo.data.rows import Row, not_empty


def read_hub(name: str, hub_config: str | None, split: str) -> list[Row]:
    """Loads one split. Raises UserError where `datasets` is missing or the hub does not give the split."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise UserError("data.source=hub needs the datasets package: pip install fastgrpo[hub]") from None
    place = f"{name}{'/' + hub_config if hub_config else ''} split {split}"
    try:
        loaded = datasets.load_dataset(name, hub_config, split=split)
    except Exception as error:  # a network's edge: anything can come
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"data.path={place} cannot be loaded ({reason}); check hub_config and split") from error
    rows = [Row(index=i, place=f"{place} row {i}", values=dict(values)) for i, values in enumerate(loaded)]
    return not_empty(rows, place, "data.path")
