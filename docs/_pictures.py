"""A picture a method: what it makes of two gradients in conflict, and of two of unequal size.

One program draws all: each strategy of the catalog is run on the same three pairs of gradients, and
what is seen there is said in words under it.
"""

import functools
import html
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import mtl_optax as mtl

ROUNDS = 10
FALL = np.array([0.9, 0.99])  # of the losses from one update to the next
CONFLICT = np.array([[4.0, 0.0], [-1.2, 1.6]])
EQUAL = np.array([[np.cos(t), np.sin(t)] for t in (0.15, 1.4)])
TIMES = np.array([1.0, 10.0])
CASES = np.stack([CONFLICT, EQUAL, EQUAL * TIMES[:, None]])
LOSSES = np.stack([np.ones(2), np.ones(2), TIMES])


class Seen(NamedTuple):
    """The last update of a strategy in the three cases, each `(2,)`."""

    conflict: np.ndarray
    equal: np.ndarray
    unequal: np.ndarray

    def fates(self) -> tuple[str, str]:
        """What a small step does to the losses of a and b where they conflict."""
        slopes = CONFLICT @ self.conflict
        slopes /= np.linalg.norm(CONFLICT, axis=1) * max(np.linalg.norm(self.conflict), 1e-30)
        return tuple("stays" if abs(s) < 1e-3 else "falls" if s > 0 else "rises" for s in slopes)

    def turn(self) -> float:
        """By how many degrees the update turns towards b when b is ten times as large."""
        angles = [np.arctan2(update[1], update[0]) for update in (self.equal, self.unequal)]
        return float(np.degrees(angles[1] - angles[0]))

    def words(self) -> tuple[str, str]:
        """One line for each half of the picture."""
        a, b = self.fates()
        fate = f"both losses {a[:-1]}" if a == b != "stays" else f"a's loss {a}, b's {b}"
        degrees = round(self.turn())
        towards = "b" if degrees > 0 else "a"
        scale = f"turns by {abs(degrees)}° towards {towards}" if degrees else "the direction stays"
        return f"a small step: {fate}", f"b ten times as large: {scale}"


@functools.cache
def see(name: str) -> Seen | None:
    """Runs a strategy; None where it asks for more than gradients, losses and metrics."""
    row = mtl.STRATEGIES[name]
    if row.needs not in ("losses", "gramian", "rows", "batches") or set(row.extra_args) - {"kpis"}:
        return None
    tx = mtl.make(name, num_tasks=2, key=jax.random.key(0))
    extra = {arg: jnp.array([0.5, 0.8]) for arg in row.extra_args}

    def train(rows, losses):
        def step(state, fall):
            jac = mtl.as_jacobian(rows, losses * fall, shared=None)
            updates = (jac, jac, jac) if row.needs == "batches" else jac
            update, state = tx.update(updates, state, jnp.zeros(2), **extra)
            return state, update

        falls = jnp.asarray(FALL ** np.arange(ROUNDS)[:, None], jnp.float32)
        return jax.lax.scan(step, tx.init(jnp.zeros(2)), falls)[1][-1]

    cases = jnp.asarray(CASES, jnp.float32), jnp.asarray(LOSSES, jnp.float32)
    return Seen(*np.asarray(jax.jit(jax.vmap(train))(*cases), float))


INK, UPDATE, OTHER = "#222222", "#0072B2", "#B34A00"


