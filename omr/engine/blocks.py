"""Who owns which block of the KV cache, and which blocks may be shared.

A block is free, or held by one or more sequences (`refs`). Its content is named once all of its tokens are computed:
the name is (name of the block before, its tokens), so equal names mean equal prefixes, compared in full, never by a
hash alone. A new sequence takes over the named blocks its prompt begins with instead of computing them: the second
round of a tool-integrated solution, or another sample of the same problem, starts from the cache.

Freed blocks keep their name and content until they are needed, least recently freed first.
Invariant: every block but NULL_BLOCK is free or has refs > 0, never both; `check` asserts it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from omr.nn.paged import NULL_BLOCK

ROOT = 0
"""Name of the empty prefix."""


class BlockPool:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 1, f"need a block besides the null block, got {num_blocks}"
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.refs = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict((b, None) for b in range(1, num_blocks))
        self._names: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # (before, tokens) -> (name, block)
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._next_name = ROOT + 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def capacity(self) -> int:
        return self.num_blocks - 1

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def take(self, count: int) -> list[int]:
        """`count` blocks whose old content is forgotten. The caller has checked `num_free`."""
        assert count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        taken = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            key = self._key_of.pop(block, None)
            if key is not None:
                del self._names[key]
            self.refs[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Iterable[int]) -> None:
        """Give up one reference to each block, given in sequence order; a prefix outlives its continuation."""
        for block in reversed(list(blocks)):
            assert self.refs[block] > 0, f"block {block} released but not held"
            self.refs[block] -= 1
            if not self.refs[block]:
                self._free[block] = None

    def match(self, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """Blocks, and their names, that already hold the longest prefix of `tokens`, leaving at least one token over.

        Takes no reference: `share` does.
        """
        blocks, names, before = [], [], ROOT
        size = self.block_size
        for start in range(0, (len(tokens) - 1) // size * size, size):
            found = self._names.get((before, tuple(tokens[start : start + size])))
            if found is None:
                break
            before, block = found
            names.append(before)
            blocks.append(block)
        return blocks, names

    def share(self, blocks: Iterable[int]) -> None:
        """Take a reference to blocks found by `match`."""
        for block in blocks:
            if not self.refs[block]:
                del self._free[block]
            self.refs[block] += 1

    def name(self, block: int, before: int, tokens: Sequence[int]) -> int:
        """Record that `block` holds `tokens` after the prefix named `before`; the name of the prefix with them."""
        key = (before, tuple(tokens))
        found = self._names.get(key)
        if found is not None:
            return found[0]
        name = self._next_name
        self._next_name += 1
        self._names[key] = (name, block)
        self._key_of[block] = key
        return name

    def check(self, held: Iterable[Iterable[int]]) -> None:
        """Assert that `held`, the block lists of all sequences, and the free list account for every block."""
        counts = Counter(block for blocks in held for block in blocks)
        assert NULL_BLOCK not in counts and NULL_BLOCK not in self._free
        for block in range(1, self.num_blocks):
            assert self.refs[block] == counts[block], f"block {block}: refs {self.refs[block]}, held {counts[block]}"
            assert (block in self._free) == (counts[block] == 0), f"block {block} is lost or held while free"
        for key, (_, block) in self._names.items():
            assert self._key_of[block] == key
