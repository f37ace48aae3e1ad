"""QM9: twelve properties of small molecules, on their raw scales from 0.02 to 280."""

import ast
import csv

import numpy as np

from benchmarks.data.base import (
    Recipe,
    Split,
    Task,
    cached,
    columns,
    hard_sharing,
    packaged_file,
    shuffled,
    standardized,
)
from mtl_optax.compare import Problem

SHA256 = (
    "19f0a5d595462d52cd82eef3370f3e9eb55a1f52cb14985657200349568deff3",
    "2bca113fdc0b28a13563c80ed9b240e934f3da6c64c64fe74ddb4f0f36036e61",
    "9c5efb5733d2af149db8d95d36ff198b4ffed12d9f7b344220a1e5877d5c6a43",
)
TARGETS = {
    "Dipole_debye": "dipole",
    "Polarizability_bohr3": "polarizability",
    "HOMO_au": "homo",
    "LUMO_au": "lumo",
    "HOMO_LUMO_gap_au": "gap",
    "R2_bohr2": "extent",
    "ZPVE_au": "zpve",
    "InternalEnergy_0K_au": "u0",
    "InternalEnergy_298K_au": "u298",
    "Enthalphy_298K_au": "h298",
    "GibbsFreeEnergy_298K_au": "g298",
    "Heatcapacity_Cv_cal_mol_K": "cv",
}
CHARGES = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
MAX_ATOMS = 29
# Distances in Å at which pairs of two elements are counted, smoothly.
CENTRES = np.array([1.0, 1.25, 1.5, 2.0, 2.5, 3.25, 4.0, 5.5])


def molecule_features(charges: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Atoms of each element, Coulomb matrix eigenvalues, and pairs of elements by distance."""
    elements = np.array(list(CHARGES.values()))
    present = charges[:, None] == elements
    distances = np.linalg.norm(positions[:, None] - positions, axis=-1)
    apart = ~np.eye(len(charges), dtype=bool)
    coulomb = np.where(
        apart, np.outer(charges, charges) / np.where(apart, distances, 1.0), 0.0
    ) + np.diag(0.5 * charges**2.4)
    eigenvalues = np.zeros(MAX_ATOMS)
    eigenvalues[: len(charges)] = np.sort(np.linalg.eigvalsh(coulomb))[::-1]
    near = np.exp(-((distances[..., None] - CENTRES) ** 2) / 0.1) * apart[..., None]
    counts = np.einsum("ie,ijr,jf->efr", present, near, present)
    pairs = counts[np.triu_indices(len(elements))]
    return np.concatenate([present.sum(axis=0), eigenvalues, pairs.ravel()])


def qm9(*, sizes: tuple[int, int, int] = (15_000, 2_000, 3_000)) -> Problem:
    """QM9: twelve regressions whose targets are centred but not scaled.

    Args:
      sizes: number of molecules for training, validation and test.
    """
    arrays = cached(f"qm9-{sum(sizes)}", lambda: _build(sum(sizes)))
    train, validation, test = shuffled(sum(sizes), *sizes)
    inputs = standardized(arrays["inputs"], train)
    targets = arrays["targets"] - arrays["targets"][train].mean(axis=0)
    names = list(TARGETS.values())

    def split(rows: np.ndarray) -> Split:
        return Split(inputs[rows], columns(targets[rows], names))

    return hard_sharing(
        title="QM9: twelve properties of molecules on raw scales",
        source=f"{sum(sizes):,} random molecules of QM9 as shipped with qm9pack; targets are "
        "centred, not scaled",
        tasks=tuple(Task(name, 1, "regression") for name in names),
        train=split(train),
        validation=split(validation),
        test=split(test),
        recipe=Recipe(
            steps=1000, batch_size=128, hidden=(128, 128), learning_rates=(1e-3, 3e-3, 1e-2)
        ),
    )


def _build(count: int) -> dict[str, np.ndarray]:
    rows = []
    for i, sha256 in enumerate(SHA256):
        path = packaged_file(
            "qm9pack",
            f"data/qm9_part{i + 1}.csv",
            sha256=sha256,
            install="pip install 'mtl-optax[bench]'",
        )
        with path.open(encoding="utf-8") as file:
            header, *some = csv.reader(file)
            rows += some
    chosen = [rows[i] for i in shuffled(len(rows), count)[0]]
    molecules = [dict(zip(header, row, strict=True)) for row in chosen]
    return {
        "inputs": np.stack(
            [
                molecule_features(
                    np.array([CHARGES[element] for element in ast.literal_eval(m["Elements"])]),
                    np.array(ast.literal_eval(m["XYZ_Ang"])),
                )
                for m in molecules
            ]
        ),
        "targets": np.array([[float(m[target]) for target in TARGETS] for m in molecules]),
    }
