"""Which lines of the training text a prediction is owed to: TRAK, by projected gradients.

    python examples/attribution.py [--quick] [--plot attribution.png]

A byte-level transformer learns lines of some of this package's files. A few lines that are held
back are then asked about: the gradient of the model's output for each line, training and held
back, is projected to a few hundred numbers (`gradient_features`: each sample's own gradient, a few
at a time), and `trak` scores every training line by how much it speaks for each of the others
(Park et al. 2023).

Two things are known beforehand, and looked for: each line that is asked about has a copy with a few
bytes changed among the training lines, which should come first; and lines of its own file should
score above lines of others.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from _common import (
    ROOT,
    Transformer,
    check,
    encode,
    parse,
    parser,
    relative_error,
    shuffled,
    train,
)
from mlx.utils import tree_map

from mlxshim.nn import gradient_features, random_projection, trak, value_and_grad

FILES = (
    "docs/mlx-issues.md",
    "mlxshim/rules/quantized.py",
    "mlxshim/rules/linalg.py",
    "mlxshim/nn/privacy.py",
    "mlxshim/doctor.py",
    "README.md",
)


def margin(model: Any, tokens: mx.array) -> tuple[mx.array, mx.array]:
    """log(p / (1 - p)) of the right next byte, and 1 - p, both the mean over the line's bytes."""
    known = (tokens[1:] != 0).astype(mx.float32)
    logits = model(tokens[None, :-1])[0]
    others = mx.arange(logits.shape[-1]) == tokens[1:, None]
    right = mx.take_along_axis(logits, tokens[1:, None], axis=-1)[:, 0]
    wrong = mx.logsumexp(mx.where(others, mx.array(-1e9), logits), axis=-1)
    log_odds, count = right - wrong, known.sum()
    return (log_odds * known).sum() / count, (mx.sigmoid(-log_odds) * known).sum() / count


def changed(line: str) -> str:
    """The line with every ninth byte another one."""
    return "".join("~" if i % 9 == 4 else c for i, c in enumerate(line))


def text(count: int, held_back: int, seed: int) -> tuple[list[str], list[int], list[str]]:
    """(training lines, the file of each, lines to ask about: `held_back` of each file)."""
    train_lines, files, asked = [], [], []
    for number, file in enumerate(FILES):
        lines = [line.strip() for line in (ROOT / file).read_text("utf-8").splitlines()]
        lines = shuffled(sorted({line for line in lines if len(line) >= 40}), seed)
        ours = lines[:held_back]
        own = lines[held_back : held_back + count - held_back]
        train_lines += [changed(line) for line in ours] + own
        files += [number] * (len(ours) + len(own))
        asked += ours
    return train_lines, files, asked


def of_own_file(scores: mx.array, files: mx.array, own: mx.array, left_out: mx.array) -> float:
    """How often a line of one's own file scores above a line of another, the copy left out."""
    wins = 0.0
    for row, file, copy in zip(scores, own.tolist(), left_out.tolist()):
        mine = (files == file) & (mx.arange(len(files)) != copy)
        higher = row[:, None] > row[None]
        pairs = mine[:, None] & (files != file)[None]
        wins += float((higher & pairs).sum() / pairs.sum())
    return wins / len(scores)


def draw(path: str, scores: mx.array, files: list[int], copies: list[int]) -> None:
    import matplotlib.pyplot as plt

    scale = mx.abs(scores).max(axis=1, keepdims=True)
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    image = axis.imshow(scores / scale, aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1)
    axis.scatter(copies, range(len(copies)), s=60, facecolors="none", edgecolors="k", lw=0.8)
    starts = [files.index(number) for number in range(len(FILES))]
    for start in starts[1:]:
        axis.axvline(start - 0.5, color="k", lw=0.4)
    axis.set_xticks(starts, FILES, rotation=12, ha="left", fontsize=7)
    axis.set(xlabel="training lines", ylabel="lines asked about")
    axis.set_title("TRAK's scores; circles: the changed copy of the line asked about")
    figure.colorbar(image, label="score, of the row's largest")
    figure.savefig(path, dpi=70)


def main() -> None:
    about = parser(__doc__)
    about.add_argument("--lines", type=int, default=60, help="of each file to train on")
    about.add_argument("--held-back", type=int, default=4, help="of each file to ask about")
    about.add_argument("--steps", type=int, default=300)
    about.add_argument("--dimension", type=int, default=256, help="of the projected gradients")
    about.add_argument("--ridge", type=float, default=0.1)
    options = parse(about, lines=12, steps=40, dimension=64)
    length = 72
    layers, dim = (1, 32) if options.quick else (2, 64)

    lines, file_of, asked = text(options.lines, options.held_back, options.seed)
    training, questions = encode(lines, length), encode(asked, length)
    model = Transformer(dim, layers)
    loss = train(model, training, options.steps)
    print(f"{len(lines)} lines of {len(FILES)} files learned, loss {loss:.2f} nats a byte")

    features = gradient_features(model, margin, options.dimension, seed=options.seed)
    (_, residuals), of_training = features(model, training)
    _, of_questions = features(model, questions)
    mx.eval(residuals, of_training, of_questions)
    one = value_and_grad(model, margin)
    for i in (0, len(questions) - 1):
        single = tree_map(lambda g: g[None], one(model, questions[i])[1])
        want = random_projection(single, options.dimension, seed=options.seed)[0]
        check("features of one line at a time", relative_error([of_questions[i]], [want]), 1e-3)

    scores = trak(of_training, of_questions, residuals, ridge=options.ridge)
    copies = [lines.index(changed(line)) for line in asked]
    own = [file_of[copy] for copy in copies]
    order = mx.argsort(-scores, axis=1).tolist()
    ranks = [row.index(copy) + 1 for row, copy in zip(order, copies)]
    first, chance = sum(rank == 1 for rank in ranks), 1 / len(lines)
    print(
        f"the changed copy comes first for {first} of {len(ranks)} lines (by chance "
        f"{chance * len(ranks):.2f}), at place {max(ranks)} of {len(lines)} at worst"
    )
    same = of_own_file(scores, mx.array(file_of), mx.array(own), mx.array(copies))
    print(f"a line of the same file scores above one of another {same:.0%} of the time")
    for i in range(0, len(asked), options.held_back * 2):
        print(f"\n{asked[i][:90]}")
        for j in order[i][:3]:
            print(f"  {scores[i, j].item():+.2e}  {FILES[file_of[j]]:<28} {lines[j][:60]}")
    if options.plot:
        draw(options.plot, scores, file_of, copies)
    if first < len(ranks) / 2 or same <= 0.5:
        raise SystemExit("the copies were not found")


if __name__ == "__main__":
    main()
