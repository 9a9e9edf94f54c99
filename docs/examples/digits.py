"""A Vision Transformer that reads handwritten digits: ``python docs/examples/digits.py``.

An image of 8 × 8 pixels becomes 16 patches of 2 × 2, which a Transformer reads like words (Dosovitskiy et al. 2020): in
NumPy, around `fastattn.MultiHeadAttention` and its `backward`. The 1797 images are those of scikit-learn. It prints how
many held-out digits it reads right, and what that owes to the patches it looks at. See digits.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy is imported: see training.Trainer

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray
from saving import options, save_figure, save_result
from training import Trainer, warm_then_cosine
from transformer import Array, Block, LayerNorm, Linear, Parameter, Part

from fastattn import MultiHeadAttention
from fastattn.console.terminal import Progress

Labels = NDArray[np.int64]
SIDE, PATCH = 8, 2
PLACES = (SIDE // PATCH) ** 2
#: What the split into training and held-out images is drawn from. The settings below were found on another split.
SPLIT = 0


@dataclass(frozen=True)
class Settings:
    """The size of the model and of its training."""

    embed: int = 48
    heads: int = 4
    layers: int = 3
    batch: int = 64
    steps: int = 2000
    rate: float = 3e-3
    seed: int = 0


QUICK = Settings(embed=32, heads=2, layers=2, batch=32, steps=600, rate=4e-3)

# -- the images --------------------------------------------------------------------------------------------------------


class Images(NamedTuple):
    """Images (n, 8, 8) with ink from 0 to 1, and the digits on them."""

    pixels: Array
    labels: Labels


def digits(split: int = SPLIT) -> tuple[Images, Images]:
    """Return the images to train on and the held-out ones, a fifth of all."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(split).permutation(len(data.target))
    pixels, labels = (data.images[order] / 16).astype(np.float32), data.target[order].astype(np.int64)
    held = len(order) // 5
    return Images(pixels[held:], labels[held:]), Images(pixels[:held], labels[:held])


def shifted(pixels: Array, rng: np.random.Generator) -> Array:
    """Return each image moved by up to a pixel, up or down and to a side."""
    padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1)))
    down, right = rng.integers(0, 3, (2, len(pixels), 1, 1))
    return padded[np.arange(len(pixels))[:, None, None], down + np.arange(SIDE)[:, None], right + np.arange(SIDE)]


def in_patches(pixels: Array) -> Array:
    """Return images (B, 8, 8) as rows of patches, (B, 16, 4)."""
    across = SIDE // PATCH
    return pixels.reshape(-1, across, PATCH, across, PATCH).swapaxes(2, 3).reshape(-1, PLACES, PATCH * PATCH)


def nearest_neighbour(train: Images, held: Images) -> float:
    """Return how often the nearest training image has the same digit: what needs no training at all."""
    known, asked = (images.pixels.reshape(len(images.pixels), -1) for images in (train, held))
    distances = (known**2).sum(axis=1) - 2 * asked @ known.T
    return float((train.labels[distances.argmin(axis=1)] == held.labels).mean())


# -- the model ---------------------------------------------------------------------------------------------------------


class Attention(Part):
    """fastattn's layer among the parts: its parameters are trained with all others.

    `key_mask` leaves patches out, True being those that stay. With `keep_weights`, a call keeps its `weights`.
    """

    def __init__(self, embed: int, heads: int, rng: np.random.Generator, dtype: DTypeLike) -> None:
        self.layer = MultiHeadAttention(embed, heads, rng=rng, dtype=dtype)
        self.named = {name: Parameter(value) for name, value in self.layer.state_dict().items()}
        self.key_mask: NDArray[np.bool_] | None = None
        self.keep_weights = False
        self.weights: Array | None = None

    def __call__(self, x: Array) -> Array:
        for name, parameter in self.named.items():
            setattr(self.layer, name.replace(".", "_"), parameter.value)
        asked = {"return_weights": self.keep_weights, "return_saved": True}
        out, *weights, self.saved = self.layer(x, key_mask=self.key_mask, **asked)
        self.weights = weights[0] if weights else None
        return out

    def backward(self, grad: Array) -> Array:
        (grad_x,), grads = self.layer.backward(grad, self.saved)
        for name, parameter in self.named.items():
            parameter.grad[...] = grads[name]
        return grad_x


