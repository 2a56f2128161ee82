"""The rows that the tokens of `model.add_tokens` start from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorafit.builders.model_files import AddedTokens
from lorafit.builders.model_modules import weight_of
from lorafit.builders.untrained_rows import Matrix, never_trained


@torch.no_grad()
def begin_rows(model: PreTrainedModel, added: AddedTokens) -> None:
    """Give the model a row for each token, in its embedding and in its output head where that has its own.

    A new token begins as the mean of its pieces; so does one that the base has without ever having trained it. What is
    only there to fill up the ids between begins as the mean of all rows.
    """
    if weight_of(model.get_input_embeddings()).shape[0] < added.rows_needed:
        model.resize_token_embeddings(added.rows_needed, mean_resizing=False)
    matrices = [weight_of(model.get_input_embeddings())]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not matrices[0]:
        matrices.append(weight_of(head))
    token_of = {id_: token for token, id_ in added.ids.items()}
    for matrix in matrices:
        kept = _trained_before(matrix, added)
        for id_ in added.trained:
            pieces = added.pieces.get(token_of.get(id_, ""), ())
            if id_ not in kept:
                matrix[id_] = (matrix[list(pieces)] if pieces else matrix[: added.rows]).float().mean(dim=0)


def _trained_before(matrix: Tensor, added: AddedTokens) -> set[int]:
    known = sorted(added.ids[token] for token in added.known if added.ids[token] < added.rows)

    def rows(ids: Sequence[int]) -> Matrix:
        values: Matrix = matrix[list(ids)].float().cpu().numpy()
        return values

    return {*known} - never_trained(rows, known, ordinary=range(added.rows), peers=added.reserved).keys()
