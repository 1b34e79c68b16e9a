"""What training reads: one file that holds the training tokens, which of them the assistant wrote, and held-out blocks.

    python -m softprune.bench.tiny.batches OUT.npz.xz

Made where the packs and the tokenizer are; a GPU host needs only NumPy to read it.
"""

from __future__ import annotations

import io
import lzma
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softprune.bench.tiny import PACKS
from softprune.errors import InputError

HERE = Path(__file__).resolve().parent
TRAINING = Path(".cache/tiny/train/tokens.npz")


@dataclass(frozen=True)
class Data:
    """Training tokens and held-out blocks by pack.

    Attributes:
        tokens: uint16 [n].
        spoken: bool [n]; the token belongs to a turn of the assistant, its header and its end included.
        heldout_ids: uint16 [num_blocks, context].
        heldout_keep: bool [num_blocks, context]; completion tokens (spec/metrics.md 1.2).
    """

    tokens: dict[str, NDArray[np.uint16]]
    spoken: dict[str, NDArray[np.bool_]]
    heldout_ids: dict[str, NDArray[np.uint16]]
    heldout_keep: dict[str, NDArray[np.bool_]]

    @property
    def context(self) -> int:
        """Tokens in a held-out block, and in one that is trained on."""
        return int(self.heldout_ids[PACKS[0]].shape[1])


def spoken_tokens(ids: NDArray[np.uint16], start: int, ends: list[int], role: list[int]) -> NDArray[np.bool_]:
    """Mark the turns of one role in a stream of Harmony conversations.

    Args:
        ids: [n].
        start: id of `<|start|>`.
        ends: ids of `<|end|>`, `<|call|>` and `<|return|>`.
        role: the role's name as ids, as it stands right after `<|start|>`.

    Returns:
        bool [n], from the token after `<|start|>` to the turn's end, that one included.
    """
    starts = np.flatnonzero(ids[: len(ids) - len(role)] == start)
    for offset, token in enumerate(role, 1):
        starts = starts[ids[starts + offset] == token]
    stops = np.flatnonzero(np.isin(ids, ends))
    found = np.searchsorted(stops, starts)
    starts, found = starts[found < len(stops)], found[found < len(stops)]
    edges = np.zeros(len(ids) + 1, np.int32)
    np.add.at(edges, starts + 1, 1)
    np.add.at(edges, stops[found] + 1, -1)
    return np.cumsum(edges[:-1]) > 0


def collect(training: Path, packs: Path, tokenizer_dir: Path) -> Data:
    """Read the training tokens and pack the held-out conversations.

    Raises:
        InputError: a pack's training tokens are missing.
    """
    from softprune.bench.tiny.measure_packs import load_tokenizer, pack_blocks

    tokenizer = load_tokenizer(tokenizer_dir)
    heldout = pack_blocks(packs, tokenizer, None)
    start, *ends = tokenizer.convert_tokens_to_ids(["<|start|>", "<|end|>", "<|call|>", "<|return|>"])
    role = tokenizer("assistant", add_special_tokens=False).input_ids
    data = Data({}, {}, {}, {})
    with np.load(training, allow_pickle=False) as arrays:
        for pack in PACKS:
            if pack not in arrays:
                raise InputError(str(training), pack, f"arrays {', '.join(arrays)}", "the pack's tokens")
            data.tokens[pack] = arrays[pack]
            data.spoken[pack] = spoken_tokens(arrays[pack], start, ends, role)
            data.heldout_ids[pack] = heldout[pack].ids.astype(np.uint16)
            data.heldout_keep[pack] = heldout[pack].keep
    return data


def save(data: Data, out: Path) -> None:
    """Write everything to one compressed file."""
    arrays: dict[str, NDArray[Any]] = {}
    for pack in PACKS:
        arrays[f"{pack}.tokens"] = data.tokens[pack]
        arrays[f"{pack}.spoken"] = np.packbits(data.spoken[pack])
        arrays[f"{pack}.heldout_ids"] = data.heldout_ids[pack]
        arrays[f"{pack}.heldout_keep"] = data.heldout_keep[pack]
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(lzma.compress(buffer.getbuffer(), preset=6))


def load(path: Path) -> Data:
    """Read what `save` wrote."""
    data = Data({}, {}, {}, {})
    with np.load(io.BytesIO(lzma.decompress(path.read_bytes())), allow_pickle=False) as arrays:
        for pack in PACKS:
            data.tokens[pack] = arrays[f"{pack}.tokens"]
            data.spoken[pack] = np.unpackbits(arrays[f"{pack}.spoken"], count=len(data.tokens[pack])).astype(bool)
            data.heldout_ids[pack] = arrays[f"{pack}.heldout_ids"]
            data.heldout_keep[pack] = arrays[f"{pack}.heldout_keep"]
    return data


class Stream:
    """Blocks of one pack without end: every epoch cuts them at another offset and shuffles them.

    The n-th block is the same for the same seed, so a run that goes on after a break sees what it would have seen.
    """

    def __init__(self, tokens: NDArray[np.uint16], spoken: NDArray[np.bool_], context: int, seed: int, device: str) -> None:
        self._tokens = torch.from_numpy(tokens.astype(np.int32)).to(device)
        self._spoken = torch.from_numpy(spoken).to(device)
        self._context, self._seed = context, seed
        self._window = torch.arange(context + 1, device=device)
        self._per_epoch = (len(tokens) - context - 1) // context
        self._epoch, self._starts = -1, torch.empty(0, dtype=torch.int64)

    def take(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks `first` to `first + count - 1`.

        Returns:
            (ids int64 [count, context + 1], spoken bool, same shape).
        """
        starts = torch.stack([self._start(number) for number in range(first, first + count)]).to(self._tokens.device)
        at = starts[:, None] + self._window
        return self._tokens[at].long(), self._spoken[at]

    def epochs(self, blocks: int) -> float:
        """How often that many blocks have gone through the pack."""
        return blocks / self._per_epoch

    def _start(self, number: int) -> torch.Tensor:
        epoch, position = divmod(number, self._per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(1_000_003 * self._seed + epoch)
            offset = torch.randint(self._context, (1,), generator=generator)
            self._starts = offset + self._context * torch.randperm(self._per_epoch, generator=generator)
            self._epoch = epoch
        return self._starts[position]


if __name__ == "__main__":
    save(collect(TRAINING, HERE / "packs", HERE / "tokenizer"), Path(sys.argv[1]))
