"""Synthetic problems with tool-integrated solutions: what the embedded model is trained and measured on.

    family    values (seeded)  x  wording  x  code style  ->  problem, solution, answer
    compose   one Example by (split, seed, index); sets of them; the guard that keeps held-out problems out of training
    held_out  the frozen benchmarks and the dev sets
    layout    an example as a text row (omr/text.py);  vocabulary: the embedded model's tokenizer
    families  one module per group: arithmetic, number_theory, algebra, counting, geometry, stories, easy, gym

A solution reasons in words, calls Python, reads the output block and answers in \\boxed{}. Every output in it comes from
running the code when the example is made; no number is worked out in the model's head, it is copied. A known share of
solutions carries one typical slip with its real, wrong output: that is what sampling at T > 0 gets wrong and a vote repairs.
An example depends on (split, seed, index) alone, so any part of the corpus can be made anywhere, in any order.
"""

from __future__ import annotations

from omr.corpus.compose import REVISION, Example, Guard, example, examples, families, training_examples
from omr.corpus.family import Family
from omr.corpus.held_out import guard, rows

__all__ = [
    "REVISION",
    "Example",
    "Family",
    "Guard",
    "example",
    "examples",
    "families",
    "guard",
    "rows",
    "training_examples",
]