class VisionTransformer(Part):
    """Patches to vectors, one more vector that reads them all, blocks, and the scores of ten digits from that one."""

    def __init__(self, settings: Settings, dtype: DTypeLike = np.float32) -> None:
        rng = np.random.default_rng(settings.seed)
        embed, gain = settings.embed, 1 / np.sqrt(2 * settings.layers)
        self.enter = Linear(PATCH * PATCH, embed, rng, dtype)
        self.reader = Parameter((0.5 * rng.standard_normal(embed)).astype(dtype))
        self.places = Parameter((0.5 * rng.standard_normal((1 + PLACES, embed))).astype(dtype))
        self.blocks = []
        for _ in range(settings.layers):
            attention = Attention(embed, settings.heads, rng, dtype)
            self.blocks.append(Block(attention, embed, 2 * embed, rng, dtype, gain))
        self.norm = LayerNorm(embed, dtype)
        self.scores = Linear(embed, 10, rng, dtype, gain=0.1)

    def __call__(self, pixels: Array) -> Array:
        """Return the scores of the digits for images (B, 8, 8): (B, 10)."""
        x = np.empty((len(pixels), 1 + PLACES, len(self.reader.value)), self.reader.value.dtype)
        x[:, 0] = self.reader.value
        x[:, 1:] = self.enter(in_patches(2 * pixels - 0.6))  # about mean 0 and deviation 1
        x += self.places.value
        for block in self.blocks:
            x = block(x)
        return self.scores(self.norm(x[:, 0]))

    def backward(self, grad: Array) -> None:
        first = self.norm.backward(self.scores.backward(grad))
        grad = np.zeros((len(first), 1 + PLACES, first.shape[-1]), first.dtype)
        grad[:, 0] = first
        for block in reversed(self.blocks):
            grad = block.backward(grad)
        np.sum(grad, axis=0, out=self.places.grad)
        self.reader.grad[...] = self.places.grad[0]
        self.enter.backward(np.ascontiguousarray(grad[:, 1:]))


# -- training ----------------------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """A model that has been trained, its accuracy on the held-out images by steps, and how long it took."""

    model: VisionTransformer
    steps: list[int]
    accuracy: list[float]
    seconds: float


