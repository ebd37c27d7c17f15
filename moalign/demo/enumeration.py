"""Log-probabilities of all replies under a transformers model, exactly, each shared beginning computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moalign.data.tokenise import Ids, Tokeniser
from moalign.demo import grammar
from moalign.engine.conditioning import told_ids
from moalign.errors import MoalignError

ROUNDING = 1e-4  # of a float32 sum of probabilities
REPLIES_PER_TREE = 72


@dataclass(frozen=True)
class Enumeration:
    """All replies of some prompts as trees of tokens: each row of the model's input holds one tree.

    A node attends to its ancestors alone, and its position is its depth, so the model computes for every node what it
    would compute for that beginning of a reply.

    ``input_ids[B,L]``, ``positions[B,L]``, ``attention[B,1,L,L]`` (bool)
    ``parent[E]``, ``token[E]``  every edge of the trees: the flat index of a node, and the token that follows it
    ``path[P,R,T]``              the edges of each reply, its end token's among them; E where it is shorter than T
    """

    prompts: tuple[str, ...]
    input_ids: Tensor
    positions: Tensor
    attention: Tensor
    parent: Tensor
    token: Tensor
    path: Tensor


def reply_logps(model: nn.Module, replies: Enumeration) -> Tensor:
    """log pi(reply, end | prompt) for every prompt and reply; [P,R], differentiable, in the model's precision.

    ``model`` is a transformers causal language model, bare or under peft. Raises MoalignError where the
    probabilities of a prompt's replies sum to more than 1, which no autoregressive model's do.
    """
    logits = model(
        input_ids=replies.input_ids,
        position_ids=replies.positions,
        attention_mask=replies.attention,
        use_cache=False,
    ).logits
    logps = logits.flatten(0, 1).float().log_softmax(-1)
    edges = logps.view(-1)[replies.parent * logps.shape[-1] + replies.token]
    totals = torch.cat([edges, edges.new_zeros(1)])[replies.path].sum(-1)
    mass = totals.detach().exp().sum(1).max().item()
    if not mass <= 1 + ROUNDING:
        raise MoalignError(f"the probabilities of a prompt's replies sum to {mass}; is the tokeniser this model's own?")
    return totals


def enumerate_replies(
    tokenizer: Any, prompts: Sequence[str], asked: Callable[[Ids], Ids] = lambda ids: ids
) -> Enumeration:
    """The grammar's replies to the prompts, tokenised and laid out for ``reply_logps``; once per tokenizer.

    ``asked``: what the model reads in the place of a prompt's ids.
    """
    forest = _Forest()
    paths = [_paths(forest, tokenizer, prompt, asked) for prompt in prompts]
    length = max(len(tree) for tree in forest.trees)
    ids = torch.zeros(len(forest.trees), length, dtype=torch.long)
    depth = torch.zeros_like(ids)
    attention = torch.eye(length, dtype=torch.bool).repeat(len(forest.trees), 1, 1)
    for row, tree in enumerate(forest.trees):
        for place, (above, token) in enumerate(tree):
            ids[row, place] = token
            if above is not None:
                depth[row, place] = depth[row, above] + 1
                attention[row, place] |= attention[row, above]
    edges = torch.tensor(forest.edges)
    longest = max(len(path) for replies in paths for path in replies)
    padded = [[path + [len(edges)] * (longest - len(path)) for path in replies] for replies in paths]
    parent = edges[:, 0] * length + edges[:, 1]
    return Enumeration(tuple(prompts), ids, depth, attention[:, None], parent, edges[:, 2], torch.tensor(padded))


def behind(tokeniser: Tokeniser, text: str, ids: Ids) -> Ids:
    """A prompt's ids with a text in front, as the tiny assistant, which has no chat template, reads them."""
    return told_ids(tokeniser, "", ids, text, "front")


class _Forest:
    """Trees under construction: ``trees[row]`` lists nodes (parent's place, token), ``edges`` (row, place, token)."""

    def __init__(self) -> None:
        self.trees: list[list[tuple[int | None, int]]] = []
        self.edges: list[tuple[int, int, int]] = []

    def plant(self, beginning: list[int], continuations: list[list[int]]) -> list[list[int]]:
        """A tree of all continuations of one beginning; for each the indices of its edges."""
        row, tree = len(self.trees), [(None if place == 0 else place - 1, t) for place, t in enumerate(beginning)]
        self.trees.append(tree)
        known: dict[tuple[int, ...], tuple[int, int]] = {}
        return [self._grow(row, tree, len(beginning) - 1, continuation, known) for continuation in continuations]

    def _grow(
        self,
        row: int,
        tree: list[tuple[int | None, int]],
        place: int,
        tokens: list[int],
        known: dict[tuple[int, ...], tuple[int, int]],
    ) -> list[int]:
        path = []
        for end in range(1, len(tokens) + 1):
            key = tuple(tokens[:end])
            if key not in known:
                self.edges.append((row, place, tokens[end - 1]))
                is_last = end == len(tokens)  # the end token has no successor, so the model need not read it
                if not is_last:
                    tree.append((place, tokens[end - 1]))
                known[key] = (len(self.edges) - 1, len(tree) - 1)
            edge, place = known[key]
            path.append(edge)
        return path


def _paths(forest: _Forest, tokenizer: Any, prompt: str, asked: Callable[[Ids], Ids]) -> list[list[int]]:
    beginning = list(asked(tuple(tokenizer(prompt)["input_ids"])))
    texts = grammar.replies(prompt)
    tokens = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    order = sorted(range(len(tokens)), key=tokens.__getitem__)  # neighbours share their beginnings
    paths: list[list[int]] = [[]] * len(tokens)
    for start in range(0, len(order), REPLIES_PER_TREE):
        chosen = order[start : start + REPLIES_PER_TREE]
        for index, path in zip(chosen, forest.plant(beginning, [tokens[index] for index in chosen]), strict=True):
            paths[index] = path
    return paths
