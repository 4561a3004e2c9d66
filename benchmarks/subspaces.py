"""New subspaces for all matrices of a model, as GaLore takes them from gradients, beside torch's own SVD.

    python benchmarks/subspaces.py        the 182 matrices of Gemma-3-1b's shape, rank 128; a tenth on a CPU

Gradients are random, of four spectra. Accuracy first: the share of the squares that the SVD's basis holds,
and the angle of the directions that are at least 1.25 times as strong as the first one left out.
"""

import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from methods.galore import top_singular_vectors

HELD, ANGLE, CLEAR = 0.99, 1.0, 1.25  # as methods/galore.py says: a share, degrees, a ratio
SPECTRA = {
    "noise": None,
    "i ** -0.25": lambda i: i**-0.25,
    "i ** -1": lambda i: 1 / i,
    "exp(-i / 50)": lambda i: (-i / 50).exp(),
}


def main() -> None:
    cuda = torch.cuda.is_available()
    device, layers, width = ("cuda", 26, 1152) if cuda else ("cpu", 3, 288)
    rank, mlp, q, kv = width // 9, 6 * width, width * 8 // 9, width * 2 // 9
    shapes = [(q, width), (kv, width), (kv, width), (width, q), (mlp, width), (mlp, width), (width, mlp)]
    print("| spectrum | matrices | seconds | one after another by SVD | held | degrees |")
    print("|---|---|---|---|---|---|")
    for name, spectrum in SPECTRA.items():
        made = [drawn(shape, spectrum, device) for _ in range(layers) for shape in shapes]
        top_singular_vectors(made, rank)  # what libraries make once
        torch.linalg.svd(made[0], full_matrices=False)
        seconds, bases = timed(lambda made=made: top_singular_vectors(made, rank), device)
        exact = [timed(lambda m=m: torch.linalg.svd(m, full_matrices=False), device) for m in made[:7]]
        found = [accuracy(m, b, *svd) for m, b, (_, svd) in zip(made, bases, exact, strict=False)]
        held, degrees = zip(*found, strict=True)
        right = min(held) >= HELD and max(degrees) <= ANGLE
        svd = sum(s for s, _ in exact) * layers
        speed = f"{seconds:.2f} | {svd:.1f}, {layers} times a layer's" if right else "WRONG | "
        print(f"| {name} | {len(made)} | {speed} | {min(held):.4%} | {max(degrees):.2f} |", flush=True)


def drawn(shape: tuple[int, int], spectrum, device: str) -> torch.Tensor:
    """A matrix of these singular values, or of noise."""
    least = min(shape)
    if not spectrum:
        return torch.randn(shape, device=device)
    left, right = (torch.linalg.qr(torch.randn(n, least, device=device))[0] for n in shape)
    return left * spectrum(torch.arange(1.0, least + 1, device=device)) @ right.T


def timed(do, device: str):
    """-> seconds, and what it gave."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    given = do()
    wait()
    return time.perf_counter() - start, given


def accuracy(matrix, basis, left, values, right) -> tuple[float, float]:
    """-> the share of the best basis's squares that this one holds, a clear direction's largest angle."""
    rank, tall = basis.shape[1], matrix.shape[0] >= matrix.shape[1]
    best = (right.T if tall else left).double()
    held = ((matrix if tall else matrix.T).double() @ basis.double()).square().sum()
    share = (held / values[:rank].double().square().sum()).item()
    if rank == len(values):
        return share, 0.0
    clear = best[:, : int((values[:rank] >= CLEAR * values[rank]).sum())]
    inside = (basis.double().T @ clear).norm(dim=0).clamp(max=1.0)
    return share, math.degrees(inside.acos().max().item()) if clear.shape[1] else 0.0


if __name__ == "__main__":
    main()