def train(settings: Settings, known: Images, held: Images) -> Trained:
    """Train a model on shifted images."""
    model = VisionTransformer(settings)
    trainer, rng = Trainer(model), np.random.default_rng(settings.seed + 1)
    steps: list[int] = []
    accuracies: list[float] = []
    recent: deque[float] = deque(maxlen=20)
    started = time.perf_counter()
    with Progress(f"training, seed {settings.seed}") as progress:
        for step in range(1, settings.steps + 1):
            chosen = rng.integers(0, len(known.labels), settings.batch)
            rate = warm_then_cosine(step, settings.steps, settings.rate)
            recent.append(trainer.step(shifted(known.pixels[chosen], rng), known.labels[chosen], rate))
            progress(step, settings.steps, f"loss {np.mean(recent):.3f}")
            if step % max(1, settings.steps // 20) == 0:
                steps.append(step)
                accuracies.append(accuracy(model, held))
    return Trained(model, steps, accuracies, time.perf_counter() - started)


def accuracy(model: VisionTransformer, images: Images, keep: NDArray[np.bool_] | None = None) -> float:
    """Return the part of the images that is read right; `keep` says which patches of each may be looked at, (n, 16)."""
    if keep is not None:
        keep = np.column_stack([np.ones(len(keep), bool), keep])  # the reader itself stays
    for block in model.blocks:
        block.attention.key_mask = keep
    right = model(images.pixels).argmax(axis=1) == images.labels
    for block in model.blocks:
        block.attention.key_mask = None
    return float(right.mean())


# -- what it looks at --------------------------------------------------------------------------------------------------


def looks(model: VisionTransformer, pixels: Array) -> Array:
    """Return how much of the last layer's weight the reader gives to each patch in each head, (n, heads, 16)."""
    attention = model.blocks[-1].attention
    attention.keep_weights = True
    model(pixels)
    weights, attention.keep_weights, attention.weights = attention.weights, False, None
    return weights[:, :, 0, 1:]


def without_patches(model: VisionTransformer, images: Images, count: int, seed: int) -> dict[str, float]:
    """Return the accuracy where `count` patches of each image are left out, by which ones are."""
    ink = in_patches(images.pixels).sum(axis=2)
    looked = looks(model, images.pixels).mean(axis=1)
    rng = np.random.default_rng(seed)
    order = {
        "none": None,
        "those looked at most": -looked,
        "those looked at least": looked,
        "any": rng.random(ink.shape),
        "any with ink": rng.random(ink.shape) - (ink > 0),
        "those with most ink": -ink,
    }
    found = {}
    for name, by in order.items():
        keep = None if by is None else by.argsort(axis=1).argsort(axis=1) >= count
        found[name] = accuracy(model, images, keep)
    return found


# -- pictures ----------------------------------------------------------------------------------------------------------


def draw(trained: Trained, held: Images) -> Iterator[tuple[str, Any]]:
    """Yield the name and the figure of each picture."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    from fastattn.plot.colours import RAMP

    first = [int(np.flatnonzero(held.labels == digit)[0]) for digit in range(10)]
    weights = looks(trained.model, held.pixels[first])
    across = SIDE // PATCH
    maps = np.concatenate([weights.mean(axis=1, keepdims=True), weights], axis=1).reshape(10, -1, across, across)
    names = ["all heads", *(f"head {head}" for head in range(weights.shape[1]))]
    colours = LinearSegmentedColormap.from_list("weights", RAMP)
    figure = Figure((9, 0.95 * (1 + len(names))))
    for row, axes in enumerate(figure.subplots(1 + len(names), 10)):
        for column, ax in enumerate(axes):
            ax.set(xticks=[], yticks=[])
            extent = (0, SIDE, SIDE, 0)
            if row:
                ax.imshow(maps[column, row - 1], cmap=colours, vmin=0, vmax=maps.max(), extent=extent)
                pixels = np.dstack([np.zeros((SIDE, SIDE, 3)), 0.55 * held.pixels[first[column]]])
                ax.imshow(pixels, extent=extent)
            else:
                ax.imshow(held.pixels[first[column]], cmap="gray_r", extent=extent)
        axes[0].set_ylabel(names[row - 1] if row else "image", fontsize=9)
    figure.subplots_adjust(wspace=0.08, hspace=0.08)
    yield "digits-attention", figure


# -- the command -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Train, print what was learned, and keep it if asked to."""
    asked = options(__doc__)
    settings = replace(QUICK if asked.quick else Settings(), seed=asked.seed)
    known, held = digits()
    print(f"{len(known.labels)} images to train on, {len(held.labels)} held out")
    seeds = [settings.seed + more for more in range(1 if asked.quick else 3)]
    runs = [train(replace(settings, seed=seed), known, held) for seed in seeds]
    accuracies = [accuracy(run.model, held) for run in runs]
    trained = runs[0]
    parameters = sum(parameter.value.size for _, parameter in trained.model.parameters())
    print(f"{parameters:,} parameters, {settings.steps} steps, {trained.seconds:.0f} s\n")
    print("held-out digits read right")
    for seed, each in zip(seeds, accuracies, strict=True):
        print(f"  {each:.1%}  seed {seed}")
    print(f"  {np.mean(accuracies):.1%}  mean of {len(seeds)}")
    nearest = nearest_neighbour(known, held)
    print(f"  {nearest:.1%}  by the nearest training image\n")
    left_out = without_patches(trained.model, held, 4, settings.seed)
    print("seed", settings.seed, "with 4 of the 16 patches left out")
    for name, each in left_out.items():
        print(f"  {each:.1%}  {name}")

    if asked.save:
        result = {
            "settings": asdict(settings),
            "split": SPLIT,
            "images": {"training": len(known.labels), "held out": len(held.labels)},
            "parameters": parameters,
            "seconds": [round(run.seconds) for run in runs],
            "accuracy": dict(zip(map(str, seeds), accuracies, strict=True)),
            "mean accuracy": float(np.mean(accuracies)),
            "accuracy of the nearest training image": nearest,
            "accuracy with 4 patches left out": left_out,
            "curve": {"step": trained.steps, "accuracy": trained.accuracy},
        }
        print(f"\n{save_result('digits', result)}")
        for name, figure in draw(trained, held):
            print(save_figure(name, figure))


if __name__ == "__main__":
    main()
