"""batch_rows: any batch, also without items, places or users."""

from __future__ import annotations

import random

from calls import FLOATS, numbers, values


def draw():
    count, width, items = random.choice([1, 5, 63, 130]), random.choice([1, 5, 64]), random.choice([1, 90])
    slots = numbers(0, count, random.choice([0, 1, 9]), random.randint(1, 12))
    shares = values(items).abs() + 0.1
    return values(count, width, dtype=random.choice(FLOATS)), slots, numbers(0, items, count), shares


def follow(library, arguments, results):
    embeddings, slots = arguments[:2]
    columns, histories, by_place, mask, log_popularity = results
    assert columns.shape == embeddings.shape and by_place.shape == (*slots.shape, embeddings.shape[1])
    assert histories.shape[:2] == mask.shape and len(log_popularity) == len(embeddings)
    rest = (slots, *embeddings.shape, embeddings.dtype)
    assert library.batch_rows_backward(columns, None, by_place, *rest).shape == embeddings.shape
