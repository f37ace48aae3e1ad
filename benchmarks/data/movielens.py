"""MovieLens-100K as a recommender meets it: shown, clicked, liked, rated."""

import csv
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.data.base import Recipe, Split, Task, hard_sharing, packaged_file, shuffled
from mtl_optax import models
from mtl_optax.compare import Problem

NEGATIVES = 4  # items shown and not clicked, for each click
SHA256 = {
    "inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
    "item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
}


class EmbeddingEncoder(models.MLP):
    """Dense layers on an embedding of the user, one of the item, and their features."""

    def __init__(self, example: Split, hidden: tuple[int, ...], rngs: nnx.Rngs, *, width: int = 8):
        features = example.inputs["features"].shape[-1]
        super().__init__((2 * width + features, *hidden), activate_final=True, rngs=rngs)
        self.user = nnx.Embed(944, width, rngs=rngs)
        self.item = nnx.Embed(1683, width, rngs=rngs)

    def __call__(self, x: dict[str, jax.Array]) -> jax.Array:
        """Features of the pairs."""
        parts = [self.user(x["user"]), self.item(x["item"]), x["features"]]
        return super().__call__(jnp.concatenate(parts, axis=-1))


def esmm(model: Any, inputs: Any) -> dict[str, jax.Array]:
    r"""A like goes through a click: :math:`p(like) = p(click)\, p(like \mid click)`.

    The head `like` is the logit of p(like | click). For logits a and b the product of their
    probabilities has the logit :math:`a + b - \log(1 + e^a + e^b)`. A model of `like` alone learns
    p(like) directly.
    """
    outputs = model(inputs)
    if {"click", "like"} <= outputs.keys():
        a, b = outputs["click"], outputs["like"]
        neither = jax.nn.logsumexp(jnp.stack([jnp.zeros_like(a), a, b]), axis=0)
        outputs = {**outputs, "like": a + b - neither}
    return outputs


def movielens(*, sizes: tuple[int, int, int] = (92_000, 4_000, 4_000)) -> Problem:
    """MovieLens-100K: click, like and rating of a user and a film.

    A click is a rated film; four films that the user did not rate are drawn for each. A like is a
    rating of 4 or 5, asked of everything shown, as in ESMM. The rating is only known of what was
    clicked: missing labels.

    Args:
      sizes: number of clicks for training, validation and test.
    """
    users, user_features = _users(_file("user"))
    items, item_features = _items(_file("item"))
    rated = [(users[r[0]], items[r[1]], float(r[2])) for r in _rows(_file("inter"))]
    user, item, rating = (np.asarray(column) for column in zip(*rated, strict=True))
    seen = np.zeros((len(user_features), len(item_features)), bool)
    seen[user, item] = True
    rng = np.random.default_rng(1)

    def split(clicks: np.ndarray) -> Split:
        other_user = np.repeat(user[clicks], NEGATIVES)
        other_item = rng.integers(1, len(item_features), other_user.size)
        while (clash := seen[other_user, other_item]).any():
            other_item[clash] = rng.integers(1, len(item_features), clash.sum())
        who = np.concatenate([user[clicks], other_user])
        what = np.concatenate([item[clicks], other_item])
        stars = np.concatenate([rating[clicks], np.full(other_user.size, np.nan)])
        labels = {
            "click": ~np.isnan(stars),
            "like": stars >= 4,
            "rating": stars - 3.5,  # a network should not spend its time on a constant
        }
        return Split(
            {
                "user": who.astype(np.int32),
                "item": what.astype(np.int32),
                "features": np.concatenate([user_features[who], item_features[what]], axis=1),
            },
            {task: label[:, None].astype(np.float32) for task, label in labels.items()},
        )

    train, validation, test = map(split, shuffled(len(user), *sizes))
    return hard_sharing(
        title="MovieLens-100K: click, like through click, rating of what is clicked",
        source="MovieLens-100K as shipped with recbole (research use only); 4 films not rated are "
        "drawn for each one rated",
        tasks=(Task("click", 1, "binary"), Task("like", 1, "binary"), Task("rating", 1, "rating")),
        train=train,
        validation=validation,
        test=test,
        recipe=Recipe(
            steps=300, batch_size=512, hidden=(64, 32), learning_rates=(1e-3, 3e-3, 1e-2)
        ),
        encoder=EmbeddingEncoder,
        predict=esmm,
    )


def _file(part: str) -> Path:
    return packaged_file(
        "recbole",
        f"dataset_example/ml-100k/ml-100k.{part}",
        sha256=SHA256[part],
        install="pip install --no-deps recbole==1.2.1",
    )


def _rows(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]


def _one_hot(values: list[str]) -> np.ndarray:
    names, positions = np.unique(values, return_inverse=True)
    return np.eye(len(names), dtype=np.float32)[positions]


def _padded(features: list[np.ndarray]) -> np.ndarray:
    # Row 0 is nobody: the identifiers count from 1.
    table = np.concatenate(features, axis=1).astype(np.float32)
    return np.concatenate([np.zeros_like(table[:1]), table])


def _users(path: Path) -> tuple[dict[str, int], np.ndarray]:
    rows = _rows(path)
    ages = np.array([[float(row[1]) / 50 - 0.7] for row in rows])
    features = [ages, _one_hot([row[2] for row in rows]), _one_hot([row[3] for row in rows])]
    return {row[0]: i + 1 for i, row in enumerate(rows)}, _padded(features)


def _items(path: Path) -> tuple[dict[str, int], np.ndarray]:
    rows = _rows(path)
    genres = sorted({genre for row in rows for genre in row[3].split()})
    has = np.array([[genre in row[3].split() for genre in genres] for row in rows])
    years = np.array([[float(row[2]) if row[2].isdigit() else 1990.0] for row in rows])
    return {row[0]: i + 1 for i, row in enumerate(rows)}, _padded([(years - 1990) / 15, has])
