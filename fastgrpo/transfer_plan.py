"""Who gives a sampler which of its weights: the learner's own memory, a copy on the rank, or another rank.

Both sides describe what they hold as slices of checkpoint tensors, and every rank makes the same plan of everyone's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastgrpo.types import WeightSlice

ALIGNMENT = 16
"""Bytes: where a piece may begin in a buffer, whatever its dtype."""


class WeightsError(RuntimeError):
    """Learner and sampler do not hold the same policy; the message names the tensor."""


@dataclass(frozen=True, kw_only=True)
class RemoteSlice:
    """A slice as other ranks see it: without its memory, but with the address."""

    rank: int
    index: int
    """Of the slice among its rank's."""
    name: str
    full_shape: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    address: int
    strides: tuple[int, ...]

    @property
    def box(self) -> tuple[Any, ...]:
        return self.name, self.start, self.shape

    def contains(self, other: RemoteSlice) -> bool:
        """Whether the other is a part of this box, in this memory."""
        if (self.rank, self.full_shape, self.dtype) != (other.rank, other.full_shape, other.dtype):
            return False
        address = self.address
        for dim, (begin, first, size) in enumerate(zip(other.start, self.start, other.shape, strict=True)):
            if begin < first or begin + size > first + self.shape[dim]:
                return False
            if size > 1 and self.strides[dim] != other.strides[dim]:
                return False
            address += (begin - first) * self.strides[dim] * self.dtype.itemsize
        return address == other.address


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one learner's slice gives one sampler's: a box, in the checkpoint tensor's own coordinates."""

    source: RemoteSlice
    target: RemoteSlice
    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        size = self.target.dtype.itemsize
        for length in self.shape:
            size *= length
        return -(-size // ALIGNMENT) * ALIGNMENT

    def of(self, held: RemoteSlice, tensor: Tensor) -> Tensor:
        """The piece's view of a slice's tensor."""
        for dim, (begin, first, length) in enumerate(zip(self.start, held.start, self.shape, strict=True)):
            tensor = tensor.narrow(dim, begin - first, length)
        return tensor

    def split(self, limit: int) -> list[Piece]:
        """The same in parts of at most `limit` bytes, cut between rows; one row is never cut."""
        if self.num_bytes <= limit or self.shape[0] == 1:
            return [self]
        row = -(-self.num_bytes // self.shape[0])
        rows = max(1, limit // row)
        return [
            replace(
                self,
                start=(self.start[0] + first, *self.start[1:]),
                shape=(min(rows, self.shape[0] - first), *self.shape[1:]),
            )
            for first in range(0, self.shape[0], rows)
        ]


@dataclass(frozen=True, kw_only=True)
class TransferPlan:
    """How every sampler's slice comes by its weights. The same on every rank."""

    shared: tuple[RemoteSlice, ...]
    """Sampler's slices that are learner's memory."""
    copied: tuple[Piece, ...]
    """Pieces whose source and target are on one rank."""
    buckets: tuple[tuple[Piece, ...], ...]
    """Pieces between ranks."""

    def lines(self, rank: int) -> list[str]:
        """What a rank's sampler shares, copies and receives, for people."""

        def total(helds: Sequence[RemoteSlice | Piece]) -> str:
            size = sum(h.dtype.itemsize * volume(h.shape) if isinstance(h, RemoteSlice) else h.num_bytes for h in helds)
            return f"{size / 1e6:.1f} MB"

        shared = [held for held in self.shared if held.rank == rank]
        copied = [piece for piece in self.copied if piece.target.rank == rank]
        moved = [p for bucket in self.buckets for p in bucket if p.target.rank == rank]
        parts = [f"{total(shared)} shared"]
        parts += [f"{total(copied)} copied"] if copied else []
        parts += [f"{total(moved)} from other ranks in {len(self.buckets)} buckets"] if moved else []
        return parts


def volume(shape: Sequence[int]) -> int:
    """Elements of a box."""
    return torch.Size(shape).numel()


def describe(slices: Sequence[WeightSlice], rank: int) -> list[RemoteSlice]:
    """What other ranks need to know of this rank's slices."""
    return [
        RemoteSlice(
            rank=rank,
            index=index,
            name=s.name,
            full_shape=s.full_shape,
            start=s.start,
            shape=tuple(s.tensor.shape),
            dtype=s.tensor.dtype,
            address=s.tensor.data_ptr(),
            strides=s.tensor.stride(),
        )
        for index, s in enumerate(slices)
    ]


def plan_transfers(learners: Sequence[RemoteSlice], samplers: Sequence[RemoteSlice], bucket_bytes: int) -> TransferPlan:
    """Find a source for everything that the samplers hold: the same memory, else the same rank, else the rank that has
    sent the least so far. Raises WeightsError where the learners do not hold all of a tensor."""
    by_name: dict[str, list[RemoteSlice]] = {}
    for held in learners:
        by_name.setdefault(held.name, []).append(held)
    sent: dict[int, int] = {}
    shared, pieces = [], []
    for target in samplers:
        sources = by_name.get(target.name, [])
        if any(source.contains(target) for source in sources):
            shared.append(target)
            continue
        found = list(_cover(target, sources, sent))
        covered = sum(volume(piece.shape) for piece in found)
        if covered != volume(target.shape):
            raise WeightsError(
                f"{target.name}: the learner holds {covered} of the {volume(target.shape)} elements that rank "
                f"{target.rank}'s sampler needs of it"
            )
        pieces += found
    copied = [piece for piece in pieces if piece.source.rank == piece.target.rank]
    moved = [p for piece in pieces if piece.source.rank != piece.target.rank for p in piece.split(bucket_bytes)]
    buckets = _fill_buckets(moved, bucket_bytes)
    return TransferPlan(shared=tuple(shared), copied=tuple(copied), buckets=tuple(buckets))


def _cover(target: RemoteSlice, sources: Sequence[RemoteSlice], sent: dict[int, int]) -> Iterator[Piece]:
    """Pieces of the learners' boxes that intersect the target's, each from one of the ranks that hold the box."""
    boxes: dict[tuple[Any, ...], list[RemoteSlice]] = {}
    for source in sources:
        if source.full_shape != target.full_shape:
            raise WeightsError(
                f"{target.name}: {source.full_shape} in the learner and {target.full_shape} in the sampler"
            )
        boxes.setdefault(source.box, []).append(source)
    for holders in boxes.values():
        first = holders[0]
        start = tuple(map(max, first.start, target.start))
        ends = (
            min(a + n, b + m) for a, n, b, m in zip(first.start, first.shape, target.start, target.shape, strict=True)
        )
        shape = tuple(end - begin for begin, end in zip(start, ends, strict=True))
        if min(shape) <= 0:
            continue
        source = min(holders, key=lambda held: (held.rank != target.rank, sent.get(held.rank, 0), held.rank))
        piece = Piece(source=source, target=target, start=start, shape=shape)
        if source.rank != target.rank:
            sent[source.rank] = sent.get(source.rank, 0) + piece.num_bytes
        yield piece


def _fill_buckets(pieces: Sequence[Piece], limit: int) -> list[tuple[Piece, ...]]:
    """Each piece in the first bucket where neither its sender nor its receiver gets over the limit (or one row, if that
    is more). So all ranks send and receive at once, where a bucket of consecutive pieces would be one receiver's."""
    buckets: list[list[Piece]] = []
    loads: list[dict[tuple[str, int], int]] = []
    first_open: dict[tuple[str, int], int] = {}
    for piece in pieces:
        ends, size = (("send", piece.source.rank), ("receive", piece.target.rank)), piece.num_bytes
        at = max(first_open.get(end, 0) for end in ends)
        while at < len(loads) and (full := [e for e in ends if loads[at].get(e, 0) + size > max(limit, size)]):
            first_open |= {end: at + 1 for end in full if first_open.get(end, 0) == at}
            at += 1
        if at == len(loads):
            buckets.append([])
            loads.append({})
        buckets[at].append(piece)
        loads[at] |= {end: loads[at].get(end, 0) + size for end in ends}
    return [tuple(bucket) for bucket in buckets]
