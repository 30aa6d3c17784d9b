"""Match the tensors of two models by name; a tied output head matches the other model's embedding."""

from __future__ import annotations

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.models.weights import Weights

_HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_FLOATS = {"F64", "F32", "F16", "BF16"}
_ONE_SIDED = "; if other software wrote it, load it with transformers and save it again"


def match_tensors(before: Weights, after: Weights) -> dict[str, str]:
    """The name in `before` of each tensor of `after`.

    A head that only one side has is the embedding of the other side, if that side's config ties the two.
    UserError: a tensor that only one side has, different shapes, integers that differ, or quantised weights.
    """
    names = {name: _found(name, before, after) for name in after.shapes}

    # a tied head stored twice is no loss; any other tensor missing from `after` would be
    for name in before.shapes:
        tied = name.endswith(_HEAD) and before.ties_head() and after.ties_head()
        if name not in after.shapes and not tied:
            raise UserError(f"{name} {_shape(before, name)}: is in {before.folder}, not in {after.folder}{_ONE_SIDED}")

    for name, old in names.items():
        if before.shapes[old] != after.shapes[name]:
            raise UserError(
                f"{name}: is {_shape(before, old)} in {before.folder} and {_shape(after, name)} in {after.folder}, "
                "must have the same shape"
            )
        _require_numbers(before, old, after, name)
    return names


def _found(name: str, before: Weights, after: Weights) -> str:
    if name in before.shapes:
        return name
    embeddings = [other for other in before.shapes if other.endswith(_EMBEDDINGS)]
    if name.endswith(_HEAD) and before.ties_head() and len(embeddings) == 1:
        return embeddings[0]
    raise UserError(f"{name} {_shape(after, name)}: is in {after.folder}, not in {before.folder}{_ONE_SIDED}")


def _require_numbers(before: Weights, old: str, after: Weights, name: str) -> None:
    kinds = (before.dtypes[old], after.dtypes[name])
    if set(kinds) <= _FLOATS:
        return
    whole = all(kind.startswith(("I", "U", "BOOL")) for kind in kinds)
    if not whole:
        raise UserError(f"{name}: is {kinds[0]} and {kinds[1]}; quantised weights cannot be extrapolated")
    if not bool((before.tensor(old) == after.tensor(name)).all()):
        raise UserError(
            f"{name} {_shape(after, name)}: contains integers that differ between {before.folder} and {after.folder}; "
            "integers cannot be extrapolated"
        )


def _shape(weights: Weights, name: str) -> str:
    return str(list(weights.shapes[name]))