def draw(name: str, seen: Seen) -> dict[str, str]:
    """The halves of the picture as SVG: `"conflict"` and `"scale"`."""
    left, right = seen.words()
    cone = [ORIGIN.at(np.array(p)) for p in ((0, 0), (0, 4), (4 * 0.8 / 0.6, 4))]
    shown, note = _fitted(seen.conflict)
    conflict = [
        f'<path d="M{" L".join(f"{x} {y}" for x, y in cone)} Z" fill="#e8e8e8"/>',
        *(ORIGIN.arrow(row, INK, 2.5) for row in CONFLICT),
        ORIGIN.label(CONFLICT[0], "gradient of a", (-4, 22), "end"),
        ORIGIN.label(CONFLICT[1], "of b", (-8, 0), "end"),
        ORIGIN.label(np.array([0.12, 4]), "neither loss rises", (0, 18)),
        ORIGIN.arrow(shown, UPDATE, 4),
        _text(20, 34, "the update" + note, UPDATE),
        _text(20, 296, left),
    ]
    wide = _Panel(120, 250, 150)
    scale = [
        *(wide.arrow(row, INK, 2.5) for row in EQUAL),
        wide.label(EQUAL[0], "a", (8, 14)),
        wide.label(EQUAL[1], "b", (-8, 10), "end"),
        wide.arrow(1.12 * _unit(seen.unequal), UPDATE, 4),
        wide.arrow(0.9 * _unit(seen.equal), OTHER, 3, "7 5"),
        _text(20, 34, "direction of the update where a and b are alike,", OTHER),
        _text(20, 54, "and where b is ten times as large", UPDATE),
        _text(20, 296, right),
    ]
    return {"conflict": _svg(f"{name}: {left}", conflict), "scale": _svg(f"{name}: {right}", scale)}


def _svg(title: str, parts: list[str]) -> str:
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 490 312" font-size="16" '
        'font-family="Helvetica, Arial, sans-serif" role="img" '
        f'aria-label="{html.escape(title)}">'
        + "".join(_marker(colour) for colour in (INK, UPDATE, OTHER))
        + '<rect width="490" height="312" rx="8" fill="#ffffff"/>'
        + "".join(parts)
        + "</svg>\n"
    )


class _Panel(NamedTuple):
    """Coordinates of a half: its origin, and pixels a unit."""

    x: float
    y: float
    unit: float

    def at(self, point: np.ndarray) -> tuple[float, float]:
        return round(self.x + self.unit * point[0], 1), round(self.y - self.unit * point[1], 1)

    def arrow(self, tip: np.ndarray, colour: str, width: float, dashes: str = "") -> str:
        (x, y), style = self.at(tip), f' stroke-dasharray="{dashes}"' if dashes else ""
        if np.linalg.norm(tip) * self.unit < 4:  # no update at all
            return f'<circle cx="{x}" cy="{y}" r="5" fill="{colour}"/>'
        return (
            f'<path d="M{self.x} {self.y} L{x} {y}" stroke="{colour}" stroke-width="{width}"{style}'
            f' marker-end="url(#m{colour[1:]})"/>'
        )

    def label(self, tip: np.ndarray, text: str, offset: tuple, anchor: str = "start") -> str:
        x, y = self.at(tip)
        return _text(x + offset[0], y + offset[1], text, INK, anchor)


ORIGIN = _Panel(200, 250, 46)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(np.linalg.norm(vector), 1e-30)


def _fitted(update: np.ndarray) -> tuple[np.ndarray, str]:
    """An update no longer than the picture has room for, and a word on it where it was longer."""
    room = min(4.4 / max(update[0], 1e-9), 3.9 / max(-update[0], 1e-9), 4.2 / max(update[1], 1e-9))
    if room >= 1:
        return update, ""
    return room * update, f", {np.linalg.norm(update):.1f} long, drawn shorter"


def _text(x: float, y: float, text: str, colour: str = INK, anchor: str = "start") -> str:
    return (
        f'<text x="{x}" y="{y}" fill="{colour}" text-anchor="{anchor}">{html.escape(text)}</text>'
    )


def _marker(colour: str) -> str:
    return (
        f'<marker id="m{colour[1:]}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="12" '
        'markerHeight="12" orient="auto" markerUnits="userSpaceOnUse">'
        f'<path d="M0 0 L10 5 L0 10 z" fill="{colour}"/></marker>'
    )
